"""Combinations: how what is kept of several fine-tuned checkpoints is put together (SEMANTICS.md).

p are base's values, v_i what the mask of source i makes of them, δ_i = v_i − p; w_i the weights and λ the scaling.

| combination | out | source |
| --- | --- | --- |
| sum | p + λ·Σ w_i·δ_i | task arithmetic, arXiv 2212.04089 |
| mean | p + λ·(Σ w_i·δ_i)/(Σ w_i) | |
| ties | p + λ·(Σ' w_i·δ_i)/(Σ' w_i), Σ' over the δ_i of the sign of Σ w_i·δ_i | TIES, arXiv 2306.01708 |
| slerp | at w_2/(w_1 + w_2) of the angle between two; of base and one, base weighs 1 − w | |
| model-stock | p + t·mean(δ), t = N·c/(1 + (N − 1)·c), c the mean cosine of pairs of δ | arXiv 2403.19522 |
| first, last, error | the value of the first or the last source that changes an element, or a refusal | |

`scoring.combined` has the loops; here is what is known of each, and the factors of those that look at whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[np.ndarray]
"""v_i of each source, (n,) of one dtype."""

ALIGNED = 0.9995
"""|cos| above which slerp goes straight."""


def ends_of(p: np.ndarray, values: Values) -> Values:
    """The two vectors between which slerp goes: two sources', or base's and one's."""
    return (p, *values)[-2:]


def deltas_of(p: np.ndarray, values: Values) -> Values:
    """δ of every source."""
    return [value - p for value in values]


def on_the_arc(products: np.ndarray, weights: Sequence[float]) -> tuple[float, ...]:
    """What slerp multiplies its two vectors by, at t = w_2/(w_1 + w_2) of the angle between them; t alone where they
    are so near that it goes straight, from the first to the second.

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
    """t of model-stock.

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


@dataclass(frozen=True)
class Elementwise:
    """A combination that takes each element alone.

    Attributes:
        weighs: whether weights and λ mean anything to it.
    """

    weighs: bool = True


@dataclass(frozen=True)
class Angular:
    """A combination that looks at the angles between whole tensors.

    Attributes:
        vectors: whose inner products say how, from p and the values.
        factors: from these products and the weights.
        sources: fewest and most; `weighs`: whether weights mean anything to it.
    """

    vectors: Callable[[np.ndarray, Values], Values]
    factors: Callable[[np.ndarray, Sequence[float]], tuple[float, ...]]
    sources: tuple[int, int]
    weighs: bool


COMBINATIONS: dict[str, Elementwise | Angular] = {
    "sum": Elementwise(),
    "mean": Elementwise(),
    "ties": Elementwise(),
    "slerp": Angular(ends_of, on_the_arc, (1, 2), weighs=True),
    "model-stock": Angular(deltas_of, toward_the_center, (2, 1 << 16), weighs=False),
    "first": Elementwise(weighs=False),
    "last": Elementwise(weighs=False),
    "error": Elementwise(weighs=False),
}
