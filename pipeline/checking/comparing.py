"""Comparing: one tensor of an output beside its sources, a chunk at a time, in numpy.

It computes what `fapm.checking.verify` expects of the tensor without the code that wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fapm.formats.dtypes import convert, is_weight, itemsize, nonfinite, round_to, upcast, values
from fapm.formats.tensor import Part, Sides, TensorInfo
from fapm.layout import TABLE
from fapm.planning.plan import PairedTensor, Plan
from fapm.scoring.methods import METHODS, Matrix, evaluate, stream_of
from fapm.scoring.threshold import key_of, score_of
from fapm.storage.store import Store

CHUNK = 1 << 18
"""Elements looked at at once; a multiple of ADDED."""

ADDED = 1 << 16
"""Elements whose |p| is added up in float64 before the sums are added exactly."""

_ROUNDING = 2.0**-52  # of a float64

_SAME_MEAN = 1e-12  # relative; what the order of float64 additions inside a block may do, and far below float32

Progress = Callable[[int], None]


@dataclass(slots=True)
class Budget:
    """Budget of a group, used up as its tensors are read in the order of their names.

    `above` counts the keys above `key`. `ties_left` is None where the group's threshold or one of its tensors is
    missing, so that there is no mask to check.
    """

    k: int
    key: int = 0
    ties: int = 0
    ties_left: int | None = None
    above: int = 0


@dataclass(slots=True)
class Finding:
    """Elements of a tensor that have the same thing wrong."""

    count: int = 0
    first: int = -1
    score: float = math.nan

    def add(self, wrong: np.ndarray, start: int, scores: np.ndarray | None = None) -> None:
        if wrong.any():
            if not self.count:
                at = int(np.argmax(wrong))
                self.first = start + at
                self.score = math.nan if scores is None else float(scores[at])
            self.count += int(np.count_nonzero(wrong))

    def __str__(self) -> str:
        return f"{self.count} element(s), the first at flat index {self.first},"


class Comparison:
    """One tensor of the output beside its sources."""

    def __init__(self, plan: Plan, folder: Store, tensor: PairedTensor, there: TensorInfo, progress: Progress):
        self._recipe = plan.recipe
        self._sides = Sides(plan.base.folder, plan.finetuned.folder)
        self._written = Sides(plan.base.folder, folder)
        self._tensor = tensor
        self._infos = {"base": tensor.base, "finetuned": tensor.finetuned, "out": there}
        self._progress = progress

    def _bytes(self, side: str, begin: int, end: int) -> np.ndarray:
        """Stored bytes `begin` to `end` of the tensor on one side."""
        info = self._infos[side]
        assert info
        stored = np.empty(end - begin, np.uint8)
        if side == "out":
            self._written.read_into(Part("finetuned", info), begin, end, stored)
        else:
            self._sides.read_into(Part("base" if side == "base" else "finetuned", info), begin, end, stored)
        return stored

    def _elements(self, side: str, start: int, stop: int) -> np.ndarray:
        info = self._infos[side]
        assert info
        return self._bytes(side, start * itemsize(info.dtype), stop * itemsize(info.dtype))

    def _in_output_dtype(self, side: str, stored: np.ndarray) -> np.ndarray:
        info = self._infos[side]
        assert info
        return convert(stored, info.dtype, self._tensor.dtype)

    def passed_through(self) -> list[str]:
        """Every element is its source's."""
        finding = Finding()
        self._compare(self._tensor.action, 0, finding)
        return self._differs(self._tensor.action, finding)

    def _compare(self, source: str, first: int, finding: Finding) -> None:
        """Compare elements from `first` on with those of one side."""
        tensor, info = self._tensor, self._infos[source]
        assert info
        if is_weight(info.dtype) and is_weight(tensor.dtype):
            width = itemsize(tensor.dtype)
            for start, stop in chunks(first, tensor.numel):
                wanted = self._in_output_dtype(source, self._elements(source, start, stop))
                finding.add(self._elements("out", start, stop).view(wanted.dtype) != wanted, start)
                self._progress((stop - start) * width)
        else:  # not scored, of any width: bytes
            for start, stop in chunks(0, tensor.nbytes):
                finding.add(self._bytes("out", start, stop) != self._bytes(source, start, stop), start)
                self._progress(stop - start)

    def _differs(self, source: str, finding: Finding) -> list[str]:
        if not finding.count:
            return []
        return [f"tensor {self._tensor.name!r}: {finding} differ from {source}, which it is taken from"]

    def pruned(self, row: dict[str, Any], budgets: dict[str, Budget]) -> list[str]:
        """Every element is what the mask of its group's threshold makes of it; added rows are finetuned's."""
        tensor, method = self._tensor, METHODS[self._recipe.method]
        scored = method.has_budget
        problems: list[str] = []
        mean = self.mean(row, problems)
        budget = budgets[tensor.group]
        strange, dropped, added = Finding(), Finding(), Finding()
        count = 0
        for start, stop in chunks(0, tensor.common):
            p, f, pruned, kept = self._pair(start, stop)
            out = self._elements("out", start, stop).view(pruned.dtype)
            keep, scores = self._mask(budget, p, f, np.float32(mean), start)
            strange.add((out != pruned) & (out != kept), start)
            if keep is not None:
                count += int(np.count_nonzero(keep))
                dropped.add(keep & (out != kept) & (out == pruned), start, scores)
                added.add(~keep & (out != pruned) & (out == kept), start, scores)
            self._progress((stop - start) * out.itemsize)
        sources = "base's value nor finetuned's"
        if method.value or tensor.scale != 1:
            sources = f"base's value nor what {self._recipe.method} makes of the two"
        if strange.count:
            problems.append(f"tensor {tensor.name!r}: {strange} are neither {sources}")
        for finding, what in ((dropped, "dropped and should be kept"), (added, "kept and should be dropped")):
            if finding.count:
                why = f"; it scores {finding.score:.9g}, and its group's threshold is {score_of(budget.key):.9g}"
                problems.append(f"tensor {tensor.name!r}: {finding} are {what}" + why * scored)
        if budget.ties_left is not None and row.get("kept") not in (None, count):
            problems.append(f"tensor {tensor.name!r}: {TABLE} says that {row['kept']} elements are kept, it is {count}")
        rest = Finding()
        self._compare("finetuned", tensor.common, rest)
        return problems + self._differs("finetuned", rest)

    def projected(self, row: dict[str, Any]) -> list[str]:
        """Every matrix is base's and what the method keeps of Δ, but for rounding; added rows are finetuned's.

        The singular values are found once more, from strips along the longer side.
        """
        tensor, method = self._tensor, METHODS[self._recipe.method]
        assert isinstance(method, Matrix)
        count, rows, columns = tensor.matrices
        rank, strange = 0, Finding()
        for matrix in range(count):
            spans = list(_strips(matrix * rows * columns, rows, columns))
            gram, largest = np.zeros((min(rows, columns),) * 2), 0.0
            for strip in spans:
                delta = self._turned(strip, rows, columns)
                largest = max(largest, float(np.abs(delta).max(initial=0)))
                gram += delta.T @ delta
            squares, vectors = np.linalg.eigh(gram)
            sigma = np.sqrt(np.maximum(squares, 0))
            if squares[0] <= 1e-10 * squares[-1]:  # too small to be seen in squares: the matrix as a whole
                sigma, vectors = _decomposed(np.concatenate([self._turned(strip, rows, columns) for strip in spans]))
            gains = method.gains(sigma[::-1], (rows, columns), self._recipe.parameter)[::-1]
            rank += int(np.count_nonzero(gains))
            for strip in spans:
                p, f, out = self._strip(strip)
                delta = _along(f - p, rows, columns)
                wanted = p + tensor.scale * _along(((delta @ vectors) * gains) @ vectors.T, rows, columns)
                allowed = 1e-5 * abs(tensor.scale) * largest + 1e-6 * np.abs(wanted)
                low, high = (self._rounded((wanted + by).astype(p.dtype)) for by in (-allowed, allowed))
                strange.add(((out < low) | (out > high)).reshape(-1), strip[0][0])
                self._progress(out.size * itemsize(tensor.dtype))
        problems = []
        if strange.count:
            problems.append(f"tensor {tensor.name!r}: {strange} are not what {self._recipe.method} keeps")
        if row.get("rank") not in (None, rank):
            said = f"{TABLE} says that {row['rank']} singular values are kept, it is {rank}"
            problems.append(f"tensor {tensor.name!r}: {said}")
        rest = Finding()
        self._compare("finetuned", tensor.common, rest)
        return problems + self._differs("finetuned", rest)

    def _turned(self, spans: list[tuple[int, int]], rows: int, columns: int) -> np.ndarray:
        """Δ of a strip, its columns the smaller side of the matrix; the difference in p's and f's dtype, as float64."""
        p, f, _ = self._strip(spans)
        return _along(f - p, rows, columns)

    def _strip(self, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values of elements in spans of one length, a row each: p and f in one real dtype, and the output's."""
        pairs = [self._pair(*span)[:2] for span in spans]
        out = np.stack([upcast(values(self._elements("out", *span), self._tensor.dtype)) for span in spans])
        return np.stack([p for p, _ in pairs]), np.stack([f for _, f in pairs]), out

    def _rounded(self, wanted: np.ndarray) -> np.ndarray:
        dtype = self._tensor.dtype
        with np.errstate(all="ignore"):
            bits = round_to(wanted, dtype)
        return upcast(values(bits.reshape(-1).view(np.uint8), dtype)).reshape(wanted.shape)

    def _mean(self) -> float:
        """mean |p| over the common elements: an exact sum of float64 sums of blocks."""
        tensor = self._tensor
        assert tensor.base
        sums: list[float] = []
        for start, stop in chunks(0, tensor.common):
            p = np.abs(upcast(values(self._elements("base", start, stop), tensor.base.dtype)))
            sums += (float(p[i : i + ADDED].sum(dtype=np.float64)) for i in range(0, p.size, ADDED))
        return math.fsum(sums) / tensor.common if tensor.common else 0.0

    def _pair(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """p and f as values of one real dtype; bits of what an element becomes if it is pruned, and if it is kept."""
        tensor, recipe = self._tensor, self._recipe
        assert tensor.base
        assert tensor.finetuned
        stored_p, stored_f = (self._elements(side, start, stop) for side in ("base", "finetuned"))
        p = upcast(values(stored_p, tensor.base.dtype))
        f = upcast(values(stored_f, tensor.finetuned.dtype))
        pruned = self._in_output_dtype("base", stored_p)
        if recipe.nonfinite == "base":
            # What is not finite is base's value, in finetuned's dtype.
            odd = nonfinite(stored_f, tensor.finetuned.dtype)
            if odd.any():
                as_f = convert(stored_p, tensor.base.dtype, tensor.finetuned.dtype)
                stored_f = np.where(odd, as_f, stored_f.view(as_f.dtype)).view(np.uint8)
                f = upcast(values(stored_f, tensor.finetuned.dtype))
        real = np.result_type(p, f)
        p, f = p.astype(real, copy=False), f.astype(real, copy=False)
        value = self._value(p, f)
        kept = self._in_output_dtype("finetuned", stored_f) if value is f else round_to(value, tensor.dtype)
        return p, f, pruned, kept

    def _value(self, p: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Values that kept elements have, before they are rounded: f itself where they are finetuned's."""
        keep, parameter, s = METHODS[self._recipe.method].value, self._tensor.parameter, self._tensor.scale
        kept = f
        with np.errstate(all="ignore"):
            if keep is not None and 0 < parameter < 1:
                kept = keep(p, f, p.dtype.type(parameter))
            if s != 1:
                kept = p + p.dtype.type(s) * (kept - p)
        return kept

    def mean(self, row: dict[str, Any], problems: list[str]) -> float:
        """mean |p| as the table says it, if it is that."""
        found, recorded = self._mean(), row.get("mean_abs_base")
        if not self._tensor.common or recorded is None:
            return found
        if math.isclose(found, recorded, rel_tol=_SAME_MEAN):
            return float(recorded)
        problems.append(f"tensor {self._tensor.name!r}: mean |p| is {found} and {TABLE} says {recorded}")
        return found

    def masked(self, start: int, stop: int, mean: float, budget: Budget) -> tuple[np.ndarray, np.ndarray, int] | None:
        """p, what the mask of the group's threshold makes of p and f, not rounded, and how many elements are kept.
        None where there is no mask to check. Takes from the group's ties in order."""
        p, f, *_ = self._pair(start, stop)
        keep, _ = self._mask(budget, p, f, np.float32(mean), start)
        if keep is None:
            return None
        return p, np.where(keep, self._value(p, f), p), int(np.count_nonzero(keep))

    def written(self, start: int, stop: int) -> np.ndarray:
        """Bits of elements of the output."""
        return self._elements("out", start, stop).view(f"u{itemsize(self._tensor.dtype)}")

    def unchanged(self, start: int, stop: int) -> np.ndarray:
        """Bits of base's elements in the output's dtype."""
        return self._in_output_dtype("base", self._elements("base", start, stop))

    def _mask(
        self, budget: Budget, p: np.ndarray, f: np.ndarray, m: np.float32, start: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which elements are kept, and their scores; takes from the group's ties in order."""
        method = METHODS[self._recipe.method]
        if not method.has_budget:
            return np.full(p.size, self._tensor.parameter > 0), None
        if budget.ties_left is None:
            return None, None
        positions = np.arange(start, start + p.size)
        scores = evaluate(method, p, f, m, stream_of(self._recipe.seed, self._tensor.name), positions)
        keys = key_of(scores)
        keep = keys > budget.key
        budget.above += int(np.count_nonzero(keep))
        if budget.ties_left:
            tied = np.flatnonzero(keys == budget.key)[: budget.ties_left]
            keep[tied] = True
            budget.ties_left -= tied.size
        return keep, scores


def _strips(start: int, rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    """Spans of elements of a matrix that begins at `start`: whole rows of a tall one, of a wide one some columns."""
    if rows >= columns:
        step = max(1, CHUNK // columns)
        for row in range(0, rows, step):
            yield [(start + i * columns, start + (i + 1) * columns) for i in range(row, min(row + step, rows))]
    else:
        step = max(1, CHUNK // rows)
        for left in range(0, columns, step):
            right = min(left + step, columns)
            yield [(start + i * columns + left, start + i * columns + right) for i in range(rows)]


def _decomposed(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values in ascending order, 0 for what is rounding, and vectors of the smaller side, a column each."""
    _, sigma, vectors = np.linalg.svd(delta, full_matrices=False)
    return np.where(sigma > max(delta.shape) * _ROUNDING * sigma[0], sigma, 0)[::-1], vectors[::-1].T


def _along(strip: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A strip of a matrix turned so that its columns are the smaller side, and back; float64."""
    return (strip if rows >= columns else strip.T).astype(np.float64)


def chunks(first: int, end: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, end)) for start in range(first, end, CHUNK))
