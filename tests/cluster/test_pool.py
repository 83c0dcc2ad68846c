"""Ray actors give the bytes that threads give: on a cluster of this machine, with one, two and three workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digests
from conftest import Runner
from nodes import finished_shards

from fapm import UserError, prune

ray = pytest.importorskip("ray")

from fapm.cluster.pool import RayPool, ray_pool  # noqa: E402 - needs ray


@pytest.fixture(scope="module", autouse=True)
def one_cluster() -> Iterator[None]:
    """Started once: a pool that finds Ray running uses it and leaves it running."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pair(runner: Runner) -> Runner:
    random = torch.Generator().manual_seed(5)
    base = {f"model.layers.{i}.w": torch.randn(70, 130, generator=random).bfloat16() for i in range(6)}
    base["embed.weight"] = torch.randn(300, 64, generator=random).bfloat16()
    finetuned = {n: (w.float() + 0.01 * torch.randn(w.shape, generator=random)).bfloat16() for n, w in base.items()}
    runner.write(base, finetuned)
    return runner


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_actors_write_the_bytes_that_threads_write(pair: Runner, scope: str) -> None:
    choices = {"scope": scope, "shard_size": "40kB"}
    expected = digests(pair.prune(workers=1, **choices)[0])
    assert len(expected) > 4
    for workers in (1, 2, 3):
        recipe = pair.recipe(workers=workers, **choices)
        result = prune(recipe, pool=ray_pool("local"))
        assert result.manifest["workers"] == workers
        assert digests(Path(recipe.out)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_worker_with_several_cpus_works_on_as_many_shards(pair: Runner, scope: str) -> None:
    choices = {"scope": scope, "shard_size": "20kB"}
    recipe = pair.recipe(**choices).model_copy(update={"workers": None, "cpus_per_worker": 3, "memory": 3 << 26})
    result = prune(recipe, pool=ray_pool("local"))
    assert result.manifest["workers"] == 1
    assert digests(Path(recipe.out)) == digests(pair.prune(**choices)[0])
    assert len({shard["where"] for shard in finished_shards(Path(recipe.out))}) == 1


def test_labels_that_ray_does_not_know_are_one_sentence(pair: Runner) -> None:
    recipe = pair.recipe(labels=["a=in(b"])
    with pytest.raises(UserError, match="Ray does not take what is asked of a worker"):
        prune(recipe, pool=ray_pool("local"))


@pytest.mark.slow
def test_relative_paths_mean_the_same_to_the_workers(pair: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.folder)
    recipe = pair.recipe(shard_size="40kB").model_copy(update={"base": "base", "finetuned": "finetuned", "out": "here"})
    prune(recipe, pool=ray_pool("local"))
    assert digests(pair.folder / "here") == digests(pair.prune(shard_size="40kB")[0])


@pytest.mark.slow
def test_an_error_in_an_actor_is_the_users_sentence(pair: Runner) -> None:
    weights = {"model.layers.0.w": torch.full((4, 4), torch.nan), "x": torch.ones(3)}
    pair.write({n: torch.ones_like(w) for n, w in weights.items()}, weights)
    with pytest.raises(UserError, match=r"'model\.layers\.0\.w' has 16 NaN"):
        prune(pair.recipe("bad"), pool=ray_pool("local"))
    assert not (pair.folder / "bad" / "fapm" / "manifest.json").exists()


def test_a_cluster_that_does_not_answer_is_one_sentence(pair: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", _refuse)
    with pytest.raises(UserError, match=r"--ray 127\.0\.0\.1:1: no Ray cluster answers there"):
        prune(pair.recipe(), pool=ray_pool("127.0.0.1:1"))


def _refuse(**_: object) -> None:
    raise ConnectionError("could not connect")


def test_a_ray_of_its_own_does_not_outlive_a_pool_that_cannot_be_made(
    pair: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("fapm.cluster.pool._connect", lambda *_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(UserError, match="at least 64MiB for each of the 4 CPUs"):
        prune(pair.recipe(cpus_per_worker=4), pool=ray_pool("local"))
    assert ended == [True]


@pytest.mark.slow
def test_actors_are_gone_when_the_pool_is_closed(pair: Runner) -> None:
    held: list[Any] = []

    def remember(plan, out, watch):  # type: ignore[no-untyped-def]
        pool = RayPool(plan, out, watch, "local")
        held.extend(pool._actors.values())
        return pool

    prune(pair.recipe(shard_size="40kB", workers=2), pool=remember)
    assert len(held) == 2
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(held[0].__ray_ready__.remote(), timeout=20)
