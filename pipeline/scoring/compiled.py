"""Arithmetic on a CPU: compiled loops over blocks that stay in cache.

numba compiles them once for each method and stored dtype and keeps the result on disk. Against the same steps
in torch, with reused buffers, they take a tenth of the time (tests/benchmarks/kernel.py), because score, count
and output of a tile happen while it is in the first-level cache, and no temporary is ever as large as the tensor.

They hold the IEEE order: no fast-math, no contraction. Sums run over a fixed number of lanes, added up pairwise, so
that the bits do not depend on the width of the machine's vectors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.core import event
from numba.extending import overload, register_jitable

from fapm.scoring import methods as formulas
from fapm.scoring.engine import Applied, AtOnce, Chunk, Counted
from fapm.scoring.methods import BLOCK, GAMMA, METHODS, UNIT, Method, mix
from fapm.scoring.threshold import Histograms

TILE = 1024
"""Elements handled while in the first-level cache."""

LANES = 256
"""Sums of a block that run side by side: a tile is four rows of them."""

# numba keeps a compiled kernel until its own file changes; the formulas are in another one.
_VERSION = int.from_bytes(hashlib.blake2b(inspect.getsource(formulas).encode(), digest_size=4).digest(), "little")

_njit: Any = functools.partial(njit, nogil=True, error_model="numpy")


def _without_scipy() -> None:
    """Import what numba would, but for scipy.linalg, a seventh of a short prune, with which it looks for a BLAS.

    No loop here needs one. What others compile in this process finds it: numba looks again where it is used.
    """
    if "scipy.linalg" in sys.modules:
        return
    sys.modules["scipy.linalg"] = None
    try:
        from numba.np import arraymath
    finally:
        del sys.modules["scipy.linalg"]
    arraymath._HAVE_BLAS = importlib.util.find_spec("scipy") is not None


_without_scipy()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile when it is first called, and keep the result, unless no folder can be written."""
    folder = _folder()
    if folder is None:
        return _njit()(function)
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
    try:
        return _njit(cache=True)(function)
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


