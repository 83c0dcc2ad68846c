"""Azure's blob storage on this machine, for tests: Azurite, Microsoft's own emulator, from npm."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from needs import program
from pace import wait_until

from fapm.storage import bucket

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's, which everybody knows."""


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextmanager
def served() -> Iterator[str]:
    """Its endpoint."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(program("node")), str(program("azurite-blob"))]
    arguments = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort", str(port)]
    running = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: running.poll() is not None or _answers(port), pause=0.2)
        assert running.poll() is None, "azurite-blob did not start"
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        running.terminate()
        running.wait()


def use(patch: pytest.MonkeyPatch, endpoint: str, key: str = KEY) -> None:
    """Let this process, and those that it starts, take `endpoint` for Azure."""
    names = {"ACCOUNT_NAME": ACCOUNT, "ACCOUNT_KEY": key, "ENDPOINT": endpoint, "ALLOW_HTTP": "true"}
    for name, value in names.items():
        patch.setenv(f"AZURE_STORAGE_{name}", value)
    bucket._client.cache_clear()


def make_container(endpoint: str, name: str) -> None:
    """By a request signed here: obstore makes none."""
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    signed = "".join(f"{header}:{value}\n" for header, value in headers.items())
    text = "PUT" + "\n" * 12 + signed + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    mark = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{mark}", "Content-Length": "0"}
    wanted = urllib.request.Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)
    assert urllib.request.urlopen(wanted, timeout=30).status == 201
