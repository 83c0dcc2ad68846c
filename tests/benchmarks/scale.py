"""How long large runs should take, by a small model of measured numbers: the table of configs/scale.md.

    python tests/benchmarks/scale.py

A worker reads, computes and writes at the same time, so that the slowest of the three counts; storage that workers
share is divided among them. What every shard costs beside that, and the driver, is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fapm.reporting.advice import CORE_NS

CPU_NS = {"tensor": CORE_NS["once"], "global": CORE_NS["twice"]}
SHARD_SECONDS = 0.04
"""Of a worker that waits until a shard is durable: tests/benchmarks/on_ray.py, 'not work' a shard."""
DRIVER_SECONDS = {"tensor": 0.0029, "global": 0.0029 + 0.0024}
"""Of the driver a shard: tests/benchmarks/driver.py, with and without --ray."""
START_SECONDS = 4.0
"""Until the plan is made and Ray has started the workers: whole_run.py, driver.py --deepseek."""
OBJECT_CPU_SECONDS = 1.0
"""Of a client that reads or writes a GB in an object store: measured with obstore on one machine."""
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Storage:
    """GB/s, of one worker's node and of all together; these are what an operator has to know, not measured here."""

    name: str
    read: float
    write: float
    all_read: float = math.inf
    all_write: float = math.inf
    cpu: float = 0.0  # CPU seconds a GB


STORAGES = (
    Storage("one machine, local NVMe", 6.0, 3.0, all_read=6.0, all_write=3.0),
    Storage("shared file system", 2.0, 1.5, all_read=20.0, all_write=10.0),
    Storage("object store, 25 Gbit/s a node", 2.5, 2.5, cpu=OBJECT_CPU_SECONDS),
)

MODELS = (("70B", 70.6e9, 8), ("671B (DeepSeek-V3)", 684.5e9, 32))


@dataclass(frozen=True)
class Estimate:
    """Seconds of each thing that goes on at the same time, and of all."""

    read: float
    write: float
    compute: float
    total: float
    cpus: int  # of a worker, from which on the storage is what takes longest

    @property
    def bottleneck(self) -> str:
        parts = {"reading": self.read, "writing": self.write, "CPU": self.compute}
        return max(parts, key=lambda part: parts[part])


def estimate(elements: float, workers: int, storage: Storage, scope: str = "tensor", cpus: int = 1) -> Estimate:
    """A bfloat16 pair, on so many workers with so many CPUs each."""
    times = 1.0 if scope == "tensor" else 2.0
    read_gb, written_gb = times * elements * 4 / 1e9, elements * 2 / 1e9
    read = read_gb / min(workers * storage.read, storage.all_read)
    write = written_gb / min(workers * storage.write, storage.all_write)
    work = (elements * CPU_NS[scope] * 1e-9 + storage.cpu * (read_gb + written_gb)) / workers
    shards = elements * 2 / SHARD_BYTES
    beside = START_SECONDS + SHARD_SECONDS * shards / workers / cpus + DRIVER_SECONDS[scope] * workers * cpus
    total = max(read, write, work / cpus) * (1 + workers * cpus / shards / 2) + beside
    return Estimate(read, write, work / cpus, total, math.ceil(work / max(read, write)))


def table() -> str:
    """Markdown."""
    lines = [
        "| model | workers | scope | storage | reading | writing | CPU, one a worker | all | bottleneck | CPUs a worker that are of use | all, with those |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, elements, workers in MODELS:
        for scope in ("tensor", "global"):
            for storage in STORAGES:
                one = estimate(elements, workers, storage, scope)
                best = estimate(elements, workers, storage, scope, one.cpus)
                cells = [name, str(workers), scope, storage.name]
                cells += [f"{seconds:.0f} s" for seconds in (one.read, one.write, one.compute, one.total)]
                cells += [one.bottleneck, str(one.cpus), f"{best.total:.0f} s"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
