"""The sparse task vector of a checkpoint: a folder of safetensors and delta.json, which says what they stand for.

delta.json: `format` 1; `base`, its address and its files with their sizes and digests of their headers; `files`, with
bytes and xxh3-128; and `tensors`: of each its dtype, shape and xxh3-128, and `as`
- `sparse`: NAME#blocks, NAME#places and NAME#values are stored, as `formats.sparse` says, and NAME#before if it can be
  taken back; `kept` places in all;
- `whole`: NAME is stored;
- `base`: nothing is stored: it is base's, in the dtype that is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from fapm.errors import UserError
from fapm.formats.dtypes import BITS, is_weight, itemsize
from fapm.formats.header import MAX_NUMEL, is_name, read_header
from fapm.formats.lowrank import Converted
from fapm.formats.sparse import COLUMNS, DELTA_BLOCK, Layered, Patched, check_table, fits
from fapm.formats.tensor import Alias, Part, TensorInfo, alias, formed
from fapm.storage.records import Checksum, Count, Name, Record, Text, checked
from fapm.storage.store import Store

DELTA = "delta.json"
FORMAT = 1
SPARSE, WHOLE, BASE = "sparse", "whole", "base"
BLOCKS, PLACES, VALUES, BEFORE = "#blocks", "#places", "#values", "#before"
MAX_BYTES = 64 << 20
_MOST_PARTS = 600_000  # two a tensor


def _named(name: str) -> str:
    if not is_name(name):
        raise ValueError("that is no name of a tensor")
    return name


def delta_name(shard: str) -> str:
    """The file of a shard's sparse task vector."""
    return shard.replace("model", "delta", 1)


def read_delta(folder: Store, where: str) -> dict[str, Any]:
    """delta.json, with all that is relied on later of the right kind.

    Raises:
        UserError: it is none, or of another version.
    """
    wrong = f"{where}: {DELTA} is not that of a sparse task vector"
    if folder.size(DELTA) > MAX_BYTES:
        raise UserError(f"{wrong} (it has {folder.size(DELTA)} bytes)")
    data = folder.read(DELTA)
    version = checked(data, _Version, wrong, _MOST_PARTS)["format"]
    if version != FORMAT:
        raise UserError(f"{where}: {DELTA} is of format {version}, and {FORMAT} is read here")
    return checked(data, _Delta, wrong, _MOST_PARTS)


class _Version(Record):
    format: Count


class _Tensor(Record):
    how: Annotated[str, Field(alias="as", pattern=f"^({SPARSE}|{WHOLE}|{BASE})$")]
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(BITS)})$")]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_NUMEL)]], Field(max_length=64)]
    xxh3_128: Checksum
    base_xxh3_128: Checksum | None = None
    kept: Count = 0

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.kept > math.prod(self.shape) or math.prod(self.shape) > MAX_NUMEL:
            raise ValueError("more elements than any tensor has")
        return self


class _BaseFile(Record):
    size: Count
    header: Text


class _Base(Record):
    address: Text
    files: dict[Name, _BaseFile]


class _File(Record):
    nbytes: Count
    xxh3_128: Checksum


_TopFile = Annotated[str, Field(max_length=300, pattern=r"^[^/\x00-\x1f.][^/\x00-\x1f]*$")]


class _Delta(_Version):
    base: _Base
    files: dict[_TopFile, _File]
    tensors: dict[Annotated[str, AfterValidator(_named)], _Tensor]


