"""Writing the sparse task vector of a shard: the shard's bytes go in, what differs from base comes out.

It takes the bytes as any file does, in the thread that writes, so it does not matter which method or device made them.
What is found is kept in a nameless file until the shard's end, since only then its size is known.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fapm.errors import UserError
from fapm.formats import sparse
from fapm.formats.delta import BASE, BEFORE, BLOCKS, PLACES, SPARSE, VALUES, WHOLE, delta_name
from fapm.formats.dtypes import is_weight, itemsize
from fapm.formats.header import build_header
from fapm.formats.sparse import COLUMNS, DELTA_BLOCK, Patched
from fapm.formats.tensor import Alias, Part, Sides
from fapm.planning.plan import PairedTensor, Shard
from fapm.storage.local import plain_errors
from fapm.storage.store import Store, Writer

_COPIED = 8 << 20  # bytes at once


class Parts:
    """Which tensor each byte of a shard belongs to, as the bytes come."""

    def __init__(self, shard: Shard):
        self._tensors = iter(shard.tensors)
        self._skip = len(shard.header)
        self._tensor: PairedTensor | None = None
        self._left = 0

    def of(self, data: np.ndarray) -> Iterator[tuple[PairedTensor, np.ndarray, bool]]:
        """A tensor, its next bytes, and whether they are its last; of a tensor without bytes none."""
        data = data[self._skipped(data.size) :]
        while True:
            if self._tensor is None:
                self._tensor = next(self._tensors, None)
                if self._tensor is None:
                    return
                self._left = self._tensor.nbytes
            elif not data.size:
                return
            taken, data = data[: self._left], data[self._left :]
            if not taken.size and self._left:
                return
            tensor = self._tensor
            self._left -= taken.size
            if not self._left:
                self._tensor = None
            yield tensor, taken, not self._left

    def _skipped(self, size: int) -> int:
        skipped = min(self._skip, size)
        self._skip -= skipped
        return skipped


class Checked:
    """A writer before another that compares what is written with the checksums that a sparse task vector promises."""

    def __init__(self, shard: Shard, writer: Writer):
        self._parts, self._writer, self._digest = Parts(shard), writer, xxhash.xxh3_128()

    def write(self, offset: int, data: np.ndarray | bytes) -> None:
        for tensor, taken, is_last in self._parts.of(_array(data)):
            self._digest.update(taken.data)
            if is_last:
                found, self._digest = self._digest.hexdigest(), xxhash.xxh3_128()
                wanted = promised(tensor)
                if wanted and found != wanted:
                    raise UserError(
                        f"tensor {tensor.name!r}: base and the sparse task vector do not give what it was made from: "
                        "base is another one, or either is damaged"
                    )
        self._writer.write(offset, data)

    def publish(self) -> None:
        self._writer.publish()

    def discard(self) -> None:
        self._writer.discard()


def promised(tensor: PairedTensor) -> str:
    """The checksum that the output's tensor must have, where it is put together from base and a sparse task vector."""
    info = tensor.finetuned
    known = tensor.action == "finetuned" and info is not None and info.dtype == tensor.dtype
    return info.form.checksum if known and info and isinstance(info.form, Patched | Alias) else ""


