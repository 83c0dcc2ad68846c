"""A sweep: candidates over one pair of checkpoints, all made from one reading of it.

They lie in a folder of the output, `sweep/`, each as complete as if `fapm prune` had made it alone, so that whatever
knows an output knows a candidate. What is chosen in the end becomes the output itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipeline import manifest, run
from pipeline.choosing.candidates import Candidate
from pipeline.errors import UserError
from pipeline.plan import Plan, make_plans
from pipeline.publish import staged_recipe
from pipeline.recipe import Recipe, binary
from pipeline.run import Begun, MakePool, Watch
from pipeline.shard.worker import at_once
from pipeline.storage.address import HUB, inside, open_store, scheme_of
from pipeline.storage.hold import hold

SWEEP = f"{manifest.SWEEP}/sweep.json"


@dataclass(frozen=True)
class Made:
    """A candidate that is there, and whether it was before."""

    candidate: Candidate
    manifest: dict[str, Any]
    was_there: bool


def sweep_folder(recipe: Recipe) -> str:
    """Where the candidates of an output lie.

    Raises:
        UserError: the path of the output has fields.
    """
    if "{" in recipe.out.replace("{{", "").replace("}}", ""):
        raise UserError(f"--out {recipe.out}: the output of a sweep has no fields in its path")
    out = staged_recipe(recipe).out
    return f"{out}-{manifest.SWEEP}" if scheme_of(recipe.out) == HUB else inside(out, manifest.SWEEP)


def sweep(
    candidates: Sequence[Candidate],
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
) -> list[Made]:
    """Make candidates, or go on with those that were not finished.

    Args:
        candidates: over the same inputs, that differ in what `candidates.SWEPT` names.

    Raises:
        UserError: as of `run.prune`.
    """
    watch = watch or Watch()
    plans = _plans(candidates, overwrite)
    there = {c.name for c, (plan, state) in zip(candidates, plans, strict=True) if _is_done(plan, state)}
    todo = [(c, *of) for c, of in zip(candidates, plans, strict=True) if c.name not in there]
    run.check_disk_for([(plan, state) for _, plan, state in todo])
    made: dict[str, dict[str, Any]] = {}
    for batch in _batches(todo, watch):
        with ExitStack() as held:
            begun = []
            for _, plan, _ in batch:
                out = held.enter_context(hold(plan.recipe.out, watch.say))
                state = manifest.check_folder(plan, overwrite)  # another run may have held it until now
                if state != "finished":
                    manifest.begin(plan, state, out)
                begun.append(Begun(plan, out))
            for (candidate, *_), found in zip(batch, run.prune_all(begun, pool, watch), strict=True):
                made[candidate.name] = found.manifest
    return [
        Made(c, made[c.name] if c.name in made else manifest.load_manifest(c.recipe.out), c.name in there)
        for c in candidates
    ]


def _plans(candidates: Sequence[Candidate], overwrite: bool) -> list[tuple[Plan, manifest.State]]:
    plans = make_plans([candidate.recipe for candidate in candidates])
    assert all(plan.shards[0].header == plans[0].shards[0].header for plan in plans)
    return [manifest.settle(plan, overwrite) for plan in plans]


def _is_done(plan: Plan, state: manifest.State) -> bool:
    return state == "finished" and manifest.is_tidy(plan)


Todo = tuple[Candidate, Plan, manifest.State]


def _batches(todo: Sequence[Todo], watch: Watch) -> list[Sequence[Todo]]:
    """As many candidates at once as the memory of a worker allows."""
    if not todo:
        return []
    recipe = todo[0][1].recipe
    slots = recipe.cpus_per_worker or 1
    most = at_once(recipe.model_copy(update={"memory": recipe.memory // slots}), open_store(recipe.out))
    count = -(-len(todo) // most)
    if count > 1:
        watch.say(
            f"note: the inputs are read {count} times: {most} candidate(s) at once fit in --memory "
            f"{binary(recipe.memory)}"
        )
    size = -(-len(todo) // count)
    return [todo[i : i + size] for i in range(0, len(todo), size)]


def write_sweep(folder: str, facts: dict[str, Any]) -> None:
    """What the last sweep over a folder was about."""
    open_store(folder).write("sweep.json", json.dumps(facts, indent=1).encode())


def read_sweep(out: str) -> dict[str, Any] | None:
    """The same, of an output; None if it is of no sweep."""
    store = open_store(out)
    return json.loads(store.read(SWEEP)) if store.has(SWEEP) else None
