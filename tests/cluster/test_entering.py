"""pytest tests/cluster/test_entering.py: addresses of clusters that are none, or of another kind; within seconds."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import ray
from checkpoints import save_pair
from http_server import make_server, running
from nodes import CHOICES, Driver, add_node, head_alone, thirty_shards
from pace import soon
from ray_head import Head, started_head

from fapm.cluster import entering
from fapm.cluster.entering import before_jobs, before_ray, cannot_enter, check_address
from fapm.errors import PassingError, UserError


def answer(asked: BaseHTTPRequestHandler) -> None:
    asked.send_response(200)
    asked.send_header("Content-Length", "0")
    asked.end_headers()
    asked.wfile.flush()


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server, as a dashboard is one."""
    server = make_server(answer)
    with running(server):
        yield server.server_address[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of what takes connections and speaks no HTTP, as the head does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    taken, _ = server.accept()
                except OSError:
                    return
                taken.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")  # the first frame of HTTP/2
                taken.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def closed() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://10.0.0.1:10001", "ray:// is the address of Ray's client"),
        ("http://10.0.0.1:8265", "fapm submit --address http://10.0.0.1:8265"),
        ("https://cluster", "the address of a web server"),
        ("10.0.0.1", "give HOST:PORT"),
        ("cluster.example", "give HOST:PORT"),
        ("10.0.0.1:port", "give HOST:PORT"),
        ("::1:6379", "give HOST:PORT"),
        ("nowhere.invalid:6379", "not known to this machine's DNS"),
    ],
)
def test_an_address_of_another_kind_is_final(address, said):
    with soon(3), pytest.raises(UserError, match=re.escape(said)) as caught:
        check_address(address)
    assert not isinstance(caught.value, PassingError)


def test_the_dashboard_s_port_is_told_from_the_head_s(web, silent, monkeypatch):
    with (
        soon(3),
        pytest.raises(UserError, match=rf"a web server answers there.* fapm submit --address http://127.0.0.1:{web}"),
    ):
        check_address(f"127.0.0.1:{web}")
    check_address(f"127.0.0.1:{silent}")
    monkeypatch.setattr(entering, "DASHBOARD_PORT", web)
    with pytest.raises(UserError, match="that is the dashboard's port"):
        check_address(f"127.0.0.1:{web}")


@pytest.mark.parametrize("where", ["127.0.0.1", "[::1]", "localhost"])
def test_where_nothing_listens_it_may_pass(where):
    with soon(3), pytest.raises(PassingError, match="no Ray cluster answers there"):
        check_address(f"{where}:{closed()}")


