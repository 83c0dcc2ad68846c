"""Ceph's S3 server on this machine, for tests: a production server that enforces signatures and sizes of parts.

Needs Debian's packages radosgw, ceph-osd, ceph-mon and ceph-common.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest"}


PROGRAMS = ("radosgw", "ceph-osd", "ceph-mon", "ceph")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def gateway() -> Iterator[str]:
    """Its endpoint."""
    folder = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
    port, monitor = _free_port(), _free_port()
    log = folder.with_suffix(".log")
    try:
        with log.open("wb") as out:
            script = Path(__file__).with_name("ceph_up.sh")
            began = subprocess.run(["bash", script, folder, str(port), str(monitor)], stdout=out, stderr=out)
        if began.returncode:
            raise RuntimeError(f"Ceph did not start:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        pids = [int(path.read_text()) for path in folder.glob("run/*.pid")]
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, sign)
            time.sleep(2)
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
