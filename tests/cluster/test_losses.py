"""pytest tests/cluster/test_losses.py: nodes and workers are killed, on real Ray with several nodes on one machine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import digests
from conftest import Runner
from nodes import (
    CHOICES,
    actors,
    add_node,
    finished_shards,
    head_alone,
    raylet_of,
    started_node,
    thirty_shards,
    undisturbed_runs,
    workers_of,
)
from pace import soon, wait_until

from fapm import UserError, prune
from fapm.reporting.status import status_facts
from fapm.run import Result
from fapm.schedule import Watch
from fapm.storage.local import Folder

ray = pytest.importorskip("ray")

from fapm.cluster.actor import Sight  # noqa: E402 - needs ray
from fapm.cluster.pool import RayPool, _draining, ray_pool  # noqa: E402
from fapm.dispatcher import Limits  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with head_alone() as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()


@pytest.fixture
def add(nodes: Any) -> Iterator[Callable[[], Any]]:
    added: list[Any] = []

    def one() -> Any:
        added.append(add_node(nodes))
        return added[-1]

    yield one
    for node in added:
        if node in nodes.worker_nodes:
            nodes.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return thirty_shards(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model: Runner) -> dict[str, dict[str, str]]:
    return undisturbed_runs(model)


def shards_by(pool: RayPool) -> list[int]:
    """The worker of every finished shard."""
    return [shard["process"] for shard in finished_shards(pool._out.path)]


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

    recipe = model.recipe(scope=scope, **CHOICES)
    return prune(recipe, pool=pool, watch=Watch(say=say)), Path(recipe.out), said


@pytest.mark.parametrize(("scope", "seed"), [("tensor", 0), ("layer", 1), ("global", 2), ("tensor", 3)])
def test_a_node_that_is_killed_costs_time_only(model, undisturbed, nodes, add, scope, seed):
    first, second = add(), add()
    victim = random.Random(seed).choice([first, second])
    after = random.Random(seed).randint(2, 20)
    killed: list[int] = []  # shards that were still to do

    def kill(pool: RayPool) -> None:
        killed.append(len(pool._dispatcher._left))
        nodes.remove_node(victim, allow_graceful=False)

    result, out, _ = run(model, scope, after, kill)
    assert digests(out) == undisturbed[scope]
    assert killed
    assert killed[0] >= 5
    assert result.resumed == 0


def test_with_no_node_left_the_run_waits_for_one_and_says_so(model, undisturbed, nodes, add, monkeypatch):
    monkeypatch.setattr("fapm.cluster.pool._SAY_SECONDS", 0)
    only = add()

    def lose_and_find(pool: RayPool) -> None:
        nodes.remove_node(only, allow_graceful=False)
        add()

    _, out, said = run(model, "tensor", 5, lose_and_find, all_ready=False)
    assert digests(out) == undisturbed["tensor"]
    assert any(line.startswith("note: waiting for workers: none yet; 2 of 1 CPU, ") for line in said)


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
        os.kill(random.Random(seed).choice(sorted(set(shards_by(pool)))), signal.SIGKILL)

    _, out, said = run(model, scope, 2 + 3 * seed, kill)
    assert digests(out) == undisturbed[scope]
    assert sum("done elsewhere" in line for line in said) == 1
    status = status_facts(str(out))
    assert (status["state"], status["asked_workers"]) == ("finished", 2)
    assert [loss["how"] for loss in status["lost"]] == ["crashed"]
    assert status["lost"][0]["where"] in [worker["where"] for worker in status["workers"] if worker["lost"]]


def test_a_node_that_does_not_see_the_files_is_named_at_once(model, nodes, add, monkeypatch):
    add()
    monkeypatch.setattr("fapm.cluster.pool._sight", lambda *_: Sight({"/not": {"there": 5}}, Folder("/nor"), b""))
    sentence = r"node .* does not see /nor/fapm/run.json as the driver does"
    with soon(30), pytest.raises(UserError, match=sentence):
        prune(model.recipe(shard_size="6MB", workers=1), pool=ray_pool("auto"))


@pytest.fixture
def paused() -> Iterator[list[int]]:
    """Processes that stand still; they are ended afterwards."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pause(node: Any, paused: list[int]) -> None:
    (pid,) = actors(node)
    paused.append(pid)
    os.kill(pid, signal.SIGSTOP)


