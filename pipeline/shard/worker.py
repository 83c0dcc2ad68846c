"""The work on one shard: `sample`, `measure` and `write`, done by a worker within its memory budget.

`write` is all that most runs need: it reads each tensor, finds the thresholds of the groups that lie in the shard,
and writes the pruned shard. Groups that lie in several shards take two steps before it: `sample` counts a few scores
to guess where the threshold is, `measure` counts all of them around the guess. Their results are files in the
output folder; what returns to the driver is only that they are there.
"""

from __future__ import annotations

import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.formats.dtypes import convert, is_weight, itemsize, refuse_overflow
from pipeline.plan import Group, PairedTensor, Shard
from pipeline.recipe import Recipe
from pipeline.scoring.device import make_engine
from pipeline.scoring.engine import Chunk
from pipeline.scoring.methods import METHODS
from pipeline.scoring.threshold import (
    KEEP_ALL,
    KEEP_NONE,
    MAX_BINS,
    Bracket,
    Threshold,
    at_the_ends,
    bracket_from_scores,
    coarse_histogram,
    narrow,
)
from pipeline.shard import sample
from pipeline.shard.chunk import count_nonfinite, make_chunk
from pipeline.shard.reading import OVERHEAD_BYTES, Load, Loaded, Memory, Section, SectionReader, Slice, sections
from pipeline.shard.sample import Sample
from pipeline.shard.table import Seen, Tally, exact_sum, plain_row, pruned_row
from pipeline.shard.writing import Sink
from pipeline.storage.local import Folder


@dataclass(frozen=True)
class Task:
    """What a worker needs to know to work on a shard.

    Attributes:
        groups: the groups that have tensors in the shard.
        brackets: for `measure`, the keys to count, for groups over several shards.
        thresholds: for `write`, what was found for those groups, with this shard's part of the tie quota.
        round: how many times the groups have been measured.
        keep: hold what is read for the steps that follow.
    """

    shard: Shard
    groups: dict[str, Group]
    brackets: dict[str, Bracket] = field(default_factory=dict)
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    round: int = 0
    keep: bool = False


@dataclass(frozen=True)
class Done:
    """What a worker says of a finished task.

    Attributes:
        dealt_bytes: input bytes that the step was about, in memory already or not; the progress of the run.
        read_bytes: input bytes that it read; `written_bytes` of the output; `seconds` of the wall.
    """

    shard: int
    dealt_bytes: int
    read_bytes: int
    written_bytes: int
    seconds: float


def sample_name(shard: int) -> str:
    return f"fapm/work/sample-{shard:05d}.npz"


def measure_name(shard: int, round_: int) -> str:
    return f"fapm/work/measure-{round_}-{shard:05d}.npz"


def record_name(shard: int) -> str:
    return f"fapm/work/shard-{shard:05d}.json"


READ_BYTES = "read_bytes"
"""In a file of samples or counts, what it cost to make."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was told to stop; what is finished stays."""


class Passes:
    """A section's pieces, as often as they are asked for."""

    def __init__(self, reader: SectionReader, section: Section, loads: list[Load] | None):
        self._reader, self.section, self._loads = reader, section, loads
        self._parts: dict[str, list[tuple[Slice, list[np.ndarray]]]] | None = None

    @property
    def resident(self) -> bool:
        return self._loads is not None

    def __iter__(self) -> Iterator[Loaded]:
        if self._loads is None:
            return self._reader.stream(self.section.pieces)
        return (load.future.result() for load in self._loads)

    def parts(self, tensor: PairedTensor) -> list[tuple[Slice, list[np.ndarray]]]:
        """The slices of a tensor that is pruned, in memory; for a resident section."""
        assert self.resident
        if self._parts is None:
            self._parts = {}
            for loaded in self:
                for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                    if not part.raw:
                        self._parts.setdefault(part.tensor.name, []).append((part, views))
        return self._parts[tensor.name]


