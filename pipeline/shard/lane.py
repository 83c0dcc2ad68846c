"""Lanes: the runs for which a task is done, over one reading of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fapm.recipe import Recipe
from fapm.shard import passes
from fapm.shard.passes import SectionState
from fapm.shard.task import LaneTask
from fapm.storage.store import Store


@dataclass
class Lane:
    """One of the runs that a task is for.

    Attributes:
        out: the folder in which it writes.
        means: (t, 2) float64 of the shard's tensors, as of `load_means`.
    """

    task: LaneTask
    out: Store
    means: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    def __post_init__(self) -> None:
        self.place = {t.name: i for i, t in enumerate(self.task.shard.tensors)}
        self.tensors = {t.name: t for t in self.task.shard.tensors}


def share_means(lanes: Sequence[Lane]) -> None:
    """Let all lanes know the means that one of them knows."""
    means = [lane.means for lane in lanes]
    for one in means[1:]:
        means[0][:] = np.where(np.isnan(means[0]), one, means[0])
    for one in means[1:]:
        one[:] = means[0]


def find_means(lanes: Sequence[Lane], states: Sequence[SectionState]) -> None:
    """Find the means of a section once for all lanes, in which they are the same."""
    here = [lanes[0].place[t.name] for t in states[0].tensors]
    passes.find_means(states[0], lanes[0].means[here])
    for lane, state in zip(lanes, states, strict=True):
        state.mean, state.base_squares = states[0].mean, states[0].base_squares
        lane.means[here] = np.stack([state.mean, state.base_squares], 1)
