"""configs/kubernetes/ is what Kubernetes and KubeRay take, and what the command line understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import check_command
from kubernetes_api import faults

from fapm import Recipe

FOLDER = Path(__file__).parents[2] / "configs" / "kubernetes"
MANIFESTS = ("rayjob.yaml", "cronjob.yaml", "raycronjob.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    [found] = [document for document in documents(name) if document["kind"] == kind]
    return found


ALL = [pytest.param(d, id=f"{name}-{d['kind']}") for name in MANIFESTS for d in documents(name)]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod that a manifest describes."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


@pytest.mark.parametrize("document", ALL)
def test_the_schemas_take_it(document):
    assert faults(document) == []


def test_the_schemas_refuse_what_is_wrong():
    wrong = of_kind("rayjob.yaml", "RayJob")
    wrong["spec"]["activeDeadlineSeconds"] = "soon"
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] = "none"
    assert len(faults(wrong)) == 3
    cron = of_kind("cronjob.yaml", "CronJob")
    cron["spec"]["concurrencyPolicies"] = "Forbid"
    assert len(faults(cron)) == 1


@pytest.mark.parametrize("document", ALL)
def test_pods_are_nobody_in_particular_and_write_only_where_they_must(document):
    for pod in pods(document):
        security = pod["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"]
            assert not own["allowPrivilegeEscalation"]
            assert own["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounts["/tmp"] == "tmp"
            assert set(mounts.values()) <= volumes
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["image"].startswith("registry.example.com/fapm:0.1.0")
            assert not re.search("password|secret_key|token:", str(container.get("env")), re.IGNORECASE)


@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "RayJob"), ("raycronjob.yaml", "RayCronJob")])
def test_workers_come_from_nothing_spot_ones_first(name, kind):
    spec = of_kind(name, kind)["spec"]
    cluster = spec.get("jobTemplate", spec)["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert all(group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
    assert groups["spot"]["priority"] > groups["on-demand"]["priority"]
    assert groups["spot"]["template"]["spec"]["tolerations"]
    assert "tolerations" not in groups["on-demand"]["template"]["spec"]
    [gpu] = groups["gpu-spot"]["template"]["spec"]["containers"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for group in groups.values():
        [worker] = group["template"]["spec"]["containers"]
        assert worker["envFrom"] == [{"secretRef": {"name": "fapm-credentials", "optional": True}}]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_a_worker_of_the_recipe_fits_the_pods():
    from fapm.cluster.demand import demand

    recipe = Recipe.load(FOLDER / "recipe.yaml")
    asked = demand(recipe, 140, {}).options
    groups = of_kind("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in groups[:2]:
        [worker] = group["template"]["spec"]["containers"]
        assert asked["num_cpus"] == int(worker["resources"]["requests"]["cpu"])
        # Ray has the limit for workers, less what its object store may take: by default 30 %.
        assert asked["memory"] <= 0.7 * int(worker["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
        assert recipe.workers.most <= group["maxReplicas"]


def test_the_command_lines_are_understood():
    job, night = of_kind("rayjob.yaml", "RayJob")["spec"], of_kind("cronjob.yaml", "CronJob")["spec"]
    command = check_command(shlex.split(job["entrypoint"]))
    assert command.recipe == Recipe.load(FOLDER / "recipe.yaml")
    assert command.given["ray"] == "auto"
    [pod] = pods(night)
    [container] = pod["containers"]
    words = [word.replace("/etc/fapm", str(FOLDER)) for word in container["command"]]
    submitted = check_command(words)
    assert submitted.recipe == command.recipe
    assert Path(submitted.given["kubernetes"]) == FOLDER / "rayjob.yaml"


def test_the_cronjob_may_do_what_it_does_and_no_more():
    role, binding = of_kind("cronjob.yaml", "Role"), of_kind("cronjob.yaml", "RoleBinding")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list"]}]
    cron = of_kind("cronjob.yaml", "CronJob")["spec"]
    [pod] = pods(cron)
    account = of_kind("cronjob.yaml", "ServiceAccount")["metadata"]["name"]
    assert pod["serviceAccountName"] == account == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert cron["concurrencyPolicy"] == "Forbid"
    [fails] = [r for r in cron["jobTemplate"]["spec"]["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
    assert fails["onExitCodes"]["values"] == [1, 2]  # and 75 is tried again
    assert fails["onExitCodes"]["containerName"] == pod["containers"][0]["name"]


def test_the_raycronjob_has_the_rayjob_in_it():
    night = of_kind("raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"]
    once = of_kind("rayjob.yaml", "RayJob")["spec"]
    assert (once.pop("backoffLimit"), night.pop("backoffLimit")) == (3, 0)
    assert night == once


def test_what_the_comments_call_the_versions_is_what_is_checked():
    from kubernetes_api import KUBERAY

    assert f"KubeRay {KUBERAY.removeprefix('kuberay-').rpartition('.')[0]}" in (FOLDER / "rayjob.yaml").read_text()
    pinned = (FOLDER.parent / "requirements.txt").read_text()
    version = of_kind("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"\nray=={version}\n" in pinned
