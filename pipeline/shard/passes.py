"""The passes over one section: means, counts, search, apply. Each reads its pieces once (search: once a count).

They share a *bench*: the section, the tools, and what the passes before have found, as arrays over the section's
tensors (t) and over their groups (g).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import UserError
from pipeline.formats.dtypes import convert, is_weight, itemsize, refuse_overflow, upcast
from pipeline.plan import Group, PairedTensor
from pipeline.recipe import Recipe
from pipeline.scoring.engine import AnyChunk, Chunk, Engine, StoredChunk
from pipeline.scoring.methods import METHODS, evaluate
from pipeline.scoring.threshold import (
    KEEP_ALL,
    MAX_BINS,
    Bracket,
    Histograms,
    Threshold,
    bracket_from_scores,
    float_thresholds,
    histograms,
)
from pipeline.shard import sample
from pipeline.shard.chunk import count_nonfinite, make_chunk
from pipeline.shard.reading import Pieces
from pipeline.shard.sample import Sample
from pipeline.shard.section import SMALL, Slice
from pipeline.shard.table import MEASURED, change_quantiles, finite
from pipeline.shard.task import Check, known_threshold
from pipeline.shard.writing import Sink


class BlockSums:
    """Exactly rounded sums (SEMANTICS.md, 2) of the blocks of t tensors, whatever chunks they come in."""

    def __init__(self, tensors: int):
        self._whole = np.zeros(tensors)
        self._parts: dict[int, list[np.ndarray]] = {}

    def add(self, at: int, runs: int, blocks: np.ndarray) -> None:
        """The blocks of a chunk whose first tensor is `at`."""
        if runs > 1:
            self._whole[at : at + runs] = blocks
        else:
            self._parts.setdefault(at, []).append(blocks)

    def sums(self) -> np.ndarray:
        """(t,) float64; infinite where a sum is too large."""
        sums = self._whole.copy()
        for at, parts in self._parts.items():
            try:
                sums[at] = math.fsum(np.concatenate(parts).tolist())
            except OverflowError:
                sums[at] = math.inf
        return sums


class Scratch:
    """Memory for histograms that is used again and again: fresh pages cost more than the zeros."""

    def __init__(self) -> None:
        self._bins = np.empty(0, np.int64)

    def zeros(self, size: int) -> np.ndarray:
        """int64 zeros, until the next call."""
        if self._bins.size < size:
            self._bins = np.empty(size, np.int64)
        self._bins[:size] = 0
        return self._bins[:size]


@dataclass
class Bench:
    """One section on a worker's bench.

    Attributes:
        groups: every group of its tensors, by name.
        names: the groups in the order of the arrays.
        group_of: (t,) int64, each tensor's group; −1 where it is not pruned.
        mean, base_squares: (t,) float64, mean|p| and Σp².
        keys, quotas: (g,) int64, each group's threshold, and how many elements equal to it this shard keeps.
        ties: (g,) int64, how many of those are left.
    """

    recipe: Recipe
    engine: Engine
    pieces: Pieces
    groups: dict[str, Group]
    check: Check = lambda: None
    scratch: Scratch = field(default_factory=Scratch)
    progress: Callable[[int], None] = lambda nbytes: None

    def __post_init__(self) -> None:
        index: dict[str, int] = {}
        places = [index.setdefault(t.group, len(index)) if t.group and t.common else -1 for t in self.tensors]
        self.names = list(index)
        self.group_of = np.array(places, np.int64)
        self.mean = np.full(len(places), np.nan)
        self.base_squares = np.full(len(places), np.nan)
        self.keys = np.zeros(len(index), np.int64)
        self.quotas = np.zeros(len(index), np.int64)
        self.ties = np.zeros(len(index), np.int64)

    @property
    def tensors(self) -> tuple[PairedTensor, ...]:
        return self.pieces.section.tensors

    @property
    def common(self) -> np.ndarray:
        return np.array([t.common for t in self.tensors], np.int64)

    def slices(self) -> Iterator[sample.Part]:
        """Every slice of the section, with what is held of it."""
        for loaded in self.pieces:
            self.check()
            yield from loaded.slices()

    def chunk(self, part: Slice, held: list[np.ndarray] | StoredChunk) -> AnyChunk:
        """What the engine takes of a slice."""
        return held if isinstance(held, StoredChunk) else make_chunk(part, held, self.recipe)

    def chunks(self, wanted: np.ndarray) -> Iterator[tuple[slice, AnyChunk]]:
        """The chunks that hold any wanted tensor ((t,) bool), and which tensors they hold."""
        for part, held in self.slices():
            here = places(part)
            if not part.raw and wanted[here].any():
                yield here, self.chunk(part, held)

    @property
    def on_device(self) -> bool:
        """Whether there is something for a device, and it is there."""
        return bool(self.pieces.section.on_device) and self.pieces.resident_on_device

    @property
    def looks(self) -> int:
        """How many elements of a group to look at: fewer on a device, where to count once more costs less."""
        return sample.ON_DEVICE if self.on_device else sample.LOCAL

    def look(self, tensor: PairedTensor, share: float) -> Sample:
        """A sample for that, in short runs where those cost no more than long ones."""
        longest = sample.LONG_RUN if self.pieces.reader.is_far else sample.RUN
        return self.sample(tensor, share, sample.SHORTEST_RUN if self.on_device else longest)

    def sample(self, tensor: PairedTensor, share: float, longest: int = sample.RUN) -> Sample:
        """About `share` of a tensor's elements, in runs of `longest` at most."""
        parts = self.pieces.parts(tensor)
        if parts:
            return sample.near(parts, tensor, share, self.recipe, self.engine.device, longest)
        return sample.far(self.pieces.reader, tensor, share, self.recipe, longest)


