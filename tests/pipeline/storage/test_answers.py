"""pytest tests/pipeline/storage/test_answers.py: what stores and networks answer is final, or may pass.

By servers on this machine that answer as the real ones do: Amazon's regions, Alibaba's addressing style, a certificate
of one's own authority, a proxy that is away. What is final is said within a second and ends with 1.
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import s3
from http_server import make_server, running
from pace import soon

from fapm.errors import PassingError, UserError
from fapm.storage import bucket, hub
from fapm.storage.address import input_address, open_store
from fapm.storage.s3 import boto3_client, settings

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
EMPTY = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix/>'
    "<KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>"
)
Answer = tuple[int, dict[str, str], str]


def respond(asked: BaseHTTPRequestHandler, answer: Answer) -> None:
    status, headers, body = answer
    asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
    asked.send_response_only(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        asked.send_header(name, value)
    asked.end_headers()
    if asked.command != "HEAD":
        asked.wfile.write(body.encode())
    asked.wfile.flush()


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> Iterator[str]:
    """A server that answers so, and its URL."""
    server = make_server(lambda asked: respond(asked, answer(asked)))
    with running(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


def error(code: str, message: str = "It says why.") -> str:
    return f"<Error><Code>{code}</Code><Message>{message}</Message><StringToSign>secret</StringToSign></Error>"


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor taken from this machine."""
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", *PROXIES, *map(str.lower, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    yield
    s3.forget()


FINAL = [
    (501, error("NotImplemented"), "does not know this kind of request"),
    (501, "", "does not know this kind of request"),
    (403, error("RequestTimeTooSkewed"), "clock differs from the store's"),
    (403, error("SecondLevelDomainForbidden"), "addressing_style = virtual"),
    (403, error("QuotaExceeded"), "quota of the account or the bucket is used up"),
    (
        403,
        error("StorageLimit", "You have 100 GB, and no more."),
        r"403 StorageLimit \(You have 100 GB, and no more\.\)",
    ),
    (400, error("InvalidToken"), "does not know the session token"),
    (301, error("PermanentRedirect"), "another region"),
    (405, error("MethodNotAllowed"), "does not allow this kind of request"),
    (404, error("NoSuchBucket"), "there is no such bucket"),
    (403, error("AccessDenied"), "denies access.*AWS_ACCESS_KEY_ID"),
]


@pytest.mark.parametrize(("status", "body", "said"), FINAL)
@pytest.mark.parametrize("ask", ["list", "write", "read"])
def test_what_is_final_is_said_at_once(monkeypatch, status, body, said, ask):
    with answering(lambda asked: (status, {"Content-Type": "application/xml"}, body)) as url:
        s3.use(monkeypatch, url)
        folder = open_store("s3://b/x")
        asks = {"list": folder.exists, "write": lambda: folder.write("a", b"1"), "read": lambda: folder.read("a")}
        began = time.monotonic()
        with soon(3), pytest.raises(UserError, match=said) as caught:
            asks[ask]()
        assert time.monotonic() - began < 60 and not isinstance(caught.value, PassingError)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"), (502, "")]
)
def test_what_may_pass_is_asked_again_within_bounds(monkeypatch, status, code):
    asked: list[float] = []

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(time.monotonic())
        return status, {}, error(code) if code else ""

    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 2.0)
    with answering(answer) as url:
        s3.use(monkeypatch, url)
        with soon(15), pytest.raises(PassingError, match=rf"\({status}.*run the same command again"):
            open_store("s3://b/x").exists()
    assert len(asked) > 2


# Regions.


def test_each_bucket_is_asked_at_its_own_region(monkeypatch):
    """Two buckets in two regions in one process, and a third region in the environment."""
    regions = {"here": "eu-west-1", "there": "ap-south-1"}

    def answer(asked: BaseHTTPRequestHandler) -> Answer:
        name = asked.path.split("?")[0].split("/")[1]
        signed_for = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3", asked.headers["Authorization"])
        its = {"x-amz-bucket-region": regions[name]}
        if asked.command == "HEAD" and asked.path.count("/") == 1:
            return (200 if signed_for[1] == regions[name] else 301), its, ""
        if signed_for[1] != regions[name]:
            return 400, its, error("AuthorizationHeaderMalformed")
        return 200, {"Content-Type": "application/xml"}, EMPTY

    with answering(answer) as url:
        s3.use(monkeypatch, url, AWS_REGION="us-west-2")
        for name, region in regions.items():
            assert not open_store(f"s3://{name}/x").exists()
            assert settings(name).region == region
            assert boto3_client(name).meta.region_name == region


# Settings reach both clients.


