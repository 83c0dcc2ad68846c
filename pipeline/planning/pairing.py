"""Pairing: each tensor of finetuned with base's, and what is to be done with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from fapm.errors import UserError, listed
from fapm.formats.checkpoint import Checkpoint, architecture
from fapm.formats.dtypes import OUTPUT_DTYPES, is_weight, itemsize
from fapm.formats.layouts import in_layout_of
from fapm.formats.names import packed_like, renamed
from fapm.formats.tensor import TensorInfo
from fapm.formats.unpaired import refuse_unpaired
from fapm.formats.vocabulary import tied_to
from fapm.planning.plan import Operation, PairedTensor
from fapm.planning.shards import group_of
from fapm.planning.vocabulary import is_vocabulary
from fapm.recipe import LayerScale, Recipe, Rule
from fapm.scoring.methods import METHODS


def refuse_unpaired_of(recipe: Recipe, base: Checkpoint, finetuned: Checkpoint, heads: dict[str, TensorInfo]) -> None:
    def undecided(side: Checkpoint, other: Checkpoint) -> list[TensorInfo]:
        alone = (info for name, info in side.tensors.items() if name not in other.tensors)
        return [info for info in alone if info.name not in heads and recipe.rule_of(info.name) is None]

    def numel(side: Checkpoint) -> int:
        return sum(info.numel for info in side.tensors.values() if is_weight(info.dtype))

    alone = [info for info in undecided(base, finetuned) if not tied_to(info, finetuned)]
    refuse_unpaired(alone, undecided(finetuned, base), numel(base), numel(finetuned))


def as_finetuned_names_it(recipe: Recipe, base: Checkpoint, finetuned: Checkpoint, warnings: list[str]) -> Checkpoint:
    """base with its tensors named and packed as finetuned's are."""
    wanted = finetuned.tensors
    if base.tensors.keys() >= wanted.keys():
        if recipe.renames and not any(info.form for info in wanted.values()):
            warnings.append("--rename changes nothing: base has all of finetuned's names")
        return base
    tensors = renamed(base.tensors, wanted, recipe.renames, warnings)
    known = architecture(base), architecture(finetuned)
    classes = known[0] or known[1], known[1] or known[0]
    tensors = in_layout_of(tensors, wanted, *classes, recipe.unpaired == "error", warnings)
    return replace(base, tensors=packed_like(tensors, wanted, warnings))


def pair_all(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Checkpoint,
    heads: dict[str, TensorInfo],
    warnings: list[str],
) -> list[PairedTensor]:
    paired, wrong, passed, grown, flat = [], [], [], [], []
    as_matrices = METHODS[recipe.method].kind == "matrix"
    operation: Operation = "matrices" if as_matrices else "elements"
    for text, given in zip(recipe.rules, recipe.parsed_rules, strict=True):
        if as_matrices and given.density is not None:
            raise UserError(f"--rule {text}: {recipe.method} has no density; write =prune, =base or =finetuned")
    scope = recipe.scope if recipe.scope in METHODS[recipe.method].scopes else "tensor"
    for name in sorted(finetuned.tensors):
        f, p = finetuned.tensors[name], base.tensors.get(name) or heads.get(name)
        rule = recipe.rule_of(name) if p else Rule(name, "finetuned")
        action = rule.action if rule else None
        density = recipe.density if rule is None or rule.density is None else rule.density
        density = 1.0 if as_matrices else density
        dtype = OUTPUT_DTYPES[recipe.dtype] if recipe.dtype and is_weight(f.dtype) else f.dtype
        grows = p is not None and _rows_added(p, f) and (action == "prune" or is_vocabulary(name))
        if action == "base":
            assert p
            # A base tensor of another shape is taken whole, with its shape: the rule says so.
            comparable = is_weight(p.dtype) and is_weight(dtype)
            paired.append(_paired(name, "base", p, f, dtype if comparable else p.dtype, p.shape))
        elif action == "finetuned" or p is None:
            paired.append(_paired(name, "finetuned", p, f, dtype, f.shape))
        elif not (is_weight(f.dtype) and is_weight(p.dtype)):
            passed.append(f"{name} ({f.dtype})")
            paired.append(_paired(name, "finetuned", p, f, f.dtype, f.shape))
        elif as_matrices and not _is_matrix(name, p.shape) and (f.shape == p.shape or grows):
            flat.append(name)
            paired.append(_paired(name, "finetuned", p, f, dtype, f.shape))
        elif f.shape == p.shape:
            competing = group_of(name, scope), density, operation
            paired.append(_paired(name, "prune", p, f, dtype, f.shape, f.numel, *competing))
        elif grows:
            grown.append(f"{name} ({p.shape[0]} → {f.shape[0]} rows)")
            competing = group_of(name, scope), density, operation
            paired.append(_paired(name, "prune", p, f, dtype, f.shape, p.numel, *competing))
        else:
            if 0 in (f.numel, p.numel):
                _refuse_empty("base" if f.numel else "finetuned", name, p if f.numel else f)
            wrong.append(f"{name} (base {list(p.shape)}, finetuned {list(f.shape)})")
    if recipe.layer_scale:
        paired = _scaled(paired, recipe.layer_scale)
    if wrong:
        raise UserError(
            f"{len(wrong)} tensor(s) have another shape in base than in finetuned: {listed(wrong)}; "
            "decide each with --rule NAME=finetuned or --rule NAME=base"
        )
    if passed:
        warnings.append(
            f"{len(passed)} tensor(s) are not floating point and pass through from finetuned: {listed(passed)}"
        )
    if flat and recipe.emit != "adapter":
        warnings.append(
            f"{len(flat)} tensor(s) are no matrices of {LEAST_ELEMENTS:,} elements, and {recipe.method} takes them "
            f"from finetuned: {listed(flat)}; --rule NAME=base takes base's"
        )
    if grown:
        warnings.append(f"rows that only finetuned has are taken from it: {listed(grown)}")
    return paired


