"""Verification: a second reading of a finished output against its inputs, by other code than the one that wrote it.

What is taken from the run: its recipe, and of every group the threshold's key and the tie quota. All else is done
again, in numpy: checksums, means, scores, masks. An output that is the mask of a threshold which holds exactly k
elements is the exact top k: whatever was dropped scores no higher than what was kept.

Each tensor is read twice, a chunk at a time (for its mean, then to be compared), so memory does not depend on its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash

from fapm import fields
from fapm.checking.comparing import Budget, Comparison, Progress
from fapm.checking.consumers import read_as_consumers_do
from fapm.checking.folder import check_folder, refused_by_transformers
from fapm.checking.merged import CheckedLane, MergedComparison
from fapm.errors import UserError
from fapm.formats.adapter import WEIGHTS
from fapm.formats.checkpoint import Checkpoint, open_checkpoint
from fapm.formats.delta import DELTA, check_base, patched, read_delta, stored_in
from fapm.formats.header import read_header
from fapm.formats.tensor import Part, Sides, TensorInfo
from fapm.layout import INDEX, TABLE, table_name
from fapm.manifest.read import load_manifest, read_table, recipe_of
from fapm.planning.make import make_plan
from fapm.planning.plan import Plan
from fapm.scoring.methods import METHODS
from fapm.scoring.threshold import MAX_KEY, score_of
from fapm.storage.address import input_address, open_store
from fapm.storage.records import parse
from fapm.storage.store import Reader, Store, differing


def verify(
    out: str,
    base: str | None = None,
    finetuned: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    load: bool = False,
) -> list[str]:
    """Check a finished prune: its files, every element of every tensor, and what each group keeps.

    Args:
        out: the output folder.
        base, finetuned: where the inputs are now, if not where the run found them; of a merge all of its sources.
        progress: told bytes of the output as they are checked; they add up to the bytes of its tensors.
        load: ask transformers too whether names and shapes are those of the model.

    Returns:
        What is wrong, a sentence each that names the shard, tensor or group; empty if all is right.

    Raises:
        UserError: there is no finished run, or its inputs are gone or are other files by now.
    """
    manifest = load_manifest(out)
    plan = _plan(manifest, out, base, [finetuned] if isinstance(finetuned, str) else finetuned or [])
    folder = open_store(out)
    try:
        records = manifest["shards"]
        if plan.recipe.emit == "delta":
            tensors, unreadable, problems = _check_delta(plan, folder, records)
        elif plan.recipe.emit == "adapter":
            tensors, unreadable, problems = _check_adapter(plan, folder, manifest.get("adapter"))
        else:
            tensors, unreadable, problems = _check_files(folder, records)
            listed = {name: info for name, info in tensors.items() if "/" not in info.file}
            problems += _check_index(folder, listed, unreadable, sum("/" not in record["name"] for record in records))
        if plan.recipe.emit in ("checkpoint", "both"):
            problems += check_folder(folder, tensors, plan.base.tensors)
            problems += refused_by_transformers(folder) if load else []
        if plan.recipe.emit == "both":
            found, _, more = _check_delta(plan, folder, [record["delta"] for record in records])
            problems += more + _differing(plan, folder, tensors, found)
        rows = _read_rows(out, problems)
        budgets = _budgets(plan, rows, problems)
        lanes = [_checked(lane, _read_rows(out, problems, lane.source), problems) for lane in plan.lanes]
        problems += _check_names(plan, tensors, unreadable, rows, budgets)
        for lane in lanes:
            for tensor in lane.plan.tensors():
                if tensor.group and tensor.name not in tensors:
                    lane.budgets[tensor.group].ties_left = None
        for tensor in sorted(plan.tensors(), key=lambda t: t.name):
            if tensor.name in tensors:
                row, there, tell = rows.get(tensor.name, {}), tensors[tensor.name], progress or (lambda nbytes: None)
                whose = plan.lanes[tensor.source - 1] if plan.lanes else plan  # where what it is taken from lies
                compared = Comparison(whose, folder, tensor, there, tell)
                if tensor.operation == "merge":
                    problems += MergedComparison(plan, folder, tensor, there, lanes, tell).problems(row)
                elif tensor.operation == "matrices":
                    problems += compared.projected(row)
                elif tensor.operation:
                    problems += compared.pruned(row, budgets)
                else:
                    problems += compared.passed_through()
        problems += _check_counts(plan, budgets)
        for lane in lanes:
            problems += [f"source {lane.plan.source}: {one}" for one in _check_counts(lane.plan, lane.budgets)]
    finally:
        for opened in (folder, *(side.folder for side in plan.inputs.values())):
            opened.close()
    return problems


def _plan(manifest: dict[str, Any], out: str, base: str | None, finetuned: Sequence[str]) -> Plan:
    """The plan of the run, made again from its recipe and the headers of its inputs.

    Raises:
        UserError: an input is gone or is not the one that was pruned.
    """
    then = [source["path"] for source in manifest.get("sources", ())] or [manifest["paths"]["finetuned"]]
    if finetuned and len(finetuned) != len(then):
        raise UserError(f"--finetuned: give all {len(then)} of this merge, in their order ({len(finetuned)} are given)")
    given = [("base", base or manifest["paths"]["base"]), *(("finetuned", path) for path in finetuned or then)]
    paths = [input_address(path) for _, path in given]
    for (role, _), path in zip(given, paths, strict=True):
        if not open_store(path).exists():
            raise UserError(f"the {role} checkpoint of this run, {path}, is not there; say where it is with --{role}")
    first, *others = map(fields.literal, paths)
    plan = make_plan(recipe_of(manifest, first, others, fields.literal(out)))
    for role, checkpoint in plan.inputs.items():
        _check_identity(checkpoint, manifest["inputs"][role], bool(base if role == "base" else finetuned))
    return plan


def _check_identity(checkpoint: Checkpoint, then: dict[str, dict[str, Any]], moved: bool) -> None:
    """A copy has another time of change, which says nothing; in the same place it says that the file was replaced."""
    for file in sorted(then.keys() | checkpoint.identity.keys()):
        old, new = then.get(file), checkpoint.identity.get(file)
        if (
            not (old and new)
            or any(old.get(key) != new[key] for key in ("size", "header"))
            or (not moved and differing(old, new))
        ):
            raise UserError(
                f"{checkpoint.role}: {checkpoint.folder.at(file)} is not the file that was pruned; give the folder "
                f"of the one that was with --{checkpoint.role}, or prune again"
            )


# Files.


def _check_delta(
    plan: Plan, folder: Store, records: list[dict[str, Any]]
) -> tuple[dict[str, TensorInfo], set[str], list[str]]:
    """The same of a sparse task vector: what base becomes with it."""
    problems = []
    for record in records:
        name = record["name"]
        if not folder.has(name):
            problems.append(f"{name}: missing")
            continue
        problems += _wrong_checksum(folder.reader(name), record)
    if problems:
        return {}, {record["name"] for record in records}, problems
    try:
        said = read_delta(folder, folder.address)
        stored = stored_in(folder, said)
        check_base(said, plan.base.identity, plan.base.folder.address, folder.address)
        tensors = patched(said, stored, plan.base.tensors, folder, folder.address)
    except UserError as error:
        return {}, {record["name"] for record in records}, [str(error)]
    sides = Sides(plan.base.folder, folder)
    for name, info in tensors.items():
        digest, wanted = xxhash.xxh3_128(), said["tensors"][name]["xxh3_128"]
        for start in range(0, info.nbytes, _AT_ONCE):
            digest.update(sides.take(Part("finetuned", info), start, min(info.nbytes, start + _AT_ONCE)).data)
        if digest.hexdigest() != wanted:
            problems.append(f"tensor {name!r}: its xxh3-128 is {digest.hexdigest()}, and {DELTA} says {wanted}")
    return tensors, set(), problems


def _check_adapter(
    plan: Plan, folder: Store, record: dict[str, Any] | None
) -> tuple[dict[str, TensorInfo], set[str], list[str]]:
    """The same of an adapter: what base becomes with it, as whoever reads adapters forms it."""
    names = {t.name for t in plan.tensors()}
    if not record or not folder.has(record["name"]):
        return {}, {shard.name for shard in plan.shards}, [f"{WEIGHTS}: missing"]
    problems = _wrong_checksum(folder.reader(record["name"]), record)
    try:
        opened = open_checkpoint(folder.address, "finetuned", plan.base)
    except UserError as error:
        return {}, {shard.name for shard in plan.shards}, [*problems, str(error)]
    return {name: info for name, info in opened.tensors.items() if name in names}, set(), problems


_AT_ONCE = 8 << 20  # bytes; a multiple of every width


def _differing(plan: Plan, folder: Store, tensors: dict[str, TensorInfo], of_delta: dict[str, TensorInfo]) -> list[str]:
    """Where a checkpoint and the sparse task vector beside it are not the same."""
    problems, sides = [], Sides(plan.base.folder, folder)
    for name, info in tensors.items():
        other = of_delta.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            problems.append(f"tensor {name!r}: another one, or none, in the sparse task vector")
            continue
        for start in range(0, info.nbytes, _AT_ONCE):
            end = min(info.nbytes, start + _AT_ONCE)
            one, two = (sides.take(Part("finetuned", which), start, end) for which in (info, other))
            if not np.array_equal(one, two):
                problems.append(f"tensor {name!r}: the sparse task vector does not give what is stored")
                break
    return problems


def _wrong_checksum(reader: Reader, record: dict[str, Any]) -> list[str]:
    """What is wrong with a file's xxh3-128, if it is not the one that was recorded."""
    digest = xxhash.xxh3_128()
    for offset in range(0, reader.size, _AT_ONCE):
        digest.update(reader.read(offset, min(_AT_ONCE, reader.size - offset)))
    found, wanted = digest.hexdigest(), record["xxh3_128"]
    return [] if found == wanted else [f"{record['name']}: its xxh3-128 is {found} and should be {wanted}"]


