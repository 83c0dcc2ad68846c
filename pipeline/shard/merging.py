"""Merging: what a worker does with a section of several fine-tuned checkpoints over one base.

Each source is a lane: its thresholds are found as for a prune of it alone, and by its mask it gives v_i, its values in
the type of the arithmetic. They are combined a chunk at a time (`scoring.combining`), in one reading of base for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fapm.errors import UserError
from fapm.formats.dtypes import convert, itemsize, refuse_overflow, round_to, upcast, values
from fapm.scoring.combining import COMBINATIONS, Angular
from fapm.scoring.methods import BLOCK
from fapm.shard import passes
from fapm.shard.budget import COUNTS_BYTES
from fapm.shard.chunk import count_nonfinite, starts_of
from fapm.shard.lane import Lane, find_means
from fapm.shard.output import Output
from fapm.shard.passes import Applying, BlockSums, SectionState, places
from fapm.shard.section import Slice
from fapm.shard.table import MEASURED, finite


class Merging:
    """Finds the thresholds of every source, and combines what is kept of them."""

    def memory(self, lanes: Sequence[Lane]) -> int:
        sources = max(len(lane.parts) for lane in lanes)
        return (8 + 3 * sources) * _STEP * 8 + (sources - 1) * len(lanes) * COUNTS_BYTES

    def begin(self, lanes: Sequence[Lane]) -> None:
        pass

    def write(
        self,
        lanes: Sequence[Lane],
        states: Sequence[SectionState],
        outputs: Sequence[Output],
        tell: Callable[[int], None],
    ) -> None:
        parts = [part for lane in lanes for part in lane.parts]
        find_means(parts, states)
        passes.search(states, [part.task.thresholds for part in parts], [part.ties for part in parts])
        of_lane = iter(states)
        for lane, output in zip(lanes, outputs, strict=True):
            merge = _Merge(lane, [next(of_lane) for _ in lane.parts], output)
            merge.write(tell if output is outputs[0] else lambda nbytes: None)


class _Merge:
    """One merge of a section of t tensors, each source with a state of its own."""

    def __init__(self, lane: Lane, states: Sequence[SectionState], output: Output):
        self._lane, self._states, self._sink = lane, states, output.sink
        self._how, self._scaling = lane.recipe.combine, lane.recipe.scaling
        self._weights = [source.weight for source in lane.recipe.merged]
        self._tensors = tuple(lane.tensors[t.name] for t in states[0].tensors)
        self._rows = np.zeros(len(self._tensors), MEASURED)
        self._overflowed = np.zeros(len(self._tensors), np.int64)
        self._squares = BlockSums(len(self._tensors))
        self._scratch = np.empty(0, np.float32)

    def write(self, tell: Callable[[int], None]) -> None:
        combination = COMBINATIONS[self._how]
        factors: list[tuple[float, ...]] = [()] * len(self._tensors)
        if isinstance(combination, Angular):
            factors = self._factors(combination)
        applying = [Applying(state) for state in self._states]
        for part, held in _slices(self._states[0]):
            own = part.of(self._tensors)
            if part.raw:
                passes.pass_through(own, held[0], self._sink)
            else:
                self._combine(own, held, applying, factors[places(part)])
            tell(part.nbytes)
        here = [self._lane.place[t.name] for t in self._tensors]
        for lane, done in zip(self._lane.parts, applying, strict=True):
            lane.rows[here] = done.measured()
            lane.keep_ties(done.state)
        self._lane.rows[here] = self._measured()

    def _combine(
        self,
        part: Slice,
        held: list[np.ndarray],
        applying: Sequence[Applying],
        factors: Sequence[tuple[float, ...]],
    ) -> None:
        """Write a slice, and count what is done in it."""
        from fapm.scoring.combined import combine, conflicts  # numba is loaded by who computes, not by who plans

        here, tensor, starts = places(part), part.tensors[0], starts_of(part)
        assert tensor.base
        p, of_sources = self._values(part, held, applying)
        if self._how == "error":
            self._refuse_conflicts(part, starts, conflicts(p, of_sources))
        weights = [self._weights[number - 1] for number in part.numbers if number]
        done = combine(self._how, p, of_sources, starts, weights, self._scaling, factors)
        bits, width = round_to(done.values, tensor.dtype), itemsize(tensor.dtype)
        self._sink.reserve(bits.size * width, width).view(bits.dtype)[:] = bits
        if len(part.tensors) == 1:
            self._sink.filled_from(tensor.name, part.start, held[0])
        written = bits != convert(held[0], tensor.base.dtype, tensor.dtype)
        rows = self._rows[here]
        rows["kept"] += done.changed
        rows["shared"] += done.shared
        rows["opposed"] += done.opposed
        rows["kept_changed"] += np.add.reduceat(written, starts[:-1], dtype=np.int64)
        self._squares.add(here.start, starts.size - 1, done.squares)
        stored, ends = bits.view(np.uint8), (starts * width).tolist()
        self._overflowed[here] += [
            sum(count_nonfinite(stored[begin:end], tensor.dtype)) for begin, end in itertools.pairwise(ends)
        ]

    def _values(
        self, part: Slice, held: list[np.ndarray], applying: Sequence[Applying]
    ) -> tuple[np.ndarray, np.ndarray]:
        """p (n,), and v of every source that has the tensors of a slice, (N, n), in one real type; until the next
        slice."""
        numbers = part.numbers
        assert part.tensors[0].base
        p = upcast(values(held[0], part.tensors[0].base.dtype))
        there = [one for one in applying if one.state.source in numbers]
        if self._scratch.dtype != p.dtype or self._scratch.size < len(there) * p.size:
            self._scratch = np.empty(len(there) * max(p.size, _STEP), p.dtype)  # fresh pages cost more than the work
        rows = self._scratch[: len(there) * p.size].reshape(len(there), p.size)
        found = [
            one.values(part, [held[0], held[numbers.index(one.state.source)]], p, row)
            for one, row in zip(there, rows, strict=True)
        ]
        real = np.result_type(p, *found)
        if real == rows.dtype:
            return p, rows
        return p.astype(real), np.stack([value.astype(real) for value in found])

    def _refuse_conflicts(self, part: Slice, starts: np.ndarray, wrong: np.ndarray) -> None:
        """Refuse elements of which two sources make different values.

        Raises:
            UserError: with the tensor's name.
        """
        if wrong.any():
            at = int(np.searchsorted(starts, np.argmax(wrong), side="right")) - 1
            raise UserError(
                f"--combine error: {part.tensors[at].name!r} has elements, {int(wrong.sum()):,} of those looked at, of "
                "which two sources make different values; take first, last, or another way to combine them"
            )

    def _factors(self, combination: Angular) -> list[tuple[float, ...]]:
        """Factors of every tensor, from a pass over them."""
        sums: dict[tuple[int, int], BlockSums] = {}
        ties = [state.ties.copy() for state in self._states]
        applying = [Applying(state) for state in self._states]
        for part, held in _slices(self._states[0]):
            if part.raw:
                continue
            starts = starts_of(part)
            p, found = self._values(part, held, applying)
            wide = [vector.astype(np.float64) for vector in combination.vectors(p, list(found))]
            for i, j in itertools.combinations_with_replacement(range(len(wide)), 2):
                of_pair = sums.setdefault((i, j), BlockSums(len(self._tensors)))
                of_pair.add(part.at, starts.size - 1, _block_sums(wide[i] * wide[j], starts))
        for state, before in zip(self._states, ties, strict=True):
            state.ties[:] = before  # they are handed out once more
        size = 1 + max((j for _, j in sums), default=-1)
        products = np.zeros((len(self._tensors), size, size))
        for (i, j), of_pair in sums.items():
            products[:, i, j] = products[:, j, i] = of_pair.sums()
        return [
            combination.factors(of_tensor, self._weights) if tensor.operation else ()
            for tensor, of_tensor in zip(self._tensors, products, strict=True)
        ]

    def _measured(self) -> np.ndarray:
        """Rows (t,) MEASURED of the output's tensors; of their elements `kept` are those that some source changes."""
        rows = self._rows
        for i in np.flatnonzero(self._overflowed).tolist():
            refuse_overflow(int(self._overflowed[i]), self._tensors[i].dtype, self._tensors[i].name)
        rows["before"] = rows["after"] = rows["kept_share"] = np.nan
        rows["changed"] = rows["kept"]
        rows["mean_abs_base"] = finite(np.fmax.reduce([state.mean for state in self._states]))
        squares = np.fmax.reduce([state.base_squares for state in self._states])
        with np.errstate(all="ignore"):
            rows["norm_delta"], rows["norm_base"] = finite(np.sqrt(self._squares.sums())), finite(np.sqrt(squares))
        return rows


_STEP = 1 << 18
"""Elements that are combined at once, as many as small tensors have together."""


def _slices(state: SectionState) -> Iterator[tuple[Slice, list[np.ndarray]]]:
    """Slices of a section, cut up so that what is computed of them is small."""
    for part, held in state.slices():
        assert isinstance(held, list)
        if part.raw or len(part.tensors) > 1:
            yield part, held
            continue
        widths = [itemsize(info.dtype) for _, (info,) in part.sources]
        for start in range(part.start, part.stop, _STEP):
            stop = min(start + _STEP, part.stop)
            begin, end = start - part.start, stop - part.start
            cut = [stored[begin * width : end * width] for stored, width in zip(held, widths, strict=True)]
            yield replace(part, start=start, stop=stop), cut


def _block_sums(terms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of blocks: those of a single run, or one for each of several (float64)."""
    spans = list(itertools.pairwise(starts.tolist()))
    if starts.size == 2:
        spans = [(i, i + BLOCK) for i in range(0, terms.size, BLOCK)]
    return np.array([terms[begin:end].sum() for begin, end in spans])