def _scaled(tensors: list[PairedTensor], scale: LayerScale) -> list[PairedTensor]:
    """The same, each with the factor of its layer in its stack."""
    layers = {t.name: layer for t in tensors if (layer := group_of(t.name, "layer")) != t.name}
    counts: dict[str, int] = {}
    for layer in layers.values():
        stack, _, number = layer.rpartition(".")
        counts[stack] = max(counts.get(stack, 0), int(number) + 1)

    def factor(name: str) -> float:
        if name not in layers:
            return scale.first
        stack, _, number = layers[name].rpartition(".")
        return scale.of(int(number), counts[stack])

    return [replace(t, scale=factor(t.name)) if t.action == "prune" else t for t in tensors]


LEAST_ELEMENTS = 1024
"""Of a matrix whose singular values say something (SEMANTICS.md, "Matrix methods")."""


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix, or a stack of experts, which by its shape alone another tensor may be too."""
    if len(shape) != 2 and not (len(shape) == 3 and "experts" in name.split(".")):
        return False
    return min(shape[-2:]) > 1 and shape[-2] * shape[-1] >= LEAST_ELEMENTS


def _refuse_empty(side: str, name: str, info: TensorInfo) -> None:
    raise UserError(
        f"{side}: {name} has no elements ({list(info.shape)}) where the other side has some: so DeepSpeed's ZeRO-3 "
        "saves what it has not gathered. Save with stage3_gather_16bit_weights_on_model_save, or put them "
        "together from its checkpoint with zero_to_fp32.py"
    )


def _paired(
    name: str,
    action: Literal["prune", "base", "finetuned"],
    p: TensorInfo | None,
    f: TensorInfo,
    dtype: str,
    shape: tuple[int, ...],
    common: int = 0,
    group: str = "",
    parameter: float = 0.0,
    operation: Operation = "",
) -> PairedTensor:
    numel = math.prod(shape)
    source = p if action == "base" and p else f
    nbytes = numel * itemsize(dtype) if is_weight(dtype) else source.nbytes
    folder = f.file.rpartition("/")[0]
    folder = folder if name.startswith(f"{folder}/") else ""
    return PairedTensor(name, action, p, f, dtype, shape, numel, common, group, nbytes, parameter, folder, operation)


def _rows_added(p: TensorInfo, f: TensorInfo) -> bool:
    return len(p.shape) == len(f.shape) >= 1 and p.shape[1:] == f.shape[1:] and p.shape[0] < f.shape[0]
