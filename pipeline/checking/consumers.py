"""Reading a shard as those do who load the output: with the safetensors library, so that what is said of it is not only
our own reader's opinion."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fapm.formats.dtypes import TORCH_NAMES, itemsize
from fapm.formats.tensor import TensorInfo
from fapm.storage.store import Store


def read_as_consumers_do(folder: Store, name: str, tensors: Sequence[TensorInfo]) -> list[str]:
    """Where the library sees other names, dtypes, shapes, or first and last elements in a shard than its header says.

    Args:
        tensors: what our own reader found in the file `name`.
    """
    problems = []
    try:
        with _opened(folder, name) as opened:
            names = set(opened.keys())
            for odd in sorted(names ^ {t.name for t in tensors}):
                problems.append(
                    f"tensor {odd!r}: only one of the safetensors library and our reader finds it in {name}"
                )
            for tensor in tensors:
                if tensor.name in names:
                    problems += _compare(folder, tensor, opened.get_slice(tensor.name))
    except (SafetensorError, OSError) as error:
        problems.append(f"{name}: the safetensors library does not open it: {error}")
    return problems


@contextlib.contextmanager
def _opened(folder: Store, name: str) -> Iterator[Any]:
    """A shard as the library opens it: the file itself or, of one in a store, its header before as many zeros as it has
    other bytes, since the library opens files only."""
    if folder.local_path:
        with safe_open(folder.local_path / name, framework="pt") as opened:
            yield opened
        return
    reader = folder.reader(name)
    length = min(reader.size, 8 + int.from_bytes(reader.read(0, 8), "little"))
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(reader.read(0, length))
        file.truncate(reader.size)
        file.flush()
        with safe_open(file.name, framework="pt") as opened:
            yield opened


def _compare(folder: Store, tensor: TensorInfo, there: Any) -> list[str]:
    dtype, shape = there.get_dtype(), tuple(there.get_shape())
    if (dtype, shape) != (tensor.dtype, tensor.shape):
        return [f"tensor {tensor.name!r}: {dtype} {list(shape)} to the safetensors library, not {_said(tensor)}"]
    if not folder.local_path or not tensor.numel or not shape or tensor.dtype not in TORCH_NAMES:
        return []
    width, reader = itemsize(tensor.dtype), folder.reader(tensor.file)
    for which, row, at in (("first", slice(0, 1), 0), ("last", slice(shape[0] - 1, shape[0]), tensor.nbytes - width)):
        element = there[row].reshape(-1)[0 if which == "first" else -1]
        if element.reshape(1).view(torch.uint8).numpy().tobytes() != reader.read(tensor.offset + at, width):
            return [f"tensor {tensor.name!r}: its {which} element is another one to the safetensors library"]
    return []


def _said(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