def test_a_worker_that_hangs_is_given_up(model, undisturbed, nodes, add, paused):
    first, _ = add(), add()

    def hang(pool: RayPool) -> None:
        pool._dispatcher.limits = Limits(hung_seconds=2, slow_seconds=1000)
        pause(first, paused)

    result, out, said = run(model, "tensor", 8, hang)
    assert digests(out) == undisturbed["tensor"]
    assert sum("took far too long and was given up; what it had is done elsewhere" in line for line in said) == 1
    assert result.manifest["lost_workers"] == {"hung": 1}


def test_a_device_that_fails_is_a_lost_worker_and_no_bad_shard(model, undisturbed, nodes, add, monkeypatch, tmp_path):
    add(), add()
    call, broken, failed = RayPool._call, [], tmp_path / "failed"

    def breaks(worker: Any, task: Any, following: Any) -> Any:
        import torch

        from fapm.shard.worker import Worker

        def fail(*_: Any) -> None:
            failed.touch()
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

        worker._states = fail
        return Worker.write(worker, task, following)

    def waits(worker: Any, task: Any, following: Any) -> Any:
        """The other one does not end the run before, however long it takes to load torch."""
        from fapm.shard.worker import Worker

        for _ in range(1200):
            if failed.exists():
                break
            time.sleep(0.1)
        return Worker.write(worker, task, following)

    def replaced(self: RayPool, worker: int, task: int | None, method: Any, name: str, *arguments: Any) -> None:
        if task is not None and len(finished_shards(self._out.path)) > 5 and not broken:
            broken.append(worker)
            arguments = (breaks, *arguments[1:])
        elif task is not None and broken and not failed.exists():
            arguments = (waits, *arguments[1:])
        call(self, worker, task, method, name, *arguments)

    monkeypatch.setattr(RayPool, "_call", replaced)
    result, out, said = run(model, "tensor", 0, lambda pool: None)
    assert digests(out) == undisturbed["tensor"]
    (line,) = [line for line in said if "done elsewhere" in line]
    assert line.startswith(f"note: worker {broken[0]} was given up (the GPU of ")
    assert "has failed: CUDA error: uncorrectable ECC error encountered); what it had" in line
    assert result.manifest["lost_workers"] == {"device": 1}


def test_a_straggler_at_the_end_is_overtaken(model, undisturbed, nodes, add, paused):
    first, _ = add(), add()

    def slow_down(pool: RayPool) -> None:
        pool._dispatcher.limits = Limits(hung_seconds=1000, slow_seconds=1)
        pause(first, paused)

    with soon(60):  # and not the 1000 s after which it would count as hung
        result, out, _ = run(model, "tensor", 26, slow_down)
    assert digests(out) == undisturbed["tensor"]
    assert result.manifest["lost_workers"] == {}
    assert [shard["tries"] for shard in finished_shards(out)].count(2) == 1
    # Waking up afterwards it can do no harm.
    os.kill(paused[0], signal.SIGCONT)
    time.sleep(1)
    assert digests(out) == undisturbed["tensor"]
    assert not (out / "fapm" / "work").exists()


def test_a_node_with_notice_gets_no_new_shard(model, undisturbed, nodes, add):
    """What runs there may end, as long as the node leaves it time. A try in which it had not begun does not count."""
    add()
    for _ in range(5):
        with started_node(nodes.address, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="3") as leaving:
            wait_until(lambda: ray.cluster_resources().get("CPU") == 2)
            raylet = wait_until(lambda node=leaving: raylet_of(node))
            there: list[int] = []
            finished: list[int] = []

            def notice(pool: RayPool, node: Any = leaving, raylet: int = raylet, there: Any = there,
                       finished: Any = finished) -> None:  # fmt: skip
                finished.extend(shards_by(pool))
                there.extend(workers_of(raylet))
                node.send_signal(signal.SIGTERM)
                wait_until(_draining)
                time.sleep(1)  # the pool looks once a second

            result, out, _ = run(model, "tensor", 6, notice)
        assert digests(out) == undisturbed["tensor"]
        assert "crashed" not in result.manifest["lost_workers"]
        (worker,) = there
        where = [shard["process"] for shard in finished_shards(out)]
        assert len(finished) <= 6
        assert where[len(finished) + 1 :].count(worker) <= 2  # what it had, and what it had got before anybody knew
        if worker in finished:
            return
        wait_until(lambda: ray.cluster_resources().get("CPU") == 1)
    pytest.fail("the node had never finished a shard")
