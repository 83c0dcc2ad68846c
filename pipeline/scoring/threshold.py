"""The exact k-th highest score by counting: no sort, and nothing but counts that add up in any order.

A float32 score maps to an unsigned 32-bit key of the same order. The search keeps a bracket of keys that is
believed to hold rank k, and knows how many keys lie above it. Counting the keys inside the bracket, bin by
bin, either closes it around one key (a threshold), narrows it to one bin, or proves that the belief was wrong and
turns to the other side. A sample only ever suggests the first bracket; the result never depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_KEY = 2**32 - 1
ZERO_KEY = 1 << 31  # the key of the score 0
LOWEST_KEY = 0x007FFFFF  # of −inf
HIGHEST_KEY = 0xFF800000  # of +inf; what is beyond belongs to NaN, which no score is

MAX_BINS = 1 << 20
"""Bins of a histogram: 8 MB. Enough to close most brackets that a sample suggests in one count."""

COARSE_SHIFT = 16
COARSE_BINS = 1 << 16
"""A sample is counted by the upper half of the key: bins of 2^-7 relative width."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """Keys from `lo` to `hi`, both included; by default those of all scores.

    `fine` are cells of 2^COARSE_SHIFT keys in it, ascending, whose keys are counted one by one, where all others are
    counted cell by cell; the bracket then begins and ends with a cell.
    """

    lo: int = LOWEST_KEY
    hi: int = HIGHEST_KEY
    fine: tuple[int, ...] = ()

    @property
    def narrow(self) -> bool:
        """Whether it is less than all."""
        return self.lo > LOWEST_KEY and self.hi < HIGHEST_KEY

    def shift(self, max_bins: int = MAX_BINS) -> int:
        """The smallest s for which bins of 2^s keys are at most `max_bins`."""
        return max(0, (self.hi - self.lo).bit_length() - (max_bins.bit_length() - 1))


@dataclass(frozen=True, slots=True)
class Bins:
    """How the keys of a bracket are counted, lowest first: in bins of 2^shift keys or, where `offsets` says so, of one.

    `offsets`: (cells + 1,) int64, the first bin of each cell of 2^shift keys; None where each has one.
    """

    bracket: Bracket
    shift: int
    offsets: np.ndarray | None

    @property
    def size(self) -> int:
        if self.offsets is not None:
            return int(self.offsets[-1])
        return ((self.bracket.hi - self.bracket.lo) >> self.shift) + 1

    def place(self, key: int) -> int:
        """The bin of a key inside the bracket."""
        cell, inside = divmod(key - self.bracket.lo, 1 << self.shift)
        if self.offsets is None:
            return cell
        refined = self.offsets[cell + 1] - self.offsets[cell] > 1
        return int(self.offsets[cell]) + (inside if refined else 0)

    def keys(self, bin_: int) -> tuple[int, int]:
        """The lowest and the highest key of a bin."""
        cell, inside, refined = bin_, 0, self.shift == 0
        if self.offsets is not None:
            cell = int(np.searchsorted(self.offsets, bin_, "right")) - 1
            inside = bin_ - int(self.offsets[cell])
            refined = bool(self.offsets[cell + 1] - self.offsets[cell] > 1)
        lo = self.bracket.lo + (cell << self.shift) + inside
        return lo, lo if refined else min(lo + (1 << self.shift) - 1, self.bracket.hi)


def bins_of(bracket: Bracket, max_bins: int = MAX_BINS) -> Bins:
    """As many bins as are allowed, or, for a bracket with fine cells, as those need."""
    if not bracket.fine:
        return Bins(bracket, bracket.shift(max_bins), None)
    first = bracket.lo >> COARSE_SHIFT
    sizes = np.ones((bracket.hi >> COARSE_SHIFT) - first + 1, np.int64)
    sizes[np.array(bracket.fine) - first] = 1 << COARSE_SHIFT
    return Bins(bracket, COARSE_SHIFT, np.cumsum([0, *sizes]))


@dataclass(frozen=True, slots=True)
class Threshold:
    """Kept are the elements whose key is above `key`, and the first `ties`, by position, whose key equals it."""

    key: int
    ties: int


KEEP_NONE = Threshold(MAX_KEY, 0)  # no key is this high
KEEP_ALL = Threshold(0, 0)  # nor this low


def at_the_ends(numel: int, k: int) -> Threshold | None:
    """The threshold where no score needs to be looked at."""
    return KEEP_NONE if k == 0 else KEEP_ALL if k == numel else None


def key_of(scores: np.ndarray) -> np.ndarray:
    """Keys (uint32) of float32 scores: all bits flipped for negatives, the sign bit for others.

    A negative zero would be lower than zero; no score is one.
    """
    code = np.ascontiguousarray(scores, np.float32).view(np.uint32)
    return np.where(code >> 31, ~code, code | np.uint32(ZERO_KEY))


def score_of(key: Any) -> Any:
    """The float32 score of a key, or of an array of keys (int64); NaN for keys that belong to no number."""
    code = np.asarray(key, np.int64)
    return np.where(code & ZERO_KEY, code ^ ZERO_KEY, code ^ MAX_KEY).astype(np.uint32).view(np.float32)[()]


@dataclass(frozen=True, slots=True)
class Histograms:
    """The keys of some groups, counted: inside each group's bracket by bins, above it as one number.

    Attributes:
        layouts: how each group's keys are counted.
        bins: int64, of all groups one after the other; those of group i begin at `starts[i]`.
        above: (g,) int64, keys above each bracket.
        lo, hi: (g,) float32, the lowest and the highest score inside.
        base, shift: (g,) uint32, the lowest key inside, and the layout's shift; for compiled loops.
        tables: (g,) int64, where a group's cells begin in `cells` and `masks`; −1 where each cell has one bin.
        cells: the first bin of each cell, and `masks`: the bits of a key that count inside it, uint32.
    """

    layouts: tuple[Bins, ...]
    bins: np.ndarray
    starts: np.ndarray
    above: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    base: np.ndarray
    shift: np.ndarray
    tables: np.ndarray
    cells: np.ndarray
    masks: np.ndarray

    def of(self, i: int) -> np.ndarray:
        """The bins of one group, lowest keys first."""
        return self.bins[self.starts[i] : self.starts[i + 1]]

    def narrow(self, i: int, k: int) -> Bracket | Threshold:
        """Narrow one group's bracket by its count, see `narrow`."""
        return narrow(self.layouts[i], int(self.above[i]), self.of(i), k)


