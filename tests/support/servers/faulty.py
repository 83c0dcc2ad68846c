"""A proxy before an HTTP server on this machine that counts what passes, and does what networks and busy servers do."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from http_server import make_server, running

FAULTS = ("drop", "lose", "delay", "truncate", "reset", "429", "500", "503")
"""Drop: no answer, and nothing done; lose: done, and no answer; truncate and reset: in the middle of a body."""


class Proxy:
    """Attributes:
    url: where it listens.
    requests, read, written: how many requests passed, and bytes of bodies in either direction.
    met: how often each fault was met.
    forgets: headers that the server behind it does not get to see.
    refuses: what it answers to a request itself, a status and a body, if anything.
    """

    def __init__(self, upstream: str):
        self._host, self._port = upstream.removeprefix("http://").split(":")
        self.requests = self.read = self.written = 0
        self.met: Counter[str] = Counter()
        self.forgets: tuple[str, ...] = ()
        self.refuses: Callable[[BaseHTTPRequestHandler], tuple[int, str] | None] = lambda asked: None
        self._random, self._share, self._faults = random.Random(0), 0.0, FAULTS
        self._lock = threading.Lock()
        self.server = make_server(self._handle)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def disturb(self, seed: int, share: float, faults: tuple[str, ...] = FAULTS) -> None:
        """From now on a share of the requests meets a fault."""
        self._random, self._share, self._faults = random.Random(seed), share, faults

    def reset(self) -> None:
        self.requests = self.read = self.written = 0
        self.met.clear()

    def _handle(self, asked: BaseHTTPRequestHandler) -> None:
        body = asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
        with self._lock:
            fault = self._random.choice(self._faults) if self._random.random() < self._share else ""
            where = self._random.random()
            self.requests += 1
            self.written += len(body)
            self.met[fault] += 1
        if refused := self.refuses(asked):
            said = refused[1].encode()
            return self._answer(asked, refused[0], [("Content-Length", str(len(said)))], said)
        if fault == "drop":
            return self._break(asked)
        if fault.isdigit():
            return self._answer(asked, int(fault), [("Content-Length", "0")], b"")
        if fault == "delay":
            time.sleep(where / 5)
        upstream = http.client.HTTPConnection(self._host, int(self._port), timeout=60)
        try:
            upstream.putrequest(asked.command, asked.path, skip_host=True, skip_accept_encoding=True)
            for name, value in asked.headers.items():
                if name.lower() not in self.forgets:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            found = upstream.getresponse()
            data = found.read()
        except OSError:
            return self._break(asked)
        finally:
            upstream.close()
        if fault == "lose":
            return self._break(asked)
        headers = [(n, v) for n, v in found.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
        if asked.command != "HEAD" and not any(n.lower() == "content-length" for n, _ in headers):
            headers.append(("Content-Length", str(len(data))))
        whole = fault not in ("truncate", "reset")
        with self._lock:
            self.read += len(data)
        self._answer(asked, found.status, headers, data if whole else data[: int(where * len(data))])
        if not whole:
            self._break(asked, hard=fault == "reset")
        return None

    def _answer(self, asked: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        try:
            asked.send_response_only(status)
            for name, value in headers:
                asked.send_header(name, value)
            asked.end_headers()
            asked.wfile.write(data)
            asked.wfile.flush()
        except OSError:
            asked.close_connection = True

    def _break(self, asked: BaseHTTPRequestHandler, hard: bool = False) -> None:
        asked.close_connection = True
        try:
            if hard:
                asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            asked.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    made = Proxy(upstream)
    with running(made.server):
        yield made
