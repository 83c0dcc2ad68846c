"""The safetensors header, read strictly and written byte for byte the same every time.

A file is: a u64 (little endian) header length, that many bytes of JSON, then the tensors' bytes without
holes or overlaps. The reader refuses everything that is not exactly that, before anything is allocated for
it: a header is a claim by a stranger.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fapm.errors import UserError
from fapm.formats.dtypes import BITS
from fapm.formats.tensor import TensorInfo
from fapm.storage.store import Reader

MAX_HEADER_BYTES = 16 << 20
"""Enough for 140,000 tensors in one file. The format allows 100 MB, which would take seconds and a gigabyte to read."""
_MOST_BRACKETS = 100_000  # beside those of tensors: in strings of the metadata
MAX_NUMEL = 1 << 48
MAX_NAME = 1000  # characters


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their bytes, and a digest of the header's bytes."""

    tensors: list[TensorInfo]
    digest: str


def read_header(reader: Reader, file: str, where: str) -> Header:
    """Contents of one file.

    Args:
        reader: an open file.
        file: the name that the tensors will carry.
        where: what to call the file in an error.

    Raises:
        UserError: the file is not exactly a safetensors file.
    """

    def bad(why: str) -> UserError:
        return UserError(f"{where}: not a valid safetensors file: {why}")

    if reader.size < 8:
        raise bad(f"it has {reader.size} bytes")
    begins = reader.read(0, 8)
    length = int.from_bytes(begins, "little")
    if length > MAX_HEADER_BYTES:
        raise bad(f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if 8 + length > reader.size:
        raise bad(f"it is truncated: the header claims {length} bytes and the file has {reader.size}")
    text = reader.read(8, length)
    named = text.count(b'"data_offsets"')
    if text.count(b"[") > 2 * named + _MOST_BRACKETS or text.count(b"{") > named + _MOST_BRACKETS:
        raise bad("its header holds other things than tensors")
    tensors = []
    for name, entry in _parse_json(text, bad).items():
        if name != "__metadata__":
            tensors.append(_tensor(name, entry, file, 8 + length, bad))
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps its neighbour" if tensor.offset < position else "leaves a gap before it"
            raise bad(f"tensor {tensor.name!r} {what}")
        position += tensor.nbytes
    if position > reader.size:
        raise bad(f"it is truncated: the tensors need {position} bytes and the file has {reader.size}")
    if position < reader.size:
        raise bad(f"{reader.size - position} bytes follow the last tensor")
    return Header(tensors, hashlib.blake2b(begins + text, digest_size=16).hexdigest())


def _parse_json(text: bytes, bad: Any) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise bad("a key appears twice in its header")
        return result

    try:
        if not text.startswith(b"{"):
            raise ValueError
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    return header


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UPWARDS = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")
_DTYPES = {dtype: dtype for dtype in BITS}  # one string for all tensors of a dtype


def is_name(name: str) -> bool:
    """Whether a tensor may be called so: nothing that a terminal or a path would take for more than a name."""
    return 0 < len(name) <= MAX_NAME and not _UNPRINTABLE.search(name) and not _UPWARDS.search(name)


def _tensor(name: str, entry: Any, file: str, start: int, bad: Any) -> TensorInfo:
    if not is_name(name):
        raise bad(f"a tensor is named {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"tensor {name!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad(f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not (isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)):
        raise bad(f"tensor {name!r} has an impossible shape")
    numel = math.prod(shape)
    if max(shape, default=0) > MAX_NUMEL or numel > MAX_NUMEL:
        raise bad(f"tensor {name!r} claims more elements than any tensor has")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
        raise bad(f"tensor {name!r} has impossible data_offsets")
    begin, end = offsets
    if (end - begin) * 8 != numel * BITS[dtype]:
        raise bad(f"tensor {name!r} is {dtype} {shape} but has {end - begin} bytes")
    return TensorInfo(sys.intern(name), _DTYPES[dtype], tuple(shape), file, start + begin, end - begin)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length, JSON and padding for (name, dtype, shape, nbytes) laid out one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
