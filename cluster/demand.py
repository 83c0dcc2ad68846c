"""Demand on the cluster: how many workers, and the resources of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fapm.errors import UserError
from fapm.recipe import LEAST_MEMORY, Recipe, Workers, binary, format_bytes, how
from fapm.shard import staging
from fapm.shard.reading import ENOUGH_BYTES, OVERHEAD_BYTES
from fapm.storage.address import scheme_of

PROCESS_BYTES = 384 << 20
"""Memory of an actor beside the budgets of its slots: the interpreter, Ray, what numba compiled. Its peak was 297 MB
in all under `--memory 64MiB`, and 545 MB under 1GiB, in global scope of a pair of 4.4 GB."""

DEVICE_BYTES = 1 << 30
"""More of one with a GPU: torch's libraries, and the driver's part. Assumed, not measured: none was lent."""


@dataclass(frozen=True)
class Demand:
    """Workers for a run.

    Attributes:
        workers: how many to ask for, and how many to begin with.
        slots: shards that one works on at once: its CPUs, or one where it has a GPU.
        memory: bytes, of each slot.
        options: Ray's, of the actor.
    """

    workers: Workers
    cpus: int
    gpus: float
    slots: int
    memory: int
    options: dict[str, Any]

    def __str__(self) -> str:
        parts = [f"{self.cpus} CPU"]
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{format_bytes(self.options['memory'])} of memory"]
        parts += [self.options["accelerator_type"]] if "accelerator_type" in self.options else []
        parts += [f"{key}={value}" for key, value in self.options.get("label_selector", {}).items()]
        return ", ".join(parts)

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe of one slot. A worker's only GPU, or its part of one, is always called `cuda`."""
        return recipe.model_copy(update={"memory": self.memory, "device": "cuda" if self.gpus else "cpu"})


def demand(recipe: Recipe, shards: int, cluster: Mapping[str, float]) -> Demand:
    """Workers that a run asks for.

    Args:
        shards: how many there are; more workers than those are of no use.
        cluster: what there is now, as `ray.cluster_resources` says.

    Raises:
        UserError: a GPU is wanted and excluded, or there is none; or the memory is too small to be divided.
    """
    cpus, gpus = recipe.cpus_per_worker or 1, recipe.gpus_per_worker
    if not recipe.on_device:
        if gpus:
            raise UserError(f"--gpus-per-worker: {how(recipe.model_dump())} uses no GPU; leave it out")
        recipe = recipe.model_copy(update={"device": "cpu"})
    if recipe.device.startswith("cuda") and gpus == 0:
        raise UserError(f"--device {recipe.device} needs a GPU and --gpus-per-worker is 0")
    if recipe.device == "cpu" and gpus:
        raise UserError("--device cpu uses no GPU; leave --gpus-per-worker out")
    if gpus is None:
        here = cluster.get("GPU", 0) >= 1 and recipe.device != "cpu"
        if recipe.device.startswith("cuda") and not here:
            raise UserError(
                f"--device {recipe.device}: the Ray cluster has no GPU now; use --device cpu, or --gpus-per-worker 1 "
                "to wait for one"
            )
        gpus = 1.0 if here or (recipe.accelerator and recipe.device != "cpu") else 0.0
    slots = 1 if gpus else cpus
    memory = recipe.memory // slots
    if memory < LEAST_MEMORY:
        raise UserError(
            f"--memory {binary(recipe.memory)}: at least {binary(LEAST_MEMORY)} for each of the {slots} CPUs of a "
            f"worker, {binary(LEAST_MEMORY * slots)}"
        )
    now = cluster.get("GPU", 0) / gpus if gpus else cluster.get("CPU", 0) / cpus
    wanted = recipe.workers or Workers(1, max(1, int(now)))
    most = max(1, min(wanted.most, -(-shards // slots)))
    # Never restarted by Ray: the dispatcher asks for another one, and knows that it has.
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}
    if slots > 1:
        options["max_concurrency"] = slots
    far = any(map(scheme_of, recipe.checkpoints))  # inputs that are worth keeping in memory
    buffers = memory if far else OVERHEAD_BYTES + ENOUGH_BYTES + (staging.ENOUGH_BYTES if gpus else 0)
    options["memory"] = PROCESS_BYTES + (DEVICE_BYTES if gpus else 0) + slots * min(memory, buffers)
    if recipe.accelerator:
        options["accelerator_type"] = recipe.accelerator
    if recipe.labels:
        options["label_selector"] = dict(label.split("=", 1) for label in recipe.labels)
    return Demand(Workers(min(wanted.least, most), most), cpus, gpus, slots, memory, options)