def places(part: Slice) -> slice:
    """Where a slice's tensors are in its section."""
    return slice(part.at, part.at + len(part.tensors))


def find_means(bench: Bench, known: np.ndarray | None = None) -> None:
    """mean|p| and Σp² of the tensors that are pruned, but for those that are `known`: (t, 2), NaN where not.

    Raises:
        UserError: weights of base are not finite.
    """
    if known is not None:
        bench.mean, bench.base_squares = known.T.copy()
    wanted = (bench.group_of >= 0) & np.isnan(bench.mean)
    if not wanted.any():
        return
    sums, squares = BlockSums(wanted.size), BlockSums(wanted.size)
    passed, added = bench.engine.sums(), []
    for here, chunk in bench.chunks(wanted):
        passed.add(chunk)
        added.append((here.start, chunk.runs))
    for (at, runs), (one, two) in zip(added, passed.result(), strict=True):
        sums.add(at, runs, one)
        squares.add(at, runs, two)
    bench.mean[wanted] = sums.sums()[wanted] / bench.common[wanted]
    bench.base_squares[wanted] = squares.sums()[wanted]
    if not np.isfinite(bench.mean[wanted]).all():
        refuse_nonfinite(bench)


def count(bench: Bench, counted: Histograms, names: Sequence[str]) -> None:
    """Count the scores of some groups into their histograms.

    Args:
        names: of the groups, in the order of the histograms.

    Raises:
        UserError: weights are not finite.
    """
    place = {name: i for i, name in enumerate(names)}
    by_group = np.array([place.get(name, -1) for name in bench.names] + [-1], np.int64)
    into = by_group[bench.group_of]  # the last, for −1
    means = bench.mean.astype(np.float32)
    for thorough in (False, True):
        passed = bench.engine.counting(counted, thorough)
        for here, chunk in bench.chunks(into >= 0):
            if not thorough or isinstance(chunk, StoredChunk):
                passed.add(chunk, means[here], into[here])
        found = passed.result()
        if not all(one.finite for one in found):
            refuse_nonfinite(bench)
        if all(one.complete for one in found):
            return


_ALL = 1 << 62  # elements


