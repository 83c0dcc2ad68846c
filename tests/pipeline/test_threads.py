"""pytest tests/pipeline/test_threads.py: threads as workers; the next task's reads are under way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import digests, gaussian

from fapm import prune
from fapm.planning.make import make_plan
from fapm.pool import Threads
from fapm.shard.worker import Worker


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
                    begun.append(following is not None and worker.prefetch.has_begun(following.shard))
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
            worker.prefetch.forget()
            assert worker._reader.memory.room == room

    recipe = runner.recipe(shard_size="300kB")
    prune(recipe, pool=lambda plan, out, watch: Wrong(plan.recipe, out, 1))
    assert digests(Path(recipe.out)) == digests(expected)
    assert len(make_plan(recipe).shards) == 6