def test_auto_with_an_address_that_is_dead(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed()}")
    said = r"--ray auto: the cluster of this machine is said to be at 127\.0\.0\.1:\d+, but no Ray cluster answers"
    with soon(3), pytest.raises(PassingError, match=said):
        check_address("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    (tmp_path / "cluster").write_text(f"127.0.0.1:{closed()}\n")
    monkeypatch.setattr(entering, "_STARTED", tmp_path / "cluster")
    with soon(3), pytest.raises(PassingError, match=said):
        check_address("auto")
    monkeypatch.setattr(entering, "_STARTED", tmp_path / "none")
    check_address("auto")


MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.40.0
    Python: 3.9.6
This process on node 10.0.0.5 was started with:
    Ray: 2.58.0
    Python: 3.11.7
"""


@pytest.mark.parametrize(
    ("error", "passes", "said"),
    [
        (RuntimeError(MISMATCH), False, "Ray: 2.40.0; Python: 3.9.6; Ray: 2.58.0; Python: 3.11.7"),
        (OSError(28, "No space left on device", "/tmp/ray/x"), True, "no space left for Ray's own files (/tmp/ray/x"),
        (PermissionError(13, "Permission denied", "/tmp/ray"), False, "its own files to /tmp/ray; set RAY_TMPDIR"),
        (ConnectionError("could not connect"), True, "no Ray cluster answers there (could not connect)"),
    ],
)  # fmt: skip
def test_why_ray_cannot_begin(error, passes, said):
    found = cannot_enter("10.0.0.1:6379", error)
    assert said in str(found) and isinstance(found, PassingError) == passes


MACHINES = {
    "/tmp/ray is full": ("/tmp/ray", "64k", 75, "--ray local: no space left for Ray's own files (/tmp/ray); free some"),
    "/dev/shm as containers have it": ("/dev/shm", "64m", 0, ""),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(os.getuid() != 0, reason="only root has mounts of its own")
@pytest.mark.parametrize("machine", MACHINES)
def test_a_ray_of_ones_own_on_a_small_machine(tmp_path, machine):
    """Ray itself says that its node timed out."""
    path, size, code, said = MACHINES[machine]
    save_pair(tmp_path, {"model.layers.0.a.weight": (60, 40)})
    sides = ["--base", "base", "--finetuned", "finetuned", "--out", "out", "--workers", "1", "--memory", "128MB"]
    command = f'mkdir -p {path} && mount -t tmpfs -o size={size} tmpfs {path} && exec "$@"'
    words = [sys.executable, "-m", "fapm", "prune", *sides, "--ray", "local"]
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command, "bash", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_under_uv_run_no_folder_is_packed(tmp_path):
    """Ray would send its workers the working directory, which is `/`."""
    save_pair(tmp_path, {"model.layers.0.a.weight": (60, 40)})
    sides = ["--base", "base", "--finetuned", "finetuned", "--out", "out", "--workers", "1", "--memory", "128MB"]
    uv = [Path(sys.executable).with_name("uv"), "run", "--no-project", "--offline", "--python", sys.executable]
    words = [*uv, "python", "-m", "fapm", "prune", *sides, "--ray", "local"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# A real head, with a token.


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("head"), with_fapm=True) as started:
        yield started


VERSION = """
import sys
from fapm.cluster.entering import before_ray
before_ray(sys.argv[-1])
import ray
ray.__version__ = "1.2.3"
from fapm.cluster.cli import main
sys.argv[0] = "fapm"
main()
"""


def prune_there(head: Head, folder: Path, *start: str, **environment: str) -> subprocess.CompletedProcess[str]:
    sides = ["--base", "base", "--finetuned", "finetuned", "--out", "out", "--workers", "1", "--memory", "128MB"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, *start, "prune", *sides, "--ray", head.gcs], cwd=folder, text=True, capture_output=True,
        env={**clean, **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_cluster_with_a_token(head, tmp_path):
    """In the user's home it works for prune as for submit; without it, and with another version, it is said."""
    save_pair(tmp_path, {"model.layers.0.a.weight": (60, 40)})
    (tmp_path / ".ray").mkdir()
    shutil.copy(head.token, tmp_path / ".ray" / "auth_token")
    home = {"HOME": str(tmp_path)}
    other = prune_there(head, tmp_path, "-c", VERSION, **home)
    assert other.returncode == 1, other.stderr
    line = other.stderr.splitlines()[-1]
    assert "another version of Ray or Python" in line and "1.2.3" in line and ray.__version__ in line
    without = prune_there(head, tmp_path, "-m", "fapm", HOME=str(tmp_path / "nowhere"))
    assert without.returncode in (1, 75) and "token" in without.stderr.splitlines()[-1]
    done = prune_there(head, tmp_path, "-m", "fapm", **home)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_port_of_a_real_dashboard(head):
    port = head.address.rpartition(":")[2]
    with soon(10), pytest.raises(UserError, match="a web server answers there"):
        check_address(f"127.0.0.1:{port}")


def test_a_token_of_the_user_s_is_used(monkeypatch, tmp_path, silent):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test has ended
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    before_jobs()
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    for address in ("local", f"127.0.0.1:{closed()}"):
        before_ray(address)
        assert "RAY_AUTH_MODE" not in os.environ and os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    before_jobs()
    assert os.environ.pop("RAY_AUTH_MODE") == "token"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_token_in_the_home_does_not_disturb_a_cluster_that_wants_none(tmp_path):
    runner = thirty_shards(tmp_path / "pair")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    with head_alone() as cluster:
        add_node(cluster)
        driver = Driver(
            runner.recipe(**CHOICES), cluster.address, RAY_AUTH_TOKEN_PATH=str(tmp_path / ".ray" / "auth_token")
        )
        assert driver.wait() == 0, driver.lines
