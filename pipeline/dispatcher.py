"""The dispatcher: a state machine that is told what happens to workers and tasks, and says what to do next.

The driver owns the tasks and workers are expendable. A task that a lost worker had waits again, a worker
that takes far longer than others did is given up, the last tasks are given to idle workers a second time if they take
long, and the first whole result counts. Tasks that fail have a budget of their own: lost workers do not use it up.

A worker with a task keeps the one that it gets next, so that it can begin to read for it; others take that one only
when nothing else is waiting. What it did in the step before it gets again, as far as it can be had, its last first.

It knows neither threads nor Ray nor clocks: time comes with every event, in seconds. `docs/architecture.md` draws its
states.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

ShardIndex = int

Did = tuple[int, int]
"""The worker that finished a task in a step before, and the task's place among all that were finished."""


def preference(worker: int, did: Did | None) -> tuple[int, int]:
    """How gladly a worker takes a task, the least first: what it finished last, which it may have in memory; what
    nobody did; what others did, their first ones first."""
    if did is None:
        return 1, 0
    return (0, -did[1]) if did[0] == worker else (2, did[1])


class Loss(Enum):
    """How a worker was lost."""

    CRASHED = "crashed"
    PREEMPTED = "preempted"
    HUNG = "hung"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the cluster for a worker, which will be called `worker`."""

    worker: int


@dataclass(frozen=True, slots=True)
class Start:
    """Give a worker a task; `following` is what it keeps, and will probably get next."""

    worker: int
    task: ShardIndex
    following: ShardIndex | None


@dataclass(frozen=True, slots=True)
class Release:
    """End a worker that is not needed, or not to be trusted any more; `lost` says how, if it counts as lost."""

    worker: int
    lost: Loss | None = None


@dataclass(frozen=True, slots=True)
class Accept:
    """The result that a worker gave is the first of its task."""

    worker: int
    task: ShardIndex
    tries: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run: a task has failed too often, or workers are lost without end.

    Attributes:
        task: whose error it is; None where workers are lost whatever they do.
    """

    task: ShardIndex | None
    why: str


