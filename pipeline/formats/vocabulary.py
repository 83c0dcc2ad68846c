"""Vocabularies: which row of an embedding or a head is which token, and which head is tied to which embedding."""

from __future__ import annotations

from fapm.errors import UserError
from fapm.formats.checkpoint import Checkpoint, read_config
from fapm.formats.configuration import ties
from fapm.formats.names import EMBEDDING, HEAD
from fapm.formats.tensor import TensorInfo
from fapm.storage.records import parse

_MOST_BYTES = 64 << 20
_MOST_PARTS = 2_000_000  # merges are lists, and vocabularies have several 100,000
_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def tied_to(head: TensorInfo, checkpoint: Checkpoint) -> TensorInfo | None:
    """The embedding that a checkpoint which does not store this head uses in its place, if it ties the two."""
    if not HEAD.search(head.name) or head.name in checkpoint.tensors or not ties(read_config(checkpoint)):
        return None
    found = [t for t in checkpoint.tensors.values() if EMBEDDING.search(t.name) and t.shape[1:] == head.shape[1:]]
    shared = [t for t in found if t.name.endswith("shared.weight")] or found
    return shared[0] if len(shared) == 1 else None


def vocabularies(base: Checkpoint, finetuned: Checkpoint) -> tuple[bytes, bytes, str] | None:
    """The files of both sides that say which token has which id, of one name, and their name.

    Raises:
        UserError: one is larger than any.
    """
    for name in _FILES:
        if name in base.side_files and name in finetuned.side_files:
            for side in (base, finetuned):
                folder = side.borrowed.get(name, side.folder)
                if folder.size(name) > _MOST_BYTES:
                    raise UserError(f"{side.role}: {folder.at(name)} is larger than any vocabulary")
            return base.read(name), finetuned.read(name), name
    return None


def token_ids(data: bytes, name: str) -> dict[str, int] | None:
    """Token → id of a tokenizer.json, vocab.json or vocab.txt; None if it is none."""
    try:
        if name == "vocab.txt":
            return {token: i for i, token in enumerate(data.decode("utf-8").splitlines())}
        loaded = parse(data, _MOST_PARTS)
        vocabulary = loaded if name == "vocab.json" else loaded["model"]["vocab"]
        if isinstance(vocabulary, list):  # of pairs of a token and its score
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = [] if name == "vocab.json" else loaded.get("added_tokens") or []
        ids = {**vocabulary, **{entry["content"]: entry["id"] for entry in added}}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return ids if all(isinstance(token, str) and type(i) is int for token, i in ids.items()) else None


def moved(base: dict[str, int], finetuned: dict[str, int]) -> list[str]:
    """base's tokens that have another id in finetuned, in the order of their ids."""
    return sorted((t for t, i in base.items() if finetuned.get(t, i) != i), key=base.__getitem__)
