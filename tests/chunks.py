"""Engines given one run of one tensor, as most of their tests do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.pool import Threads
from pipeline.scoring.accelerator import Accelerator
from pipeline.scoring.engine import Applied, Chunk, Engine, Pass
from pipeline.scoring.threshold import KEEP_ALL, Bracket, Histograms, Threshold, float_thresholds, histograms
from pipeline.scoring.torch_engine import TorchEngine

GROUP = np.zeros(1, np.int64)


def torch_engine(method: str, device: str = "cpu") -> TorchEngine:
    return TorchEngine(method, Accelerator(device))


class Counted(Accelerator):
    """A device of which it is counted how many bytes go there, and how often something is waited for."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.up_bytes = self.waits = 0

    def up(self, array: np.ndarray) -> torch.Tensor:
        self.up_bytes += array.nbytes
        return super().up(array)

    def fetch(self, tensors):
        self.waits += bool(tensors)
        return super().fetch(tensors)


class OnTorch(Threads):
    """The pool of this process with torch's engine in place of the compiled one."""

    def __init__(self, recipe, out, workers, accelerator=None):
        super().__init__(recipe, out, workers)
        for worker in self._workers:
            worker._engine = TorchEngine(recipe.method, accelerator or Accelerator("cpu"))


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
    return only(engine.counting(counted), chunk, m, groups)


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