@functools.cache
def _folder() -> str | None:
    """Where compiled loops are kept: NUMBA_CACHE_DIR, the user's cache, or a private folder for temporary files.

    Never beside the sources, where an installer would leave them behind.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (os.environ.get("NUMBA_CACHE_DIR"), os.path.join(home, "fapm", "compiled")):
        if folder and os.path.isabs(folder):
            with contextlib.suppress(OSError):
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                return folder
    return _private_folder()


def _private_folder() -> str | None:
    """A folder for temporary files that nobody else can write to: what numba keeps is code, and will be run."""
    try:
        root = tempfile.gettempdir()
        if root == os.getcwd() and root not in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
            return None  # Python's last resort, but somebody's folder
        folder = os.path.join(root, f"fapm-compiled-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if ours else None


class _Announcer(event.Listener):
    """Says, once, that something is being compiled; numba tells it so only where nothing was kept."""

    def __init__(self, say: Callable[[str], None]):
        self._say: Callable[[str], None] | None = say

    def on_start(self, event: Any) -> None:
        say, self._say = self._say, None
        if say:
            kept = _folder()
            say(
                "compiling the arithmetic for this machine, some seconds"
                + (f" once: it is kept in {kept}" if kept else "; no folder can be written to keep it for the next run")
            )

    def on_end(self, event: Any) -> None:
        pass


def announce(say: Callable[[str], None]) -> Callable[[], None]:
    """Have `say` told if something has to be compiled; call what is returned to end it."""
    announcer = _Announcer(say)
    event.register("numba:compile", announcer)
    return lambda: event.unregister("numba:compile", announcer)


def _value(x):  # type: ignore[no-untyped-def]
    raise NotImplementedError("compiled only")


@overload(_value, inline="always")
def _value_overload(x):  # type: ignore[no-untyped-def]
    if isinstance(x, types.Integer):  # the bits of a bfloat16
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@compiled
def abs_sums(p, starts, sums, squares):  # type: ignore[no-untyped-def]
    """Σ|p| and Σp² of each block of a chunk, in float64."""
    lanes = np.empty(LANES)
    lanes2 = np.empty(LANES)
    tile = np.empty(TILE, p.dtype)
    block = 0
    for r in range(starts.size - 1):
        for begin in range(starts[r], starts[r + 1], BLOCK):
            lanes[:] = 0.0
            lanes2[:] = 0.0
            stop = min(begin + BLOCK, starts[r + 1])
            for start in range(begin, stop, TILE):
                row = p[start : min(start + TILE, stop)]
                if row.size < TILE:
                    tile[:] = 0
                    tile[: row.size] = row
                    row = tile
                for i in range(LANES):
                    a = np.float64(abs(_value(row[i])))
                    b = np.float64(abs(_value(row[i + LANES])))
                    c = np.float64(abs(_value(row[i + 2 * LANES])))
                    d = np.float64(abs(_value(row[i + 3 * LANES])))
                    lanes[i] += (a + b) + (c + d)
                    lanes2[i] += (a * a + b * b) + (c * c + d * d)
            sums[block] = total_of(lanes)
            squares[block] = total_of(lanes2)
            block += 1


@compiled
def total_of(lanes):  # type: ignore[no-untyped-def]
    width = lanes.size
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] += lanes[i + width]
    return lanes[0]


@dataclass(frozen=True)
class Kernels:
    """The loops of a method, as `CpuEngine` calls them."""

    select: Callable[..., Any]
    count: Callable[..., Any]
    apply: Callable[..., Any]


@register_jitable(inline="always")
def _key(code):  # type: ignore[no-untyped-def]
    return ~code if code >> np.uint32(31) else code | np.uint32(0x80000000)


@register_jitable
def _walk(counts, rank):  # type: ignore[no-untyped-def]
    """The bin of the rank-th highest, and how many lie in the bins above it."""
    above = 0
    for b in range(counts.size - 1, -1, -1):
        if above + counts[b] >= rank:
            return b, above
        above += counts[b]
    return 0, above


@functools.cache
def kernels(name: str) -> Kernels:
    """Compile (or load) the loops of the method `name`."""
    method: Method = METHODS[name]
    score = register_jitable(inline="always")(method.score)
    mixed = register_jitable(inline="always")(mix)
    hashed = method.hashed

    def score_tile(p, f, m, stream, start, sizes, scores):  # type: ignore[no-untyped-def]
        for i in range(p.size):
            a = _value(p[i])
            d = abs(_value(f[i]) - a)
            u = np.float32(0)
            if hashed:
                u = np.float32(mixed(stream + np.int64(start + i + 1) * np.int64(GAMMA))) * np.float32(UNIT)
            s = np.float32(score(d, abs(a), m, u)) + np.float32(0)
            sizes[i] = d
            scores[i] = s if s == s else (np.float32(0) if d == 0 else np.float32(-np.inf))
        sizes[p.size :] = 0
        scores[p.size :] = -np.inf

    score_tile = register_jitable(named(score_tile, name))

    def select(p, f, starts, start, m, streams, k, keys, ties):  # type: ignore[no-untyped-def]
        """By counting, like everything here: the upper 11 bits of the keys, then those of the keys that agree."""
        scores = np.empty(TILE, np.float32)
        codes = scores.view(np.uint32)
        sizes = np.empty(TILE, m.dtype)
        left = np.empty(BLOCK, np.uint32)
        counts = np.empty(1 << 11, np.int64)
        for r in range(starts.size - 1):
            size = starts[r + 1] - starts[r]
            if k[r] <= 0:
                continue
            for t in range(0, size, TILE):
                a = starts[r] + t
                b = min(a + TILE, starts[r + 1])
                score_tile(p[a:b], f[a:b], m[r], streams[r], start + t, sizes, scores)
                for i in range(b - a):
                    left[t + i] = _key(codes[i])
            rank = k[r]
            for shift in (np.uint32(21), np.uint32(10), np.uint32(0)):
                counts[:] = 0
                for i in range(size):
                    counts[(left[i] >> shift) & np.uint32(0x7FF)] += 1
                found, above = _walk(counts, rank)
                rank -= above
                agreeing = 0
                for i in range(size):
                    key = left[i]
                    left[agreeing] = key
                    agreeing += ((key >> shift) & np.uint32(0x7FF)) == found
                size = agreeing
            keys[r] = left[0]
            ties[r] = rank

    def count(  # type: ignore[no-untyped-def]
        p, f, starts, start, m, streams, groups, lows, highs, bases, shifts, tables, cells, masks, begins, bins, above
    ):
        """Zeros, which often are most scores, are added up apart."""
        scores = np.empty(TILE, np.float32)
        codes = scores.view(np.uint32)
        sizes = np.empty(TILE, m.dtype)
        flags = np.zeros(TILE, np.uint8)
        words = flags.view(np.uint64)
        all_finite = True
        many = groups.shape[1]
        zeros = np.empty(many, np.int64)
        for r in range(starts.size - 1):
            if groups[r].max() < 0:
                continue
            zeros[:] = 0
            for t in range(starts[r], starts[r + 1], TILE):
                size = min(TILE, starts[r + 1] - t)
                score_tile(p[t : t + size], f[t : t + size], m[r], streams[r], start + t - starts[r], sizes, scores)
                real = np.uint32(0)
                for i in range(TILE):
                    real += np.uint32(sizes[i] < np.inf)
                all_finite &= real == TILE
                for j in range(many):
                    g = groups[r, j]
                    if g < 0:
                        continue
                    lo, hi, base, shift = lows[g], highs[g], bases[g], shifts[g]
                    histogram = bins[begins[g] : begins[g + 1]]
                    table = tables[g]
                    higher = np.uint32(0)
                    for i in range(TILE):
                        higher += np.uint32(scores[i] > hi)
                    above[g] += higher
                    if lo <= 0 <= hi:
                        zero = np.uint32(0)
                        for i in range(TILE):
                            zero += np.uint32(scores[i] == 0)
                        zeros[j] += zero
                    for i in range(TILE):
                        flags[i] = (scores[i] >= lo) & (scores[i] <= hi) & (scores[i] != 0)
                    flags[size:] = 0
                    for w in range(TILE // 8):
                        if words[w]:
                            for i in range(8 * w, 8 * w + 8):
                                if flags[i]:
                                    key = np.uint32(_key(codes[i]) - base)
                                    if table < 0:
                                        histogram[key >> shift] += 1
                                    else:
                                        cell = table + (key >> shift)
                                        histogram[cells[cell] + (key & masks[cell])] += 1
            for j in range(many):
                if zeros[j]:
                    g = groups[r, j]
                    histogram = bins[begins[g] : begins[g + 1]]
                    table = tables[g]
                    key = np.uint32(np.uint32(0x80000000) - bases[g])
                    if table < 0:
                        histogram[key >> shifts[g]] += zeros[j]
                    else:
                        cell = table + (key >> shifts[g])
                        histogram[cells[cell] + (key & masks[cell])] += zeros[j]
        return all_finite

    def apply(p, f, starts, start, m, streams, thresholds, groups, ties, pruned, kept, out, counts, sums, kept_sums):  # type: ignore[no-untyped-def]
        scores = np.empty(TILE, np.float32)
        sizes = np.empty(TILE, m.dtype)
        keep = np.empty(TILE, out.dtype)
        lanes = np.empty(LANES)
        lanes2 = np.empty(LANES)
        block = 0
        for r in range(starts.size - 1):
            threshold, left = thresholds[r], ties[groups[r]]
            n_kept = n_changed = n_both = 0
            for begin in range(starts[r], starts[r + 1], BLOCK):
                lanes[:] = 0.0
                lanes2[:] = 0.0
                stop = min(begin + BLOCK, starts[r + 1])
                for t in range(begin, stop, TILE):
                    size = min(TILE, stop - t)
                    score_tile(p[t : t + size], f[t : t + size], m[r], streams[r], start + t - starts[r], sizes, scores)
                    for i in range(TILE):
                        keep[i] = -np.int64(scores[i] > threshold)
                    changed = np.uint32(0)
                    taken = np.uint32(0)
                    both = np.uint32(0)
                    for i in range(TILE):
                        changed += np.uint32(sizes[i] != 0)
                        taken += np.uint32(scores[i] > threshold)
                        both += np.uint32((scores[i] > threshold) & (sizes[i] != 0))
                    n_changed += changed
                    n_kept += taken
                    n_both += both
                    if left > 0:
                        equal = np.uint32(0)
                        for i in range(TILE):
                            equal += np.uint32(scores[i] == threshold)
                        if equal:
                            for i in range(size):
                                if scores[i] == threshold and left > 0:
                                    keep[i] = -1
                                    left -= 1
                                    n_kept += 1
                                    n_both += sizes[i] != 0
                                    lanes2[i % LANES] += np.float64(sizes[i]) * np.float64(sizes[i])
                    a = pruned[t : t + size]
                    b = kept[t : t + size]
                    o = out[t : t + size]
                    for i in range(size):
                        o[i] = a[i] ^ ((a[i] ^ b[i]) & keep[i])
                    for i in range(LANES):
                        x0 = np.float64(sizes[i])
                        x1 = np.float64(sizes[i + LANES])
                        x2 = np.float64(sizes[i + 2 * LANES])
                        x3 = np.float64(sizes[i + 3 * LANES])
                        lanes[i] += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
                        y0 = x0 if scores[i] > threshold else 0.0
                        y1 = x1 if scores[i + LANES] > threshold else 0.0
                        y2 = x2 if scores[i + 2 * LANES] > threshold else 0.0
                        y3 = x3 if scores[i + 3 * LANES] > threshold else 0.0
                        lanes2[i] += (y0 * y0 + y1 * y1) + (y2 * y2 + y3 * y3)
                sums[block] = total_of(lanes)
                kept_sums[block] = total_of(lanes2)
                block += 1
            ties[groups[r]] = left
            counts[0, r] = n_kept
            counts[1, r] = n_changed
            counts[2, r] = n_both

    return Kernels(compiled(named(select, name)), compiled(named(count, name)), compiled(named(apply, name)))


def named(function: Callable[..., Any], method: str) -> Callable[..., Any]:
    """Give a loop a name of its own for each method and each state of the formulas.

    numba links compiled code by name, that from its cache too: of two loops with one name the first serves both.
    """
    function.__qualname__ = f"{function.__name__}_{method.replace('-', '_')}_{_VERSION}"
    return function


class CpuEngine:
    """The compiled loops, on the calling thread, without the GIL."""

    device = None

    def __init__(self, method: str):
        self._kernels = kernels(method)

    def like(self, method: str) -> CpuEngine:
        return CpuEngine(method)

    def sums(self) -> AtOnce[[Chunk], tuple[np.ndarray, np.ndarray]]:
        return AtOnce(self._sums)

    def selection(self) -> AtOnce[[Chunk, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return AtOnce(self._select)

    def counting(
        self, histograms: Histograms, thorough: bool = True
    ) -> AtOnce[[Chunk, np.ndarray, np.ndarray], Counted]:
        h = histograms
        layout = h.lo, h.hi, h.base, h.shift, h.tables, h.cells, h.masks, h.starts

        def count(chunk: Chunk, m: np.ndarray, groups: np.ndarray) -> Counted:
            groups = groups.reshape(chunk.runs, -1)
            return Counted(bool(call(self._kernels.count, *_operands(chunk, m), groups, *layout, h.bins, h.above)))

        return AtOnce(count)

    def application(self, ties: np.ndarray) -> AtOnce[[Chunk, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Applied]:
        def apply(chunk: Chunk, m: np.ndarray, thresholds: np.ndarray, groups: np.ndarray, out: np.ndarray) -> Applied:
            counts = np.empty((3, chunk.runs), np.int64)
            squares, kept_squares = np.zeros(chunk.blocks), np.zeros(chunk.blocks)
            given = chunk.pruned, chunk.kept, out, counts, squares, kept_squares
            call(self._kernels.apply, *_operands(chunk, m), thresholds, groups, ties, *given)
            return Applied(counts[0], counts[1], counts[2], squares, kept_squares)

        return AtOnce(apply)

    def _sums(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        sums, squares = np.zeros(chunk.blocks), np.zeros(chunk.blocks)
        call(abs_sums, chunk.p, chunk.starts, sums, squares)
        return sums, squares

    def _select(self, chunk: Chunk, m: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, ties = np.zeros((2, chunk.runs), np.int64)
        call(self._kernels.select, *_operands(chunk, m), k, keys, ties)
        return keys, ties


def _operands(chunk: Chunk, m: np.ndarray) -> tuple[Any, ...]:
    return chunk.p, chunk.f, chunk.starts, chunk.start, m.astype(chunk.real), chunk.streams


def call(loop: Callable[..., Any], *operands: Any) -> Any:
    """Call a loop; that what was compiled cannot be kept, on a full disk say, is no reason to fail."""
    for _ in range(2):  # the loop itself, and the one that it calls
        with contextlib.suppress(OSError):
            return loop(*operands)
    return loop(*operands)
