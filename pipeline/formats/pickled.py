"""Checkpoints of torch.save and of torch.distributed.checkpoint: where their tensors lie, found out by another process.

The tensors are then read by ranges like any others; nothing of theirs is unpickled.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.formats.dtypes import BITS, itemsize
from pipeline.formats.header import MAX_NUMEL, is_name
from pipeline.formats.names import Concatenated
from pipeline.formats.tensor import Part, Side, Sides, TensorInfo, formed
from pipeline.storage.store import Store

METADATA = ".metadata"
_SECONDS = 180
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
    command = [sys.executable, "-I", str(Path(__file__).with_name("unpickle.py")), kind, str(Path(path).absolute())]
    try:
        done = subprocess.run([*command, *names], capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{where}: {names[0]}: to find its tensors takes longer than {_SECONDS} s; convert it"
        ) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        why = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"{where}: {names[0]} cannot be read ({why[-1][:200] if why else done.returncode})") from None
    if "wrong" in answer:
        raise UserError(f"{where}: {names[0]} cannot be read safely ({answer['wrong']}); save it as safetensors")
    sizes = {name: stat.size for name, stat in folder.files().items()}
    return [_tensor(said, sizes, side, where) for said in answer["tensors"]]


def _tensor(said: dict[str, Any], sizes: dict[str, int], side: Side, where: str) -> TensorInfo:
    name, shape = said["name"], tuple(said["shape"])
    if not is_name(name):
        raise UserError(f"{where}: a tensor is named {name[:80]!r}")
    if "chunks" not in said:
        return _stored(said, name, shape, sizes, where)
    chunks = [
        (tuple(chunk["at"]), _stored(chunk, name, tuple(chunk["shape"]), sizes, where)) for chunk in said["chunks"]
    ]
    return _together(name, shape, sorted(chunks, key=lambda chunk: chunk[0]), side, where)


def _stored(said: dict[str, Any], name: str, shape: tuple[int, ...], sizes: dict[str, int], where: str) -> TensorInfo:
    numel = math.prod(shape)
    file, offset, nbytes = said["file"], said["offset"], said["nbytes"]
    if (
        said["dtype"] not in BITS
        or numel > MAX_NUMEL
        or nbytes != numel * itemsize(said["dtype"])
        or not 0 <= offset <= offset + nbytes <= sizes.get(file, -1)
    ):
        raise UserError(f"{where}: {file}: tensor {name!r} lies outside of its file")
    return TensorInfo(name, said["dtype"], shape, file, offset, nbytes)


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
