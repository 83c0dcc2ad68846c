"""A sparse task vector on a model that is loaded: written over its weights in place, and taken back.

from fapm.delta import apply_

undo = apply_(model, "path/to/delta")
...
undo()
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from fapm.errors import UserError
from fapm.formats.delta import BASE, WHOLE, patched, read_delta, shapes_of, stored_in
from fapm.formats.dtypes import TORCH_NAMES
from fapm.formats.sparse import DELTA_BLOCK, Patched
from fapm.formats.tensor import Part, Sides
from fapm.storage.address import input_address, open_store

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Patch(NamedTuple):
    """Patch of one tensor. It can be given to vLLM as it is: `load_checkpoint_weight_patches` takes these
    names (vllm.model_executor.model_loader.checkpoint_weight_patch, 0.33), in one call either those with indices or
    those without.

    Attributes:
        name: of the tensor in its checkpoint.
        shape, dtype: of all of it.
        values: (n,), or all of the flat tensor where it has no `indices`.
        indices: into the flat tensor, (n,), in order: int32, or int64 where it has 2^31 elements or more.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None


def patches(delta: str, of_base: bool = False) -> Iterator[Patch]:
    """Patches that a sparse task vector makes to base, a tensor after the other.

    Args:
        delta: the folder, in any store.
        of_base: what base has at these places instead.

    Raises:
        UserError: it is damaged, or does not carry base's values.
    """
    for _, found in itertools.groupby(_in_blocks(delta, of_base), lambda patch: patch.name):
        first, *more = found
        if more:
            values = torch.cat([first.values, *(patch.values for patch in more)])
            indices = torch.cat([patch.indices for patch in (first, *more) if patch.indices is not None])
            first = first._replace(values=values, indices=indices)
        yield first


def _in_blocks(delta: str, of_base: bool = False) -> Iterator[Patch]:
    """The same in pieces within 2^20 elements."""
    folder = open_store(input_address(delta))
    try:
        said = read_delta(folder, delta)
        tensors = patched(said, stored_in(folder, said), shapes_of(said), folder, delta)
        sides = Sides(folder, folder)
        for name, tensor in said["tensors"].items():
            if tensor["as"] == BASE:
                continue
            info = tensors[name]
            dtype = getattr(torch, TORCH_NAMES.get(info.dtype, _OTHERS.get(info.dtype, "uint8")))
            if of_base and (tensor["as"] == WHOLE or getattr(info.form, "before", None) is None):
                raise UserError(f"{delta}: it does not carry base's {name!r}; it was made without --reversible")
            if tensor["as"] == WHOLE:
                values = torch.from_numpy(sides.whole(Part("finetuned", info)).copy()).view(dtype)
                yield Patch(name, info.shape, dtype, values, None)
                continue
            assert isinstance(info.form, Patched)
            place = torch.int32 if info.numel < 1 << 31 else torch.int64
            for number in range(-(-info.numel // DELTA_BLOCK)):
                places, bits = info.form.block(number, sides, of_base)
                if places.size:
                    values = torch.from_numpy(bits.view(np.uint8).copy()).view(dtype)
                    indices = torch.from_numpy(places + number * DELTA_BLOCK).to(place)
                    yield Patch(name, info.shape, dtype, values, indices)
    finally:
        folder.close()


_OTHERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


def apply_(model: torch.nn.Module | Mapping[str, torch.Tensor], delta: str) -> Callable[[], None]:
    """Write a sparse task vector over the weights of a model, in place, on whatever device they are.

    The model must hold the base that it was made over: what is written is not added.

    Args:
        model: a module, or tensors by the names of the checkpoint. Names that only the other has are an error.
        delta: the folder, in any store.

    Returns:
        What puts back the weights as they were, from a copy of those that are overwritten.

    Raises:
        UserError: a tensor is missing, has another shape or dtype; nothing is changed then.
    """
    tensors = _tensors_of(model, delta)
    before: list[tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor]] = []
    with torch.no_grad():
        for patch in _in_blocks(delta):
            bits, indices, values = _placed(patch, tensors[patch.name])
            before.append((bits, indices, bits[indices].clone()))
            bits[indices] = values

    def undo() -> None:
        with torch.no_grad():
            while before:
                bits, indices, values = before.pop()
                bits[indices] = values

    return undo


def revert_(model: torch.nn.Module | Mapping[str, torch.Tensor], delta: str) -> None:
    """Put back what base has where a sparse task vector was written over it, in place, from what it carries itself.

    Args:
        model, delta: as of `apply_`; made with `--reversible`.

    Raises:
        UserError: as of `apply_`, or it does not carry base's values. Nothing is changed then.
    """
    tensors = _tensors_of(model, delta)
    for _ in _in_blocks(delta, of_base=True):
        pass
    with torch.no_grad():
        for patch in _in_blocks(delta, of_base=True):
            bits, indices, values = _placed(patch, tensors[patch.name])
            bits[indices] = values


def _placed(patch: Patch, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor]:
    """The bits of a flat tensor, and where it is, the places and the bits that go there."""
    flat = tensor.detach().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    indices = slice(None) if patch.indices is None else patch.indices.to(flat.device)
    return bits, indices, patch.values.to(flat.device).view(bits.dtype)


def _tensors_of(model: torch.nn.Module | Mapping[str, torch.Tensor], delta: str) -> dict[str, torch.Tensor]:
    """A model's tensors by name, in which all that is going to be written has its place."""
    tensors = dict(model.state_dict(keep_vars=True)) if isinstance(model, torch.nn.Module) else dict(model)
    folder = open_store(input_address(delta))
    for name, tensor in read_delta(folder, delta)["tensors"].items():
        if tensor["as"] == BASE and name not in tensors:
            continue
        there = tensors.get(name)
        wanted = TORCH_NAMES.get(tensor["dtype"], _OTHERS.get(tensor["dtype"], ""))
        if there is None:
            raise UserError(f"{delta}: the model has no tensor {name!r}")
        if tensor["as"] != BASE and (list(there.shape) != tensor["shape"] or str(there.dtype) != f"torch.{wanted}"):
            raise UserError(
                f"{delta}: {name!r} is {wanted} {json.dumps(tensor['shape'])}, and the model's {there.dtype} "
                f"{list(there.shape)}"
            )
        if not there.is_contiguous():
            raise UserError(f"{delta}: the model's {name!r} does not lie in its own order; make it contiguous first")
    return tensors


__all__ = ["Patch", "apply_", "patches", "revert_"]
