"""Cutting: what of a shard a step works on, and which of it has to be together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fapm.planning.plan import PairedTensor
from fapm.shard.task import LaneTask, Task


@dataclass(frozen=True)
class Cut:
    """Tensors to be cut into sections.

    Attributes:
        together: groups whose tensors have to lie in one section.
        kinds: by name, what small tensors have to agree in to share a slice; their own parameter where it is empty.
    """

    tensors: list[PairedTensor]
    together: list[str]
    kinds: Mapping[str, Any]


HowToCut = Callable[[Task], Cut]


def to_measure(task: Task) -> Cut:
    """The tensors of the groups that are counted."""
    return cut_for(task, {t.name for of in task.parts for t in of.cross_shard() if t.group in of.brackets})


def to_write(task: Task) -> Cut:
    """All tensors of the shard."""
    return cut_for(task, {t.name for t in task.shard.tensors})


def cut_for(task: Task, names: set[str]) -> Cut:
    """The shard's tensors of these names.

    Of several lanes the one with the widest groups says what has to be together: the groups of the others lie inside
    them, or are single tensors. Small tensors share a slice only if they have one parameter in every lane.
    """

    def together(of: LaneTask) -> list[str]:
        return [name for name, group in of.groups.items() if not group.cross_shard and group.tensors > 1]

    widest = max(task.parts, key=lambda of: sum(of.groups[name].tensors for name in together(of)))
    groups = {t.name: t.group for t in widest.shard.tensors}
    mine = ((t, groups[t.name]) for t in task.shard.tensors if t.name in names)
    tensors = [t if t.group == group else replace(t, group=group) for t, group in mine]
    whole = len(tensors) == len(task.shard.tensors)
    by_lane = [{t.name: (t.parameter, t.scale) for t in of.shard.tensors} for of in task.parts]
    kinds = {t.name: tuple(lane[t.name] for lane in by_lane) for t in tensors}
    return Cut(tensors, together(widest) if whole else [], kinds)
