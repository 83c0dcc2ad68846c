"""Samples: a few elements of a tensor, to guess where a threshold is and to tell how much weights have changed.

A guess at a group's threshold that is wrong costs another count of the whole group. So what is sampled counts for what
it stands for, however small its tensor, and the guess is as wide as the sample is uncertain: elements side by side are
alike, so its error is what its runs differ by, not the number of its elements; and a mean |p| from a sample is off too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fapm.formats.dtypes import bits
from fapm.planning.plan import Group, PairedTensor
from fapm.recipe import Recipe
from fapm.scoring.engine import DeviceEngine, StoredChunk
from fapm.scoring.methods import METHODS, evaluate
from fapm.scoring.threshold import COARSE_BINS, MAX_BINS, Bracket, bracket_from_coarse, coarse_histogram
from fapm.shard.chunk import pair_of_values, streams
from fapm.shard.reading import SectionReader
from fapm.shard.section import Slice

LOCAL = 1 << 17
"""Elements of a group that lies in one shard whose scores suggest a first bracket."""

ON_DEVICE = 1 << 14
"""The same where all of a group is on a device."""

CROSS_SHARD = 1 << 20
"""The same for a group over several shards, where a wrong guess costs another read of everything; of a small group
a sixteenth is enough."""

REPORTED = 1 << 13
"""Elements behind the quantiles of a tensor."""

RUN, LONG_RUN = 128, 1 << 14
"""Elements side by side, at most; and where each run is a request over a network."""

_FEWEST_RUNS = 16  # of a tensor, so that their differences say something
SHORTEST_RUN = 16
_WHOLE = 1 << 18  # elements of a tensor that may be taken whole


@dataclass(frozen=True, slots=True)
class Sample:
    """Flat positions (int64) of elements, and their values (float32 or float64), all (n,), in `runs` of one length."""

    positions: np.ndarray
    p: np.ndarray
    f: np.ndarray
    runs: int

    def scores(self, tensor: PairedTensor, recipe: Recipe, m: Any) -> np.ndarray:
        """float32 scores, given mean|p|: one, or one an element."""
        return evaluate(METHODS[recipe.method], self.p, self.f, m, streams([tensor], recipe)[0], self.positions)


HeldSlice = tuple[Slice, list[np.ndarray] | StoredChunk]
"""A slice in memory: the bytes of its sides, or what an engine has on its device."""


def near(
    parts: Iterable[HeldSlice],
    tensor: PairedTensor,
    share: float,
    recipe: Recipe,
    device: DeviceEngine | None = None,
    longest: int = RUN,
) -> Sample:
    """About `share` of a tensor's elements, from its slices in memory, in runs of `longest` at most."""
    starts, length = _runs(tensor.common, share, longest)
    sides: list[Sequence[np.ndarray]] = []
    for part, held in parts:
        chosen, many = starts[(starts >= part.start) & (starts < part.stop)] - part.start, length
        if length == tensor.common:  # of all slices all
            chosen, many = np.zeros(1, np.int64), part.stop - part.start
        if isinstance(held, StoredChunk):
            assert device
            sides.append(device.take(held, chosen, many))
        else:
            places = (chosen[:, None] + np.arange(many)).reshape(-1)
            pair = zip(held, tensor.sources, strict=True)
            sides.append([bits(stored, info.dtype)[places].view(np.uint8) for stored, (_, info) in pair])
    p, f = (np.concatenate(side) for side in zip(*sides, strict=True))
    return _sample(starts, length, p, f, tensor, recipe)


def far(reader: SectionReader, tensor: PairedTensor, share: float, recipe: Recipe, longest: int = RUN) -> Sample:
    """The same by reading no more than that."""
    starts, length = _runs(tensor.common, share, longest)
    p, f = reader.read_runs(tensor, starts, length)
    return _sample(starts, length, p, f, tensor, recipe)


def _sample(
    starts: np.ndarray, length: int, p: np.ndarray, f: np.ndarray, tensor: PairedTensor, recipe: Recipe
) -> Sample:
    positions = (starts[:, None] + np.arange(length)).reshape(-1)
    return Sample(positions, *pair_of_values(p, f, tensor, recipe), starts.size)