Action = Ask | Start | Release | Accept | Stop


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits: what is too often, and what is too long.

    Attributes:
        failures: of one task, on different workers where there are several.
        crashes_of_a_task: workers that were lost while they had one task, preempted ones apart.
        crashes: workers that were lost since the last result, preempted ones apart; at least three times those that
            are wanted, since a rack goes at once.
        hung_factor: a worker is given up after so many times what its task should take, and `hung_seconds` at least.
        slow_factor: a task is given to a second worker after so many times that, and `slow_seconds` at least.
        unknown_seconds: after this long where no task has been finished yet to compare with.
    """

    failures: int = 3
    crashes_of_a_task: int = 5
    crashes: int = 20
    hung_factor: float = 10.0
    hung_seconds: float = 120.0
    slow_factor: float = 2.0
    slow_seconds: float = 5.0
    unknown_seconds: float = 3600.0


@dataclass(slots=True)
class _Worker:
    ready: bool = False
    draining: bool = False
    tasks: dict[ShardIndex, float] = field(default_factory=dict)  # and since when

    @property
    def able(self) -> bool:
        return self.ready and not self.draining


@dataclass
class Dispatcher:
    """Workers that live as long as the run, and the tasks of one step after the other.

    Args:
        wanted: workers to ask for, as long as there are tasks for them.
        limits: what is too often, and what is too long.
        least: workers that have to be ready before the first task is given out.
        slots: tasks that a worker has at once.
    """

    wanted: int
    limits: Limits = field(default_factory=Limits)
    least: int = 1
    slots: int = 1

    def __post_init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._names = 0
        self._sizes: dict[ShardIndex, float] = {}
        self._waiting: deque[ShardIndex] = deque()
        self._kept: dict[ShardIndex, int] = {}  # of those that wait: the worker that gets it next
        self._did: dict[ShardIndex, Did] = {}
        self._before: dict[ShardIndex, Did] = {}  # this step
        self._number = 0
        self._gathered = False
        self._left: set[ShardIndex] = set()
        self._last = True
        self._tries: dict[ShardIndex, int] = {}
        self._failed: dict[ShardIndex, list[int]] = {}
        self._crashes: dict[ShardIndex, int] = {}
        self._paces: list[float] = []  # seconds a unit of work, in order
        self._lost_in_a_row = 0
        self.losses = dict.fromkeys(Loss, 0)
        self.lost_tries = 0  # tasks that went with their workers

    # What is asked of it.

    @property
    def finished(self) -> bool:
        """Whether every task of the step has its result."""
        return not self._left

    @property
    def waiting_for_workers(self) -> bool:
        """Whether there are tasks, and too few workers are ready to begin."""
        return not self.finished and (not self._gathered or not self.ready_workers)

    @property
    def ready_workers(self) -> int:
        return sum(w.ready for w in self._workers.values())

    @property
    def pending_workers(self) -> int:
        """Workers that were asked for and cannot begin yet."""
        return len(self._workers) - self.ready_workers

    def workers_on(self, task: ShardIndex) -> list[int]:
        return [name for name, w in self._workers.items() if task in w.tasks]

    # What it is told. Each returns what to do now.

    def prepare(self) -> list[Action]:
        """Steps will follow: ask for workers now."""
        return self._ask(self.wanted)

    def begin(self, sizes: Mapping[ShardIndex, float], now: float, last: bool) -> list[Action]:
        """A step begins.

        Args:
            sizes: the tasks in the order in which they are wanted, and how much work each is.
            last: no step follows, so that workers may go when nothing is left for them.
        """
        assert self.finished, "a step is under way"
        self._sizes = dict(sizes)
        self._waiting = deque(sizes)
        self._left = set(sizes)
        self._last = last
        self._before = dict(self._did)
        self._kept, self._tries, self._failed, self._crashes, self._paces = {}, {}, {}, {}, []
        return self._go_on(now)

    def ready(self, worker: int, now: float) -> list[Action]:
        """A worker that was asked for can begin."""
        if worker in self._workers:
            self._workers[worker].ready = True
        return self._go_on(now)

    def draining(self, worker: int, now: float) -> list[Action]:
        """The node of a worker will go away soon: what it has may be finished, but it gets nothing new."""
        if worker in self._workers:
            self._workers[worker].draining = True
            self._keep_nothing(worker)
        return self._go_on(now)

    def done(self, worker: int, task: ShardIndex, now: float) -> list[Action]:
        """A worker has the result of a task."""
        self._lost_in_a_row = 0
        since = self._end(worker, task)
        if since is not None and self._sizes.get(task, 0) > 0:
            bisect.insort(self._paces, (now - since) / self._sizes[task])
        if task not in self._left:
            return self._go_on(now)  # another worker was faster
        self._left.discard(task)
        self._number += 1
        self._did[task] = worker, self._number
        self._put_away(task)
        accepted: list[Action] = [Accept(worker, task, self._tries.get(task, 1))]
        beaten = [Release(name) for name in self.workers_on(task) if len(self._workers[name].tasks) == 1]
        for release in beaten:
            self._drop(release.worker)
        return [*accepted, *beaten, *self._go_on(now)]

    def failed(self, worker: int, task: ShardIndex, why: str, now: float, hopeless: bool = False) -> list[Action]:
        """A task has raised an error on a worker that goes on living.

        Args:
            hopeless: it would do the same anywhere.
        """
        self._end(worker, task)
        if task not in self._left:
            return self._go_on(now)
        failures = self._failed.setdefault(task, [])
        failures.append(worker)
        if hopeless or len(failures) >= self.limits.failures:
            return [Stop(task, why)]
        self._put_back(task)
        return self._go_on(now)

    def lost(self, worker: int, how: Loss, now: float) -> list[Action]:
        """A worker is gone, with whatever it had."""
        stop = self._lose(worker, how)
        return [stop] if stop else self._go_on(now)

    def _lose(self, worker: int, how: Loss) -> Stop | None:
        gone = self._drop(worker)
        if gone is None:
            return None
        self.losses[how] += 1
        had = [task for task in gone.tasks if task in self._left]
        self.lost_tries += len(had)
        for task in had:
            self._put_back(task)
        if how is not Loss.PREEMPTED:
            self._lost_in_a_row += 1
            for task in had if how is not Loss.DEVICE else ():  # no task is to blame for that
                self._crashes[task] = self._crashes.get(task, 0) + 1
                if self._crashes[task] >= self.limits.crashes_of_a_task:
                    return Stop(task, f"{self._crashes[task]} workers were lost while they had it")
            if self._lost_in_a_row >= max(self.limits.crashes, 3 * self.wanted):
                return Stop(None, f"{self._lost_in_a_row} workers were lost one after the other")
        return None

    def tick(self, now: float) -> list[Action]:
        """Some time has passed."""
        hung = [
            name
            for name, w in self._workers.items()
            if any(now - since > self._hung_after(task) for task, since in w.tasks.items())
        ]
        stops = [stop for name in hung if (stop := self._lose(name, Loss.HUNG))]
        return [*(Release(name, Loss.HUNG) for name in hung), *(stops[:1] or self._go_on(now))]

    # How it decides.

    def _go_on(self, now: float) -> list[Action]:
        """Give workers that can take it something to do, and ask for workers or let them go."""
        given: list[tuple[int, ShardIndex]] = []
        needed = min(self.least, self.wanted, -(-len(self._left) // self.slots))
        self._gathered = self._gathered or self.ready_workers >= max(1, needed)
        while self._gathered and self._waiting and (taken := self._take()):
            self._give(*taken, now)
            given.append(taken)
        for worker in self._free() if self._gathered and not self._waiting else ():
            slow = self._slowest(worker, now)
            if slow is not None:
                self._give(worker, slow, now)
                given.append((worker, slow))
        starts = [Start(worker, task, self._keep_for(worker)) for worker, task in given]
        return [*starts, *self._fit()]

    def _free(self) -> list[int]:
        """Workers that can take a task, those with the fewest first."""
        able = [(len(w.tasks), name) for name, w in self._workers.items() if w.able and len(w.tasks) < self.slots]
        return [name for _, name in sorted(able)]

    def _take(self) -> tuple[int, ShardIndex] | None:
        """A worker and a task for it that was waiting."""
        for worker in self._free():
            task = self._take_for(worker)
            if task is not None:
                return worker, task
        return None

    def _take_for(self, worker: int) -> ShardIndex | None:
        """A waiting task: the one that the worker keeps, else one that nobody keeps, else any; of those the one that
        it prefers.

        Not one that has failed on this worker, unless it has on all that could take it.
        """
        able = [name for name, w in self._workers.items() if not w.draining]
        best: tuple[tuple[int, int, int], ShardIndex] | None = None
        for task in self._waiting:
            failed = self._failed.get(task, [])
            if worker in failed and not all(name in failed for name in able):
                continue
            keeper = self._kept.get(task)
            if keeper == worker:
                best = (0, 0, 0), task
                break
            rank = (1 if keeper is None else 2, *preference(worker, self._before.get(task)))
            if best is None or rank < best[0]:
                best = rank, task
        if best is None:
            return None
        self._put_away(best[1])
        return best[1]

    def _give(self, worker: int, task: ShardIndex, now: float) -> None:
        self._workers[worker].tasks[task] = now
        self._tries[task] = self._tries.get(task, 0) + 1

    def _keep_for(self, worker: int) -> ShardIndex | None:
        """A task that is waiting, for the worker to keep, if there is one and it has room."""
        if list(self._kept.values()).count(worker) >= self.slots:
            return None
        free = (t for t in self._waiting if t not in self._kept and worker not in self._failed.get(t, []))
        task = min(free, key=lambda task: preference(worker, self._before.get(task)), default=None)
        if task is not None:
            self._kept[task] = worker
        return task

    def _slowest(self, worker: int, now: float) -> ShardIndex | None:
        """A task that one worker has had for long, and this one might finish sooner."""
        slow = [
            (now - since, task)
            for name, w in self._workers.items()
            for task, since in w.tasks.items()
            if name != worker
            and task in self._left
            and len(self.workers_on(task)) == 1
            and worker not in self._failed.get(task, [])
            and now - since > self._too_long(task, self.limits.slow_factor, self.limits.slow_seconds)
        ]
        return max(slow)[1] if slow else None

    def _hung_after(self, task: ShardIndex) -> float:
        return self._too_long(task, self.limits.hung_factor, self.limits.hung_seconds)

    def _too_long(self, task: ShardIndex, factor: float, seconds: float) -> float:
        if not self._paces:
            return self.limits.unknown_seconds
        return max(seconds, factor * self._paces[len(self._paces) // 2] * self._sizes.get(task, 0))

    def _fit(self) -> list[Action]:
        """As many workers as are wanted for the tasks that are left."""
        staying = {name: w for name, w in self._workers.items() if not w.draining}
        leaving = [name for name, w in self._workers.items() if w.draining and not w.tasks]
        if self._last and not self._waiting and self._left:
            idle = [name for name, w in staying.items() if not w.tasks]
            spare = next((name for name in idle if staying[name].ready), None)  # for a task that takes long
            leaving += [name for name in idle if name != spare]
            asked = []
        else:
            asked = self._ask(min(self.wanted, -(-len(self._left) // self.slots)) - len(staying))
        for name in leaving:
            self._drop(name)
        return [*(Release(name) for name in leaving), *asked]

    def _ask(self, count: int) -> list[Action]:
        names = range(self._names, self._names + max(0, count))
        self._names = names.stop
        self._workers |= {name: _Worker() for name in names}
        return [Ask(name) for name in names]

    def _put_back(self, task: ShardIndex) -> None:
        if task not in self._waiting and not self.workers_on(task):
            self._waiting.appendleft(task)

    def _put_away(self, task: ShardIndex) -> None:
        self._kept.pop(task, None)
        if task in self._waiting:
            self._waiting.remove(task)

    def _end(self, worker: int, task: ShardIndex) -> float | None:
        """A worker has a task no more; returns since when it had it, if it had."""
        found = self._workers.get(worker)
        return found.tasks.pop(task, None) if found else None

    def _drop(self, worker: int) -> _Worker | None:
        """A worker is there no more."""
        self._keep_nothing(worker)
        return self._workers.pop(worker, None)

    def _keep_nothing(self, worker: int) -> None:
        self._kept = {task: keeper for task, keeper in self._kept.items() if keeper != worker}