class DeltaWriter:
    """A writer of a shard that leaves its sparse task vector.

    Args:
        sides: base, to compare with.
        out: where the file will appear.
        compress, reversible: how it is written, and whether with base's values.
        also: another writer, that gets the same bytes.
        first: another one over the same base, that gets as many bytes before this one, and takes base's checksums.
    """

    def __init__(
        self,
        shard: Shard,
        sides: Sides,
        out: Store,
        compress: bool,
        reversible: bool,
        also: Writer | None = None,
        first: DeltaWriter | None = None,
    ):
        self._shard, self._sides, self._out, self._also = shard, sides, out, also
        self._how, self._histograms = (compress, reversible), sparse.Scratch()
        self._parts = Parts(shard)
        self._places, self._values, self._before = _Nameless(out), _Nameless(out), _Nameless(out)
        self._entries: list[tuple[str, str, tuple[int, ...], int, _Nameless | bytes, int]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        self._file: Writer | None = None
        self._first = first
        self._there: tuple[str, int, np.ndarray] = "", 0, np.empty(0, np.uint8)
        self._begin()

    def _begin(self) -> None:
        self._digest, self._of_base = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._table: list[list[int]] = []
        self._pending = np.empty(0, np.uint8)
        self._done = 0  # elements
        self._at = self._places.tell(), self._values.tell(), self._before.tell()

    def know(self, name: str, start: int, base: np.ndarray) -> None:
        """As of `writing.Comparing`."""
        self._there = name, start, base

    def write(self, offset: int, data: np.ndarray | bytes) -> None:
        if self._also:
            self._also.write(offset, data)
        for tensor, taken, is_last in self._parts.of(_array(data)):
            self._digest.update(taken.data)
            if is_comparable(tensor):
                self._compare(tensor, taken, is_last)
            else:
                self._values.write(taken.data)
            if is_last:
                self._end(tensor)

    def _compare(self, tensor: PairedTensor, taken: np.ndarray, is_last: bool) -> None:
        width = itemsize(tensor.dtype)
        size = DELTA_BLOCK * width
        if self._pending.size:  # fill up the block that was begun
            more = size - self._pending.size
            self._pending, taken = np.concatenate([self._pending, taken[:more]]), taken[more:]
            if self._pending.size < size and not is_last:
                return
            self._block(tensor, self._pending.view(f"u{width}"))
            self._pending = self._pending[:0]
        while taken.size >= size or (is_last and taken.size):
            self._block(tensor, _aligned(taken[:size], width))
            taken = taken[size:]
        self._pending = taken.copy()

    def _block(self, tensor: PairedTensor, out: np.ndarray) -> None:
        assert tensor.base
        stored = self._base(tensor, self._done, self._done + out.size)
        if self._first is None:
            self._of_base.update(stored.data)
        base = sparse.in_dtype(stored, tensor.base.dtype, tensor.dtype)
        row, places, values, before = sparse.encode(base, out, *self._how, self._histograms)
        self._table.append(row)
        self._places.write(places)
        self._values.write(values)
        self._before.write(before)
        self._done += out.size

    def _base(self, tensor: PairedTensor, start: int, stop: int) -> np.ndarray:
        """The bytes of base's elements."""
        assert tensor.base
        width, (name, first, there) = itemsize(tensor.base.dtype), self._there
        if name == tensor.name and first <= start and stop <= first + there.size // width:
            found = there[(start - first) * width : (stop - first) * width]
            if found.ctypes.data % width == 0:
                return found
        stored = self._histograms.take("base", (stop - start) * width)
        self._sides.read_into(Part("base", tensor.base), start * width, stop * width, stored)
        return stored

    def _end(self, tensor: PairedTensor) -> None:
        name, (places, values, before) = tensor.name, self._at
        said: dict[str, Any] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "xxh3_128": self._digest.hexdigest(),
        }  # fmt: skip
        if not is_comparable(tensor):
            self._entries.append((name, tensor.dtype, tensor.shape, tensor.nbytes, self._values, values))
            self.tensors[name] = said | {"as": WHOLE}
        else:
            kept = sum(row[sparse.KEPT] for row in self._table)
            self.tensors[name] = said | {
                "as": SPARSE if kept else BASE, "kept": kept, "base_xxh3_128": self._of_base.hexdigest(),
            }  # fmt: skip
            if kept:
                table = np.array(self._table, "<i8")
                for what, data, shape, file, at in (
                    (BLOCKS, table.tobytes(), (len(table), COLUMNS), None, 0),
                    (PLACES, b"", (self._places.tell() - places,), self._places, places),
                    (VALUES, b"", (self._values.tell() - values,), self._values, values),
                    *([(BEFORE, b"", (self._before.tell() - before,), self._before, before)] if self._how[1] else []),
                ):
                    dtype, nbytes = ("I64", len(data)) if file is None else ("U8", shape[0])
                    self._entries.append((name + what, dtype, shape, nbytes, file or data, at))
            else:  # bitmasks of nothing, perhaps
                self._places.seek(places)
                self._values.seek(values)
        self._begin()

    def finish(self) -> dict[str, Any]:
        """Put the file together; returns its name, size and xxh3-128. It appears when it is published."""
        if self._first:
            for name, said in self.tensors.items():
                if "base_xxh3_128" in said:
                    said["base_xxh3_128"] = self._first.tensors[name]["base_xxh3_128"]
        header = build_header(entry[:4] for entry in self._entries)
        size, name = len(header) + sum(entry[3] for entry in self._entries), delta_name(self._shard.name)
        self._file = self._out.create(name, size)
        digest, offset = xxhash.xxh3_128(), 0
        for data in chain([header], self._stored()):
            digest.update(data)
            self._file.write(offset, data)
            offset += len(data)
        assert offset == size
        return {"name": name, "nbytes": size, "xxh3_128": digest.hexdigest()}

    def _stored(self) -> Iterator[bytes]:
        for *_, nbytes, file, at in self._entries:
            if isinstance(file, bytes):
                yield file
                continue
            file.seek(at)
            for start in range(0, nbytes, _COPIED):
                yield file.read(min(_COPIED, nbytes - start))

    def publish(self) -> None:
        assert self._file
        self._file.publish()
        if self._also:
            self._also.publish()

    def discard(self) -> None:
        for writer in (self._file, self._also):
            if writer:
                writer.discard()
        for file in (self._places, self._values, self._before):
            file.close()


def is_comparable(tensor: PairedTensor) -> bool:
    """Whether a tensor can be told by where it differs from base's tensor of its name."""
    base = tensor.base
    return (
        base is not None
        and base.name == tensor.name
        and (is_weight(tensor.dtype) or tensor.dtype == base.dtype)
        and sparse.fits(base, tensor.dtype, tensor.shape)
    )


def _aligned(stored: np.ndarray, width: int) -> np.ndarray:
    return (stored if stored.ctypes.data % width == 0 else stored.copy()).view(f"u{width}")


def _array(data: np.ndarray | bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data


class _Nameless:
    """A file without a name, that is gone with this process; on the disk of the output where that is here.

    Raises:
        UserError, PassingError: from every method, where it cannot be done.
    """

    def __init__(self, out: Store):
        path = getattr(out, "path", None)
        self._where = str(path) if path and Path(path).is_dir() else tempfile.gettempdir()
        with plain_errors(self._where):
            self._file = tempfile.TemporaryFile(dir=self._where)  # noqa: SIM115

    def write(self, data: Any) -> None:
        with plain_errors(self._where):
            self._file.write(data)

    def read(self, length: int) -> bytes:
        with plain_errors(self._where):
            return self._file.read(length)

    def seek(self, at: int) -> None:
        with plain_errors(self._where):
            self._file.seek(at)  # what is buffered is written

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
