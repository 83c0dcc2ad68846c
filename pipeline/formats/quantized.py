"""Quantized weights: codes times scales, as the weights that they stand for, in bfloat16. Codes are never compared.

FP8 with a scale a block (`weight_scale_inv`, DeepSeek-V3), a tensor or an output (`weight_scale`, compressed-tensors);
MXFP4 (`_blocks`, `_scales`, gpt-oss). Each product is made in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.formats.dtypes import upcast, values
from pipeline.formats.lowrank import TILE, rounded
from pipeline.formats.tensor import Part, Side, Sides, TensorInfo, formed

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("weight_scale_inv", "weight_scale")
# What calibration leaves beside the weights, without a meaning for weights in bfloat16.
_OF_ACTIVATIONS = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "activation_scale",
)
_KNOWN = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
_CODES = {
    "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ", "absmax": "bitsandbytes", "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes", "weight_packed": "compressed-tensors' packed", "weight_zero_point": "an integer",
    "_packed": "a packed",
}  # fmt: skip

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the sixteen codes of MXFP4 (OCP Microscaling Formats 1.0, table 5)."""


def dequantized(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], side: Side, where: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The weights that a checkpoint's codes and scales stand for, and all that is no code.

    Args:
        config: config.json.
        where: what to call the checkpoint in an error.

    Returns:
        The tensors, and why those that are not among them are not.

    Raises:
        UserError: it is quantized in another way, or a scale is missing or does not fit.
    """
    _refuse_others(tensors, config, where)
    said = config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    found = dict(tensors)
    gone: dict[str, str] = {}
    for name, info in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in _SCALES and f"{stem}.weight" in tensors:
            weight = tensors[f"{stem}.weight"]
            if weight.dtype not in _FP8:
                raise UserError(f"{where}: {weight.name} is {weight.dtype} and has a scale; only FP8 is read here")
            found[weight.name] = _scaled(weight, info, said, side, where)
            gone[name] = f"its values are in {weight.name}"
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            whole = name.removesuffix("_blocks")
            scales = tensors[f"{whole}_scales"]
            found[whole] = _microscaled(whole, info, scales, side, where)
            gone |= dict.fromkeys((name, scales.name), f"its values are in {whole}")
        elif last in _OF_ACTIVATIONS and said:
            gone[name] = "it is about activations in another dtype"
    if said:
        codes = [t.name for t in found.values() if t.dtype in _FP8 and t.form is None]
        if codes:
            raise UserError(f"{where}: {codes[0]} is {found[codes[0]].dtype} and has no scale beside it")
    for name in gone:
        found.pop(name)
    return found, gone


def _refuse_others(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> None:
    said = config.get("quantization_config")
    what = ""
    if isinstance(said, dict):
        method = str(said.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in said else "unknown"))[:40]
        if method not in _KNOWN:
            what = method
        elif method == "compressed-tensors" and said.get("format") not in ("float-quantized", "naive-quantized", None):
            what = f"compressed-tensors {str(said.get('format'))[:40]}"
    for name in tensors:
        last = name.rpartition(".")[2]
        what = what or _CODES.get(last, "") or ("bitsandbytes" if ".quant_state." in name else "")
    if what:
        raise UserError(
            f"{where}: its weights are quantized ({what}), which is not read here; load it with the library that made "
            "it, dequantize, and save it in bfloat16"
        )


def _scaled(weight: TensorInfo, scale: TensorInfo, said: Mapping[str, Any], side: Side, where: str) -> TensorInfo:
    """FP8 codes with scales a tensor, an output or a block."""
    shape = weight.shape
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    grid = scale.shape if len(scale.shape) == 2 else (scale.numel, 1)
    grid = (1, 1) if scale.numel == 1 else grid
    blocks = said.get("weight_block_size")
    block = (-(-rows // grid[0]) if grid[0] else 0, -(-columns // grid[1]) if grid[1] else 0)
    if isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks):
        given = (blocks[0], blocks[1])
        if grid == (-(-rows // given[0]), -(-columns // given[1])):
            block = given
    fits = block[0] and block[1] and grid == (-(-rows // block[0]), -(-columns // block[1]))
    if not fits or len(shape) > 2 or scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
        raise UserError(
            f"{where}: the scales {scale.name} ({scale.dtype} {list(scale.shape)}) do not fit {list(shape)} codes"
        )
    return formed(weight.name, "BF16", shape, Scaled(Part(side, weight), Part(side, scale), columns, *block, grid[1]))


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
        from pipeline.formats.loops import scale

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
            return (np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32),)
        return (upcast(values(stored, info.dtype)).astype(np.float32),)


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
        from pipeline.formats.loops import unpack

        many = self.rows * self.groups
        blocks = sides.take(self.blocks, number * many * 16, (number + 1) * many * 16)
        powers = sides.take(self.scales, number * many, (number + 1) * many)
        scales = np.ldexp(np.float32(1), powers.astype(np.int32) - 127).astype(np.float32)
        made = np.empty((32 * self.groups, self.rows), np.float32)
        unpack(made, blocks, scales, _E2M1, self.groups)
        return (rounded(made.reshape(-1), "BF16").view(np.uint8),)
