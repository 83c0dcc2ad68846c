"""pytest tests/cluster/test_chaos.py: whatever is killed whenever, the run ends in the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import digests
from conftest import Runner
from nodes import CHOICES, SCOPES, Driver, actors, add_node, head_alone, thirty_shards, undisturbed_runs
from pace import wait_until

from fapm.storage.lease import lease

pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with head_alone() as started:
        for _ in range(2):
            add_node(started)
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return thirty_shards(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model: Runner) -> dict[str, dict[str, str]]:
    return undisturbed_runs(model)


def kill_something(kind: str, driver: Driver, cluster: Any, chance: random.Random) -> bool:
    """Whether there was something to kill in the middle of the run."""
    if driver.process.poll() is not None:
        return False
    if kind == "driver":
        driver.kill()
        return driver.manifest is None
    node = chance.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id))
    if kind == "node":
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster)
        return True
    victims = actors(node)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    return bool(victims)


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random(model, undisturbed, cluster, seed):
    """A round in which the run was over before, or did not miss what was killed, does not count: it is done again."""
    for attempt in range(5):
        chance = random.Random(1000 * attempt + seed)
        kind, scope = ("worker", "node", "driver")[seed % 3], SCOPES[seed // 3 % 3]
        recipe = model.recipe(scope=scope, **CHOICES)
        driver = Driver(recipe, cluster.address)
        after = chance.randint(0, 20)
        begun = driver.out / "fapm" / "work"
        wait_until(lambda d=driver, n=after, b=begun: (b.exists() and d.shards >= n) or d.process.poll() is not None)
        time.sleep(chance.uniform(0, 0.2 if after or scope == "tensor" else 1))
        killed = kill_something(kind, driver, cluster, chance)
        if kind == "driver":
            driver = Driver(recipe, cluster.address)
        assert driver.wait() == 0, driver.lines
        assert digests(Path(recipe.out)) == undisturbed[scope]
        assert driver.manifest
        if kind != "driver":
            killed = killed and bool(driver.manifest["lost_workers"])
        if killed:
            return
    pytest.fail("the run was always over")


def test_a_second_driver_is_told_who_is_at_work(model, undisturbed, cluster):
    recipe = model.recipe(**CHOICES)
    with lease(recipe.out):
        second = Driver(recipe, cluster.address)
        assert second.wait() == 75
    who = rf"is being written by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-"
    assert re.search(who, second.lines[-1])
    third = Driver(recipe, cluster.address)
    assert third.wait() == 0
    assert digests(Path(recipe.out)) == undisturbed["tensor"]


def test_a_driver_whose_cluster_dies_goes_on_on_another(model, undisturbed, cluster):
    """As a job that is retried on a new cluster."""
    recipe = model.recipe(scope="layer", **CHOICES)
    with head_alone() as first:
        add_node(first)
        driver = Driver(recipe, first.address, RAY_gcs_rpc_server_reconnect_timeout_s="12")
        wait_until(lambda: driver.shards >= 3)
        for node in [*first.worker_nodes, first.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        assert driver.wait() == 75, driver.lines
        assert "the head of the Ray cluster is gone" in driver.lines[-1]
    again = Driver(recipe, cluster.address)
    assert again.wait() == 0, again.lines
    assert again.manifest
    assert again.manifest["resumed"] >= 3
    assert digests(Path(recipe.out)) == undisturbed["layer"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_no_worker_and_lets_go_of_the_folder(model, undisturbed, cluster, how):
    recipe = model.recipe(**CHOICES)
    driver = Driver(recipe, cluster.address)
    wait_until(lambda: driver.shards >= 3)
    driver.process.send_signal(how)
    assert driver.wait() == 128 + how, driver.lines
    assert driver.lines[-1] == "fapm: stopped; the same command goes on from here\n"
    assert not any((driver.out / "fapm" / name).exists() for name in ("lock", "tmp"))
    wait_until(lambda: not [pid for node in cluster.worker_nodes for pid in actors(node)], 10)
    again = Driver(recipe, cluster.address)
    assert again.wait() == 0
    assert digests(Path(recipe.out)) == undisturbed["tensor"]
