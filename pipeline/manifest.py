"""The output folder as the run's only state: what it is for, what is done, and the manifest that comes last.

fapm/run.json            recipe and identity of the inputs; written first
fapm/work/…              records of finished shards, counts, thresholds; removed at the end
model-….safetensors      each appears whole
model.safetensors.index.json, side files, fapm/recipe.yaml, fapm/tensors.parquet, config.json
fapm/manifest.json       written last: with it, and only with it, the run is finished
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from fapm import fields
from fapm.card import model_card
from fapm.errors import UserError
from fapm.formats.configuration import followed
from fapm.formats.delta import DELTA, FORMAT, delta_name
from fapm.formats.sandbox import RefusedError, ask
from fapm.formats.side_files import CARD, is_code, without_code
from fapm.plan import Plan, Shard, index_json, is_untied, make_plan, vocabulary_of
from fapm.recipe import PATHS, Recipe
from fapm.schemas import ROWS, ManifestRecord, Row, RunRecord, ShardRecord, ThresholdsRecord
from fapm.scoring.methods import METHODS
from fapm.scoring.threshold import Threshold
from fapm.shard.table import MEASURED, from_parquet, to_parquet, totals
from fapm.shard.task import ARRAYS, delta_facts_name, record_name, rows_name, saved_read_bytes
from fapm.storage.address import HUB, absolute, matching, open_store, scheme_of, split
from fapm.storage.local import TEMPORARY, planted
from fapm.storage.records import Record, parse, read_record
from fapm.storage.store import LOCKS, FileStat, Store, differing, overlapped

RUN = "fapm/run.json"
MANIFEST = "fapm/manifest.json"
RECIPE = "fapm/recipe.yaml"
TABLE = "fapm/tensors.parquet"
WORK = "fapm/work"
INDEX = "model.safetensors.index.json"
THRESHOLDS = f"{WORK}/thresholds.json"
SWEEP = "sweep"
"""The folder in an output in which the candidates lie of which it was chosen (`fapm.choosing`)."""

State = Literal["new", "unfinished", "finished"]

_MOST_TABLE_BYTES, _MOST_ROWS = 64 << 20, 200_000


def look(recipe: Recipe, overwrite: bool = False) -> tuple[Plan, State]:
    """The plan of a run, its output folder settled, and what that folder holds of it.

    Raises:
        UserError: the inputs or the folder do not allow it.
    """
    return settle(make_plan(recipe), overwrite)


def settle(plan: Plan, overwrite: bool = False) -> tuple[Plan, State]:
    """The same of a plan.

    Raises:
        UserError: the folder does not allow it.
    """
    plan = _settled(plan, overwrite)
    return plan, check_folder(plan, overwrite)


def _settled(plan: Plan, overwrite: bool) -> Plan:
    """The plan with a path for its output that has no fields any more.

    A path that has the date in it may have meant another folder when this very run, over the same inputs, was begun or
    finished: then it means that one still.
    """
    names = {side: split(absolute(getattr(plan.recipe, side)))[1] for side in ("base", "finetuned")}
    chosen = {"method": plan.recipe.method, "scope": plan.recipe.scope, "density": f"{plan.recipe.density:g}"}
    template, values = plan.recipe.out, names | chosen
    out = None
    if fields.changes(template) and not overwrite:
        out = _begun_before(plan, fields.as_glob(template, values))
    out = out or fields.fill(template, values | fields.times())
    return replace(plan, recipe=plan.recipe.model_copy(update={"out": out}))


def _begun_before(plan: Plan, pattern: str) -> str | None:
    """The folder in which this very run is finished, else the one in which it was begun last, if there is one."""
    found = []
    for path in matching(pattern):
        folder = open_store(path)
        if folder.has(RUN):
            with contextlib.suppress(UserError):  # it is of somebody else
                if not differences(begun(folder), identity(plan)):
                    found.append((folder.has(MANIFEST), folder.changed(RUN), path))
    return max(found)[2] if found else None


def version() -> str:
    """The installed version of fapm."""
    try:
        return importlib.metadata.version("fapm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def identity(plan: Plan) -> dict[str, Any]:
    """Identity of a run: its choices and its inputs."""
    return {
        "format": 1,
        "recipe": plan.recipe.decides(),
        "inputs": {"base": plan.base.identity, "finetuned": plan.finetuned.identity},
    }


def check_folder(plan: Plan, overwrite: bool) -> State:
    """Whether the output folder is new, holds a part of this very run, or all of it.

    Raises:
        UserError: it is one of the inputs, holds something else, or another run.
    """
    out = open_store(plan.recipe.out)
    if scheme_of(plan.recipe.out) == HUB:
        raise UserError(f"--out {out.address}: an output for the Hub is made by fapm.publish")
    for role, side in (("base", plan.base.folder), ("finetuned", plan.finetuned.folder)):
        overlap = out.overlaps(side)
        if overlap == "same":
            raise UserError(f"--out {out.address} is the {role} checkpoint itself; give another folder")
        if overlap == "holds":
            raise UserError(f"--out {out.address} holds the {role} checkpoint {side.address}; give a folder beside it")
    if out.is_file():
        raise UserError(f"--out {out.address} is a file; give a folder")
    refuse_links(out)
    if overwrite or out.is_empty():
        return "new"
    if not out.has(RUN):
        there = [name for name in out.files() if not name.startswith(f"{SWEEP}/")]
        if all(name.startswith("fapm/") for name in there) and MANIFEST not in there:
            return "new"  # killed before the first write was complete
        raise UserError(
            f"--out {out.address} is not empty and was not made by fapm; give another folder, or --overwrite "
            "to replace the checkpoint in it"
        )
    found = differences(begun(out), identity(plan))
    if found and not any("/" not in name and name.endswith(".safetensors") for name in out.files()):
        return "new"  # nothing is finished, nothing is lost
    if found:
        raise UserError(
            f"--out {out.address} belongs to another run: {'; '.join(found[:4])}; give another folder, "
            "or --overwrite to start again"
        )
    return "finished" if out.has(MANIFEST) and not unfinished_shards(plan) else "unfinished"


def refuse_links(out: Store) -> None:
    """Refuse an output in which something is a link.

    Raises:
        UserError: as `storage.local.planted` says it.
    """
    for name in out.links():
        raise planted(out.at(name))


def _read(folder: Store, name: str, model: type[Record]) -> dict[str, Any]:
    return read_record(folder, name, model, "damaged; start again with --overwrite")


def begun(out: Store) -> dict[str, Any]:
    """Identity of the run that was begun in a folder.

    Raises:
        UserError: it is damaged.
    """
    return _read(out, RUN, RunRecord)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two identities, as sentences."""
    found = []
    if before.get("format") != now["format"]:
        found.append("it was made by another version of fapm")
    old, new = before.get("recipe", {}), now["recipe"]
    for name in new:
        if old.get(name) != json.loads(json.dumps(new[name])):
            found.append(f"{name} was {old.get(name)!r} and is {new[name]!r}")
    for role, files in now["inputs"].items():
        then = before.get("inputs", {}).get(role, {})
        for file in sorted(files.keys() | then.keys()):
            if file not in then or file not in files:
                found.append(f"{role}: {file} is {'new' if file not in then else 'gone'}")
            elif what := differing(then[file], files[file]):
                found.append(f"{role}: {file} has changed since ({_how(what, then[file], files[file])})")
    return found


