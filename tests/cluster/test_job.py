"""pytest tests/cluster/test_job.py: prunes as jobs of a cluster, by its Jobs API, with a token.

The cluster has what fapm depends on, but not fapm.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub as hub_server
import pytest
import torch
from checkpoints import digests, gaussian, save
from conftest import Runner
from nodes import CHOICES, thirty_shards
from pace import wait_until
from ray_head import Head, started_head

pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("head"), with_fapm=False) as started:
        yield started


class Fapm:
    """The command, given to a process of its own."""

    def __init__(self, head: Head, folder: Path, *args: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fapm", *args, "--address", head.address],
            env={**head.environment, **environment}, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[str] = []
        self._reader = threading.Thread(target=lambda: self.said.extend(iter(self.process.stderr.readline, "")))
        self._reader.start()

    def ended(self, code: int = 0) -> str:
        """What it has printed, once it has ended with this code."""
        try:
            self.process.wait()
        finally:
            self.process.kill()
            self._reader.join()
        with self.process.stdout:
            printed = self.process.stdout.read()
        assert self.process.returncode == code, (self.said, printed)
        return printed

    def has_said(self, text: str) -> bool:
        return any(text in line for line in self.said)

    @property
    def id(self) -> str:
        return wait_until(lambda: next((line.split()[1] for line in self.said if " is submitted" in line), None))


@pytest.fixture
def model(tmp_path: Path) -> Runner:
    runner = Runner(tmp_path)
    runner.write(*gaussian({f"model.layers.{i}.w": (300, 100) for i in range(6)}, torch.bfloat16))
    (tmp_path / "recipe.yaml").write_text(
        "base: base\nfinetuned: finetuned\nout: out\nshard_size: 65kB\nworkers: 2\nmemory: 128MB\nray: local\n"
    )
    return runner


@pytest.fixture
def fapm(head: Head, tmp_path: Path) -> Callable[..., Fapm]:
    return lambda *args, **environment: Fapm(head, tmp_path, *args, **environment)


@pytest.fixture
def slow(tmp_path: Path) -> Runner:
    """Thirty shards of which each takes a while."""
    runner = thirty_shards(tmp_path)
    choices = "".join(f"{name}: {value}\n" for name, value in CHOICES.items())
    (tmp_path / "recipe.yaml").write_text(f"base: base\nfinetuned: finetuned\nout: out\nmemory: 128MB\n{choices}")
    return runner


def known(fapm: Callable[..., Fapm]) -> list[dict[str, Any]]:
    return json.loads(fapm("jobs", "--json").ended())["jobs"]


def finished(folder: Path) -> int:
    return len(list((folder / "out").glob("model-*.safetensors")))


def test_a_job_is_followed_to_its_end_and_writes_what_a_local_run_writes(model, fapm, tmp_path):
    sent = fapm("submit", "recipe.yaml", "--density", "0.3", "--rule", "*.3.w=base")
    printed = sent.ended()
    local, _ = model.prune(shard_size="65kB", density=0.3, rules=["*.3.w=base"])
    assert digests(tmp_path / "out") == digests(local)
    assert "density    0.3 asked, 0.3 kept" in printed
    assert sent.has_said("pruning 6 tensors into 6 shard(s)")
    assert sent.has_said("running on the Ray cluster of this machine")
    assert sum(line.startswith("[") and "/6] model-0" in line for line in sent.said) == 6
    assert not any("{" in line or "Running entrypoint" in line or "INFO" in line for line in sent.said)
    manifest = json.loads((tmp_path / "out/fapm/manifest.json").read_text())
    assert manifest["paths"]["out"] == str(tmp_path / "out")
    assert manifest["fapm"] == fapm_version()
    told = fapm("logs", sent.id).ended()
    assert "[6/6] model-0" in told
    assert "density    0.3 asked" in told
    assert "{" not in told


def fapm_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("fapm")


def test_the_same_again_does_nothing_and_new_inputs_are_pruned(model, fapm, tmp_path):
    first = json.loads(fapm("submit", "recipe.yaml", "--out", "out/{finetuned}", "--json").ended())
    assert first["out"] == str(tmp_path / "out/finetuned")
    before = known(fapm)
    again = json.loads(fapm("submit", "recipe.yaml", "--out", "out/{finetuned}", "--json").ended())
    assert (again["how"], again["id"]) == ("nothing to do", before[0]["id"])
    assert "nothing to do" in fapm("submit", "recipe.yaml", "--out", "out/{finetuned}").ended()
    assert known(fapm) == before
    assert (before[0]["state"], before[0]["code"], before[0]["out"]) == (
        "succeeded",
        0,
        str(tmp_path / "out/finetuned"),
    )
    save(tmp_path / "newer", gaussian({f"model.layers.{i}.w": (300, 100) for i in range(6)}, torch.bfloat16, seed=5)[1])
    options = ("--out", "out/{finetuned}", "--finetuned", "newer", "--json")
    newer = json.loads(fapm("submit", "recipe.yaml", *options).ended())
    assert newer["out"] == str(tmp_path / "out/newer")
    assert not newer["nothing_to_do"]
    assert len(known(fapm)) == len(before) + 1


def test_an_output_that_was_removed_is_made_again(model, fapm, tmp_path):
    fapm("submit", "recipe.yaml").ended()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    again = fapm("submit", "recipe.yaml")
    again.ended()
    assert again.id.endswith("-2")
    assert digests(tmp_path / "out") == digests(tmp_path / "elsewhere")


def test_ctrl_c_detaches_stop_ends_the_job_and_the_next_one_goes_on(slow, fapm, head, tmp_path):
    following = fapm("submit", "recipe.yaml")
    wait_until(lambda: finished(tmp_path) >= 5)
    head.signal_workers(signal.SIGSTOP)  # perhaps before both have told of their last
    wait_until(lambda: following.has_said("[3/30]"))
    following.process.send_signal(signal.SIGINT)
    following.ended(130)
    assert following.has_said("detached, the job goes on: `fapm logs --follow fapm-")
    assert [(job["id"], job["state"]) for job in known(fapm)][:1] == [(following.id, "running")]
    assert "is at work on the same already" in fapm("submit", "recipe.yaml").ended()
    come_back = fapm("logs", following.id[:12], "--follow")
    wait_until(lambda: come_back.has_said("[3/30]"))
    assert "has stopped; submitted again, it goes on from here" in fapm("stop", following.id).ended()
    come_back.ended(143)
    done = finished(tmp_path)
    assert 3 <= done < 30
    assert not (tmp_path / "out/fapm/manifest.json").exists()
    assert "has stopped before" in fapm("stop", following.id).ended()
    again = fapm("submit", "recipe.yaml", "--json")
    facts = json.loads(again.ended())
    assert again.id == following.id[:-1] + "2"
    assert facts["resumed"] == done
    assert digests(tmp_path / "out") == digests(slow.prune(**CHOICES)[0])


def test_a_driver_that_is_killed_is_worth_another_try_which_goes_on(slow, fapm, tmp_path):
    sent = fapm("submit", "recipe.yaml")
    wait_until(lambda: finished(tmp_path) >= 3)
    lock = next((tmp_path / "out/fapm/lock").iterdir())
    os.kill(json.loads(lock.read_text())["process"], signal.SIGKILL)
    sent.ended(137)
    assert sent.has_said("has failed; submit it again to go on from here")
    facts = json.loads(fapm("submit", "recipe.yaml", "--overwrite", "--json").ended())  # it does not begin again
    assert 3 <= facts["resumed"] < 30
    assert digests(tmp_path / "out") == digests(slow.prune(**CHOICES)[0])


def test_a_job_that_fails_ends_with_its_code_and_its_sentence(model, fapm, tmp_path):
    base, finetuned = gaussian({f"model.layers.{i}.w": (300, 100) for i in range(6)}, torch.bfloat16)
    finetuned["model.layers.2.w"][0, 0] = torch.nan
    model.write(base, finetuned)
    sent = fapm("submit", "recipe.yaml")
    assert sent.ended(1) == ""
    assert any(line.startswith("fapm: ") and "model.layers.2.w" in line for line in sent.said), sent.said
    assert not sent.has_said("Traceback")
    assert known(fapm)[0]["code"] == 1


def test_a_job_that_cannot_begin_says_why(model, fapm, tmp_path):
    (tmp_path / "environment.yaml").write_text("env_vars: {A: b}\npip: [no-such-package-of-fapm==9]\n")
    sent = fapm("submit", "recipe.yaml", "--runtime-env", "environment.yaml")
    assert sent.ended(1) == ""
    assert sent.has_said("no-such-package-of-fapm")
    assert fapm("logs", sent.id).ended() == ""
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused_before_it_is_sent(model, fapm, tmp_path):
    before = known(fapm)
    (tmp_path / "finetuned/model.safetensors").unlink()
    assert fapm("submit", "recipe.yaml").ended(1) == ""
    (tmp_path / "environment.yaml").write_text("working_dir: .\n")
    refused = fapm("submit", "recipe.yaml", "--runtime-env", "environment.yaml")
    refused.ended(1)
    assert refused.has_said("leave working_dir out; fapm ships itself")
    assert known(fapm) == before


def test_two_that_submit_the_same_at_once_make_one_job(model, fapm):
    with ThreadPoolExecutor(3) as pool:
        sent = list(pool.map(lambda _: fapm("submit", "recipe.yaml", "--no-wait", "--json"), range(3)))
        facts = [json.loads(one.ended()) for one in sent]
    assert sorted(fact["how"] for fact in facts) == ["already running", "already running", "submitted"]
    assert len({fact["id"] for fact in facts}) == 1


def test_inputs_that_are_not_seen_from_here_are_left_to_the_cluster(model, fapm, head, tmp_path):
    # The command runs on this machine too, so it is made to look elsewhere.
    script = "from fapm.cluster import cli, submission\nsubmission._is_seen = lambda recipe: False\ncli.main()\n"
    command = [sys.executable, "-c", script, "submit", "recipe.yaml", "--out", "out/{date}", "--json"]
    environment = {**head.environment, "RAY_AUTH_MODE": "token"}

    def submit() -> dict[str, Any]:
        done = subprocess.run(
            [*command, "--address", head.address], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "are not seen from here; the cluster will look" in done.stderr
        return json.loads(done.stdout)

    first = submit()
    assert not first["nothing_to_do"]
    assert submit()["nothing_to_do"]
    assert os.listdir(tmp_path / "out") == [Path(first["out"]).name]


def test_from_the_hub_into_the_hub(model, fapm, tmp_path):
    with hub_server.served() as hub:
        for side in ("base", "finetuned"):
            hub.push(f"org/{side}", tmp_path / side)
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN, "HF_HOME": str(tmp_path / "home")}
        there["HF_HUB_DISABLE_XET"] = "1"
        (tmp_path / "env.yaml").write_text(json.dumps({"env_vars": there}))
        sides = ["--base", "org/base", "--finetuned", "org/finetuned", "--out", "hf://org/out"]
        command = ["submit", "recipe.yaml", *sides, "--runtime-env", "env.yaml"]
        fapm(*command, **there).ended()
        commits = list(hub.commits["org/out"].values())
        local, _ = model.prune(shard_size="65kB")
        for name in sorted(path.name for path in local.glob("model*")):
            assert commits[-1][name] == (local / name).read_bytes()
        again = fapm(*command, "--json", **there)
        assert json.loads(again.ended())["nothing_to_do"]
        assert list(hub.commits["org/out"].values()) == commits


def test_the_wrong_token_and_the_wrong_address_are_told_apart(fapm, head, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    other = fapm("jobs", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    other.ended(1)
    assert other.has_said("the cluster wants a token that was not given; set RAY_AUTH_TOKEN")
    nowhere = Fapm(replace(head, address="http://127.0.0.1:1"), tmp_path, "jobs")
    nowhere.ended(75)
    assert nowhere.has_said("--address http://127.0.0.1:1: no Ray cluster answers there")


def test_an_unknown_job_is_named(fapm):
    for command in ("logs", "stop"):
        asked = fapm(command, "fapm-no-such")
        asked.ended(1)
        assert asked.has_said("the cluster has no job fapm-no-such")


def test_a_cluster_that_has_fapm_runs_what_is_shipped(model, tmp_path, tmp_path_factory):
    mine = tmp_path_factory.mktemp("mine")
    shutil.copytree(ROOT / "pipeline", mine / "fapm")
    shutil.copytree(ROOT / "cluster", mine / "fapm" / "cluster")
    with open(mine / "fapm" / "version.py", "a") as changed:
        changed.write("\n\ndef version() -> str:\n    return '9.9+mine'\n")
    with started_head(tmp_path_factory.mktemp("other"), with_fapm=True) as other:
        sent = Fapm(other, tmp_path, "submit", "recipe.yaml", "--json", PYTHONPATH=str(mine))  # at once: it begins
        facts = json.loads(sent.ended())
        assert (facts["shards"], facts["resumed"]) == (6, 0)
        assert json.loads((tmp_path / "out/fapm/manifest.json").read_text())["fapm"] == "9.9+mine"
