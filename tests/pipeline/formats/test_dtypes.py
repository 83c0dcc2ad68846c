"""pytest tests/pipeline/formats/test_dtypes.py

Stored values in and out of float32, against torch and exact fractions.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from checkpoints import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from fapm.errors import UserError
from fapm.formats import dtypes

SAME_BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16, "F8_E4M3": np.uint8}


def stored(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("dtype", ["F16", "BF16", *(d for d in dtypes.TORCH_NAMES if d.startswith("F8"))])
def test_every_value_upcasts_as_torch_does(dtype):
    width = dtypes.itemsize(dtype)
    codes = np.arange(1 << (8 * width), dtype=f"u{width}")
    kind = getattr(torch, dtypes.TORCH_NAMES[dtype])
    expected = torch.from_numpy(codes.view(np.uint8).copy()).view(kind).to(torch.float32).numpy()
    found = dtypes.upcast(dtypes.values(codes.view(np.uint8), dtype))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    assert np.array_equal(dtypes.nonfinite(codes.view(np.uint8), dtype), ~np.isfinite(expected))


def test_bits_of_unaligned_bytes():
    data = np.random.default_rng(0).integers(0, 256, 801, np.uint8)
    for dtype in ("F64", "F32", "BF16", "F16", "F8_E5M2"):
        width = dtypes.itemsize(dtype)
        for start in range(width):
            part = data[start : start + 96 * width // width * width]
            found = dtypes.bits(part, dtype)
            assert found.tobytes() == part.tobytes()
            assert found.itemsize == width


_TWICE = [("F64", target) for target in ("BF16", "F8_E4M3", "F8_E5M2")]
"""Where torch rounds twice; the tests of doubles that are rounded once have exact fractions."""


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.product(DTYPES, DTYPES) if pair not in _TWICE]
)
def test_converting_rounds_as_torch_does(source, target):
    generator = torch.Generator().manual_seed(0)
    t = (torch.randn(5000, generator=generator, dtype=torch.float64) * 4).to(DTYPES[source])
    found = dtypes.convert(stored(t), source, target)
    assert found.tobytes() == stored(t.to(DTYPES[target])).tobytes()


def grid(dtype: str) -> tuple[list[Fraction], list[int]]:
    """Every finite value of a dtype, in order, and its bits; −0 left out."""
    width = dtypes.itemsize(dtype)
    codes = np.arange(1 << (8 * width), dtype=f"u{width}")
    vals = dtypes.upcast(dtypes.values(codes.view(np.uint8), dtype))
    pairs = [(float(v), int(c)) for v, c in zip(vals, codes, strict=True) if np.isfinite(v) and not (v == 0 and c)]
    pairs.sort()
    return [Fraction(v) for v, _ in pairs], [c for _, c in pairs]


GRIDS = {dtype: grid(dtype) for dtype in ("F8_E4M3", "F8_E5M2")}


@pytest.mark.parametrize("dtype", GRIDS)
@given(x=st.floats(-400, 400))
def test_a_double_is_rounded_once_to_the_nearest_even_float8(dtype, x):
    values, codes = GRIDS[dtype]
    best = min(abs(v - Fraction(x)) for v in values)
    nearest = [c for v, c in zip(values, codes, strict=True) if abs(v - Fraction(x)) == best]
    even = [c for c in nearest if c % 2 == 0] if len(nearest) > 1 else nearest
    found = int(dtypes.round_to(np.array([x]), dtype)[0])
    assert found == even[0] or (found & 0x7F == 0 and even[0] == 0)


def exactly_rounded_bfloat16(x: float) -> float:
    """Nearest even by fractions, for normal numbers."""
    exact = Fraction(x)
    _, exponent = np.frexp(x)
    step = Fraction(2) ** (int(exponent) - 8)
    return float(round(exact / step) * step)  # Python rounds halves to even


@given(st.floats(1e-30, 1e30), st.sampled_from([-1, 1]), st.booleans(), st.integers(-3, 3))
def test_a_double_is_rounded_once_to_bfloat16(x, sign, near_a_tie, ulps):
    if near_a_tie:  # a tie of bfloat16 and its neighbouring doubles: where rounding twice goes wrong
        code = int(np.array([x], np.float32).view(np.uint32)[0]) & 0xFFFF0000 | 0x8000
        x = float(np.array([code], np.uint32).view(np.float32)[0])
        for _ in range(abs(ulps)):
            x = float(np.nextafter(x, np.inf if ulps > 0 else 0))
    found = dtypes.round_to(np.array([sign * x]), "BF16")
    assert dtypes.upcast(found)[0] == sign * exactly_rounded_bfloat16(x)


def test_tiny_doubles_and_signed_zeros():
    tiny = np.array([1e-60, -1e-60, 0.0, -0.0, 5e-324])
    found = dtypes.upcast(dtypes.round_to(tiny, "BF16"))
    assert found.tolist() == [0, 0, 0, 0, 0]
    assert np.signbit(found).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("target", "largest", "too_large"),
    [
        ("F16", 65519.0, 65520.0),
        ("BF16", 3.39e38, 3.4e38),
        ("F8_E4M3", 464.0, 465.0),
        ("F8_E5M2", 61439.0, 61440.0),
    ],
)
def test_a_value_that_does_not_fit_becomes_infinite_or_nan(target, largest, too_large):
    """Some versions of torch saturate to the largest float8_e4m3fn: that would pass for a weight."""
    for kind in (np.float32, np.float64):
        found = dtypes.round_to(np.array([largest, too_large, -too_large, 1], kind), target)
        assert dtypes.nonfinite(found.view(np.uint8), target).tolist() == [False, True, True, False]
    assert np.isinf(dtypes.round_to(np.array([1e39]), "F32").view(np.float32)[0])


def test_overflow_is_refused_with_its_count_and_name():
    dtypes.refuse_overflow(0, "F16", "w")
    with pytest.raises(UserError, match=r"'w': 2 values are too large for float16"):
        dtypes.refuse_overflow(2, "F16", "w")


def test_what_is_not_finite_already_is_no_overflow():
    vals = np.array([np.inf, -np.inf, np.nan], np.float32)
    for target in ("F16", "BF16", "F32", "F64"):
        found = dtypes.upcast(dtypes.values(dtypes.round_to(vals, target).view(np.uint8), target))
        assert np.array_equal(found, vals, equal_nan=True)


@pytest.mark.parametrize("dtype", SAME_BITS)
def test_the_same_dtype_keeps_the_bits_of_a_nan(dtype):
    codes = np.full(4, np.iinfo(SAME_BITS[dtype]).max, SAME_BITS[dtype])
    assert np.array_equal(dtypes.convert(codes.view(np.uint8), dtype, dtype), codes)


def test_the_widths_are_those_of_torch():
    for dtype, name in dtypes.TORCH_NAMES.items():
        assert dtypes.itemsize(dtype) == getattr(torch, name).itemsize
    assert not dtypes.is_weight("I64")
    assert not dtypes.is_weight("BOOL")
    assert not dtypes.is_weight("F4")
