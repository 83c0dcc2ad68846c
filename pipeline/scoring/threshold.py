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
    """Keys from `lo` to `hi`, both included; by default those of all scores."""

    lo: int = LOWEST_KEY
    hi: int = HIGHEST_KEY

    def shift(self, max_bins: int = MAX_BINS) -> int:
        """The smallest s for which bins of 2^s keys are at most `max_bins`."""
        return max(0, (self.hi - self.lo).bit_length() - (max_bins.bit_length() - 1))

    def bins(self, shift: int) -> int:
        return ((self.hi - self.lo) >> shift) + 1


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
        brackets: one a group, and `shifts`: its bins hold 2^shift keys.
        bins: int64, of all groups one after the other; those of group i begin at `offsets[i]`.
        above: (g,) int64, keys above each bracket.
        lo, hi: (g,) float32, the lowest and the highest score inside.
        base, shift: (g,) uint32, the lowest key inside, and `shifts`; for compiled loops.
    """

    brackets: tuple[Bracket, ...]
    shifts: tuple[int, ...]
    bins: np.ndarray
    offsets: np.ndarray
    above: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    base: np.ndarray
    shift: np.ndarray

    def of(self, i: int) -> np.ndarray:
        """The bins of one group, lowest keys first."""
        return self.bins[self.offsets[i] : self.offsets[i + 1]]

    def narrow(self, i: int, k: int) -> Bracket | Threshold:
        """What the count says of one group, see `narrow`."""
        return narrow(self.brackets[i], self.shifts[i], int(self.above[i]), self.of(i), k)


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
    shifts = tuple(bracket.shift(limit) for bracket, limit in zip(brackets, limits, strict=True))
    sizes = [bracket.bins(shift) for bracket, shift in zip(brackets, shifts, strict=True)]
    ranges = [float_range(bracket) for bracket in brackets]
    return Histograms(
        tuple(brackets),
        shifts,
        zeros(sum(sizes)),
        np.cumsum([0, *sizes]),
        np.zeros(len(sizes), np.int64),
        np.array([lo for lo, _ in ranges], np.float32),
        np.array([hi for _, hi in ranges], np.float32),
        np.array([bracket.lo for bracket in brackets], np.uint32),
        np.array(shifts, np.uint32),
    )


def float_range(bracket: Bracket) -> tuple[np.float32, np.float32]:
    """The lowest and the highest score inside a bracket. −0, which no score is, must not pass for 0."""
    hi = bracket.hi - (bracket.hi == ZERO_KEY - 1)
    return score_of(max(bracket.lo, LOWEST_KEY)), score_of(min(hi, HIGHEST_KEY))


def float_thresholds(keys: np.ndarray) -> np.ndarray:
    """Thresholds (keys, int64) as float32 scores: infinite where all or none are kept."""
    ends = np.where(keys == KEEP_NONE.key, np.inf, -np.inf).astype(np.float32)
    return np.where((keys == KEEP_NONE.key) | (keys == KEEP_ALL.key), ends, score_of(keys))


def narrow(bracket: Bracket, shift: int, above: int, histogram: np.ndarray, k: int) -> Bracket | Threshold:
    """What a full count says.

    Args:
        bracket: the keys that were counted, in bins of 2^shift.
        above: elements with a key above the bracket.
        histogram: elements in each bin, lowest first; integers.
        k: the rank sought, 1 to the number of all elements.

    Returns:
        The threshold if it is known, else a bracket to count next; its own `above` has to be counted again.
    """
    inside = int(histogram.sum())
    if above >= k:
        return _beside(bracket, above - k + 1, histogram[histogram.size // 2 :], upwards=True)
    if above + inside < k:
        return _beside(bracket, k - above - inside, histogram[: (histogram.size + 1) // 2], upwards=False)
    bin_, before = _bin_of_rank(histogram, inside - (k - above) + 1)
    higher = above + inside - before - int(histogram[bin_])
    if shift == 0:
        return Threshold(bracket.lo + bin_, k - higher)
    lo = bracket.lo + (bin_ << shift)
    return Bracket(lo, min(lo + (1 << shift) - 1, bracket.hi))


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


_SIGMAS = (4.0, 3.5, 3.0, 2.5)  # a miss costs one more count, a wider bracket more bins than one count can close


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


def bracket_from_coarse(weights: np.ndarray, share: float, sigma: float) -> Bracket:
    """A bracket for the `share` highest, suggested by a weighted sample.

    Args:
        weights: (COARSE_BINS,) float64, what the sampled elements of each bin stand for.
        sigma: standard error of the sample's estimate of a share near `share`.
    """
    cumulated = np.cumsum(weights)
    total = cumulated[-1]

    def within(sigmas: float) -> Bracket:
        # How many elements are lower; the rank is the next one. A half: no sampled element stands for less than one.
        lower = (total * (1 - share + side * sigmas * sigma) + 0.5 for side in (-1, 1))
        lo, hi = (int(np.searchsorted(cumulated, min(max(x, 0), total))) for x in lower)
        return Bracket(max(lo << COARSE_SHIFT, LOWEST_KEY), min((hi + 1 << COARSE_SHIFT) - 1, HIGHEST_KEY))

    brackets = [within(sigmas) for sigmas in _SIGMAS]
    # The surest that one count can close; if there is none, the surest: it takes two.
    return next((bracket for bracket in brackets if bracket.shift() == 0), brackets[0])


def coarse_histogram(scores: np.ndarray) -> np.ndarray:
    """Counts (int64, COARSE_BINS) of float32 scores by the upper half of their keys."""
    return np.bincount(key_of(scores) >> COARSE_SHIFT, minlength=COARSE_BINS)
