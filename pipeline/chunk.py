"""Chunks: a run of a tensor's elements, brought from stored bytes to what the arithmetic takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.dtypes import bits, convert, nonfinite, round_to, upcast, values
from pipeline.plan import PairedTensor
from pipeline.reading import Slice
from pipeline.recipe import Recipe
from pipeline.score import BLOCK, METHODS, stream_of


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


def make_chunk(part: Slice, views: Sequence[np.ndarray], recipe: Recipe) -> Chunk:
    """The chunk of a slice whose bytes, base's and finetuned's, are in `views`."""
    tensor, method = part.tensor, METHODS[recipe.method]
    assert tensor.base is not None
    assert tensor.finetuned is not None
    stored_p, stored_f = views[0], repaired(views[0], views[1], tensor, recipe)
    p, f = values(stored_p, tensor.base.dtype), values(stored_f, tensor.finetuned.dtype)
    if p.dtype != f.dtype:
        p, f = _common(p, f)
    pruned = convert(stored_p, tensor.base.dtype, tensor.dtype)
    if method.keep is None or recipe.density in (0, 1):
        kept = convert(stored_f, tensor.finetuned.dtype, tensor.dtype)
    else:
        x, y = upcast(p), upcast(f)
        with np.errstate(all="ignore"):
            kept = round_to(method.keep(x, y, x.dtype.type(recipe.density)), tensor.dtype)
    rounded = method.keep is not None or {tensor.base.dtype, tensor.finetuned.dtype} != {tensor.dtype}
    return Chunk(part.start, stream_of(recipe.seed, tensor.name), p, f, pruned, kept, rounded)


def pair_of_values(
    stored_p: np.ndarray, stored_f: np.ndarray, tensor: PairedTensor, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (or float64) values of the same elements of base and finetuned."""
    assert tensor.base is not None
    assert tensor.finetuned is not None
    stored_f = repaired(stored_p, stored_f, tensor, recipe)
    return _common(values(stored_p, tensor.base.dtype), values(stored_f, tensor.finetuned.dtype))


def _common(p: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, f = upcast(p), upcast(f)
    real = np.result_type(p, f)
    return p.astype(real, copy=False), f.astype(real, copy=False)


def repaired(stored_p: np.ndarray, stored_f: np.ndarray, tensor: PairedTensor, recipe: Recipe) -> np.ndarray:
    """finetuned's bytes, under `nonfinite: base` with base's value wherever finetuned's is not finite."""
    if recipe.nonfinite != "base":
        return stored_f
    assert tensor.base is not None
    assert tensor.finetuned is not None
    odd = nonfinite(stored_f, tensor.finetuned.dtype)
    if not odd.any():
        return stored_f
    from_base = bits(stored_p, tensor.base.dtype)[odd].view(np.uint8)
    fixed = bits(stored_f, tensor.finetuned.dtype).copy()
    fixed[odd] = convert(from_base, tensor.base.dtype, tensor.finetuned.dtype)
    return fixed.view(np.uint8)


def count_nonfinite(stored: np.ndarray, dtype: str) -> tuple[int, int]:
    """How many elements are NaN, and how many infinite."""
    vals = upcast(values(stored, dtype))
    return int(np.isnan(vals).sum()), int(np.isinf(vals).sum())