def _how(what: list[str], then: dict[str, Any], now: dict[str, Any]) -> str:
    if "size" in what:
        return f"{then['size']} bytes then, {now['size']} now"
    if "header" in what:
        return "its header differs"
    if "mtime_ns" not in what and "etag" not in what:
        return "its time of change is the same, but it was written in place, copied or renamed meanwhile"
    if not all("mtime_ns" in x for x in (then, now)):
        return "it was written again"
    when = (datetime.datetime.fromtimestamp(x["mtime_ns"] / 1e9).isoformat(" ", "seconds") for x in (then, now))
    return "modified {} then, {} now".format(*when)


def begin(plan: Plan, state: State, out: Store) -> None:
    """Make the held folder ready: a new run removes what an earlier one left."""
    if state == "new":
        _clear(out)
        out.write(RUN, json.dumps(identity(plan), indent=1).encode())
    else:
        out.remove(MANIFEST)


def _clear(out: Store) -> None:
    """Remove what a checkpoint in this folder consists of, the part that makes it one first."""
    files = out.files()
    for name in (MANIFEST, "config.json", INDEX, DELTA):
        out.remove(name)
    for name in files:
        if "/" not in name and (name.endswith((".safetensors", ".index.json"))):
            out.remove(name)
    for name in files:
        if name.startswith("fapm/") and not name.startswith((f"{LOCKS}/", f"{TEMPORARY}/")):
            out.remove(name)
    out.remove_folder(WORK)


