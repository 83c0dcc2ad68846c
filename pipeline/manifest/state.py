"""The output folder as the run's only state: what it is for, and what is done of it."""

from __future__ import annotations

import contextlib
import datetime
import json
from dataclasses import replace
from typing import Any, Literal

from fapm import fields
from fapm.errors import UserError
from fapm.formats.adapter import CONFIG as ADAPTER_CONFIG
from fapm.formats.adapter import WEIGHTS as ADAPTER
from fapm.formats.delta import DELTA, delta_name
from fapm.layout import INDEX, LOCKS, MANIFEST, RUN, SWEEP, TEMPORARY, WORK, record_name
from fapm.manifest.read import read_run_file
from fapm.planning.make import make_plan
from fapm.planning.plan import Plan, Shard
from fapm.recipe import Recipe
from fapm.schemas import RunRecord
from fapm.storage.address import absolute, is_repository, matching, open_store, split
from fapm.storage.local import planted
from fapm.storage.store import FileStat, Store, differing

State = Literal["new", "unfinished", "finished"]


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


def identity(plan: Plan) -> dict[str, Any]:
    """Identity of a run: its choices and its inputs."""
    return {
        "format": 1,
        "recipe": plan.recipe.decides(),
        "inputs": {role: side.identity for role, side in plan.inputs.items()},
    }


def check_folder(plan: Plan, overwrite: bool) -> State:
    """Whether the output folder is new, holds a part of this very run, or all of it.

    Raises:
        UserError: it is one of the inputs, holds something else, or another run.
    """
    out = plan.out
    if is_repository(plan.recipe.out):
        raise UserError(f"--out {out.address}: an output for the Hub is made by fapm.publish")
    if out.is_file():
        raise UserError(f"--out {out.address} is a file; give a folder")
    for role, side in ((role, checkpoint.folder) for role, checkpoint in plan.inputs.items()):
        overlap = out.overlaps(side)
        if overlap == "same":
            raise UserError(f"--out {out.address} is the {role} checkpoint itself; give another folder")
        if overlap == "holds":
            raise UserError(f"--out {out.address} holds the {role} checkpoint {side.address}; give a folder beside it")
        if overlap == "inside":
            raise UserError(
                f"--out {out.address} lies in the {role} checkpoint {side.address}, which then would hold two models; "
                "give a folder beside it"
            )
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


def begun(out: Store) -> dict[str, Any]:
    """Identity of the run that was begun in a folder.

    Raises:
        UserError: it is damaged.
    """
    return read_run_file(out, RUN, RunRecord)


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
    if not all(x.get("mtime_ns") for x in (then, now)):
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
    for name in (MANIFEST, "config.json", INDEX, DELTA, ADAPTER, ADAPTER_CONFIG):
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
    there = plan.out.files()
    done = MANIFEST in there and (plan.recipe.emit != "adapter" or ADAPTER in there)
    return [
        s.index
        for s in plan.shards
        if not (_is_there(plan.recipe, s, there) and (done or record_name(s.index) in there))
    ]


def shard_files(recipe: Recipe, shard: str) -> list[str]:
    """Files of a shard: itself, its sparse task vector, or both; none of an adapter."""
    whole = [shard] if recipe.emit in ("checkpoint", "both") else []
    return [*whole, *([delta_name(shard)] if recipe.emit in ("delta", "both") else [])]


def _is_there(recipe: Recipe, shard: Shard, there: dict[str, FileStat]) -> bool:
    names = shard_files(recipe, shard.name)
    whole = shard.name not in names or (shard.name in there and there[shard.name].size == shard.nbytes)
    return whole and all(name in there for name in names)
