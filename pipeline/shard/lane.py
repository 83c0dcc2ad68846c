"""Lanes: the runs for which a task is done, over one reading of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fapm.recipe import Recipe
from fapm.shard import passes
from fapm.shard.passes import SectionState
from fapm.shard.table import MEASURED
from fapm.shard.task import LaneTask
from fapm.storage.store import Store


@dataclass
class Lane:
    """One of the runs that a task is for.

    Attributes:
        out: the folder in which it writes.
        means: (t, 2) float64 of the shard's tensors, as of `load_means`.
        rows: (t,) MEASURED, of the shard's tensors.
        ties: what is left of each group's tie quota.
        parts: of a merge the lanes of its sources.
    """

    task: LaneTask
    out: Store
    means: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    ties: dict[str, int] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    def __post_init__(self) -> None:
        self.parts = [Lane(part, self.out) for part in self.task.parts]
        self.rows = np.zeros(len(self.task.shard.tensors), MEASURED)
        self.place = {t.name: i for i, t in enumerate(self.task.shard.tensors)}
        self.tensors = {t.name: t for t in self.task.shard.tensors}

    def keep_ties(self, state: SectionState) -> None:
        """Remember what a section has left of the tie quotas."""
        self.ties |= zip(state.names, state.ties.tolist(), strict=True)


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
    known = lanes[0].means[here]
    for state in states:  # of a merge's sources not all have every tensor
        passes.find_means(state, known)
        known = np.stack([state.mean, state.base_squares], 1)
    for lane, state in zip(lanes, states, strict=True):
        state.mean, state.base_squares = known.T.copy()
        lane.means[here] = known
