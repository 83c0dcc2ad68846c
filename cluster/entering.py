"""Entering a Ray cluster: what is known of it before Ray is loaded, and what an address means before Ray tries it.

Ray itself tries an address for some five minutes, whoever answers there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from fapm.errors import PassingError, UserError

HEAD_PORT, DASHBOARD_PORT = 6379, 8265
_SECONDS = 5.0
_STARTED = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` on this machine leaves the address of its cluster."""


def before_jobs() -> None:
    """Let Ray use a token if the user has one, as it decides when it is loaded; a Jobs API that wants none takes it."""
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def before_ray(address: str) -> None:
    """Set what Ray looks at once, when it is loaded, for a driver at `--ray ADDRESS`.

    A token of the user's is used where the cluster wants one: with it, a driver of a cluster that wants none loses its
    workers. Under `uv run` Ray would pack the working directory for its workers, which is `/` when fapm enters: the
    nodes have fapm of their own, or get it by a job.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if "RAY_AUTH_MODE" not in os.environ and _has_token() and _wants_token(address):
        os.environ["RAY_AUTH_MODE"] = "token"


def _has_token() -> bool:
    own = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or os.path.isfile(own)


_ASK = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
except Exception as error:
    sys.exit(3 if "Authentication" in type(error).__name__ or "AuthToken" in str(error) else 0)
"""


def _wants_token(address: str) -> bool:
    """Whether a cluster refuses who has no token, asked by a process of its own, since Ray looks at its mode once."""
    known = _meant(address)
    try:
        knock(known, _SECONDS)
        asked = subprocess.run(
            [sys.executable, "-c", _ASK, known], env={**os.environ, "RAY_AUTH_MODE": "disabled"}, timeout=60,
            capture_output=True,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False  # whoever enters is told
    return asked.returncode == 3


def check_address(address: str) -> None:
    """Whether an address is that of a cluster's head, as far as a look at it says.

    Args:
        address: of `--ray`: `local`, `auto`, or HOST:PORT.

    Raises:
        UserError: it is of another kind, or something else answers there.
        PassingError: nothing does.
    """
    known = _meant(address)
    if not known:
        return  # its own, or Ray finds out by the processes of this machine, at once
    said = f"--ray {address}" + (
        f": the cluster of this machine is said to be at {known}, but" if known != address else ":"
    )
    host, port = _host_and_port(address, known)
    try:
        with socket.create_connection((host, port), _SECONDS) as probe:
            web = _is_web(probe, known)
    except socket.gaierror:
        raise UserError(f"{said} the name {host} is not known to this machine's DNS") from None
    except OSError as error:
        raise PassingError(f"{said} no Ray cluster answers there ({error.strerror or error})") from None
    if web:
        hint = "that is the dashboard's port" if port == DASHBOARD_PORT else "perhaps that is its dashboard's port"
        raise UserError(
            f"{said} a web server answers there, not the head of a Ray cluster: {hint}; give the head's, as "
            f"{host}:{HEAD_PORT}, or send a job to the dashboard: fapm submit --address http://{host}:{port}"
        )


def knock(address: str, seconds: float) -> None:
    """Raise an OSError if nothing listens at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def _meant(address: str) -> str:
    """Address that `--ray` names, empty of `local`; of `auto` the environment's cluster, or the last started here."""
    if address != "auto":
        return "" if address == "local" else address
    found = os.environ.get("RAY_ADDRESS", "")
    if found and found != "auto":
        return found
    with contextlib.suppress(OSError):
        return _STARTED.read_text().strip()
    return ""


def _host_and_port(address: str, known: str) -> tuple[str, int]:
    scheme = re.match(r"([a-z]+)://", known)
    if scheme and scheme[1] == "ray":
        raise UserError(
            f"--ray {address}: ray:// is the address of Ray's client, and fapm is a driver of its own: give the head's "
            f"HOST:{HEAD_PORT} where it can be reached, or send a job: fapm submit --address http://HOST:{DASHBOARD_PORT}"
        )
    if scheme:
        raise UserError(
            f"--ray {address}: that is the address of a web server; give the head's HOST:{HEAD_PORT}, or send a job to "
            f"its dashboard: fapm submit --address {known}"
        )
    found = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\]:(\d{1,5})|([^:\s/]+):(\d{1,5})", known)
    if not found:
        raise UserError(f"--ray {address}: give HOST:PORT, as 10.0.0.1:{HEAD_PORT} or [::1]:{HEAD_PORT}")
    return found[1] or found[3], int(found[2] or found[4])


def _is_web(probe: socket.socket, known: str) -> bool:
    """Whether HTTP is spoken there; the head speaks gRPC, and says so or nothing."""
    probe.settimeout(_SECONDS)
    with contextlib.suppress(OSError):
        probe.sendall(f"HEAD / HTTP/1.1\r\nHost: {known}\r\nConnection: close\r\n\r\n".encode())
        return probe.recv(5) == b"HTTP/"
    return False


def cannot_enter(address: str, error: Exception) -> UserError:
    """A sentence for what Ray says when it cannot begin or connect."""
    text = str(error)
    if "ersion mismatch" in text:
        lines = [line.strip(" -") for line in text.splitlines() if re.search(r"Ray: |Python: ", line)]
        versions = "; ".join(lines) or " ".join(text.split())[:300]
        return UserError(
            f"--ray {address}: the cluster has another version of Ray or Python than this machine: {versions}"
        )
    number = getattr(error, "errno", None)
    full = address == "local" and _free_bytes(_where(error)) < _LEAST_BYTES
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or full:
        return PassingError(f"--ray {address}: no space left for Ray's own files ({_where(error)}); free some")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
        return UserError(
            f"--ray {address}: Ray cannot write its own files to {_where(error)}; set RAY_TMPDIR to a folder of yours"
        )
    hint = "" if os.environ.get("RAY_AUTH_MODE") else "; if it wants a token, set RAY_AUTH_MODE=token"
    why = last_line(error)
    if address == "local":
        return PassingError(f"--ray local: Ray does not start here ({why})")
    return PassingError(f"--ray {address}: no Ray cluster answers there ({why}){hint}")


_LEAST_BYTES = 1 << 20  # for Ray's logs and sockets


def _free_bytes(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return _LEAST_BYTES


def _where(error: Exception) -> str:
    return str(getattr(error, "filename", None) or os.environ.get("RAY_TMPDIR") or "/tmp/ray")


def last_line(error: BaseException) -> str:
    """Last line of an error; its name, if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
