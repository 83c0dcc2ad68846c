"""Merges: the plan of several fine-tuned checkpoints over one base, from the plans of each of them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fapm.errors import UserError, listed
from fapm.formats.dtypes import OUTPUT_DTYPES, itemsize
from fapm.formats.tensor import Part, Sides, TensorInfo
from fapm.planning.plan import PairedTensor, Plan, Shard
from fapm.planning.shards import cut, default_shard_size, group
from fapm.recipe import Recipe
from fapm.scoring.combining import COMBINATIONS, Angular
from fapm.scoring.methods import METHODS


def check_merge(recipe: Recipe) -> None:
    """Whether the choices of a merge go together.

    Raises:
        UserError: they do not.
    """
    how, count = COMBINATIONS[recipe.combine], len(recipe.merged)
    for lane in recipe.lanes:
        if METHODS[lane.method].kind == "matrix":
            raise UserError(f"--method {lane.method} works on whole matrices, and a merge combines elements")
    for text, rule in zip(recipe.rules, recipe.parsed_rules, strict=True):
        if rule.action == "finetuned":
            raise UserError(f"--rule {text}: a merge has several fine-tuned checkpoints; write =base, =prune or =0.05")
    weights = [source.weight for source in recipe.merged]
    if not how.weighs and any(weight != 1 for weight in weights):
        raise UserError(f"--combine {recipe.combine} has no use for weights; leave them out")
    if recipe.scaling != 1 and (isinstance(how, Angular) or not how.weighs):
        raise UserError(f"--scaling has no meaning for --combine {recipe.combine}")
    if isinstance(how, Angular):
        fewest, most = how.sources
        if not fewest <= count <= most:
            wanted = f"at least {fewest}" if count < fewest else f"at most {most}"
            raise UserError(f"--combine {recipe.combine} takes {wanted} fine-tuned checkpoints, and there are {count}")
    if recipe.combine in ("mean", "slerp") and count > 1 and not np.float32(math.fsum(weights)):
        raise UserError(f"--combine {recipe.combine} divides by the sum of the weights, which is 0")


def merge(recipe: Recipe, lanes: Sequence[Plan]) -> Plan:
    """The plan of a merge.

    Args:
        lanes: the plans of its sources, each alone.

    Raises:
        UserError: the sources do not belong together.
    """
    of_lane = [{t.name: replace(t, source=i) for t in lane.tensors()} for i, lane in enumerate(lanes, 1)]
    names = sorted(set().union(*of_lane))
    found = {name: [of[name] for of in of_lane if name in of] for name in names}
    found = {name: _that_change(of_name, lanes) for name, of_name in found.items()}
    _refuse_undecided(recipe, found, lanes)
    merged = [_merged(recipe, of_name) for of_name in found.values()]
    if isinstance(COMBINATIONS[recipe.combine], Angular):
        lacking = [t.name for t in merged if t.operation and len(t.sources) <= len(lanes)]
        if lacking:
            raise UserError(
                f"--combine {recipe.combine} looks at the angles between all sources, and {len(lacking)} tensor(s) are "
                f"not in all of them: {listed(lacking)}; --rule NAME=base takes base's"
            )
    shards = cut(merged, recipe.shard_size or default_shard_size(sum(t.nbytes for t in merged)))
    first = lanes[0]
    warnings = [
        warning if len(lanes) == 1 else f"finetuned {i}: {warning}"
        for i, lane in enumerate(lanes, 1)
        for warning in lane.warnings
    ]
    further = {f"finetuned-{i}": lane.accounts["finetuned"] for i, lane in enumerate(lanes[1:], 2)}
    return replace(
        first,
        recipe=recipe,
        given=recipe,
        shards=shards,
        groups={},
        left_out=tuple(sorted(set(first.left_out).intersection(*(lane.left_out for lane in lanes)))),
        added=tuple(sorted(set().union(*(lane.added for lane in lanes)))),
        warnings=tuple(dict.fromkeys(warnings)),
        accounts=first.accounts | further,
        heads=tuple(dict.fromkeys(head for lane in lanes for head in lane.heads)),
        lanes=tuple(_lane(plan, i, of, shards) for i, (plan, of) in enumerate(zip(lanes, of_lane, strict=True), 1)),
    )


def _merged(recipe: Recipe, of_name: Sequence[PairedTensor]) -> PairedTensor:
    """One tensor of the output."""
    first = of_name[0]
    if first.action != "prune":
        return of_name[-1] if recipe.combine == "last" else first
    dtype = OUTPUT_DTYPES[recipe.dtype] if recipe.dtype else first.dtype
    others = tuple((t.source, t.finetuned) for t in of_name[1:] if t.finetuned)
    nbytes = first.numel * itemsize(dtype)
    return replace(
        first, dtype=dtype, nbytes=nbytes, group="", parameter=0.0, operation="merge", common=first.numel, others=others
    )


def _lane(plan: Plan, source: int, tensors: dict[str, PairedTensor], shards: Sequence[Shard]) -> Plan:
    """The plan of one source, cut as the merge is; of tensors that it lacks nothing is done."""
    mine = tuple(
        replace(shard, tensors=tuple(tensors.get(t.name) or _lacking(t) for t in shard.tensors), header=b"", nbytes=0)
        for shard in shards
    )
    return replace(plan, shards=mine, groups=group(mine), source=source, within=tuple(shards))


def _lacking(tensor: PairedTensor) -> PairedTensor:
    return replace(tensor, action="base", common=0, operation="", others=(), finetuned=None)


def _that_change(of_name: list[PairedTensor], lanes: Sequence[Plan]) -> list[PairedTensor]:
    """Of a tensor that is taken as it is by all sources, those that store other bytes than base, if any does."""
    base = of_name[0].base
    if base is None or any(t.action != "finetuned" for t in of_name):
        return of_name
    changing = [t for t in of_name if t.base != base or not _same_bytes(t, (0, base), lanes)]
    return changing or of_name[:1]


def _refuse_undecided(recipe: Recipe, found: Mapping[str, Sequence[PairedTensor]], lanes: Sequence[Plan]) -> None:
    """Refuse tensors of which it is not clear what a merge of them would be.

    Raises:
        UserError: with their names and what decides it.
    """
    wrong: dict[str, list[str]] = {}
    for name, of_name in found.items():
        first, why = of_name[0], ""
        if any(t.base != first.base for t in of_name):
            why = "are named or laid out in another way in one source than in another"
        elif any((t.action, t.shape) != (first.action, first.shape) for t in of_name):
            why = "have another shape or kind in one source than in another"
        elif first.action == "prune" and first.common < first.numel:
            why = "have rows that base does not have, so that there is nothing to combine them with"
        elif first.action == "finetuned" and recipe.combine not in ("first", "last") and _differ(of_name, lanes):
            why = "are not floating point, or not in base, and differ between the sources"
        if why:
            wrong.setdefault(why, []).append(name)
    if wrong:
        said = "; ".join(f"{len(names)} tensor(s) {why}: {listed(names)}" for why, names in wrong.items())
        raise UserError(f"{said}; --rule NAME=base takes base's where it has one")


def _differ(of_name: Sequence[PairedTensor], lanes: Sequence[Plan]) -> bool:
    """Whether sources store different bytes of a tensor."""
    first, *others = of_name
    return not all(t.finetuned and _same_bytes(first, (t.source, t.finetuned), lanes) for t in others)


def _same_bytes(tensor: PairedTensor, other: tuple[int, TensorInfo], lanes: Sequence[Plan]) -> bool:
    """Whether what a source stores of a tensor is, byte for byte, what another checkpoint has of it.

    Args:
        other: the checkpoint's number, 0 for base, and what it has.
    """
    number, theirs = other
    mine = tensor.finetuned
    if mine is None or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return False
    one, two = (Sides(lanes[i - 1].base.folder, lanes[i - 1].finetuned.folder) for i in (tensor.source, number or 1))
    part = Part("finetuned" if number else "base", theirs)
    return all(
        np.array_equal(one.take(Part("finetuned", mine), at, at + step), two.take(part, at, at + step))
        for at in range(0, mine.nbytes, _AT_ONCE)
        for step in [min(_AT_ONCE, mine.nbytes - at)]
    )


_AT_ONCE = 8 << 20  # bytes; a multiple of every width