def histograms(
    brackets: Sequence[Bracket],
    max_bins: Sequence[int] | None = None,
    zeros: Callable[[int], np.ndarray] = lambda size: np.zeros(size, np.int64),
) -> Histograms:
    """Empty histograms of these brackets.

    Args:
        max_bins: bins of each at most, MAX_BINS by default.
        zeros: where their memory comes from.
    """
    limits = max_bins or [MAX_BINS] * len(brackets)
    layouts = tuple(bins_of(bracket, limit) for bracket, limit in zip(brackets, limits, strict=True))
    starts = np.cumsum([0, *(layout.size for layout in layouts)])
    ranges = [float_range(bracket) for bracket in brackets]
    offsets = [np.zeros(0, np.int64) if layout.offsets is None else layout.offsets for layout in layouts]
    ends = np.cumsum([0, *(max(0, offset.size - 1) for offset in offsets)])
    refined = [np.diff(offset) > 1 for offset in offsets]
    return Histograms(
        layouts,
        zeros(int(starts[-1])),
        starts,
        np.zeros(len(layouts), np.int64),
        np.array([lo for lo, _ in ranges], np.float32),
        np.array([hi for _, hi in ranges], np.float32),
        np.array([bracket.lo for bracket in brackets], np.uint32),
        np.array([layout.shift for layout in layouts], np.uint32),
        np.where([layout.offsets is None for layout in layouts], -1, ends[:-1]).astype(np.int64),
        np.concatenate([offset[:-1] for offset in offsets] or [np.zeros(0, np.int64)]),
        np.concatenate([cells * np.uint32((1 << COARSE_SHIFT) - 1) for cells in refined]).astype(np.uint32),
    )


def float_range(bracket: Bracket) -> tuple[np.float32, np.float32]:
    """The lowest and the highest score inside a bracket. −0, which no score is, must not pass for 0."""
    hi = bracket.hi - (bracket.hi == ZERO_KEY - 1)
    return score_of(max(bracket.lo, LOWEST_KEY)), score_of(min(hi, HIGHEST_KEY))


def float_thresholds(keys: np.ndarray) -> np.ndarray:
    """Thresholds (keys, int64) as float32 scores: infinite where all or none are kept."""
    ends = np.where(keys == KEEP_NONE.key, np.inf, -np.inf).astype(np.float32)
    return np.where((keys == KEEP_NONE.key) | (keys == KEEP_ALL.key), ends, score_of(keys))


