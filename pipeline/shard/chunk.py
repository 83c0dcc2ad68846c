"""Chunks: a run of a tensor's elements, brought from stored bytes to what the arithmetic takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fapm.formats.dtypes import TORCH_NAMES, bits, convert, nonfinite, round_to, upcast, values
from fapm.planning.plan import PairedTensor
from fapm.recipe import Recipe
from fapm.scoring.engine import Chunk, StoredChunk
from fapm.scoring.methods import METHODS, Method, stream_of
from fapm.shard.section import Slice


def make_chunk(part: Slice, views: Sequence[np.ndarray], recipe: Recipe) -> Chunk:
    """The chunk of a slice whose bytes, base's and finetuned's, are in `views`."""
    tensor, method = part.tensors[0], METHODS[recipe.method]
    assert tensor.base is not None
    assert tensor.finetuned is not None
    stored_p, stored_f = views[0], repaired(views[0], views[1], tensor, recipe)
    p, f = values(stored_p, tensor.base.dtype), values(stored_f, tensor.finetuned.dtype)
    if p.dtype != f.dtype:
        p, f = _common(p, f)
    pruned = convert(stored_p, tensor.base.dtype, tensor.dtype)
    if _is_made(tensor, method):
        kept = round_to(_kept(tensor, method, upcast(p), upcast(f)), tensor.dtype)
    else:
        kept = convert(stored_f, tensor.finetuned.dtype, tensor.dtype)
    rounded = (
        method.value is not None or tensor.scale != 1 or {tensor.base.dtype, tensor.finetuned.dtype} != {tensor.dtype}
    )
    return Chunk(starts_of(part), part.start, streams(part.tensors, recipe), p, f, pruned, kept, rounded)


def value_chunk(part: Slice, views: Sequence[np.ndarray], recipe: Recipe, p: np.ndarray) -> Chunk:
    """The same where elements become values in the type of the arithmetic: base's, or what is kept, not rounded.

    Args:
        p: base's values, float32 or float64.
    """
    tensor, method = part.tensors[0], METHODS[recipe.method]
    assert tensor.base is not None
    assert tensor.finetuned is not None
    stored_p, stored_f = (
        values(views[0], tensor.base.dtype),
        values(repaired(views[0], views[1], tensor, recipe), tensor.finetuned.dtype),
    )
    f = upcast(stored_f)
    real = np.result_type(p, f)
    p, f = p.astype(real, copy=False), f.astype(real, copy=False)
    kept = np.ascontiguousarray(_kept(tensor, method, p, f))
    scored = (stored_p, stored_f) if stored_p.dtype == stored_f.dtype else (p, f)
    made = p.view(f"u{p.itemsize}"), kept.view(f"u{p.itemsize}")
    return Chunk(starts_of(part), part.start, streams(part.tensors, recipe), *scored, *made)


def _is_mixed(tensor: PairedTensor, method: Method) -> bool:
    return method.value is not None and tensor.parameter not in (0, 1)


def _is_made(tensor: PairedTensor, method: Method) -> bool:
    """Whether kept elements have other values than finetuned's."""
    return _is_mixed(tensor, method) or tensor.scale != 1


def _kept(tensor: PairedTensor, method: Method, p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Values (n,) that kept elements have, before they are rounded: v, or p + s·(v − p) of a layer that is scaled."""
    real, value = p.dtype.type, f
    with np.errstate(all="ignore"):
        if method.value is not None and _is_mixed(tensor, method):
            value = method.value(p, f, real(tensor.parameter))
        return value if tensor.scale == 1 else p + real(tensor.scale) * (value - p)


def stored_chunk(part: Slice, put: tuple[Any, Any], recipe: Recipe) -> StoredChunk:
    """The same of a run of one tensor whose bytes an engine has put on its device."""
    (tensor,) = part.tensors
    assert tensor.base is not None
    assert tensor.finetuned is not None
    return StoredChunk(
        start=part.start,
        stream=int(streams(part.tensors, recipe)[0]),
        put=put,
        p_dtype=TORCH_NAMES[tensor.base.dtype],
        f_dtype=TORCH_NAMES[tensor.finetuned.dtype],
        dtype=TORCH_NAMES[tensor.dtype],
        numel=part.stop - part.start,
        repair=recipe.nonfinite == "base",
        mixed=tensor.parameter if _is_mixed(tensor, METHODS[recipe.method]) else None,
        scale=tensor.scale,
    )


def starts_of(part: Slice) -> np.ndarray:
    """Where each tensor's elements begin in a slice, and the last one's end: (r + 1,) int64."""
    if len(part.tensors) == 1:
        return np.array([0, part.stop - part.start])
    return np.cumsum([0, *(tensor.common for tensor in part.tensors)])


def streams(tensors: Sequence[PairedTensor], recipe: Recipe) -> np.ndarray:
    """Where the random numbers of each tensor come from, (r,) int64; zeros for methods that use none."""
    if not METHODS[recipe.method].hashed:
        return np.zeros(len(tensors), np.int64)
    return np.array([stream_of(recipe.seed, tensor.name) for tensor in tensors], np.int64)


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
