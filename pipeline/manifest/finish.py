"""The end of a run: all that makes its shards a checkpoint, and the manifest last."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from fapm.card import model_card
from fapm.errors import UserError
from fapm.formats.configuration import followed
from fapm.formats.delta import DELTA, FORMAT, delta_name
from fapm.formats.side_files import CARD, is_code, without_code
from fapm.layout import (
    ARRAYS,
    INDEX,
    LOCKS,
    MANIFEST,
    RECIPE,
    TABLE,
    TEMPORARY,
    WORK,
    delta_facts_name,
    is_of_first,
    record_name,
    rows_name,
    table_name,
)
from fapm.manifest.adapter import write_adapter
from fapm.manifest.read import read_run_file, read_table
from fapm.manifest.state import State, identity
from fapm.planning.plan import Plan, Shard
from fapm.planning.shards import index_json
from fapm.planning.vocabulary import is_untied, vocabulary_of
from fapm.recipe import OF_A_SOURCE, PATHS, Recipe
from fapm.schemas import ShardRecord
from fapm.scoring.methods import METHODS
from fapm.shard.table import MEASURED, from_parquet, to_parquet, totals
from fapm.shard.task import saved_read_bytes
from fapm.storage.address import scheme_of, split
from fapm.storage.records import parse
from fapm.storage.store import Store, differing, overlapped
from fapm.version import version


def check_inputs(plan: Plan) -> None:
    """Whether the inputs are still the files of which the plan was made.

    Raises:
        UserError: one has changed while it was read.
    """
    for side in plan.inputs.values():
        now = side.folder.files()
        for file, then in side.identity.items():
            what = differing(then, {"size": now[file].size, **now[file].version}) if file in now else ["gone"]
            if what:
                raise UserError(
                    f"{side.role}: {side.folder.at(file)} has changed while it was read, so the output may be of both; "
                    "let it come to rest, and start again with --overwrite"
                )


def _check_kept(plan: Plan, measured: np.ndarray) -> None:
    """Whether each group keeps as many elements as it should.

    Raises:
        UserError: one does not, as where an input was changed between counting and writing.
    """
    kept: dict[str, int] = {}
    for tensor, row in zip(plan.tensors(), measured, strict=True):
        if tensor.group:
            kept[tensor.group] = kept.get(tensor.group, 0) + int(row["kept"])
    wrong = [group for group in kept if kept[group] != plan.groups[group].k]
    if METHODS[plan.recipe.method].has_budget and wrong:
        group = wrong[0]
        raise UserError(
            f"{group!r} keeps {kept[group]} elements, and should keep {plan.groups[group].k}: an input has changed "
            "between counting and writing; let it come to rest, and start again with --overwrite"
        )


def _check_libraries(records: list[dict[str, Any]]) -> None:
    """Whether all shards were made with one linear algebra.

    Raises:
        UserError: they were not, as where two workers of different processors began at once.
    """
    used = sorted({record["library"] for record in records if record.get("library")})
    if len(used) > 1:
        raise UserError(
            f"the shards were made with different linear algebra ({'; '.join(used)}), whose bits differ; start again "
            "with --overwrite, on Ray with a --label for nodes of one kind"
        )


def finish(plan: Plan, facts: dict[str, Any], out: Store) -> dict[str, Any]:
    """Write all that makes the shards a checkpoint, the manifest last; returns the manifest.

    Raises:
        UserError: an input has changed meanwhile.
    """
    check_inputs(plan)
    names, at_once = [record_name(s.index) for s in plan.shards], out.reads_at_once
    records = list(overlapped(functools.partial(read_run_file, out, model=ShardRecord), names, at_once))
    measured = [
        np.concatenate(list(overlapped(functools.partial(_measured, out, of.source), of.shards, at_once)))
        for of in (plan, *plan.lanes)
    ]
    for of, rows in zip((plan, *plan.lanes), measured, strict=True):
        _check_kept(of, rows)
    _check_libraries(records)
    out.write(RECIPE, plan.recipe.literal().to_yaml().encode())
    table, *of_sources = (
        to_parquet(of.shards, of.groups, rows) for of, rows in zip((plan, *plan.lanes), measured, strict=True)
    )
    for lane, made in zip(plan.lanes, of_sources, strict=True):
        out.write(table_name(lane.source), made)
    out.write(TABLE, table)
    with_delta = plan.recipe.emit in ("delta", "both")
    if with_delta:
        out.write(DELTA, _delta(plan, records, out))
    adapter = {"adapter": write_adapter(plan, out)} if plan.recipe.emit == "adapter" else {}
    for name, data in _beside(plan, lambda: from_parquet(table)):
        out.write(name, data())
    manifest = {
        "fapm": version(),
        **identity(plan),
        "paths": _paths(plan.recipe),
        "paths_given": _paths(plan.given),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shards": records,
        "totals": {
            **totals(list(plan.tensors()), measured[0]),
            "read_bytes": sum(r["read_bytes"] for r in records) + _read_to_measure(out),
            "elements": sum(t.numel for t in plan.tensors()),
            "delta_bytes": sum(r.get("delta", r)["nbytes"] for r in records) if with_delta else 0,
            "written_bytes": sum(r["nbytes"] + r.get("delta", {"nbytes": 0})["nbytes"] for r in records),
        },
        **(
            {"sources": [_source(lane, rows) for lane, rows in zip(plan.lanes, measured[1:], strict=True)]}
            if plan.lanes
            else {}
        ),
        **adapter,
        "left_out": list(plan.left_out),
        "added": list(plan.added),
        "accounts": {side: asdict(found) for side, found in plan.accounts.items()},
        "oddities": list(plan.warnings),
        **facts,
    }
    out.write(MANIFEST, json.dumps(manifest, indent=1).encode())
    tidy(plan, out)
    return manifest


def _source(lane: Plan, measured: np.ndarray) -> dict[str, Any]:
    """What is said of a merge's source."""
    return {
        "path": lane.recipe.finetuned,
        **totals(list(lane.tensors()), measured),
        **{name: getattr(lane.recipe, name) for name in OF_A_SOURCE},
    }


