"""Tensors of a checkpoint: where their bytes lie, or how they are formed from others where they are read.

What is stored as it is wanted has a file and an offset. All else (an adapter's update added to base, codes times
their scales, experts in another layout) has a `Form`, and nobody downstream can tell.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from fapm.formats.dtypes import itemsize
from fapm.storage.store import Reader, Store

Side = Literal["base", "finetuned"]
Range = tuple[Side, str, int, int]
"""Bytes of a file of one side, from and to."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of one side.

    Attributes:
        file, offset: where it begins, in bytes from the start of the file; of a formed one the file of its first part.
        nbytes: its size as it is read.
        form: how it comes about, if it is not stored like that.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    form: Form | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors from which a tensor is formed, and the checkpoint it is of."""

    side: Side
    info: TensorInfo


class Form(Protocol):
    """How a tensor is formed; frozen, since it travels to the workers."""

    @property
    def parts(self) -> tuple[Part, ...]: ...

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        """Write the elements `start` to `stop` of the flat tensor into `out` (uint8).

        The same bytes however the tensor is cut up.
        """
        ...


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor of either side as it is, perhaps under another name.

    Attributes:
        checksum: the xxh3-128 that its bytes should have, in hexadecimal, if that is known.
    """

    of: Part
    checksum: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.of,)

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        width = itemsize(self.of.info.dtype)
        sides.read_into(self.of, start * width, stop * width, out)


def alias(side: Side, info: TensorInfo, name: str = "", checksum: str = "") -> TensorInfo:
    """The same tensor, seen from the other side, or under another name."""
    form = Alias(Part(side, info), checksum)
    return TensorInfo(name or info.name, info.dtype, info.shape, info.file, 0, info.nbytes, form)


def formed(name: str, dtype: str, shape: tuple[int, ...], form: Form) -> TensorInfo:
    """A tensor that a form makes."""
    return TensorInfo(name, dtype, shape, form.parts[0].info.file, 0, math.prod(shape) * itemsize(dtype), form)


def leaves(part: Part) -> Iterator[Part]:
    """The stored tensors of which one consists."""
    if part.info.form is None:
        yield part
        return
    for inner in part.info.form.parts:
        yield from leaves(inner)


_REMEMBERED = 64 << 20  # bytes


class Sides:
    """The two checkpoints' files, as forms read them. For any thread.

    Args:
        base, finetuned: where the files lie.
        loaded: ranges that are in memory already.
    """

    def __init__(self, base: Store, finetuned: Store, loaded: Mapping[Range, np.ndarray] | None = None):
        self._folders = {"base": base, "finetuned": finetuned}
        self._loaded = loaded or {}
        self._lock = threading.RLock()
        self._remembered: OrderedDict[Any, tuple[np.ndarray, ...]] = OrderedDict()

    def beside(self, loaded: Mapping[Range, np.ndarray]) -> Sides:
        """The same, with these ranges in memory."""
        found = Sides(self._folders["base"], self._folders["finetuned"], loaded)
        found._lock, found._remembered = self._lock, self._remembered
        return found

    def folder(self, side: Side) -> Store:
        return self._folders[side]

    def reader(self, part: Part) -> Reader:
        """The file of a stored tensor."""
        return self._folders[part.side].reader(part.info.file)

    def read_into(self, part: Part, begin: int, end: int, target: np.ndarray) -> None:
        """Bytes `begin` to `end` of a tensor, stored or formed."""
        part = _resolved(part)
        info = part.info
        if info.form:
            width = itemsize(info.dtype)
            info.form.fill(begin // width, end // width, target, self)
        else:
            self.reader(part).read_into(info.offset + begin, target)

    def read_rows(self, part: Part, begins: Sequence[int], rows: np.ndarray) -> None:
        """Fill each row of `rows` (n, length) with the bytes of a tensor from its `begins` on."""
        part = _resolved(part)
        if part.info.form is None:
            self.reader(part).read_rows([part.info.offset + begin for begin in begins], rows)
            return
        for begin, row in zip(begins, rows, strict=True):
            self.read_into(part, begin, begin + row.size, row)

    def take(self, part: Part, begin: int, end: int) -> np.ndarray:
        """The same bytes (uint8), not to be changed."""
        there = self._there(part, begin, end)
        if there is not None:
            return there
        target = np.empty(end - begin, np.uint8)
        self.read_into(part, begin, end, target)
        return target

    def copy_into(self, part: Part, begin: int, end: int, target: np.ndarray) -> None:
        """The same bytes, for who changes them."""
        there = self._there(part, begin, end)
        if there is None:
            self.read_into(part, begin, end, target)
        else:
            target[:] = there

    def _there(self, part: Part, begin: int, end: int) -> np.ndarray | None:
        part = _resolved(part)
        first = part.info.offset
        return None if part.info.form else self._loaded.get((part.side, part.info.file, first + begin, first + end))

    def whole(self, part: Part) -> np.ndarray:
        """All bytes of a tensor that is small."""
        return self.take(part, 0, part.info.nbytes)

    def remember(self, key: Any, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """Result of `make`, kept for the next calls with the same key as long as there is room."""
        with self._lock:
            if key not in self._remembered:
                self._remembered[key] = make()
                while len(self._remembered) > 1 and self._size() > _REMEMBERED:
                    self._remembered.popitem(last=False)
            self._remembered.move_to_end(key)
            return self._remembered[key]

    def _size(self) -> int:
        return sum(array.nbytes for arrays in self._remembered.values() for array in arrays)


def _resolved(part: Part) -> Part:
    """The tensor that an alias means."""
    while isinstance(part.info.form, Alias):
        part = part.info.form.of
    return part
