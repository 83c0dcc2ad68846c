"""The methods, each of a kind: what an element is worth, and what a kept element becomes.

A kind (SEMANTICS.md) says which scopes a method has, which field of a recipe is its parameter (`symbol` is what people
call it), whether a group has a budget, and whether a GPU can do it (`on_device`); nothing else in the program asks
which method it is. A method of the kind `Selection` is one function of

    d  = |f − p|      the size of the change
    p  = |p|          the size of the pre-trained weight
    m  = mean(|p|)    over the whole tensor
    u                 in [0, 1), a hash of (seed, tensor name, flat index)

written with operators only. The same function is called with numpy arrays, with torch tensors on any device,
and, compiled, with scalars: so there is one meaning of the score, and every operation rounds once in the
type of its operands (float32; float64 for float64 tensors, whose scores are then rounded to float32). Where the result
is NaN it is not defined, and SEMANTICS.md decides: 0 where d = 0, −inf elsewhere. −0 becomes 0. To add a method, add
its function and its line in METHODS (docs/add-a-method.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fapm.scoring.spectrum import above_noise, effective_rank, largest

BLOCK = 1 << 16
"""Elements whose |p| are summed before the exactly rounded sum (SEMANTICS.md, 2). Never change it: m depends on it."""


def fapm(d: Any, p: Any, m: Any, u: Any) -> Any:
    """S = |Δ| − m·(|Δ|/|p|). FAPM, arXiv 2509.08255."""
    return d - m * (d / p)


def magnitude(d: Any, p: Any, m: Any, u: Any) -> Any:
    """S = |Δ|. The trim step of TIES, arXiv 2306.01708."""
    return d


def relative(d: Any, p: Any, m: Any, u: Any) -> Any:
    """S = −|Δ|/|p|, the second term of FAPM alone."""
    return -(d / p)


def random(d: Any, p: Any, m: Any, u: Any) -> Any:
    """S = u: elements chosen by chance, the same ones everywhere."""
    return u


def rescaled(p: Any, f: Any, density: Any) -> Any:
    """p + (f − p)/density: what DARE keeps, arXiv 2311.03099."""
    return p + (f - p) / density


def interpolated(p: Any, f: Any, alpha: Any) -> Any:
    """(1 − α)·p + α·f: WiSE-FT, arXiv 2109.01903."""
    return (1 - alpha) * p + alpha * f


Score = Callable[[Any, Any, Any, Any], Any]
Value = Callable[[Any, Any, Any], Any]
Gains = Callable[[np.ndarray, tuple[int, int], float], np.ndarray]


@dataclass(frozen=True)
class Selection:
    """A method that scores elements and keeps the k highest-scored of each group. Its parameter is the density.

    Attributes:
        score: what an element is worth.
        value: of a kept element, from p, f and the density; None keeps the fine-tuned one, bit for bit.
        hashed: whether the score uses `u`.
    """

    score: Score
    value: Value | None = None
    hashed: bool = False

    kind: ClassVar[str] = "selection"
    on_device: ClassVar[bool] = True
    parameter: ClassVar[str] = "density"
    symbol: ClassVar[str] = "density"
    scopes: ClassVar[tuple[str, ...]] = ("tensor", "layer", "global")
    has_budget: ClassVar[bool] = True


@dataclass(frozen=True)
class Blend:
    """A method that makes each element from p and f alone. Its parameter is α: 0 gives p, 1 gives f, bit for bit.

    Attributes:
        value: of an element, from p, f and α.
        score: for the engines, which want one; no element is chosen by it.
    """

    value: Value
    score: Score = magnitude

    kind: ClassVar[str] = "blend"
    on_device: ClassVar[bool] = True
    parameter: ClassVar[str] = "density"
    symbol: ClassVar[str] = "α"
    scopes: ClassVar[tuple[str, ...]] = ("tensor",)
    has_budget: ClassVar[bool] = False
    hashed: ClassVar[bool] = False


@dataclass(frozen=True)
class Matrix:
    """A method that keeps a part of Δ = U·diag(σ)·Vᵀ, a matrix: U·diag(g·σ)·Vᵀ.

    Attributes:
        gains: g, (k,) float64 of (k,) σ in descending order, the shape (m, n) of Δ, and the parameter.
        parameter: the field of the recipe that is given to it.
        score, value: as of a blend; no element is chosen or made alone.
    """

    gains: Gains
    parameter: str
    score: Score = magnitude
    value: Value | None = None

    @property
    def symbol(self) -> str:
        return self.parameter

    kind: ClassVar[str] = "matrix"
    on_device: ClassVar[bool] = False
    scopes: ClassVar[tuple[str, ...]] = ("tensor",)
    has_budget: ClassVar[bool] = False
    hashed: ClassVar[bool] = False


Method = Selection | Blend | Matrix

METHODS: dict[str, Method] = {
    "fapm": Selection(fapm),
    "magnitude": Selection(magnitude),
    "relative": Selection(relative),
    "random": Selection(random, hashed=True),
    "dare": Selection(random, rescaled, hashed=True),
    "wise-ft": Blend(interpolated),
    "dg-hard": Matrix(above_noise, "strength"),
    "timber": Matrix(effective_rank, "tail"),
    "low-rank": Matrix(largest, "rank"),
}

PARAMETERS = tuple(dict.fromkeys(method.parameter for method in METHODS.values()))
"""The fields of a recipe that are a parameter of some method."""


def stream_of(seed: int, name: str) -> int:
    """The 64 bits, as a signed integer, from which a tensor's `u` are counted."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(x: Any) -> Any:
    """SplitMix64's finalizer on signed 64-bit integers (which wrap); returns the upper 24 of its 64 bits.

    Operators only, like the scores. Steele, Lea, Flood, OOPSLA 2014.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return (x >> 40) & 0xFFFFFF


GAMMA = -7046029254386353131  # 2^64 / golden ratio, odd: the step between two counters
UNIT = 2.0**-24


def uniform(stream: Any, positions: np.ndarray) -> np.ndarray:
    """u of the elements at `positions` (int64): float32 multiples of 2^-24 in [0, 1). A stream for all, or for each."""
    with np.errstate(over="ignore"):
        hashed = mix(np.asarray(stream, np.int64) + (positions.astype(np.int64) + 1) * np.int64(GAMMA))
    return hashed.astype(np.float32) * np.float32(UNIT)


def evaluate(method: Method, p: np.ndarray, f: np.ndarray, m: Any, stream: Any, positions: np.ndarray) -> np.ndarray:
    """Scores (n,) of some elements, on the host, in float32.

    Args:
        p, f: float32 (or float64) values, (n,).
        m, stream: one number (float32, int64), or one an element, (n,).
        positions: flat indices of the elements in their tensors, (n,) int64.
    """
    with np.errstate(all="ignore"):
        d = np.abs(f - p)
        u = uniform(stream, positions) if method.hashed else None
        scores = np.asarray(method.score(d, np.abs(p), np.asarray(m, p.dtype), u))
        scores = np.where(np.isnan(scores), np.where(d == 0, 0, -np.inf), scores)
        return scores.astype(np.float32) + np.float32(0)
