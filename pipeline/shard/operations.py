"""Operations: what a worker does with a section for its lanes, whose methods are of kinds with one operation.

Selections and blends go over elements (`fapm.shard.passes`), matrix methods over matrices (`fapm.shard.projection`),
merges over elements of several sources (`fapm.shard.merging`). A worker knows no method: it reads sections, and runs
the operation of its lanes on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fapm.planning.matrices import matrix_bytes
from fapm.recipe import Recipe
from fapm.scoring.methods import METHODS
from fapm.shard import passes, projection
from fapm.shard.lane import Lane, find_means
from fapm.shard.merging import Merging
from fapm.shard.output import Output
from fapm.shard.passes import SectionState

Tell = Callable[[int], None]
"""Told progress bytes."""


class Operation(Protocol):
    def memory(self, lanes: Sequence[Lane]) -> int:
        """Bytes that it takes on a shard, beside what is read."""
        ...

    def begin(self, lanes: Sequence[Lane]) -> None:
        """Get ready for a shard.

        Raises:
            UserError: it cannot be done here.
        """
        ...

    def write(
        self, lanes: Sequence[Lane], states: Sequence[SectionState], outputs: Sequence[Output], tell: Tell
    ) -> None:
        """Write the bytes of a section to the outputs of the lanes, and what was measured of it to their rows.

        Args:
            states: of every lane, or of a merge's sources.
        """
        ...


class Elements:
    """Finds thresholds, and makes each element of p and f by them."""

    def memory(self, lanes: Sequence[Lane]) -> int:
        return 0

    def begin(self, lanes: Sequence[Lane]) -> None:
        pass

    def write(
        self, lanes: Sequence[Lane], states: Sequence[SectionState], outputs: Sequence[Output], tell: Tell
    ) -> None:
        find_means(lanes, states)
        passes.search(states, [lane.task.thresholds for lane in lanes], [lane.ties for lane in lanes])
        keep_rows(lanes, states, passes.apply(states, [output.sink for output in outputs], tell))
        for lane, state in zip(lanes, states, strict=True):
            lane.keep_ties(state)


class Projections:
    """Keeps of each matrix the part that its singular values say, which are found once for all lanes."""

    def memory(self, lanes: Sequence[Lane]) -> int:
        return matrix_bytes(lanes[0].task.shard.tensors)

    def begin(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            projection.check_library(lane.out)

    def write(
        self, lanes: Sequence[Lane], states: Sequence[SectionState], outputs: Sequence[Output], tell: Tell
    ) -> None:
        keep_rows(lanes, states, projection.write(states, [output.sink for output in outputs], tell))


def keep_rows(lanes: Sequence[Lane], states: Sequence[SectionState], rows: Sequence[np.ndarray]) -> None:
    """Put what was measured of a section, (t,) MEASURED of each lane, where the lanes have it of their shards."""
    for lane, state, of_lane in zip(lanes, states, rows, strict=True):
        lane.rows[[lane.place[t.name] for t in state.tensors]] = of_lane


_OPERATIONS: dict[str, Operation] = {"selection": Elements(), "blend": Elements(), "matrix": Projections()}


def operation_of(recipe: Recipe) -> Operation:
    return Merging() if recipe.merged else _OPERATIONS[METHODS[recipe.method].kind]
