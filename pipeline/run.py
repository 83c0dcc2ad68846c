"""A whole prune, over any pool: plan → sample → measure → reduce → write → manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from fapm import manifest
from fapm.errors import PassingError
from fapm.log import Log
from fapm.plan import Group, Plan, Shard
from fapm.pool import Pool, Step, Threads, default_workers
from fapm.recipe import Recipe, format_bytes
from fapm.scoring.threshold import Bracket, Histograms, Threshold, bins_of, histograms
from fapm.shard.sample import Survey
from fapm.shard.task import Done, Task, known_threshold, load_arrays, measure_name, sample_name
from fapm.shard.worker import Worker
from fapm.storage.address import open_store
from fapm.storage.lease import lease
from fapm.storage.store import Store, overlapped


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


class Note(Protocol):
    def __call__(self, event: str, **facts: Any) -> None: ...


@dataclass
class Watch:
    """Where a run tells how far it is; every method may be replaced.

    `begin` says how many bytes of input will be dealt with, `expect` that it will be so many more. What is given to
    `note` goes into the log beside the output.
    """

    begin: Callable[[Plan, int], None] = lambda plan, nbytes: None
    expect: Callable[[int], None] = lambda nbytes: None
    advance: Callable[[int], None] = lambda nbytes: None
    say: Callable[[str], None] = lambda line: None
    note: Note = lambda event, **facts: None


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
    plan, state = manifest.look(recipe, overwrite)
    plan = replace(plan, chosen=chosen)
    if state == "finished" and manifest.is_tidy(plan):
        return _nothing_to_do(plan, began)
    check_disk(plan, state)
    with lease(plan.recipe.out, watch.say, plan.recipe.alone) as out:
        state = manifest.check_folder(plan, overwrite)  # another run may have held it until now
        if state == "finished":
            manifest.tidy(plan, out)
            return _nothing_to_do(plan, began)
        manifest.begin(plan, state, out)
        (result,) = prune_all([LeasedRun(plan, out)], pool, watch, began)
        return result


def _nothing_to_do(plan: Plan, began: float) -> Result:
    made = manifest.load_manifest(plan.recipe.out)
    return Result(made, plan, len(plan.shards), True, time.perf_counter() - began)


@dataclass(frozen=True)
class LeasedRun:
    """A run whose output folder is held, and has begun."""

    plan: Plan
    out: Store


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
    unfinished = [manifest.unfinished_shards(run.plan) for run in runs]
    todo = sorted({index for indices in unfinished for index in indices})
    to_go = max(bytes_to_go(run.plan, todo) for run in runs)
    resumed = [len(plan.shards) - len(indices) for indices in unfinished]
    facts: dict[str, Any] = {}

    def log(event: str, **facts: Any) -> None:
        for one in logs:
            one.add(event, **facts)

    for one, count in zip(logs, resumed, strict=True):
        one.add("begun", fapm=manifest.version(), shards=len(plan.shards), bytes=to_go, resumed=count)
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
            with closing(pool(plan, runs[0].out, watch)) as workers:
                schedules = [schedule(run.plan, run.out, left) for run, left in zip(runs, unfinished, strict=True)]
                rounds = in_lockstep(runs, schedules, workers, watch)
                facts |= {"workers": workers.workers, "lost_workers": workers.lost}
        facts["seconds"] = round(time.perf_counter() - began, 3)
        for run, count, looked in zip(runs, resumed, rounds, strict=True):
            found = {"resumed": count} | ({"rounds": looked} if todo else {}) | facts
            made.append(Result(manifest.finish(run.plan, found, run.out), run.plan, count, False, facts["seconds"]))
            logs[len(made) - 1].add("finished", **found)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        log("stopped" if stopped else "failed", error=f"{type(error).__name__}: {error}".rstrip(": "))
        raise
    return made


@dataclass(frozen=True)
class Request:
    """Next step that a run asks for.

    Attributes:
        step: `Worker.sample`, `Worker.measure` or `Worker.write`.
        event: one of SAMPLED, COUNTED, WRITTEN.
        more: input bytes that this adds to what was to be dealt with.
    """

    step: Step
    tasks: Sequence[Task]
    event: str
    more: int = 0


Schedule = Generator[Request, list[Done], int]
"""A run from sample to write: it asks for steps, gets what is said of their tasks, and returns how often the groups
over several shards were measured."""


def schedule(plan: Plan, out: Store, todo: Iterable[int]) -> Schedule:
    """The schedule of a run that has yet to write the shards `todo`."""
    todo = list(todo)
    if not todo:
        return 0
    thresholds, quotas, rounds = yield from find_thresholds(plan, out)
    tasks = []
    for index in todo:
        shard = plan.shards[index]
        mine = {name: Threshold(thresholds[name].key, ties) for name, ties in quotas.get(index, {}).items()}
        tasks.append(Task(shard, groups_of(plan, shard), thresholds=mine))
    yield Request(Worker.write, tasks, WRITTEN)
    return rounds


SAMPLED, COUNTED, WRITTEN = "sampled", "counted", "shard"
"""Names in the log of the end of a task of each step, in their order."""


def in_lockstep(runs: Sequence[LeasedRun], schedules: Sequence[Schedule], pool: Pool, watch: Watch) -> list[int]:
    """Do what the schedules of runs ask for, the same step of all of them in one reading; returns what they return."""
    wanted: dict[int, Request] = {}
    returned = [0] * len(runs)

    def go_on(i: int, said: list[Done] | None) -> None:
        wanted.pop(i, None)
        try:
            wanted[i] = schedules[i].send(said)  # type: ignore[arg-type]  # a schedule begins with None
        except StopIteration as ended:
            returned[i] = ended.value

    for i in range(len(runs)):
        go_on(i, None)
    while wanted:
        event = min((request.event for request in wanted.values()), key=(SAMPLED, COUNTED, WRITTEN).index)
        now = {i: request for i, request in wanted.items() if request.event == event}
        step = next(iter(now.values())).step
        more = max(request.more for request in now.values())
        if more:
            watch.expect(more)
            watch.note("expect", bytes=more)
        done = _each(runs[0].plan, pool.map(step, _merged(runs, now)), event, watch)
        said = {result.shard: result for result in done}
        for i, request in now.items():
            go_on(i, [said[task.shard.index] for task in request.tasks])
    return returned


def _merged(runs: Sequence[LeasedRun], wanted: dict[int, Request]) -> list[Task]:
    """The tasks of several runs, those for one shard as one."""
    if len(runs) == 1:
        return list(wanted[0].tasks)
    by_shard: dict[int, list[Task]] = {}
    for i, request in wanted.items():
        for task in request.tasks:
            run = runs[i]
            own = replace(task, recipe=run.plan.recipe, out=run.out.absolute())
            by_shard.setdefault(task.shard.index, []).append(own)
    return [replace(tasks[0], beside=tuple(tasks[1:])) for _, tasks in sorted(by_shard.items())]


def _each(plan: Plan, results: Iterable[Done], event: str, watch: Watch) -> Iterator[Done]:
    """Results as they come, each noted in the log."""
    for done in results:
        facts = {name: value for name, value in asdict(done).items() if name != "shard" and value != ""}
        if done.note:
            watch.say(f"note: {done.note}")
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}
        name = plan.shards[done.shard].name
        watch.note(event, shard=name, **rounded)
        if event == WRITTEN:
            watch.say(f"{name}  {format_bytes(done.written_bytes)}  {done.seconds:.1f} s")
        yield done


def bytes_to_go(plan: Plan, todo: Iterable[int]) -> int:
    """Input bytes of the steps that are left, for the progress."""
    to_write = sum(t.read_bytes for i in todo for t in plan.shards[i].tensors)
    known = manifest.load_thresholds(open_store(plan.recipe.out)) is not None
    return to_write + (0 if known else to_measure(plan))


def to_measure(plan: Plan) -> int:
    """Input bytes of the groups that lie in several shards and whose threshold has to be found."""
    return bytes_of(plan, (name for name, known in cross_shard_groups(plan).items() if known is None))


def bytes_of(plan: Plan, groups: Iterable[str]) -> int:
    """Input bytes of some groups."""
    wanted = set(groups)
    return sum(t.read_bytes for t in plan.tensors() if t.group in wanted)


def cross_shard_groups(plan: Plan) -> dict[str, Threshold | None]:
    """The groups that lie in several shards, and their thresholds where no score needs to be looked at."""
    cross_shard = {name: group for name, group in plan.groups.items() if group.cross_shard}
    return {name: known_threshold(plan.recipe, group, 0) for name, group in cross_shard.items()}


def in_process(plan: Plan, out: Store, watch: Watch) -> Threads:
    """Threads of this process, as many as the recipe says or as there are cores."""
    return Threads(plan.recipe, out, default_workers(plan.recipe, len(plan.shards)), watch.advance, watch.say)


def check_disk(plan: Plan, state: manifest.State) -> None:
    """Find out now that the disk is too small, not in an hour.

    Raises:
        PassingError: it is.
    """
    check_disk_for([(plan, state)])


def check_disk_for(runs: Sequence[tuple[Plan, manifest.State]]) -> None:
    """The same for several outputs side by side."""
    runs = [run for run in runs if run[0].recipe.emit != "delta"]  # how large that is, is known when it is there
    if not runs:
        return
    out = open_store(runs[0][0].recipe.out)
    needed = sum(plan.write_bytes - manifest.replaceable_bytes(plan, state) for plan, state in runs)
    free = out.free_bytes()
    if free is not None and needed > free:
        raise PassingError(
            f"--out {out.address} needs {format_bytes(needed)} and its disk has {format_bytes(free)} free; "
            "free some or give another folder"
        )


def groups_of(plan: Plan, shard: Shard) -> dict[str, Group]:
    return {t.group: plan.groups[t.group] for t in shard.tensors if t.group}


def find_thresholds(
    plan: Plan, out: Store
) -> Generator[Request, list[Done], tuple[dict[str, Threshold], dict[int, dict[str, int]], int]]:
    """The thresholds of the groups that lie in several shards.

    Returns:
        The thresholds by group; each shard's part of their tie quotas; how often the groups were measured.
    """
    found = manifest.load_thresholds(out)
    if found:
        return found
    cross_shard = cross_shard_groups(plan)
    thresholds = {name: known for name, known in cross_shard.items() if known}
    brackets = yield from first_brackets(plan, out, [name for name in cross_shard if name not in thresholds])
    rounds = 0
    last_round: dict[str, tuple[int, Bracket]] = {}
    while brackets:
        rounds += 1
        last_round |= {name: (rounds, bracket) for name, bracket in brackets.items()}
        counted = yield from measured(plan, out, brackets, rounds)
        for i, name in enumerate(list(brackets)):
            result = counted.narrow(i, plan.groups[name].k)
            if isinstance(result, Threshold):
                thresholds[name] = result
                del brackets[name]
            else:
                brackets[name] = result
    quotas = share_ties(plan, out, thresholds, last_round)
    if thresholds:
        manifest.save_thresholds(out, thresholds, quotas, rounds)
    return thresholds, quotas, rounds


def holders(plan: Plan, groups: Iterable[str]) -> list[Shard]:
    """The shards that hold tensors of these groups."""
    wanted = set(groups)
    return [s for s in plan.shards if any(t.group in wanted for t in s.tensors)]


def first_brackets(plan: Plan, out: Store, names: Sequence[str]) -> Generator[Request, list[Done], dict[str, Bracket]]:
    """Where a sample says that the thresholds of some groups are."""
    shards = holders(plan, names)
    there = out.files(manifest.WORK)
    tasks = [Task(s, groups_of(plan, s)) for s in shards if sample_name(s.index) not in there]
    if tasks:
        yield Request(Worker.sample, tasks, SAMPLED)
    surveys = {name: Survey() for name in names}

    def load(shard: Shard) -> tuple[list[str], dict[str, np.ndarray]]:
        return load_arrays(out, sample_name(shard.index), "weights", "variance")

    for groups, saved in overlapped(load, shards, out.reads_at_once):
        for name, weights, variance in zip(groups, saved["weights"], saved["variance"], strict=True):
            if name in surveys:
                surveys[name].weights += weights
                surveys[name].variance += float(variance)
    return {name: found.bracket(plan.groups[name]) for name, found in surveys.items()}


def measured(
    plan: Plan, out: Store, brackets: dict[str, Bracket], round_: int
) -> Generator[Request, list[Done], Histograms]:
    """Count every score of some groups: above the bracket, and inside by bins. The reduction of a distributed run."""
    sums = histograms(list(brackets.values()))
    place = {name: i for i, name in enumerate(brackets)}

    def add(shard: int) -> None:
        groups, saved = load_arrays(out, measure_name(shard, round_), "above", "bins", "starts")
        for i, name in enumerate(groups):
            sums.above[place[name]] += saved["above"][i]
            sums.of(place[name])[:] += saved["bins"][saved["starts"][i] : saved["starts"][i + 1]]

    tasks, there = [], out.files(manifest.WORK)
    for shard in holders(plan, brackets):
        if measure_name(shard.index, round_) in there:
            add(shard.index)
        else:
            groups = groups_of(plan, shard)
            mine = {name: brackets[name] for name in groups if name in brackets}
            tasks.append(Task(shard, groups, brackets=mine, round=round_))
    if tasks:
        done = yield Request(Worker.measure, tasks, COUNTED, bytes_of(plan, brackets) if round_ > 1 else 0)
        for one in done:
            add(one.shard)
    return sums


def share_ties(
    plan: Plan, out: Store, thresholds: dict[str, Threshold], last_round: dict[str, tuple[int, Bracket]]
) -> dict[int, dict[str, int]]:
    """Hand out the tie quotas in the order of the shards, which is the order of the tensors' names."""
    left = {name: threshold.ties for name, threshold in thresholds.items()}
    places = {name: bins_of(bracket).place(thresholds[name].key) for name, (_, bracket) in last_round.items()}
    quotas: dict[int, dict[str, int]] = {}
    for shard in holders(plan, thresholds):
        quotas[shard.index] = {}
        loaded: dict[int, dict[str, np.ndarray]] = {}  # by round, each group's bins
        for name in sorted({t.group for t in shard.tensors if t.group in thresholds}):
            part = 0
            if left[name] and name in last_round:
                round_, _ = last_round[name]
                if round_ not in loaded:
                    groups, saved = load_arrays(out, measure_name(shard.index, round_), "bins", "starts")
                    loaded[round_] = dict(zip(groups, np.split(saved["bins"], saved["starts"][1:-1]), strict=True))
                part = min(left[name], int(loaded[round_][name][places[name]]))
            quotas[shard.index][name] = part
            left[name] -= part
    assert not any(left.values()), left
    return quotas
