"""The passes over one section: means, counts, search, apply. Each reads its pieces once (search: once a count).

They share the *section state*: the section, the tools, and what the passes before have found, as arrays over the
section's tensors (t) and over their groups (g). Of candidates made from one reading each has its own, over the same
pieces, and a pass goes over all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fapm.errors import UserError
from fapm.formats.dtypes import convert, is_weight, itemsize, refuse_overflow, upcast
from fapm.planning.plan import Group, PairedTensor
from fapm.recipe import Recipe
from fapm.scoring.engine import AnyChunk, Chunk, Counted, Engine, Pass, StoredChunk
from fapm.scoring.methods import METHODS, evaluate
from fapm.scoring.threshold import (
    KEEP_ALL,
    MAX_BINS,
    Bracket,
    Histograms,
    Threshold,
    bracket_from_scores,
    float_thresholds,
    histograms,
)
from fapm.shard import sample
from fapm.shard.chunk import count_nonfinite, make_chunk, stored_chunk, value_chunk
from fapm.shard.reading import Pieces
from fapm.shard.sample import Sample
from fapm.shard.section import SMALL, Slice
from fapm.shard.table import MEASURED, change_quantiles, finite
from fapm.shard.task import Check, known_threshold
from fapm.shard.writing import AnySink


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


class HistogramMemory:
    """Memory for histograms that is used again and again: fresh pages cost more than the zeros."""

    def __init__(self) -> None:
        self._bins = np.empty(0, np.int64)

    def zeros(self, size: int) -> np.ndarray:
        """int64 zeros, until the next call."""
        if self._bins.size < size:
            self._bins = np.empty(size, np.int64)
        self._bins[:size] = 0
        return self._bins[:size]


class SampleCache:
    """Samples and their scores that several lanes look at, a few at a time.

    Args:
        lanes: how many they are; for one alone nothing is kept.
    """

    _MOST = 64

    def __init__(self, lanes: int = 1) -> None:
        self._found: dict[Any, Any] = {}
        self._keeps = lanes > 1

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if not self._keeps:
            return make()
        if key not in self._found:
            if len(self._found) >= self._MOST:
                self._found.clear()
            self._found[key] = make()
        return self._found[key]


@dataclass
class SectionState:
    """State of one section during its passes.

    Attributes:
        groups: every group of its tensors, by name.
        tensors: the section's, as this recipe's plan has them.
        source: number of the fine-tuned checkpoint that it is about.
        taken: what the states of a section share of their samples.
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
    memory: HistogramMemory = field(default_factory=HistogramMemory)
    tensors: tuple[PairedTensor, ...] = ()
    taken: SampleCache = field(default_factory=SampleCache)
    source: int = 1

    def __post_init__(self) -> None:
        self.tensors = self.tensors or self.pieces.section.tensors
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
    def common(self) -> np.ndarray:
        return np.array([t.common for t in self.tensors], np.int64)

    def slices(self) -> Iterator[sample.HeldSlice]:
        """Every slice of the section, with what is held of it."""
        for loaded in self.pieces:
            self.check()
            yield from loaded.slices()

    def own(self, part: Slice) -> Slice:
        """A slice of the section with the tensors as this recipe's plan has them."""
        return part.of(self.tensors)

    def pair(self, part: Slice, held: list[np.ndarray] | StoredChunk) -> list[np.ndarray] | StoredChunk:
        """Of what is held of a slice the bytes of base and of its own source."""
        if isinstance(held, StoredChunk):
            return held
        return [held[0], held[part.numbers.index(self.source)]]

    def chunk(self, part: Slice, held: list[np.ndarray] | StoredChunk) -> AnyChunk:
        """Chunk for the engine, of a slice of the section."""
        own, pair = self.own(part), self.pair(part, held)
        if not isinstance(pair, StoredChunk):
            return make_chunk(own, pair, self.recipe)
        return stored_chunk(own, pair.put, self.recipe)

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

        def take() -> Sample:
            parts = [(part, self.pair(part, held)) for part, held in self.pieces.parts(tensor)]
            if parts:
                return sample.near(parts, tensor, share, self.recipe, self.engine.device, longest)
            return sample.far(self.pieces.reader, tensor, share, self.recipe, longest)

        found: Sample = self.taken.get((tensor.name, self.source, share, longest), take)
        return found

    def scores(self, taken: Sample, tensor: PairedTensor, mean: np.float32) -> np.ndarray:
        """The scores of a sample's elements (float32)."""
        key = self.recipe.method, self.recipe.seed, self.source, tensor.name, taken.p.size
        found: np.ndarray = self.taken.get(key, lambda: taken.scores(tensor, self.recipe, mean))
        return found


