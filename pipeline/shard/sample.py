"""A few elements of a tensor, spread evenly: enough to guess a threshold, and to tell how much weights have changed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.formats.dtypes import bits
from pipeline.plan import PairedTensor
from pipeline.recipe import Recipe
from pipeline.scoring.methods import METHODS, evaluate, stream_of
from pipeline.shard.chunk import pair_of_values
from pipeline.shard.reading import SectionReader, Slice

LOCAL = 1 << 17
"""Elements of a group that lies in one shard whose scores suggest a first bracket."""

WIDE = 1 << 21
"""The same for a group over several shards, where a wrong guess costs another read of everything."""

REPORTED = 1 << 13
"""Elements behind the quantiles of a tensor."""

RUN = 256
"""Elements side by side."""

_FAR_RUN = 2048  # the same where each run is a read of its own


@dataclass(frozen=True, slots=True)
class Sample:
    """Flat positions (int64) of some elements, and their values (float32 or float64), all (n,)."""

    positions: np.ndarray
    p: np.ndarray
    f: np.ndarray

    def scores(self, tensor: PairedTensor, recipe: Recipe, m: np.float32) -> np.ndarray:
        """float32 scores, given mean|p|."""
        stream = stream_of(recipe.seed, tensor.name)
        return evaluate(METHODS[recipe.method], self.p, self.f, m, stream, self.positions)


def near(parts: Iterable[tuple[Slice, list[np.ndarray]]], tensor: PairedTensor, share: float, recipe: Recipe) -> Sample:
    """About `share` of a tensor's elements, from its slices in memory."""
    starts, length = _runs(tensor.common, share, RUN)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for part, views in parts:
        rows = (starts[(starts >= part.start) & (starts < part.stop)] - part.start) // length
        for side, source, stored in zip(sides, tensor.sources, views, strict=True):
            whole = bits(stored, source.dtype)
            side.append(whole[: whole.size // length * length].reshape(-1, length)[rows].reshape(-1))
    p, f = (np.concatenate(side).view(np.uint8) for side in sides)
    return Sample(_positions(starts, length), *pair_of_values(p, f, tensor, recipe))


def far(reader: SectionReader, tensor: PairedTensor, share: float, recipe: Recipe) -> Sample:
    """The same by reading no more than that."""
    starts, length = _runs(tensor.common, share, _FAR_RUN)
    p, f = reader.read_runs(tensor, starts, length)
    return Sample(_positions(starts, length), *pair_of_values(p, f, tensor, recipe))


def _runs(numel: int, share: float, length: int) -> tuple[np.ndarray, int]:
    """First elements of runs of one length, spread evenly, that hold about `share` of a tensor."""
    if numel < 4 * length:
        return np.zeros(1, np.int64), numel
    whole = numel // length
    count = min(whole, max(1, math.ceil(share * whole)))
    return np.arange(count) * whole // count * length, length


def _positions(starts: np.ndarray, length: int) -> np.ndarray:
    return (starts[:, None] + np.arange(length)).reshape(-1)
