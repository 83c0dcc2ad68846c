"""Ray clusters of several nodes on this machine, for tests that lose some of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from checkpoints import digests, gaussian
from conftest import Runner

from fapm import Recipe
from fapm.recipe import command_words

STORE = 80_000_000
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_timeout_ms": 300,
    "health_check_failure_threshold": 3,
}  # fmt: skip


@contextmanager
def head_alone() -> Iterator[Any]:
    """A cluster with a head that has no CPUs; nodes are added to it."""
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, **how: Any) -> Any:
    return cluster.add_node(**{"num_cpus": 1, "object_store_memory": STORE, **how})


def actors(node: Any) -> list[int]:
    """The processes of the workers on a node."""
    return workers_of(node.all_processes["raylet"][0].process.pid)


def workers_of(raylet: int) -> list[int]:
    return [pid for pid in children(raylet) if is_worker(pid)]


def is_worker(pid: int) -> bool:
    return _title(pid).startswith((b"ray::FapmWorker", b"ray::fapm"))


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return [*found, *(inner for child in found for inner in descendants(child))]


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def started_node(address: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node started as a user starts one: SIGTERM to this process is the notice that the node will go away."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1", "--block"]
    process = subprocess.Popen(
        [*command, f"--object-store-memory={STORE}", "--disable-usage-stats"], env={**os.environ, **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with ended(process):
        yield process


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """At the end, end a process gently, and what it has started by force."""
    try:
        yield
    finally:
        left = descendants(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in [process.pid, *left]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def raylet_of(node: subprocess.Popen[bytes]) -> int | None:
    return next((pid for pid in children(node.pid) if b"raylet/raylet" in _title(pid)), None)


SCOPES = ("tensor", "layer", "global")
CHOICES: dict[str, Any] = {"shard_size": "6MB", "workers": 2}


def thirty_shards(folder: Path) -> Runner:
    """A pair that `CHOICES` cut into thirty shards of some 60 ms, two a layer."""
    runner = Runner(folder)
    runner.write(*gaussian({f"model.layers.{i // 2}.{'ab'[i % 2]}": (3000, 1000) for i in range(30)}, torch.bfloat16))
    return runner


def undisturbed_runs(model: Runner) -> dict[str, dict[str, str]]:
    """The digests of what comes out by each scope."""
    return {scope: digests(model.prune(scope=scope, **CHOICES)[0]) for scope in SCOPES}


def finished_shards(out: Path) -> list[dict[str, Any]]:
    """What the log of an output folder says of each finished shard, and the process that finished it."""
    events = [json.loads(line) for line in (out / "fapm" / "log.jsonl").read_text().splitlines()]
    return [{**e, "process": int(e["where"].split(":")[1])} for e in events if e["event"] == "shard"]


class Driver:
    """`fapm prune` in a process of its own."""

    def __init__(self, recipe: Recipe, address: str, **environment: str):
        self.out, self.lines = Path(recipe.out), list[str]()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fapm", *command_words(recipe), "--ray", address],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def shards(self) -> int:
        """How many it has said are finished."""
        return sum(line.startswith("[") for line in self.lines)

    @property
    def manifest(self) -> dict[str, Any] | None:
        path = self.out / "fapm" / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def wait(self) -> int:
        try:
            code = self.process.wait()
        finally:
            self.kill()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()
