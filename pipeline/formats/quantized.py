"""Quantized weights: codes times scales, as the weights that they stand for, in bfloat16. Codes are never compared.

FP8 with a scale a tensor, an output, or a block whose size the configuration says; MXFP4 (`_blocks`, `_scales`,
gpt-oss). Each product is made in float32 and rounded once.

What a scale means is known by its name (SCALES) and by what the checkpoint says of its codes, never by a shape. Codes
with any other neighbour, or with none, are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fapm.errors import UserError
from fapm.formats.dtypes import upcast, values
from fapm.formats.lowrank import TILE, rounded
from fapm.formats.tensor import Part, Side, Sides, TensorInfo, formed

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_CODE_DTYPES = (*_FP8, "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")

SCALES = {
    "weight_scale_inv": "weight",  # DeepSeek-V3 and transformers; a factor in spite of its name
    "weight_scale": "weight",  # compressed-tensors, fbgemm, ModelOpt, Quark
    "scale_weight": "weight",  # ComfyUI
    "gate_up_proj_scale_inv": "gate_up_proj",  # transformers, stacked experts
    "down_proj_scale_inv": "down_proj",
    "gate_up_proj_scale": "gate_up_proj",  # fbgemm, stacked experts of Llama 4
    "down_proj_scale": "down_proj",
}
"""The last part of a scale's name, and that of the codes beside it with which it is to be multiplied."""

_POWERS = {"scale": "weight"}
"""The same where it is a power of two (F8_E8M0): DeepSeek-V4. Of another dtype the name could mean anything."""

# What calibration leaves beside codes, without a meaning for weights in bfloat16.
_OF_ACTIVATIONS = (
    "input_scale",
    "input_scale_ub",
    "scale_input",
    "input_zero_point",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
    "kv_scale",
    "activation_scale",
    "scaled_fp8",
)
_KNOWN = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt")
_CODES = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ", "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes", "SCB": "bitsandbytes", "weight_packed": "compressed-tensors' packed",
    "weight_zero_point": "an integer", "_packed": "a packed", "weight_scale_2": "NVFP4", "weight_global_scale": "NVFP4",
}  # fmt: skip
_LIKE_A_SCALE = re.compile(r"(^|[._])(scale|scales|scaling|scale_inv|inv_scale|amax)(?![a-z])")

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the sixteen codes of MXFP4 (OCP Microscaling Formats 1.0, table 5)."""

DESCRIPTION = "hf_quant_config.json"
"""ModelOpt's own file about its codes."""


def described_codes(config: Mapping[str, Any], modelopt: Mapping[str, Any]) -> dict[str, Any]:
    """Description that a checkpoint gives of its codes, empty where it says nothing.

    Args:
        config: config.json. modelopt: DESCRIPTION.
    """
    for key in ("quantization_config", "compression_config"):
        said = config.get(key)
        if isinstance(said, dict) and said:
            return {"quant_method": "compressed-tensors", **said} if key == "compression_config" else dict(said)
    said = modelopt.get("quantization")
    return {"quant_method": "modelopt", **said} if isinstance(said, dict) and said else {}


