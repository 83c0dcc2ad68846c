"""A worker in a process of its own, on some node of the cluster."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import ray

from pipeline.errors import UserError
from pipeline.pool import Step
from pipeline.recipe import Recipe
from pipeline.shard.task import Done, Task, here
from pipeline.shard.worker import Worker
from pipeline.storage.local import Folder


@dataclass(frozen=True)
class Sight:
    """What every node has to see as the driver does.

    Attributes:
        files: paths of the inputs and their sizes.
        run: path of the output's `fapm/run.json`, and what is in it.
    """

    files: dict[str, int]
    run: tuple[str, bytes]


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

    def start(self, recipe: Recipe, out: Folder, sight: Sight, slots: int) -> tuple[str, str]:
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
            begun = (worker for worker in self._free if worker.has_begun(task.shard))
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
    """
    path, content = sight.run
    try:
        same = Path(path).read_bytes() == content
    except OSError:
        same = False
    missing = [] if same else [path]
    for file, size in sight.files.items():
        if not os.path.isfile(file) or os.path.getsize(file) != size:
            missing.append(file)
    if missing:
        raise UserError(
            f"node {socket.gethostname()} does not see {missing[0]} as the driver does; "
            "give paths on a file system that all nodes share"
        )