class Worker:
    """Works on one shard at a time; lives as long as the run.

    Args:
        recipe: the recipe of the run.
        progress: told how many bytes of input have been dealt with, as it happens.
        cancelled: makes the work stop soon with `Interrupted`.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: Callable[[int], None] | None = None,
        cancelled: threading.Event | None = None,
    ):
        self._recipe = recipe
        self._scored = METHODS[recipe.method].score is not None
        self._engine = make_engine(recipe.method, recipe.device)
        self._out = Folder(recipe.out)
        self._inputs = Folder(recipe.base), Folder(recipe.finetuned)
        self._reader = SectionReader(*self._inputs, Memory(recipe.memory - OVERHEAD_BYTES))
        self._progress = progress or (lambda nbytes: None)
        self._cancelled = cancelled or threading.Event()
        self._kept: dict[int, list[list[Load] | None]] = {}
        self._bins = np.empty(0, np.int64)

    def close(self) -> None:
        self._reader.close()
        for folder in self._inputs:
            folder.close()

    # The three steps.

    def sample(self, task: Task) -> Done:
        """Count a sample of the scores of groups over several shards, coarsely, into `sample_name`."""
        began, read = time.perf_counter(), self._reader.bytes_read
        if task.keep:
            for _, passes in self._sections(task):
                for _ in passes:  # until all of it is there
                    pass
        histograms: dict[str, np.ndarray] = {}
        for tensor in _wide(task):
            if tensor.common:
                share = sample.WIDE / task.groups[tensor.group].numel
                taken = sample.far(self._reader, tensor, share, self._recipe)
                m = np.float32(np.abs(taken.p).mean(dtype=np.float64))
                counted = coarse_histogram(taken.scores(tensor, self._recipe, m))
                histograms[tensor.group] = histograms.get(tensor.group, 0) + counted
        done = Done(task.shard.index, 0, self._reader.bytes_read - read, 0, time.perf_counter() - began)
        self._save(sample_name(task.shard.index), histograms, done)
        return done

    def measure(self, task: Task) -> Done:
        """Count all scores of groups over several shards inside their brackets, into `measure_name`."""
        began, read = time.perf_counter(), self._reader.bytes_read
        bins = {name: np.zeros(bracket.bins(bracket.shift()), np.int64) for name, bracket in task.brackets.items()}
        above = dict.fromkeys(task.brackets, 0)
        means: dict[str, tuple[float, float]] = {}
        dealt_bytes = 0
        for section, passes in self._sections(task):
            tallies = {t.name: Tally() for t in section.tensors if t.group in task.brackets and t.common}
            self._find_means(passes, tallies)
            means |= {name: (tally.mean, tally.base_squares) for name, tally in tallies.items()}
            self._count(passes, tallies, task.brackets, {}, bins, above)
            dealt = sum(t.read_bytes for t in section.tensors if t.name in tallies)
            self._progress(dealt)
            dealt_bytes += dealt
        saved = {"means": _json_array(means), "above": _json_array(above)}
        for name, counted in bins.items():
            saved["bins:" + name] = counted if counted.max(initial=0) >= 2**32 else counted.astype(np.uint32)
        read_bytes = self._reader.bytes_read - read
        done = Done(task.shard.index, dealt_bytes, read_bytes, 0, time.perf_counter() - began)
        self._save(measure_name(task.shard.index, task.round), saved, done)
        return done

    def write(self, task: Task) -> Done:
        """Write the pruned shard, and its record into `record_name`; the shard appears whole and last."""
        began, read = time.perf_counter(), self._reader.bytes_read
        shard = task.shard
        known = load_means(self._out, shard.index)
        writer = self._out.create(shard.name, shard.nbytes)
        sink = Sink(writer, shard.nbytes)
        try:
            sink.append(shard.header)
            rows = []
            quotas = {name: threshold.ties for name, threshold in task.thresholds.items()}
            for section, passes in self._sections(task, write=True):
                rows += self._write_section(task, section, passes, known, quotas, sink)
            checksum = sink.finish()
        except BaseException:
            sink.abandon()
            raise
        seconds = time.perf_counter() - began
        dealt = sum(t.read_bytes for t in shard.tensors)
        done = Done(shard.index, dealt, self._reader.bytes_read - read, shard.nbytes, seconds)
        record = {
            "name": shard.name, "nbytes": shard.nbytes, "xxh3_128": checksum,
            "read_bytes": done.read_bytes, "seconds": round(seconds, 3), "tensors": rows,
        }  # fmt: skip
        self._out.write(record_name(shard.index), json.dumps(record).encode())
        writer.publish()
        return done

    # Sections, with the next one read ahead.

    def _sections(self, task: Task, write: bool = False) -> Iterator[tuple[Section, Passes]]:
        """What a step works through: the whole shard to write it or to keep it, else what lies in wide groups."""
        shard = task.shard
        if not (write or task.keep):
            wanted = tuple(t for t in _wide(task) if t.group in task.brackets)
            shard = Shard(shard.index, shard.name, wanted, shard.header, shard.nbytes)
        cut = sections(shard, [n for n, g in task.groups.items() if not g.wide and g.tensors > 1])
        loads = self._kept.pop(shard.index, None) or [None] * len(cut)
        keep = task.keep and not write

        def start(i: int) -> None:
            if i < len(cut) and loads[i] is None:
                loads[i] = self._reader.start(cut[i])

        def release(i: int) -> None:
            taken, loads[i] = loads[i], None
            self._reader.release(taken or [])

        try:
            for i, section in enumerate(cut):
                start(i)
                start(i + 1)
                yield section, Passes(self._reader, section, loads[i])
                if not keep:
                    release(i)
        except BaseException:
            for i in range(len(cut)):
                release(i)
            raise
        if keep:
            self._kept[shard.index] = loads

    # What is done with a section.

    def _chunks(self, passes: Iterable[Loaded], wanted: dict[str, Any]) -> Iterator[tuple[PairedTensor, Chunk]]:
        for loaded in passes:
            self._check()
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                if not part.raw and part.tensor.name in wanted:
                    yield part.tensor, make_chunk(part, views, self._recipe)

    def _find_means(self, passes: Passes, tallies: dict[str, Tally]) -> None:
        if not tallies:
            return
        sums: dict[str, list[np.ndarray]] = {name: [] for name in tallies}
        squares: dict[str, list[np.ndarray]] = {name: [] for name in tallies}
        for tensor, chunk in self._chunks(passes, tallies):
            one, two = self._engine.abs_sums(chunk)
            sums[tensor.name].append(one)
            squares[tensor.name].append(two)
        for tensor in passes.section.tensors:
            if tensor.name in tallies:
                tally = tallies[tensor.name]
                tally.mean = exact_sum(sums[tensor.name]) / tensor.common
                tally.base_squares = exact_sum(squares[tensor.name])
        if not all(math.isfinite(tally.mean) for tally in tallies.values()):
            self._refuse_nonfinite(passes, tallies)

    def _count(
        self,
        passes: Passes,
        tallies: dict[str, Tally],
        brackets: dict[str, Bracket],
        max_bins: dict[str, int],
        bins: dict[str, np.ndarray],
        above: dict[str, int],
    ) -> None:
        """Count the scores of some groups inside their brackets, in at most `max_bins` bins (MAX_BINS by default)."""
        wanted = {t.name: None for t in passes.section.tensors if t.group in brackets and t.name in tallies}
        shifts = {name: bracket.shift(max_bins.get(name, MAX_BINS)) for name, bracket in brackets.items()}
        all_finite = True
        for tensor, chunk in self._chunks(passes, wanted):
            name, m = tensor.group, tallies[tensor.name].m
            higher, finite = self._engine.count(chunk, m, brackets[name], shifts[name], bins[name])
            above[name] += higher
            all_finite &= finite
        if not all_finite:
            self._refuse_nonfinite(passes, tallies)

    def _search(self, task: Task, passes: Passes, tallies: dict[str, Tally]) -> dict[str, Threshold]:
        """The thresholds of the groups that lie in this section."""
        tensors: dict[str, list[PairedTensor]] = {}
        for tensor in passes.section.tensors:
            if tensor.name in tallies and not task.groups[tensor.group].wide:
                tensors.setdefault(tensor.group, []).append(tensor)
        found: dict[str, Threshold] = {}
        brackets: dict[str, Bracket] = {}
        max_bins: dict[str, int] = {}
        for name, members in tensors.items():
            group = task.groups[name]
            ends = threshold_at_the_ends(self._recipe, group)
            if ends:
                found[name] = ends
                continue
            max_bins[name] = min(MAX_BINS, 1 << max(8, (group.numel // 8).bit_length()))
            brackets[name] = self._first_bracket(passes, members, tallies, group)
        while brackets:
            shifts = {name: bracket.shift(max_bins[name]) for name, bracket in brackets.items()}
            bins = self._empty_bins({name: bracket.bins(shifts[name]) for name, bracket in brackets.items()})
            above = dict.fromkeys(brackets, 0)
            self._count(passes, tallies, brackets, max_bins, bins, above)
            for name, bracket in list(brackets.items()):
                result = narrow(bracket, shifts[name], above[name], bins[name], task.groups[name].k)
                if isinstance(result, Threshold):
                    found[name] = result
                    del brackets[name]
                else:
                    brackets[name] = result
        return found

    def _first_bracket(
        self, passes: Passes, members: list[PairedTensor], tallies: dict[str, Tally], group: Group
    ) -> Bracket:
        if group.numel < 2 * sample.LOCAL:
            return Bracket()
        share, owed, scores = sample.LOCAL / group.numel, 0.0, []
        for tensor in members:
            owed += share * tensor.common
            if owed >= sample.RUN or tensor is members[-1]:  # of many small tensors only some are looked at
                taken = self._sample(passes, tensor, min(1, owed / tensor.common))
                scores.append(taken.scores(tensor, self._recipe, tallies[tensor.name].m))
                owed = 0.0
        return bracket_from_scores(np.concatenate(scores), group.k / group.numel)

    def _empty_bins(self, sizes: dict[str, int]) -> dict[str, np.ndarray]:
        """Zeroed histograms, in one buffer that is used again and again: fresh pages cost more than the zeros."""
        total = sum(sizes.values())
        if self._bins.size < total:
            self._bins = np.empty(total, np.int64)
        self._bins[:total] = 0
        ends = np.cumsum(list(sizes.values())).tolist()
        return {name: self._bins[end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)}

    def _write_section(
        self,
        task: Task,
        section: Section,
        passes: Passes,
        known: dict[str, tuple[float, float]],
        quotas: dict[str, int],
        sink: Sink,
    ) -> list[dict[str, Any]]:
        """Find thresholds, write the section's bytes in order, and return a row for each tensor."""
        began = time.perf_counter()
        tallies = {t.name: Tally(*known.get(t.name, ())) for t in section.tensors if t.action == "prune" and t.common}
        self._find_means(passes, {name: tally for name, tally in tallies.items() if name not in known})
        thresholds = self._search(task, passes, tallies)
        quotas |= {name: threshold.ties for name, threshold in thresholds.items()}
        thresholds |= task.thresholds
        for loaded in passes:
            self._check()
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                if part.raw:
                    _pass_through(part, views[0], sink)
                else:
                    self._apply(part, views, tallies[part.tensor.name], thresholds, quotas, sink)
            self._progress(loaded.piece.nbytes)
        if not all(np.isfinite(block).all() for tally in tallies.values() for block in tally.squares):
            self._refuse_nonfinite(passes, tallies)
        for tensor in section.tensors:
            if tensor.name in tallies:
                refuse_overflow(tallies[tensor.name].overflowed, tensor.dtype, tensor.name)
        seconds = time.perf_counter() - began
        rows = []
        for tensor in section.tensors:
            row = plain_row(tensor, task.shard.name, seconds * tensor.nbytes / max(1, section.nbytes))
            if tensor.name in tallies:
                group, tally = task.groups[tensor.group], tallies.pop(tensor.name)
                seen = self._seen(passes, tensor, tally)
                row |= pruned_row(tensor, group, tally, thresholds[group.name], seen)
            rows.append(row)
        return rows

    def _apply(
        self,
        part: Slice,
        views: Sequence[np.ndarray],
        tally: Tally,
        thresholds: dict[str, Threshold],
        quotas: dict[str, int],
        sink: Sink,
    ) -> None:
        chunk, group = make_chunk(part, views, self._recipe), part.tensor.group
        width = itemsize(part.tensor.dtype)
        out = sink.reserve(chunk.p.size * width, width).view(f"u{width}")
        applied = self._engine.apply(chunk, tally.m, thresholds[group], quotas[group], out)
        if chunk.rounded:
            tally.overflowed += sum(count_nonfinite(out.view(np.uint8), part.tensor.dtype))
        quotas[group] -= applied.ties
        tally.kept += applied.kept
        tally.changed += applied.changed
        tally.kept_changed += applied.kept_changed
        tally.squares.append(applied.squares)
        tally.kept_squares.append(applied.kept_squares)

    def _sample(self, passes: Passes, tensor: PairedTensor, share: float) -> Sample:
        if passes.resident:
            return sample.near(passes.parts(tensor), tensor, share, self._recipe)
        return sample.far(self._reader, tensor, share, self._recipe)

    def _seen(self, passes: Passes, tensor: PairedTensor, tally: Tally) -> Seen:
        """Scores, d and |p| of enough elements for a row."""
        taken = self._sample(passes, tensor, sample.REPORTED / tensor.common)
        scores = taken.scores(tensor, self._recipe, tally.m) if self._scored else np.zeros(taken.p.size, np.float32)
        with np.errstate(all="ignore"):
            return scores, np.abs(taken.f - taken.p), np.abs(taken.p)

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted

    def _refuse_nonfinite(self, passes: Passes, wanted: dict[str, Any]) -> None:
        """Count what is not finite, and raise if there is any: d may have overflowed between finite weights."""
        found: dict[tuple[str, str], list[int]] = {}
        for loaded in passes:
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                if part.raw or part.tensor.name not in wanted:
                    continue
                for role, source, stored in zip(("base", "finetuned"), part.tensor.sources, views, strict=True):
                    nan, infinite = count_nonfinite(stored, source.dtype)
                    if (nan or infinite) and not (role == "finetuned" and self._recipe.nonfinite == "base"):
                        counts = found.setdefault((role, part.tensor.name), [0, 0])
                        counts[0] += nan
                        counts[1] += infinite
        if not found:
            return
        listed = ", ".join(f"{role} {name!r} has {nan} NaN and {inf} Inf" for (role, name), (nan, inf) in found.items())
        if any(role == "base" for role, _ in found):
            hint = "nothing can stand in for base's: fetch base again, or give the tensor --rule NAME=finetuned"
        else:
            hint = "--nonfinite base takes base's value there, --rule NAME=base takes all of base's tensor"
        raise UserError(f"weights that are not finite: {listed}; {hint}")

    def _save(self, name: str, arrays: dict[str, np.ndarray], done: Done) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{READ_BYTES: np.array(done.read_bytes)}, **arrays)  # type: ignore[arg-type]
        self._out.write(name, buffer.getvalue())


