"""Engines given one run of one tensor, as most of their tests do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

from fapm.pool import Threads
from fapm.scoring.accelerator import Accelerator, Put, _signed
from fapm.scoring.compiled import CpuEngine
from fapm.scoring.engine import Applied, Chunk, Engine, Pass
from fapm.scoring.threshold import KEEP_ALL, Bracket, Histograms, Threshold, float_thresholds, histograms
from fapm.scoring.torch_engine import Loaded, TorchEngine
from fapm.shard import worker

GROUP = np.zeros(1, np.int64)


class Device:
    """A device that is the host, whose copies are made as late as they may be: what reads too early reads garbage.

    Attributes:
        up_bytes: copied there; `down_bytes`: copied back as outputs; `waits`: how often something was waited for.
    """

    def __init__(self, free: int = 1 << 34) -> None:
        self.device = torch.device("cpu")
        self.up_bytes = self.down_bytes = self.waits = 0
        self.free = free
        self._locked: list[np.ndarray] = []
        self._up: list[Callable[[], None]] = []
        self._down: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def memory(self) -> tuple[int, int]:
        return self.free, self.free

    def host(self, nbytes: int) -> np.ndarray:
        self._locked.append(np.empty(nbytes, np.uint8))
        return self._locked[-1]

    def up(self, array: np.ndarray) -> Put:
        self.up_bytes += array.nbytes
        source = torch.from_numpy(_signed(array))
        if not any(np.may_share_memory(array, locked) for locked in self._locked):
            return Put(source.clone(), None)  # ordinary memory has been read when the call returns
        put = torch.full_like(source, 77)
        arrived = self._later(self._up, lambda: put.copy_(source))
        return Put(put, arrived)

    def _later(self, queue: list, copy: Callable[[], object]) -> Callable[[], None]:
        """A copy that is made once it is waited for, after those before it."""
        with self._lock:
            queue.append(copy)
        return self._until_here(queue)

    def _until_here(self, queue: list) -> Callable[[], None]:
        with self._lock:
            last = queue[-1] if queue else None

        def wait() -> None:
            with self._lock:
                while last in queue:
                    queue.pop(0)()

        return wait

    def use(self, put: Put) -> torch.Tensor:
        if put.arrived is not None:
            put.arrived()
        return put.tensor

    def sent(self) -> Callable[[], None]:
        return self._until_here(self._up)

    def down(self, tensor: torch.Tensor, target: np.ndarray) -> None:
        self.down_bytes += target.nbytes
        target.view(np.uint8)[:] = 77
        if any(np.may_share_memory(target, locked) for locked in self._locked):
            self._later(self._down, lambda: torch.from_numpy(_signed(target)).copy_(tensor))
        else:
            torch.from_numpy(_signed(target)).copy_(tensor)

    def received(self) -> Callable[[], None]:
        return self._until_here(self._down)

    def fetch(self, tensors):
        self.waits += bool(tensors)
        return Accelerator.fetch(self, tensors)


class OneRunOnDevice(TorchEngine):
    """Takes single runs of a Chunk to the device too, so that both engines can be given the same."""

    def on_host(self, chunk) -> bool:
        return chunk.runs > 1

    def base(self, chunk):
        return self._side(chunk.p)

    def load(self, chunk):
        return Loaded(self._side(chunk.p), self._side(chunk.f), chunk.start, int(chunk.streams[0]))

    def choices(self, chunk):
        return self.up(chunk.pruned), self.up(chunk.kept), None

    def _side(self, side: np.ndarray) -> torch.Tensor:
        put = self.up(side)
        return put.view(torch.bfloat16).to(torch.float32) if side.dtype == np.uint16 else put


def torch_engine(method: str, device: str = "cpu") -> TorchEngine:
    return OneRunOnDevice(method, Device() if device == "cpu" else Accelerator(device))


def on_torch(device: Device):
    """What makes a pool of this process with torch's engine, on a device of the tests, in place of the compiled one."""

    def make(plan, out, watch) -> Threads:
        def engine(method: str, named: str):
            return CpuEngine(method) if named == "cpu" else TorchEngine(method, device)

        with mock.patch.object(worker, "make_engine", engine):
            recipe = plan.recipe.model_copy(update={"device": "cuda"})
            return Threads(recipe, out, plan.recipe.workers.most, watch.advance, watch.say)

    return make


def one_run(p, f, pruned, kept, start: int = 0, stream: int = 0) -> Chunk:
    return Chunk(np.array([0, p.size]), start, np.array([stream]), p, f, pruned, kept)


def several_runs(p, f, pruned, kept, starts, streams) -> Chunk:
    return Chunk(np.array(starts, np.int64), 0, np.array(streams, np.int64), p, f, pruned, kept)


def count(engine: Engine, chunk: Chunk, m, bracket: Bracket, max_bins: int = 1 << 16) -> tuple[int, np.ndarray, bool]:
    """Keys above the bracket, keys inside by bins, and whether all d are finite."""
    counted = histograms([bracket], [max_bins])
    finite = count_runs(engine, chunk, np.array([m], np.float32), GROUP, counted)
    return int(counted.above[0]), counted.of(0), finite


def sums(engine: Engine, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    return only(engine.sums(), chunk)


def select(engine: Engine, chunk: Chunk, m: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return only(engine.selection(), chunk, m, k)


def count_runs(engine: Engine, chunk: Chunk, m: np.ndarray, groups: np.ndarray, counted: Histograms) -> bool:
    """Whether all d are finite; as `shard.passes.count` does it."""
    before = counted.bins.copy(), counted.above.copy()
    found = only(engine.counting(counted), chunk, m, groups)
    if not found.complete:
        assert np.array_equal(counted.bins, before[0]) and np.array_equal(counted.above, before[1])
        found = only(engine.counting(counted, thorough=True), chunk, m, groups)
    assert found.complete
    return found.finite


def apply_runs(engine: Engine, chunk: Chunk, m, thresholds, groups, ties, out) -> Applied:
    return only(engine.application(ties), chunk, m, thresholds, groups, out)


def only(passed: Pass, *operands):
    """What a pass over one chunk finds."""
    passed.add(*operands)
    [found] = passed.result()
    return found


@dataclass
class OneApplied:
    kept: int
    changed: int
    kept_changed: int
    ties: int
    squares: np.ndarray
    kept_squares: np.ndarray


def apply(engine: Engine, chunk: Chunk, m, threshold: Threshold, ties: int, out: np.ndarray) -> OneApplied:
    """What the engine did; `ties` is how many of the ties it has used."""
    had = 1 << 62 if threshold == KEEP_ALL else ties
    left = np.array([had])
    scores = float_thresholds(np.array([threshold.key]))
    done = apply_runs(engine, chunk, np.array([m], np.float32), scores, GROUP, left, out)
    counts = (int(x[0]) for x in (done.kept, done.changed, done.kept_changed))
    return OneApplied(*counts, had - int(left[0]), done.squares, done.kept_squares)
