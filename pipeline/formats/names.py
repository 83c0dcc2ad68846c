"""Which tensor of base is which of finetuned where the two name or pack them differently: by tables, not by shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fapm.errors import UserError
from fapm.formats.dtypes import itemsize
from fapm.formats.tensor import Part, Side, Sides, TensorInfo, alias, formed

HEAD = re.compile(r"(?:^|\.)(lm_head|embed_out|output|predictions\.decoder)\.weight$")
EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$")
"""The matrices of a vocabulary that may be one and the same."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that torch.compile and FSDP add."""

_VALUED = "pretrained_model."

_FIRST = ("module.", "base_model.model.")
"""Beginnings of names that data parallelism and PEFT add."""

_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("model.language_model.", "language_model.model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", "transformer."),
    ("model.", ""),
    ("transformer.", ""),
    ("bert.", ""),
    ("roberta.", ""),
    ("distilbert.", ""),
)
"""How the same text model is called on its own, inside a multimodal one, and without its head."""


_INSIDE = ((".block_sparse_moe.", ".mlp."),)
"""Names that transformers changes between disk and memory."""


def unwrapped(tensors: Mapping[str, TensorInfo], role: str, warnings: list[str]) -> dict[str, TensorInfo]:
    """The tensors by their names without what wraps them in training.

    Raises:
        UserError: two would have one name.
    """
    if any(name.startswith("v_head.") for name in tensors) and any(name.startswith(_VALUED) for name in tensors):
        raise UserError(
            f"{role}: it is a model with a value head, as TRL saves it ({_VALUED}… and v_head.…), which nothing else "
            f"loads; load it with TRL's class, and save its pretrained_model alone"
        )
    bare_names = {name: _WRAPPERS.sub("", name) for name in tensors}
    for first in _FIRST:
        if all(bare.startswith(first) for bare in bare_names.values()):
            bare_names = {name: bare.removeprefix(first) for name, bare in bare_names.items()}
    found: dict[str, TensorInfo] = {}
    seen: dict[str, str] = {}
    for name, info in tensors.items():
        bare = bare_names[name]
        if bare in found:
            raise UserError(f"{role}: {seen[bare]!r} and {name!r} are both {bare!r} without what training has added")
        seen[bare] = name
        found[bare] = info if bare == name else replace(info, name=bare)
    changed = next((name for bare, name in seen.items() if bare != name), None)
    if changed:
        bare = next(bare for bare, name in seen.items() if name == changed)
        warnings.append(f"{role}: names are taken without what training has added: {changed} is {bare}")
    return found


def rename(text: str, name: str) -> str | None:
    """A name of base as one of finetuned's; None if it is not concerned.

    Args:
        text: FROM=TO, beginnings of names; *FROM*=*TO*, what is in their middle, wherever it is; *FROM=*TO, ends.
    """
    before, _, after = text.partition("=")
    if before.startswith("*") and before.endswith("*"):
        return name.replace(before[1:-1], after[1:-1]) if before[1:-1] in name else None
    if before.startswith("*"):
        return name.removesuffix(before[1:]) + after[1:] if name.endswith(before[1:]) else None
    return after + name.removeprefix(before) if name.startswith(before) else None


def renamed(
    base: Mapping[str, TensorInfo],
    wanted: Iterable[str],
    renames: Sequence[str],
    warnings: list[str],
) -> dict[str, TensorInfo]:
    """base's tensors by finetuned's names. The arguments are those of `renaming`."""
    moves = renaming(base, wanted, renames, warnings)
    return {new: base[name] if base[name].name == new else replace(base[name], name=new) for name, new in moves.items()}


def renaming(base: Iterable[str], wanted: Iterable[str], renames: Sequence[str], warnings: list[str]) -> dict[str, str]:
    """Every name of base, and finetuned's for it, in base's order.

    Args:
        wanted: finetuned's names.
        renames: as of `rename`, as the user gave them; before them the names that agree, after them what is known.

    Raises:
        UserError: a rename matches nothing, or gives two tensors one name.
    """
    wanted = set(wanted)
    found = {name: name for name in base}
    tables = [pair for one, other in _PREFIXES for pair in (f"{one}={other}", f"{other}={one}")]
    tables += [pair for one, other in _INSIDE for pair in (f"*{one}*=*{other}*", f"*{other}*=*{one}*")]
    for text in [*renames, *tables]:
        free = wanted.difference(found.values())
        moves = {old: new for old, name in found.items() if name not in wanted and (new := rename(text, name)) in free}
        if len(set(moves.values())) < len(moves):
            raise UserError(f"--rename {text}: two of base's tensors would have one name")
        if moves:
            found |= {old: str(new) for old, new in moves.items()}
            before, _, after = (part if "*" in part else f"{part}*" for part in text.partition("="))
            warnings.append(f"base's {before} is compared with finetuned's {after} ({len(moves)} tensors)")
        elif text in renames:
            raise UserError(f"--rename {text}: base has no tensor that would then be one of finetuned's")
    return found


