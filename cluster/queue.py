"""Which worker does what, decided without doing anything: a state machine is told what happens and says what to do.

The driver owns the queue and workers are expendable. A task that a lost worker had goes back to the queue, a worker
that takes far longer than others did is given up, the last tasks are given to idle workers a second time if they take
long, and the first whole result counts. Tasks that fail have a budget of their own: lost workers do not use it up.

It knows neither Ray nor clocks: time comes with every event, in seconds.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Task = int
"""The index of a shard."""


class Loss(Enum):
    """How a worker was lost."""

    CRASHED = "crashed"
    PREEMPTED = "preempted"
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the cluster for a worker, which will be called `worker`."""

    worker: int


@dataclass(frozen=True, slots=True)
class Start:
    """Give a worker a task; `following` is what it will probably get next."""

    worker: int
    task: Task
    following: Task | None


@dataclass(frozen=True, slots=True)
class Release:
    """End a worker that is not needed, or not to be trusted any more."""

    worker: int


@dataclass(frozen=True, slots=True)
class Accept:
    """The result that a worker gave is the first of its task."""

    worker: int
    task: Task
    tries: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run: a task has failed too often, or workers are lost without end.

    Attributes:
        task: whose error it is; None where workers are lost whatever they do.
    """

    task: Task | None
    why: str


Action = Ask | Start | Release | Accept | Stop


@dataclass(frozen=True, slots=True)
class Limits:
    """What is too often, and what is too long.

    Attributes:
        failures: of one task, on different workers where there are several.
        crashes_of_a_task: workers that were lost while they had one task, preempted ones apart.
        crashes: workers that were lost since the last result, preempted ones apart.
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
    task: Task | None = None
    since: float = 0.0

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None and not self.draining


