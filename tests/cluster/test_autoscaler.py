"""pytest tests/cluster/test_autoscaler.py: a real autoscaler brings nodes for a run, and takes them away after it.

Its nodes are processes of this machine (`fake_nodes.py`). The provider is named by its class, since by its own name it
needs a file that Ray's wheel leaves out, and the cluster is ended by process id, since `ray stop` ends every Ray here.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digests, gaussian
from conftest import Runner
from nodes import STORE, Driver
from pace import wait_until

pytest.importorskip("ray")

import fake_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

HEAD = "f" * 51 + "00000"
PORT = 6391
CONFIG: dict[str, Any] = {
    "cluster_name": "test", "max_workers": 2, "upscaling_speed": 100.0, "idle_timeout_minutes": 0.1,
    "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
    "head_start_ray_commands": [], "worker_start_ray_commands": [], "rsync_exclude": [], "rsync_filter": [],
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": STORE, "memory": 2_000_000_000}, "node_config": {},
            "min_workers": 0, "max_workers": 2,
        },
    },
    "provider": {
        "type": "external", "module": "fake_nodes.Nodes",
        "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
        "launch_multiple": True, "head_node_id": HEAD,
    },
}  # fmt: skip


@contextmanager
def autoscaling(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a cluster that has no node but its head, and may have two."""
    from ray.util import get_node_ip_address

    CONFIG["provider"]["gcs_address"] = f"{get_node_ip_address()}:{PORT}"
    config, log = folder / "autoscaling.json", folder / "head.log"
    config.write_text(json.dumps(CONFIG))
    switches = {
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "PYTHONPATH": str(Path(fake_nodes.__file__).parent),
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_CLOUD_INSTANCE_ID": HEAD,
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={PORT}"]
    command += [f"--autoscaling-config={config}", "--num-cpus=0", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", f"--object-store-memory={STORE}"]
    with log.open("w") as output:
        head = subprocess.Popen(
            command, env={**os.environ, **environment, **switches}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(lambda: "ray status" in log.read_text() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        yield f"127.0.0.1:{PORT}"
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait()
        for process in processes(str(folder)):  # whatever is left of it
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def processes(*words: str) -> list[int]:
    """Those whose command line has all these words."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            line = (process / "cmdline").read_bytes()
            if all(word.encode() in line for word in words) and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def parent(process: int) -> int:
    """The process that has made one; 0 if it is gone."""
    with suppress(OSError):
        return int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def test_from_no_node_to_two_and_back(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("model"))
    runner.write(*gaussian({f"model.layers.{i}.w": (3000, 1000) for i in range(60)}, torch.bfloat16))
    expected, _ = runner.prune(shard_size="6MB")
    recipe = runner.recipe(shard_size="6MB", workers="2-5")
    folder = tmp_path_factory.mktemp("r")  # short, since sockets lie in it
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}

    def nodes() -> int:
        found = processes(str(folder), "raylet/raylet")
        forked = sum(parent(process) in found for process in found)  # which are about to be another program
        return len(found) - forked - 1  # without the head's

    with autoscaling(folder, environment) as address:
        assert nodes() == 0
        driver = Driver(recipe, address, **environment)
        seen = {nodes()}
        while driver.process.poll() is None:
            seen.add(nodes())
            time.sleep(0.1)
        assert driver.wait() == 0, driver.lines
        assert seen == {0, 1, 2} or seen == {0, 2}
        wait_until(lambda: nodes() == 0)
    assert digests(Path(recipe.out)) == digests(expected)
    assert driver.manifest
    assert driver.manifest["lost_workers"] == {}
