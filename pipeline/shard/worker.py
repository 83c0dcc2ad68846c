"""The work on one shard, in three steps, by a worker within its memory budget.

`write` is all that most runs need: it reads each tensor, finds the thresholds of the groups that lie in the shard,
and writes the pruned shard. Groups that lie in several shards take two steps before it: `sample` looks at a few scores
to guess where the threshold is, `measure` counts all of them around the guess. Their results are files in the
output folder; what returns to the driver is only that they are there.

Each step may be told which task will probably follow: the first section of that one is read while the last of this one
is computed and the shard made durable.

A step that a device has too little memory for begins again with less of it, or without: the bytes are the same.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import DeviceError
from pipeline.formats.tensor import Sides
from pipeline.plan import PairedTensor, Shard
from pipeline.recipe import LEAST_DEVICE_MEMORY, Recipe, format_bytes
from pipeline.scoring.device import has_failed, is_full, make_engine
from pipeline.scoring.engine import DeviceEngine
from pipeline.scoring.threshold import histograms
from pipeline.shard import passes
from pipeline.shard.delta import Checked, DeltaWriter, promised
from pipeline.shard.landing import shares
from pipeline.shard.passes import Bench, Scratch
from pipeline.shard.reading import NOTHING, OVERHEAD_BYTES, Held, Pieces, SectionReader
from pipeline.shard.sample import LONG_RUN, RUN, far, survey, wide_size
from pipeline.shard.section import Section, sections
from pipeline.shard.table import MEASURED
from pipeline.shard.task import (
    Done,
    Interrupted,
    Task,
    delta_facts_name,
    here,
    load_means,
    measure_name,
    record_name,
    rows_name,
    sample_name,
    save_arrays,
)
from pipeline.shard.writing import BUFFERS, Sink
from pipeline.storage.address import open_store
from pipeline.storage.store import Store, Writer


class Use(IntEnum):
    """What a worker makes of its device; each takes less of its memory than the one before."""

    RESIDENT = 0
    STREAMED = 1
    NONE = 2


Work = Callable[["Worker", Task, Task | None], Done]


def _step(work: Work) -> Work:
    """A step that begins again with less of the device where its memory does not do."""

    @wraps(work)
    def step(worker: Worker, task: Task, following: Task | None = None) -> Done:
        notes: list[str] = []
        worker.tell.begin()
        while True:
            worker.tell.again()
            try:
                with _failures():
                    return replace(work(worker, task, following), note="; ".join(notes))
            except Exception as error:
                if not is_full(error) or worker.use is Use.NONE:
                    raise
            notes.append(worker.use_less())

    return step


@contextmanager
def _failures() -> Iterator[None]:
    """What a device says that has failed, as a `DeviceError`."""
    try:
        yield
    except Exception as error:
        if not has_failed(error):
            raise
        why = str(error).strip().split("\n")[0]
        raise DeviceError(f"the GPU of {here()} has failed: {why}") from error


class Worker:
    """Works on one shard at a time; lives as long as the run.

    Args:
        recipe: the recipe of the run.
        out: the folder that the run holds.
        progress: told how many bytes of input have been dealt with, as it happens.
        cancelled: makes the work stop soon with `Interrupted`.
        share: of a device's memory that is this worker's, unless the recipe says how much.

    Raises:
        UserError: there is no such device.
        DeviceError: it has failed; from steps too.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Store,
        progress: Callable[[int], None] | None = None,
        cancelled: threading.Event | None = None,
        share: float = 1.0,
    ):
        self._recipe = recipe
        self._out = out
        self._inputs = open_store(recipe.base), open_store(recipe.finetuned)
        self._scratch = Scratch()
        self._ahead: _Ahead | None = None
        self.tell = _Progress(progress or (lambda nbytes: None))
        self._cancelled = cancelled or threading.Event()
        with _failures():
            self._engine = make_engine(recipe.method, recipe.device)
            device = self._engine.device
            self._device_memory = _device_memory(device, recipe, share) if device else 0
            self._equip(Use.RESIDENT if self._device_memory >= LEAST_DEVICE_MEMORY else Use.NONE)

    def _equip(self, use: Use) -> None:
        """Get ready to read, and where there is a device, to bring there what is read."""
        self.use, device = use, self._engine.device
        memory = self._recipe.memory - OVERHEAD_BYTES - self._out.writing_bytes
        if device is None or use is Use.NONE:
            self._engine = make_engine(self._recipe.method, "cpu")
            self._reader = SectionReader(*self._inputs, memory)
            return
        self._shares = shares(memory, self._device_memory, use is Use.STREAMED)
        self._reader = SectionReader(*self._inputs, self._shares.host)
        self._reader.land_on(device, self._recipe, self._shares)

    def use_less(self) -> str:
        """Take less of the device's memory, or none; says what that means."""
        self._forget_ahead()
        self._reader.close()
        self._equip(Use(self.use + 1))
        has = f"the GPU of {here()} has less memory left than {format_bytes(self._device_memory)}"
        return f"{has}: it goes on in smaller pieces" if self.use is Use.STREAMED else f"{has}: its CPU goes on"

    def close(self) -> None:
        self._forget_ahead()
        self._reader.close()
        for folder in self._inputs:
            folder.close()

    def has_begun(self, shard: Shard) -> bool:
        """Whether a part of a shard is being read already."""
        return self._ahead is not None and self._ahead.shard == shard.index

    @_step
    def sample(self, task: Task, following: Task | None = None) -> Done:
        """Look at a sample of the scores of groups over several shards, into `sample_name`.

        The means of sections that do not fit in memory, which another pass has to find anyway, are found now: the
        better known they are, the surer is what the sample says.
        """
        meter = _Meter(self._reader)
        self._forget_ahead()
        wanted = task.wide()
        place = {t.name: i for i, t in enumerate(task.shard.tensors)}
        means, dealt = load_means(self._out, task.shard), 0
        for section in self._cut(wanted):
            if not self._reader.fits(section):
                bench = self._bench(task, Pieces(self._reader, section))
                passes.find_means(bench)
                means[[place[t.name] for t in bench.tensors]] = np.stack([bench.mean, bench.base_squares], 1)
                dealt += _half(section)
                self.tell(_half(section))
        members: dict[str, list[PairedTensor]] = {}
        for tensor in wanted:
            members.setdefault(tensor.group, []).append(tensor)
        known = {name: np.float32(means[i, 0]) for name, i in place.items() if not np.isnan(means[i, 0])}
        take = partial(far, self._reader, recipe=self._recipe, longest=LONG_RUN if self._reader.is_far else RUN)
        surveys = [
            survey(tensors, task.groups[name], wide_size(task.groups[name]), take, self._recipe, known)
            for name, tensors in members.items()
        ]
        save_arrays(
            self._out,
            sample_name(task.shard.index),
            meter.read_bytes,
            list(members),
            weights=np.stack([found.weights for found in surveys]),
            variance=np.array([found.variance for found in surveys]),
            means=means,
        )
        return meter.done(task, dealt)

    @_step
    def measure(self, task: Task, following: Task | None = None) -> Done:
        """Count all scores of groups over several shards inside their brackets, into `measure_name`."""
        meter = _Meter(self._reader)
        names = list(task.brackets)
        counted = histograms(list(task.brackets.values()), zeros=self._scratch.zeros)
        place = {t.name: i for i, t in enumerate(task.shard.tensors)}
        means = load_means(self._out, task.shard)
        dealt = 0
        for pieces in self._sections(self._cut_to_measure, task, following, keep=True):
            bench = self._bench(task, pieces)
            here = [place[t.name] for t in bench.tensors]
            half_done = task.round == 1 and not np.isnan(means[here]).any()  # by `sample`
            passes.find_means(bench, means[here])
            passes.count(bench, counted, names)
            means[here] = np.stack([bench.mean, bench.base_squares], 1)
            nbytes = pieces.section.nbytes - (_half(pieces.section) if half_done else 0)
            dealt += nbytes
            self.tell(nbytes)
        bins = counted.bins if counted.bins.max(initial=0) >= 2**32 else counted.bins.astype(np.uint32)
        name, read = measure_name(task.shard.index, task.round), meter.read_bytes
        save_arrays(self._out, name, read, names, above=counted.above, bins=bins, starts=counted.starts, means=means)
        return meter.done(task, dealt)

    @_step
    def write(self, task: Task, following: Task | None = None) -> Done:
        """Write the pruned shard, with `record_name` and `rows_name` about it; the shard appears whole and last."""
        meter = _Meter(self._reader)
        shard = task.shard
        known = load_means(self._out, shard)
        ties: dict[str, int] = {}
        rows = np.zeros(len(shard.tensors), MEASURED)
        writer, delta = self._writers(shard)
        sink = self._sink(writer, shard.nbytes)
        try:
            sink.append(shard.header)
            first = 0
            for pieces in self._sections(_to_write, task, following):
                started = time.perf_counter()
                here = slice(first, first + len(pieces.section.tensors))
                bench = self._bench(task, pieces, self.tell)
                passes.find_means(bench, known[here])
                passes.search(bench, task.thresholds, ties)
                rows[here] = passes.apply(bench, sink)
                ties |= zip(bench.names, bench.ties.tolist(), strict=True)
                nbytes = np.array([t.nbytes for t in pieces.section.tensors])
                rows["seconds"][here] = (time.perf_counter() - started) * nbytes / max(1, nbytes.sum())
                first = here.stop
            checksum = sink.finish()
            sparse = delta.finish() if delta else None
        except BaseException:
            sink.abandon()
            raise
        self._out.write(rows_name(shard.index), rows.tobytes())
        record: dict[str, Any] = {"name": shard.name, "nbytes": shard.nbytes, "xxh3_128": checksum}
        if sparse and delta:
            record = sparse if self._recipe.emit == "delta" else {**record, "delta": sparse}
            self._out.write(delta_facts_name(shard.index), json.dumps(delta.tensors).encode())
        record |= {"read_bytes": meter.read_bytes, "seconds": round(meter.seconds, 3)}
        self._out.write(record_name(shard.index), json.dumps(record).encode())
        published = time.perf_counter()
        writer.publish()
        writing = sink.seconds + time.perf_counter() - published
        written = record["nbytes"] + (sparse["nbytes"] if sparse and self._recipe.emit == "both" else 0)
        return meter.done(task, sum(t.read_bytes for t in shard.tensors), written, writing)

    def _writers(self, shard: Shard) -> tuple[Writer, DeltaWriter | None]:
        """What takes the shard's bytes; and what makes its sparse task vector of them, if that is wanted."""
        emit, writer = self._recipe.emit, None
        if emit != "delta":
            writer = self._out.create(shard.name, shard.nbytes)
            if any(promised(tensor) for tensor in shard.tensors):
                writer = Checked(shard, writer)
            if emit == "checkpoint":
                return writer, None
        compress = self._recipe.delta_compression != "none"
        sides = Sides(*self._inputs)
        delta = DeltaWriter(shard, sides, self._out, compress, self._recipe.reversible, writer)
        return delta, delta

    def _bench(self, task: Task, pieces: Pieces, progress: Callable[[int], None] = lambda nbytes: None) -> Bench:
        return Bench(self._recipe, self._engine, pieces, task.groups, self._check, self._scratch, progress)

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted

    def _cut_to_measure(self, task: Task) -> tuple[list[PairedTensor], list[str]]:
        """As the step after it will cut the shard, if what is read now can be kept for it."""
        whole = self._reader.can_keep(sum(t.read_bytes for t in task.shard.tensors))
        return _to_write(task) if whole else _to_measure(task)

    def _sections(self, cut: Cut, task: Task, following: Task | None, keep: bool = False) -> Iterator[Pieces]:
        """What a step works through, the next section read ahead, and after the last one the following task's first.

        Args:
            keep: the step after this one needs the same once more.
        """
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[:3] == (cut, task.shard.index, task.round):
            found, first = ahead.sections, ahead.held
        else:
            self._let_go(ahead)
            found, first = self._cut(*cut(task)), NOTHING
        held = [first, *[NOTHING] * len(found)]

        def start(i: int) -> None:
            if i < len(found):
                held[i] = self._reader.start(found[i], held[i])

        def release(i: int, keep: bool = False) -> None:
            taken, held[i] = held[i], NOTHING
            self._reader.release(taken, found[i], keep)

        try:
            for i, section in enumerate(found):
                start(i)
                start(i + 1)
                if i + 1 == len(found) and following:
                    self._read_ahead(cut, following)
                yield Pieces(self._reader, section, held[i])
                release(i, keep)
        except BaseException:
            for i in range(len(found)):
                release(i)
            self._forget_ahead()
            raise

    def _cut(self, tensors: Sequence[PairedTensor], together: Sequence[str] = ()) -> list[Section]:
        return sections(tensors, together, None if self.use is Use.NONE else self._shares.cut)

    def _read_ahead(self, cut: Cut, task: Task) -> None:
        """Begin with the task that will probably be next, if there is room for its first section."""
        found = self._cut(*cut(task))
        if found and self._reader.fits(found[0]):
            self._ahead = _Ahead(cut, task.shard.index, task.round, found, self._reader.start(found[0]))

    def _forget_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        self._let_go(ahead)

    def _let_go(self, ahead: _Ahead | None) -> None:
        if ahead:
            self._reader.release(ahead.held, ahead.sections[0])

    def _sink(self, writer: Writer, size: int) -> Sink:
        device = self._engine.device
        if device is None:
            return Sink(writer, size)
        return Sink(writer, size, [device.host(self._shares.output) for _ in range(BUFFERS)], device.received)


