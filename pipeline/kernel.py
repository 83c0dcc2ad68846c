"""What is done to every element on a CPU: compiled loops over blocks that stay in cache.

numba compiles them once for each method and stored dtype and keeps the result on disk. Against the same steps
in torch, with reused buffers, they take a tenth of the time (tests/benchmarks/kernel.py), because score, count
and output of a tile happen while it is in the first-level cache, and no temporary is ever as large as the tensor.

They hold the IEEE order: no fast-math, no contraction. Sums run over a fixed number of lanes, added up pairwise, so
that the bits do not depend on the width of the machine's vectors.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

from pipeline import score as score_module
from pipeline.score import GAMMA, METHODS, UNIT, Method, mix

BLOCK = 1 << 16
"""Elements whose |p| are summed before the exactly rounded sum (SEMANTICS.md, 2). Never change it: m depends on it."""

_LANES = 1024
TILE = 2048
"""Elements handled while in the first-level cache."""

# numba keeps a compiled kernel until its own file changes; the formulas are in another one.
_VERSION = int.from_bytes(hashlib.blake2b(inspect.getsource(score_module).encode(), digest_size=4).digest(), "little")

_jit: Any = functools.partial(njit, nogil=True, error_model="numpy", cache=True)


def _value(x):  # type: ignore[no-untyped-def]
    raise NotImplementedError("compiled only")


@overload(_value, inline="always")
def _value_overload(x):  # type: ignore[no-untyped-def]
    if isinstance(x, types.Integer):  # the bits of a bfloat16
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@_jit
def abs_sums(p, sums, squares):  # type: ignore[no-untyped-def]
    """Σ|p| and Σp² of each BLOCK of a chunk, in float64."""
    lanes = np.empty(_LANES)
    lanes2 = np.empty(_LANES)
    for block in range(sums.size):
        lanes[:] = 0.0
        lanes2[:] = 0.0
        stop = min((block + 1) * BLOCK, p.size)
        for start in range(block * BLOCK, stop, _LANES):
            row = p[start : min(start + _LANES, stop)]
            for i in range(row.size):
                x = np.float64(abs(_value(row[i])))
                lanes[i] += x
                lanes2[i] += x * x
        sums[block] = _total(lanes)
        squares[block] = _total(lanes2)


@_jit
def _total(lanes):  # type: ignore[no-untyped-def]
    width = lanes.size
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] += lanes[i + width]
    return lanes[0]


@dataclass(frozen=True)
class Kernels:
    """The two loops of a method: `count` and `apply`, as `pipeline.engine` calls them."""

    count: Callable[..., Any]
    apply: Callable[..., Any]


@functools.cache
def kernels(name: str) -> Kernels:
    """Compile (or load) the loops of the method `name`."""
    method: Method = METHODS[name]
    score = register_jitable(inline="always")(method.score or score_module.magnitude)
    mixed = register_jitable(inline="always")(mix)
    hashed = method.hashed
    version = _VERSION

    @register_jitable
    def score_tile(p, f, m, stream, start, sizes, scores):  # type: ignore[no-untyped-def]
        for i in range(sizes.size):
            a = _value(p[i])
            d = abs(_value(f[i]) - a)
            u = np.float32(0)
            if hashed:
                u = np.float32(mixed(stream + np.int64(start + i + 1) * np.int64(GAMMA))) * np.float32(UNIT)
            s = np.float32(score(d, abs(a), m, u))
            sizes[i] = d
            scores[i] = s if s == s else (np.float32(0) if d == 0 else np.float32(-np.inf))
        return version

    @_jit
    def count(p, f, m, stream, start, lo, hi, base, shift, histogram, sizes, size_codes):  # type: ignore[no-untyped-def]
        """Keys in [lo, hi] into the histogram, but for those of 0, which are counted: often they are most."""
        scores = np.empty(TILE, np.float32)
        codes = scores.view(np.uint32)
        flags = np.zeros(TILE, np.uint8)
        words = flags.view(np.uint64)
        zero_inside = lo <= 0 <= hi
        above = zeros = 0
        largest = size_codes[0] & 0
        for t in range(0, p.size, TILE):
            size = min(TILE, p.size - t)
            s = scores[:size]
            score_tile(p[t : t + size], f[t : t + size], m, stream, start + t, sizes[:size], s)
            higher = np.uint32(0)
            for i in range(size):
                higher += np.uint32(s[i] > hi)
                largest = max(largest, size_codes[i])
            above += higher
            if zero_inside:
                zero = np.uint32(0)
                for i in range(size):
                    zero += np.uint32(s[i] == 0)
                zeros += zero
            for i in range(size):
                flags[i] = (s[i] >= lo) & (s[i] <= hi) & (s[i] != 0)
            flags[size:] = 0
            for w in range((size + 7) // 8):
                if words[w]:
                    for i in range(8 * w, 8 * w + 8):
                        if flags[i]:
                            code = codes[i]
                            key = ~code if code >> np.uint32(31) else code | np.uint32(0x80000000)
                            histogram[np.uint32(key - base) >> shift] += 1
        return above, zeros, largest

    @_jit
    def apply(p, f, m, stream, start, threshold, ties, pruned, kept, out, sums, kept_sums, sizes, keep):  # type: ignore[no-untyped-def]
        scores = np.empty(TILE, np.float32)
        lanes = np.empty(_LANES)
        lanes2 = np.empty(_LANES)
        n_kept = n_changed = n_both = used = 0
        for block in range(sums.size):
            lanes[:] = 0.0
            lanes2[:] = 0.0
            stop = min((block + 1) * BLOCK, p.size)
            for t in range(block * BLOCK, stop, TILE):
                size = min(TILE, stop - t)
                d = sizes[:size]
                s = scores[:size]
                k = keep[:size]
                score_tile(p[t : t + size], f[t : t + size], m, stream, start + t, d, s)
                equal = np.uint32(0)
                for i in range(size):
                    equal += np.uint32(s[i] == threshold)
                for i in range(size):
                    k[i] = -np.int64(s[i] > threshold)
                if equal and used < ties:
                    for i in range(size):
                        if s[i] == threshold and used < ties:
                            k[i] = -1
                            used += 1
                a = pruned[t : t + size]
                b = kept[t : t + size]
                o = out[t : t + size]
                for i in range(size):
                    o[i] = a[i] ^ ((a[i] ^ b[i]) & k[i])
                changed = np.uint32(0)
                taken = np.uint32(0)
                both = np.uint32(0)
                for i in range(size):
                    changed += np.uint32(d[i] != 0)
                    taken += np.uint32(k[i] != 0)
                    both += np.uint32((k[i] != 0) & (d[i] != 0))
                n_changed += changed
                n_kept += taken
                n_both += both
                for r in range(0, size, _LANES):
                    dr = d[r : r + _LANES]
                    kr = k[r : r + _LANES]
                    for i in range(dr.size):
                        x = np.float64(dr[i])
                        y = np.float64(dr[i] if kr[i] else 0)
                        lanes[i] += x * x
                        lanes2[i] += y * y
            sums[block] = _total(lanes)
            kept_sums[block] = _total(lanes2)
        return n_kept, n_changed, n_both, used

    return Kernels(count, apply)