def dequantized(
    tensors: Mapping[str, TensorInfo], said: Mapping[str, Any], side: Side, where: str, plain_codes: bool = False
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The weights that a checkpoint's codes and scales stand for, and all that is no code.

    Args:
        said: of `described_codes`.
        where: what to call the checkpoint in an error.
        plain_codes: FP8 without a scale is the values that it spells.

    Returns:
        The tensors, and why those that are not among them are not.

    Raises:
        UserError: it is quantized in another way, or a scale is missing, unknown, or does not fit.
    """
    _refuse_others(tensors, said, where)
    found = dict(tensors)
    gone: dict[str, str] = {}
    scaled: dict[str, str] = {}
    for name, info in tensors.items():
        stem, dot, last = name.rpartition(".")
        codes = SCALES.get(last) or (_POWERS.get(last) if info.dtype == "F8_E8M0" else None)
        weight = tensors.get(f"{stem}{dot}{codes}") if codes else None
        if weight:
            if weight.dtype not in _FP8:
                raise UserError(f"{where}: {weight.name} is {weight.dtype} and has a scale; only FP8 is read here")
            if weight.name in scaled:
                raise UserError(f"{where}: {weight.name} has two scales, {scaled[weight.name]} and {name}")
            scaled[weight.name] = name
            found[weight.name] = _scaled(weight, info, said, side, where)
            gone[name] = f"its values are in {weight.name}"
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            whole = name.removesuffix("_blocks")
            scales = tensors[f"{whole}_scales"]
            found[whole] = _microscaled(whole, info, scales, side, where)
            gone |= dict.fromkeys((name, scales.name), f"its values are in {whole}")
    if gone:
        for name in tensors:
            if name.rpartition(".")[2] in _OF_ACTIVATIONS:
                gone[name] = "it is about activations in another dtype"
    for name in gone:
        found.pop(name)
    _refuse_what_is_left(found, where, plain_codes)
    return found, gone


def _refuse_others(tensors: Mapping[str, TensorInfo], said: Mapping[str, Any], where: str) -> None:
    what = ""
    if said:
        method = str(said.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in said else "unknown"))[:40]
        algorithm = str(said.get("quant_algo") or "FP8")[:40]
        if method not in _KNOWN:
            what = method
        elif method == "compressed-tensors" and said.get("format") not in ("float-quantized", "naive-quantized", None):
            what = f"compressed-tensors {str(said.get('format'))[:40]}"
        elif not algorithm.startswith("FP8"):
            what = f"{method} {algorithm}"
    for name in tensors:
        last = name.rpartition(".")[2]
        what = what or _CODES.get(last, "") or ("bitsandbytes" if ".quant_state." in name else "")
    if what:
        raise UserError(
            f"{where}: its weights are quantized ({what}), which is not read here; load it with the library that made "
            "it, dequantize, and save it in bfloat16"
        )


def _refuse_what_is_left(found: Mapping[str, TensorInfo], where: str, plain_codes: bool) -> None:
    """Whether a tensor holds codes of which nobody knows what they stand for.

    Raises:
        UserError: one does.
    """
    codes = [
        info
        for info in found.values()
        if info.form is None
        and (
            info.dtype in _CODE_DTYPES
            or (info.dtype in _INTEGERS and len(info.shape) > 1 and info.name.rpartition(".")[2] == "weight")
        )
    ]
    if not codes:
        return
    first = next((info for info in codes if _neighbour(info.name, found)), codes[0])
    beside = _neighbour(first.name, found)
    if beside:
        scale = found[beside]
        raise UserError(
            f"{where}: {first.name} is {first.dtype}, and {beside} ({scale.dtype} {list(scale.shape)}) beside it looks "
            "like its scale, but what that means is not known here; dequantize it with the library that made it"
        )
    if plain_codes and all(info.dtype in _FP8 for info in codes):
        return
    plain = "; or, if it is a plain cast without scales, say so with --plain-codes" if first.dtype in _FP8 else ""
    raise UserError(
        f"{where}: {first.name} is {first.dtype} and has no scale beside it that is known here; fetch the checkpoint "
        f"again if one is missing, or dequantize it with the library that made it{plain}"
    )


def _neighbour(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Name that looks like the scale of some codes: it begins as they do, or lies in the same module."""
    stem = name.rpartition(".")[0]
    near = (f"{name}.", f"{name}_", f"{stem}.", f"{stem}_")
    alike = (other for other in tensors if other != name and other.startswith(near))
    return min((other for other in alike if _LIKE_A_SCALE.search(other[len(stem) :])), default=None)


def _block_said(said: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns of the blocks that have a scale each, where the configuration speaks of blocks."""
    blocks = [said.get("weight_block_size")]
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        blocks.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    found = {tuple(block) for block in blocks if isinstance(block, list)}
    if not found:
        return None
    if len(found) > 1 or not all(len(b) == 2 and all(type(n) is int and n > 0 for n in b) for b in found):
        raise UserError(f"{where}: its configuration gives the blocks of scales as {sorted(map(str, found))[:3]}")
    rows, columns = next(iter(found))
    return rows, columns


def _scaled(weight: TensorInfo, scale: TensorInfo, said: Mapping[str, Any], side: Side, where: str) -> TensorInfo:
    """FP8 codes with a scale a tensor, an output, or a block; of a stack of matrices, for each of them."""
    shape = weight.shape
    stack, rows, columns = math.prod(shape[:-2]), *((1, 1, *shape)[-2:])

    def refused(why: str) -> UserError:
        return UserError(
            f"{where}: the scales {scale.name} ({scale.dtype} {list(scale.shape)}) do not fit {list(shape)} codes{why}"
        )

    if scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0") or not 1 <= len(shape) <= 3 or not weight.numel:
        raise refused("")
    block = _block_said(said, where)
    per_output = len(shape) == 2 and scale.shape in ((rows,), (rows, 1))
    per_column = len(shape) == 3 and scale.shape == (stack, 1, columns)
    if scale.numel == 1:
        cut, across = (stack * rows, columns), 1
    elif block:
        grid = (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
        if scale.shape != grid or (stack > 1 and rows % block[0]):
            raise refused(f" in blocks of {block[0]} × {block[1]}")
        cut, across = block, grid[-1]
    elif per_output:
        cut, across = (1, columns), 1
    elif per_column:  # fbgemm keeps experts as (in, out)
        cut, across = (rows, 1), columns
    else:
        raise refused(", and no configuration says the size of their blocks (weight_block_size)")
    return formed(weight.name, "BF16", shape, Scaled(Part(side, weight), Part(side, scale), columns, *cut, across))


@dataclass(frozen=True, slots=True)
class Scaled:
    """FP8 codes (rows, columns), each times the scale of its block, of which `across` lie side by side."""

    codes: Part
    scales: Part
    columns: int
    rows_a_block: int
    columns_a_block: int
    across: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.codes, self.scales

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        from fapm.formats.loops import scale

        (scales,) = sides.remember(self, partial(self._read_scales, sides))
        table = values(np.arange(256, dtype=np.uint8), self.codes.info.dtype)
        for begin in range(start, stop, TILE):
            end = min(begin + TILE, stop)
            codes = sides.take(self.codes, begin, end)
            made = np.empty(end - begin, np.float32)
            block = self.rows_a_block, self.columns_a_block, self.across
            scale(made, codes, begin, self.columns, table, scales, *block)
            out[(begin - start) * 2 : (end - start) * 2] = rounded(made, "BF16").view(np.uint8)

    def _read_scales(self, sides: Sides) -> tuple[np.ndarray]:
        info, stored = self.scales.info, sides.whole(self.scales)
        if info.dtype == "F8_E8M0":
            return (_powers(stored, info.name),)
        scales = upcast(values(stored, info.dtype)).astype(np.float32)
        wrong = ~((scales > 0) & (scales < np.inf))
        if wrong.any():
            raise _no_scale(info.name, scales[wrong][0])
        return (scales,)


def _powers(stored: np.ndarray, name: str) -> np.ndarray:
    """The powers of two that bytes of E8M0 stand for, of which the last is NaN."""
    if (stored == 255).any():
        raise _no_scale(name, "NaN")
    return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)


def _no_scale(name: str, value: object) -> UserError:
    return UserError(
        f"the scales {name} hold {value}, which no quantizer writes: a scale is above 0; fetch the checkpoint again, "
        "or dequantize it with the library that made it"
    )


def _microscaled(whole: str, blocks: TensorInfo, scales: TensorInfo, side: Side, where: str) -> TensorInfo:
    shape = blocks.shape
    if (
        (blocks.dtype, scales.dtype) != ("U8", "U8")
        or len(shape) != 4
        or shape[:-1] != scales.shape
        or shape[-1] != 16
        or not blocks.numel
    ):
        raise UserError(
            f"{where}: {blocks.name} ({blocks.dtype} {list(shape)}) and {scales.name} ({scales.dtype} "
            f"{list(scales.shape)}) are not MXFP4"
        )
    form = Microscaled(Part(side, blocks), Part(side, scales), shape[1], shape[2])
    return formed(whole, "BF16", (shape[0], 32 * shape[2], shape[1]), form)


@dataclass(frozen=True, slots=True)
class Microscaled:
    """MXFP4 of a stack of experts, (n, rows, groups, 16) bytes, as (n, 32·groups, rows)."""

    blocks: Part
    scales: Part
    rows: int
    groups: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.blocks, self.scales

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        size, done = 32 * self.groups * self.rows, start
        while done < stop:
            number = done // size
            end = min(stop, (number + 1) * size)
            (matrix,) = sides.remember((self, number), partial(self._matrix, number, sides))
            target = out[(done - start) * 2 : (end - start) * 2]
            target[:] = matrix[(done - number * size) * 2 : (end - number * size) * 2]
            done = end

    def _matrix(self, number: int, sides: Sides) -> tuple[np.ndarray]:
        """All of one expert, since its elements lie across all of its bytes."""
        from fapm.formats.loops import unpack

        many = self.rows * self.groups
        blocks = sides.take(self.blocks, number * many * 16, (number + 1) * many * 16)
        powers = sides.take(self.scales, number * many, (number + 1) * many)
        scales = _powers(powers, self.scales.info.name)
        made = np.empty((32 * self.groups, self.rows), np.float32)
        unpack(made, blocks, scales, _E2M1, self.groups)
        return (rounded(made.reshape(-1), "BF16").view(np.uint8),)