def _device_memory(device: DeviceEngine, recipe: Recipe, share: float) -> int:
    """What of a device's memory is for a worker: what the recipe says, or its share of what is free, less a margin."""
    if recipe.device_memory:
        return recipe.device_memory
    free, total = device.memory()
    return int(min(free, share * total) - max(_MARGIN_BYTES * share, 0.05 * share * total))


_MARGIN_BYTES = 1 << 30  # the driver's context, torch's caches, whoever else is there


class _Progress:
    """Tells of each byte once, however often a step begins again."""

    def __init__(self, tell: Callable[[int], None]):
        self._tell = tell
        self._told = self._dealt = 0

    def begin(self) -> None:
        self._told = 0

    def again(self) -> None:
        self._dealt = 0

    def __call__(self, nbytes: int) -> None:
        self._dealt += nbytes
        if self._dealt > self._told:
            self._tell(self._dealt - self._told)
            self._told = self._dealt


class _Meter:
    """What a step takes, from now on."""

    def __init__(self, reader: SectionReader):
        self._reader = reader
        self._began, self._cpu = time.perf_counter(), time.thread_time()
        self._read, self._reading = reader.bytes_read, reader.seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def read_bytes(self) -> int:
        return self._reader.bytes_read - self._read

    def done(self, task: Task, dealt: int, written: int = 0, writing: float = 0.0) -> Done:
        reading, computing = self._reader.seconds - self._reading, time.thread_time() - self._cpu
        return Done(task.shard.index, dealt, self.read_bytes, written, self.seconds, reading, computing, writing)


Cut = Callable[[Task], tuple[list[PairedTensor], list[str]]]
"""The tensors that a step works on, and the groups that have to be together."""


class _Ahead(NamedTuple):
    """A task that has not been given yet: what it will work through, and its first section on its way into memory."""

    cut: Cut
    shard: int
    round: int
    sections: list[Section]
    held: Held


def _to_measure(task: Task) -> tuple[list[PairedTensor], list[str]]:
    return [t for t in task.wide() if t.group in task.brackets], []


def _to_write(task: Task) -> tuple[list[PairedTensor], list[str]]:
    together = [name for name, group in task.groups.items() if not group.wide and group.tensors > 1]
    return list(task.shard.tensors), together


def _half(section: Section) -> int:
    """The progress that finding the means of a section is worth before its scores are counted."""
    return section.nbytes // 2
