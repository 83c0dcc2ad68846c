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

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from functools import wraps

import numpy as np

from fapm.errors import DeviceError
from fapm.layout import measure_name, sample_name
from fapm.planning.plan import PairedTensor
from fapm.recipe import LEAST_DEVICE_MEMORY, Recipe, format_bytes
from fapm.scoring.device import has_failed, is_full, make_engine
from fapm.scoring.engine import Engine
from fapm.shard import passes
from fapm.shard.budget import device_memory, lane_bytes
from fapm.shard.cutting import Cut, cut_for, to_measure, to_write
from fapm.shard.lane import Lane, find_means, share_means
from fapm.shard.meter import Meter, StepProgress
from fapm.shard.operations import operation_of
from fapm.shard.output import Output, begin_output
from fapm.shard.passes import HistogramMemory, SampleCache, SectionState, Tally, tallies
from fapm.shard.prefetch import Prefetch
from fapm.shard.reading import OVERHEAD_BYTES, Pieces, SectionReader
from fapm.shard.sample import LONG_RUN, RUN, Sample, cross_shard_size, far, survey
from fapm.shard.section import Section, sections
from fapm.shard.staging import shares
from fapm.shard.task import Done, Interrupted, Task, here, load_means, save_arrays
from fapm.shard.writing import BUFFER_BYTES
from fapm.storage.address import open_store
from fapm.storage.store import Store


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
        self._outs = {out.address: out}  # kept from task to task, with what they know and their connections
        self._checkpoints = tuple(open_store(path) for path in recipe.checkpoints)
        self._histograms = HistogramMemory()
        self._operation = operation_of(recipe)  # of all its lanes
        self._lent = 0
        self.tell = StepProgress(progress or (lambda nbytes: None))
        self._cancelled = cancelled or threading.Event()
        with _failures():
            device = recipe.device if recipe.on_device else "cpu"
            self._engine = make_engine(recipe.method, device)
            self._engines = {recipe.method: self._engine}
            staged = self._engine.device
            self._device_memory = device_memory(staged, recipe, share) if staged else 0
            self._equip(Use.RESIDENT if self._device_memory >= LEAST_DEVICE_MEMORY else Use.NONE)

    def _equip(self, use: Use) -> None:
        """Get ready to read, and where there is a device, to bring there what is read."""
        self.use, device = use, self._engine.device
        memory = self._recipe.memory - OVERHEAD_BYTES - self._out.writing_bytes
        if device is None or use is Use.NONE:
            self._engine = make_engine(self._recipe.method, "cpu")
            self._engines = {self._recipe.method: self._engine}
            self._reader = SectionReader(self._checkpoints, memory)
        else:
            self._shares = shares(memory, self._device_memory, use is Use.STREAMED)
            self._reader = SectionReader(self._checkpoints, self._shares.host)
            self._reader.stage_on(device, self._recipe, self._shares)
        self._lent, self.prefetch = 0, Prefetch(self._reader, self._cut)

    def use_less(self) -> str:
        """Take less of the device's memory, or none; says what that means."""
        self.prefetch.forget()
        self._reader.close()
        self._equip(Use(self.use + 1))
        has = f"the GPU of {here()} has less memory left than {format_bytes(self._device_memory)}"
        return f"{has}: it goes on in smaller pieces" if self.use is Use.STREAMED else f"{has}: its CPU goes on"

    def close(self) -> None:
        self.prefetch.forget()
        self._reader.close()
        for folder in self._checkpoints:
            folder.close()

    @_step
    def sample(self, task: Task, following: Task | None = None) -> Done:
        """Look at a sample of the scores of groups over several shards, into `sample_name`.

        The means of sections that do not fit in memory, which another pass has to find anyway, are found now: the
        better known they are, the surer is what the sample says.
        """
        meter = Meter(self._reader)
        self.prefetch.forget()
        lanes = self._lanes(task)
        wide = {t.name for of in task.parts for t in of.cross_shard()}
        progress = 0
        for section in self._cut(cut_for(task, wide)):
            if not self._reader.fits(section):
                states = self._states(lanes, Pieces(self._reader, section))
                find_means(lanes, states)
                progress += _half(section)
                self.tell(_half(section))
        taken = SampleCache(len(lanes))

        def take(tensor: PairedTensor, share: float) -> Sample:
            longest = LONG_RUN if self._reader.is_far else RUN
            given = self._reader, tensor, share, self._recipe, longest
            found: Sample = taken.get((tensor.name, tensor.source, share), lambda: far(*given))
            return found

        looked = []
        for lane in lanes:
            members: dict[str, list[PairedTensor]] = {}
            for tensor in lane.task.cross_shard():
                members.setdefault(tensor.group, []).append(tensor)
            known = {
                name: np.float32(lane.means[i, 0]) for name, i in lane.place.items() if not np.isnan(lane.means[i, 0])
            }
            groups = lane.task.groups
            surveys = [
                survey(tensors, groups[name], cross_shard_size(groups[name]), take, lane.recipe, known)
                for name, tensors in members.items()
            ]
            looked.append((list(members), surveys))
        read = meter.read_bytes
        for lane, (names, surveys) in zip(lanes, looked, strict=True):
            save_arrays(
                lane.out,
                sample_name(task.shard.index, lane.task.source),
                read,
                names,
                weights=np.stack([found.weights for found in surveys]),
                variance=np.array([found.variance for found in surveys]),
                means=lane.means,
            )
        return meter.done(task, progress)

    @_step
    def measure(self, task: Task, following: Task | None = None) -> Done:
        """Count all scores of groups over several shards inside their brackets, into `measure_name`."""
        meter = Meter(self._reader)
        lanes = self._lanes(task)
        counted: list[Tally] = []
        first, progress = task.round == 1, 0
        for pieces in self.prefetch.sections(self._cut_to_measure, task, following, keep=True):
            place = [lanes[0].place[t.name] for t in pieces.section.tensors]
            half_done = first and not np.isnan(lanes[0].means[place]).any()  # by `sample`
            states = self._states(lanes, pieces)
            find_means(lanes, states)
            if not counted:
                brackets = [lane.task.brackets for lane in lanes]
                wanted = [(list(of.values()), None) for of in brackets]
                counted = tallies(states, [list(of) for of in brackets], wanted, self._histograms)
            counted = [replace(tally, state=state) for tally, state in zip(counted, states, strict=True)]
            passes.count(counted)
            nbytes = pieces.section.nbytes - (_half(pieces.section) if half_done else 0)
            progress += nbytes
            self.tell(nbytes)
        read = meter.read_bytes
        for lane, tally in zip(lanes, counted, strict=True):
            found = tally.arrays()
            name = measure_name(task.shard.index, lane.task.round, lane.task.source)
            save_arrays(lane.out, name, read, list(tally.names), **found, means=lane.means)
        return meter.done(task, progress)

    @_step
    def write(self, task: Task, following: Task | None = None) -> Done:
        """Write the pruned shard, with `record_name` and `rows_name` about it; the shard appears whole and last."""
        meter = Meter(self._reader)
        lanes = self._lanes(task)
        self._operation.begin(lanes)
        outputs: list[Output] = []
        try:
            for lane in lanes:
                of_first = outputs[0].delta if outputs else None
                outputs.append(begin_output(lane, self._checkpoints[0], self._engine.device, self._buffer, of_first))
                outputs[-1].sink.append(lane.task.shard.header)
            sinks = [output.sink for output in outputs]
            for pieces in self.prefetch.sections(to_write, task, following):
                started = time.perf_counter()
                self._operation.write(lanes, self._states(_parts(lanes), pieces), outputs, self.tell)
                here = [lanes[0].place[t.name] for t in pieces.section.tensors]
                nbytes = np.array([t.nbytes for t in pieces.section.tensors])
                for lane in lanes:
                    lane.rows["seconds"][here] = (time.perf_counter() - started) * nbytes / max(1, nbytes.sum())
            checksums = [sink.finish() for sink in sinks]
            sparse = [output.delta.finish() if output.delta else None for output in outputs]
        except BaseException:
            for output in outputs:
                output.sink.abandon()
            raise
        began, written = time.perf_counter(), 0
        for output, checksum, delta in zip(outputs, checksums, sparse, strict=True):
            written += output.publish(checksum, delta, meter)
        seconds = time.perf_counter() - began + sum(sink.seconds for sink in sinks)
        return meter.done(task, sum(t.read_bytes for t in task.shard.tensors), written, seconds)

    @property
    def _buffer(self) -> int:
        """Bytes of each buffer on the way to the output."""
        return BUFFER_BYTES if self._engine.device is None else self._shares.output

    def _lanes(self, task: Task) -> list[Lane]:
        """Those that a task is for, with what is known of the means of the shard's tensors."""
        lanes = [Lane(of, self._outs.setdefault(of.out.address, of.out)) for of in task.lanes]
        lent = sum(lane_bytes(lane.recipe, lane.out, self._buffer) for lane in lanes[1:])
        lent += self._operation.memory(lanes)
        if lent != self._lent:
            self.prefetch.forget()
            self._reader.lend(lent)
            self._lent = lent
        for lane in _parts(lanes):
            lane.means = load_means(lane.out, lane.task.shard, lane.task.source)
        share_means(_parts(lanes))
        return lanes

    def _states(self, lanes: Sequence[Lane], pieces: Pieces) -> list[SectionState]:
        """One for each lane, over the same pieces; of a merge one for each source."""
        states: list[SectionState] = []
        taken = SampleCache(len(lanes))
        for lane in lanes:
            tensors = tuple(lane.tensors[t.name] for t in pieces.section.tensors)
            engine = self._engine_for(lane.recipe.method)
            given = lane.recipe, engine, pieces, lane.task.groups, self._check, self._histograms
            states.append(SectionState(*given, tensors, taken, lane.task.source or 1))
        return states

    def _engine_for(self, method: str) -> Engine:
        if method not in self._engines:
            self._engines[method] = self._engine.like(method)
        return self._engines[method]

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted

    def _cut_to_measure(self, task: Task) -> Cut:
        """As the step after it will cut the shard, if what is read now can be kept for it."""
        whole = self._reader.can_keep(sum(t.read_bytes for t in task.shard.tensors))
        return to_write(task) if whole else to_measure(task)

    def _cut(self, cut: Cut) -> list[Section]:
        return sections(cut.tensors, cut.together, None if self.use is Use.NONE else self._shares.cut, cut.kinds)


def _parts(lanes: Sequence[Lane]) -> list[Lane]:
    """The lanes, and of a merge those of its sources."""
    return [part for lane in lanes for part in lane.parts or [lane]]


def _half(section: Section) -> int:
    """The progress that finding the means of a section is worth before its scores are counted."""
    return section.nbytes // 2
