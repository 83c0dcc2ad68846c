"""Matrices: the singular values of Δ, block by block, and the part of it that is kept.

Δ is never there as a whole. Its Gram matrix, over the smaller side, is added up from blocks of rows, and so is what is
kept of it, a product of Δ with a projector of that side. Blocks are cut by the shape of Δ alone and added in order, and
the library computes with one thread: so the bits depend on that library and its kernels, not on workers or budgets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK, FEWEST_ROWS = 1 << 19, 128
"""Elements of a block of rows, and rows that it has at least. Never change them: the bits depend on them."""

_EPS = 2.0**-52

_LOST = 1e-10
"""Of the largest eigenvalue of a Gram matrix: below that rounding, which is 1e-16 of it, shows in σ."""


@dataclass(frozen=True)
class Delta:
    """Δ of one matrix, (m, n).

    Attributes:
        pairs: base's and finetuned's rows from a row on, in blocks of `rows`: (first row, p, f), each (r, n) float32 or
            float64, to be used before the next is asked for.
    """

    shape: tuple[int, int]
    pairs: Callable[[int], Iterator[tuple[int, np.ndarray, np.ndarray]]]

    @property
    def rows(self) -> int:
        return rows_of(self.shape)

    @property
    def is_tall(self) -> bool:
        return self.shape[0] >= self.shape[1]

    def blocks(self, first: int = 0) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """The rows, p, f, and Δ: float64 of the difference in their dtype."""
        for row, p, f in self.pairs(first):
            with np.errstate(all="ignore"):
                d = (f - p).astype(np.float64)
            yield slice(row, row + len(p)), p, f, d


def rows_of(shape: tuple[int, int]) -> int:
    """Rows of a block."""
    return min(shape[0], max(FEWEST_ROWS, BLOCK // shape[1]))


def bytes_of(shape: tuple[int, int]) -> int:
    """Bytes that the work on a matrix takes: its Gram matrix, eigenvectors, LAPACK's memory, and some blocks."""
    small = min(shape)
    return 5 * 8 * small**2 + _BLOCKS * 8 * rows_of(shape) * shape[1] + 8 * small * _strip(shape)


_BLOCKS = 6


def flops_of(shape: tuple[int, int]) -> float:
    """What the work on a matrix costs, in floating-point operations of a matrix product: half of a Gram matrix, its
    eigenvectors, which take as long as 8·k³ of them, a projector, and the product with it."""
    m, n = shape
    k = min(m, n)
    return m * n * k + (8 + 2) * k**3 + 2 * m * n * k


def flops_per_second(size: int = 512) -> float:
    """How many of them this machine does with one thread, measured: the best of three products."""
    one = np.random.default_rng(0).standard_normal((size, size))
    with one_thread:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            one @ one
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


@dataclass(frozen=True)
class Spectrum:
    """σ (k,) float64, descending, and the singular vectors (k, k) of the smaller side, a column each.

    σ below rounding, max(m, n)·ε of the largest, are 0.
    """

    sigma: np.ndarray
    vectors: np.ndarray


def decompose(delta: Delta, held: int = 1) -> Spectrum:
    """The singular values of Δ and the vectors of its smaller side.

    The eigenvalues of a Gram matrix are σ², so of a σ below 1e-8 of the largest nothing is left in it. Their space is
    still known: there the product of Δ with it, which is small, has a Gram matrix of its own, and so on.

    Args:
        held: blocks of rows that fit in memory; no bit depends on it.

    Raises:
        LinAlgError: Δ is not finite, or its squares are not.
    """
    gram = _gram(delta, held)
    if not np.isfinite(np.einsum("ii->i", gram)).all():
        raise np.linalg.LinAlgError("Δ is not finite")
    squares, vectors = _eigen(gram)
    first = 0
    while (lost := first + int(np.count_nonzero(squares[first:] > _LOST * squares[first]))) < squares.size:
        if lost == first or squares[0] == 0:
            break
        inner, turned = _eigen(_gram_within(delta, vectors[:, lost:]))
        squares[lost:], vectors[:, lost:] = inner, vectors[:, lost:] @ turned
        first = lost
        if squares[first] <= (max(delta.shape) * _EPS) ** 2 * squares[0]:
            break
    sigma = np.sqrt(np.maximum(squares, 0))
    return Spectrum(np.where(sigma > max(delta.shape) * _EPS * sigma[0], sigma, 0), vectors)


