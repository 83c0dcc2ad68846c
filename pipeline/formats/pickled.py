"""Checkpoints of torch.save and of torch.distributed.checkpoint: where their tensors lie, found out by another process.

The tensors are then read by ranges like any others; nothing of theirs is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from fapm.errors import UserError
from fapm.formats.dtypes import BITS, itemsize
from fapm.formats.header import MAX_NUMEL, is_name
from fapm.formats.names import Concatenated
from fapm.formats.sandbox import RefusedError, ask
from fapm.formats.tensor import Part, Side, Sides, TensorInfo, formed
from fapm.storage.records import Count, Name, Record, Text
from fapm.storage.store import Store

METADATA = ".metadata"
_TORCH = re.compile(r"(pytorch_model.*|model|adapter_model|consolidated.*)\.(bin|pt|pth)")


def torch_files(top: set[str]) -> list[str]:
    """The files of torch.save among those of a folder that hold a model."""
    return sorted(name for name in top if _TORCH.fullmatch(name))


def distributed_folder(folder: Store) -> str | None:
    """Where in a folder a distributed checkpoint lies: there, or in its only sub-folder of that kind."""
    if folder.has(METADATA):
        return "."
    inside = [name for name in folder.folders() if folder.has(f"{name}/{METADATA}") and not name.startswith("optim")]
    return inside[0] if len(inside) == 1 else None


def describe(folder: Store, kind: str, names: Sequence[str], side: Side, where: str) -> list[TensorInfo]:
    """The tensors of files of torch.save (`torch`), or of a distributed checkpoint (`dcp`).

    Raises:
        UserError: they cannot be read without running what they say, or not from here.
    """
    path = getattr(folder, "path", None)
    if path is None:
        raise UserError(f"{where}: pickled checkpoints are read from a folder of this machine; fetch it, or convert it")
    try:
        answer = ask("unpickle.py", [kind, str(Path(path).absolute()), *names])
        described = _Described.validate_json(answer)
    except RefusedError as error:
        raise UserError(f"{where}: {names[0]} cannot be read safely ({error}); save it as safetensors") from None
    except ValidationError:
        raise UserError(f"{where}: {names[0]} describes no tensors; save it as safetensors") from None
    sizes = {name: stat.size for name, stat in folder.files().items()}
    return [_tensor(said, sizes, side, where) for said in described]


class _Place(Record):
    """Where a tensor, or a chunk of one, lies in a file."""

    dtype: Name
    shape: Annotated[list[Count], Field(max_length=64)]
    file: Text
    offset: Count
    nbytes: Count


class _Chunk(_Place):
    at: Annotated[list[Count], Field(max_length=64)]


class _Whole(_Place):
    name: Text


class _Chunked(Record):
    name: Text
    shape: Annotated[list[Count], Field(max_length=64)]
    chunks: list[_Chunk]


_Described = TypeAdapter(list[_Whole | _Chunked])


def _tensor(said: _Whole | _Chunked, sizes: dict[str, int], side: Side, where: str) -> TensorInfo:
    if not is_name(said.name):
        raise UserError(f"{where}: a tensor is named {said.name[:80]!r}")
    if isinstance(said, _Whole):
        return _stored(said, said.name, sizes, where)
    chunks = [(tuple(chunk.at), _stored(chunk, said.name, sizes, where)) for chunk in said.chunks]
    return _together(said.name, tuple(said.shape), sorted(chunks, key=lambda chunk: chunk[0]), side, where)


def _stored(said: _Place, name: str, sizes: dict[str, int], where: str) -> TensorInfo:
    shape, numel = tuple(said.shape), math.prod(said.shape)
    if (
        said.dtype not in BITS
        or numel > MAX_NUMEL
        or said.nbytes != numel * itemsize(said.dtype)
        or said.offset + said.nbytes > sizes.get(said.file, -1)
    ):
        raise UserError(f"{where}: {said.file[:80]}: tensor {name!r} lies outside of its file")
    return TensorInfo(name, said.dtype, shape, said.file, said.offset, said.nbytes)


def _together(
    name: str, shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], TensorInfo]], side: Side, where: str
) -> TensorInfo:
    """A tensor from the chunks that ranks have written, which must cover it exactly."""
    sizes = {info.dtype for _, info in chunks}
    full = sum(info.numel for _, info in chunks) == math.prod(shape) and len(sizes) == 1
    inside = all(
        len(at) == len(shape) == len(info.shape)
        and all(o >= 0 and o + n <= s for o, n, s in zip(at, info.shape, shape, strict=True))
        for at, info in chunks
    )
    if not full or not inside:
        raise UserError(f"{where}: the chunks of tensor {name!r} do not make it up")
    if len(chunks) == 1:
        return chunks[0][1]
    parts = tuple(Part(side, info) for _, info in chunks)
    dtype = sizes.pop()
    if all(info.shape[1:] == shape[1:] for _, info in chunks) and _one_after_the_other(chunks):
        return formed(name, dtype, shape, Concatenated(parts))
    if len(shape) == 2 and not _overlap(chunks):
        return formed(name, dtype, shape, Tiled(parts, tuple((at[0], at[1]) for at, _ in chunks), shape[1]))
    raise UserError(
        f"{where}: tensor {name!r} is cut in a way that is not read here; convert the checkpoint with "
        "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
    )


def _one_after_the_other(chunks: list[tuple[tuple[int, ...], TensorInfo]]) -> bool:
    row = 0
    for at, info in chunks:
        if at[0] != row:
            return False
        row += info.shape[0]
    return True


def _overlap(chunks: list[tuple[tuple[int, ...], TensorInfo]]) -> bool:
    return any(
        all(a < b + n and b < a + m for a, b, m, n in zip(at, other, info.shape, also.shape, strict=True))
        for i, (at, info) in enumerate(chunks)
        for other, also in chunks[:i]
    )


@dataclass(frozen=True, slots=True)
class Tiled:
    """A matrix from tiles that cover it, each with the row and column at which it begins."""

    parts: tuple[Part, ...]
    at: tuple[tuple[int, int], ...]
    columns: int

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        width = itemsize(self.parts[0].info.dtype)
        first, last = start // self.columns, -(-stop // self.columns)
        whole = np.empty((last - first, self.columns * width), np.uint8)
        for part, (row, column) in zip(self.parts, self.at, strict=True):
            rows, columns = part.info.shape
            begin, end = max(first, row), min(last, row + rows)
            if begin < end:
                taken = sides.take(part, (begin - row) * columns * width, (end - row) * columns * width)
                target = whole[begin - first : end - first, column * width : (column + columns) * width]
                target[:] = taken.reshape(end - begin, columns * width)
        skipped = (start - first * self.columns) * width
        out[:] = whole.reshape(-1)[skipped : skipped + out.size]
