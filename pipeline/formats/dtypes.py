"""Stored dtypes: their safetensors names, their widths, and how values come in and out of float32.

A stored element is handled as *bits* (an unsigned integer of its width, never rounded) and as a *value*
(float32, or float64 for float64 tensors). bfloat16 is kept as uint16 wherever numpy is used, since numpy
has no such dtype; the kernels upcast it by a shift.
"""

from __future__ import annotations

import numpy as np

from fapm.errors import UserError

# Width in bits of every dtype that a safetensors header may name.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# The dtypes that hold weights one by one, and the torch dtype of each. All others pass through.
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}

# What `--dtype` accepts, and the safetensors name of each.
OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def is_weight(dtype: str) -> bool:
    """Whether elements of this dtype can be scored."""
    return dtype in TORCH_NAMES


def itemsize(dtype: str) -> int:
    """Bytes an element; only for dtypes of whole bytes."""
    return BITS[dtype] // 8


def bits(stored: np.ndarray, dtype: str) -> np.ndarray:
    """View bytes (uint8, contiguous) as unsigned integers of the dtype's width; copies only unaligned data."""
    width = itemsize(dtype)
    if stored.ctypes.data % width:
        stored = stored.copy()
    return stored.view(f"u{width}")


def values(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Dtype that the kernels compute with: uint16 for bfloat16 (upcast by a shift), float32, or float64.

    float16 and float8 are upcast to float32 here, which loses nothing.
    """
    raw = bits(stored, dtype)
    if dtype == "BF16":
        return raw
    if dtype in ("F32", "F64"):
        return raw.view(f"f{itemsize(dtype)}")
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return _float8_table(dtype)[raw]


def upcast(vals: np.ndarray) -> np.ndarray:
    """float32 (or float64) values from what `values` gave."""
    if vals.dtype == np.uint16:
        return (vals.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return vals


_tables: dict[str, np.ndarray] = {}


def _float8_table(dtype: str) -> np.ndarray:
    if dtype not in _tables:
        import torch

        codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, TORCH_NAMES[dtype]))
        _tables[dtype] = codes.to(torch.float32).numpy()
    return _tables[dtype]


def round_to(vals: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 or float64 values once, to nearest even, to `dtype`; returns bits.

    What is too large becomes infinite (NaN in dtypes without an infinity): see `refuse_overflow`.
    """
    with np.errstate(over="ignore"):
        if dtype in ("F64", "F32", "F16"):
            return vals.astype(f"f{itemsize(dtype)}").view(f"u{itemsize(dtype)}")
        if dtype == "BF16":
            return _to_bfloat16(vals if vals.dtype == np.float32 else _to_odd_float32(vals))
        return _round_with_torch(vals, dtype)


def refuse_overflow(count: int, dtype: str, what: str) -> None:
    """Raise if rounding to `dtype` has made `count` finite elements infinite.

    Raises:
        UserError: with the name of the tensor, `what`.
    """
    if count:
        raise UserError(
            f"tensor {what!r}: {count} values are too large for {TORCH_NAMES[dtype]}; "
            "ask for a wider --dtype, or give the tensor a --rule"
        )


def _to_bfloat16(vals: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even: its upper half, and one more where the lower half says so."""
    code = np.ascontiguousarray(vals).view(np.uint32)
    rounded = code >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += code
    rounded += np.uint32(0x7FFF)  # wraps for some NaN, which are set apart
    rounded >>= np.uint32(16)
    found = rounded.astype(np.uint16)
    nan = np.isnan(vals)
    if nan.any():
        found[nan] = 0x7FC0
    return found


_BEYOND_E4M3 = 464.0  # the last that rounds to its largest number, 448


def _round_with_torch(vals: np.ndarray, dtype: str) -> np.ndarray:
    import torch

    if vals.dtype == np.float64:
        vals = _to_odd_float32(vals)
    rounded = torch.from_numpy(np.ascontiguousarray(vals)).to(getattr(torch, TORCH_NAMES[dtype]))
    width = itemsize(dtype)
    code: np.ndarray = rounded.view(torch.uint8 if width == 1 else torch.int16).numpy().view(f"u{width}")
    if dtype == "F8_E4M3":  # without an infinity; some versions of torch give its largest number instead of NaN
        code[np.abs(vals) > _BEYOND_E4M3] = 0x7F
    return code


def _to_odd_float32(vals: np.ndarray) -> np.ndarray:
    """float64 to float32 by rounding to odd, so that the next rounding, to fewer bits, is the only one."""
    with np.errstate(over="ignore"):
        near = vals.astype(np.float32)
    # An overflow is left to be found in the result; elsewhere step back to the neighbour nearer to zero.
    inexact = np.isfinite(near) & (near.astype(np.float64) != vals)
    away = inexact & (np.abs(near.astype(np.float64)) > np.abs(vals))
    code = near.view(np.uint32) - away.astype(np.uint32)
    return (code | inexact.astype(np.uint32)).view(np.float32)


def convert(stored: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bits of `stored` (bytes of dtype `source`) in dtype `target`: the same bits where the two agree."""
    if source == target:
        return bits(stored, source)
    return round_to(upcast(values(stored, source)), target)


def nonfinite(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Boolean mask of the elements that are NaN or infinite."""
    return ~np.isfinite(upcast(values(stored, dtype)))