# Experts, one by one or all of a layer in one tensor, as transformers keeps them in memory (its conversion tables).

_ONE_BY_ONE = (
    (re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.(w1|w3|w2)\.weight"), "mlp.experts", ("w1", "w3", "w2")),
    (
        re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight"),
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
    ),
)


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of one expert: the rows from `row` on of the matrix `expert` of a stack."""

    name: str
    expert: int
    row: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Stack:
    """Experts (n, rows, columns) in the order of their bytes."""

    members: tuple[Member, ...]
    shape: tuple[int, int, int]
    dtype: str


def stacks(tensors: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    """The stacks that experts which are kept one by one would make, by their names in memory."""
    layers: dict[tuple[str, int], dict[tuple[int, str], TensorInfo]] = {}
    for name, info in tensors.items():
        for family, (pattern, _, _) in enumerate(_ONE_BY_ONE):
            matched = pattern.fullmatch(name)
            if matched:
                layers.setdefault((matched[1], family), {})[int(matched[2]), matched[3]] = info
    found = {}
    for (layer, family), experts in layers.items():
        _, path, (gate, up, down) = _ONE_BY_ONE[family]
        for parameter, kinds in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            made = _stack(experts, kinds)
            if made:
                found[f"{layer}.{path}.{parameter}"] = made
    return found


def _stack(experts: Mapping[tuple[int, str], TensorInfo], kinds: tuple[str, ...]) -> Stack | None:
    count = 1 + max(number for number, _ in experts)
    keys = [(number, kind) for number in range(count) for kind in kinds]
    infos = [experts.get(key) for key in keys]
    first = infos[0]
    if first is None or len(first.shape) != 2:
        return None
    members, (rows, columns) = [], first.shape
    for (number, kind), info in zip(keys, infos, strict=True):
        if info is None or (info.shape, info.dtype) != (first.shape, first.dtype):
            return None
        members.append(Member(info.name, number, kinds.index(kind) * rows, rows, columns))
    return Stack(tuple(members), (count, len(kinds) * rows, columns), first.dtype)


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Tensors of one dtype, one after the other."""

    parts: tuple[Part, ...]

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        width, at = itemsize(self.parts[0].info.dtype), 0
        for part in self.parts:
            begin, end = max(start, at), min(stop, at + part.info.numel)
            if begin < end:
                target = out[(begin - start) * width : (end - start) * width]
                sides.read_into(part, (begin - at) * width, (end - at) * width, target)
            at += part.info.numel


@dataclass(frozen=True, slots=True)
class Subrange:
    """Elements of a tensor from `first` on."""

    of: Part
    first: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.of,)

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        width = itemsize(self.of.info.dtype)
        sides.read_into(self.of, (self.first + start) * width, (self.first + stop) * width, out)


def packed_like(
    base: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], warnings: list[str], side: Side = "base"
) -> dict[str, TensorInfo]:
    """base's tensors, its experts packed as finetuned has them, stacked or one by one, where no layout is known.

    Raises:
        UserError: the matrices are square, so that they could lie either way in their stack.
    """
    found, how = dict(base), {"stacked": 0, "one by one": 0}
    for name, stack in stacks(base).items():
        if name in wanted and name not in base:
            _refuse_square(name, stack)
            parts = tuple(Part(side, base[member.name]) for member in stack.members)
            found[name] = formed(name, stack.dtype, stack.shape, Concatenated(parts))
            for member in stack.members:
                found.pop(member.name)
            how["stacked"] += len(stack.members)
    for name, stack in stacks(wanted).items():
        known = any(member.name in base for member in stack.members)
        if name in base and not known and base[name].shape == stack.shape:
            _refuse_square(name, stack)
            whole = found.pop(name)
            for member in stack.members:
                first = (member.expert * stack.shape[1] + member.row) * stack.shape[2]
                shape = (member.rows, member.columns)
                found[member.name] = formed(member.name, whole.dtype, shape, Subrange(Part(side, whole), first))
            how["one by one"] += len(stack.members)
    for layout, count in how.items():
        if count:
            warnings.append(f"base's experts are compared as finetuned keeps them, {layout} ({count} matrices)")
    return found


def _refuse_square(name: str, stack: Stack) -> None:
    if stack.shape[1] == stack.shape[2]:
        raise UserError(
            f"{name} is a stack of square matrices {list(stack.shape)}, and no architecture in config.json says which "
            "way they lie in it; give a config.json with its architectures"
        )


def as_in_memory(base: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, Stack]]:
    """base's tensors by the names under which a model has them in memory, and the stacks among them."""
    made = stacks(base)
    found = {name: alias("base", info) for name, info in base.items()}
    for name, stack in made.items():
        parts = tuple(Part("base", base[member.name]) for member in stack.members)
        found[name] = formed(name, stack.dtype, stack.shape, Concatenated(parts))
    return found, made
