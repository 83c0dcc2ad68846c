"""An S3 server on this machine, for tests: moto's, in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fapm.storage import bucket, s3

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "not-to-be-shown", "AWS_REGION": "us-east-1"}
OLDER_SERVER = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
"""What this module's own client has to be told for servers that know no newer checksums."""
_OTHERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE")


@contextmanager
def moto() -> Iterator[str]:
    """Its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def use(patch: pytest.MonkeyPatch, endpoint: str, **environment: str) -> Any:
    """Let this process, and those that it starts, take `endpoint` for S3; returns a client of it."""
    for name in _OTHERS:
        patch.delenv(name, raising=False)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_CONFIG_FILE": "/not/there", **environment}.items():
        patch.setenv(name, value)
    forget()
    import boto3

    return boto3.Session().client("s3")


def forget() -> None:
    """Clients are kept for the life of a process, which tests outlive."""
    for kept in (bucket._client, s3.boto3_client, s3.settings, s3.session):
        kept.cache_clear()


def upload(client: Any, folder: Path, to: str) -> None:
    """Put all files of a folder below an address."""
    name, _, prefix = to.removeprefix("s3://").partition("/")
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=name, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def download(client: Any, address: str) -> dict[str, bytes]:
    """Every object below an address, by its name there."""
    name, _, prefix = address.removeprefix("s3://").partition("/")
    return {
        found: client.get_object(Bucket=name, Key=f"{prefix}/{found}")["Body"].read()
        for found in names(client, address)
    }


def names(client: Any, address: str) -> list[str]:
    """Their names."""
    name, _, prefix = address.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix + "/")
    return [entry["Key"].removeprefix(prefix + "/") for page in pages for entry in page.get("Contents", ())]


def uploads(client: Any, name: str) -> list[str]:
    """Objects of which parts lie there that nobody has completed."""
    return [entry["Key"] for entry in client.list_multipart_uploads(Bucket=name).get("Uploads", ())]
