"""The plan of a run, as data: paired tensors, groups that share a budget, shards of the output."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fapm.errors import plural
from fapm.formats.accounts import Account
from fapm.formats.checkpoint import Checkpoint
from fapm.formats.dtypes import is_weight
from fapm.formats.tensor import TensorInfo
from fapm.recipe import Recipe, format_bytes
from fapm.storage.address import open_store
from fapm.storage.store import Store

Operation = Literal["", "elements", "matrices", "merge"]


@dataclass(frozen=True, slots=True)
class PairedTensor:
    """One tensor of the output.

    Attributes:
        action: `prune`, or the side whose values are taken as they are.
        numel: elements of the output.
        common: elements that are pruned: all of them, or those of the rows that base has too.
        group: the group it competes in; empty if it is not pruned.
        parameter: the method's for this tensor: of a selection the density, a share of `common` that it adds to its
            group's budget; of a blend α; of a matrix method 1.
        scale: what is kept of the change is multiplied by it.
        operation: what a worker does with it, by the method's kind; empty if it passes through.
        folder: of a model of several folders the one in which it lies, with which its name then begins.
        source: number of the checkpoint that `finetuned` is of: 1 is the first fine-tuned one, 0 would be base.
        others: of a merge, what further checkpoints have of it, with their numbers.
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
    parameter: float = 0.0
    folder: str = ""
    operation: Operation = ""
    source: int = 1
    others: tuple[tuple[int, TensorInfo], ...] = ()
    scale: float = 1.0

    @property
    def stored_name(self) -> str:
        """Its name in its file."""
        return self.name[len(self.folder) + 1 :] if self.folder else self.name

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Of a tensor that is pruned as matrices how many they are, and their rows and columns."""
        *_, rows, columns = (1, *self.shape)
        rows = rows if len(self.shape) > 2 else self.common // columns  # of a vocabulary that has grown, base's
        return self.common // (rows * columns), rows, columns

    @property
    def full_rank(self) -> int:
        """Singular values of its matrices; 0 where it is not pruned as such."""
        count, rows, columns = self.matrices if self.operation == "matrices" else (0, 0, 0)
        return count * min(rows, columns)

    @property
    def sources(self) -> tuple[tuple[int, TensorInfo], ...]:
        """Stored tensors that have to be read for it, each with the number of its checkpoint: base's first."""
        sides = {"base": (0, self.base), "finetuned": (self.source, self.finetuned)}
        wanted = list(sides.values()) if self.action == "prune" else [sides[self.action]]
        found = [(number, info) for number, info in wanted if info is not None]
        assert len(found) == len(wanted)
        return (*found, *self.others)

    @property
    def read_bytes(self) -> int:
        return sum(info.nbytes for _, info in self.sources)


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
        lanes: of a merge the plans of its sources, cut into the same shards.
        source: of one of these its number, from 1, and `within`: the shards of the merge.
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
    lanes: tuple[Plan, ...] = ()
    source: int = 0
    within: tuple[Shard, ...] = ()

    def __repr__(self) -> str:
        return f"Plan({self._line()})"

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{html.escape(warning)}</li>" for warning in self.warnings)
        return f"<p>{html.escape(self._line())}</p>" + (f"<ul>{said}</ul>" if said else "")

    def _line(self) -> str:
        counts = plural(sum(1 for _ in self.tensors()), "tensor"), plural(len(self.shards), "shard")
        nbytes = f"{format_bytes(self.pair_bytes)} of inputs, {format_bytes(self.write_bytes)} to write"
        said = f"; {plural(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"{self.recipe.out}: {' in '.join(counts)}, {nbytes}{said}"

    @cached_property
    def out(self) -> Store:
        """The output folder, opened once; its path has to be settled."""
        return open_store(self.recipe.out)

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """base, finetuned, and of a merge finetuned-2 and so on."""
        further = {f"finetuned-{lane.source}": lane.finetuned for lane in self.lanes[1:]}
        return {"base": self.base, "finetuned": self.finetuned, **further}

    @property
    def operation(self) -> Operation:
        """What a worker does with the tensors that are pruned; they are all of one."""
        return next((t.operation for t in self.tensors() if t.operation), "")

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
