"""The pool whose workers are Ray actors. The driver owns the queue; an actor works on one shard at a time.

Only names, offsets and thresholds travel to an actor, and a few numbers back: weights and counts go through the folders
that driver and workers share.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.errors import PassingError, UserError
from pipeline.plan import Plan
from pipeline.pool import Pool, Step
from pipeline.recipe import Recipe
from pipeline.run import Watch
from pipeline.shard.task import Done, Task
from pipeline.shard.worker import Worker


class Actor:
    """A worker in a process of its own. Plain: `ray.remote` wraps it where the pool starts it (safetensors#328)."""

    def __init__(self, recipe: Recipe):
        self._worker = Worker(recipe)

    def run(self, step: Step, task: Task) -> Done:
        return step(self._worker, task)


def ray_pool(address: str) -> Callable[[Plan, Watch], Pool]:
    """What makes a pool on the cluster at `address`; `local` starts one on this machine for the time of the run."""
    return lambda plan, watch: RayPool(plan, watch, address)


class RayPool:
    """Ray actors, one for each GPU of the cluster or, where it has none, each CPU, at most one a shard.

    Raises:
        UserError: the cluster cannot be reached, or an actor cannot start or dies.
    """

    def __init__(self, plan: Plan, watch: Watch, address: str):
        self._watch = watch
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(address, plan.recipe.workers)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(resources.get("GPU", 0)) if plan.recipe.device != "cpu" else 0
        if plan.recipe.device.startswith("cuda") and not gpus:
            raise UserError(f"--device {plan.recipe.device}: the Ray cluster has no GPU; use --device cpu")
        available = gpus or int(resources.get("CPU", 1))
        self.workers = max(1, min(plan.recipe.workers or available, len(plan.shards)))
        remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Actor)
        recipe = _absolute(plan.recipe)
        self._actors: list[Any] = [remote.remote(recipe) for _ in range(self.workers)]

    def wait_until_ready(self) -> None:
        """Return when every actor has been made."""
        ray.get([actor.__ray_ready__.remote() for actor in self._actors])

    def map(self, step: Step, tasks: Sequence[Task]) -> Iterator[Done]:
        waiting = deque(tasks)
        running: dict[Any, int] = {}

        def give(number: int) -> None:
            if waiting:
                running[self._actors[number].run.remote(step, waiting.popleft())] = number

        for number in range(self.workers):
            give(number)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            try:
                done: Done = ray.get(ready)
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                raise PassingError(
                    f"a Ray worker was lost ({_last_line(error)}); finished shards stay: run the same command again"
                ) from error
            give(number)
            self._watch.advance(done.dealt_bytes)
            yield done

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)  # dropping the handle does not always release a worker (ray#59872)
        if self._owns_ray:
            ray.shutdown()


def _connect(address: str, workers: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        _knock(address)
        if address == "local":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            ray.init(address="local", num_cpus=max(cores, workers or 1), **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise PassingError(f"--ray {address}: no Ray cluster answers there ({_last_line(error)})") from None


_KNOCK_SECONDS = 10


def _knock(address: str) -> None:
    """Raise an OSError if nothing listens at `HOST:PORT`; Ray itself tries for some five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()


def _absolute(recipe: Recipe) -> Recipe:
    """The same paths for processes with another working directory."""
    return recipe.model_copy(
        update={side: os.path.abspath(getattr(recipe, side)) for side in ("base", "finetuned", "out")}
    )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