def test_the_region_of_the_environment_reaches_both(monkeypatch):
    seen: dict[str, str] = {}

    def answer(asked: BaseHTTPRequestHandler) -> Answer:
        agent = "boto3" if "oto" in (asked.headers["User-Agent"] or "") else "obstore"
        seen[agent] = asked.headers["Authorization"].split("/")[2]
        return 200, {"Content-Type": "application/xml"}, EMPTY

    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        seen.clear()
        with answering(answer) as url:
            s3.use(monkeypatch, url)
            monkeypatch.delenv("AWS_REGION")
            monkeypatch.setenv(name, "me-south-1")
            open_store("s3://b/x").exists()
            boto3_client("b").list_multipart_uploads(Bucket="b")
        assert seen == {"boto3": "me-south-1", "obstore": "me-south-1"}
        monkeypatch.delenv(name)


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_the_addressing_style_of_the_profile_reaches_both(monkeypatch, tmp_path, style):
    seen: set[tuple[str, bool]] = set()

    def answer(asked: BaseHTTPRequestHandler) -> Answer:
        agent = "boto3" if "oto" in (asked.headers["User-Agent"] or "") else "obstore"
        seen.add((agent, asked.headers["Host"].startswith("bucket.")))
        return 200, {"Content-Type": "application/xml"}, EMPTY

    (tmp_path / "config").write_text(f"[default]\ns3 =\n  addressing_style = {style}\n")
    with answering(answer) as url:  # as a proxy, so that no name has to be known
        s3.use(monkeypatch, "http://store.example", AWS_CONFIG_FILE=str(tmp_path / "config"), http_proxy=url)
        open_store("s3://bucket/x").exists()
        boto3_client("bucket").list_multipart_uploads(Bucket="bucket")
    assert seen == {("boto3", style == "virtual"), ("obstore", style == "virtual")}


def authority(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine that signs itself, and its key."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_certificate_of_one_s_own_authority(monkeypatch, tmp_path, variable):
    key, certificate = authority(tmp_path)
    server = make_server(lambda asked: respond(asked, (200, {"Content-Type": "application/xml"}, EMPTY)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with running(server):
        s3.use(monkeypatch, f"https://localhost:{server.server_address[1]}")
        with (
            soon(3),
            pytest.raises(UserError, match=r"certificate of the store is not trusted .*AWS_CA_BUNDLE") as caught,
        ):
            open_store("s3://b/x").exists()
        assert not isinstance(caught.value, PassingError)
        monkeypatch.setenv(variable, str(certificate))
        s3.forget()
        assert not open_store("s3://b/x").exists()
        boto3_client("b").list_multipart_uploads(Bucket="b")
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
        s3.forget()
        with pytest.raises(UserError, match="which is not there"):
            open_store("s3://b/x").exists()


# Networks.


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_that_does_not_answer_is_named(monkeypatch, variable):
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 1.0)
    port = closed_port()
    s3.use(monkeypatch, "http://store.example:9000")
    monkeypatch.setenv(variable.lower(), f"http://user:secret@127.0.0.1:{port}")
    said = rf"by way of the proxy http://127\.0\.0\.1:{port} \({variable}\)"
    with soon(20), pytest.raises(PassingError, match=said) as caught:
        open_store("s3://b/x").exists()
    assert "secret" not in str(caught.value)


def test_a_name_that_dns_does_not_know(monkeypatch):
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 1.0)
    s3.use(monkeypatch, "http://store.invalid:9000")
    with soon(20), pytest.raises(PassingError, match=r"the name store\.invalid is not known"):
        open_store("s3://b/x").exists()


def test_a_path_that_is_misspelt_is_final_also_where_the_hub_is_away(monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    hub._look.cache_clear()
    with soon(10), pytest.raises(UserError, match="there is no folder models/lama; ") as caught:
        input_address("models/lama")
    assert not isinstance(caught.value, PassingError)


def test_the_hub_s_own_reason_is_said(monkeypatch):
    """As where a repository's storage is used up, which is a 403 that no login mends."""
    body = '{"error": "Private repository storage limit reached, please upgrade"}'

    def answer(asked: BaseHTTPRequestHandler) -> Answer:
        return (
            403,
            {"Content-Type": "application/json", "X-Error-Message": "Private repository storage limit reached"},
            body,
        )

    with answering(answer) as url:
        monkeypatch.setattr(hub.constants, "ENDPOINT", url)
        hub._look.cache_clear()
        api: Any = hub.HfApi(endpoint=url)
        with pytest.raises(UserError, match="storage limit reached"), hub.plain_errors("hf://org/name"):
            api.create_repo("org/name")


def test_threads_that_serve_are_daemons():
    """Else a test that fails would wait for them."""
    assert all(thread.daemon for thread in threading.enumerate() if "serve" in thread.name)
