"""A whole prune, over any pool: plan → sample → measure → reduce → write → manifest."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from fapm.errors import PassingError, plural
from fapm.log import Log
from fapm.manifest.finish import finish, is_tidy, replaceable_bytes, tidy
from fapm.manifest.read import load_manifest
from fapm.manifest.state import State, begin, check_folder, look, unfinished_shards
from fapm.planning.plan import Plan
from fapm.pool import Pool, Threads, default_workers
from fapm.recipe import Recipe, format_bytes, how
from fapm.schedule import WRITTEN, LeasedRun, Request, Schedule, Watch, in_lockstep, together
from fapm.scoring.threshold import Threshold
from fapm.selection import find_thresholds, load_thresholds, task_of, to_measure
from fapm.shard.task import LaneTask
from fapm.shard.worker import Worker
from fapm.storage.lease import lease
from fapm.storage.store import Store
from fapm.version import version


@dataclass(frozen=True)
class Result:
    """Result of a prune.

    Attributes:
        manifest: what `fapm/manifest.json` holds.
        resumed: shards that an earlier try had finished.
        nothing_to_do: the whole run was finished before.
    """

    manifest: dict[str, Any]
    plan: Plan
    resumed: int
    nothing_to_do: bool
    seconds: float

    def __repr__(self) -> str:
        return f"Result({self._line()})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._line())}</p>"

    def _line(self) -> str:
        totals, recipe = self.manifest["totals"], self.plan.recipe
        wrote = f"{plural(len(self.plan.shards), 'shard')} of {format_bytes(totals['written_bytes'])}"
        when = "finished before" if self.nothing_to_do else f"{self.seconds:.3g} s"
        return f"{recipe.out}: {how(recipe.model_dump())}; {plural(totals['tensors'], 'tensor')} in {wrote}, {when}"


MakePool = Callable[[Plan, Store, Watch], Pool]


def prune(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
    chosen: str = "",
) -> Result:
    """Prune a checkpoint as the recipe says, or go on with a prune that was stopped.

    Args:
        recipe: what to do.
        overwrite: start again in a folder that holds something else.
        pool: makes the workers; threads of this process by default.
        watch: told about the progress.
        chosen: how the recipe was chosen, for the card.

    Raises:
        UserError: the inputs, the folder or the disk do not allow it, or another run is at work there. What is
            finished stays.
    """
    began = time.perf_counter()
    watch = watch or Watch()
    plan, state = look(recipe, overwrite)
    plan = replace(plan, chosen=chosen)
    if state == "finished" and is_tidy(plan):
        return _nothing_to_do(plan, began)
    check_disk(plan, state)
    with lease(plan.recipe.out, watch.say, plan.recipe.alone) as out:
        state = check_folder(plan, overwrite)  # another run may have held it until now
        if state == "finished":
            tidy(plan, out)
            return _nothing_to_do(plan, began)
        begin(plan, state, out)
        (result,) = prune_all([LeasedRun(plan, out)], pool, watch, began)
        return result


def _nothing_to_do(plan: Plan, began: float) -> Result:
    made = load_manifest(plan.recipe.out)
    return Result(made, plan, len(plan.shards), True, time.perf_counter() - began)


def prune_all(
    runs: Sequence[LeasedRun],
    pool: MakePool | None = None,
    watch: Watch | None = None,
    began: float | None = None,
) -> list[Result]:
    """Bring runs over the same inputs to their end, from one reading.

    Args:
        runs: whose plans are cut into the same shards.
        pool: made for the first of them, and works for all.
        began: when, by `time.perf_counter`; now by default.
    """
    pool, watch = pool or in_process, watch or Watch()
    began = time.perf_counter() if began is None else began
    plan, logs = runs[0].plan, [Log(run.out) for run in runs]
    unfinished = [unfinished_shards(run.plan) for run in runs]
    todo = sorted({index for indices in unfinished for index in indices})
    to_go = max(bytes_to_go(run.plan, todo) for run in runs)
    resumed = [len(plan.shards) - len(indices) for indices in unfinished]
    facts: dict[str, Any] = {}

    def log(event: str, **facts: Any) -> None:
        for one in logs:
            one.add(event, **facts)

    for one, count in zip(logs, resumed, strict=True):
        one.add("begun", fapm=version(), shards=len(plan.shards), bytes=to_go, resumed=count)
    also = watch.note

    def note(event: str, **facts: Any) -> None:
        log(event, **facts)
        also(event, **facts)

    watch = replace(watch, note=note)
    rounds = [0] * len(runs)
    made = []
    try:
        if todo:
            watch.begin(plan, to_go)
            before = time.perf_counter()
            with closing(pool(plan, runs[0].out, watch)) as workers:
                began += time.perf_counter() - before  # to start workers, or a cluster, is no work
                schedules = [
                    schedule(run.plan, run.out.absolute(), left) for run, left in zip(runs, unfinished, strict=True)
                ]
                rounds = in_lockstep(runs, schedules, workers, watch)
                facts |= {"workers": workers.workers, "lost_workers": workers.lost}
        facts["seconds"] = round(time.perf_counter() - began, 3)
        for run, count, looked in zip(runs, resumed, rounds, strict=True):
            found = {"resumed": count} | ({"rounds": looked} if todo else {}) | facts
            made.append(Result(finish(run.plan, found, run.out), run.plan, count, False, facts["seconds"]))
            logs[len(made) - 1].add("finished", **found)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        log("stopped" if stopped else "failed", error=f"{type(error).__name__}: {error}".rstrip(": "))
        raise
    return made


def schedule(plan: Plan, out: Store, todo: Iterable[int]) -> Schedule:
    """The schedule of a run that has yet to write the shards `todo`."""
    todo = list(todo)
    if not todo:
        return 0
    found = yield from together([find_thresholds(lane, out) for lane in plan.lanes or (plan,)])
    parts = [_to_write(lane, out, todo, *of) for lane, of in zip(plan.lanes or (plan,), found, strict=True)]
    if plan.lanes:
        merges = (task_of(plan, out, plan.shards[index]) for index in todo)
        tasks = [replace(merge, parts=of) for merge, of in zip(merges, zip(*parts, strict=True), strict=True)]
    else:
        (tasks,) = parts
    yield Request(Worker.write, tasks, WRITTEN)
    return max(rounds for *_, rounds in found)


def _to_write(
    plan: Plan,
    out: Store,
    todo: Iterable[int],
    thresholds: dict[str, Threshold],
    quotas: dict[int, dict[str, int]],
    rounds: int,
) -> list[LaneTask]:
    """Work on the shards `todo`, with what was found for them."""
    tasks = []
    for index in todo:
        mine = {name: Threshold(thresholds[name].key, ties) for name, ties in quotas.get(index, {}).items()}
        tasks.append(replace(task_of(plan, out, plan.shards[index]), thresholds=mine))
    return tasks


def bytes_to_go(plan: Plan, todo: Iterable[int]) -> int:
    """Input bytes of the steps that are left, for the progress."""
    to_write = sum(t.read_bytes for i in todo for t in plan.shards[i].tensors)
    known = all(load_thresholds(plan.out, lane.source) is not None for lane in plan.lanes or (plan,))
    return to_write + (0 if known else to_measure(plan))


def in_process(plan: Plan, out: Store, watch: Watch) -> Threads:
    """Threads of this process, as many as the recipe says or as there are cores."""
    return Threads(plan.recipe, out, default_workers(plan.recipe, len(plan.shards)), watch.advance, watch.say)


def check_disk(plan: Plan, state: State) -> None:
    """Find out now that the disk is too small, not in an hour.

    Raises:
        PassingError: it is.
    """
    check_disk_for([(plan, state)])


def check_disk_for(runs: Sequence[tuple[Plan, State]]) -> None:
    """The same for several outputs side by side."""
    runs = [
        run for run in runs if run[0].recipe.emit in ("checkpoint", "both")
    ]  # how large that is, is known when it is there
    if not runs:
        return
    out = runs[0][0].out
    needed = sum(plan.write_bytes - replaceable_bytes(plan, state) for plan, state in runs)
    free = out.free_bytes()
    if free is not None and needed > free:
        raise PassingError(
            f"--out {out.address} needs {format_bytes(needed)} and its disk has {format_bytes(free)} free; "
            "free some or give another folder"
        )
