"""The plan: pairs base and finetuned tensors, names the groups that share a budget, and cuts the output into shards.

All of it comes from headers, before a weight is read, so that whatever can be known to be wrong is known now.

Order: tensors are laid out by name, over the shards too. So the shards of a group are in the order of its
ties (SEMANTICS.md, 5), and a worker hands out its part of a tie quota without asking another.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from fapm import fields
from fapm.errors import UserError, printable
from fapm.formats.accounts import Account, account
from fapm.formats.checkpoint import MODEL, Checkpoint, open_checkpoint, read_config
from fapm.formats.dtypes import OUTPUT_DTYPES, is_weight, itemsize
from fapm.formats.header import build_header
from fapm.formats.layouts import arranged_like, in_memory, reordered
from fapm.formats.names import packed_like, renamed, renaming
from fapm.formats.newest import newest
from fapm.formats.side_files import is_code
from fapm.formats.tensor import Side, TensorInfo
from fapm.formats.unpaired import refuse_strangers, refuse_unpaired
from fapm.formats.vocabulary import moved, tied_to, token_ids, vocabularies
from fapm.recipe import Recipe, Rule
from fapm.scoring.methods import METHODS


@dataclass(frozen=True, slots=True)
class PairedTensor:
    """One tensor of the output.

    Attributes:
        action: `prune`, or the side whose values are taken as they are.
        numel: elements of the output.
        common: elements that are pruned: all of them, or those of the rows that base has too.
        group: the group it competes in; empty if it is not pruned.
        density: what it adds to its group's budget, a share of `common`; for methods that use it, α or the divisor.
        folder: of a model of several folders the one in which it lies, with which its name then begins.
    """

    name: str
    action: Literal["prune", "base", "finetuned"]
    base: TensorInfo | None
    finetuned: TensorInfo | None
    dtype: str
    shape: tuple[int, ...]
    numel: int
    common: int
    group: str
    nbytes: int
    density: float = 0.0
    folder: str = ""

    @property
    def stored_name(self) -> str:
        """Its name in its file."""
        return self.name[len(self.folder) + 1 :] if self.folder else self.name

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """Stored tensors that have to be read for it."""
        if self.action == "prune":
            assert self.base is not None
            assert self.finetuned is not None
            return (self.base, self.finetuned)
        source = self.base if self.action == "base" else self.finetuned
        assert source
        return (source,)

    @property
    def read_bytes(self) -> int:
        return sum(s.nbytes for s in self.sources)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output, the unit of work."""

    index: int
    name: str
    tensors: tuple[PairedTensor, ...]
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """The elements that compete for one budget. `cross_shard` when its tensors lie in more than one shard."""

    name: str
    numel: int
    k: int
    tensors: int
    cross_shard: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """Floating-point elements of an output: all, those taken from finetuned as they are, and of these those without a
    partner in base."""

    numel: int
    taken: int
    unpaired: int


def weights_of(tensors: Iterable[PairedTensor]) -> Weights:
    numel = taken = unpaired = 0
    for t in tensors:
        if is_weight(t.dtype):
            alone = t.numel if t.base is None else t.numel - t.common if t.action == "prune" else 0
            numel += t.numel
            unpaired += alone
            taken += t.numel if t.action == "finetuned" else alone
    return Weights(numel, taken, unpaired)


