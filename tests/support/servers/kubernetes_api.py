"""The part of Kubernetes that `fapm submit --kubernetes` asks, with KubeRay's part played: RayJobs are checked against
KubeRay's schema, kept under their names, and run.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

KUBERAY, KUBERNETES = "kuberay-1.7.0", "kubernetes-1.37.0"
TOKEN = "of-the-service-account"
RAYJOBS = "/apis/ray.io/v1/namespaces/nightly/rayjobs"


@cache
def _definitions(name: str) -> dict[str, Any]:
    path = Path(__file__).parents[2] / "schemas" / f"{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def faults(document: dict[str, Any]) -> list[str]:
    """What Kubernetes and KubeRay would not take in a manifest."""
    definitions = _definitions(KUBERAY if document["apiVersion"].startswith("ray.io/") else KUBERNETES)
    schema = {"$ref": f"#/$defs/{document['kind']}", **definitions}
    found = Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in found]


class Kubernetes:
    """Attributes: `rayjobs` by name; `run` gives the exit code of an entrypoint, as Ray tells it."""

    def __init__(self, run: Callable[[str], int]):
        self.run = run
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.broken = False
        self.lock = threading.Lock()
        self.address = ""

    def begin(self, name: str) -> None:
        threading.Thread(target=self._play, args=(name,), daemon=True).start()

    def _play(self, name: str) -> None:
        spec = self.rayjobs[name]["spec"]
        for attempt in range(1 + spec.get("backoffLimit", 0)):
            cluster = f"{name}-x7k2{attempt}"
            self._tell(name, jobDeploymentStatus="Initializing", rayClusterName=cluster, startTime=_now())
            self._tell(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
            code = self.run(spec["entrypoint"])
            if code == 0:
                self._tell(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", endTime=_now())
                return
            self._tell(name, jobDeploymentStatus="Retrying", jobStatus="FAILED")
        message = f"Job entrypoint command failed with exit code {code}, last available logs:\nnoise\nfapm: so it is\n"
        ended = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "endTime": _now()}
        self._tell(name, message=message, **ended)

    def _tell(self, name: str, **status: str) -> None:
        with self.lock:
            self.rayjobs[name].setdefault("status", {}).update(status)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def kubernetes(folder: Path, run: Callable[[str], int]) -> Iterator[Kubernetes]:
    """A Kubernetes that `folder/kubeconfig` leads to."""
    state = Kubernetes(run)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def refuse(self, code: int, reason: str, message: str) -> None:
            self.answer(
                code, {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
            )

        def allowed(self) -> bool:
            if state.broken:
                self.refuse(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            elif self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.refuse(401, "Unauthorized", "Unauthorized")
            else:
                return True
            return False

        def do_GET(self) -> None:
            path = urllib.parse.urlsplit(self.path)
            name = path.path.removeprefix(RAYJOBS).strip("/")
            with state.lock:
                if not self.allowed():
                    return
                if name and name not in state.rayjobs:
                    self.refuse(404, "NotFound", f'rayjobs.ray.io "{name}" not found')
                elif name:
                    self.answer(200, state.rayjobs[name])
                else:
                    [wanted] = urllib.parse.parse_qs(path.query)["labelSelector"]
                    key, _, value = wanted.partition("=")
                    items = [j for j in state.rayjobs.values() if j["metadata"]["labels"].get(key) == value.strip("=")]
                    self.answer(200, {"kind": "RayJobList", "apiVersion": "ray.io/v1", "metadata": {}, "items": items})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = body["metadata"]["name"]
            with state.lock:
                if not self.allowed():
                    return
                if found := faults(body):
                    self.refuse(422, "Invalid", f'RayJob.ray.io "{name}" is invalid: {found[0]}')
                    return
                if name in state.rayjobs:
                    self.refuse(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
                    return
                state.rayjobs[name] = body
                self.answer(201, body)
            state.begin(name)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": state.address}}],
        "users": [{"name": "fapm", "user": {"token": TOKEN}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "fapm", "namespace": "nightly"}}],
    }  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps(config))  # JSON is YAML
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
