"""Schedules: what a run asks for in turn, and several of them in lockstep, the same step of all in one reading."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from fapm.planning.plan import Plan
from fapm.pool import Pool, Step
from fapm.recipe import format_bytes
from fapm.shard.task import Done, LaneTask, Task
from fapm.storage.store import Store


class Note(Protocol):
    def __call__(self, event: str, **facts: Any) -> None: ...


@dataclass
class Watch:
    """Where a run tells how far it is; every method may be replaced.

    `begin` says how many progress bytes there will be, `expect` that it will be so many more. What is given to
    `note` goes into the log beside the output.
    """

    begin: Callable[[Plan, int], None] = lambda plan, nbytes: None
    expect: Callable[[int], None] = lambda nbytes: None
    advance: Callable[[int], None] = lambda nbytes: None
    say: Callable[[str], None] = lambda line: None
    note: Note = lambda event, **facts: None


@dataclass(frozen=True)
class LeasedRun:
    """A run whose output folder is held, and has begun."""

    plan: Plan
    out: Store


@dataclass(frozen=True)
class Request:
    """Next step that a run asks for.

    Attributes:
        step: `Worker.sample`, `Worker.measure` or `Worker.write`.
        event: one of SAMPLED, COUNTED, WRITTEN.
        more: progress bytes that this adds.
    """

    step: Step
    tasks: Sequence[LaneTask]
    event: str
    more: int = 0


Schedule = Generator[Request, list[Done], int]
"""A run from sample to write: it asks for steps, gets the results of their tasks, and returns how often the groups
over several shards were measured."""

SAMPLED, COUNTED, WRITTEN = "sampled", "counted", "shard"
"""Names in the log of the end of a task of each step, in their order."""


Returned = TypeVar("Returned")


def together(
    schedules: Sequence[Generator[Request, list[Done], Returned]],
) -> Generator[Request, list[Done], list[Returned]]:
    """Ask for what several schedules ask for, the same step of all of them at once; returns what they return."""
    wanted: dict[int, Request] = {}
    returned: dict[int, Returned] = {}

    def go_on(i: int, said: list[Done] | None) -> None:
        wanted.pop(i, None)
        try:
            wanted[i] = schedules[i].send(said)  # type: ignore[arg-type]  # a schedule begins with None
        except StopIteration as ended:
            returned[i] = ended.value

    for i in range(len(schedules)):
        go_on(i, None)
    while wanted:
        event = min((request.event for request in wanted.values()), key=(SAMPLED, COUNTED, WRITTEN).index)
        now = {i: request for i, request in wanted.items() if request.event == event}
        step = next(iter(now.values())).step
        tasks = [task for request in now.values() for task in request.tasks]
        done = yield Request(step, tasks, event, max(request.more for request in now.values()))
        said = iter(done)
        for i, request in now.items():
            go_on(i, [next(said) for _ in request.tasks])
    return [returned[i] for i in range(len(schedules))]


def in_lockstep(runs: Sequence[LeasedRun], schedules: Sequence[Schedule], pool: Pool, watch: Watch) -> list[int]:
    """Do what the schedules of runs ask for, the same step of all of them in one reading; returns what they return."""
    asking = together(schedules)
    done: list[Done] | None = None
    while True:
        try:
            request = asking.send(done)  # type: ignore[arg-type]
        except StopIteration as ended:
            returned: list[int] = ended.value
            return returned
        if request.more:
            watch.expect(request.more)
            watch.note("expect", bytes=request.more)
        results = _each(runs[0].plan, pool.map(request.step, _by_shard(request.tasks)), request.event, watch)
        said = {result.shard: result for result in results}
        done = [said[task.shard.index] for task in request.tasks]


def _by_shard(tasks: Iterable[LaneTask]) -> list[Task]:
    """The tasks of all runs, those for one shard as one."""
    found: dict[int, list[LaneTask]] = {}
    for task in tasks:
        found.setdefault(task.shard.index, []).append(task)
    return [Task(tuple(lanes)) for _, lanes in sorted(found.items())]


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
