"""A pool applies a step to tasks and hands back the results as they finish. Here: threads of this process.

The run is written against `Pool` alone; `fapm.cluster.pool` has the one whose workers are Ray actors.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fapm.dispatcher import Action, Ask, Dispatcher, Start
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
    wanted = recipe.workers.most if recipe.workers else (1 if recipe.on_device and uses_gpu(recipe.device) else cores())
    return max(1, min(wanted, shards))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Threads:
    """Workers as threads of this process; the loops that take the time do not hold the GIL.

    Args:
        recipe: the run's.
        out: the folder that it holds.
        workers: threads, each with a memory budget of its own.
        progress: told progress bytes, from any thread.
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
        self._dispatcher, self._lock = Dispatcher(workers), threading.Lock()
        for action in self._dispatcher.prepare():
            assert isinstance(action, Ask)
            self._dispatcher.ready(action.worker, 0.0)
        self._cancelled = threading.Event()
        self._end_announcing = announce(say)
        self._workers = [Worker(recipe, out, progress, self._cancelled, 1 / workers) for _ in range(workers)]

    def map(self, step: Step, tasks: Sequence[Task]) -> Iterator[Done]:
        by_index = {task.shard.index: task for task in tasks}
        results: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
        inboxes: list[queue.SimpleQueue[Start | None]] = [queue.SimpleQueue() for _ in range(self.workers)]

        def give(actions: Sequence[Action]) -> None:
            for action in actions:
                if isinstance(action, Start):
                    inboxes[action.worker].put(action)

        def work(number: int) -> None:
            try:
                while (start := inboxes[number].get()) and not self._cancelled.is_set():
                    following = by_index[start.following] if start.following is not None else None
                    done = step(self._workers[number], by_index[start.task], following)
                    with self._lock:  # whoever is done gives out what comes next, also to others
                        give(self._dispatcher.done(number, start.task, 0.0))
                    results.put(done)
            except BaseException as error:  # raised by the thread that asked
                results.put(error)
                self._cancelled.set()

        threads = [threading.Thread(target=work, args=(i,), name=f"worker-{i}") for i in range(self.workers)]
        for thread in threads:
            thread.start()
        with self._lock:
            give(self._dispatcher.begin(dict.fromkeys(by_index, 0.0), 0.0, last=False))
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
            for inbox in inboxes:
                inbox.put(None)
            for thread in threads:
                thread.join()

    def close(self) -> None:
        self._end_announcing()
        for worker in self._workers:
            worker.close()
