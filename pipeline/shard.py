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

from pipeline.dtypes import bits, convert, is_weight, itemsize, nonfinite, round_to, upcast, values
from pipeline.engine import Chunk, make_engine
from pipeline.errors import UserError
from pipeline.plan import Group, PairedTensor, Shard
from pipeline.reading import OVERHEAD_BYTES, Load, Loaded, Memory, Section, SectionReader, Slice, sections
from pipeline.recipe import Recipe
from pipeline.score import METHODS, evaluate, stream_of
from pipeline.storage import Folder
from pipeline.threshold import (
    KEEP_ALL,
    KEEP_NONE,
    MAX_BINS,
    Bracket,
    Threshold,
    at_the_ends,
    bracket_from_scores,
    coarse_histogram,
    narrow,
    score_of,
)
from pipeline.writing import Sink

SAMPLE = 1 << 17
"""Elements of a group that lies in one shard whose scores suggest a first bracket."""

WIDE_SAMPLE = 1 << 21
"""The same for a group over several shards, where a wrong guess costs another read of everything."""

_RUN = 256  # elements sampled side by side
_FAR_RUN = 2048  # the same where each run is a read of its own
_REPORTED = 1 << 14  # elements behind the quantiles of a tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
    """What a worker says of a finished task: bytes are of the inputs and the output, seconds of the wall."""

    shard: int
    read_bytes: int
    written_bytes: int
    seconds: float


def sample_name(shard: int) -> str:
    return f"fapm/work/sample-{shard:05d}.npz"


def measure_name(shard: int, round_: int) -> str:
    return f"fapm/work/measure-{round_}-{shard:05d}.npz"


def record_name(shard: int) -> str:
    return f"fapm/work/shard-{shard:05d}.json"


class Interrupted(Exception):
    """The run was told to stop; what is finished stays."""


@dataclass(slots=True)
class _Tally:
    """What has been seen of a tensor."""

    mean: float = 0.0
    base_squares: float = 0.0
    kept: int = 0
    changed: int = 0
    kept_changed: int = 0
    squares: list[np.ndarray] = field(default_factory=list)
    kept_squares: list[np.ndarray] = field(default_factory=list)
    sample: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # scores, d, |p|

    @property
    def m(self) -> np.float32:
        return np.float32(self.mean)


