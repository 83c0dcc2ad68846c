"""A pool applies a step to tasks and hands back the results as they finish. Here: threads of this process.

The run is written against `Pool` alone; `fapm.cluster.pool` has the one whose workers are Ray actors.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fapm.errors import DeviceError
from fapm.recipe import Recipe
from fapm.scoring.device import announce, uses_gpu
from fapm.shard.task import Done, Task
from fapm.shard.worker import Worker
from fapm.storage.store import Store

Step = Callable[[Worker, Task, Task | None], Done]
"""A worker's function of a task; the second one will probably follow."""


class Pool(Protocol):
    """Workers.

    Attributes:
        workers: how many there are.
        lost: how many were lost, by how.
    """

    @property
    def workers(self) -> int: ...

    @property
    def lost(self) -> dict[str, int]: ...

    def map(self, step: Step, tasks: Sequence[Task]) -> Iterator[Done]:
        """Apply `step` to every task, each on some worker, and yield results as they finish.

        Raises:
            UserError: from a step; what is under way is stopped.
        """
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


def default_workers(recipe: Recipe, shards: int) -> int:
    """Workers in this process: a worker for every core, as far as there are shards, and one for a GPU."""
    wanted = recipe.workers.most if recipe.workers else (1 if uses_gpu(recipe.device) else cores())
    return max(1, min(wanted, shards))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Did = tuple[int, int]
"""Who finished a task in a step before, and its place among all that were finished."""


def preference(worker: int, did: Did | None) -> tuple[int, int]:
    """How gladly a worker takes a task, the least first: what it finished last, which it may have in memory; what
    nobody did; what others did, their first ones first."""
    if did is None:
        return 1, 0
    return (0, -did[1]) if did[0] == worker else (2, did[1])


class Deal:
    """Hands out tasks. With one comes the next that the same worker will probably get; it is given to another only
    when nothing else is left.

    Args:
        tasks: in the order in which they are wanted.
        did: who finished which shards in the steps before; those of this step are added.
    """

    def __init__(self, tasks: Sequence[Task], did: dict[int, Did]):
        self._waiting = list(tasks)
        self._kept: dict[int, Task] = {}
        self._did, self._before = did, dict(did)
        self._lock = threading.Lock()

    def next(self, worker: int) -> tuple[Task, Task | None] | None:
        """A task and what will probably follow, or None if nothing is left."""
        with self._lock:
            if worker in self._kept:
                task = self._kept.pop(worker)
            elif self._waiting:
                task = self._take(worker)
            elif self._kept:
                task = self._kept.popitem()[1]
            else:
                return None
            if self._waiting:
                self._kept[worker] = self._take(worker)
            return task, self._kept.get(worker)

    def _take(self, worker: int) -> Task:
        best = min(self._waiting, key=lambda task: preference(worker, self._before.get(task.shard.index)))
        self._waiting.remove(best)
        return best

    def done(self, worker: int, shard: int) -> None:
        with self._lock:
            self._did.pop(shard, None)
            self._did[shard] = worker, 1 + max((number for _, number in self._did.values()), default=0)


class Threads:
    """Workers as threads of this process; the loops that take the time do not hold the GIL.

    Args:
        recipe: the run's.
        out: the folder that it holds.
        workers: threads, each with a memory budget of its own.
        progress: told bytes of input dealt with, from any thread.
        say: told if something has to be compiled first.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Store,
        workers: int,
        progress: Callable[[int], None] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.workers = workers
        self.lost: dict[str, int] = {}
        self._did: dict[int, Did] = {}
        self._cancelled = threading.Event()
        self._end_announcing = announce(say)
        self._workers = [Worker(recipe, out, progress, self._cancelled, 1 / workers) for _ in range(workers)]

    def map(self, step: Step, tasks: Sequence[Task]) -> Iterator[Done]:
        deal = Deal(tasks, self._did)
        results: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()

        def work(number: int) -> None:
            try:
                while not self._cancelled.is_set() and (dealt := deal.next(number)):
                    done = step(self._workers[number], *dealt)
                    deal.done(number, done.shard)
                    results.put(done)
            except BaseException as error:  # raised by the thread that asked
                results.put(error)
                self._cancelled.set()

        threads = [threading.Thread(target=work, args=(i,), name=f"worker-{i}") for i in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            for _ in tasks:
                result = results.get()
                if isinstance(result, DeviceError):
                    raise DeviceError(f"{result}; finished shards stay: run the same command again") from result
                if isinstance(result, BaseException):
                    raise result
                yield result
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            for thread in threads:
                thread.join()

    def close(self) -> None:
        self._end_announcing()
        for worker in self._workers:
            worker.close()
