"""Where the arithmetic happens: one interface, the compiled loops on a CPU behind it, torch on any other device.

Both are given the same chunks and return the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.chunk import Chunk
from pipeline.errors import UserError
from pipeline.score import METHODS
from pipeline.threshold import HIGHEST_KEY, KEEP_ALL, KEEP_NONE, LOWEST_KEY, ZERO_KEY, Bracket, Threshold, score_of


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


class CpuEngine:
    """The loops of `pipeline.kernel`, on the calling thread, without the GIL."""

    def __init__(self, method: str):
        from pipeline import kernel  # here, so that a plan is made without loading a compiler

        self._kernels, self._abs_sums, self._tile = kernel.kernels(method), kernel.abs_sums, kernel.TILE

    def abs_sums(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        sums, squares = np.empty(chunk.blocks), np.empty(chunk.blocks)
        self._abs_sums(chunk.p, sums, squares)
        return sums, squares

    def count(self, chunk: Chunk, m: np.float32, bracket: Bracket, shift: int, bins: np.ndarray) -> tuple[int, bool]:
        lo, hi = float_range(bracket)
        above, zeros, finite = self._kernels.count(
            chunk.p, chunk.f, chunk.real(m), chunk.stream, chunk.start, lo, hi,
            np.uint32(bracket.lo), np.uint32(shift), bins, np.empty(self._tile, chunk.real),
        )  # fmt: skip
        add_zeros(zeros, bracket, shift, bins)
        return above, finite

    def apply(self, chunk: Chunk, m: np.float32, threshold: Threshold, ties: int, out: np.ndarray) -> Applied:
        score, ties = float_threshold(threshold, ties)
        squares, kept_squares = np.empty(chunk.blocks), np.empty(chunk.blocks)
        kept, changed, both, used = self._kernels.apply(
            chunk.p, chunk.f, chunk.real(m), chunk.stream, chunk.start, score, ties,
            chunk.pruned, chunk.kept, out, squares, kept_squares,
            np.empty(self._tile, chunk.real), np.empty(self._tile, out.dtype),
        )  # fmt: skip
        return Applied(kept, changed, both, used, squares, kept_squares)


def make_engine(method: str, device: str) -> Engine:
    """The engine for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: a CUDA device was asked for and there is none.
    """
    assert method in METHODS
    if device == "cpu" or (device == "auto" and not _has_cuda()):
        return CpuEngine(method)
    from pipeline.device import TorchEngine

    if not _has_cuda():
        raise UserError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
    return TorchEngine(method, "cuda" if device == "auto" else device)


def _has_cuda() -> bool:
    import glob

    # Importing torch takes more than a second; without a driver's device nodes there is nothing to ask it.
    if not glob.glob("/dev/nvidia[0-9]*") and not glob.glob("/dev/dxg"):
        return False
    import torch

    return torch.cuda.is_available()