def shapes_of(said: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Dtype and shape of each tensor; where it lies is not said."""
    return {
        name: TensorInfo(name, of["dtype"], tuple(of["shape"]), DELTA, 0, 0) for name, of in said["tensors"].items()
    }


def stored_in(folder: Store, said: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Sum of what the files hold."""
    return {info.name: info for file in said["files"] for info in read_header(folder.reader(file), file, file).tensors}


def check_base(said: Mapping[str, Any], identity: Mapping[str, Mapping[str, Any]], address: str, where: str) -> None:
    """Refuse another base than the one that it was made over.

    Raises:
        UserError: a file of base has another size or another header.
    """
    made_over = said["base"]["files"]
    for file in sorted(made_over.keys() | identity.keys()):
        then, now = made_over.get(file), identity.get(file)
        if not then or not now or any(then.get(key) != now.get(key) for key in ("size", "header")):
            raise UserError(
                f"{where} was made over {said['base']['address']}, and base, {address}, is another: {file} differs"
            )


def patched(
    said: Mapping[str, Any], stored: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], folder: Store, where: str
) -> dict[str, TensorInfo]:
    """Every tensor that base becomes.

    Args:
        stored: what the files hold.
        base: base's tensors, named and packed as those of the sparse task vector.

    Raises:
        UserError: something is missing, does not fit, or lies.
    """
    found = {}
    for name, tensor in said["tensors"].items():
        dtype, shape, how = tensor["dtype"], tuple(tensor["shape"]), tensor["as"]
        if how == WHOLE:
            if name not in stored or (stored[name].dtype, stored[name].shape) != (dtype, shape):
                raise UserError(f"{where}: {name!r} is not stored as {DELTA} says")
            found[name] = alias("finetuned", stored[name], checksum=tensor["xxh3_128"])
            continue
        if name not in base or not fits(base[name], dtype, shape):
            raise UserError(f"{where}: base has no tensor {name!r} {list(shape)} over which it could be written")
        over = Part("base", base[name])
        if how == BASE:
            found[name] = _as_base(name, over, dtype, tensor["xxh3_128"])
            continue
        parts = [stored.get(name + what) for what in (BLOCKS, PLACES, VALUES)]
        blocks, places, values = parts
        if not (blocks and places and values) or (blocks.dtype, places.dtype, values.dtype) != ("I64", "U8", "U8"):
            raise UserError(f"{where}: {name!r} is not stored as {DELTA} says")
        if len(blocks.shape) != 2 or blocks.shape[1] != COLUMNS:
            raise UserError(f"{where}: the blocks of {name!r} are no table")
        numel = base[name].numel
        if blocks.shape[0] != -(-numel // DELTA_BLOCK):
            raise UserError(f"{where}: the blocks of {name!r} are {blocks.shape[0]}, not as many as it needs")
        given = stored.get(name + BEFORE)
        table = np.frombuffer(folder.reader(blocks.file).read(blocks.offset, blocks.nbytes), "<i8")
        sizes = places.nbytes, values.nbytes, where, given.nbytes if given else 0
        check_table(table.reshape(-1, COLUMNS), name, numel, itemsize(dtype), *sizes)
        streams = Part("finetuned", blocks), Part("finetuned", places), Part("finetuned", values)
        before = Part("finetuned", given) if given else None
        form = Patched(over, *streams, dtype, tensor["xxh3_128"], before)
        found[name] = formed(name, dtype, shape, form)
    return found


def _as_base(name: str, over: Part, dtype: str, checksum: str) -> TensorInfo:
    if over.info.dtype == dtype or not is_weight(dtype):
        return alias("base", over.info, name, checksum)
    return formed(name, dtype, over.info.shape, Converted(over, dtype))


def summary(said: Mapping[str, Any], nbytes: int) -> str:
    """How much of how many elements it holds."""
    elements = sum(int(np.prod(tensor["shape"], dtype=object)) for tensor in said["tensors"].values())
    kept = sum(int(tensor.get("kept", 0)) for tensor in said["tensors"].values())
    bits = 8 * nbytes / max(1, elements)
    return (
        f"a sparse task vector over {said['base']['address']}: {kept:,} of {elements:,} elements, {bits:.2f} bits each"
    )


def layered(
    layers: Sequence[Mapping[str, TensorInfo]], on_conflict: str, where: str
) -> tuple[dict[str, TensorInfo], list[TensorInfo]]:
    """Base with several sparse task vectors applied, one after the other; and what of them does not count.

    Args:
        layers: what base becomes with each of them alone, their files named as `in_layer` names them.
        on_conflict: what counts where they do not agree: `first`, `last` or `error`.

    Raises:
        UserError: two store one tensor whole, or in several dtypes, and it is not said which counts.
    """
    found, beaten = {}, []
    for name in sorted({name for layer in layers for name in layer}):
        of = [layer[name] for layer in layers if name in layer]
        changing = [info for info in of if not _is_base(info)] or of[:1]
        forms = [info.form for info in changing if isinstance(info.form, Patched)]
        if len({getattr(info.form, "checksum", "") or i for i, info in enumerate(changing)}) == 1:
            found[name] = changing[0]  # the same in all
            beaten += changing[1:]
        elif len(forms) == len(changing) and len({(form.dtype, form.over) for form in forms}) == 1:
            together = Layered(tuple(forms), on_conflict)
            found[name] = formed(name, changing[0].dtype, changing[0].shape, together)
        elif on_conflict == "error":
            raise UserError(
                f"{where}: several of the sparse task vectors hold {name!r} whole, or in several dtypes; --on-conflict "
                "first or last decides"
            )
        else:
            found[name] = changing[0 if on_conflict == "first" else -1]
            beaten += [info for info in changing if info is not found[name]]
    return found, beaten


def _is_base(info: TensorInfo) -> bool:
    return isinstance(info.form, Converted) or (isinstance(info.form, Alias) and info.form.of.side == "base")


def in_layer(info: TensorInfo, number: int) -> TensorInfo:
    """A tensor of the folder `number` of several."""

    def moved(part: Part) -> Part:
        return part if part.side == "base" else Part(part.side, in_layer(part.info, number))

    form = info.form
    if isinstance(form, Patched):
        before = moved(form.before) if form.before else None
        blocks, places, values = moved(form.blocks), moved(form.places), moved(form.values)
        form = replace(form, blocks=blocks, places=places, values=values, before=before)
    elif isinstance(form, Alias):
        form = replace(form, of=moved(form.of))
    return replace(info, file=f"{number}/{info.file}", form=form)