def narrow(layout: Bins, above: int, histogram: np.ndarray, k: int) -> Bracket | Threshold:
    """Narrow a bracket by a full count.

    Args:
        layout: which keys were counted, and in what bins.
        above: elements with a key above the bracket.
        histogram: elements in each bin, lowest first; integers.
        k: the rank sought, 1 to the number of all elements.

    Returns:
        The threshold if it is known, else a bracket to count next; its own `above` has to be counted again.
    """
    bracket, inside = layout.bracket, int(histogram.sum())
    if above >= k:
        return _beside(bracket, above - k + 1, histogram[histogram.size // 2 :], upwards=True)
    if above + inside < k:
        return _beside(bracket, k - above - inside, histogram[: (histogram.size + 1) // 2], upwards=False)
    bin_, before = _bin_of_rank(histogram, inside - (k - above) + 1)
    lo, hi = layout.keys(bin_)
    if lo == hi:
        return Threshold(lo, k - (above + inside - before - int(histogram[bin_])))
    return Bracket(lo, hi)


_FARTHER = 4  # times as far as the edge's density says that the rank lies


def _beside(bracket: Bracket, missing: int, edge: np.ndarray, upwards: bool) -> Bracket:
    """Where a rank lies that a bracket has missed by `missing` elements.

    If the keys are about as dense beside the bracket as in its nearer half (`edge`), a step that one count can close
    holds it. Where that is not nearly sure, all that is left on that side.
    """
    keys = (bracket.hi - bracket.lo + 1) / 2
    sure = missing * keys * _FARTHER <= int(edge.sum()) * MAX_BINS
    if upwards:
        return Bracket(bracket.hi + 1, min(bracket.hi + MAX_BINS, HIGHEST_KEY) if sure else HIGHEST_KEY)
    return Bracket(max(bracket.lo - MAX_BINS, LOWEST_KEY) if sure else LOWEST_KEY, bracket.lo - 1)


def _bin_of_rank(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th lowest (from 1), and how many lie in the bins before it."""
    width = 1024
    if histogram.size > 4 * width:  # first by rows: a running sum over all bins costs more than the count
        whole = histogram.size // width * width
        rows = np.append(histogram[:whole].reshape(-1, width).sum(1), histogram[whole:].sum())
        row, before = _bin_of_rank(rows, rank)
        bin_, inside = _bin_of_rank(histogram[row * width : (row + 1) * width], rank - before)
        return row * width + bin_, before + inside
    sums = np.cumsum(histogram)
    bin_ = int(np.searchsorted(sums, rank))
    return bin_, int(sums[bin_] - histogram[bin_])


def bracket_from_scores(scores: np.ndarray, share: float) -> Bracket:
    """A bracket for the `share` highest, suggested by the scores of an even sample (float32)."""
    size = scores.size
    slack = 3 * math.sqrt(size * share * (1 - share)) + 2
    first, last = math.floor(size * share - slack), math.ceil(size * share + slack)  # ranks from the top
    lo, hi = LOWEST_KEY, HIGHEST_KEY
    if last < size:
        place = size - last
        scores = np.partition(scores, place)[place:]  # the higher ones hold the other end too
        lo = int(key_of(scores[:1])[0])
    if first > 0:
        place = scores.size - first
        hi = int(key_of(np.partition(scores, place)[place : place + 1])[0])
    return Bracket(lo, hi)


def bracket_from_coarse(weights: np.ndarray, share: float, sigma: float, max_bins: int = MAX_BINS) -> Bracket:
    """A bracket for the `share` highest, suggested by a weighted sample.

    It is so wide that it holds the threshold all but certainly, and its likeliest cells are fine: so one count nearly
    always closes it, also where scores are few with wide gaps between them, and two do if not.

    Args:
        max_bins: about how many bins it may have.
        weights: (COARSE_BINS,) float64, what the sampled elements of each cell stand for.
        sigma: standard error of the sample's estimate of a share near `share`.
    """
    cumulated = np.cumsum(weights)
    total = cumulated[-1]
    # How many elements are lower; the rank is the next one. A half: no sampled element stands for less than one.
    center, reach = total * (1 - share) + 0.5, total * sigma
    lo, hi = (_cell(cumulated, center + side * (_SURELY * reach + _MARGIN * total)) for side in (-1, 1))
    first, last = (_cell(cumulated, center + side * _LIKELY * reach) for side in (-1, 1))
    likely = np.flatnonzero(weights[first : last + 1]) + first
    most = max(1, (max_bins >> COARSE_SHIFT) - 1)
    if likely.size > most:  # those whose elements are nearest to the rank
        off = np.maximum(cumulated[likely] - weights[likely] - center, center - cumulated[likely])
        likely = np.sort(likely[np.argsort(off, kind="stable")[:most]])
    return Bracket(lo << COARSE_SHIFT, (hi + 1 << COARSE_SHIFT) - 1, tuple(likely.tolist()))


_LIKELY, _SURELY = 5.0, 10.0  # standard errors; fine cells are few, others cost nothing but their elements
_MARGIN = 0.002  # of all elements


def _cell(cumulated: np.ndarray, lower: float) -> int:
    """The cell with `lower` elements below."""
    total = cumulated[-1]
    if lower <= 0.5:
        return LOWEST_KEY >> COARSE_SHIFT
    if lower >= total:
        return HIGHEST_KEY >> COARSE_SHIFT
    return int(np.searchsorted(cumulated, lower))


def coarse_histogram(scores: np.ndarray) -> np.ndarray:
    """Counts (int64, COARSE_BINS) of float32 scores by the upper half of their keys."""
    return np.bincount(key_of(scores) >> COARSE_SHIFT, minlength=COARSE_BINS)
