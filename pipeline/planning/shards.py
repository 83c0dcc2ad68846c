"""Shards and groups: the output cut into files, and the elements that compete for one budget.

Order: tensors are laid out by name, over the shards too. So the shards of a group are in the order of its
ties (SEMANTICS.md, 5), and a worker hands out its part of a tie quota without asking another.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from fapm.formats.checkpoint import MODEL
from fapm.formats.header import build_header
from fapm.planning.plan import Group, PairedTensor, Shard


def group_of(name: str, scope: str) -> str:
    """The group that a tensor competes in.

    A layer is named by the path up to its first number that follows a name: `model.layers.7` holds
    `model.layers.7.mlp.experts.3.w1.weight` too. A tensor outside any numbered block is a group of its own.
    """
    if scope == "global":
        return "all"
    if scope == "layer":
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if parts[i].isdigit() and not parts[i - 1].isdigit():
                return ".".join(parts[: i + 1])
    return name


def pattern_of(name: str) -> str:
    """The name with * for its numbers: that of all tensors whose names differ in numbers only."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def default_shard_size(total: int) -> int:
    """Bytes of a shard where the recipe does not say: 1 GiB, less for small models, so that workers finish together.

    An eighth of the whole, from 256 MiB to 1 GiB. Never a matter of how many workers there are: the bytes would be too.
    """
    return min(max(total // 8, 256 << 20), 1 << 30)


MOST_TENSORS = 1 << 14
"""Tensors of a shard, at most: of small ones it is their number that takes the time."""


def cut(tensors: list[PairedTensor], shard_size: int) -> tuple[Shard, ...]:
    """Cut tensors, in the order given, into shards of about equal size, of at most `shard_size` bytes and MOST_TENSORS.

    A tensor larger than that has a shard of its own. Names follow the Hugging Face convention. What lies in a folder of
    its own has one shard there.
    """
    parts: list[list[PairedTensor]] = []
    for folder, grouped in itertools.groupby(tensors, key=lambda t: t.folder):
        inside = list(grouped)
        parts += [inside] if folder else _parts(inside, shard_size)
    count = sum(not part or not part[0].folder for part in parts)
    numbers = itertools.count()
    return tuple(
        _shard(i, part, f"{part[0].folder}/{MODEL}" if part and part[0].folder else _shard_name(next(numbers), count))
        for i, part in enumerate(parts or [[]])
    )


def _parts(tensors: list[PairedTensor], shard_size: int) -> list[list[PairedTensor]]:
    total = sum(t.nbytes for t in tensors)
    count = max(1, math.ceil(total / shard_size), math.ceil(len(tensors) / MOST_TENSORS))
    parts: list[list[PairedTensor]] = [[]]
    here = done = 0
    for tensor in tensors:
        full = here + tensor.nbytes > shard_size or done >= total * len(parts) / count
        if parts[-1] and ((tensor.nbytes and full) or len(parts[-1]) == MOST_TENSORS):
            parts.append([])
            here = 0
        parts[-1].append(tensor)
        here += tensor.nbytes
        done += tensor.nbytes
    return parts


def _shard_name(index: int, count: int) -> str:
    return MODEL if count <= 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shard(index: int, tensors: list[PairedTensor], name: str) -> Shard:
    header = build_header((t.stored_name, t.dtype, t.shape, t.nbytes) for t in tensors)
    return Shard(index, name, tuple(tensors), header, len(header) + sum(t.nbytes for t in tensors))


def group(shards: Iterable[Shard]) -> dict[str, Group]:
    """The groups of a cut, each with its budget."""
    competing: dict[str, dict[float, int]] = {}
    tensors: dict[str, int] = {}
    first: dict[str, int] = {}
    cross_shard: set[str] = set()
    for shard in shards:
        for tensor in shard.tensors:
            name = tensor.group
            if name:
                numels = competing.setdefault(name, {})
                numels[tensor.parameter] = numels.get(tensor.parameter, 0) + tensor.common
                tensors[name] = tensors.get(name, 0) + 1
                if first.setdefault(name, shard.index) != shard.index:
                    cross_shard.add(name)
    return {
        name: Group(name, sum(numels.values()), budget(numels), tensors[name], name in cross_shard)
        for name, numels in competing.items()
    }


def budget(numels: dict[float, int]) -> int:
    """k = int(Σ n_d·d) over densities d of n_d elements each, in ascending order and in float64 (SEMANTICS.md, 8)."""
    k = 0.0
    for density in sorted(numels):
        k += numels[density] * density
    return int(k)


def index_json(shards: Iterable[Shard]) -> dict[str, object]:
    """The index that Hugging Face libraries read: the size of all tensors in bytes, and each one's file."""
    there = [(t, s.name) for s in shards for t in s.tensors if not t.folder]
    weight_map = {t.name: name for t, name in there}
    return {"metadata": {"total_size": sum(t.nbytes for t, _ in there)}, "weight_map": weight_map}
