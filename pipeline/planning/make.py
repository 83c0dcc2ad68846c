"""Planning: all that will be done, from headers alone, so that whatever can be known to be wrong is known now."""

from __future__ import annotations

import difflib
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase

from fapm import fields
from fapm.errors import UserError, listed, plural, printable
from fapm.formats.accounts import Account, account
from fapm.formats.checkpoint import Checkpoint, open_checkpoint, read_config
from fapm.formats.newest import newest
from fapm.formats.side_files import is_code
from fapm.formats.tensor import Side, TensorInfo
from fapm.formats.unpaired import refuse_strangers
from fapm.formats.vocabulary import tied_to
from fapm.planning.adapter import for_adapter
from fapm.planning.matrices import refuse_large_matrices
from fapm.planning.merge import check_merge, merge
from fapm.planning.pairing import as_finetuned_names_it, pair_all, refuse_unpaired_of
from fapm.planning.plan import PairedTensor, Plan
from fapm.planning.shards import cut, default_shard_size, group, pattern_of
from fapm.planning.vocabulary import compare_vocabularies, tied_heads
from fapm.recipe import Recipe, how
from fapm.scoring.methods import METHODS, PARAMETERS


def make_plan(recipe: Recipe) -> Plan:
    """Read the headers of both checkpoints and plan the whole run.

    Raises:
        UserError: a checkpoint cannot be read, or the two do not belong together.
    """
    return make_plans([recipe])[0]


def make_plans(recipes: Sequence[Recipe]) -> list[Plan]:
    """The plans of several runs over the same inputs, which are opened once."""
    times, recipe = fields.times(), recipes[0]
    base, not_base = newest(fields.fill(recipe.base, times), "base")
    found = [newest(fields.fill(path, times), "finetuned") for path in recipe.checkpoints[1:]]
    paths, passed = [path for path, _ in found], [warning for _, warnings in found for warning in warnings]
    with without_collection():
        pickles = recipe.allow_pickle
        known = open_checkpoint(base, "base", allow_pickle=pickles, plain_codes=recipe.plain_codes)
        tuned = [
            open_checkpoint(path, "finetuned", known, recipe.renames, pickles, recipe.on_conflict, recipe.plain_codes)
            for path in paths
        ]
        plans = []
        for given in recipes:
            plan = _plan(given.at(base, paths), known, tuned)
            warnings = (*not_base, *passed, *plan.warnings)
            if recipe.strict and warnings:
                raise UserError(f"--strict: {plural(len(warnings), 'warning')}: {'; '.join(warnings)}")
            plans.append(replace(plan, given=given, warnings=warnings))
        return plans


def _plan(recipe: Recipe, base: Checkpoint, finetuned: Sequence[Checkpoint]) -> Plan:
    if not recipe.merged:
        return plan_pair(recipe, base, finetuned[0])
    check_merge(recipe)
    lanes = [plan_pair(lane, base, side) for lane, side in zip(recipe.lanes, finetuned, strict=True)]
    return merge(recipe, lanes)


