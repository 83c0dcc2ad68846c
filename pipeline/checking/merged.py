"""Comparison of a merge's tensors: the formulas of SEMANTICS.md once more, by other code than the one that wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fapm.checking.comparing import ADDED, Budget, Comparison, Finding, Progress, chunks
from fapm.formats.dtypes import itemsize, round_to
from fapm.formats.tensor import TensorInfo
from fapm.layout import TABLE, table_name
from fapm.planning.plan import PairedTensor, Plan
from fapm.storage.store import Store


@dataclass(frozen=True)
class CheckedLane:
    """One of a merge's sources: its plan, its tensors by name, its groups' budgets, and its table's rows by name."""

    plan: Plan
    tensors: dict[str, PairedTensor]
    budgets: dict[str, Budget]
    rows: dict[str, dict[str, Any]]


class MergedComparison:
    """One tensor of a merge beside its sources."""

    def __init__(
        self,
        plan: Plan,
        folder: Store,
        tensor: PairedTensor,
        there: TensorInfo,
        lanes: Sequence[CheckedLane],
        progress: Progress,
    ):
        self._recipe, self._tensor, self._progress = plan.recipe, tensor, progress
        pairs = zip(plan.recipe.merged, lanes, strict=True)
        mine = [(source.weight, lane, lane.tensors[tensor.name]) for source, lane in pairs]
        mine = [one for one in mine if one[2].group]
        self._weights = [weight for weight, *_ in mine]
        self._sides = [Comparison(lane.plan, folder, its, there, lambda nbytes: None) for _, lane, its in mine]
        self._budgets = [lane.budgets[its.group] for _, lane, its in mine]
        self._rows = [(lane.plan.source, lane.rows.get(tensor.name, {})) for _, lane, _ in mine]
        self._out = Comparison(plan, folder, tensor, there, lambda nbytes: None)

    def problems(self, row: dict[str, Any]) -> list[str]:
        """What is wrong, a sentence each."""
        name, found = self._tensor.name, Finding()
        problems: list[str] = []
        means = [side.mean(of, problems) for side, (_, of) in zip(self._sides, self._rows, strict=True)]
        before = [(budget.ties_left, budget.above) for budget in self._budgets]
        factors = self._factors(means)
        for budget, (ties, above) in zip(self._budgets, before, strict=True):
            budget.ties_left, budget.above = ties, above
        kept, changed, shared = [0] * len(means), 0, 0
        for start, stop, p, values, counts in self._chunks(means):
            unchanged = self._out.unchanged(start, stop)
            moved = sum((value != p).astype(int) for value in values)
            wanted = round_to(self._combined(p, values, factors), self._tensor.dtype)
            if len(factors) < 2:
                wanted = np.where(moved == 0, unchanged, wanted)
            found.add(self._out.written(start, stop) != wanted, start)
            kept = [so_far + more for so_far, more in zip(kept, counts, strict=True)]
            changed += int(np.count_nonzero(moved))
            shared += int(np.count_nonzero(moved > 1))
            self._progress((stop - start) * itemsize(self._tensor.dtype))
        if any(budget.ties_left is None for budget in self._budgets):
            return problems
        if found.count:
            problems.append(
                f"tensor {name!r}: {found} are not the {self._recipe.combine} of what is kept of the sources"
            )
        for count, (source, of) in zip(kept, self._rows, strict=True):
            if of.get("kept") not in (None, count):
                said = f"{table_name(source)} says that {of['kept']} elements are kept, it is {count}"
                problems.append(f"tensor {name!r}: {said}")
        for what, count in (("kept", changed), ("shared", shared)):
            if row.get(what) not in (None, count):
                problems.append(f"tensor {name!r}: {TABLE} says {what} {row[what]}, it is {count}")
        return problems

    def _chunks(self, means: Sequence[float]) -> Iterator[tuple[int, int, np.ndarray, list[np.ndarray], list[int]]]:
        """Of each chunk its bounds, p, the values that each source has by its mask, and how many it keeps."""
        for start, stop in chunks(0, self._tensor.common):
            given = zip(self._sides, means, self._budgets, strict=True)
            masked = [side.masked(start, stop, mean, budget) for side, mean, budget in given]
            there = [one for one in masked if one is not None]
            if len(there) == len(masked):
                real = np.result_type(*(value for _, value, _ in there))
                p = there[0][0].astype(real)
                yield start, stop, p, [value.astype(real) for _, value, _ in there], [count for *_, count in there]

    def _factors(self, means: Sequence[float]) -> tuple[float, ...]:
        """What a combination of whole tensors multiplies by: slerp's two factors or its t, model-stock's t."""
        how, weights = self._recipe.combine, self._weights
        if how not in ("slerp", "model-stock"):
            return ()
        sums: dict[tuple[int, int], list[float]] = {}
        for _, _, p, values, _ in self._chunks(means):
            vectors = [p, *values][-2:] if how == "slerp" else [value - p for value in values]
            wide = [vector.astype(np.float64) for vector in vectors]
            for i in range(len(wide)):
                for j in range(i + 1):
                    blocks = (slice(at, at + ADDED) for at in range(0, p.size, ADDED))
                    sums.setdefault((i, j), []).extend(float(np.dot(wide[i][b], wide[j][b])) for b in blocks)
        dot = {pair: math.fsum(terms) for pair, terms in sums.items()}

        def cosine(i: int, j: int) -> float:
            norm = math.sqrt(dot[i, i]) * math.sqrt(dot[j, j])
            return dot[i, j] / norm if norm else math.nan

        if how == "slerp":
            t = weights[1] / sum(weights) if len(weights) == 2 else weights[0]
            c = cosine(1, 0)
            if not abs(c) <= 0.9995:
                return (_float32(t),)
            theta = math.acos(c)
            return tuple(_float32(math.sin(x * theta) / math.sin(theta)) for x in (1 - t, t))
        n = len(weights)
        cosines = [cosine(i, j) for i in range(n) for j in range(i)]
        c = sum(0.0 if math.isnan(one) else one for one in cosines) / len(cosines)
        return (_float32(n * c / (1 + (n - 1) * c)),)

    def _combined(self, p: np.ndarray, values: Sequence[np.ndarray], factors: tuple[float, ...]) -> np.ndarray:
        """Values of the output, not rounded."""
        how, real = self._recipe.combine, p.dtype.type
        scaling, weights = real(self._recipe.scaling), [real(weight) for weight in self._weights]
        deltas = [value - p for value in values]
        with np.errstate(all="ignore"):
            if how in ("first", "error"):
                return _last_of(p, values[::-1])
            if how == "last":
                return _last_of(p, values)
            if how == "slerp":
                one, other = [p, *values][-2:]
                if len(factors) == 1:
                    return one + real(factors[0]) * (other - one)
                arc: np.ndarray = real(factors[0]) * one + real(factors[1]) * other
                return arc
            if how == "model-stock":
                return p + real(factors[0]) * (_added(deltas) / real(len(deltas)))
            terms = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
            total = _added(terms)
            if how == "sum":
                alone = len(values) == 1 and weights[0] == scaling == 1
                return values[0] if alone else p + scaling * total
            if how == "mean":
                return p + scaling * (total / _added(weights))
            part, share = np.zeros_like(p), np.zeros_like(p)
            for weight, delta, term in zip(weights, deltas, terms, strict=True):
                same = (np.sign(delta) == np.sign(total)) & (delta != 0)
                part[same] += term[same]
                share[same] += weight
            return np.where(share == 0, p, p + scaling * (part / share))


def _float32(x: float) -> float:
    return float(np.float32(x))


def _added(terms: Sequence[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _last_of(p: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    found = p
    for value in values:
        found = np.where(value != p, value, found)
    return found
