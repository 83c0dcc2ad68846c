"""Layouts of one model: the names and tensors of its files on the Hub, and those that transformers has in memory.

Which is which is known from a table (layouts.json) that `tests/layouts/make.py` makes from transformers' own: for a
class of models, patterns that rename, and operations that stack, join, cut, turn or interleave tensors. Applied to the
files of either layout they give the names in memory; so two checkpoints in different layouts meet there, and base's
tensors are formed as finetuned keeps them. An operation that is not known here changes nothing, and what it would have
changed finds no partner.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fapm.errors import UserError
from fapm.formats.dtypes import itemsize
from fapm.formats.names import renaming
from fapm.formats.tensor import Part, Side, Sides, TensorInfo, formed

_TABLE = Path(__file__).with_name("layouts.json")
_MOST_BLOCKS = 1 << 16
_UNIT = 32 << 20
"""Bytes of a part of a tensor that are read at once where its elements lie in another order."""


class _UnknownError(Exception):
    """An operation that is not known here."""


@dataclass(frozen=True, slots=True)
class Block:
    """A box of an array whose elements are those of a stored tensor at regular distances.

    Attributes:
        origin, shape: the box.
        name: of the stored tensor; offset: of the box's first element in it; strides: between neighbours in it.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor in memory, as boxes of stored ones."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    dtype: str


def _stored(info: TensorInfo) -> Array:
    strides = tuple(math.prod(info.shape[i + 1 :]) for i in range(len(info.shape)))
    return Array(info.shape, (Block((0,) * len(info.shape), info.shape, info.name, 0, strides),), info.dtype)


def _put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _joined(arrays: Sequence[Array], dim: int) -> Array:
    first = arrays[0]
    blocks: list[Block] = []
    at = 0
    for array in arrays:
        if array.dtype != first.dtype or _put(array.shape, dim, 0) != _put(first.shape, dim, 0):
            raise _UnknownError
        blocks += [replace(b, origin=_put(b.origin, dim, b.origin[dim] + at)) for b in array.blocks]
        at += array.shape[dim]
    return Array(_put(first.shape, dim, at), tuple(blocks), first.dtype)


def _stacked(arrays: Sequence[Array], dim: int) -> Array:
    def with_one(array: Array) -> Array:
        blocks = [
            Block((*b.origin[:dim], 0, *b.origin[dim:]), (*b.shape[:dim], 1, *b.shape[dim:]), b.name, b.offset,
                  (*b.strides[:dim], 0, *b.strides[dim:]))
            for b in array.blocks
        ]  # fmt: skip
        return Array((*array.shape[:dim], 1, *array.shape[dim:]), tuple(blocks), array.dtype)

    return _joined([with_one(array) for array in arrays], dim)


def _cut(array: Array, dim: int, start: int, stop: int) -> Array:
    blocks = []
    for b in array.blocks:
        first, last = max(start, b.origin[dim]), min(stop, b.origin[dim] + b.shape[dim])
        if first < last:
            blocks.append(
                Block(
                    _put(b.origin, dim, first - start),
                    _put(b.shape, dim, last - first),
                    b.name,
                    b.offset + (first - b.origin[dim]) * b.strides[dim],
                    b.strides,
                )
            )
    return Array(_put(array.shape, dim, stop - start), tuple(blocks), array.dtype)


def _turned(array: Array, one: int, other: int) -> Array:
    order = list(range(len(array.shape)))
    order[one], order[other] = order[other], order[one]

    def turn(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[i] for i in order)

    blocks = [Block(turn(b.origin), turn(b.shape), b.name, b.offset, turn(b.strides)) for b in array.blocks]
    return Array(turn(array.shape), tuple(blocks), array.dtype)


