"""Tasks and their results, and the files in which a worker leaves its counts for the driver."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load, save

from fapm.layout import measure_name, sample_name
from fapm.planning.plan import Group, PairedTensor, Shard
from fapm.recipe import Recipe
from fapm.scoring.methods import METHODS
from fapm.scoring.threshold import KEEP_ALL, KEEP_NONE, Bracket, Threshold, at_the_ends
from fapm.storage.store import Store


@dataclass(frozen=True)
class LaneTask:
    """Work on one shard for one run.

    Attributes:
        recipe, out: of the run.
        groups: the groups that have tensors in the shard.
        brackets: for `measure`, the keys to count, for groups over several shards.
        thresholds: for `write`, what was found for those groups, with this shard's part of the tie quota.
        round: how many times the groups have been measured.
        source: of one of a merge's sources its number, and `read`: the merge's shard, which is read for all of them.
        parts: of a merge the work for its sources.
    """

    recipe: Recipe
    out: Store
    shard: Shard
    groups: dict[str, Group]
    brackets: dict[str, Bracket] = field(default_factory=dict)
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    round: int = 0
    source: int = 0
    read: Shard | None = None
    parts: tuple[LaneTask, ...] = ()

    def cross_shard(self) -> list[PairedTensor]:
        """The shard's tensors whose groups lie in other shards too."""
        return [t for t in self.shard.tensors if t.group and t.common and self.groups[t.group].cross_shard]


@dataclass(frozen=True)
class Task:
    """Work on one shard for one or several runs over the same inputs, in one reading, as it is told to a worker."""

    lanes: tuple[LaneTask, ...]

    @property
    def shard(self) -> Shard:
        """What is read: the first run's shard, that of the others has the same tensors; of sources their merge's."""
        return self.lanes[0].read or self.lanes[0].shard

    @property
    def parts(self) -> tuple[LaneTask, ...]:
        """The lanes, and of a merge those of its sources."""
        return tuple(part for lane in self.lanes for part in lane.parts or (lane,))

    @property
    def round(self) -> int:
        return self.lanes[0].round


def here() -> str:
    """The host and the process."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class Done:
    """Result of a task.

    Attributes:
        progress_bytes: input bytes that the step was about; the progress of the run.
        read_bytes: input bytes that it read; `written_bytes` of the output; `seconds` of the wall.
        reading: seconds of the threads that read, while they did; `writing`: the same, and hashing and making durable;
            `computing`: CPU seconds of the thread that computes. They pass at the same time.
        where: `here`, of the worker.
        note: what the user should know of how it was done.
        tries: how often it was begun, this time included.
    """

    shard: int
    progress_bytes: int
    read_bytes: int
    written_bytes: int
    seconds: float
    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    where: str = field(default_factory=here)
    tries: int = 1
    note: str = ""


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was told to stop; what is finished stays."""


def known_threshold(recipe: Recipe, group: Group, parameter: float) -> Threshold | None:
    """The threshold where no score needs to be looked at: k is 0 or all, or the method chooses nothing.

    Args:
        parameter: of the group's one tensor, where the method chooses nothing.
    """
    if not METHODS[recipe.method].has_budget:
        return KEEP_ALL if parameter else KEEP_NONE
    return at_the_ends(group.numel, group.k)


# The files.

READ_BYTES = "read_bytes"
"""In a file of samples or counts, what it cost to make."""


def save_arrays(folder: Store, name: str, read_bytes: int, groups: list[str], **arrays: np.ndarray) -> None:
    """Leave arrays about some groups for the driver."""
    names = np.frombuffer(json.dumps(groups).encode(), np.uint8)
    folder.write(name, pack({READ_BYTES: np.array([read_bytes]), "groups": names, **arrays}))


def load_arrays(folder: Store, name: str, *wanted: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the groups that a worker saved something about, and the arrays."""
    saved = unpack(folder.read(name))
    return json.loads(saved["groups"].tobytes()), {key: saved[key] for key in wanted}


def saved_read_bytes(folder: Store, name: str) -> int:
    """How many input bytes a worker read for what it saved under this name."""
    return int(unpack(folder.read(name))[READ_BYTES][0])


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as bytes. Not in numpy's format: reading it parses Python, which Python 3.11 cannot do in two threads."""
    return zlib.compress(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}), 1)


def unpack(data: bytes) -> dict[str, np.ndarray]:
    return load(zlib.decompress(data))


def load_means(folder: Store, shard: Shard, source: int = 0) -> np.ndarray:
    """mean|p| and Σp² of the tensors of a shard, (t, 2) float64: NaN where they are not known yet.

    Of tensors in groups over several shards, sampling finds those of the large ones and the first round the others.
    """
    means = np.full((len(shard.tensors), 2), np.nan)
    for name in (sample_name(shard.index, source), measure_name(shard.index, 1, source)):
        if folder.has(name):
            found = load_arrays(folder, name, "means")[1]["means"]
            means = np.where(np.isnan(means), found, means)
    return means


Check = Callable[[], None]
"""Raises `Interrupted` if the run was told to stop."""
