"""Facts of a plan, a checkpoint or a run: plain dictionaries, sizes in bytes, times in seconds, shares from 0 to 1.

They are what `--json` prints; `reporting.text` lays them out for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fapm.errors import listed
from fapm.formats.checkpoint import Checkpoint
from fapm.planning.plan import PairedTensor, Plan
from fapm.planning.shards import group_of, pattern_of
from fapm.pool import cores
from fapm.reporting.advice import advise
from fapm.scoring.methods import PARAMETERS
from fapm.storage.address import scheme_of

if TYPE_CHECKING:
    from fapm.run import Result


_EXTREMES = 5  # tensors at each end of the kept share


def named(names: Sequence[str]) -> str:
    """How many names there are, and the first of them."""
    return f"{len(names)}: {listed(names)}"


# A run.


def run_facts(manifest: dict[str, Any], out: str) -> dict[str, Any]:
    """Facts of a finished run, from its manifest."""
    recipe = manifest["recipe"]
    return {
        "out": out,
        "base": manifest["paths"]["base"],
        "finetuned": manifest["paths"]["finetuned"],
        **{
            choice: recipe[choice]
            for choice in ("method", *PARAMETERS, "scope", "layer_scale", "rules")
            if choice in recipe
        },
        **_merge_facts(manifest),
        "shards": len(manifest["shards"]),
        "totals": manifest["totals"],
        "finished": manifest["finished"],
        "run_seconds": manifest["seconds"],
        "run_resumed": manifest["resumed"],
        "workers": manifest.get("workers", 0),
        "lost_workers": manifest.get("lost_workers", {}),
        "left_out": manifest["left_out"],
        "accounts": manifest.get("accounts", {}),
        "added": manifest["added"],
        "oddities": manifest["oddities"],
    }


def _merge_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """Of a merge how its sources were combined, and what was kept of each."""
    if not manifest.get("sources"):
        return {}
    recipe = manifest["recipe"]
    weights = [source.get("weight", 1.0) for source in recipe["merged"]]
    sources = [{**source, "weight": weight} for source, weight in zip(manifest["sources"], weights, strict=True)]
    return {"combine": recipe.get("combine", "sum"), "scaling": recipe.get("scaling", 1.0), "sources": sources}


def prune_facts(result: Result) -> dict[str, Any]:
    """Facts of a prune that has just ended. `run_seconds` are of the run that finished, `seconds` of this command.

    `read_bytes_per_second` is None where shards of an earlier try are among the bytes.
    """
    facts = run_facts(result.manifest, result.plan.recipe.out)
    rate = None if result.resumed else facts["totals"]["read_bytes"] / result.seconds
    now = {"resumed": result.resumed, "nothing_to_do": result.nothing_to_do, "seconds": result.seconds}
    return facts | now | {"read_bytes_per_second": rate}


def extremes(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The tensors that keep the lowest and the highest share of their ‖Δ‖², of the `changed_tensors`.

    Args:
        rows: the table of a run.
    """
    told = (r for r in rows if r["kept_share"] is not None and r["norm_delta"] is not None)
    ranked = sorted(told, key=lambda r: (r["kept_share"], r["name"]))
    shown = ("name", "shape", "kept_share", "norm_delta", "norm_base")
    short = [{key: row[key] for key in shown} for row in ranked]
    end = min(_EXTREMES, len(short) // 2)
    highest = short[end:][-_EXTREMES:][::-1]
    return {"lowest": short[:end], "highest": highest, "changed_tensors": len(short)}


# A plan.


def plan_facts(plan: Plan, state: str, todo: int, workers: int, rate: float | None = None) -> dict[str, Any]:
    """Facts of a prune that has not begun.

    Args:
        state: of the output folder: `new`, `unfinished` or `finished`.
        todo: shards that are not there yet.
        workers: how many this machine would run.
        rate: bytes a second that the storage of the inputs gives, if that is known.
    """
    from fapm.selection import to_measure

    twice = to_measure(plan)
    elements = sum(tensor.numel for tensor in plan.tensors())
    groups = [group for of in plan.lanes or (plan,) for group in of.groups.values()]
    kept, weights = sum(g.k for g in groups), plan.weights
    kinds: dict[str, list[str]] = {"pruned": [], "grown": [], "ruled": [], "passed_through": [], "added": []}
    for tensor in plan.tensors():
        kinds[_kind(plan, tensor)].append(tensor.name)
    return {
        "base": plan.recipe.base,
        "finetuned": plan.recipe.finetuned,
        "out": plan.recipe.out,
        "state": state,
        "recipe": plan.recipe.decides(),
        "tensors": sum(1 for _ in plan.tensors()),
        **kinds | {"pruned": len(kinds["pruned"])},
        "densities": densities((t.name, t.parameter) for t in plan.tensors() if t.operation == "elements"),
        "left_out": list(plan.left_out),
        "accounts": {side: asdict(found) for side, found in plan.accounts.items()},
        "shards": len(plan.shards),
        "shards_to_do": todo,
        "largest_shard_bytes": max(s.nbytes for s in plan.shards),
        "groups": len(groups),
        "wide_groups": sum(g.cross_shard for g in groups),
        "weights": weights.numel,
        "unpaired": weights.unpaired,
        "density_of_all": (kept + weights.taken) / weights.numel if weights.numel and not plan.lanes else None,
        "competing_elements": sum(g.numel for g in groups),
        "kept_elements": kept,
        "inputs": {role: _where(side) for role, side in plan.inputs.items()},
        "upload_bytes": plan.write_bytes if scheme_of(plan.recipe.out) else 0,
        "read_bytes": plan.pair_bytes,
        "read_twice_bytes": twice,
        "write_bytes": plan.write_bytes,
        **_matrices(plan, workers),
        "memory_bytes_per_worker": plan.recipe.memory,
        "workers": workers,
        "workers_worth_having": len(plan.shards),
        "storage": advise(rate, elements, plan.pair_bytes, twice, cores()) if rate else None,
        "oddities": list(plan.warnings),
    }


def _matrices(plan: Plan, workers: int) -> dict[str, Any]:
    """How many matrices there are, and how long they will take here, where the method works on such."""
    found = [t.matrices for t in plan.tensors() if t.operation == "matrices"]
    count = sum(number for number, *_ in found)
    if not count:
        return {"matrices": 0, "matrix_seconds": 0.0}
    from fapm.scoring.matrices import flops_of, flops_per_second

    flops = sum(number * flops_of((rows, columns)) for number, rows, columns in found)
    return {"matrices": count, "matrix_seconds": flops / flops_per_second() / workers}


def _where(side: Checkpoint) -> dict[str, Any]:
    """Where an input is, and how many bytes of its weights come over a network."""
    folder, far = side.folder, bool(scheme_of(side.folder.address))
    here = [name for name in side.identity if not far or folder.is_here(name)]
    there = sum(of["size"] for name, of in side.identity.items() if name not in here)
    return {"address": folder.address, "download_bytes": there}


def densities(pruned: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The density of each pruned tensor by its name, if there are several densities, else nothing."""
    found = dict(pruned)
    return found if len(set(found.values())) > 1 else {}


def _kind(plan: Plan, tensor: PairedTensor) -> str:
    if tensor.action == "prune":
        return "pruned" if tensor.common == tensor.numel else "grown"
    if tensor.base is None:
        return "added"
    return "ruled" if plan.recipe.action(tensor.name) in ("base", "finetuned") else "passed_through"


# A checkpoint.


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of a checkpoint. Tensors of one dtype and shape whose names differ in numbers only are one pattern."""
    patterns: dict[tuple[str, str, tuple[int, ...]], dict[str, Any]] = {}
    dtypes: dict[str, dict[str, int]] = {}
    layers: dict[str, set[str]] = {}
    files: dict[tuple[str, str, tuple[int, ...]], set[str]] = {}
    for tensor in sorted(checkpoint.tensors.values(), key=lambda t: t.name):
        key = (pattern_of(tensor.name), tensor.dtype, tensor.shape)
        empty = {"tensors": 0, "parameters": 0, "bytes": 0}
        for sums in (patterns.setdefault(key, dict(empty)), dtypes.setdefault(tensor.dtype, dict(empty))):
            sums["tensors"] += 1
            sums["parameters"] += tensor.numel
            sums["bytes"] += tensor.nbytes
        files.setdefault(key, set()).add(tensor.file)
        layer = group_of(tensor.name, "layer")
        if layer != tensor.name:
            layers.setdefault(layer.rpartition(".")[0], set()).add(layer)
    hollow = sorted(t.name for t in checkpoint.tensors.values() if not t.numel)
    return {
        "path": checkpoint.folder.address,
        "tensors": len(checkpoint.tensors),
        "parameters": sum(t.numel for t in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "files": {name: identity["size"] for name, identity in checkpoint.identity.items()},
        "layers": {stack: len(found) for stack, found in layers.items()},
        "dtypes": dtypes,
        "patterns": [
            {"name": name, "dtype": dtype, "shape": list(shape), **sums, "files": len(files[name, dtype, shape])}
            for (name, dtype, shape), sums in patterns.items()
        ],
        "side_files": list(checkpoint.side_files),
        "oddities": [*checkpoint.warnings, *([f"tensors without elements: {named(hollow)}"] if hollow else [])],
    }
