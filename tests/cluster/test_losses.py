"""pytest tests/cluster/test_losses.py: nodes and workers are killed, on real Ray with several nodes on one machine."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digests, gaussian
from conftest import Runner

from pipeline import UserError, prune
from pipeline.run import Result, Watch

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402 - needs ray

from cluster.actor import Sight  # noqa: E402
from cluster.pool import RayPool, ray_pool  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STORE = 80_000_000
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_timeout_ms": 300,
    "health_check_failure_threshold": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without CPUs; tests add the nodes that they need."""
    arguments = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add(nodes: Cluster) -> Iterator[Callable[[], Any]]:
    added: list[Any] = []

    def one() -> Any:
        added.append(nodes.add_node(num_cpus=1, object_store_memory=STORE))
        return added[-1]

    yield one
    for node in added:
        if node in nodes.worker_nodes:
            nodes.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Thirty shards of some 60 ms each."""
    runner = Runner(tmp_path_factory.mktemp("model"))
    shapes = {f"model.layers.{i}.w": (3000, 1000) for i in range(30)}
    runner.write(*gaussian(shapes, torch.bfloat16))
    return runner


@pytest.fixture(scope="module")
def undisturbed(model: Runner) -> dict[str, dict[str, str]]:
    return {scope: digests(model.prune(scope=scope, shard_size="6MB")[0]) for scope in ("tensor", "layer", "global")}


def processes(pool: RayPool) -> list[int]:
    """The workers that have finished something."""
    log = [json.loads(line) for line in (pool._out.path / "fapm" / "log.jsonl").read_text().splitlines()]
    return sorted({int(event["where"].split(":")[1]) for event in log if event["event"] == "shard"})


def run(
    model: Runner, scope: str, after: int, disturb: Callable[[RayPool], None], all_ready: bool = True
) -> tuple[Result, Path, list[str]]:
    """A run of two workers that is disturbed once, after so many shards."""
    pools: list[RayPool] = []
    said: list[str] = []

    def pool(plan: Any, out: Any, watch: Watch) -> RayPool:
        pools.append(RayPool(plan, out, watch, "auto"))
        if all_ready:
            pools[0].wait_until_ready()
        return pools[0]

    def say(line: str) -> None:
        said.append(line)
        if sum(line.startswith("model-") for line in said) == after and line.startswith("model-"):
            disturb(pools[0])

    recipe = model.recipe(scope=scope, shard_size="6MB", workers=2)
    return prune(recipe, pool=pool, watch=Watch(say=say)), Path(recipe.out), said


@pytest.mark.parametrize(("scope", "seed"), [("tensor", 0), ("layer", 1), ("global", 2), ("tensor", 3)])
def test_a_node_that_is_killed_costs_time_only(model, undisturbed, nodes, add, scope, seed):
    first, second = add(), add()
    victim = random.Random(seed).choice([first, second])
    after = random.Random(seed).randint(2, 20)
    killed: list[int] = []  # shards that were still to do

    def kill(pool: RayPool) -> None:
        killed.append(len(pool._queue._left))
        nodes.remove_node(victim, allow_graceful=False)

    result, out, _ = run(model, scope, after, kill)
    assert digests(out) == undisturbed[scope]
    assert killed
    assert killed[0] >= 5
    assert result.resumed == 0


def test_with_no_node_left_the_run_waits_for_one(model, undisturbed, nodes, add):
    only = add()

    def lose_and_find(pool: RayPool) -> None:
        nodes.remove_node(only, allow_graceful=False)
        add()

    _, out, _ = run(model, "tensor", 5, lose_and_find, all_ready=False)
    assert digests(out) == undisturbed["tensor"]


def test_a_node_that_joins_in_the_middle_gets_work(model, undisturbed, nodes, add):
    add()
    joined: list[Any] = []
    result, out, _ = run(model, "tensor", 3, lambda pool: joined.append(add()), all_ready=False)
    assert digests(out) == undisturbed["tensor"]
    assert result.manifest["workers"] == 2


@pytest.mark.parametrize("seed", range(3))
def test_workers_that_are_killed_cost_time_only(model, undisturbed, nodes, add, seed):
    add(), add()
    scope = ["tensor", "layer", "global"][seed]

    def kill(pool: RayPool) -> None:
        os.kill(random.Random(seed).choice(processes(pool)), signal.SIGKILL)

    _, out, said = run(model, scope, 2 + 3 * seed, kill)
    assert digests(out) == undisturbed[scope]
    assert sum("done elsewhere" in line for line in said) == 1


def test_a_node_that_does_not_see_the_files_is_named_at_once(model, nodes, add, monkeypatch):
    add()
    monkeypatch.setattr("cluster.pool._sight", lambda *_: Sight({"/not/there": 5}, ("/nor/this", b"")))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"node .* does not see /nor/this as the driver does"):
        prune(model.recipe(shard_size="6MB", workers=1), pool=ray_pool("auto"))
    assert time.monotonic() - began < 30
