"""A Ray cluster with a Jobs API and a token, as its users meet it, on this machine and in an environment of its own."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import site
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nodes import STORE, descendants, ended, is_worker
from pace import wait_until


@dataclass(frozen=True)
class Head:
    """Attributes: `address` of the Jobs API, `gcs` of Ray, the file of the token, and the port of its metrics."""

    process: int
    address: str
    gcs: str
    token: Path
    metrics_port: int
    temporary: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the cluster has in the environment."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**clean, "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def signal_workers(self, number: signal.Signals) -> None:
        """Signal whatever works on shards. By SIGSTOP they stand still until they are killed."""
        for pid in descendants(self.process):
            if is_worker(pid):
                os.kill(pid, number)


@contextmanager
def started_head(folder: Path, with_fapm: bool, cpus: int = 2) -> Iterator[Head]:
    """A cluster of one node, started by `ray start`.

    Args:
        with_fapm: whether its environment has fapm installed, or only what fapm depends on.
    """
    python = Path(sys.executable) if with_fapm else _environment_without_fapm(folder / "environment")
    gcs, jobs, metrics, agent, agent_grpc = free_ports(5)
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    temporary = Path("/tmp") / f"fapm-{os.getpid()}-{gcs}"  # the paths of sockets are short
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment = {
        **clean, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token), "RAY_metrics_report_interval_ms": "1000",
    }  # fmt: skip
    command = [
        str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        f"--port={gcs}", f"--dashboard-port={jobs}", f"--metrics-export-port={metrics}", f"--num-cpus={cpus}",
        f"--temp-dir={temporary}", f"--object-store-memory={STORE}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
    ]  # fmt: skip
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    with _removed(temporary), ended(head):
        address = f"http://127.0.0.1:{jobs}"
        _wait_until_it_answers(head, address, token, folder / "head.log")
        yield Head(head.pid, address, f"127.0.0.1:{gcs}", token, metrics, temporary)


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    yield
    shutil.rmtree(folder, ignore_errors=True)


def _environment_without_fapm(path: Path) -> Path:
    """A virtual environment with everything that this one has but fapm, which is installed here as editable."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    own = next(path.glob("lib/python*/site-packages"))
    (own / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # whose own .pth files are not read
    python = path / "bin" / "python"
    found = subprocess.run([python, "-c", "import fapm"], cwd=path, capture_output=True)
    assert found.returncode, "fapm is installed here by copying; install it with pip install -e"
    subprocess.run([python, "-c", "import ray, torch, numba"], cwd=path, check=True)
    return python


def free_ports(count: int) -> list[int]:
    """Ports below those that the system hands out to others: nobody takes them before they are used."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found += [port] if port not in found else []
    return found


def _wait_until_it_answers(head: subprocess.Popen[bytes], address: str, token: Path, log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token.read_text()}"})

    def answers() -> bool:
        assert head.poll() is None, log.read_text()
        with suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return True
        return False

    wait_until(answers, pause=0.2)
