"""What is asked of an engine: everything that is done to a chunk's elements.

Two answer it: `compiled`, loops for a CPU, and `torch_engine`, for any other device. Both return the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.scoring.methods import BLOCK
from pipeline.scoring.threshold import (
    HIGHEST_KEY,
    KEEP_ALL,
    KEEP_NONE,
    LOWEST_KEY,
    ZERO_KEY,
    Bracket,
    Threshold,
    score_of,
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of elements of one tensor, in host memory.

    Attributes:
        start: flat index of the first, a multiple of BLOCK.
        stream: where the tensor's random numbers come from.
        p, f: values, (n,): uint16 bits of bfloat16, float32 or float64; both of one dtype.
        pruned, kept: bits in the output's dtype, (n,): what an element becomes.
        rounded: whether any of them had to be rounded, so that it may have become infinite.
    """

    start: int
    stream: int
    p: np.ndarray
    f: np.ndarray
    pruned: np.ndarray
    kept: np.ndarray
    rounded: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.p.size // BLOCK)

    @property
    def real(self) -> type[np.floating]:
        """The type of the arithmetic."""
        return np.float64 if self.p.dtype == np.float64 else np.float32


@dataclass(slots=True)
class Applied:
    """What a mask did to a chunk: counts of elements, and Σd² of each block, of all and of the kept ones (float64)."""

    kept: int
    changed: int
    kept_changed: int
    ties: int
    squares: np.ndarray
    kept_squares: np.ndarray


class Engine(Protocol):
    """Everything that is done to elements. `m` is mean|p|, rounded to float32."""

    def abs_sums(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Σ|p| and Σp² of each block, float64."""
        ...

    def count(self, chunk: Chunk, m: np.float32, bracket: Bracket, shift: int, bins: np.ndarray) -> tuple[int, bool]:
        """Add the keys inside the bracket to `bins` (int64); returns how many are above it, and whether
        all d are finite."""
        ...

    def apply(self, chunk: Chunk, m: np.float32, threshold: Threshold, ties: int, out: np.ndarray) -> Applied:
        """Write the output's bits to `out`, keeping at most `ties` of the elements equal to the threshold."""
        ...


def float_range(bracket: Bracket) -> tuple[np.float32, np.float32]:
    """The lowest and the highest score inside a bracket. −0, which no score is, must not pass for 0."""
    hi = bracket.hi - (bracket.hi == ZERO_KEY - 1)
    return score_of(max(bracket.lo, LOWEST_KEY)), score_of(min(hi, HIGHEST_KEY))


def float_threshold(threshold: Threshold, ties: int) -> tuple[np.float32, int]:
    """The threshold as a score, and the ties that go with it."""
    if threshold == KEEP_NONE:
        return np.float32(np.inf), 0
    if threshold == KEEP_ALL:
        return np.float32(-np.inf), 1 << 62
    return score_of(threshold.key), ties


def add_zeros(zeros: int, bracket: Bracket, shift: int, bins: np.ndarray) -> None:
    """Count the scores that are exactly 0, which are often most of them, at once."""
    if zeros and bracket.lo <= ZERO_KEY <= bracket.hi:
        bins[(ZERO_KEY - bracket.lo) >> shift] += zeros
