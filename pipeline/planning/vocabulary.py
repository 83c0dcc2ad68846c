"""Rows of the vocabulary: which matrices have them, and whether they mean the same tokens on both sides."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fapm.errors import UserError, listed
from fapm.formats.checkpoint import Checkpoint
from fapm.formats.tensor import TensorInfo
from fapm.formats.vocabulary import moved, tied_to, token_ids, vocabularies
from fapm.planning.plan import PairedTensor, Plan
from fapm.planning.shards import group_of
from fapm.recipe import Recipe


def tied_heads(
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


def compare_vocabularies(
    recipe: Recipe, base: Checkpoint, finetuned: Checkpoint, paired: list[PairedTensor], warnings: list[str]
) -> None:
    """Whether a row means the same token on both sides, wherever rows of a vocabulary are compared without a rule.

    Raises:
        UserError: a token of base has another id in finetuned.
    """
    matrices = [
        t
        for t in paired
        if t.action == "prune" and len(t.shape) == 2 and is_vocabulary(t.name) and not recipe.rule_of(t.name)
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
            f"the rows of {listed(t.name for t in matrices)} are not the same tokens on both sides: {token!r} is "
            f"{ids[token]} in base's {name} and {theirs[token]} in finetuned's"
            + (f", and {more} more" if more else "")
            + "; decide for each matrix with --rule NAME=finetuned (or =prune to compare rows by their place)"
        )


# How the embedding and head matrices (and head biases) of the common architectures are called, outside any layer.
_VOCABULARY = re.compile(
    r"(?:^|[._])(embed_tokens|word_embeddings?|wte|tok_embeddings|embed_in|embeddings?|shared|lm_head|embed_out|"
    r"predictions|output|head|decoder)\.(weight|bias)$"
)


def is_vocabulary(name: str) -> bool:
    outside = group_of(name, "layer") == name
    return outside and bool(_VOCABULARY.search(name)) and not re.search(r"position|token_type", name)


def vocabulary_of(plan: Plan) -> tuple[tuple[int, ...], int] | None:
    """The rows that base and finetuned have for their tokens, and those of the output; None if there is not one number.

    Of heads, biases and embeddings outside layers.
    """
    found = [t for t in plan.tensors() if is_vocabulary(t.name) and t.shape and t.base and t.finetuned]
    written = {t.shape[0] for t in found}
    sides = {info.shape[0] for t in found for info in (t.base, t.finetuned) if info and info.shape}
    return (tuple(sorted(sides)), written.pop()) if len(written) == 1 and len(sides) > 1 else None


def is_untied(plan: Plan) -> bool:
    """Whether the output has a head of its own beside an embedding to which base ties it."""
    return bool(plan.heads)