@dataclass(frozen=True)
class Plan:
    """Everything that will be done.

    Attributes:
        recipe: with the paths of the inputs as they were found, and of the output once it is settled.
        given: the same as it was given.
        left_out: the tensors that only base has; `added`: those that only finetuned has.
        accounts: by side, what becomes of every stored tensor.
        heads: those that only finetuned stores, and that base ties to its embedding.
        chosen: how the recipe was chosen, for the card; empty where nothing is to be said.
    """

    recipe: Recipe
    given: Recipe
    base: Checkpoint
    finetuned: Checkpoint
    shards: tuple[Shard, ...]
    groups: dict[str, Group]
    left_out: tuple[str, ...]
    added: tuple[str, ...]
    warnings: tuple[str, ...]
    accounts: dict[str, Account]
    heads: tuple[str, ...] = ()
    chosen: str = ""

    @property
    def write_bytes(self) -> int:
        return sum(s.nbytes for s in self.shards)

    @property
    def pair_bytes(self) -> int:
        """Bytes of all inputs that the output depends on."""
        return sum(t.read_bytes for s in self.shards for t in s.tensors)

    @property
    def weights(self) -> Weights:
        return weights_of(self.tensors())

    def tensors(self) -> Iterable[PairedTensor]:
        return (t for s in self.shards for t in s.tensors)


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
    finetuned, not_finetuned = newest(fields.fill(recipe.finetuned, times), "finetuned")
    with without_collection():
        pickles = recipe.allow_pickle
        known = open_checkpoint(base, "base", allow_pickle=pickles, plain_codes=recipe.plain_codes)
        tuned = open_checkpoint(
            finetuned, "finetuned", known, recipe.renames, pickles, recipe.on_conflict, recipe.plain_codes
        )
        plans = []
        for given in recipes:
            plan = plan_pair(given.model_copy(update={"base": base, "finetuned": finetuned}), known, tuned)
            plans.append(replace(plan, given=given, warnings=(*not_base, *not_finetuned, *plan.warnings)))
        return plans


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
    base = _as_finetuned_names_it(recipe, base, finetuned, warnings)
    left_out = tuple(sorted(base.tensors.keys() - finetuned.tensors.keys()))
    added = tuple(sorted(finetuned.tensors.keys() - base.tensors.keys()))
    if len(added) == len(finetuned.tensors):
        refuse_strangers(base.tensors, finetuned.tensors)
    heads = _tied_heads(base, finetuned, added, warnings)
    if recipe.unpaired == "error":
        _refuse_unpaired(recipe, base, finetuned, heads)
    paired = _pair_all(recipe, base, finetuned, heads, warnings)
    _compare_vocabularies(recipe, base, finetuned, paired, warnings)
    alone = []
    for name in left_out:
        embedding = tied_to(base.tensors[name], finetuned)
        if embedding:
            warnings.append(f"{name} is left out: finetuned ties it to {embedding.name}")
        else:
            alone.append(name)
    if alone:
        warnings.append(f"{len(alone)} tensor(s) that only base has are left out: {_first(alone)}")
    added = tuple(name for name in added if name not in heads)
    if added:
        warnings.append(f"{len(added)} tensor(s) that only finetuned has are taken from it: {_first(added)}")
    if base.identity.keys() == finetuned.identity.keys() and recipe.base == recipe.finetuned:
        warnings.append("base and finetuned are the same folder: the output will be its copy")
    warnings += _left_behind(recipe, finetuned)
    warnings += _ignored_settings(recipe, [t.name for t in paired])
    if recipe.emit != "checkpoint" and any(t.folder for t in paired):
        raise UserError(
            f"--emit {recipe.emit}: finetuned has weights in {next(t.folder for t in paired if t.folder)} too, and a "
            "sparse task vector is of one folder; prune it as a checkpoint"
        )
    accounts = _accounts(base, finetuned, paired, left_out)
    shards = cut(paired, recipe.shard_size or default_shard_size(sum(t.nbytes for t in paired)))
    said = tuple(map(printable, warnings))
    return Plan(recipe, recipe, base, finetuned, shards, group(shards), left_out, added, said, accounts, tuple(heads))


def _refuse_unpaired(recipe: Recipe, base: Checkpoint, finetuned: Checkpoint, heads: dict[str, TensorInfo]) -> None:
    def undecided(side: Checkpoint, other: Checkpoint) -> list[TensorInfo]:
        alone = (info for name, info in side.tensors.items() if name not in other.tensors)
        return [info for info in alone if info.name not in heads and recipe.rule_of(info.name) is None]

    def numel(side: Checkpoint) -> int:
        return sum(info.numel for info in side.tensors.values() if is_weight(info.dtype))

    alone = [info for info in undecided(base, finetuned) if not tied_to(info, finetuned)]
    refuse_unpaired(alone, undecided(finetuned, base), numel(base), numel(finetuned))


def _as_finetuned_names_it(recipe: Recipe, base: Checkpoint, finetuned: Checkpoint, warnings: list[str]) -> Checkpoint:
    """base with its tensors named and packed as finetuned's are."""
    wanted = finetuned.tensors
    if base.tensors.keys() >= wanted.keys():
        if recipe.renames and not any(info.form for info in wanted.values()):
            warnings.append("--rename changes nothing: base has all of finetuned's names")
        return base
    tensors = renamed(base.tensors, wanted, recipe.renames, warnings)
    known = _architecture(base), _architecture(finetuned)
    classes = known[0] or known[1], known[1] or known[0]
    tensors = _in_its_layout(tensors, wanted, *classes, recipe.unpaired == "error", warnings)
    return replace(base, tensors=packed_like(tensors, wanted, warnings))