@contextmanager
def without_collection() -> Iterator[None]:
    """A plan is many small objects, none of them garbage: looking for some takes half as long again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plan_pair(recipe: Recipe, base: Checkpoint, finetuned: Checkpoint) -> Plan:
    """The plan for two opened checkpoints; pure."""
    warnings = [*base.warnings, *finetuned.warnings]
    base = as_finetuned_names_it(recipe, base, finetuned, warnings)
    left_out = tuple(sorted(base.tensors.keys() - finetuned.tensors.keys()))
    added = tuple(sorted(finetuned.tensors.keys() - base.tensors.keys()))
    if len(added) == len(finetuned.tensors):
        refuse_strangers(base.tensors, finetuned.tensors)
    heads = tied_heads(base, finetuned, added, warnings)
    if recipe.unpaired == "error":
        refuse_unpaired_of(recipe, base, finetuned, heads)
    paired = pair_all(recipe, base, finetuned, heads, warnings)
    compare_vocabularies(recipe, base, finetuned, paired, warnings)
    alone = []
    for name in left_out:
        embedding = tied_to(base.tensors[name], finetuned)
        if embedding:
            warnings.append(f"{name} is left out: finetuned ties it to {embedding.name}")
        else:
            alone.append(name)
    if alone:
        warnings.append(f"{len(alone)} tensor(s) that only base has are left out: {listed(alone)}")
    added = tuple(name for name in added if name not in heads)
    if added:
        warnings.append(f"{len(added)} tensor(s) that only finetuned has are taken from it: {listed(added)}")
    if base.identity.keys() == finetuned.identity.keys() and recipe.base == recipe.finetuned:
        if not recipe.allow_same:
            raise UserError(
                f"base and finetuned are the same checkpoint, {base.folder.address}, so the output would be its copy; "
                "say where the fine-tuned one is, or --allow-same if that is meant"
            )
        warnings.append("base and finetuned are the same folder: the output will be its copy")
    warnings += _left_behind(recipe, finetuned)
    warnings += _ignored_settings(recipe, [t.name for t in paired])
    if recipe.emit != "checkpoint" and any(t.folder for t in paired):
        raise UserError(
            f"--emit {recipe.emit}: finetuned has weights in {next(t.folder for t in paired if t.folder)} too, and a "
            "sparse task vector is of one folder; prune it as a checkpoint"
        )
    refuse_large_matrices(recipe, paired)
    accounts = _accounts(base, finetuned, paired, left_out)
    if recipe.emit == "adapter":
        paired, accounts = for_adapter(recipe, finetuned, paired, accounts, warnings)
    shards = cut(paired, recipe.shard_size or default_shard_size(sum(t.nbytes for t in paired)))
    said = tuple(map(printable, warnings))
    return Plan(recipe, recipe, base, finetuned, shards, group(shards), left_out, added, said, accounts, tuple(heads))


def _accounts(
    base: Checkpoint, finetuned: Checkpoint, paired: list[PairedTensor], left_out: tuple[str, ...]
) -> dict[str, Account]:
    taken = {"prune": "pruned", "base": "passed through", "finetuned": "passed through"}
    sides: dict[Side, list[tuple[str, TensorInfo]]] = {"base": [], "finetuned": []}
    for tensor in paired:
        for side, info in (("base", tensor.base), ("finetuned", tensor.finetuned)):
            if info is not None:
                is_taken = tensor.action in ("prune", side)
                sides["base" if side == "base" else "finetuned"].append(
                    (taken[tensor.action] if is_taken else f"not taken, {tensor.action}'s is", info)
                )
    why = dict.fromkeys(left_out, "finetuned does not have it")
    return {
        "base": account(base, "base", sides["base"], why),
        "finetuned": account(finetuned, "finetuned", sides["finetuned"], {}),
    }


def _left_behind(recipe: Recipe, finetuned: Checkpoint) -> list[str]:
    """Warnings about code of finetuned that whoever loads the output would run, and which is therefore not copied."""
    code = [name for name in finetuned.side_files if is_code(name)]
    code += ["config.json's auto_map"] if "auto_map" in read_config(finetuned) else []
    if not code or recipe.allow_code:
        return []
    return [f"code of finetuned is left behind: {listed(code)}; --allow-code copies it"]


def _near(pattern: str, names: list[str]) -> str:
    """A pattern like one that matches nothing, made of the names that there are."""
    shapes = dict.fromkeys(map(pattern_of, names))
    found = difflib.get_close_matches(pattern.strip("*."), [part for name in shapes for part in name.split(".")], 1)
    whole = difflib.get_close_matches(pattern, shapes, 1, 0.7)
    meant = whole[0] if whole else f"*{found[0]}*" if found else ""
    return f"; do you mean {meant!r}?" if meant else f"; names are like {next(iter(shapes))!r}" if shapes else ""


def _ignored_settings(recipe: Recipe, names: list[str]) -> list[str]:
    found = []
    for text, rule in zip(recipe.rules, recipe.parsed_rules, strict=True):
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            found.append(f"the rule {text!r} matches no tensor{_near(rule.pattern, names)}")
    if recipe.device.startswith("cuda") and not recipe.on_device:
        found.append(
            f"--device {recipe.device} has no meaning for {how(recipe.model_dump())}, which works on processors"
        )
    for field in ("combine", "scaling"):
        if not recipe.merged and getattr(recipe, field) != Recipe.model_fields[field].default:
            found.append(f"--{field} has no meaning where one fine-tuned checkpoint is pruned")
    method = METHODS[recipe.method]
    if recipe.scope not in method.scopes:
        found.append(f"--scope {recipe.scope} has no meaning for {recipe.method}, which chooses no elements")
    for field in PARAMETERS:
        usual = Recipe.model_fields[field].default
        if field != method.parameter and getattr(recipe, field) != usual:
            found.append(f"--{field} has no meaning for {recipe.method}, whose parameter is --{method.parameter}")
    return found