def unfinished_shards(plan: Plan) -> list[int]:
    """The shards that are not there, or without the record that belongs to them."""
    out = open_store(plan.recipe.out)
    there = out.files()
    done = MANIFEST in there
    return [
        s.index
        for s in plan.shards
        if not (_is_there(plan.recipe, s, there) and (done or record_name(s.index) in there))
    ]


def shard_files(recipe: Recipe, shard: str) -> list[str]:
    """Files of a shard: itself, its sparse task vector, or both."""
    return [*([shard] if recipe.emit != "delta" else []), *([delta_name(shard)] if recipe.emit != "checkpoint" else [])]


def _is_there(recipe: Recipe, shard: Shard, there: dict[str, FileStat]) -> bool:
    names = shard_files(recipe, shard.name)
    whole = shard.name not in names or (shard.name in there and there[shard.name].size == shard.nbytes)
    return whole and all(name in there for name in names)


def save_thresholds(
    out: Store, thresholds: dict[str, Threshold], quotas: dict[int, dict[str, int]], rounds: int
) -> None:
    """Keep what was found for the groups over several shards, so that it is not looked for again."""
    data = {
        "thresholds": {name: [t.key, t.ties] for name, t in thresholds.items()},
        "quotas": {str(shard): part for shard, part in quotas.items()},
        "rounds": rounds,
    }
    out.write(THRESHOLDS, json.dumps(data).encode())


def load_thresholds(out: Store) -> tuple[dict[str, Threshold], dict[int, dict[str, int]], int] | None:
    if not out.has(THRESHOLDS):
        return None
    data = _read(out, THRESHOLDS, ThresholdsRecord)
    thresholds = {name: Threshold(key, ties) for name, (key, ties) in data["thresholds"].items()}
    return thresholds, {int(shard): part for shard, part in data["quotas"].items()}, data["rounds"]


