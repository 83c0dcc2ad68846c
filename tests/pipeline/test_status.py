"""pytest tests/pipeline/test_status.py: how far a run is, read from its folder alone."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian
from conftest import Runner

from fapm import UserError, prune
from fapm.reporting.status import status_facts, status_text
from fapm.schedule import Watch
from fapm.storage.lease import lease


@pytest.fixture
def model(runner: Runner) -> Runner:
    """A pair of 8 shards of 4 kB."""
    runner.write(*gaussian({f"model.layers.{i}.w": (50, 40) for i in range(8)}, torch.bfloat16))
    return runner


def statuses(model: Runner, **choices: Any) -> tuple[str, list[dict[str, Any]]]:
    """The folder of a run, and its status whenever a shard is finished, as another process would read it."""
    recipe = model.recipe(shard_size=4200, **choices)
    found = []

    def look(line: str) -> None:
        if line.startswith("model-"):
            found.append(status_facts(recipe.out))

    prune(recipe, watch=Watch(say=look))
    return recipe.out, found


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_run_at_work_tells_how_far_it_is(model, scope):
    out, seen = statuses(model, scope=scope)
    assert [s["shards_done"] for s in seen] == list(range(1, 9))
    assert {s["state"] for s in seen} == {"running"}
    pair = 8 * 2 * 50 * 40 * 2
    assert {s["bytes"] for s in seen} == {pair if scope == "tensor" else 2 * pair}
    before = 0 if scope == "tensor" else pair
    assert [s["bytes_done"] - before for s in seen] == [pair * i // 8 for i in range(1, 9)]
    for status in seen:
        left = status["bytes"] - status["bytes_done"]
        assert status["seconds_left"] == pytest.approx(left / status["bytes_per_second"])
        assert status["held_by"].startswith(f"process {os.getpid()} on ")
    after = status_facts(out)
    assert (after["state"], after["bytes_done"], after["seconds_left"]) == ("finished", after["bytes"], None)
    assert [(w["steps"], w["read_bytes"] >= pair) for w in after["workers"]] == [(8 if scope == "tensor" else 24, True)]
    json.dumps(after, allow_nan=False)
    assert "8 of 8" in status_text(after)


def test_the_seconds_of_a_run_are_those_of_its_work(model):
    out, _ = statuses(model, workers=2)
    seconds, wall = status_facts(out)["seconds"], json.loads(Path(out, "fapm/manifest.json").read_text())["seconds"]
    threads = 2 * 16  # of a worker some sixteen read, compute and write at the most
    assert sum(seconds.values()) > 0
    assert all(0 <= spent < threads * wall for spent in seconds.values()), (seconds, wall)


def test_a_run_that_was_killed_has_died(model):
    recipe = model.recipe(shard_size=4200)
    script = textwrap.dedent(f"""
        import os, signal
        from fapm import Recipe, prune
        from fapm.schedule import Watch
        done = []
        def say(line):
            done.append(line) if line.startswith("model-") else None
            len(done) < 3 or os.kill(os.getpid(), signal.SIGKILL)
        prune(Recipe.of(**{recipe.model_dump(mode="json")!r}), watch=Watch(say=say))
    """)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    died = status_facts(recipe.out)
    assert (died["state"], died["shards_done"], died["seconds_left"], died["held_by"]) == ("died", 3, None, None)
    assert "the same command goes on from here" in status_text(died)
    seen = []
    prune(recipe, watch=Watch(say=lambda line: seen.append(status_facts(recipe.out))))
    assert seen[-1]["tries"] == 2
    assert seen[-1]["shards_done"] == 8
    assert seen[-1]["bytes"] == seen[-1]["bytes_done"] == 5 * 2 * 50 * 40 * 2
    assert ", try 2" in status_text(seen[-1])


def test_a_run_that_failed_says_why(model):
    base, finetuned = gaussian({f"model.layers.{i}.w": (50, 40) for i in range(8)}, torch.bfloat16)
    finetuned["model.layers.5.w"][0, 0] = torch.nan
    model.write(base, finetuned)
    recipe = model.recipe(shard_size=4200)
    with pytest.raises(UserError):
        prune(recipe)
    failed = status_facts(recipe.out)
    assert failed["state"] == "failed"
    assert "model.layers.5.w" in failed["error"]
    assert "model.layers.5.w" in status_text(failed)


# From a log that was written by hand.


class Told:
    """A folder whose log says what is told."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "fapm").mkdir()
        (folder / "fapm/run.json").write_text("{}")

    def tell(self, event: str, seconds_ago: float, **facts: Any) -> None:
        time = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
        with open(self.folder / "fapm/log.jsonl", "a") as log:
            log.write(json.dumps({"time": time.isoformat(), "event": event, **facts}) + "\n")

    def shard(self, seconds_ago: float, nbytes: int, where: str = "a:1", tries: int = 1) -> None:
        self.tell("shard", seconds_ago, shard="m", progress_bytes=nbytes, read_bytes=nbytes, where=where, tries=tries)


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def test_the_rate_is_that_of_the_last_two_minutes(told):
    told.tell("begun", 1000, shards=9, resumed=0, bytes=100_000)
    told.shard(900, 50_000)
    told.shard(90, 1000)
    told.shard(30, 1400)
    with lease(str(told.folder)):
        status = status_facts(str(told.folder))
    assert status["bytes_per_second"] == pytest.approx(2400 / 120, rel=0.01)
    assert status["seconds_left"] == pytest.approx((100_000 - 52_400) / 20, rel=0.01)


