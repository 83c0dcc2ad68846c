"""Combining: what is kept of several fine-tuned checkpoints, put together (SEMANTICS.md).

p are base's values, v_i what a source's prune makes of them, δ_i = v_i − p; w_i the weights and λ the scaling. Every
operation is in the dtype of the operands (float32; float64 for float64 tensors), the sources in the order given, and
the result is rounded once, by the caller. An element that no source changes stays base's, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[np.ndarray]
"""v_i of each source, (n,) of one dtype."""

ALIGNED = 0.9995
"""|cos| above which slerp is linear."""


def weighted(p: np.ndarray, values: Values, weights: Sequence[float], scaling: float) -> np.ndarray:
    """p + λ·Σ w_i·δ_i. Task arithmetic, arXiv 2212.04089. Of one source as it is, the values themselves."""
    if len(values) == 1 and weights[0] == scaling == 1:
        return values[0]
    return p + p.dtype.type(scaling) * _total(p, values, weights)


def averaged(p: np.ndarray, values: Values, weights: Sequence[float], scaling: float) -> np.ndarray:
    """p + λ·(Σ w_i·δ_i)/(Σ w_i)."""
    return p + p.dtype.type(scaling) * (_total(p, values, weights) / _sum(p, weights))


def elected(p: np.ndarray, values: Values, weights: Sequence[float], scaling: float) -> np.ndarray:
    """p + λ·(Σ' w_i·δ_i)/(Σ' w_i), Σ' over the δ_i of the sign of Σ w_i·δ_i. TIES, arXiv 2306.01708."""
    sign = np.sign(_total(p, values, weights))
    total, share = np.zeros_like(p), np.zeros_like(p)
    for value, weight in zip(values, weights, strict=True):
        delta, w = value - p, p.dtype.type(weight)
        agrees = (delta != 0) & (np.sign(delta) == sign)
        total += np.where(agrees, w * delta, 0)
        share += np.where(agrees, w, 0)
    with np.errstate(all="ignore"):
        return np.where(share != 0, p + p.dtype.type(scaling) * (total / share), p)


def of_first(p: np.ndarray, values: Values, weights: Sequence[float], scaling: float) -> np.ndarray:
    """The value of the first source that changes an element."""
    found = p.copy()
    for value in reversed(values):
        np.copyto(found, value, where=value != p)
    return found


def of_last(p: np.ndarray, values: Values, weights: Sequence[float], scaling: float) -> np.ndarray:
    """The value of the last source that changes an element."""
    return of_first(p, values[::-1], weights, scaling)


def _total(p: np.ndarray, values: Values, weights: Sequence[float]) -> np.ndarray:
    """Σ w_i·δ_i."""
    total = p.dtype.type(weights[0]) * (values[0] - p)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += p.dtype.type(weight) * (value - p)
    return total


def _sum(p: np.ndarray, weights: Sequence[float]) -> np.floating:
    total: np.floating = p.dtype.type(weights[0])
    for weight in weights[1:]:
        total = total + p.dtype.type(weight)
    return total


def ends_of(p: np.ndarray, values: Values) -> Values:
    """The two vectors between which slerp goes: two sources', or base's and one's."""
    return (p, *values)[-2:]


def deltas_of(p: np.ndarray, values: Values) -> Values:
    """δ of every source."""
    return [value - p for value in values]


def on_the_arc(products: np.ndarray, weights: Sequence[float]) -> tuple[float, ...]:
    """What slerp multiplies its two vectors by, at t = w_2/(w_1 + w_2) of the angle between them; t alone where they
    are so near that it goes straight.

    Args:
        products: (2, 2) float64, their inner products.
        weights: of base and one it is that one's, and base has 1 less it.
    """
    t = weights[1] / (weights[0] + weights[1]) if len(weights) == 2 else weights[0]
    cosine = _cosine(products, 0, 1)
    if cosine is None or abs(cosine) > ALIGNED:
        return (_rounded(t),)
    angle = math.acos(cosine)
    return tuple(_rounded(math.sin(part * angle) / math.sin(angle)) for part in (1 - t, t))


