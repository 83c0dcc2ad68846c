"""Compiled loops of the combinations (`scoring.combining`): a merge's values, and what is counted of them, in one go.

p are base's values, v_j what the mask of source j makes of them, δ_j = v_j − p. Every operation is in the dtype of the
operands and rounds once, the sources in their order; no element depends on another. What no source changes stays p's,
bit for bit, but on an arc. Sums run over a fixed number of lanes, as of `scoring.compiled`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fapm.scoring.combining import COMBINATIONS
from fapm.scoring.compiled import LANES, TILE, call, compiled, named, total_of
from fapm.scoring.methods import BLOCK


class Combined(NamedTuple):
    """Values (n,) of a merge before they are rounded; of each of r tensors how many elements some source changes,
    several do, and two move in different directions, (r,) int64; and Σ(out − p)² of each block, float64."""

    values: np.ndarray
    changed: np.ndarray
    shared: np.ndarray
    opposed: np.ndarray
    squares: np.ndarray


def combine(
    how: str,
    p: np.ndarray,
    values: np.ndarray,
    starts: np.ndarray,
    weights: Sequence[float],
    scaling: float,
    factors: Sequence[Sequence[float]],
) -> Combined:
    """Combine r tensors, or a run of one.

    Args:
        p: (n,) float32 or float64; `values`: (N, n), of each source.
        starts: (r + 1,) int64, where each tensor's elements begin, and the last one's end.
        factors: of a combination that looks at whole tensors what it has found of each.
    """
    real, runs = p.dtype.type, starts.size - 1
    out, counts = np.empty_like(p), np.zeros((3, runs), np.int64)
    blocks = max(1, -(-p.size // BLOCK)) if runs == 1 else runs
    squares = np.zeros(blocks)
    two = np.zeros((runs, 2), p.dtype)
    for row, said in zip(two, factors, strict=True):
        row[: len(said)] = said
    straight = np.array([len(said) < 2 for said in factors])
    given = np.array(weights, p.dtype), real(scaling), two, straight
    call(_loop(how), p, values, starts, *given, out, counts, squares)
    return Combined(out, counts[0], counts[1], counts[2], squares)


@functools.cache
def _loop(how: str) -> Callable[..., Any]:
    code = list(COMBINATIONS).index(how)
    by_sum, by_mean, by_sign, by_arc, by_center, _, by_last, _ = range(len(COMBINATIONS))
    last = code == by_last

    def combine(p, v, starts, weights, scaling, factors, straight, out, counts, squares):  # type: ignore[no-untyped-def]
        sources = v.shape[0]
        total = np.empty(TILE, p.dtype)
        share = np.empty(TILE, p.dtype)
        number = np.empty(TILE, np.int32)
        up = np.empty(TILE, np.int32)
        down = np.empty(TILE, np.int32)
        lanes = np.empty(LANES)
        whole = weights[0]
        for j in range(1, sources):
            whole += weights[j]
        alone = sources == 1 and weights[0] == 1 and scaling == 1
        block = 0
        for r in range(starts.size - 1):
            n_changed = n_shared = n_opposed = 0
            for begin in range(starts[r], starts[r + 1], BLOCK):
                lanes[:] = 0.0
                stop = min(begin + BLOCK, starts[r + 1])
                for t in range(begin, stop, TILE):
                    size = min(TILE, stop - t)
                    x = p[t : t + size]
                    o = out[t : t + size]
                    number[:] = 0
                    up[:] = 0
                    down[:] = 0
                    for j in range(sources):
                        y = v[j, t : t + size]
                        for i in range(size):
                            number[i] += y[i] != x[i]
                            up[i] |= y[i] > x[i]
                            down[i] |= y[i] < x[i]
                    if code < by_arc or code == by_center:
                        y = v[0, t : t + size]
                        w = weights[0]
                        if code == by_center:
                            w = x.dtype.type(1)
                        for i in range(size):
                            total[i] = w * (y[i] - x[i])
                        for j in range(1, sources):
                            y = v[j, t : t + size]
                            if code != by_center:
                                w = weights[j]
                            for i in range(size):
                                total[i] += w * (y[i] - x[i])
                    if code == by_sum:
                        if alone:
                            o[:] = v[0, t : t + size]
                        else:
                            for i in range(size):
                                o[i] = x[i] + scaling * total[i]
                    elif code == by_mean:
                        for i in range(size):
                            o[i] = x[i] + scaling * (total[i] / whole)
                    elif code == by_sign:
                        o[:] = 0
                        share[:] = 0
                        for j in range(sources):
                            y = v[j, t : t + size]
                            w = weights[j]
                            for i in range(size):
                                d = y[i] - x[i]
                                agrees = ((d > 0) & (total[i] > 0)) | ((d < 0) & (total[i] < 0))
                                o[i] += w * d if agrees else x.dtype.type(0)
                                share[i] += w if agrees else x.dtype.type(0)
                        for i in range(size):
                            o[i] = x[i] + scaling * (o[i] / share[i]) if share[i] != 0 else x[i]
                    elif code == by_arc:
                        a, b = factors[r, 0], factors[r, 1]
                        first, second = x, v[sources - 1, t : t + size]
                        if sources > 1:
                            first = v[0, t : t + size]
                        if straight[r]:
                            for i in range(size):
                                o[i] = first[i] + a * (second[i] - first[i])
                        else:
                            for i in range(size):
                                o[i] = a * first[i] + b * second[i]
                    elif code == by_center:
                        a = factors[r, 0]
                        for i in range(size):
                            o[i] = x[i] + a * (total[i] / x.dtype.type(sources))
                    else:
                        o[:] = x
                        for k in range(sources):
                            y = v[k if last else sources - 1 - k, t : t + size]
                            for i in range(size):
                                o[i] = y[i] if y[i] != x[i] else o[i]
                    if code != by_arc or straight[r]:
                        for i in range(size):
                            o[i] = x[i] if number[i] == 0 else o[i]
                    some = np.uint32(0)
                    several = np.uint32(0)
                    both_ways = np.uint32(0)
                    for i in range(size):
                        some += np.uint32(number[i] > 0)
                        several += np.uint32(number[i] > 1)
                        both_ways += np.uint32((up[i] & down[i]) != 0)
                    n_changed += int(some)
                    n_shared += int(several)
                    n_opposed += int(both_ways)
                    for i in range(size):
                        moved = np.float64(o[i]) - np.float64(x[i])
                        lanes[i % LANES] += moved * moved
                squares[block] = total_of(lanes)
                block += 1
            counts[0, r] = n_changed
            counts[1, r] = n_shared
            counts[2, r] = n_opposed

    return compiled(named(combine, how))


def conflicts(p: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n,) bool: of which elements two sources make different values, where both change them."""
    wrong = np.zeros(p.size, bool)
    for i in range(len(values)):
        for j in range(i):
            wrong |= (values[i] != p) & (values[j] != p) & (values[i] != values[j])
    return wrong