def _check_files(folder: Store, records: list[dict[str, Any]]) -> tuple[dict[str, TensorInfo], set[str], list[str]]:
    """Sizes, checksums and headers of the shards; returns the tensors, the shards that cannot be read, and problems."""
    tensors: dict[str, TensorInfo] = {}
    unreadable: set[str] = set()
    problems: list[str] = []
    for record in records:
        name = record["name"]
        if not folder.has(name):
            problems.append(f"{name}: missing")
            unreadable.add(name)
            continue
        reader = folder.reader(name)
        if reader.size != record["nbytes"]:
            problems.append(f"{name}: has {reader.size} bytes and should have {record['nbytes']}")
        problems += _wrong_checksum(reader, record)
        try:
            found = read_header(reader, name, name).tensors
        except UserError as error:
            problems.append(str(error))
            unreadable.add(name)
            continue
        problems += read_as_consumers_do(folder, name, found)
        inside = name.rpartition("/")[0]
        for tensor in found:
            tensor = replace(tensor, name=f"{inside}/{tensor.name}") if inside else tensor
            if tensor.name in tensors:
                problems.append(f"tensor {tensor.name!r}: in both {tensors[tensor.name].file} and {name}")
            tensors[tensor.name] = tensor
    known = {record["name"] for record in records} | {r["delta"]["name"] for r in records if "delta" in r}
    for name in sorted(folder.files()):
        if name.endswith(".safetensors") and "/" not in name and name not in known:
            problems.append(f"{name}: not a shard of this run, and would be taken for one")
    return tensors, unreadable, problems