def load_manifest(path: str) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        UserError: the folder holds no finished run.
    """
    folder = open_store(path)
    if not folder.exists():
        raise UserError(f"there is no folder {path}")
    if not folder.has(MANIFEST):
        state = "an unfinished run; give the same command again to go on" if folder.has(RUN) else "no output of fapm"
        raise UserError(f"{path} holds {state}")
    made = read_record(folder, MANIFEST, ManifestRecord, "not the manifest of a run that this version knows")
    try:
        known = {name: value for name, value in made["recipe"].items() if name in Recipe.model_fields}
        Recipe.of(**known | dict.fromkeys(("base", "finetuned", "out"), "-"))
    except UserError as error:
        raise UserError(f"{folder.at(MANIFEST)} is not the manifest of a run: its recipe has {error}") from None
    return made


def check_inputs(plan: Plan) -> None:
    """Whether the inputs are still the files of which the plan was made.

    Raises:
        UserError: one has changed while it was read.
    """
    for side in (plan.base, plan.finetuned):
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
    if METHODS[plan.recipe.method].score is not None and wrong:
        group = wrong[0]
        raise UserError(
            f"{group!r} keeps {kept[group]} elements, and should keep {plan.groups[group].k}: an input has changed "
            "between counting and writing; let it come to rest, and start again with --overwrite"
        )


def finish(plan: Plan, facts: dict[str, Any], out: Store) -> dict[str, Any]:
    """Write all that makes the shards a checkpoint, the manifest last; returns the manifest.

    Raises:
        UserError: an input has changed meanwhile.
    """
    check_inputs(plan)
    names, at_once = [record_name(s.index) for s in plan.shards], out.reads_at_once
    records = list(overlapped(functools.partial(_read, out, model=ShardRecord), names, at_once))
    measured = np.concatenate(list(overlapped(functools.partial(_measured, out), plan.shards, at_once)))
    _check_kept(plan, measured)
    literal = {side: fields.literal(path) for side, path in _paths(plan.recipe).items()}
    out.write(RECIPE, plan.recipe.model_copy(update=literal).to_yaml().encode())
    table = to_parquet(plan.shards, plan.groups, measured)
    out.write(TABLE, table)
    if plan.recipe.emit != "checkpoint":
        out.write(DELTA, _delta(plan, records, out))
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
            **totals(list(plan.tensors()), measured),
            "read_bytes": sum(r["read_bytes"] for r in records) + _read_to_measure(out),
            "elements": sum(t.numel for t in plan.tensors()),
            "delta_bytes": sum(r.get("delta", r)["nbytes"] for r in records) if plan.recipe.emit != "checkpoint" else 0,
            "written_bytes": sum(r["nbytes"] + r.get("delta", {"nbytes": 0})["nbytes"] for r in records),
        },
        "left_out": list(plan.left_out),
        "added": list(plan.added),
        "accounts": {side: asdict(found) for side, found in plan.accounts.items()},
        "oddities": list(plan.warnings),
        **facts,
    }
    out.write(MANIFEST, json.dumps(manifest, indent=1).encode())
    tidy(plan, out)
    return manifest


def _measured(out: Store, shard: Shard) -> np.ndarray:
    """Measured rows of a shard's tensors, (t,) MEASURED."""
    name, nbytes = rows_name(shard.index), len(shard.tensors) * MEASURED.itemsize
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
    if sum("/" not in s.name for s in plan.shards) > 1 and plan.recipe.emit != "delta":
        yield INDEX, lambda: json.dumps(index_json(plan.shards), indent=2).encode()
    if "config.json" in plan.finetuned.side_files:
        yield "config.json", lambda: _config(plan)


def _side_file(plan: Plan, name: str) -> bytes:
    """finetuned's; without the names of classes that transformers would run, unless code is allowed."""
    data = plan.finetuned.read(name)
    return data if plan.recipe.allow_code else without_code(name, data)


def is_tidy(plan: Plan) -> bool:
    """Whether a finished run has all that lies beside its shards, and nothing that it has no use for."""
    out = open_store(plan.recipe.out)
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
    out = open_store(plan.recipe.out)
    if state == "unfinished":
        shards = {name for s in plan.shards for name in (s.name, delta_name(s.name))}
        return sum(f.size for name, f in out.files().items() if name in shards or name.startswith(TEMPORARY))
    return sum(f.size for name, f in out.files().items() if name.startswith("fapm/") or name.endswith(".safetensors"))


def _read_to_measure(out: Store) -> int:
    names = [name for name in out.files(WORK) if name.endswith(ARRAYS)]
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


def read_table(path: str) -> list[dict[str, Any]]:
    """The rows of a finished run's table, of which each has what `schemas.Row` says.

    Raises:
        UserError: it is damaged, or none.
    """
    folder = open_store(path)
    if folder.size(TABLE) > _MOST_TABLE_BYTES:
        raise UserError(f"{folder.at(TABLE)} is larger than any table of tensors")
    try:
        answer = ask("untable.py", [str(_MOST_ROWS), *Row.model_fields], folder.read(TABLE), 60, 256 << 20)
        found: list[dict[str, Any]] = []
        for line in answer.splitlines():
            found += (row.model_dump() for row in ROWS.validate_json(line))
    except (RefusedError, ValidationError) as error:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{folder.at(TABLE)} is not the table of a run ({why})") from None
    return found
