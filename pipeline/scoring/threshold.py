"""The exact k-th highest score by counting: no sort, and nothing but counts that add up in any order.

A float32 score maps to an unsigned 32-bit key of the same order. The search keeps a bracket of keys that is
believed to hold rank k, and knows how many keys lie above it. Counting the keys inside the bracket, bin by
bin, either closes it around one key (a threshold), narrows it to one bin, or proves that the belief was wrong and
turns to the other side. A sample only ever suggests the first bracket; the result never depends on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def score_of(key: int) -> np.float32:
    """The float32 score of a key; NaN for keys that belong to no number."""
    code = key ^ ZERO_KEY if key & ZERO_KEY else key ^ MAX_KEY
    return np.uint32(code).view(np.float32)


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
    if above >= k:
        return Bracket(bracket.hi + 1)
    inside = int(histogram.sum())
    if above + inside < k:
        return Bracket(hi=bracket.lo - 1)
    bin_, before = _bin_of_rank(histogram, inside - (k - above) + 1)
    higher = above + inside - before - int(histogram[bin_])
    if shift == 0:
        return Threshold(bracket.lo + bin_, k - higher)
    lo = bracket.lo + (bin_ << shift)
    return Bracket(lo, min(lo + (1 << shift) - 1, bracket.hi))


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


_SIGMAS = 3.0  # a miss costs one more count, a wider bracket more bins than one count can close


def _ranks(size: int, share: float) -> tuple[int, int]:
    """Ranks from the top, in a sample of `size`, between which the share-quantile of the whole lies, nearly surely."""
    slack = _SIGMAS * math.sqrt(size * share * (1 - share)) + 2
    return math.floor(size * share - slack), math.ceil(size * share + slack)


def bracket_from_scores(scores: np.ndarray, share: float) -> Bracket:
    """A bracket for the `share` highest, suggested by the scores of a sample (float32)."""
    first, last = _ranks(scores.size, share)
    lo, hi = LOWEST_KEY, HIGHEST_KEY
    if last < scores.size:
        place = scores.size - last
        scores = np.partition(scores, place)[place:]  # the higher ones hold the other end too
        lo = int(key_of(scores[:1])[0])
    if first > 0:
        place = scores.size - first
        hi = int(key_of(np.partition(scores, place)[place : place + 1])[0])
    return Bracket(lo, hi)


def bracket_from_coarse(histogram: np.ndarray, share: float) -> Bracket:
    """The same from a sample's coarse histogram, a bin wider on both sides for what the sample's m is off by."""
    size = int(histogram.sum())
    first, last = _ranks(size, share)
    lo = 0 if size - last < 1 else _bin_of_rank(histogram, size - last)[0] - 1
    hi = COARSE_BINS - 1 if first < 1 else _bin_of_rank(histogram, size - first + 1)[0] + 1
    return Bracket(max(lo << COARSE_SHIFT, LOWEST_KEY), min((hi + 1 << COARSE_SHIFT) - 1, HIGHEST_KEY))


def coarse_histogram(scores: np.ndarray) -> np.ndarray:
    """Counts (int64, COARSE_BINS) of float32 scores by the upper half of their keys."""
    return np.bincount(key_of(scores) >> COARSE_SHIFT, minlength=COARSE_BINS)
