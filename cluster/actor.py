"""A worker in a process of its own, on some node of the cluster."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ray

from fapm.errors import PassingError, UserError
from fapm.layout import RUN
from fapm.pool import Step
from fapm.recipe import Recipe
from fapm.shard.task import Done, Task, here
from fapm.shard.worker import Worker
from fapm.storage.address import open_store
from fapm.storage.store import Store


@dataclass(frozen=True)
class Sight:
    """Inputs and output as the driver sees them, and as every node has to.

    Attributes:
        files: names and sizes of the files of each input, by its address.
        out: the output, and `run`: what is in its `fapm/run.json`.
    """

    files: dict[str, dict[str, int]]
    out: Store
    run: bytes


class FapmWorker:
    """Works on as many shards at once as it has slots, each on a thread and with a share of the memory.

    Plain: `ray.remote` wraps it where the pool starts it (safetensors#328).
    """

    def __init__(self, name: int):
        self._name = name
        self._free: list[Worker] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"fapm worker {self._name}"

    def start(self, recipe: Recipe, out: Store, sight: Sight, slots: int) -> tuple[str, str]:
        """Make the workers; returns the id of the node, and the host and the process.

        Args:
            recipe: the run's, with the memory of one slot.

        Raises:
            UserError: this node does not see the files that the driver sees, or has no such device.
        """
        check_sight(sight)
        self._free = [Worker(recipe, out, share=recipe.gpus_per_worker or 1.0) for _ in range(slots)]
        node: str = ray.get_runtime_context().get_node_id()
        return node, here()

    def run(self, step: Step, task: Task, following: Task | None) -> Done:
        with self._lock:
            begun = (worker for worker in self._free if worker.prefetch.has_begun(task.shard))
            worker = next(begun, self._free[0])
            self._free.remove(worker)
        try:
            return step(worker, task, following)
        finally:
            with self._lock:
                self._free.append(worker)


def check_sight(sight: Sight) -> None:
    """Whether this node sees the inputs and the output that the driver sees.

    Raises:
        UserError: it does not, with the node and the path.
        PassingError: a store does not answer.
    """
    _look(sight.out, RUN, lambda: sight.out.read(RUN) == sight.run)
    for address, sizes in sight.files.items():
        store = open_store(address)
        for name, size in sizes.items():
            _look(store, name, partial(_has, store, name, size))


def _has(store: Store, name: str, size: int) -> bool:
    return store.has(name) and store.size(name) == size


def _look(store: Store, name: str, is_same: Callable[[], bool]) -> None:
    try:
        if is_same():
            return
        why = "give addresses that mean the same on all nodes"
    except PassingError:
        raise
    except UserError as error:
        why = str(error)
    raise UserError(f"node {socket.gethostname()} does not see {store.at(name)} as the driver does: {why}")