def _architecture(side: Checkpoint) -> str:
    """The class of its model, as its configuration calls it; empty where it does not."""
    listed = read_config(side).get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""


def _in_its_layout(
    base: dict[str, TensorInfo],
    wanted: dict[str, TensorInfo],
    of_base: str,
    of_finetuned: str,
    all_of_it: bool,
    warnings: list[str],
) -> dict[str, TensorInfo]:
    """base's tensors, those without a partner as finetuned keeps them where it is in another layout of one model.

    Args:
        of_base, of_finetuned: the classes of their models.
        all_of_it: refuse what becomes another by an operation that is not known here.
    """
    ours = {name: info for name, info in base.items() if name not in wanted}
    theirs = {name: info for name, info in wanted.items() if name not in base}
    if not ours or not theirs:
        return base
    (here, lost), (there, lost_too) = in_memory(ours, of_base), in_memory(theirs, of_finetuned)
    if all_of_it and (lost or lost_too):
        raise UserError(
            f"base and finetuned are in two layouts of {of_finetuned}, and how {min([*lost, *lost_too])} becomes what "
            "the other has is not known here: save them in one layout (transformers: load each, and save_pretrained)"
        )
    moves = renaming(here, there, (), [])
    found, used = arranged_like({moves[name]: array for name, array in here.items()}, there, ours, theirs)
    if not found:
        return base
    unclear = reordered(base.keys() & wanted.keys(), of_finetuned)
    if unclear:
        raise UserError(
            f"base and finetuned are in two layouts of {of_finetuned}, and {min(unclear)}, which has one name in both, "
            "is not the same in both: save them in one layout (transformers: load each, and save_pretrained)"
        )
    called = f" of {of_finetuned}" if of_finetuned else ""
    warnings.append(f"base is compared in finetuned's layout{called} ({len(found)} tensors)")
    return {name: info for name, info in base.items() if name not in used} | found


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
    return [f"code of finetuned is left behind: {_first(code)}; --allow-code copies it"]


def _first(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "") or "none"


def _ignored_settings(recipe: Recipe, names: list[str]) -> list[str]:
    found = []
    for text, rule in zip(recipe.rules, recipe.parsed_rules, strict=True):
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            found.append(f"the rule {text!r} matches no tensor")
    if METHODS[recipe.method].score is None and recipe.scope != "tensor":
        found.append(f"--scope {recipe.scope} has no meaning for {recipe.method}, which chooses no elements")
    return found


def _tied_heads(
    base: Checkpoint, finetuned: Checkpoint, added: Iterable[str], warnings: list[str]
) -> dict[str, TensorInfo]:
    """The heads that only finetuned stores, each with the embedding that base ties it to."""
    heads = {}
    for name in added:
        head = finetuned.tensors[name]
        embedding = tied_to(head, base)
        if embedding and embedding.shape[:1] <= head.shape[:1]:
            heads[name] = embedding
            warnings.append(f"{name} is compared with {embedding.name}, to which base ties it")
    return heads


def _compare_vocabularies(
    recipe: Recipe, base: Checkpoint, finetuned: Checkpoint, paired: list[PairedTensor], warnings: list[str]
) -> None:
    """Whether a row means the same token on both sides, wherever rows of a vocabulary are compared without a rule.

    Raises:
        UserError: a token of base has another id in finetuned.
    """
    matrices = [
        t
        for t in paired
        if t.action == "prune" and len(t.shape) == 2 and _is_vocabulary(t.name) and not recipe.rule_of(t.name)
    ]
    if not matrices:
        return
    grown = any(t.common < t.numel for t in matrices)
    found = vocabularies(base, finetuned)
    if not found:
        if grown:
            warnings.append("no tokenizer on both sides says whether the rows of the vocabulary are the same tokens")
        return
    *sides, name = found
    if sides[0] == sides[1]:
        return
    ids, theirs = (token_ids(side, name) for side in sides)
    if ids is None or theirs is None:
        warnings.append(f"{name} is not one that could say whether the rows of the vocabulary are the same tokens")
        return
    elsewhere = moved(ids, theirs)
    if elsewhere:
        token, more = elsewhere[0], len(elsewhere) - 1
        raise UserError(
            f"the rows of {_first(t.name for t in matrices)} are not the same tokens on both sides: {token!r} is "
            f"{ids[token]} in base's {name} and {theirs[token]} in finetuned's"
            + (f", and {more} more" if more else "")
            + "; decide for each matrix with --rule NAME=finetuned (or =prune to compare rows by their place)"
        )


