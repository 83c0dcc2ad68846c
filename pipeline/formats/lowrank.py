"""Tensors to which an adapter adds a low-rank update, formed block by block and never stored.

Plain LoRA (arXiv 2106.09685): W + s·B·A, with s = alpha/r, or alpha/√r where it is rank-stabilized (2312.03732).
DoRA (2402.09353): each output's weights scaled to a magnitude of their own, (W + s·B·A) · magnitude / ‖W + s·B·A‖.

All in float32, each product and each sum rounded, in the order of the ranks; one rounding to the tensor's dtype. A
norm is the square root of a float64 sum in the order of the elements. So no bit depends on how a tensor is cut up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from fapm.formats.dtypes import itemsize, round_to, upcast, values
from fapm.formats.tensor import Part, Sides

TILE = 1 << 16
"""Elements formed at once."""


def rounded(vals: np.ndarray, dtype: str) -> np.ndarray:
    """float32 or float64 values in `dtype`, as bits."""
    from fapm.formats.loops import round_to_bfloat16

    if dtype != "BF16" or vals.dtype != np.float32:
        return round_to(vals, dtype)
    out = np.empty(vals.size, np.uint16)
    round_to_bfloat16(vals.view(np.uint32), out)
    return out


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix, or a stack of them, plus a low-rank update.

    Attributes:
        over: the tensor (…, rows, columns) that it is added to.
        a: A, (r, in), of a stack (n·r, in); b: B, (out, r), of a stack (out, r·n) with the rank first.
        scale: s.
        rows, columns: of a stored matrix.
        stack: how many of them the adapter knows, n; `first` is the one with which `over` begins, and `row` the row.
        transposed: stored as (in, out).
        magnitude: of the outputs, for DoRA.
    """

    over: Part
    a: Part
    b: Part
    scale: float
    rows: int
    columns: int
    stack: int = 1
    first: int = 0
    row: int = 0
    transposed: bool = False
    magnitude: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.over, self.a, self.b, *((self.magnitude,) if self.magnitude else ()))

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        from fapm.formats.loops import multiply

        width = itemsize(self.over.info.dtype)
        factors = sides.remember((self, "factors"), partial(self._norm_factors, sides))[0] if self.magnitude else None
        for begin in range(start, stop, TILE):
            end = min(begin + TILE, stop)
            formed = self._sum(begin, end, sides)
            if factors is not None:
                multiply(formed, begin, self.columns, factors, self.transposed)
            done = (begin - start) * width
            out[done : done + formed.size * width] = rounded(formed, self.over.info.dtype).view(np.uint8)

    def _sum(self, start: int, stop: int, sides: Sides) -> np.ndarray:
        """W + s·B·A of some elements."""
        from fapm.formats.loops import add_product

        found = _values(self.over, start, stop, sides).copy()
        size, done = self.rows * self.columns, start
        while done < stop:
            number = done // size
            end = min(stop, (number + 1) * size)
            left, right = sides.remember((self, number), partial(self._factors, number, sides))
            add_product(found[done - start : end - start], done - number * size, self.columns, left, right, self._scale)
            done = end
        return found

    @property
    def _scale(self) -> np.float32:
        return np.float32(self.scale)

    def _factors(self, number: int, sides: Sides) -> tuple[np.ndarray, np.ndarray]:
        """(rows, r) and (r, columns) in float32, whose product is the update of one matrix before it is scaled."""
        a, b = (_floats(part, sides) for part in (self.a, self.b))
        rank = a.shape[0] // self.stack
        expert = self.first + number
        a = a[expert * rank : (expert + 1) * rank]
        b = b.reshape(b.shape[0], rank, self.stack)[:, :, expert]
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return np.ascontiguousarray(left[self.row : self.row + self.rows]), np.ascontiguousarray(right)

    def _norm_factors(self, sides: Sides) -> tuple[np.ndarray]:
        """magnitude / ‖W + s·B·A‖ of each output, (out,) float32."""
        from fapm.formats.loops import add_squares

        assert self.magnitude
        size = self.rows * self.columns
        sums = np.zeros(self.columns if self.transposed else self.rows)
        for begin in range(0, size, TILE):
            elements = self._sum(begin, min(begin + TILE, size), sides)
            add_squares(sums, begin, self.columns, elements, self.transposed)
        norms = np.sqrt(sums).astype(np.float32)
        return (_floats(self.magnitude, sides).reshape(-1) / norms,)


@dataclass(frozen=True, slots=True)
class Added:
    """A tensor plus another of its size times `scale`: a bias and that of an adapter's B."""

    over: Part
    other: Part
    scale: float

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.over, self.other

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        p = _values(self.over, start, stop, sides)
        total = p + np.float32(self.scale) * _floats(self.other, sides)[start:stop]
        out[:] = round_to(total, self.over.info.dtype).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Converted:
    """A tensor in another dtype, each value rounded once."""

    of: Part
    dtype: str

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.of,)

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        out[:] = round_to(_values(self.of, start, stop, sides), self.dtype).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix some rows of which are another's.

    Attributes:
        rows: which, in the order of the other's.
        other: (n, columns).
    """

    over: Part
    other: Part
    rows: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.over, self.other

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        info = self.over.info
        width = itemsize(info.dtype)
        out[:] = sides.take(self.over, start * width, stop * width)
        columns = info.shape[1]
        theirs = _floats(self.other, sides)
        for place, row in enumerate(self.rows):
            begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
            if begin < end:
                new = round_to(theirs[place, begin - row * columns : end - row * columns], info.dtype)
                out[(begin - start) * width : (end - start) * width] = new.view(np.uint8)


def _values(part: Part, start: int, stop: int, sides: Sides) -> np.ndarray:
    """Elements of a tensor in float32, of float64 in that."""
    dtype = part.info.dtype
    width = itemsize(dtype)
    return upcast(values(sides.take(part, start * width, stop * width), dtype))


def _floats(part: Part, sides: Sides) -> np.ndarray:
    """All of a small tensor, in float32."""
    info = part.info
    return upcast(values(sides.whole(part), info.dtype)).astype(np.float32, copy=False).reshape(info.shape)
