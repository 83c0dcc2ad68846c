"""Matrices: whether a worker's memory is enough for the largest one."""

from __future__ import annotations

from collections.abc import Iterable

from fapm.errors import UserError
from fapm.planning.plan import PairedTensor
from fapm.recipe import LEAST_MEMORY, Recipe, binary, format_bytes
from fapm.scoring.matrices import bytes_of


def matrix_bytes(tensors: Iterable[PairedTensor]) -> int:
    """Bytes that a worker needs for the largest of some tensors beside what it reads; 0 where none is a matrix."""
    return max((bytes_of(t.matrices[1:]) for t in tensors if t.operation == "matrices"), default=0)


def refuse_large_matrices(recipe: Recipe, tensors: list[PairedTensor]) -> None:
    """Find out now that a matrix is too large for a worker.

    Raises:
        UserError: it is.
    """
    needed = matrix_bytes(tensors)
    slots = recipe.cpus_per_worker or 1
    if not needed or needed + LEAST_MEMORY <= recipe.memory // slots:
        return
    largest = max((t for t in tensors if t.operation == "matrices"), key=lambda t: bytes_of(t.matrices[1:]))
    enough = -(-slots * (needed + LEAST_MEMORY) // (64 << 20)) * (64 << 20)
    each = f" in each of its {slots} slots" if slots > 1 else ""
    raise UserError(
        f"{recipe.method}: {largest.name} {list(largest.shape)} takes {format_bytes(needed)} of a worker{each}, more "
        f"than --memory {binary(recipe.memory)} has room for; give --memory {binary(enough)}, or "
        f"--rule '{largest.name}=finetuned'"
    )