def _pair_all(
    recipe: Recipe,
    base: Checkpoint,
    finetuned: Checkpoint,
    heads: dict[str, TensorInfo],
    warnings: list[str],
) -> list[PairedTensor]:
    paired, wrong, passed, grown = [], [], [], []
    scope = recipe.scope if METHODS[recipe.method].score else "tensor"
    for name in sorted(finetuned.tensors):
        f, p = finetuned.tensors[name], base.tensors.get(name) or heads.get(name)
        rule = recipe.rule_of(name) if p else Rule(name, "finetuned")
        action = rule.action if rule else None
        density = recipe.density if rule is None or rule.density is None else rule.density
        dtype = OUTPUT_DTYPES[recipe.dtype] if recipe.dtype and is_weight(f.dtype) else f.dtype
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
        elif f.shape == p.shape:
            paired.append(_paired(name, "prune", p, f, dtype, f.shape, f.numel, group_of(name, scope), density))
        elif _rows_added(p, f) and (action == "prune" or _is_vocabulary(name)):
            grown.append(f"{name} ({p.shape[0]} → {f.shape[0]} rows)")
            paired.append(_paired(name, "prune", p, f, dtype, f.shape, p.numel, group_of(name, scope), density))
        else:
            if 0 in (f.numel, p.numel):
                _refuse_empty("base" if f.numel else "finetuned", name, p if f.numel else f)
            wrong.append(f"{name} (base {list(p.shape)}, finetuned {list(f.shape)})")
    if wrong:
        raise UserError(
            f"{len(wrong)} tensor(s) have another shape in base than in finetuned: {_first(wrong)}; "
            "decide each with --rule NAME=finetuned or --rule NAME=base"
        )
    if passed:
        warnings.append(
            f"{len(passed)} tensor(s) are not floating point and pass through from finetuned: {_first(passed)}"
        )
    if grown:
        warnings.append(f"rows that only finetuned has are taken from it: {_first(grown)}")
    return paired


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
    density: float = 0.0,
) -> PairedTensor:
    numel = math.prod(shape)
    source = p if action == "base" and p else f
    nbytes = numel * itemsize(dtype) if is_weight(dtype) else source.nbytes
    folder = f.file.rpartition("/")[0]
    folder = folder if name.startswith(f"{folder}/") else ""
    return PairedTensor(name, action, p, f, dtype, shape, numel, common, group, nbytes, density, folder)


def _rows_added(p: TensorInfo, f: TensorInfo) -> bool:
    return len(p.shape) == len(f.shape) >= 1 and p.shape[1:] == f.shape[1:] and p.shape[0] < f.shape[0]


# How the embedding and head matrices (and head biases) of the common architectures are called, outside any layer.
_VOCABULARY = re.compile(
    r"(?:^|[._])(embed_tokens|word_embeddings?|wte|tok_embeddings|embed_in|embeddings?|shared|lm_head|embed_out|"
    r"predictions|output|head|decoder)\.(weight|bias)$"
)


def _is_vocabulary(name: str) -> bool:
    outside = group_of(name, "layer") == name
    return outside and bool(_VOCABULARY.search(name)) and not re.search(r"position|token_type", name)


def vocabulary_of(plan: Plan) -> tuple[tuple[int, ...], int] | None:
    """The rows that base and finetuned have for their tokens, and those of the output; None if there is not one number.

    Of heads, biases and embeddings outside layers.
    """
    found = [t for t in plan.tensors() if _is_vocabulary(t.name) and t.shape and t.base and t.finetuned]
    written = {t.shape[0] for t in found}
    sides = {info.shape[0] for t in found for info in (t.base, t.finetuned) if info and info.shape}
    return (tuple(sorted(sides)), written.pop()) if len(written) == 1 and len(sides) > 1 else None


def is_untied(plan: Plan) -> bool:
    """Whether the output has a head of its own beside an embedding to which base ties it."""
    return bool(plan.heads)


