"""pytest tests/pipeline/test_dealing.py: tasks are dealt out once, and the next one's reads are under way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import digests, gaussian

from fapm import make_plan, prune
from fapm.plan import Shard
from fapm.pool import Deal, Did, Threads
from fapm.shard.task import Task
from fapm.shard.worker import Worker


def test_each_task_is_dealt_once_and_what_follows_is_kept():
    next_of = dealt(6)
    assert [next_of(0), next_of(1)] == [(0, 1), (2, 3)]
    assert [next_of(0), next_of(0)] == [(1, 4), (4, 5)]
    assert next_of(1) == (3, None)
    assert next_of(1) == (5, None)  # the other kept it, and nothing else is left
    assert next_of(0) is None
    assert next_of(1) is None


def dealt(shards: int, did: dict[int, Did] | None = None) -> Callable[[int], tuple[int, int | None] | None]:
    """The shard that a worker gets, and the one that will follow."""
    deal = Deal([Task(Shard(i, f"{i}", (), b"", 0), {}) for i in range(shards)], did or {})

    def next_of(worker: int) -> tuple[int, int | None] | None:
        found = deal.next(worker)
        return found and (found[0].shard.index, found[1] and found[1].shard.index)

    return next_of


def test_a_worker_gets_what_it_did_before_its_last_first_and_then_others_first():
    next_of = dealt(6, {0: (0, 1), 1: (1, 2), 2: (0, 4), 3: (1, 3), 5: (0, 5)})
    assert next_of(0) == (5, 2)
    assert next_of(0) == (2, 0)
    assert next_of(0) == (0, 4)
    assert next_of(1) == (3, 1)
    assert next_of(0) == (4, None)
    assert next_of(0) == (1, None)


def test_what_is_done_in_one_step_counts_in_the_next():
    did: dict[int, Did] = {}
    for worker, shard in ((0, 1), (1, 0), (0, 2), (0, 1)):
        Deal([], did).done(worker, shard)
    assert did == {0: (1, 2), 2: (0, 3), 1: (0, 4)}


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_next_shard_is_being_read_when_one_is_made_durable(runner, scope):
    runner.write(*gaussian({f"model.layers.{i}.w": (300, 400) for i in range(6)}, torch.bfloat16))
    expected, result = runner.prune(shard_size="300kB", scope=scope)
    begun: list[bool] = []

    class Watching(Threads):
        def map(self, step, tasks):
            (worker,) = self._workers
            for i, task in enumerate(tasks):
                following = tasks[i + 1] if i + 1 < len(tasks) else None
                done = step(worker, task, following)
                if step is not Worker.sample:
                    begun.append(following is not None and worker.has_begun(following.shard))
                yield done

    recipe = runner.recipe(shard_size="300kB", scope=scope)
    found = prune(recipe, pool=lambda plan, out, watch: Watching(plan.recipe, out, 1))
    steps = 1 if scope == "tensor" else 2
    shards = len(result.plan.shards)
    assert begun == ([True] * (shards - 1) + [False]) * steps
    assert digests(Path(recipe.out)) == digests(expected)
    assert found.manifest["totals"]["read_bytes"] == result.manifest["totals"]["read_bytes"]


def test_what_was_read_for_another_shard_is_thrown_away(runner):
    runner.write(*gaussian({f"model.layers.{i}.w": (300, 400) for i in range(6)}, torch.bfloat16))
    expected, _ = runner.prune(shard_size="300kB")

    class Wrong(Threads):
        def map(self, step, tasks):
            (worker,) = self._workers
            room = worker._reader.memory.room
            for i, task in enumerate(tasks):
                yield step(worker, task, tasks[i - 2])
            worker._forget_ahead()
            assert worker._reader.memory.room == room

    recipe = runner.recipe(shard_size="300kB")
    prune(recipe, pool=lambda plan, out, watch: Wrong(plan.recipe, out, 1))
    assert digests(Path(recipe.out)) == digests(expected)
    assert len(make_plan(recipe).shards) == 6
