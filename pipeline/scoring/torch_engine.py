"""The engine in torch operations, for GPUs; the same code runs on a CPU, where the tests hold it to the same bits.

Nothing waits for the device while chunks are added: counts, sums and ties stay there until a pass is asked for its
result, which is one copy. Tensors so small that they come several in a chunk are the compiled loops' work: on a device
each would cost more to start than to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fapm.scoring.accelerator import Accelerator, Put
from fapm.scoring.compiled import LANES, TILE, CpuEngine
from fapm.scoring.engine import AnyChunk, Applied, Chunk, Counted, StoredChunk
from fapm.scoring.methods import BLOCK, GAMMA, METHODS, UNIT, mix
from fapm.scoring.threshold import ZERO_KEY, Histograms


class TorchEngine:
    """Every operation is a kernel of its own, so that each rounds once: nothing is fused or approximated."""

    def __init__(self, method: str, accelerator: Accelerator):
        self._method = METHODS[method]
        self._accelerator = accelerator
        self._host = CpuEngine(method)

    @property
    def device(self) -> TorchEngine:
        return self

    def like(self, method: str) -> TorchEngine:
        return TorchEngine(method, self._accelerator)

    def memory(self) -> tuple[int, int]:
        return self._accelerator.memory()

    def host(self, nbytes: int) -> np.ndarray:
        return self._accelerator.host(nbytes)

    def put(self, p: np.ndarray, f: np.ndarray) -> tuple[Put, Put]:
        return self._accelerator.up(p), self._accelerator.up(f)

    def sent(self) -> Callable[[], None]:
        return self._accelerator.sent()

    def received(self) -> Callable[[], None]:
        return self._accelerator.received()

    def take(self, chunk: StoredChunk, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        first = self.up(starts.astype(np.int64))
        taken = []
        for stored in self._stored(chunk):
            elements = _bits(stored)[(first[:, None] + torch.arange(length, device=first.device)).reshape(-1)]
            taken.append(elements.view(torch.uint8))
        both = torch.cat(taken).cpu().numpy()
        return both[: taken[0].numel()], both[taken[0].numel() :]

    def sums(self) -> _Sums:
        return _Sums(self, self._host.sums())

    def selection(self) -> Any:
        return self._host.selection()  # of small tensors

    def counting(self, histograms: Histograms, thorough: bool = False) -> _Counting:
        return _Counting(self, self._host.counting(histograms), histograms, thorough)

    def application(self, ties: np.ndarray) -> _Application:
        return _Application(self, self._host.application(ties), ties)

    def up(self, array: np.ndarray) -> torch.Tensor:
        return self._accelerator.use(self._accelerator.up(array))

    def down(self, tensor: torch.Tensor, target: np.ndarray) -> None:
        self._accelerator.down(tensor, target)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        return self._accelerator.fetch(tensors)

    def zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self._accelerator.device)

    def on_host(self, chunk: AnyChunk) -> bool:
        """Whether the compiled loops deal with a chunk."""
        return isinstance(chunk, Chunk)

    def base(self, chunk: AnyChunk) -> torch.Tensor:
        """Base's values on the device."""
        return _upcast(_typed(self._accelerator.use(chunk.put[0]), chunk.p_dtype))

    def load(self, chunk: AnyChunk) -> Loaded:
        """Both sides on the device."""
        p, f = _repaired(chunk, *self._stored(chunk))
        return Loaded(*_values(p, f), chunk.start, chunk.stream)

    def choices(self, chunk: AnyChunk) -> tuple[torch.Tensor, torch.Tensor, torch.dtype | None]:
        """The output's bits of either choice, what is pruned and what is kept, and, where they may be infinite, their
        dtype."""
        p, f = _repaired(chunk, *self._stored(chunk))
        pruned = _in_dtype(p, chunk.dtype)
        if chunk.mixed is None and chunk.scale == 1:
            kept = _in_dtype(f, chunk.dtype)
        else:
            x, value = _values(p, f)
            if chunk.mixed is not None:
                assert self._method.value
                value = self._method.value(x, value, torch.full((), chunk.mixed, dtype=x.dtype, device=x.device))
            if chunk.scale != 1:
                value = x + torch.full((), chunk.scale, dtype=x.dtype, device=x.device) * (value - x)
            kept = _rounded(value, chunk.dtype)
        return _bits(pruned), _bits(kept), pruned.dtype if chunk.rounded else None

    def _stored(self, chunk: StoredChunk) -> tuple[torch.Tensor, torch.Tensor]:
        p, f = (self._accelerator.use(put) for put in chunk.put)
        return _typed(p, chunk.p_dtype), _typed(f, chunk.f_dtype)

    def scores(self, loaded: Loaded, m: float) -> tuple[torch.Tensor, torch.Tensor]:
        """d in the type of the arithmetic, and S in float32."""
        p, f = loaded.p, loaded.f
        d = (f - p).abs()
        u: Any = None
        if self._method.hashed:
            counter = torch.arange(loaded.start + 1, loaded.start + 1 + p.numel(), device=p.device)
            u = mix(counter * GAMMA + loaded.stream).to(torch.float32) * UNIT
        mean = torch.full((), m, dtype=d.dtype, device=p.device)
        s = self._method.score(d, p.abs(), mean, u).to(torch.float32) + 0.0
        undefined = torch.where(d == 0, 0.0, -torch.inf).to(torch.float32)
        return d, torch.where(s.isnan(), undefined, s)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Values of a run on the device, float32 or float64, of base and finetuned."""

    p: torch.Tensor
    f: torch.Tensor
    start: int
    stream: int


_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _typed(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    return stored.view(getattr(torch, dtype))


def _bits(typed: torch.Tensor) -> torch.Tensor:
    return typed.view(_CODES[typed.element_size()])


def _upcast(typed: torch.Tensor) -> torch.Tensor:
    return typed if typed.dtype == torch.float64 else typed.to(torch.float32)


def _repaired(chunk: StoredChunk, p: torch.Tensor, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Under `nonfinite: base` with base's value wherever finetuned's is not finite."""
    if not chunk.repair:
        return p, f
    odd = ~_upcast(f).isfinite()
    return p, torch.where(odd, _bits(_in_dtype(p, chunk.f_dtype)), _bits(f)).view(f.dtype)


