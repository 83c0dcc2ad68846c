"""pytest tests/cluster/test_kubernetes.py: prunes as RayJobs, and the CronJob of configs/ over several nights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import digests, gaussian, save
from conftest import Runner
from kubernetes_api import Kubernetes, kubernetes
from pace import wait_until
from ray_head import Head, started_head

pytest.importorskip("lightkube")

from fapm import UserError
from fapm.cluster.kubernetes import _job, _read_manifest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "kubernetes"
SHAPES = {f"model.layers.{i}.w": (300, 100) for i in range(6)}


@dataclass
class Night:
    """The pod of the CronJob: its command, with the claim and the config map in a folder of this machine."""

    folder: Path
    api: Kubernetes

    def __post_init__(self) -> None:
        for name in ("recipe.yaml", "rayjob.yaml"):
            (self.folder / name).write_text(
                (CONFIGS / name).read_text().replace("/models", str(self.folder / "models"))
            )
        self.add("checkpoint-900", 1)
        save(self.folder / "models" / "base", gaussian(SHAPES, torch.bfloat16)[0])

    def add(self, name: str, seed: int) -> None:
        _, finetuned = gaussian(SHAPES, torch.bfloat16, seed=seed)
        save(self.folder / "models" / "runs" / name, finetuned)

    def process(self, *more: str) -> subprocess.Popen[str]:
        [cron] = [d for d in yaml.safe_load_all((CONFIGS / "cronjob.yaml").read_text()) if d["kind"] == "CronJob"]
        [pod] = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        assert pod["command"][0] == "fapm"
        words = [word.replace("/etc/fapm", str(self.folder)) for word in pod["command"][1:]]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KUBE"))}
        return subprocess.Popen(
            [sys.executable, "-m", "fapm", *words, *more], cwd=self.folder, text=True,
            env={**clean, "KUBECONFIG": str(self.folder / "kubeconfig")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def comes(self, *more: str) -> tuple[int, str, str]:
        """Its exit code, and what it prints and says."""
        pod = self.process(*more)
        printed, said = pod.communicate()
        return pod.returncode, printed, said


@pytest.fixture
def night(tmp_path: Path) -> Iterator[Night]:
    with kubernetes(tmp_path, lambda entrypoint: 0) as api:
        yield Night(tmp_path, api)


def locally(entrypoint: str) -> int:
    """What a RayJob runs, in this machine's processes without Ray."""
    words = shlex.split(entrypoint.replace("--ray auto", "--ray off"))
    return subprocess.run([sys.executable, "-m", "fapm", *words[1:]]).returncode


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nights_over_old_and_new_inputs_on_ray(tmp_path, tmp_path_factory):
    def on_ray(head: Head) -> Callable[[str], int]:
        environment = {**head.environment, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": head.gcs}
        return lambda entrypoint: (
            subprocess.run(
                [sys.executable, "-m", "fapm", *shlex.split(entrypoint)[1:]], env=environment, cwd=tmp_path
            ).returncode
        )

    with (
        started_head(tmp_path_factory.mktemp("head"), with_fapm=True, cpus=4) as head,
        kubernetes(tmp_path, on_ray(head)) as api,
    ):
        night = Night(tmp_path, api)
        pruned = tmp_path / "models" / "pruned"
        code, _, said = night.comes()
        assert code == 0, said
        assert "RayJob fapm-" in said
        [name] = api.rayjobs
        assert os.listdir(pruned) == ["checkpoint-900"]
        runner = Runner(tmp_path / "models")
        own = runner.recipe("own").model_copy(update={"finetuned": str(tmp_path / "models/runs/checkpoint-900")})
        from fapm import prune

        prune(own)
        assert digests(pruned / "checkpoint-900") == digests(tmp_path / "models" / "own")
        code, printed, said = night.comes()  # the same
        assert (code, list(api.rayjobs)) == (0, [name])
        assert "this run is finished over the same inputs; nothing to do" in printed
        night.add("checkpoint-1000", 2)  # new ones
        code, _, said = night.comes()
        assert (code, len(api.rayjobs)) == (0, 2), said
        assert sorted(os.listdir(pruned)) == ["checkpoint-1000", "checkpoint-900"]
        assert night.comes()[0] == 0
        assert len(api.rayjobs) == 2


def test_a_rayjob_is_the_manifests_with_a_name_and_a_command(night):
    night.api.run = locally
    assert night.comes("--density", "0.3", "--rule", "*.3.w=base")[0] == 0
    [(name, made)] = night.api.rayjobs.items()
    manifest = yaml.safe_load((CONFIGS / "rayjob.yaml").read_text().replace("/models", str(night.folder / "models")))
    entrypoint = made["spec"].pop("entrypoint")
    manifest["spec"].pop("entrypoint")
    assert made["spec"] == manifest["spec"]
    assert made["metadata"]["labels"]["app.kubernetes.io/name"] == "fapm"
    assert made["metadata"]["annotations"]["fapm/out"] == str(night.folder / "models/pruned/checkpoint-900")
    words = shlex.split(entrypoint)
    assert words[:2] == ["fapm", "prune"]
    assert words[words.index("--finetuned") + 1] == str(night.folder / "models/runs/checkpoint-900")
    assert words[words.index("--rule") + 1] == "*.3.w=base"
    assert words[words.index("--ray") + 1] == "auto"
    assert len(name) < 48  # KubeRay's limit, since names of pods are made of it


def test_a_night_that_meets_the_last_one_at_work_leaves_it_alone(night):
    ended = threading.Event()
    night.api.run = lambda entrypoint: 0 if ended.wait(600) else 1
    first = night.process()
    wait_until(lambda: night.api.rayjobs)
    code, printed, _ = night.comes()
    assert code == 0
    assert "is at work on the same already" in printed
    assert len(night.api.rayjobs) == 1
    ended.set()
    first.communicate()
    assert first.returncode == 0


@pytest.mark.parametrize(("ended", "code"), [(75, 75), (1, 1), (-9, 137), (143, 143)])
def test_the_pod_ends_as_the_run_and_the_next_one_is_another_try(night, ended, code):
    night.api.run = lambda entrypoint: ended
    returned, printed, said = night.comes()
    assert (returned, printed) == (code, "")
    assert "fapm: so it is" in said
    assert "Traceback" not in said
    night.api.run = lambda entrypoint: 0
    assert night.comes()[0] == 0
    assert [name[-2:] for name in night.api.rayjobs] == ["-1", "-2"]


def test_a_driver_that_is_killed_is_tried_again_on_a_new_cluster_and_goes_on(night):
    out = night.folder / "models" / "pruned" / "checkpoint-900"
    codes = []

    def killed_once(entrypoint: str) -> int:
        words = shlex.split(entrypoint.replace("--ray auto", "--ray off"))
        driver = subprocess.Popen([sys.executable, "-m", "fapm", *words[1:]], stdout=subprocess.DEVNULL)
        if not codes:
            wait_until(lambda: len(list(out.glob("model-*.safetensors"))) >= 3)
            driver.kill()
        codes.append(driver.wait())
        return codes[-1]

    night.api.run = killed_once
    shapes = {f"model.layers.{i}.w": (3000, 1000) for i in range(30)}
    base, finetuned = gaussian(shapes, torch.bfloat16)
    save(night.folder / "models" / "base", base)
    save(night.folder / "models" / "runs" / "checkpoint-900", finetuned)
    code, _, said = night.comes("--shard-size", "6MB")
    assert (code, codes) == (0, [-9, 0]), said
    assert len(night.api.rayjobs) == 1
    begun = [json.loads(line) for line in (out / "fapm/log.jsonl").read_text().splitlines() if '"begun"' in line]
    assert [event["resumed"] >= 3 for event in begun] == [False, True]


def test_without_waiting_it_says_how_to_come_back(night):
    code, printed, _ = night.comes("--no-wait", "--json")
    facts = json.loads(printed)
    assert (code, facts["how"], facts["namespace"]) == (0, "submitted", "nightly")
    [name] = night.api.rayjobs
    assert facts["id"] == name
    assert f"kubectl -n nightly get rayjob {name}" in night.comes("--no-wait", "--density", "0.2")[1].replace(
        list(night.api.rayjobs)[-1], name
    )


def test_what_kubernetes_does_not_take_is_said(night):
    manifest = yaml.safe_load((night.folder / "rayjob.yaml").read_text())
    manifest["spec"]["submissionMode"], manifest["spec"]["shutdown"] = "Loudly", True
    (night.folder / "rayjob.yaml").write_text(yaml.safe_dump(manifest))
    code, _, said = night.comes()
    assert code == 1
    assert said.splitlines()[-1].startswith('fapm: Kubernetes, namespace nightly: RayJob.ray.io "fapm-')
    assert not night.api.rayjobs


def test_a_kubernetes_that_is_away_is_worth_another_try(night):
    night.api.broken = True
    code, _, said = night.comes()
    assert code == 75
    assert "unable to handle the request" in said.splitlines()[-1]
    config = (night.folder / "kubeconfig").read_text()
    (night.folder / "kubeconfig").write_text(config.replace(night.api.address, "http://127.0.0.1:1"))
    code, _, said = night.comes()
    assert code == 75
    assert "fapm: Kubernetes does not answer" in said.splitlines()[-1]


def test_without_rights_it_fails_at_once(night):
    config = (night.folder / "kubeconfig").read_text()
    (night.folder / "kubeconfig").write_text(config.replace("of-the-service-account", "of-somebody-else"))
    code, _, said = night.comes()
    assert code == 1
    assert said.splitlines()[-1] == "fapm: Kubernetes, namespace nightly: Unauthorized"
    (night.folder / "kubeconfig").unlink()
    code, _, said = night.comes()
    assert code == 1
    assert "nothing says where Kubernetes is" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kind: CronJob\n", "give a file with one RayJob; it has 0"),
        ("kind: RayJob\nspec: 3\n", "it has 0"),
        ("kind: RayJob\nspec: {}\n---\nkind: RayJob\nspec: {}\n", "it has 2"),
        ("{", "not plain YAML"),
        ("!!python/object:os.system {}", "not plain YAML"),
    ],
)
def test_a_manifest_without_a_rayjob_is_refused(tmp_path, text, why):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=why):
        _read_manifest(str(tmp_path / "m.yaml"))
    with pytest.raises(UserError, match="No such file"):
        _read_manifest(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        ({}, "pending", None),
        ({"jobDeploymentStatus": "Initializing"}, "pending", None),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, "pending", None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", None),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "succeeded", 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "stopped", 143),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "has passed"}, "failed", 75),
        ({"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "head pod not found."}, "failed", 75),
        ({"jobDeploymentStatus": "Failed", "reason": "ValidationFailed", "message": "no"}, "failed", 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, "failed", 1),
    ],
)
def test_what_a_rayjob_says_of_itself(status: dict[str, Any], state, code):
    found = _job({"metadata": {"name": "fapm-0-3"}, "status": status})
    assert (found.state, found.code, found.attempt, found.is_over) == (state, code, 3, code is not None)