def places(part: Slice) -> slice:
    """Where a slice's tensors are in its section."""
    return slice(part.at, part.at + len(part.tensors))


Take = Callable[[slice, AnyChunk], None]
"""Consumer of a chunk that holds the tensors at these places."""


def each_chunk(wanted: Sequence[tuple[SectionState, np.ndarray, Take]]) -> None:
    """One pass over the chunks that hold any tensor that a state wants ((t,) bool)."""
    for part, held in wanted[0][0].slices() if wanted else ():
        here = places(part)
        for state, tensors, take in wanted:
            if not part.raw and tensors[here].any():
                take(here, state.chunk(part, held))


def find_means(state: SectionState, known: np.ndarray | None = None) -> None:
    """mean|p| and Σp² of the tensors that are pruned, but for those that are `known`: (t, 2), NaN where not.

    Raises:
        UserError: weights of base are not finite.
    """
    if known is not None:
        state.mean, state.base_squares = known.T.copy()
    wanted = (state.group_of >= 0) & np.isnan(state.mean)
    if not wanted.any():
        return
    sums, squares = BlockSums(wanted.size), BlockSums(wanted.size)
    passed, added = state.engine.sums(), []

    def take(here: slice, chunk: AnyChunk) -> None:
        passed.add(chunk)
        added.append((here.start, chunk.runs))

    each_chunk([(state, wanted, take)])
    for (at, runs), (one, two) in zip(added, passed.result(), strict=True):
        sums.add(at, runs, one)
        squares.add(at, runs, two)
    state.mean[wanted] = sums.sums()[wanted] / state.common[wanted]
    state.base_squares[wanted] = squares.sums()[wanted]
    if not np.isfinite(state.mean[wanted]).all():
        refuse_nonfinite(state)


@dataclass
class Tally:
    """Scores of some groups of a state, to be counted.

    Attributes:
        counted: histograms of states of one method; `first`: of them, the one of the first of `names`.
    """

    state: SectionState
    names: Sequence[str]
    counted: Histograms
    first: int

    def narrow(self, i: int, k: int) -> Bracket | Threshold:
        """Narrow the bracket of the i-th group by its count, see `threshold.narrow`."""
        return self.counted.narrow(self.first + i, k)

    def arrays(self) -> dict[str, np.ndarray]:
        """Counts as arrays: keys above each bracket; keys inside, of all groups one after the other; where each one's
        begin."""
        mine = slice(self.first, self.first + len(self.names))
        starts = self.counted.starts[self.first : mine.stop + 1]
        bins = self.counted.bins[starts[0] : starts[-1]]
        bins = bins if bins.max(initial=0) >= 2**32 else bins.astype(np.uint32)
        return {"above": self.counted.above[mine], "bins": bins, "starts": starts - starts[0]}


Wanted = tuple[Sequence[Bracket], Sequence[int] | None]
"""The brackets in which the scores of some groups of a state are counted, and how many bins each may have."""


def tallies(
    states: Sequence[SectionState],
    names: Sequence[Sequence[str]],
    wanted: Sequence[Wanted],
    memory: HistogramMemory | None = None,
) -> list[Tally]:
    """Empty histograms for some groups of each state; states of one method and source have theirs together.

    Args:
        memory: where the memory of the histograms comes from, if all have theirs together.
    """
    alike: dict[tuple[str, int, int], list[int]] = {}
    for i, state in enumerate(states):
        alike.setdefault((state.recipe.method, state.source, state.recipe.seed), []).append(i)
    zeros: dict[str, Any] = {"zeros": memory.zeros} if memory and len(alike) == 1 else {}
    found: dict[int, Tally] = {}
    for members in alike.values():
        brackets = [bracket for i in members for bracket in wanted[i][0]]
        limits = [limit for i in members for limit in wanted[i][1] or [MAX_BINS] * len(wanted[i][0])]
        counted, first = histograms(brackets, limits, **zeros), 0
        for i in members:
            found[i] = Tally(states[i], names[i], counted, first)
            first += len(names[i])
    return [found[i] for i in range(len(states))]