def _values(p: torch.Tensor, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, f = _upcast(p), _upcast(f)
    return (p, f) if p.dtype == f.dtype else (p.to(torch.float64), f.to(torch.float64))


def _in_dtype(typed: torch.Tensor, dtype: str) -> torch.Tensor:
    return typed if typed.dtype == getattr(torch, dtype) else _rounded(_upcast(typed), dtype)


_BEYOND_E4M3 = 464.0  # the last that rounds to its largest number, 448: the dtype has no infinity


def _rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 or float64 values, rounded once, to nearest even."""
    target: torch.dtype = getattr(torch, dtype)
    if values.dtype == torch.float64 and target.itemsize < 4:
        values = _to_odd_float32(values)  # torch would round twice
    rounded = values.to(target)
    if dtype == "float8_e4m3fn":
        nan = torch.full((), 0x7F, dtype=torch.uint8, device=values.device)
        rounded = torch.where(values.abs() > _BEYOND_E4M3, nan, _bits(rounded)).view(target)
    return rounded


def _to_odd_float32(values: torch.Tensor) -> torch.Tensor:
    """float64 to float32 by rounding to odd, as `formats.dtypes` does it."""
    near = values.to(torch.float32)
    inexact = near.isfinite() & (near.to(torch.float64) != values)
    away = inexact & (near.to(torch.float64).abs() > values.abs())
    code = near.view(torch.int32) - away.to(torch.int32)
    return (code | inexact.to(torch.int32)).view(torch.float32)


@dataclass
class _Later:
    """Result of a chunk, still on the device: int64 and float64 tensors, and what becomes of them."""

    tensors: Sequence[torch.Tensor]
    finish: Callable[[list[np.ndarray]], Any]


class _Pass:
    """Keeps what was found in the order of the chunks, and brings it from the device all at once."""

    def __init__(self, engine: TorchEngine, host: Any):
        self._engine = engine
        self._host = host
        self._found: list[_Later | None] = []  # None: the host's next

    def _state(self) -> list[_Later]:
        """Result of the pass as a whole, on the device."""
        return []

    def result(self) -> list[Any]:
        state = self._state()
        later = [*state, *(found for found in self._found if found)]
        fetched = self._engine.fetch([tensor for found in later for tensor in found.tensors])
        results, begin = [], 0
        for found in later:
            end = begin + len(found.tensors)
            results.append(found.finish(fetched[begin:end]))
            begin = end
        of_device, of_host = iter(results[len(state) :]), iter(self._host.result())
        return [next(of_device if found else of_host) for found in self._found]


class _Sums(_Pass):
    def add(self, chunk: AnyChunk) -> None:
        if self._engine.on_host(chunk):
            self._host.add(chunk)
            self._found.append(None)
            return
        x = self._engine.base(chunk).abs().to(torch.float64)
        self._found.append(_Later([block_sums(x), block_sums(x.square())], tuple))


_SPREAD = 1 << 12
"""Places for what is not counted: thousands of threads that add to a single one would wait for each other."""

_FEW = 16
"""One of so many elements is looked for inside a narrow bracket, at most: they are picked out and counted by
themselves, which moves a third of the bytes. If there are more the count is not complete."""


class _Counting(_Pass):
    def __init__(self, engine: TorchEngine, host: Any, histograms: Histograms, thorough: bool):
        super().__init__(engine, host)
        self._histograms = histograms
        self._thorough = thorough
        self._tallies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by group: bins, and above
        self._tables: dict[int, tuple[torch.Tensor, ...]] = {}  # by group: first bin, and mask, of each cell
        self._missed = engine.zeros(1)  # chunks that had more inside than were counted

    def add(self, chunk: AnyChunk, m: np.ndarray, groups: np.ndarray) -> None:
        if self._engine.on_host(chunk):
            self._host.add(chunk, m, groups)
            self._found.append(None)
            return
        wanted = [group for group in groups.reshape(-1).tolist() if group >= 0]
        if not wanted:
            self._found.append(_Later([], _counted))
            return
        d, s = self._engine.scores(self._engine.load(chunk), float(m[0]))
        for group in wanted:
            self._count(group, s)
        finite = d.isfinite().all().to(torch.int64)
        self._found.append(_Later([finite, self._missed], _counted))

    def _count(self, group: int, s: torch.Tensor) -> None:
        h = self._histograms
        size = h.of(group).size
        if group not in self._tallies:
            self._tallies[group] = self._engine.zeros(size + _SPREAD), self._engine.zeros(1)
        bins, above = self._tallies[group]
        lo, hi, base = float(h.lo[group]), float(h.hi[group]), int(h.base[group])
        zero = s == 0
        inside = (s >= lo) & (s <= hi) & ~zero
        above += (s > hi).sum()
        if lo <= 0 <= hi:  # often most of them: added up apart
            place = self._places(group, torch.full((1,), ZERO_KEY - base, device=s.device))
            bins.scatter_add_(0, place, zero.sum().view(1))
        chosen, few = inside, -(-s.numel() // _FEW)
        if not self._thorough and h.layouts[group].bracket.narrow:
            count = inside.sum()
            s = s[inside.nonzero_static(size=few, fill_value=0)[:, 0]]
            chosen = torch.arange(few, device=s.device) < count
            self._missed += count > few
        places = self._places(group, torch.where(chosen, _keys(s) - base, 0))
        elsewhere = torch.arange(s.numel(), device=s.device) % _SPREAD + size
        bins.scatter_add_(0, torch.where(chosen, places, elsewhere), torch.ones_like(places))

    def _places(self, group: int, inside: torch.Tensor) -> torch.Tensor:
        """The bins of keys, less the lowest, inside the group's bracket."""
        h = self._histograms
        cells, table = inside >> int(h.shift[group]), int(h.tables[group])
        if table < 0:
            return cells
        if group not in self._tables:
            offsets = h.layouts[group].offsets
            assert offsets is not None
            of_group = slice(table, table + offsets.size - 1)
            sides = (side[of_group].astype(np.int64) for side in (h.cells, h.masks))
            self._tables[group] = tuple(self._engine.up(side) for side in sides)
        first, masks = self._tables[group]
        return first[cells] + (inside & masks[cells])

    def _state(self) -> list[_Later]:
        return [_Later([*tensors, self._missed], self._adder(group)) for group, tensors in self._tallies.items()]

    def _adder(self, group: int) -> Callable[[list[np.ndarray]], None]:
        def add(fetched: list[np.ndarray]) -> None:
            if fetched[2][0]:
                return
            self._histograms.of(group)[:] += fetched[0][:-_SPREAD]
            self._histograms.above[group] += fetched[1][0]

        return add


class _Application(_Pass):
    def __init__(self, engine: TorchEngine, host: Any, ties: np.ndarray):
        super().__init__(engine, host)
        self._ties = ties
        self._left: dict[int, torch.Tensor] = {}  # by group, where the device has used some

    def add(self, chunk: AnyChunk, m: np.ndarray, thresholds: np.ndarray, groups: np.ndarray, out: np.ndarray) -> None:
        if self._engine.on_host(chunk):
            self._settle(set(groups.tolist()))
            self._host.add(chunk, m, thresholds, groups, out)
            self._found.append(None)
            return
        group, threshold = int(groups[0]), float(thresholds[0])
        d, s = self._engine.scores(self._engine.load(chunk), float(m[0]))
        equal, higher = s == threshold, s > threshold
        left = self._left.get(group, self._engine.zeros(1) + int(self._ties[group]))
        taken = torch.minimum(equal.sum(), left)
        keep = higher | (equal & (equal.cumsum(0, dtype=torch.int32) <= taken.to(torch.int32)))
        self._left[group] = left - taken
        pruned, kept, rounded = self._engine.choices(chunk)
        chosen = torch.where(keep, kept, pruned)
        self._engine.down(chosen, out)
        changed, squares = d != 0, d.to(torch.float64).square()
        counted = [keep, changed, keep & changed]
        if rounded:
            counted.append(~_upcast(chosen.view(rounded)).isfinite())
        counts = torch.stack([x.sum() for x in counted])
        sums = [block_sums(squares), block_sums(torch.where(keep, squares, 0.0))]
        self._found.append(_Later([counts, *sums], _applied))

    def _settle(self, groups: set[int]) -> None:
        """Bring what is left of the ties of some groups to the host."""
        wanted = [group for group in self._left if group in groups]
        for group, left in zip(wanted, self._engine.fetch([self._left.pop(g) for g in wanted]), strict=True):
            self._ties[group] = left[0]

    def _state(self) -> list[_Later]:
        return [_Later([left], self._setter(group)) for group, left in self._left.items()]

    def _setter(self, group: int) -> Callable[[list[np.ndarray]], None]:
        def put(fetched: list[np.ndarray]) -> None:
            self._ties[group] = fetched[0][0]

        return put


def _counted(fetched: list[np.ndarray]) -> Counted:
    return Counted(bool(fetched[0][0]), not fetched[1][0]) if fetched else Counted(True)


def _applied(fetched: list[np.ndarray]) -> Applied:
    counts, squares, kept_squares = fetched
    return Applied(counts[:1], counts[1:2], counts[2:3], squares, kept_squares, int(counts[3:].sum()))


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Keys (int64) of float32 scores."""
    codes = scores.view(torch.int32).to(torch.int64)
    return torch.where(codes < 0, ~codes, codes | ZERO_KEY) & 0xFFFFFFFF


def block_sums(x: torch.Tensor) -> torch.Tensor:
    """The sum of each block of x (float64, not negative), added up in the order of the compiled loops: to the bit."""
    blocks = max(1, -(-x.numel() // BLOCK))
    tiles = BLOCK // TILE if blocks > 1 else max(1, -(-x.numel() // TILE))
    if missing := blocks * tiles * TILE - x.numel():
        x = torch.nn.functional.pad(x, (0, missing))  # zeros change no sum
    rows = x.view(blocks, tiles, TILE // LANES, LANES)
    sums = (rows[:, :, 0] + rows[:, :, 1]) + (rows[:, :, 2] + rows[:, :, 3])
    lanes = sums[:, 0]
    for tile in range(1, tiles):
        lanes = lanes + sums[:, tile]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes.reshape(-1)