class _Passes:
    """A section's pieces, as often as they are asked for."""

    def __init__(self, reader: SectionReader, section: Section, loads: list[Load] | None):
        self._reader, self.section, self._loads = reader, section, loads

    @property
    def resident(self) -> bool:
        return self._loads is not None

    def __iter__(self) -> Iterator[Loaded]:
        if self._loads is None:
            return self._reader.stream(self.section.pieces)
        return (load.future.result() for load in self._loads)


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
        self._method = METHODS[recipe.method]
        self._engine = make_engine(recipe.method, recipe.device)
        self._out = Folder(recipe.out)
        self._inputs = Folder(recipe.base), Folder(recipe.finetuned)
        self._reader = SectionReader(*self._inputs, Memory(recipe.memory - OVERHEAD_BYTES))
        self._progress = progress or (lambda nbytes: None)
        self._cancelled = cancelled or threading.Event()
        self._kept: dict[int, list[list[Load] | None]] = {}

    def close(self) -> None:
        self._reader.close()
        for folder in self._inputs:
            folder.close()

    # The three steps.

    def sample(self, task: Task) -> Done:
        """Count a sample of the scores of groups over several shards, coarsely, into `sample_name`."""
        began, read = time.perf_counter(), self._reader.bytes_read
        histograms: dict[str, np.ndarray] = {}
        if task.keep:
            for _, _passes in self._sections(task, keep=True):
                pass
        for tensor in self._wide(task):
            if not tensor.common:
                continue
            share = WIDE_SAMPLE / task.groups[tensor.group].numel
            positions, p, f = self._far_sample(tensor, share)
            m = np.float32(np.abs(p).astype(np.float64).mean())
            scores = evaluate(self._method, p, f, m, stream_of(self._recipe.seed, tensor.name), positions)
            counted = coarse_histogram(scores)
            histograms[tensor.group] = histograms.get(tensor.group, 0) + counted
        self._save(sample_name(task.shard.index), histograms)
        return Done(task.shard.index, self._reader.bytes_read - read, 0, time.perf_counter() - began)

    def measure(self, task: Task) -> Done:
        """Count all scores of groups over several shards inside their brackets, into `measure_name`."""
        began, read = time.perf_counter(), self._reader.bytes_read
        above: dict[str, int] = {}
        bins: dict[str, np.ndarray] = {}
        means: dict[str, tuple[float, float]] = {}
        for section, passes in self._sections(task, only_wide=True, keep=task.keep):
            wanted = [t for t in section.tensors if t.group in task.brackets]
            tallies = {t.name: _Tally() for t in wanted}
            self._find_means(passes, tallies)
            means |= {name: (tally.mean, tally.base_squares) for name, tally in tallies.items()}
            for tensor in wanted:
                bracket = task.brackets[tensor.group]
                if tensor.group not in bins:
                    bins[tensor.group] = np.zeros(bracket.bins(bracket.shift(MAX_BINS)), np.int64)
                    above[tensor.group] = 0
            self._count(passes, tallies, task.brackets, MAX_BINS, bins, above)
        saved: dict[str, np.ndarray] = {"means": _json_array(means), "above": _json_array(above)}
        for name, counted in bins.items():
            saved["bins:" + name] = counted if counted.max(initial=0) >= 2**32 else counted.astype(np.uint32)
        self._save(measure_name(task.shard.index, task.round), saved)
        return Done(task.shard.index, self._reader.bytes_read - read, 0, time.perf_counter() - began)

    def write(self, task: Task) -> Done:
        """Write the pruned shard, and its record into `record_name`; the shard appears whole and last."""
        began, read = time.perf_counter(), self._reader.bytes_read
        shard = task.shard
        known = load_means(self._out, shard.index, task.round) if task.round else {}
        writer = self._out.create(shard.name, shard.nbytes)
        sink = Sink(writer, shard.nbytes)
        try:
            sink.append(shard.header)
            rows = []
            quotas = {name: threshold.ties for name, threshold in task.thresholds.items()}
            for section, passes in self._sections(task):
                rows += self._write_section(task, section, passes, known, quotas, sink)
            checksum = sink.finish()
        except BaseException:
            sink.abandon()
            raise
        seconds = time.perf_counter() - began
        done = Done(shard.index, self._reader.bytes_read - read, shard.nbytes, seconds)
        record = {
            "name": shard.name, "nbytes": shard.nbytes, "xxh3_128": checksum,
            "read_bytes": done.read_bytes, "seconds": round(seconds, 3), "tensors": rows,
        }  # fmt: skip
        self._out.write(record_name(shard.index), json.dumps(record).encode())
        writer.publish()
        return done

    # Sections, with the next one read ahead.

    def _wide(self, task: Task) -> list[PairedTensor]:
        return [t for t in task.shard.tensors if t.group and task.groups[t.group].wide]

    def _sections(self, task: Task, only_wide: bool = False, keep: bool = False) -> Iterator[tuple[Section, _Passes]]:
        shard = task.shard
        if only_wide and not keep:
            chosen = tuple(t for t in self._wide(task) if not task.brackets or t.group in task.brackets)
            shard = Shard(shard.index, shard.name, chosen, shard.header, shard.nbytes)
        cut = sections(shard, [n for n, g in task.groups.items() if not g.wide and g.tensors > 1])
        held = self._kept.pop(shard.index, None)
        loads = held or [None] * len(cut)

        def start(i: int) -> None:
            if i < len(cut) and loads[i] is None and self._reader.fits(cut[i]):
                loads[i] = self._reader.start(cut[i])

        try:
            for i, section in enumerate(cut):
                start(i)
                if not keep:
                    start(i + 1)
                yield section, _Passes(self._reader, section, loads[i])
                if not keep:
                    self._release(loads, i)
        except BaseException:
            for i in range(len(cut)):
                self._release(loads, i)
            raise
        if keep:
            self._kept[shard.index] = loads

    def _release(self, loads: list[list[Load] | None], i: int) -> None:
        taken = loads[i]
        if taken is not None:
            loads[i] = None
            self._reader.release(taken)

    # What is done with a section.

    def _chunks(self, passes: Iterable[Loaded], wanted: dict[str, Any]) -> Iterator[tuple[PairedTensor, Chunk]]:
        for loaded in passes:
            self._check()
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                if not part.raw and part.tensor.name in wanted:
                    yield part.tensor, self._chunk(part, views)

    def _chunk(self, part: Slice, views: Sequence[np.ndarray]) -> Chunk:
        tensor, (stored_p, stored_f) = part.tensor, views
        assert tensor.base and tensor.finetuned
        if self._recipe.nonfinite == "base":
            stored_f = _repaired(stored_p, stored_f, tensor)
        p, f = values(stored_p, tensor.base.dtype), values(stored_f, tensor.finetuned.dtype)
        if p.dtype != f.dtype:
            p, f = upcast(p), upcast(f)
            p, f = p.astype(np.result_type(p, f), copy=False), f.astype(np.result_type(p, f), copy=False)
        pruned = convert(stored_p, tensor.base.dtype, tensor.dtype, tensor.name)
        if self._method.keep is None or self._recipe.density in (0, 1):
            kept = convert(stored_f, tensor.finetuned.dtype, tensor.dtype, tensor.name)
        else:
            x, y = upcast(p), upcast(f)
            with np.errstate(all="ignore"):
                kept = self._method.keep(x, y, x.dtype.type(self._recipe.density))
            kept = round_to(kept, tensor.dtype, tensor.name)
        return Chunk(part.start, stream_of(self._recipe.seed, tensor.name), p, f, pruned, kept)

    def _find_means(self, passes: _Passes, tallies: dict[str, _Tally]) -> None:
        sums: dict[str, list[np.ndarray]] = {name: [] for name in tallies}
        squares: dict[str, list[np.ndarray]] = {name: [] for name in tallies}
        numel: dict[str, int] = {}
        for tensor, chunk in self._chunks(passes, tallies):
            one, two = self._engine.abs_sums(chunk)
            sums[tensor.name].append(one)
            squares[tensor.name].append(two)
            numel[tensor.name] = tensor.common
        for name, tally in tallies.items():
            if name in numel:
                total = math.fsum(np.concatenate(sums[name]).tolist())
                tally.mean = total / numel[name]
                tally.base_squares = math.fsum(np.concatenate(squares[name]).tolist())
                if not math.isfinite(total):
                    self._refuse_nonfinite(passes, tallies)

    def _count(
        self,
        passes: _Passes,
        tallies: dict[str, _Tally],
        brackets: dict[str, Bracket],
        max_bins: int | dict[str, int],
        bins: dict[str, np.ndarray],
        above: dict[str, int],
    ) -> None:
        """Count the scores of some groups inside their brackets."""
        wanted = {t.name: None for t in passes.section.tensors if t.group in brackets and t.name in tallies}
        all_finite = True
        for tensor, chunk in self._chunks(passes, wanted):
            bracket = brackets[tensor.group]
            shift = bracket.shift(max_bins if isinstance(max_bins, int) else max_bins[tensor.group])
            m = tallies[tensor.name].m
            higher, finite = self._engine.count(chunk, m, bracket, shift, bins[tensor.group])
            above[tensor.group] += higher
            all_finite &= finite
        if not all_finite:
            self._refuse_nonfinite(passes, tallies)

    def _search(self, task: Task, passes: _Passes, tallies: dict[str, _Tally]) -> dict[str, Threshold]:
        """The thresholds of the groups that lie in this section."""
        found: dict[str, Threshold] = {}
        brackets: dict[str, Bracket] = {}
        max_bins: dict[str, int] = {}
        tensors: dict[str, list[PairedTensor]] = {}
        for tensor in passes.section.tensors:
            if tensor.name in tallies and not task.groups[tensor.group].wide:
                tensors.setdefault(tensor.group, []).append(tensor)
        for name, members in tensors.items():
            group = task.groups[name]
            ends = self._at_the_ends(group)
            if ends:
                found[name] = ends
                continue
            max_bins[name] = min(MAX_BINS, 1 << max(8, (group.numel // 8).bit_length()))
            brackets[name] = Bracket()
            if group.numel >= 2 * SAMPLE:
                scores = []
                for tensor in members:
                    tally = tallies[tensor.name]
                    self._take_sample(passes, tensor, tally, SAMPLE / group.numel)
                    assert tally.sample
                    scores.append(tally.sample[0])
                brackets[name] = bracket_from_scores(np.concatenate(scores), group.k / group.numel)
        while brackets:
            shifts = {name: b.shift(max_bins[name]) for name, b in brackets.items()}
            bins = {name: np.zeros(b.bins(shifts[name]), np.int64) for name, b in brackets.items()}
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

    def _at_the_ends(self, group: Group) -> Threshold | None:
        if self._method.score is None:
            return KEEP_ALL if self._recipe.density else KEEP_NONE
        return at_the_ends(group.numel, group.k)

    def _write_section(
        self,
        task: Task,
        section: Section,
        passes: _Passes,
        known: dict[str, tuple[float, float]],
        quotas: dict[str, int],
        sink: Sink,
    ) -> list[dict[str, Any]]:
        """Find thresholds, write the section's bytes in order, and return a row for each tensor."""
        began = time.perf_counter()
        tallies = {t.name: _Tally(*known.get(t.name, ())) for t in section.tensors if t.action == "prune" and t.common}
        self._find_means(passes, {name: tally for name, tally in tallies.items() if name not in known})
        thresholds = self._search(task, passes, tallies)
        quotas |= {name: threshold.ties for name, threshold in thresholds.items()}
        thresholds |= task.thresholds
        for loaded in passes:
            self._check()
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                tensor = part.tensor
                if part.raw:
                    self._pass_through(part, views[0], sink)
                else:
                    self._apply(part, views, tallies[tensor.name], thresholds, quotas, sink)
            self._progress(loaded.piece.nbytes)
        if not all(np.isfinite(block).all() for tally in tallies.values() for block in tally.squares):
            self._refuse_nonfinite(passes, tallies)
        for tensor in section.tensors:
            if tensor.name in tallies and tallies[tensor.name].sample is None:
                self._take_sample(passes, tensor, tallies[tensor.name], 0)
        seconds = time.perf_counter() - began
        return [
            _row(t, task, tallies.get(t.name), thresholds.get(t.group), seconds * t.nbytes / max(1, section.nbytes))
            for t in section.tensors
        ]

    def _apply(
        self,
        part: Slice,
        views: Sequence[np.ndarray],
        tally: _Tally,
        thresholds: dict[str, Threshold],
        quotas: dict[str, int],
        sink: Sink,
    ) -> None:
        chunk, group = self._chunk(part, views), part.tensor.group
        width = itemsize(part.tensor.dtype)
        out = sink.reserve(chunk.p.size * width, width).view(f"u{width}")
        applied = self._engine.apply(chunk, tally.m, thresholds[group], quotas[group], out)
        quotas[group] -= applied.ties
        tally.kept += applied.kept
        tally.changed += applied.changed
        tally.kept_changed += applied.kept_changed
        tally.squares.append(applied.squares)
        tally.kept_squares.append(applied.kept_squares)

    def _pass_through(self, part: Slice, stored: np.ndarray, sink: Sink) -> None:
        source, target = part.tensor.sources[-1].dtype, part.tensor.dtype
        if source == target or not is_weight(source):
            sink.append(stored)
        else:
            sink.append(convert(stored, source, target, part.tensor.name).view(np.uint8))

    # Samples.

    def _take_sample(self, passes: _Passes, tensor: PairedTensor, tally: _Tally, share: float) -> None:
        share = max(share, _REPORTED / tensor.common)
        positions, p, f = (
            self._near_sample(passes, tensor, share) if passes.resident else self._far_sample(tensor, share)
        )
        stream = stream_of(self._recipe.seed, tensor.name)
        scores = (
            evaluate(self._method, p, f, tally.m, stream, positions)
            if self._method.score
            else np.zeros(p.size, np.float32)
        )
        with np.errstate(all="ignore"):
            tally.sample = scores, np.abs(f - p), np.abs(p)

    def _near_sample(
        self, passes: _Passes, tensor: PairedTensor, share: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, length = _runs(tensor.common, share, _RUN)
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for loaded in passes:
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                if part.raw or part.tensor is not tensor:
                    continue
                rows = (starts[(starts >= part.start) & (starts < part.stop)] - part.start) // length
                for side, source, stored in zip(sides, tensor.sources, views, strict=True):
                    whole = bits(stored, source.dtype)
                    side.append(whole[: whole.size // length * length].reshape(-1, length)[rows].reshape(-1))
        p, f = (np.concatenate(side).view(np.uint8) for side in sides)
        return _positions(starts, length), *self._upcast_pair(tensor, p, f)

    def _far_sample(self, tensor: PairedTensor, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, length = _runs(tensor.common, share, _FAR_RUN)
        p, f = self._reader.read_runs(tensor, starts, length)
        return _positions(starts, length), *self._upcast_pair(tensor, p, f)

    def _upcast_pair(self, tensor: PairedTensor, p: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert tensor.base and tensor.finetuned
        if self._recipe.nonfinite == "base":
            f = _repaired(p, f, tensor)
        x, y = upcast(values(p, tensor.base.dtype)), upcast(values(f, tensor.finetuned.dtype))
        real = np.result_type(x, y)
        return x.astype(real, copy=False), y.astype(real, copy=False)

    # The rest.

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted

    def _refuse_nonfinite(self, passes: _Passes, wanted: dict[str, Any]) -> None:
        """Count what is not finite, and raise if there is any: d may have overflowed between finite weights."""
        found: dict[str, list[int]] = {}
        for loaded in passes:
            for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                if part.raw or part.tensor.name not in wanted:
                    continue
                for side, source, stored in zip(("base", "finetuned"), part.tensor.sources, views, strict=True):
                    if side == "finetuned" and self._recipe.nonfinite == "base":
                        continue
                    odd = upcast(values(stored, source.dtype))[nonfinite(stored, source.dtype)]
                    if odd.size:
                        counts = found.setdefault(f"{part.tensor.name} ({side})", [0, 0])
                        counts[0] += int(np.isnan(odd).sum())
                        counts[1] += int(np.isinf(odd).sum())
        if found:
            listed = ", ".join(f"{name}: {nan} NaN and {inf} Inf" for name, (nan, inf) in found.items())
            hint = "--nonfinite base takes base's value there" if self._recipe.nonfinite == "error" else ""
            if any("(base)" in name for name in found):
                hint = "base's own have no replacement: give the tensor --rule NAME=finetuned, or fetch base again"
            raise UserError(f"weights that are not finite: {listed}; {hint}")

    def _save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self._out.write(name, buffer.getvalue())


def _json_array(data: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


def load_arrays(folder: Folder, name: str) -> dict[str, np.ndarray]:
    """What a worker saved for the driver."""
    with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as saved:
        return dict(saved)


def load_means(folder: Folder, shard: int, rounds: int) -> dict[str, tuple[float, float]]:
    """mean|p| and Σp² of every tensor that was measured, from the first round, which measures them all."""
    saved = load_arrays(folder, measure_name(shard, 1)) if folder.has(measure_name(shard, 1)) else {}
    return {name: tuple(pair) for name, pair in json.loads(saved["means"].tobytes()).items()} if saved else {}


def _repaired(stored_p: np.ndarray, stored_f: np.ndarray, tensor: PairedTensor) -> np.ndarray:
    """finetuned's bytes with base's value wherever finetuned's is not finite."""
    assert tensor.base and tensor.finetuned
    odd = nonfinite(stored_f, tensor.finetuned.dtype)
    if not odd.any():
        return stored_f
    width = itemsize(tensor.base.dtype)
    from_base = np.ascontiguousarray(stored_p.reshape(-1, width)[odd]).reshape(-1)
    fixed = bits(stored_f, tensor.finetuned.dtype).copy()
    fixed[odd] = convert(from_base, tensor.base.dtype, tensor.finetuned.dtype, tensor.name)
    return fixed.view(np.uint8)


def _runs(numel: int, share: float, length: int) -> tuple[np.ndarray, int]:
    """First elements of runs of one length, spread evenly, that hold about `share` of a tensor."""
    if numel < 4 * length:
        return np.zeros(1, np.int64), numel
    whole = numel // length
    count = min(whole, max(1, math.ceil(share * whole)))
    return np.arange(count) * whole // count * length, length


def _positions(starts: np.ndarray, length: int) -> np.ndarray:
    return (starts[:, None] + np.arange(length)).reshape(-1)


def _row(
    tensor: PairedTensor, task: Task, tally: _Tally | None, threshold: Threshold | None, seconds: float
) -> dict[str, Any]:
    """A tensor's row in the table; what has no meaning for it is None."""
    row: dict[str, Any] = {
        "name": tensor.name, "action": tensor.action, "dtype": tensor.dtype, "shape": list(tensor.shape),
        "shard": task.shard.name, "numel": tensor.numel, "seconds": round(seconds, 6),
    }  # fmt: skip
    if tally is None or threshold is None:
        return row
    squares = math.fsum(np.concatenate(tally.squares).tolist())
    kept_squares = math.fsum(np.concatenate(tally.kept_squares).tolist())
    group = task.groups[tensor.group]
    score = float(score_of(threshold.key))
    row |= {
        "group": tensor.group, "k": group.k, "pruned_numel": tensor.common,
        "kept": tally.kept, "changed": tally.changed, "kept_changed": tally.kept_changed,
        "threshold": score if math.isfinite(score) else None,
        "threshold_key": threshold.key, "ties": threshold.ties,
        "mean_abs_base": tally.mean, "norm_delta": math.sqrt(squares), "norm_base": math.sqrt(tally.base_squares),
        "kept_share": kept_squares / squares if squares else None,
    }  # fmt: skip
    assert tally.sample
    every = -(-tally.sample[0].size // _REPORTED)
    scores, d, p = (part[::every] for part in tally.sample)
    defined = (d != 0) & (p != 0)
    kept = defined & (scores >= score_of(threshold.key) if math.isfinite(score) else threshold == KEEP_ALL)
    with np.errstate(all="ignore"):
        change = d / p
    for when, chosen in (("before", defined), ("after", kept)):
        ordered = np.sort(change[chosen])
        for q in QUANTILES:
            row[f"change_{when}_q{round(q * 100):02d}"] = float(ordered[int(q * ordered.size)]) if ordered.size else None
    return row
