"""Adapters: which tensors of an output have a place in one."""

from __future__ import annotations

from dataclasses import replace

from fapm.errors import UserError, listed
from fapm.formats.accounts import Account
from fapm.formats.checkpoint import Checkpoint, read_config
from fapm.formats.names import EMBEDDING
from fapm.planning.plan import PairedTensor
from fapm.recipe import Recipe
from fapm.scoring.methods import METHODS

_TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "ctrl")
"""Types of models whose linear layers store (in, out): transformers' Conv1D."""


def for_adapter(
    recipe: Recipe,
    finetuned: Checkpoint,
    paired: list[PairedTensor],
    accounts: dict[str, Account],
    warnings: list[str],
) -> tuple[list[PairedTensor], dict[str, Account]]:
    """The matrices of linear layers, which become an adapter's modules, in base's dtype; of all else nothing is taken.

    Raises:
        UserError: the method keeps elements, which have no low rank; none is left; they lie the other way round.
    """
    if METHODS[recipe.method].kind != "matrix" or recipe.merged:
        names = [name for name, method in METHODS.items() if method.kind == "matrix"]
        raise UserError(f"--emit adapter: an adapter is a part of each matrix; take --method {' or '.join(names)}")
    kind = read_config(finetuned).get("model_type")
    if kind in _TURNED:
        raise UserError(
            f"--emit adapter: a model of type {kind} stores its layers the other way round, as PEFT's do not"
        )
    taken = [t for t in paired if _is_linear(t)]
    if not taken:
        raise UserError("--emit adapter: no tensor is the matrix of a linear layer that base and finetuned have alike")
    there = {t.name for t in taken}
    others = [t.name for t in paired if t.name not in there and t.action != "base"]
    if others:
        warnings.append(
            f"{len(others)} tensor(s) are no matrices of linear layers, and have no place in an adapter: they stay "
            f"base's: {listed(others)}"
        )
    reasons = {**accounts["finetuned"].left_out, **dict.fromkeys(others, "an adapter has no place for it")}
    sides = {
        "base": _account(accounts["base"], len(taken), "left as it is", {}),
        "finetuned": _account(accounts["finetuned"], len(taken), "left out", reasons),
    }
    return [_in_base_s(t) for t in taken], sides


def _account(whole: Account, taken: int, rest: str, reasons: dict[str, str]) -> Account:
    left = sum(whole.counts.values()) - taken
    return Account({"pruned": taken, **({rest: left} if left else {})}, reasons)


def _is_linear(tensor: PairedTensor) -> bool:
    alike = tensor.base is not None and tensor.base.name == tensor.name and tensor.base.shape == tensor.shape
    is_layer = tensor.name.endswith(".weight") and not EMBEDDING.search(tensor.name)
    return tensor.operation == "matrices" and len(tensor.shape) == 2 and alike and is_layer


def _in_base_s(tensor: PairedTensor) -> PairedTensor:
    assert tensor.base
    return replace(tensor, dtype=tensor.base.dtype, nbytes=tensor.base.nbytes)
