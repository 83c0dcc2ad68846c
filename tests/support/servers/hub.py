"""A small Hugging Face Hub on this machine, for tests: what huggingface_hub asks of a repository, with ranges."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from http_server import make_server, running
from huggingface_hub import constants

from fapm.storage import hub

TOKEN = "hf_not-to-be-shown"


@functools.lru_cache(64)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub:
    """Repositories by name; each commit's files are those that a folder had when it was pushed.

    Attributes:
        url: its endpoint, and `cdn`, where large files lie, is another address of it.
        private, gated: names of those that need a token; that nobody may read.
        asked: the paths that were asked for, `read` bytes of files, and `seen` the tokens that the CDN was shown.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.seen: list[str] = []
        self.read = 0
        self.busy = 0  # so many answers are 503
        self.blobs: dict[str, bytes] = {}
        self.uploaded: list[str] = []  # sha256 of what was sent
        self.messages: list[str] = []  # of commits made over the network
        self.deaf: set[str] = set()  # parts of paths whose requests are not answered well
        self.server = make_server(self._handle)
        port = self.server.server_address[1]
        self.url, self.cdn = f"http://localhost:{port}", f"http://127.0.0.1:{port}"

    def push(self, name: str, folder: Path) -> str:
        """Make a folder the repository's newest commit; returns that."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commits = self.commits.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def _handle(self, asked: Any) -> None:
        (self._answer if asked.command in ("GET", "HEAD") else self._take)(asked)

    def _take(self, asked: Any) -> None:
        """What changes something."""
        path = asked.path.partition("?")[0]
        body = asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
        self.asked.append(path)
        if any(part in path for part in self.deaf):
            return self._send(asked, 503, b"busy")
        if path.startswith("/lfs/"):
            oid = hashlib.sha256(body).hexdigest()
            assert oid == path.removeprefix("/lfs/")
            self.blobs[oid] = body
            self.uploaded.append(oid)
            return self._send(asked, 200, b"")
        if asked.headers.get("Authorization", "") != f"Bearer {TOKEN}":
            return self._send(asked, 401, b"{}")
        if path == "/api/validate-yaml":
            return self._json(asked, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.commits:
                return self._send(asked, 409, json.dumps({"url": f"{self.url}/{name}"}).encode())
            self.commits[name] = {hashlib.sha1(name.encode()).hexdigest(): {".gitattributes": b""}}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.private.add(name)
            return self._json(asked, {"url": f"{self.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for entry in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{self.cdn}/lfs/{entry['oid']}"}}
                objects.append({**entry, **({} if entry["oid"] in self.blobs else {"actions": actions})})
            return self._json(asked, {"transfer": "basic", "objects": objects})
        _, _, _, org, name, what, *_ = path.split("/")
        if what == "preupload":
            files = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._json(asked, {"files": files})
        return self._commit(asked, f"{org}/{name}", [json.loads(line) for line in body.splitlines()])

    def _commit(self, asked: Any, name: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        head = list(self.commits[name])[-1]
        if header.get("parentCommit") not in (None, head):
            return self._send(asked, 412, json.dumps({"error": "A commit has happened since."}).encode())
        files = dict(self.commits[name][head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(f"{name} {len(self.commits[name])}".encode()).hexdigest()
        self.commits[name][commit] = files
        self.messages.append(header["summary"])
        url = f"{self.url}/{name}/commit/{commit}"
        return self._json(asked, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def _json(self, asked: Any, answer: dict[str, Any]) -> None:
        self._send(asked, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer(self, asked: Any) -> None:
        self.asked.append(asked.path)
        path = asked.path.partition("?")[0]
        if self.busy:
            self.busy -= 1
            return self._send(asked, 503, b"busy")
        if path.startswith("/cdn/"):
            self.seen.append(asked.headers.get("Authorization", ""))
            _, _, name, commit, file = path.split("/", 4)
            return self._file(asked, self.commits[name.replace("--", "/")][commit][file])
        told = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path)
        wanted = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = told or wanted
        name = found[1] if found else ""
        token = asked.headers.get("Authorization", "")
        if name not in self.commits or (name in self.private and token != f"Bearer {TOKEN}"):
            return self._send(asked, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = (found[2] if found else "") or "main"
        commits = self.commits[name]
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._send(asked, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if told:
            facts = self._facts(name, commit, files)
            return self._send(asked, 200, json.dumps(_tree(facts) if "/tree/" in path else facts).encode())
        if name in self.gated:
            return self._send(asked, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if wanted and wanted[3] not in files:
            return self._send(asked, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if wanted and wanted[3].endswith(".safetensors"):
            where = f"{self.cdn}/cdn/{name.replace('/', '--')}/{commit}/{wanted[3]}?signature=abc"
            data = files[wanted[3]]
            linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
            return self._send(asked, 302, b"", {"Location": where, "X-Repo-Commit": commit, **linked})
        return self._file(asked, files[wanted[3] if wanted else ""], {"X-Repo-Commit": commit})

    def _facts(self, name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = []
        for file, data in files.items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if file.endswith(".safetensors"):
                entry["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": name, "modelId": name, "sha": commit, "private": name in self.private, "siblings": siblings}

    def _file(self, asked: Any, data: bytes, headers: dict[str, str] | None = None) -> None:
        etag = {"ETag": f'"{_sha256(data)}"', "Accept-Ranges": "bytes", **(headers or {})}
        ranged = re.fullmatch(r"bytes=(\d+)-(\d+)?", asked.headers.get("Range", ""))
        if not ranged:
            self.read += len(data)
            return self._send(asked, 200, data, etag)
        begin, end = int(ranged[1]), min(len(data), int(ranged[2] or len(data) - 1) + 1)
        self.read += end - begin
        etag["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return self._send(asked, 206, data[begin:end], etag)

    def _send(self, asked: Any, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        asked.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            asked.send_header(name, value)
        asked.end_headers()
        if asked.command != "HEAD":
            asked.wfile.write(data)


def _tree(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The same files as the Hub lists them in another of its answers."""
    found = []
    for entry in facts["siblings"]:
        listed = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
        if "lfs" in entry:
            listed["lfs"] = {"oid": entry["lfs"]["sha256"], "size": entry["size"], "pointerSize": 130}
        found.append(listed)
    return found


@contextmanager
def served() -> Iterator[Hub]:
    made = Hub()
    with running(made.server):
        yield made


def use(patch: pytest.MonkeyPatch, url: str, home: Path, offline: bool = False, token: str = "") -> None:
    """Let this process, and those that it starts, take `url` for the Hub, with a cache of their own."""
    from huggingface_hub import file_download, hf_api

    patch.setenv("HF_ENDPOINT", url)
    patch.setenv("HF_HOME", str(home))
    patch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.setenv("HF_TOKEN", token)
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(hf_api.constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which wants a server of its own
    hub._look.cache_clear()
    hub._client.cache_clear()