def _runs(numel: int, share: float, longest: int = RUN) -> tuple[np.ndarray, int]:
    """First elements of runs of one length, spread evenly, that hold about `share` of a tensor.

    The length is a power of two, so that no run lies in two slices.
    """
    wanted = max(1, math.ceil(share * numel))
    if (numel <= _WHOLE and wanted * 2 >= numel) or numel < _FEWEST_RUNS * SHORTEST_RUN:
        return np.zeros(1, np.int64), numel
    length = min(longest, max(SHORTEST_RUN, 1 << max(1, wanted // _FEWEST_RUNS).bit_length() - 1))
    places = numel // length
    count = min(places, math.ceil(wanted / length))
    return np.arange(count) * places // count * length, length


@dataclass(slots=True)
class Survey:
    """Estimate of a group's scores, from a sample.

    Attributes:
        weights: (COARSE_BINS,) float64, the elements of the group that those in each bin stand for.
        variance: of the number of elements above a threshold near rank k, as the sample estimates it.
    """

    weights: np.ndarray = field(default_factory=lambda: np.zeros(COARSE_BINS))
    variance: float = 0.0

    def bracket(self, group: Group, max_bins: int = MAX_BINS) -> Bracket:
        """Where the group's threshold nearly surely is."""
        sigma = math.sqrt(self.variance) / self.weights.sum()
        return bracket_from_coarse(self.weights, group.k / group.numel, sigma, max_bins)


def cross_shard_size(group: Group) -> int:
    """How many elements of a group over several shards to look at."""
    return min(CROSS_SHARD, max(LOCAL, group.numel // 16))


def survey(
    members: Sequence[PairedTensor],
    group: Group,
    size: int,
    take: Callable[[PairedTensor, float], Sample],
    recipe: Recipe,
    means: dict[str, np.float32],
) -> Survey:
    """Look at about `size` elements of a group, as far as they lie in `members`.

    Args:
        take: samples a share of a tensor.
        means: mean |p| of the members of which it is known; for the others the sample's is taken.
    """
    found = Survey()
    share = size / group.numel
    small = [t for t in members if share * t.common < RUN]  # of these only some are looked at, for all of them
    waiting = 0
    for tensor in members:
        stands_for = tensor.common
        if share * tensor.common < RUN:
            waiting += tensor.common
            if share * waiting < RUN and tensor is not small[-1]:
                continue
            stands_for, waiting = waiting, 0
        taken = take(tensor, min(1.0, share * stands_for / tensor.common))
        m, off = (means[tensor.name], 0.0) if tensor.name in means else _mean(taken)
        # Scores by means as far off as the sample's may be, so that all cells are seen in which a score may lie.
        spread = 4 * (np.arange(taken.runs) * _GOLDEN % 1) - 2
        scores = taken.scores(tensor, recipe, np.repeat(m + off * spread, taken.p.size // taken.runs))
        found.weights += coarse_histogram(scores) * (stands_for / scores.size)
        error = _share_variance(taken, scores, tensor, group, recipe, m, off)
        if stands_for > tensor.common:  # whatever the others are like
            quantile = group.k / group.numel
            error = max(error, quantile * (1 - quantile))
        found.variance += stands_for**2 * error
    return found


_GOLDEN = 0.6180339887498949


def _mean(taken: Sample) -> tuple[np.float32, float]:
    """mean |p| as a sample estimates it, and its standard error."""
    means = np.abs(taken.p).reshape(taken.runs, -1).mean(1, dtype=np.float64)
    error = means.std(ddof=1) / math.sqrt(taken.runs) if taken.runs > 1 else 0.0
    return np.float32(means.mean()), float(error)


def _share_variance(
    taken: Sample,
    scores: np.ndarray,
    tensor: PairedTensor,
    group: Group,
    recipe: Recipe,
    m: np.float32,
    off: float,
) -> float:
    """Variance of the share of a tensor's elements above the group's quantile, as its sample estimates it.

    Args:
        m, off: mean |p|, and how far it may be off.
    """
    size = taken.p.size
    if size == tensor.common:
        return 0.0
    quantile = group.k / group.numel
    place = min(size - 1, int(size * (1 - quantile)))
    threshold = np.partition(scores, place)[place]
    above = scores > threshold
    variance = quantile * (1 - quantile)
    if taken.runs > 1:
        by_run = above.reshape(taken.runs, -1).mean(1)
        variance = max(float(by_run.var(ddof=1)) / taken.runs, variance / size)
    variance *= 1 - size / tensor.common
    if off:
        variance += float(np.mean(taken.scores(tensor, recipe, np.float32(m + off)) > threshold) - above.mean()) ** 2
    return variance