def search(bench: Bench, found: dict[str, Threshold], left: dict[str, int]) -> None:
    """The thresholds of the section's groups: those over several shards are `found`, the others lie in it.

    Args:
        left: what the sections before have left of the tie quotas of those that are found.
    """
    members: dict[str, list[PairedTensor]] = {}
    singles = []
    for tensor, g in zip(bench.tensors, bench.group_of.tolist(), strict=True):
        if g < 0:
            continue
        group = bench.groups[tensor.group]
        known = found[group.name] if group.wide else known_threshold(bench.recipe, group, tensor.density)
        if known:
            bench.keys[g], bench.quotas[g] = known.key, known.ties
            bench.ties[g] = _ALL if known == KEEP_ALL else left.get(group.name, known.ties)
        elif group.tensors == 1 and tensor.common <= SMALL and tensor.common == tensor.numel:
            singles.append(g)
        else:
            members.setdefault(group.name, []).append(tensor)
    _select(bench, np.array(singles, np.int64))
    brackets: dict[str, Bracket] = {}
    limits: dict[str, int] = {}
    for name, tensors in members.items():
        limits[name] = min(16 * bench.looks, MAX_BINS, 1 << max(8, (bench.groups[name].numel // 8).bit_length()))
        brackets[name] = _first_bracket(bench, tensors, bench.groups[name], limits[name])
    while brackets:
        names = list(brackets)
        counted = histograms(list(brackets.values()), [limits[name] for name in names], bench.scratch.zeros)
        count(bench, counted, names)
        for i, name in enumerate(names):
            result = counted.narrow(i, bench.groups[name].k)
            if isinstance(result, Threshold):
                g = bench.names.index(name)
                bench.keys[g], bench.quotas[g], bench.ties[g] = result.key, result.ties, result.ties
                del brackets[name]
            else:
                brackets[name] = result


def _select(bench: Bench, singles: np.ndarray) -> None:
    """The thresholds of groups of one small tensor, many of them in one chunk."""
    if not singles.size:
        return
    k = np.zeros(len(bench.names) + 1, np.int64)
    k[singles] = [bench.groups[bench.names[g]].k for g in singles]
    per_tensor = k[bench.group_of]
    means = bench.mean.astype(np.float32)
    passed, added = bench.engine.selection(), []
    for here, chunk in bench.chunks(per_tensor > 0):
        passed.add(chunk, means[here], per_tensor[here])
        added.append(here)
    for here, (keys, ties) in zip(added, passed.result(), strict=True):
        chosen = per_tensor[here] > 0
        where = bench.group_of[here][chosen]
        bench.keys[where], bench.quotas[where], bench.ties[where] = keys[chosen], ties[chosen], ties[chosen]


def _first_bracket(bench: Bench, members: list[PairedTensor], group: Group, max_bins: int) -> Bracket:
    looks = bench.looks
    if group.numel < 2 * looks:
        return Bracket()
    means = {t.name: np.float32(m) for t, m in zip(bench.tensors, bench.mean, strict=True) if t.group == group.name}
    if len(members) > 1:
        return sample.survey(members, group, looks, bench.look, bench.recipe, means).bracket(group, max_bins)
    (tensor,) = members
    taken = bench.look(tensor, looks / group.numel)
    return bracket_from_scores(taken.scores(tensor, bench.recipe, means[tensor.name]), group.k / group.numel)


def apply(bench: Bench, sink: Sink) -> np.ndarray:
    """Write the section's bytes in order, and return what was measured of its tensors: (t,) MEASURED.

    Uses up `bench.ties`.

    Raises:
        UserError: weights are not finite, or became infinite in the output's dtype.
    """
    rows = np.zeros(len(bench.tensors), MEASURED)
    rows["before"] = rows["after"] = np.nan
    pruned = bench.group_of >= 0
    rows["threshold_key"][pruned] = bench.keys[bench.group_of[pruned]]
    rows["ties"][pruned] = bench.quotas[bench.group_of[pruned]]
    thresholds = float_thresholds(rows["threshold_key"])
    means = bench.mean.astype(np.float32)
    squares, kept_squares = BlockSums(rows.size), BlockSums(rows.size)
    described, overflowed = ~pruned, np.zeros(rows.size, np.int64)
    passed, added = bench.engine.application(bench.ties), []
    for part, held in bench.slices():
        here = places(part)
        if part.raw:
            assert isinstance(held, list)
            _pass_through(part, held[0], sink)
        else:
            chunk, width = bench.chunk(part, held), itemsize(part.tensors[0].dtype)
            out = sink.reserve(chunk.numel * width, width).view(f"u{width}")
            passed.add(chunk, means[here], thresholds[here], bench.group_of[here], out)
            added.append((here, chunk.runs))
            if chunk.rounded and isinstance(chunk, Chunk):
                overflowed[here] += _overflows(part, chunk, out)
            if chunk.runs > 1:
                _describe_many(bench, here, chunk, thresholds[here], rows)
                described[here] = True
        bench.progress(part.nbytes)
    for (here, runs), done in zip(added, passed.result(), strict=True):
        overflowed[here] += done.overflowed
        rows["kept"][here] += done.kept
        rows["changed"][here] += done.changed
        rows["kept_changed"][here] += done.kept_changed
        squares.add(here.start, runs, done.squares)
        kept_squares.add(here.start, runs, done.kept_squares)
    one, two = squares.sums(), kept_squares.sums()
    if not np.isfinite(one).all():
        refuse_nonfinite(bench)
    for i in np.flatnonzero(overflowed).tolist():
        refuse_overflow(int(overflowed[i]), bench.tensors[i].dtype, bench.tensors[i].name)
    for i in np.flatnonzero(~described).tolist():
        _describe(bench, i, thresholds[i], rows)
    with np.errstate(all="ignore"):
        rows["norm_delta"], rows["kept_share"] = finite(np.sqrt(one)), finite(two / one)
        rows["norm_base"], rows["mean_abs_base"] = finite(np.sqrt(bench.base_squares)), finite(bench.mean)
    return rows


def _describe_many(bench: Bench, here: slice, chunk: Chunk, thresholds: np.ndarray, rows: np.ndarray) -> None:
    """The quantiles of small tensors that are in memory anyway: of all their elements."""
    p, f = upcast(chunk.p), upcast(chunk.f)
    runs = np.diff(chunk.starts)
    method = METHODS[bench.recipe.method]
    scores = np.zeros(p.size, np.float32)
    if method.score:
        positions = np.arange(p.size) - np.repeat(chunk.starts[:-1], runs)
        means = np.repeat(bench.mean[here].astype(np.float32), runs)
        scores = evaluate(method, p, f, means, np.repeat(chunk.streams, runs), positions)
    rows["before"][here], rows["after"][here] = change_quantiles(p, f, scores, thresholds, chunk.starts)


def _describe(bench: Bench, i: int, threshold: np.float32, rows: np.ndarray) -> None:
    """The quantiles of one tensor, from a sample."""
    tensor = bench.tensors[i]
    taken = bench.sample(tensor, sample.REPORTED / tensor.common)
    scores = np.zeros(taken.p.size, np.float32)
    if METHODS[bench.recipe.method].score:
        scores = taken.scores(tensor, bench.recipe, np.float32(bench.mean[i]))
    before, after = change_quantiles(taken.p, taken.f, scores, np.array([threshold]), np.array([0, taken.p.size]))
    rows["before"][i], rows["after"][i] = before[0], after[0]


def _pass_through(part: Slice, stored: np.ndarray, sink: Sink) -> None:
    (tensor,) = part.tensors
    source, target = tensor.sources[-1].dtype, tensor.dtype
    if source == target or not is_weight(source):
        sink.append(stored)
    else:
        out = convert(stored, source, target).view(np.uint8)
        refuse_overflow(sum(count_nonfinite(out, target)) - sum(count_nonfinite(stored, source)), target, tensor.name)
        sink.append(out)


def _overflows(part: Slice, chunk: Chunk, out: np.ndarray) -> list[int]:
    """Elements of each tensor of the output that rounding made infinite."""
    ends = zip(chunk.starts[:-1], chunk.starts[1:], strict=True)
    return [sum(count_nonfinite(out[begin:end].view(np.uint8), part.tensors[0].dtype)) for begin, end in ends]


def refuse_nonfinite(bench: Bench) -> None:
    """Count what is not finite, and raise if there is any: d may have overflowed between finite weights.

    Raises:
        UserError: with the names of the tensors.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for part, views in bench.pieces.bytes():
        if part.raw:
            continue
        for role, side, stored in zip(("base", "finetuned"), part.sources, views, strict=True):
            if role == "finetuned" and bench.recipe.nonfinite == "base":
                continue
            width, begin = itemsize(side[0].dtype), 0
            for tensor in part.tensors:
                end = begin + (part.stop - part.start if len(part.tensors) == 1 else tensor.common) * width
                nan, infinite = count_nonfinite(stored[begin:end], side[0].dtype)
                begin = end
                if nan or infinite:
                    counts = found.setdefault((role, tensor.name), [0, 0])
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