def _eigen(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in descending order, and eigenvectors, of a symmetric matrix whose lower half is given."""
    values, vectors = np.linalg.eigh(gram)
    return np.ascontiguousarray(values[::-1]), np.ascontiguousarray(vectors[:, ::-1])


def _gram(delta: Delta, held: int) -> np.ndarray:
    """ΔᵀΔ of a tall matrix, ΔΔᵀ of a wide one; its lower half."""
    small = min(delta.shape)
    gram = np.zeros((small, small))
    if delta.is_tall:
        for _, _, _, block in delta.blocks():
            gram += block.T @ block
        return gram
    for first in range(0, small, held * delta.rows):
        kept: list[tuple[slice, np.ndarray]] = []
        for here, _, _, block in delta.blocks(first):
            if len(kept) < held:
                kept.append((here, block))
            for there, other in kept:
                gram[here, there] = block @ other.T
    return gram


def _gram_within(delta: Delta, space: np.ndarray) -> np.ndarray:
    """The same of Δ·W or Wᵀ·Δ, W (k, r) orthogonal columns of the smaller side."""
    found = np.zeros((space.shape[1], space.shape[1]))
    if delta.is_tall:
        for _, _, _, block in delta.blocks():
            inside = block @ space
            found += inside.T @ inside
        return found
    width, strip = delta.shape[1], _strip(delta.shape)
    for begin in range(0, width, strip):
        inside = np.zeros((space.shape[1], min(strip, width - begin)))
        for here, _, _, block in delta.blocks():
            inside += space[here].T @ block[:, begin : begin + strip]
        found += inside @ inside.T
    return found


def _strip(shape: tuple[int, int]) -> int:
    """Columns of a wide matrix that are looked at together."""
    return 0 if shape[0] >= shape[1] else min(shape[1], max(1024, 4 * BLOCK // shape[0]))


def projector(spectrum: Spectrum, gains: np.ndarray) -> np.ndarray:
    """What Δ is multiplied by to keep its singular values times their gains, (k, k): on the right of a tall one."""
    some = gains != 0
    vectors = spectrum.vectors[:, some]
    return (vectors * gains[some]) @ vectors.T


def kept(delta: Delta, by: np.ndarray, held: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows in order: base's p, finetuned's f, and Δ' (r, n) float64, what a projector keeps of Δ."""
    if delta.is_tall:
        for _, p, f, block in delta.blocks():
            yield p, f, block @ by
        return
    rows = delta.rows
    for first in range(0, delta.shape[0], held * rows):
        wanted = [slice(row, min(row + rows, delta.shape[0])) for row in range(first, delta.shape[0], rows)[:held]]
        sums = [np.zeros((of.stop - of.start, delta.shape[1])) for of in wanted]
        pairs = []
        for here, p, f, block in delta.blocks():
            if here in wanted:
                pairs.append((p.copy(), f.copy()))
            for of, summed in zip(wanted, sums, strict=True):
                summed += by[of, here] @ block
        for (p, f), summed in zip(pairs, sums, strict=True):
            yield p, f, summed


def factors(delta: Delta, spectrum: Spectrum, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A (r, n) and B (m, r), float32: B·A is Δ with its singular values times their gains, r of which are not 0."""
    some = gains != 0
    vectors, by = spectrum.vectors[:, some], gains[some]
    if delta.is_tall:
        rows = [(block @ vectors * by).astype(np.float32) for *_, block in delta.blocks()]
        return vectors.T.astype(np.float32), np.concatenate(rows)
    a = np.zeros((by.size, delta.shape[1]))
    for here, _, _, block in delta.blocks():
        a += vectors[here].T @ block
    return a.astype(np.float32), (vectors * by).astype(np.float32)


class _OneThread:
    """Linear algebra with one thread while anybody is at it: with several the bits depend on how many."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._limits: Any = None

    def __enter__(self) -> None:
        from threadpoolctl import threadpool_limits

        with self._lock:
            self._users += 1
            if self._users == 1:
                self._limits = threadpool_limits(1, "blas")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._limits.restore_original_limits()


one_thread = _OneThread()


def library() -> str:
    """The library that computes here, and for which processor: what the bits depend on."""
    from threadpoolctl import threadpool_info

    used = [each for each in threadpool_info() if each["user_api"] == "blas" and "numpy" in each["filepath"]]
    found = (used or [each for each in threadpool_info() if each["user_api"] == "blas"] or [{}])[0]
    words = (found.get(key) for key in ("internal_api", "version", "architecture"))
    return " ".join(["numpy", np.__version__, *(word for word in words if word)])