def count(tallies: Sequence[Tally]) -> None:
    """Count the scores into their histograms, in one pass for all; those of one method and source are computed once.

    Raises:
        UserError: weights are not finite.
    """
    shared: dict[int, list[Tally]] = {}
    for tally in tallies:
        shared.setdefault(id(tally.counted), []).append(tally)
    together = list(shared.values())
    for thorough in (False, True):
        passes = [_counting(of, thorough) for of in together]
        each_chunk([wanted for wanted, _ in passes])
        incomplete = []
        for of, (_, passed) in zip(together, passes, strict=True):
            found = passed.result()
            if not all(one.finite for one in found):
                refuse_nonfinite(of[0].state)
            if not all(one.complete for one in found):
                incomplete.append(of)
        if not incomplete:
            return
        together = incomplete


def _counting(of: Sequence[Tally], thorough: bool) -> tuple[tuple[SectionState, np.ndarray, Take], Pass[..., Counted]]:
    columns = []
    for tally in of:
        place = {name: tally.first + i for i, name in enumerate(tally.names)}
        by_group = np.array([place.get(name, -1) for name in tally.state.names] + [-1], np.int64)
        columns.append(by_group[tally.state.group_of])  # the last, for −1
    into = np.stack(columns, 1)
    state = of[0].state
    means = state.mean.astype(np.float32)
    passed = state.engine.counting(of[0].counted, thorough)

    def take(here: slice, chunk: AnyChunk) -> None:
        if not thorough or isinstance(chunk, StoredChunk):
            passed.add(chunk, means[here], into[here])

    return (state, np.any(into >= 0, axis=1), take), passed


_ALL = 1 << 62  # elements


