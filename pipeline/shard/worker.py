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
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import wraps
from typing import Any, NamedTuple

import numpy as np

from fapm.errors import DeviceError
from fapm.formats.tensor import Sides
from fapm.layout import delta_facts_name, measure_name, record_name, rows_name, sample_name
from fapm.planning.plan import PairedTensor, Shard
from fapm.recipe import LEAST_DEVICE_MEMORY, LEAST_MEMORY, Recipe, format_bytes
from fapm.scoring.device import has_failed, is_full, make_engine
from fapm.scoring.engine import DeviceEngine, Engine
from fapm.shard import passes
from fapm.shard.delta import Checked, DeltaWriter, promised
from fapm.shard.passes import HistogramMemory, SampleCache, SectionState, Tally, tallies
from fapm.shard.reading import NOTHING, OVERHEAD_BYTES, Held, Pieces, SectionReader
from fapm.shard.sample import LONG_RUN, RUN, Sample, cross_shard_size, far, survey
from fapm.shard.section import Section, sections
from fapm.shard.staging import shares
from fapm.shard.table import MEASURED
from fapm.shard.task import Done, Interrupted, Task, here, load_means, save_arrays
from fapm.shard.writing import BUFFER_BYTES, BUFFERS, AnySink, Direct, Sink
from fapm.storage.address import open_store
from fapm.storage.store import Store, Writer