def test_where_nothing_was_finished_lately_it_is_that_of_all_the_time(told):
    told.tell("begun", 1000, shards=9, resumed=0, bytes=100_000)
    told.shard(900, 50_000)
    with lease(str(told.folder)):
        assert status_facts(str(told.folder))["bytes_per_second"] == pytest.approx(50, rel=0.01)


def test_a_dead_run_is_measured_up_to_its_last_event(told):
    told.tell("begun", 100_020, shards=9, resumed=0, bytes=100_000)
    told.shard(100_000, 400)
    assert status_facts(str(told.folder))["bytes_per_second"] == pytest.approx(20, rel=0.01)


def test_workers_and_what_was_lost(told):
    told.tell("begun", 50, shards=9, resumed=4, bytes=4000)
    told.tell("asked", 49, workers=3, each="1 CPU")
    told.tell("ready", 48, worker=0, where="a:1")
    told.tell("ready", 48, worker=1, where="b:2")
    told.shard(40, 1000, "a:1")
    told.tell("lost", 35, worker=1, where="b:2", how="preempted")
    told.shard(30, 1000, "a:1", tries=2)
    told.tell("expect", 29, bytes=500)
    status = status_facts(str(told.folder))
    assert (status["shards_done"], status["bytes"], status["bytes_done"]) == (6, 4500, 2000)
    assert [(w["where"], w["steps"], w["lost"]) for w in status["workers"]] == [
        ("a:1", 2, None),
        ("b:2", 0, "preempted"),
    ]
    assert [(loss["where"], loss["how"]) for loss in status["lost"]] == [("b:2", "preempted")]
    assert status["retried"] == 1
    text = status_text(status)
    assert "1 of 3 asked for, 1 lost, 1 shard begun again" in text
    assert "b:2 preempted at " in text


def test_a_torn_line_in_the_log_does_not_matter(told):
    told.tell("begun", 50, shards=9, resumed=4, bytes=4000)
    with open(told.folder / "fapm/log.jsonl", "a") as log:
        log.write('{"time": "2026\n[1]\n"x"\n{"event": "shard"}\n')
    assert status_facts(str(told.folder))["shards_done"] == 4


def test_before_a_worker_has_done_anything_there_is_no_rate(told):
    told.tell("begun", 5, shards=9, resumed=0, bytes=4000)
    status = status_facts(str(told.folder))
    assert (status["bytes_per_second"], status["workers"], status["asked_workers"]) == (None, [], None)
    assert "0 B of 4 kB (0%)" in status_text(status)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        status_facts(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no run of fapm"):
        status_facts(str(tmp_path))