def _check_index(folder: Store, tensors: dict[str, TensorInfo], unreadable: set[str], shards: int) -> list[str]:
    """Whether the index says what the headers of readable shards say. One shard needs none."""
    if not folder.has(INDEX):
        return [f"{INDEX}: missing"] if shards > 1 else []
    try:
        index = parse(folder.read(INDEX))
        weight_map, total = dict(index["weight_map"]), index["metadata"]["total_size"]
    except (ValueError, KeyError, TypeError):
        return [f"{INDEX}: not an index with a weight_map and a total_size"]
    problems = []
    wrong = []
    for name in sorted(weight_map.keys() | tensors.keys()):
        said, there = weight_map.get(name), tensors[name].file if name in tensors else None
        if said != there and said not in unreadable:
            wrong.append(f"{name!r} (the index says {said or 'nothing'}, it is in {there or 'none of the shards'})")
    if wrong:
        problems.append(f"{INDEX}: disagrees with the headers on {len(wrong)} tensor(s): {'; '.join(wrong[:3])}")
    size = sum(t.nbytes for t in tensors.values())
    if total != size and not unreadable:
        problems.append(f"{INDEX}: says {total} bytes in all, and the tensors have {size}")
    return problems


def _check_names(
    plan: Plan,
    tensors: dict[str, TensorInfo],
    unreadable: set[str],
    rows: dict[str, dict[str, Any]],
    budgets: dict[str, Budget],
) -> list[str]:
    """Whether the tensors are those of the plan. Takes those that cannot be compared out of `tensors`.

    Their groups are then incomplete: what the ties among them would have taken is not known.
    """
    problems = []
    wanted = {t.name: t for t in plan.tensors()}
    for name in sorted(tensors.keys() - wanted.keys()):
        problems.append(f"tensor {name!r}: in {tensors.pop(name).file}, but not in the inputs")
    for name, tensor in wanted.items():
        there = tensors.get(name)
        if there and (there.dtype, there.shape) == (tensor.dtype, tensor.shape):
            continue
        if there:
            problems.append(
                f"tensor {name!r}: {there.dtype} {list(there.shape)} in {there.file}, "
                f"and should be {tensor.dtype} {list(tensor.shape)}"
            )
            del tensors[name]
        elif rows.get(name, {}).get("shard") not in unreadable:
            problems.append(f"tensor {name!r}: missing from the output")
        if tensor.group:
            budgets[tensor.group].ties_left = None
    return problems