class Use(IntEnum):
    """Ways to use a worker's device; each takes less of its memory than the one before."""

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
    """Turn the errors of a device that has failed into a `DeviceError`."""
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
        progress: told progress bytes, as they pass.
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
        self._histograms = HistogramMemory()
        self._lent = 0
        self._ahead: _Ahead | None = None
        self.tell = _Progress(progress or (lambda nbytes: None))
        self._cancelled = cancelled or threading.Event()
        with _failures():
            self._engine = make_engine(recipe.method, recipe.device)
            self._engines = {recipe.method: self._engine}
            device = self._engine.device
            self._device_memory = _device_memory(device, recipe, share) if device else 0
            self._equip(Use.RESIDENT if self._device_memory >= LEAST_DEVICE_MEMORY else Use.NONE)

    def _equip(self, use: Use) -> None:
        """Get ready to read, and where there is a device, to bring there what is read."""
        self.use, device = use, self._engine.device
        memory = self._recipe.memory - OVERHEAD_BYTES - self._out.writing_bytes
        if device is None or use is Use.NONE:
            self._engine = make_engine(self._recipe.method, "cpu")
            self._engines = {self._recipe.method: self._engine}
            self._lent, self._reader = 0, SectionReader(*self._inputs, memory)
            return
        self._shares = shares(memory, self._device_memory, use is Use.STREAMED)
        self._lent, self._reader = 0, SectionReader(*self._inputs, self._shares.host)
        self._reader.stage_on(device, self._recipe, self._shares)

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
        runs = self._runs(task)
        wide = {t.name for of in task.each for t in of.cross_shard()}
        progress = 0
        for section in self._cut(*_cut_for(task, wide)):
            if not self._reader.fits(section):
                states = self._states(runs, Pieces(self._reader, section))
                self._find_means(runs, states)
                progress += _half(section)
                self.tell(_half(section))
        taken = SampleCache() if len(runs) > 1 else None

        def take(tensor: PairedTensor, share: float) -> Sample:
            longest = LONG_RUN if self._reader.is_far else RUN
            given = self._reader, tensor, share, self._recipe, longest
            return taken.get((tensor.name, share), lambda: far(*given)) if taken else far(*given)

        for run in runs:
            members: dict[str, list[PairedTensor]] = {}
            for tensor in run.task.cross_shard():
                members.setdefault(tensor.group, []).append(tensor)
            known = {
                name: np.float32(run.means[i, 0]) for name, i in run.place.items() if not np.isnan(run.means[i, 0])
            }
            groups = run.task.groups
            surveys = [
                survey(tensors, groups[name], cross_shard_size(groups[name]), take, run.recipe, known)
                for name, tensors in members.items()
            ]
            save_arrays(
                run.out,
                sample_name(task.shard.index),
                meter.read_bytes,
                list(members),
                weights=np.stack([found.weights for found in surveys]),
                variance=np.array([found.variance for found in surveys]),
                means=run.means,
            )
        return meter.done(task, progress)

    @_step
    def measure(self, task: Task, following: Task | None = None) -> Done:
        """Count all scores of groups over several shards inside their brackets, into `measure_name`."""
        meter = _Meter(self._reader)
        runs = self._runs(task)
        counted: list[Tally] = []
        first, progress = task.round == 1, 0
        for pieces in self._sections(self._cut_to_measure, task, following, keep=True):
            place = [runs[0].place[t.name] for t in pieces.section.tensors]
            half_done = first and not np.isnan(runs[0].means[place]).any()  # by `sample`
            states = self._states(runs, pieces)
            self._find_means(runs, states)
            if not counted:
                brackets = [run.task.brackets for run in runs]
                wanted = [(list(of.values()), None) for of in brackets]
                counted = tallies(states, [list(of) for of in brackets], wanted, self._histograms)
            counted = [replace(tally, state=state) for tally, state in zip(counted, states, strict=True)]
            passes.count(counted)
            nbytes = pieces.section.nbytes - (_half(pieces.section) if half_done else 0)
            progress += nbytes
            self.tell(nbytes)
        read = meter.read_bytes
        for run, tally in zip(runs, counted, strict=True):
            found = tally.arrays()
            name = measure_name(task.shard.index, run.task.round)
            save_arrays(run.out, name, read, list(tally.names), **found, means=run.means)
        return meter.done(task, progress)

    @_step
    def write(self, task: Task, following: Task | None = None) -> Done:
        """Write the pruned shard, with `record_name` and `rows_name` about it; the shard appears whole and last."""
        meter = _Meter(self._reader)
        runs = self._runs(task)
        writings: list[_Writing] = []
        try:
            for run in runs:
                writings.append(self._begin_writing(run, writings[0].delta if writings else None))
                writings[-1].sink.append(run.task.shard.header)
            sinks = [writing.sink for writing in writings]
            first = 0
            for pieces in self._sections(_to_write, task, following):
                started = time.perf_counter()
                here = slice(first, first + len(pieces.section.tensors))
                states = self._states(runs, pieces)
                self._find_means(runs, states)
                passes.search(states, [run.task.thresholds for run in runs], [of.ties for of in writings])
                nbytes = np.array([t.nbytes for t in pieces.section.tensors])
                for writing, state, rows in zip(writings, states, passes.apply(states, sinks, self.tell), strict=True):
                    writing.rows[here] = rows
                    writing.ties |= zip(state.names, state.ties.tolist(), strict=True)
                    writing.rows["seconds"][here] = (time.perf_counter() - started) * nbytes / max(1, nbytes.sum())
                first = here.stop
            checksums = [sink.finish() for sink in sinks]
            sparse = [writing.delta.finish() if writing.delta else None for writing in writings]
        except BaseException:
            for writing in writings:
                writing.sink.abandon()
            raise
        began, written = time.perf_counter(), 0
        for run, writing, checksum, delta in zip(runs, writings, checksums, sparse, strict=True):
            written += self._publish(run, writing, checksum, delta, meter)
        seconds = time.perf_counter() - began + sum(sink.seconds for sink in sinks)
        return meter.done(task, sum(t.read_bytes for t in task.shard.tensors), written, seconds)

    def _begin_writing(self, run: _Run, first: DeltaWriter | None) -> _Writing:
        shard = run.task.shard
        writer, delta = self._writers(run, first)
        sink: AnySink
        if delta and run.recipe.emit == "delta" and self._engine.device is None:
            sink = Direct(delta, shard.nbytes)
        else:
            sink = self._sink(writer, shard.nbytes)
        return _Writing(writer, delta, sink, np.zeros(len(shard.tensors), MEASURED), {})

    def _publish(
        self, run: _Run, writing: _Writing, checksum: str, sparse: dict[str, Any] | None, meter: _Meter
    ) -> int:
        """Publish the records of a shard, then the shard; returns how many bytes it has."""
        shard, out = run.task.shard, run.out
        out.write(rows_name(shard.index), writing.rows.tobytes())
        record: dict[str, Any] = {"name": shard.name, "nbytes": shard.nbytes, "xxh3_128": checksum}
        if sparse and writing.delta:
            record = sparse if run.recipe.emit == "delta" else {**record, "delta": sparse}
            out.write(delta_facts_name(shard.index), json.dumps(writing.delta.tensors).encode())
        record |= {"read_bytes": meter.read_bytes, "seconds": round(meter.seconds, 3)}
        out.write(record_name(shard.index), json.dumps(record).encode())
        writing.writer.publish()
        return int(record["nbytes"]) + (sparse["nbytes"] if sparse and run.recipe.emit == "both" else 0)

    def _writers(self, run: _Run, first: DeltaWriter | None) -> tuple[Writer, DeltaWriter | None]:
        """Writer of the shard's bytes; and the one that makes its sparse task vector of them, if that is wanted."""
        recipe, shard, writer = run.recipe, run.task.shard, None
        if recipe.emit != "delta":
            writer = run.out.create(shard.name, shard.nbytes)
            if any(promised(tensor) for tensor in shard.tensors):
                writer = Checked(shard, writer)
            if recipe.emit == "checkpoint":
                return writer, None
        compress = recipe.delta_compression != "none"
        sides = Sides(*self._inputs)
        delta = DeltaWriter(shard, sides, run.out, compress, recipe.reversible, writer, first)
        return delta, delta

    def _runs(self, task: Task) -> list[_Run]:
        """Those that a task is for, with what is known of the means of the shard's tensors."""
        runs = [_Run(of, of.recipe or self._recipe, of.out or self._out) for of in task.each]
        buffer = BUFFER_BYTES if self._engine.device is None else self._shares.output
        lent = sum(candidate_bytes(run.recipe, run.out, buffer) for run in runs[1:])
        if lent != self._lent:
            self._forget_ahead()
            self._reader.lend(lent)
            self._lent = lent
        for run in runs:
            run.means = load_means(run.out, run.task.shard)
        _share([run.means for run in runs])
        return runs

    def _states(self, runs: Sequence[_Run], pieces: Pieces) -> list[SectionState]:
        """One for each run, over the same pieces."""
        tensors = pieces.section.tensors
        states: list[SectionState] = []
        taken = SampleCache() if len(runs) > 1 else None
        for run in runs:
            if len(runs) > 1:
                tensors = tuple(run.tensors[t.name] for t in pieces.section.tensors)
            engine = self._engine_for(run.recipe.method)
            given = run.recipe, engine, pieces, run.task.groups, self._check, self._histograms
            states.append(SectionState(*given, tensors, taken))
        return states

    def _find_means(self, runs: Sequence[_Run], states: Sequence[SectionState]) -> None:
        """Once for all runs: which tensors are pruned, and their means, are the same in all."""
        here = [runs[0].place[t.name] for t in states[0].tensors]
        passes.find_means(states[0], runs[0].means[here])
        for run, state in zip(runs, states, strict=True):
            state.mean, state.base_squares = states[0].mean, states[0].base_squares
            run.means[here] = np.stack([state.mean, state.base_squares], 1)

    def _engine_for(self, method: str) -> Engine:
        if method not in self._engines:
            self._engines[method] = self._engine.like(method)
        return self._engines[method]

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted

    def _cut_to_measure(self, task: Task) -> tuple[list[PairedTensor], list[str]]:
        """As the step after it will cut the shard, if what is read now can be kept for it."""
        whole = self._reader.can_keep(sum(t.read_bytes for t in task.shard.tensors))
        return _to_write(task) if whole else _to_measure(task)

    def _sections(self, cut: TensorChoice, task: Task, following: Task | None, keep: bool = False) -> Iterator[Pieces]:
        """Sections that a step works through, the next one read ahead, after the last one the following task's first.

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

    def _read_ahead(self, cut: TensorChoice, task: Task) -> None:
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


def candidate_bytes(recipe: Recipe, out: Store, buffer: int = BUFFER_BYTES) -> int:
    """Bytes that a worker needs for each run beside the first that it does in the same reading.

    Args:
        buffer: bytes of each on the way to the output.
    """
    sparse = 16 << 20 if recipe.emit != "checkpoint" else 0
    return BUFFERS * buffer + out.writing_bytes + _COUNTS_BYTES + sparse


_COUNTS_BYTES = 8 << 20


def runs_at_once(recipe: Recipe, out: Store) -> int:
    """How many runs a worker's memory allows in one reading."""
    left = recipe.memory - OVERHEAD_BYTES - out.writing_bytes - LEAST_MEMORY // 4
    return 1 + max(0, left // candidate_bytes(recipe, out))


def _device_memory(device: DeviceEngine, recipe: Recipe, share: float) -> int:
    """Bytes of a device's memory for a worker: what the recipe says, or its share of what is free, less a margin."""
    if recipe.device_memory:
        return recipe.device_memory
    free, total = device.memory()
    return int(min(free, share * total) - max(_MARGIN_BYTES * share, 0.05 * share * total))


_MARGIN_BYTES = 1 << 30  # the driver's context, torch's caches, whoever else is there


class _Progress:
    """Tells of each byte once, however often a step begins again."""

    def __init__(self, tell: Callable[[int], None]):
        self._tell = tell
        self._told = self._progress = 0

    def begin(self) -> None:
        self._told = 0

    def again(self) -> None:
        self._progress = 0

    def __call__(self, nbytes: int) -> None:
        self._progress += nbytes
        if self._progress > self._told:
            self._tell(self._progress - self._told)
            self._told = self._progress


class _Meter:
    """Meter of a step: time and bytes, from now on."""

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

    def done(self, task: Task, progress: int, written: int = 0, writing: float = 0.0) -> Done:
        reading, computing = self._reader.seconds - self._reading, time.thread_time() - self._cpu
        return Done(task.shard.index, progress, self.read_bytes, written, self.seconds, reading, computing, writing)


TensorChoice = Callable[[Task], tuple[list[PairedTensor], list[str]]]
"""The tensors that a step works on, and the groups that have to be together."""


class _Ahead(NamedTuple):
    """A task that has not been given yet: what it will work through, and its first section on its way into memory."""

    cut: TensorChoice
    shard: int
    round: int
    sections: list[Section]
    held: Held


def _to_measure(task: Task) -> tuple[list[PairedTensor], list[str]]:
    return _cut_for(task, {t.name for of in task.each for t in of.cross_shard() if t.group in of.brackets})


def _to_write(task: Task) -> tuple[list[PairedTensor], list[str]]:
    return _cut_for(task, {t.name for t in task.shard.tensors})


def _cut_for(task: Task, names: set[str]) -> tuple[list[PairedTensor], list[str]]:
    """The shard's tensors of these names, and the groups of them that lie in it and have to be together.

    Of several runs those with the widest of these groups count: the groups of the others lie inside them, or are single
    tensors. Small tensors share a slice only if they have one density in every run.
    """

    def together(of: Task) -> list[str]:
        return [name for name, group in of.groups.items() if not group.cross_shard and group.tensors > 1]

    widest = max(task.each, key=lambda of: sum(of.groups[name].tensors for name in together(of)))
    tensors = [t for t in widest.shard.tensors if t.name in names]
    if task.beside:
        densities = zip(*([t.parameter for t in of.shard.tensors if t.name in names] for of in task.each), strict=True)
        kinds: dict[tuple[float, ...], float] = {}
        marks = [kinds.setdefault(of, float(len(kinds))) for of in densities]
        tensors = [replace(t, parameter=mark) for t, mark in zip(tensors, marks, strict=True)]
    return tensors, together(widest) if len(tensors) == len(widest.shard.tensors) else []


@dataclass
class _Run:
    """One of the runs that a task is for.

    Attributes:
        means: (t, 2) float64 of the shard's tensors, as of `load_means`.
    """

    task: Task
    recipe: Recipe
    out: Store
    means: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    def __post_init__(self) -> None:
        self.place = {t.name: i for i, t in enumerate(self.task.shard.tensors)}
        self.tensors = {t.name: t for t in self.task.shard.tensors}


def _share(means: Sequence[np.ndarray]) -> None:
    """Let all runs know the means that one of them knows."""
    for one in means[1:]:
        means[0][:] = np.where(np.isnan(means[0]), one, means[0])
    for one in means[1:]:
        one[:] = means[0]


@dataclass
class _Writing:
    """A shard on its way out: the `ties` that are left of each group's, and what is measured of its tensors."""

    writer: Writer
    delta: DeltaWriter | None
    sink: AnySink
    rows: np.ndarray
    ties: dict[str, int]


def _half(section: Section) -> int:
    """The progress that finding the means of a section is worth before its scores are counted."""
    return section.nbytes // 2