@dataclass
class Queue:
    """Workers that live as long as the run, and the tasks of one step after the other.

    Args:
        wanted: workers to ask for, as long as there are so many tasks.
        limits: what is too often, and what is too long.
    """

    wanted: int
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._names = 0
        self._sizes: dict[Task, float] = {}
        self._waiting: deque[Task] = deque()
        self._left: set[Task] = set()
        self._last = True
        self._tries: dict[Task, int] = {}
        self._failed: dict[Task, list[int]] = {}
        self._crashes: dict[Task, int] = {}
        self._paces: list[float] = []
        self._lost_in_a_row = 0
        self.losses = dict.fromkeys(Loss, 0)

    # What is asked of it.

    @property
    def finished(self) -> bool:
        """Whether every task of the step has its result."""
        return not self._left

    @property
    def waiting_for_workers(self) -> bool:
        """Whether there are tasks and no worker is ready."""
        return not self.finished and not any(w.ready for w in self._workers.values())

    @property
    def ready_workers(self) -> int:
        return sum(w.ready for w in self._workers.values())

    def workers_on(self, task: Task) -> list[int]:
        return [name for name, w in self._workers.items() if w.task == task]

    # What it is told. Each returns what to do now.

    def prepare(self) -> list[Action]:
        """Steps will follow: ask for workers now."""
        return self._ask(self.wanted)

    def begin(self, sizes: Mapping[Task, float], now: float, last: bool) -> list[Action]:
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
        self._tries, self._failed, self._crashes, self._paces = {}, {}, {}, []
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
        return self._go_on(now)

    def done(self, worker: int, task: Task, now: float) -> list[Action]:
        """A worker has the result of a task."""
        self._lost_in_a_row = 0
        found = self._workers.get(worker)
        if found and found.task == task:
            found.task = None
            if self._sizes.get(task, 0) > 0:
                self._paces.append((now - found.since) / self._sizes[task])
        if task not in self._left:
            return self._go_on(now)  # another worker was faster
        self._left.discard(task)
        self._put_away(task)
        accepted: list[Action] = [Accept(worker, task, self._tries.get(task, 1))]
        beaten = [Release(name) for name in self.workers_on(task)]
        for release in beaten:
            del self._workers[release.worker]
        return [*accepted, *beaten, *self._go_on(now)]

    def failed(self, worker: int, task: Task, why: str, now: float, hopeless: bool = False) -> list[Action]:
        """A task has raised an error on a worker that goes on living.

        Args:
            hopeless: it would do the same anywhere.
        """
        found = self._workers.get(worker)
        if found and found.task == task:
            found.task = None
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
        gone = self._workers.pop(worker, None)
        if gone is None:
            return self._go_on(now)
        self.losses[how] += 1
        task = gone.task
        if task is not None and task in self._left:
            self._put_back(task)
        if how is not Loss.PREEMPTED:
            self._lost_in_a_row += 1
            if task is not None and task in self._left:
                self._crashes[task] = self._crashes.get(task, 0) + 1
                if self._crashes[task] >= self.limits.crashes_of_a_task:
                    return [Stop(task, f"{self._crashes[task]} workers were lost while they had it")]
            if self._lost_in_a_row >= self.limits.crashes:
                return [Stop(None, f"{self._lost_in_a_row} workers were lost one after the other")]
        return self._go_on(now)

    def tick(self, now: float) -> list[Action]:
        """Some time has passed."""
        hung = [
            name
            for name, w in self._workers.items()
            if w.task is not None
            and now - w.since > self._too_long(w.task, self.limits.hung_factor, self.limits.hung_seconds)
        ]
        actions: list[Action] = []
        for name in hung:
            actions += [Release(name), *self.lost(name, Loss.HUNG, now)]
            if any(isinstance(action, Stop) for action in actions):
                return actions
        return [*actions, *self._go_on(now)]

    # How it decides.

    def _go_on(self, now: float) -> list[Action]:
        """Give idle workers something to do, and ask for workers or let them go."""
        actions: list[Action] = []
        idle = deque(name for name, w in self._workers.items() if w.idle)
        while idle and self._waiting:
            worker = idle.popleft()
            task = self._next_for(worker)
            if task is not None:
                self._waiting.remove(task)
                actions.append(self._start(worker, task, now))
        for worker in idle if not self._waiting else ():
            slow = self._slowest(worker, now)
            if slow is not None:
                actions.append(self._start(worker, slow, now))
        return [*actions, *self._fit()]

    def _start(self, worker: int, task: Task, now: float) -> Start:
        self._workers[worker].task = task
        self._workers[worker].since = now
        self._tries[task] = self._tries.get(task, 0) + 1
        return Start(worker, task, self._waiting[0] if self._waiting else None)

    def _next_for(self, worker: int) -> Task | None:
        """The first waiting task that has not failed on this worker, unless it has on all that could take it."""
        able = [name for name, w in self._workers.items() if not w.draining]
        for task in self._waiting:
            failed = self._failed.get(task, [])
            if worker not in failed or all(name in failed for name in able):
                return task
        return None

    def _slowest(self, worker: int, now: float) -> Task | None:
        """A task that one worker has had for long, and this one might finish sooner."""
        slow = [
            (now - w.since, task)
            for w in self._workers.values()
            if (task := w.task) is not None
            and len(self.workers_on(task)) == 1
            and worker not in self._failed.get(task, [])
            and now - w.since > self._too_long(task, self.limits.slow_factor, self.limits.slow_seconds)
        ]
        return max(slow, key=lambda item: item[0])[1] if slow else None

    def _too_long(self, task: Task, factor: float, seconds: float) -> float:
        if not self._paces:
            return self.limits.unknown_seconds
        return max(seconds, factor * statistics.median(self._paces) * self._sizes.get(task, 0))

    def _fit(self) -> list[Action]:
        """As many workers as are wanted for the tasks that are left."""
        staying = {name: w for name, w in self._workers.items() if not w.draining}
        actions: list[Action] = []
        for name, w in list(self._workers.items()):
            if w.draining and w.task is None:
                del self._workers[name]
                actions.append(Release(name))
        if self._last and not self._waiting and self._left:
            spare = 1  # for a task that takes long
            for name, w in staying.items():
                if w.idle and spare:
                    spare -= 1
                elif w.task is None:
                    del self._workers[name]
                    actions.append(Release(name))
            return actions
        return [*actions, *self._ask(min(self.wanted, len(self._left)) - len(staying))]

    def _ask(self, count: int) -> list[Action]:
        names = range(self._names, self._names + max(0, count))
        self._names = names.stop
        self._workers |= {name: _Worker() for name in names}
        return [Ask(name) for name in names]

    def _put_back(self, task: Task) -> None:
        if task not in self._waiting and not self.workers_on(task):
            self._waiting.appendleft(task)

    def _put_away(self, task: Task) -> None:
        if task in self._waiting:
            self._waiting.remove(task)