# What the run recorded of each group.


def _read_rows(out: str, problems: list[str], source: int = 0) -> dict[str, dict[str, Any]]:
    """The table's rows by tensor, or those of a merge's source; none if it cannot be read."""
    try:
        return {row["name"]: row for row in read_table(out, source)}
    except UserError:
        problems.append(f"{table_name(source)}: missing or damaged, so what each group keeps cannot be checked")
        return {}


def _budgets(plan: Plan, rows: dict[str, dict[str, Any]], problems: list[str]) -> dict[str, Budget]:
    """Each group's k, and its threshold put together from the rows of its tensors.

    The key is the same in all of them; `ties` is the part of the quota that the row's shard has handed out.
    """
    numel: dict[str, dict[float, int]] = {}
    recorded: dict[str, list[tuple[Any, Any, Any]]] = {}
    for tensor in plan.tensors():
        if tensor.group:
            competing = numel.setdefault(tensor.group, {})
            competing[tensor.parameter] = competing.get(tensor.parameter, 0) + tensor.common
            if tensor.common:
                row = rows.get(tensor.name, {})
                entry = (row.get("shard"), row.get("threshold_key"), row.get("ties"))
                recorded.setdefault(tensor.group, []).append(entry)
    budgets = {}
    for name, counts in numel.items():
        wanted = 0.0
        for density, count in sorted(counts.items()):
            wanted += density * count
        budgets[name] = Budget(int(wanted))
    for name, entries in recorded.items():
        keys = {key for _, key, _ in entries}
        parts = {(shard, ties) for shard, _, ties in entries}
        one_key = len(keys) == 1 and all(key is not None and 0 <= key <= MAX_KEY for key in keys)
        if one_key and len(parts) == len({shard for shard, _ in parts}) and all(ties is not None for _, ties in parts):
            budgets[name].key = keys.pop()
            budgets[name].ties = budgets[name].ties_left = sum(ties for _, ties in parts)
        elif rows:
            problems.append(f"group {name!r}: {TABLE} does not record one threshold for all of its tensors")
    return budgets


def _checked(lane: Plan, rows: dict[str, dict[str, Any]], problems: list[str]) -> CheckedLane:
    return CheckedLane(lane, {t.name: t for t in lane.tensors()}, _budgets(lane, rows, problems), rows)


def _check_counts(plan: Plan, budgets: dict[str, Budget]) -> list[str]:
    """Whether the threshold of each group holds exactly k elements."""
    problems = []
    for name, budget in budgets.items():
        if not METHODS[plan.recipe.method].has_budget or budget.ties_left is None:
            continue
        holds = budget.above + budget.ties - budget.ties_left
        if holds != budget.k:
            problems.append(
                f"group {name!r}: {holds} elements reach its threshold {score_of(budget.key):.9g} "
                f"({budget.above} above it), and exactly {budget.k} should be kept"
            )
    return problems