def group_of(name: str, scope: str) -> str:
    """The group that a tensor competes in.

    A layer is named by the path up to its first number that follows a name: `model.layers.7` holds
    `model.layers.7.mlp.experts.3.w1.weight` too. A tensor outside any numbered block is a group of its own.
    """
    if scope == "global":
        return "all"
    if scope == "layer":
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if parts[i].isdigit() and not parts[i - 1].isdigit():
                return ".".join(parts[: i + 1])
    return name


def default_shard_size(total: int) -> int:
    """Bytes of a shard where the recipe does not say: 1 GiB, less for small models, so that workers finish together.

    An eighth of the whole, from 256 MiB to 1 GiB. Never a matter of how many workers there are: the bytes would be too.
    """
    return min(max(total // 8, 256 << 20), 1 << 30)


MOST_TENSORS = 1 << 14
"""Tensors of a shard, at most: of small ones it is their number that takes the time."""


def cut(tensors: list[PairedTensor], shard_size: int) -> tuple[Shard, ...]:
    """Cut tensors, in the order given, into shards of about equal size, of at most `shard_size` bytes and MOST_TENSORS.

    A tensor larger than that has a shard of its own. Names follow the Hugging Face convention. What lies in a folder of
    its own has one shard there.
    """
    parts: list[list[PairedTensor]] = []
    for folder, grouped in itertools.groupby(tensors, key=lambda t: t.folder):
        inside = list(grouped)
        parts += [inside] if folder else _parts(inside, shard_size)
    count = sum(not part or not part[0].folder for part in parts)
    numbers = itertools.count()
    return tuple(
        _shard(i, part, f"{part[0].folder}/{MODEL}" if part and part[0].folder else _shard_name(next(numbers), count))
        for i, part in enumerate(parts or [[]])
    )


def _parts(tensors: list[PairedTensor], shard_size: int) -> list[list[PairedTensor]]:
    total = sum(t.nbytes for t in tensors)
    count = max(1, math.ceil(total / shard_size), math.ceil(len(tensors) / MOST_TENSORS))
    parts: list[list[PairedTensor]] = [[]]
    here = done = 0
    for tensor in tensors:
        full = here + tensor.nbytes > shard_size or done >= total * len(parts) / count
        if parts[-1] and ((tensor.nbytes and full) or len(parts[-1]) == MOST_TENSORS):
            parts.append([])
            here = 0
        parts[-1].append(tensor)
        here += tensor.nbytes
        done += tensor.nbytes
    return parts


def _shard_name(index: int, count: int) -> str:
    return MODEL if count <= 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shard(index: int, tensors: list[PairedTensor], name: str) -> Shard:
    header = build_header((t.stored_name, t.dtype, t.shape, t.nbytes) for t in tensors)
    return Shard(index, name, tuple(tensors), header, len(header) + sum(t.nbytes for t in tensors))


def group(shards: Iterable[Shard]) -> dict[str, Group]:
    """The groups of a cut, each with its budget."""
    competing: dict[str, dict[float, int]] = {}
    tensors: dict[str, int] = {}
    first: dict[str, int] = {}
    cross_shard: set[str] = set()
    for shard in shards:
        for tensor in shard.tensors:
            name = tensor.group
            if name:
                numels = competing.setdefault(name, {})
                numels[tensor.density] = numels.get(tensor.density, 0) + tensor.common
                tensors[name] = tensors.get(name, 0) + 1
                if first.setdefault(name, shard.index) != shard.index:
                    cross_shard.add(name)
    return {
        name: Group(name, sum(numels.values()), budget(numels), tensors[name], name in cross_shard)
        for name, numels in competing.items()
    }


def budget(numels: dict[float, int]) -> int:
    """k = int(Σ n_d·d) over densities d of n_d elements each, in ascending order and in float64 (SEMANTICS.md, 8)."""
    k = 0.0
    for density in sorted(numels):
        k += numels[density] * density
    return int(k)


def index_json(shards: Iterable[Shard]) -> dict[str, object]:
    """The index that Hugging Face libraries read: the size of all tensors in bytes, and each one's file."""
    there = [(t, s.name) for s in shards for t in s.tensors if not t.folder]
    weight_map = {t.name: name for t, name in there}
    return {"metadata": {"total_size": sum(t.nbytes for t, _ in there)}, "weight_map": weight_map}