def toward_the_center(products: np.ndarray, weights: Sequence[float]) -> tuple[float, ...]:
    """t = N·c/(1 + (N − 1)·c), c the mean cosine of pairs of δ. Model Stock, arXiv 2403.19522.

    Args:
        products: (N, N) float64, the inner products of the δ.
    """
    n = len(products)
    pairs = [_cosine(products, i, j) or 0.0 for i in range(n) for j in range(i)]
    c = math.fsum(pairs) / len(pairs)
    return (_rounded(n * c / (1 + (n - 1) * c)) if 1 + (n - 1) * c else 0.0,)


def _rounded(factor: float) -> float:
    """To float32, so that in which order a float64 sum was added up cannot be seen."""
    return float(np.float32(factor))


def _cosine(products: np.ndarray, i: int, j: int) -> float | None:
    """Between two vectors; None where one is zero."""
    norm = math.sqrt(products[i, i]) * math.sqrt(products[j, j])
    return max(-1.0, min(1.0, float(products[i, j]) / norm)) if norm else None


def between(p: np.ndarray, values: Values, factors: Sequence[float]) -> np.ndarray:
    """a·u + b·v of the ends of an arc, or u + t·(v − u)."""
    u, v = ends_of(p, values)
    if len(factors) == 1:
        return u + p.dtype.type(factors[0]) * (v - u)
    return p.dtype.type(factors[0]) * u + p.dtype.type(factors[1]) * v


def part_of_the_mean(p: np.ndarray, values: Values, factors: Sequence[float]) -> np.ndarray:
    """p + t·mean(δ)."""
    return p + p.dtype.type(factors[0]) * (_total(p, values, [1.0] * len(values)) / p.dtype.type(len(values)))


@dataclass(frozen=True)
class Elementwise:
    """A combination that takes each element alone.

    Attributes:
        value: from p, the values, the weights and λ.
        weighs: whether weights and λ mean anything to it.
        refuses: whether sources that make different values of one element are an error.
    """

    value: Callable[[np.ndarray, Values, Sequence[float], float], np.ndarray]
    weighs: bool = True
    refuses: bool = False


@dataclass(frozen=True)
class Angular:
    """A combination that looks at the angles between whole tensors.

    Attributes:
        vectors: whose inner products say how, from p and the values.
        factors: from these products and the weights.
        value: from p, the values and the factors.
        sources: fewest and most; `weighs`: whether weights mean anything to it.
    """

    vectors: Callable[[np.ndarray, Values], Values]
    factors: Callable[[np.ndarray, Sequence[float]], tuple[float, ...]]
    value: Callable[[np.ndarray, Values, Sequence[float]], np.ndarray]
    sources: tuple[int, int]
    weighs: bool


COMBINATIONS: dict[str, Elementwise | Angular] = {
    "sum": Elementwise(weighted),
    "mean": Elementwise(averaged),
    "ties": Elementwise(elected),
    "slerp": Angular(ends_of, on_the_arc, between, (1, 2), weighs=True),
    "model-stock": Angular(deltas_of, toward_the_center, part_of_the_mean, (2, 1 << 16), weighs=False),
    "first": Elementwise(of_first, weighs=False),
    "last": Elementwise(of_last, weighs=False),
    "error": Elementwise(of_first, weighs=False, refuses=True),
}


def combine(
    how: str, p: np.ndarray, values: Values, weights: Sequence[float], scaling: float, factors: Sequence[float] = ()
) -> np.ndarray:
    """Values (n,) of some elements of a merge, before they are rounded.

    Args:
        p: base's, (n,); `values`: each source's.
        factors: of a combination that looks at whole tensors, what it has found of the tensor.
    """
    combination = COMBINATIONS[how]
    if isinstance(combination, Angular):
        return combination.value(p, values, factors)
    return combination.value(p, values, weights, scaling)