def _wide(task: Task) -> list[PairedTensor]:
    return [t for t in task.shard.tensors if t.group and task.groups[t.group].wide]


def threshold_at_the_ends(recipe: Recipe, group: Group) -> Threshold | None:
    """The threshold where no score needs to be looked at: k is 0 or all, or the method chooses nothing."""
    if METHODS[recipe.method].score is None:
        return KEEP_ALL if recipe.density else KEEP_NONE
    return at_the_ends(group.numel, group.k)


def _pass_through(part: Slice, stored: np.ndarray, sink: Sink) -> None:
    source, target = part.tensor.sources[-1].dtype, part.tensor.dtype
    if source == target or not is_weight(source):
        sink.append(stored)
    else:
        out = convert(stored, source, target).view(np.uint8)
        lost = sum(count_nonfinite(out, target)) - sum(count_nonfinite(stored, source))
        refuse_overflow(lost, target, part.tensor.name)
        sink.append(out)


def _json_array(data: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


def load_arrays(folder: Folder, name: str) -> dict[str, np.ndarray]:
    """What a worker saved for the driver: samples by group, or counts."""
    with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as saved:
        return {key: saved[key] for key in saved.files if key != READ_BYTES}


def saved_read_bytes(folder: Folder, name: str) -> int:
    """How many input bytes a worker read for what it saved under this name."""
    with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as saved:
        return int(saved[READ_BYTES])


def load_means(folder: Folder, shard: int) -> dict[str, tuple[float, float]]:
    """mean|p| and Σp² of every tensor of a shard that was measured: the first round measures them all."""
    if not folder.has(measure_name(shard, 1)):
        return {}
    saved = load_arrays(folder, measure_name(shard, 1))
    return {name: (mean, squares) for name, (mean, squares) in json.loads(saved["means"].tobytes()).items()}