def _folded(array: Array, dim: int, inner: int) -> Array:
    """A dimension of n as two, of n/inner and inner."""
    if not inner or array.shape[dim] % inner:
        raise _UnknownError
    blocks = []
    box: tuple[tuple[int, int], tuple[int, int]]
    for b in array.blocks:
        origin, size, stride = b.origin[dim], b.shape[dim], b.strides[dim]
        if origin % inner == 0 and size % inner == 0:
            box = (origin // inner, 0), (size // inner, inner)
        elif origin // inner == (origin + size - 1) // inner:
            box = (origin // inner, origin % inner), (1, size)
        else:
            raise _UnknownError
        (begin, two), strides = box, (inner * stride, stride)
        blocks.append(
            Block(
                (*b.origin[:dim], *begin, *b.origin[dim + 1 :]),
                (*b.shape[:dim], *two, *b.shape[dim + 1 :]),
                b.name,
                b.offset,
                (*b.strides[:dim], *strides, *b.strides[dim + 1 :]),
            )
        )
    shape = (*array.shape[:dim], array.shape[dim] // inner, inner, *array.shape[dim + 1 :])
    return Array(shape, tuple(blocks), array.dtype)


def _unfolded(array: Array, dim: int) -> Array:
    """Two dimensions as one."""
    inner = array.shape[dim + 1]
    blocks = []
    for b in array.blocks:
        (i, j), (p, q), (far, near) = (values[dim : dim + 2] for values in (b.origin, b.shape, b.strides))
        whole = p == 1 or (q == inner and far == inner * near)
        for k in range(1 if whole else p):
            blocks.append(
                Block(
                    (*b.origin[:dim], (i + k) * inner + j, *b.origin[dim + 2 :]),
                    (*b.shape[:dim], p * q if whole else q, *b.shape[dim + 2 :]),
                    b.name,
                    b.offset + k * far,
                    (*b.strides[:dim], near, *b.strides[dim + 2 :]),
                )
            )
    if len(blocks) > _MOST_BLOCKS:
        raise _UnknownError
    return Array((*array.shape[:dim], array.shape[dim] * inner, *array.shape[dim + 2 :]), tuple(blocks), array.dtype)


def _interleaved(array: Array, dim: int, inverse: bool) -> Array:
    size = array.shape[dim]
    folded = _folded(array, dim, size // 2 if inverse else 2)
    return _unfolded(_turned(folded, dim, dim + 1), dim)


# Patterns and operations, as transformers applies them.


@dataclass(frozen=True, slots=True)
class _Transform:
    """Patterns of names, what they become, and what is done with the tensors; nothing where they are only renamed."""

    pattern: re.Pattern[str]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    how: tuple[tuple[str, Mapping[str, Any]], ...] | None
    scope: str | None
    prefix: str
    together: bool

    def apply(self, name: str, seen: set[int]) -> tuple[str, str | None]:
        """The name as it becomes, and the pattern that it matches; the same name and None if none does.

        Args:
            seen: which transforms of names that go together have begun.
        """
        before, rest = "", name
        if self.scope is not None:
            scope, prefix = (f"{part}." if part else "" for part in (self.scope, self.prefix))
            before = next((start for start in (prefix + scope, scope) if name.startswith(start)), "")
            if not before and scope:
                return name, None
            rest = name[len(before) :]
        found = self.pattern.search(rest)
        if not found:
            return name, None
        group = next(key for key, value in found.groupdict().items() if value is not None)
        index = int(group[1:])
        if self.together:
            if index == 0:
                seen.add(id(self))
            elif id(self) not in seen:
                return name, None
        target = self.targets[index if self.together else 0]
        first = self.pattern.groupindex[group]
        target = re.sub(r"\\(\d+)", lambda m: found.group(first + int(m[1])) or "", target)
        return before + rest.replace(found[0], target, 1), self.sources[index]


def _transform(said: Mapping[str, Any]) -> _Transform | None:
    if "unknown" in said:
        return None
    branches = []
    for i, source in sorted(enumerate(said["from"]), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        pattern += r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
        branches.append(f"(?P<g{i}>{pattern})")
    how = said.get("how")
    return _Transform(
        re.compile("|".join(branches)), tuple(said["from"]), tuple(said["to"]),
        None if how is None else tuple((name, arguments) for name, arguments in how),
        said.get("scope"), said.get("prefix", ""), bool(said.get("together")),
    )  # fmt: skip


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_TABLE.read_text())
    return found


@cache
def _transforms(architecture: str) -> tuple[_Transform, ...]:
    table = _table()
    listed = table["lists"][table["by class"][architecture]] if architecture in table["by class"] else []
    return tuple(t for t in map(_transform, [*listed, *table["of all"]]) if t)


def known_since() -> str:
    """Version of transformers, and the like, that the table was made from."""
    return str(_table()["made from"])


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def in_memory(tensors: Mapping[str, TensorInfo], architecture: str) -> tuple[dict[str, Array], list[str]]:
    """The tensors that a model of some class has in memory, as boxes of those that its files hold.

    Args:
        architecture: the class, as in config.json's `architectures`; of one that is not known, what holds for all.

    Returns:
        They, and the names of those that become others by operations that are not known here.
    """
    unknown: list[str] = []
    transforms = _transforms(architecture)
    renamings = [t for t in transforms if t.how is None]
    converters = [t for t in transforms if t.how is not None]
    seen: set[int] = set()
    found: dict[str, Array] = {}
    collected: dict[tuple[int, str], dict[str, list[str]]] = {}
    for name in sorted(tensors, key=_natural):
        new = name
        for transform in renamings:
            new, _ = transform.apply(new, seen)
        for index, transform in enumerate(converters):
            target, source = transform.apply(new, seen)
            if source is not None:
                collected.setdefault((index, target), {}).setdefault(source, []).append(name)
                break
        else:
            found.setdefault(new, _stored(tensors[name]))
    for (index, target), sources in collected.items():
        try:
            made = _converted(
                converters[index], target, {s: [_stored(tensors[n]) for n in names] for s, names in sources.items()}
            )
        except (_UnknownError, IndexError, ValueError):
            made = {name: _stored(tensors[name]) for names in sources.values() for name in names}
            unknown += made
        for name, array in made.items():
            found.setdefault(name, array)
    return found, unknown


def reordered(names: Iterable[str], architecture: str) -> list[str]:
    """The names under which a tensor's elements are in another order on the Hub than in memory."""
    transforms = _transforms(architecture)
    seen: set[int] = set()
    found = []
    for name in names:
        new = name
        for transform in transforms:
            if transform.how is None:
                new, _ = transform.apply(new, seen)
        if any(t.how is not None and t.apply(new, seen)[1] is not None for t in transforms):
            found.append(name)
    return found


def _converted(transform: _Transform, name: str, arrays: dict[str, list[Array]]) -> dict[str, Array]:
    assert transform.how is not None
    now: dict[str, list[Array]] = arrays
    for operation, said in transform.how:
        now = _operate(operation, said, now, transform.sources, transform.targets)
    full = name.replace("*.", "0.")
    key = next((key for key in now if key in full), None)
    before, after = (full.partition(key)[0], full.partition(key)[2]) if key is not None else ("", "")
    return {before + key + after: _single(made) for key, made in now.items()}


def _single(arrays: Sequence[Array]) -> Array:
    if len(arrays) != 1:
        raise _UnknownError
    return arrays[0]


def _operate(
    operation: str, said: Mapping[str, Any], now: dict[str, list[Array]], sources: Sequence[str], targets: Sequence[str]
) -> dict[str, list[Array]]:
    dim = said.get("dim", 0)
    if operation == "MergeModulelist":
        alone = len(now) == 1 and len(targets) == 1
        return {(targets[0] if alone else source): [_stacked(arrays, dim)] for source, arrays in now.items()}
    if operation == "Concatenate" and len(targets) == 1 and not said.get("num_shards_attribute"):
        return {targets[0]: [_joined([array for s in sources for array in now.get(s, ())], dim)]}
    if len(now) != 1:
        raise _UnknownError
    array = _single(next(iter(now.values())))
    if operation == "Chunk" and not said.get("num_shards_attribute"):
        size = -(-array.shape[dim] // len(targets))
        if size * len(targets) != array.shape[dim]:
            raise _UnknownError
        return {t: [_cut(array, dim, i * size, (i + 1) * size)] for i, t in enumerate(targets)}
    target = targets[0] if len(targets) == 1 else sources[0]
    if operation == "Transpose" and not said.get("check_dims"):
        return {target: [_turned(array, said["dim0"], said["dim1"])]}
    if operation == "Interleave":
        return {target: [_interleaved(array, dim, bool(said.get("inverse")))]}
    if operation == "Conv3dToLinear" and len(array.shape) in (2, 5):
        while len(array.shape) > 2:
            array = _unfolded(array, 1)
        return {target: [array]}
    raise _UnknownError


# base as finetuned keeps it.


@dataclass(frozen=True, slots=True)
class Run:
    """A box of elements that lie at regular distances both in a formed tensor and in one of its parts."""

    shape: tuple[int, ...]
    part: int
    to: int
    to_strides: tuple[int, ...]
    of: int
    of_strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """From its first element in the formed tensor to the one after its last."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.to_strides, strict=True))


@dataclass(frozen=True, slots=True)
class Arranged:
    """A tensor whose elements are those of others in another order: stacked, cut, turned, or interleaved."""

    parts: tuple[Part, ...]
    runs: tuple[Run, ...]

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        for run in self.runs:
            if run.to < stop and run.to + run.span > start:
                self._fill(run, start, stop, out, sides)

    def _fill(self, run: Run, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        part = self.parts[run.part]
        width = itemsize(part.info.dtype)
        if not run.shape:
            sides.read_into(part, run.of * width, (run.of + 1) * width, _slice(out, run.to - start, 1, width))
            return
        if run.to_strides == run.of_strides == _dense(run.shape):
            first, last = max(start, run.to), min(stop, run.to + run.span)
            begin = run.of + first - run.to
            target = _slice(out, first - start, last - first, width)
            sides.read_into(part, begin * width, (begin + last - first) * width, target)
            return
        reach = 1 + sum((n - 1) * stride for n, stride in zip(run.shape, run.of_strides, strict=True))
        if run.to_strides == _dense(run.shape) and reach * width <= _UNIT:
            key = (part, run.of, run.shape, run.of_strides)
            (made,) = sides.remember(key, lambda: (self._reordered(run, reach, width, part, sides),))
            first, last = max(start, run.to), min(stop, run.to + run.span)
            target = _slice(out, first - start, last - first, width)
            target[:] = made[(first - run.to) * width : (last - run.to) * width]
            return
        inner = replace(run, shape=run.shape[1:], to_strides=run.to_strides[1:], of_strides=run.of_strides[1:])
        stride, span = run.to_strides[0], inner.span
        low = max(0, -(-(start - run.to - span + 1) // stride)) if stride else 0
        high = min(run.shape[0], -(-(stop - run.to) // stride)) if stride else run.shape[0]
        for i in range(low, high):
            one = replace(inner, to=run.to + i * stride, of=run.of + i * run.of_strides[0])
            self._fill(one, start, stop, out, sides)

    def _reordered(self, run: Run, reach: int, width: int, part: Part, sides: Sides) -> np.ndarray:
        data = np.array(sides.take(part, run.of * width, (run.of + reach) * width))
        strides = [stride * width for stride in run.of_strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, (*run.shape, width), (*strides, 1))).reshape(
            -1
        )


def _slice(out: np.ndarray, first: int, count: int, width: int) -> np.ndarray:
    return out[first * width : (first + count) * width]


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def arranged_like(
    base: Mapping[str, Array],
    finetuned: Mapping[str, Array],
    tensors: Mapping[str, TensorInfo],
    wanted: Mapping[str, TensorInfo],
    side: Side = "base",
) -> tuple[dict[str, TensorInfo], set[str]]:
    """base's tensors as finetuned keeps them, by finetuned's names, and the names of base that they are made of.

    Args:
        base, finetuned: what both have in memory, by the same names. tensors, wanted: what they store.
        side: of base's tensors.
    """
    pieces: dict[str, list[tuple[Block, Block, tuple[int, ...], tuple[int, ...]]]] = {}
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, theirs in finetuned.items():
        ours = base.get(name)
        if ours is None:
            continue
        if _is_whole(ours, tensors) and _is_whole(theirs, wanted):
            stored = ours.blocks[0].name
            found[theirs.blocks[0].name] = replace(tensors[stored], name=theirs.blocks[0].name)
            used.add(stored)
        elif ours.shape == theirs.shape:
            for mine, other in itertools.product(ours.blocks, theirs.blocks):
                low = tuple(map(max, mine.origin, other.origin))
                high = tuple(
                    min(a + n, b + m)
                    for a, n, b, m in zip(mine.origin, mine.shape, other.origin, other.shape, strict=True)
                )
                if all(a < b for a, b in zip(low, high, strict=True)):
                    pieces.setdefault(other.name, []).append((mine, other, low, high))
    for name, boxes in pieces.items():
        info = wanted[name]
        dtypes = {tensors[mine.name].dtype for mine, *_ in boxes}
        if sum(math.prod(b - a for a, b in zip(low, high, strict=True)) for *_, low, high in boxes) != info.numel:
            continue  # not all of it is there
        if len(dtypes) != 1:
            continue
        names = list(dict.fromkeys(mine.name for mine, *_ in boxes))
        runs = [_run(mine, other, low, high, names.index(mine.name)) for mine, other, low, high in boxes]
        form = Arranged(tuple(Part(side, tensors[one]) for one in names), tuple(sorted(runs, key=lambda run: run.to)))
        found[name] = formed(name, dtypes.pop(), info.shape, form)
        used.update(names)
    return found, used


def _is_whole(array: Array, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether it is one stored tensor as it is, and all of it."""
    if len(array.blocks) != 1:
        return False
    block = array.blocks[0]
    return block.shape == array.shape == stored[block.name].shape and block.strides == _dense(block.shape)


def _run(mine: Block, other: Block, low: Iterable[int], high: Iterable[int], part: int) -> Run:
    """The elements of a box, the outermost dimension of the formed tensor first; of one element none is left."""
    to, of, dims = other.offset, mine.offset, []
    for d, (a, b) in enumerate(zip(low, high, strict=True)):
        to += (a - other.origin[d]) * other.strides[d]
        of += (a - mine.origin[d]) * mine.strides[d]
        if b - a > 1:
            dims.append((b - a, other.strides[d], mine.strides[d]))
    dims.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, int, int]] = []
    for count, far, near in dims:
        if merged and merged[-1][1] == count * far and merged[-1][2] == count * near:
            merged[-1] = (merged[-1][0] * count, far, near)
        else:
            merged.append((count, far, near))
    shape, to_strides, of_strides = zip(*merged, strict=True) if merged else ((), (), ())
    return Run(tuple(shape), part, to, tuple(to_strides), of, tuple(of_strides))


def in_layout_of(
    base: dict[str, TensorInfo],
    wanted: dict[str, TensorInfo],
    of_base: str,
    of_finetuned: str,
    all_of_it: bool,
    warnings: list[str],
) -> dict[str, TensorInfo]:
    """base's tensors, those without a partner as finetuned keeps them where it is in another layout of one model.

    Args:
        of_base, of_finetuned: the classes of their models.
        all_of_it: refuse what becomes another by an operation that is not known here.
    """
    ours = {name: info for name, info in base.items() if name not in wanted}
    theirs = {name: info for name, info in wanted.items() if name not in base}
    if not ours or not theirs:
        return base
    (here, lost), (there, lost_too) = in_memory(ours, of_base), in_memory(theirs, of_finetuned)
    if all_of_it and (lost or lost_too):
        raise UserError(
            f"base and finetuned are in two layouts of {of_finetuned}, and how {min([*lost, *lost_too])} becomes what "
            "the other has is not known here: save them in one layout (transformers: load each, and save_pretrained)"
        )
    moves = renaming(here, there, (), [])
    found, used = arranged_like({moves[name]: array for name, array in here.items()}, there, ours, theirs)
    if not found:
        return base
    unclear = reordered(base.keys() & wanted.keys(), of_finetuned)
    if unclear:
        raise UserError(
            f"base and finetuned are in two layouts of {of_finetuned}, and {min(unclear)}, which has one name in both, "
            "is not the same in both: save them in one layout (transformers: load each, and save_pretrained)"
        )
    called = f" of {of_finetuned}" if of_finetuned else ""
    warnings.append(f"base is compared in finetuned's layout{called} ({len(found)} tensors)")
    return {name: info for name, info in base.items() if name not in used} | found