def search(
    states: Sequence[SectionState], found: Sequence[dict[str, Threshold]], left: Sequence[dict[str, int]]
) -> None:
    """The thresholds of the section's groups: those over several shards are `found`, the others lie in it.

    Args:
        left: what the sections before have left of the tie quotas of those that are found.
    """
    begun = [_begin_search(*of) for of in zip(states, found, left, strict=True)]
    _select([(state, singles) for state, (singles, _) in zip(states, begun, strict=True) if singles.size])
    searches: list[tuple[SectionState, dict[str, Bracket], dict[str, int]]] = []
    for state, (_, members) in zip(states, begun, strict=True):
        limits = {
            name: min(16 * state.looks, MAX_BINS, 1 << max(8, (state.groups[name].numel // 8).bit_length()))
            for name in members
        }
        brackets = {
            name: _first_bracket(state, tensors, state.groups[name], limits[name]) for name, tensors in members.items()
        }
        searches.append((state, brackets, limits))
    while searches := [search for search in searches if search[1]]:
        counted = tallies(
            [state for state, _, _ in searches],
            [list(brackets) for _, brackets, _ in searches],
            [(list(brackets.values()), [limits[name] for name in brackets]) for _, brackets, limits in searches],
            searches[0][0].memory,
        )
        count(counted)
        for tally, (state, brackets, _) in zip(counted, searches, strict=True):
            for i, name in enumerate(tally.names):
                result = tally.narrow(i, state.groups[name].k)
                if isinstance(result, Threshold):
                    g = state.names.index(name)
                    state.keys[g], state.quotas[g], state.ties[g] = result.key, result.ties, result.ties
                    del brackets[name]
                else:
                    brackets[name] = result


def _begin_search(
    state: SectionState, found: dict[str, Threshold], left: dict[str, int]
) -> tuple[np.ndarray, dict[str, list[PairedTensor]]]:
    """Note what is known; returns the groups of one small tensor (int64), and the members of the others."""
    members: dict[str, list[PairedTensor]] = {}
    singles = []
    for tensor, g in zip(state.tensors, state.group_of.tolist(), strict=True):
        if g < 0:
            continue
        group = state.groups[tensor.group]
        known = found[group.name] if group.cross_shard else known_threshold(state.recipe, group, tensor.parameter)
        if known:
            state.keys[g], state.quotas[g] = known.key, known.ties
            state.ties[g] = _ALL if known == KEEP_ALL else left.get(group.name, known.ties)
        elif group.tensors == 1 and tensor.common <= SMALL and tensor.common == tensor.numel:
            singles.append(g)
        else:
            members.setdefault(group.name, []).append(tensor)
    return np.array(singles, np.int64), members


def _select(wanted: Sequence[tuple[SectionState, np.ndarray]]) -> None:
    """The thresholds of groups of one small tensor, many of them in one chunk."""
    passes = [_selection(state, singles) for state, singles in wanted]
    each_chunk([one for one, _ in passes])
    for _, keep in passes:
        keep()


def _selection(
    state: SectionState, singles: np.ndarray
) -> tuple[tuple[SectionState, np.ndarray, Take], Callable[[], None]]:
    k = np.zeros(len(state.names) + 1, np.int64)
    k[singles] = [state.groups[state.names[g]].k for g in singles]
    per_tensor = k[state.group_of]
    means = state.mean.astype(np.float32)
    passed, added = state.engine.selection(), []

    def take(here: slice, chunk: AnyChunk) -> None:
        passed.add(chunk, means[here], per_tensor[here])
        added.append(here)

    def keep() -> None:
        for here, (keys, ties) in zip(added, passed.result(), strict=True):
            chosen = per_tensor[here] > 0
            where = state.group_of[here][chosen]
            state.keys[where], state.quotas[where], state.ties[where] = keys[chosen], ties[chosen], ties[chosen]

    return (state, per_tensor > 0, take), keep


def _first_bracket(state: SectionState, members: list[PairedTensor], group: Group, max_bins: int) -> Bracket:
    looks = state.looks
    if group.numel < 2 * looks:
        return Bracket()
    means = {t.name: np.float32(m) for t, m in zip(state.tensors, state.mean, strict=True) if t.group == group.name}
    if len(members) > 1:
        return sample.survey(members, group, looks, state.look, state.recipe, means).bracket(group, max_bins)
    (tensor,) = members
    taken = state.look(tensor, looks / group.numel)
    return bracket_from_scores(state.scores(taken, tensor, means[tensor.name]), group.k / group.numel)


def apply(
    states: Sequence[SectionState],
    sinks: Sequence[AnySink],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[np.ndarray]:
    """Write the section's bytes in order, and return what was measured of its tensors: (t,) MEASURED, of each state.

    Uses up the states' `ties`.

    Raises:
        UserError: weights are not finite, or became infinite in the output's dtype.
    """
    applying = [Applying(state) for state in states]
    for part, held in states[0].slices():
        for one, sink in zip(applying, sinks, strict=True):
            if part.raw:
                assert isinstance(held, list)
                pass_through(one.state.own(part), held[0], sink)
            else:
                one.write(part, held, sink)
        progress(part.nbytes)
    return [one.measured() for one in applying]


class Applying:
    """The application of one state's thresholds, slice by slice."""

    def __init__(self, state: SectionState):
        self.state = state
        rows = self._rows = np.zeros(len(state.tensors), MEASURED)
        rows["before"] = rows["after"] = np.nan
        pruned = state.group_of >= 0
        rows["threshold_key"][pruned] = state.keys[state.group_of[pruned]]
        rows["ties"][pruned] = state.quotas[state.group_of[pruned]]
        self._thresholds = float_thresholds(rows["threshold_key"])
        self._means = state.mean.astype(np.float32)
        self._described, self._overflowed = ~pruned, np.zeros(rows.size, np.int64)
        self._passed = state.engine.application(state.ties)
        self._added: list[tuple[slice, int]] = []

    def write(self, part: Slice, held: list[np.ndarray] | StoredChunk, sink: AnySink) -> None:
        """Write the output's bytes of a slice that is pruned."""
        own, chunk = self.state.own(part), self.state.chunk(part, held)
        width = itemsize(own.tensors[0].dtype)
        out = sink.reserve(chunk.numel * width, width).view(f"u{width}")
        self._add(own, chunk, out)
        if chunk.rounded and isinstance(chunk, Chunk):
            self._overflowed[places(part)] += _overflows(own, chunk, out)
        if chunk.runs == 1 and isinstance(held, list):
            sink.filled_from(own.tensors[0].name, part.start, held[0])

    def values(self, part: Slice, pair: list[np.ndarray], p: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Values (n,) of the elements of a slice: base's, or what is kept of the source, in the type of the arithmetic.

        Args:
            pair: the bytes of base and of the source, and `p`: base's values.
            out: (n,) of p's dtype, for the values if that is theirs.
        """
        own = self.state.own(part)
        chunk = value_chunk(own, pair, self.state.recipe, p)
        made = out.view(chunk.kept.dtype) if out.itemsize == chunk.kept.itemsize else np.empty_like(chunk.kept)
        self._add(own, chunk, made)
        return made.view(f"f{made.itemsize}")

    def _add(self, part: Slice, chunk: AnyChunk, out: np.ndarray) -> None:
        state, here = self.state, places(part)
        thresholds = self._thresholds[here]
        self._passed.add(chunk, self._means[here], thresholds, state.group_of[here], out)
        self._added.append((here, chunk.runs))
        if chunk.runs > 1:
            _describe_many(state, here, chunk, thresholds, self._rows)
            self._described[here] = True

    def measured(self) -> np.ndarray:
        """Rows (t,) MEASURED of the section's tensors."""
        state, rows, overflowed = self.state, self._rows, self._overflowed
        squares, kept_squares = BlockSums(rows.size), BlockSums(rows.size)
        for (here, runs), done in zip(self._added, self._passed.result(), strict=True):
            overflowed[here] += done.overflowed
            rows["kept"][here] += done.kept
            rows["changed"][here] += done.changed
            rows["kept_changed"][here] += done.kept_changed
            squares.add(here.start, runs, done.squares)
            kept_squares.add(here.start, runs, done.kept_squares)
        one, two = squares.sums(), kept_squares.sums()
        if not np.isfinite(one).all():
            refuse_nonfinite(state)
        for i in np.flatnonzero(overflowed).tolist():
            refuse_overflow(int(overflowed[i]), state.tensors[i].dtype, state.tensors[i].name)
        for i in np.flatnonzero(~self._described).tolist():
            _describe(state, i, self._thresholds[i], rows)
        with np.errstate(all="ignore"):
            rows["norm_delta"], rows["kept_share"] = finite(np.sqrt(one)), finite(two / one)
            rows["norm_base"], rows["mean_abs_base"] = finite(np.sqrt(state.base_squares)), finite(state.mean)
        return rows


def _describe_many(state: SectionState, here: slice, chunk: Chunk, thresholds: np.ndarray, rows: np.ndarray) -> None:
    """The quantiles of small tensors that are in memory anyway: of all their elements."""
    p, f = upcast(chunk.p), upcast(chunk.f)
    runs = np.diff(chunk.starts)
    method = METHODS[state.recipe.method]
    scores = np.zeros(p.size, np.float32)
    if method.has_budget:
        positions = np.arange(p.size) - np.repeat(chunk.starts[:-1], runs)
        means = np.repeat(state.mean[here].astype(np.float32), runs)
        scores = evaluate(method, p, f, means, np.repeat(chunk.streams, runs), positions)
    rows["before"][here], rows["after"][here] = change_quantiles(p, f, scores, thresholds, chunk.starts)


def _describe(state: SectionState, i: int, threshold: np.float32, rows: np.ndarray) -> None:
    """The quantiles of one tensor, from a sample."""
    tensor = state.tensors[i]
    taken = state.sample(tensor, sample.REPORTED / tensor.common)
    scores = np.zeros(taken.p.size, np.float32)
    if METHODS[state.recipe.method].has_budget:
        scores = state.scores(taken, tensor, np.float32(state.mean[i]))
    before, after = change_quantiles(taken.p, taken.f, scores, np.array([threshold]), np.array([0, taken.p.size]))
    rows["before"][i], rows["after"][i] = before[0], after[0]


def pass_through(part: Slice, stored: np.ndarray, sink: AnySink) -> None:
    """Write bytes of a tensor that is taken as it is, in the output's dtype."""
    (tensor,) = part.tensors
    source, target = tensor.sources[-1][1].dtype, tensor.dtype
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


def refuse_nonfinite(state: SectionState) -> None:
    """Count what is not finite, and raise if there is any: d may have overflowed between finite weights.

    Raises:
        UserError: with the names of the tensors.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for part, views in state.pieces.bytes():
        if part.raw:
            continue
        for (number, side), stored in zip(part.sources, views, strict=True):
            if number and state.recipe.nonfinite == "base":
                continue
            role = "finetuned" if number else "base"
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