def _measured(out: Store, source: int, shard: Shard) -> np.ndarray:
    """Measured rows of a shard's tensors, (t,) MEASURED."""
    name, nbytes = rows_name(shard.index, source), len(shard.tensors) * MEASURED.itemsize
    if out.size(name) != nbytes:
        raise UserError(f"{out.at(name)} is damaged; start again with --overwrite")
    return np.frombuffer(out.read(name), MEASURED)


def _delta(plan: Plan, records: list[dict[str, Any]], out: Store) -> bytes:
    """delta.json."""
    facts = overlapped(out.read, [delta_facts_name(s.index) for s in plan.shards], out.reads_at_once)
    made = [record.get("delta", record) for record in records]
    said = {
        "format": FORMAT,
        "fapm": version(),
        "base": {
            "address": plan.base.folder.address if scheme_of(plan.base.folder.address) else split(plan.recipe.base)[1],
            "files": {file: {k: of[k] for k in ("size", "header")} for file, of in plan.base.identity.items()},
        },
        "files": {record["name"]: {k: record[k] for k in ("nbytes", "xxh3_128")} for record in made},
        "tensors": {name: tensor for data in facts for name, tensor in json.loads(data).items()},
    }
    return json.dumps(said, indent=1).encode()


def _paths(recipe: Recipe) -> dict[str, str]:
    return {side: getattr(recipe, side) for side in PATHS}


def _beside(plan: Plan, rows: Callable[[], list[dict[str, Any]]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Files that make shards a checkpoint, in the order in which they appear: the index and the configuration last.

    Args:
        rows: those of the run's table.
    """
    for name in plan.finetuned.side_files:
        if name != "config.json" and not (is_code(name) and not plan.recipe.allow_code):
            yield name, functools.partial(_side_file, plan, name)
    yield CARD, lambda: model_card(plan, rows()).encode()
    if sum("/" not in s.name for s in plan.shards) > 1 and plan.recipe.emit in ("checkpoint", "both"):
        yield INDEX, lambda: json.dumps(index_json(plan.shards), indent=2).encode()
    if "config.json" in plan.finetuned.side_files and plan.recipe.emit != "adapter":
        yield "config.json", lambda: _config(plan)


def _side_file(plan: Plan, name: str) -> bytes:
    """finetuned's; without the names of classes that transformers would run, unless code is allowed."""
    data = plan.finetuned.read(name)
    return data if plan.recipe.allow_code else without_code(name, data)


def is_tidy(plan: Plan) -> bool:
    """Whether a finished run has all that lies beside its shards, and nothing that it has no use for."""
    out = plan.out
    useless = any(out.has_folder(name) for name in (WORK, TEMPORARY, LOCKS))
    return all(out.has(name) for name, _ in _beside(plan, list)) and not useless


def tidy(plan: Plan, out: Store) -> None:
    """Make a finished run so."""
    for name, data in _beside(plan, lambda: read_table(plan.recipe.out)):
        if not out.has(name):
            out.write(name, data())
    out.remove_folder(WORK)


def replaceable_bytes(plan: Plan, state: State) -> int:
    """Bytes in the output folder that this run will not have to find room for: finished shards, and what it removes."""
    out = plan.out
    if state == "unfinished":
        shards = {name for s in plan.shards for name in (s.name, delta_name(s.name))}
        return sum(f.size for name, f in out.files().items() if name in shards or name.startswith(TEMPORARY))
    return sum(f.size for name, f in out.files().items() if name.startswith("fapm/") or name.endswith(".safetensors"))


def _read_to_measure(out: Store) -> int:
    names = [name for name in out.files(WORK) if name.endswith(ARRAYS) and is_of_first(name)]
    return sum(overlapped(functools.partial(saved_read_bytes, out), names, out.reads_at_once))


def _config(plan: Plan) -> bytes:
    """finetuned's configuration as it describes the output; its own bytes where nothing changes."""
    text = _side_file(plan, "config.json")
    try:
        config = parse(text)
    except ValueError:
        return text
    if not isinstance(config, dict):
        return text
    quantized = plan.finetuned.quantized
    dtype = plan.recipe.dtype or ("bfloat16" if quantized else None)
    known = followed(config, dtype, quantized, vocabulary_of(plan), is_untied(plan))
    return text if known == config else (json.dumps(known, indent=2) + "\n").encode()
