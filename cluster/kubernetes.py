"""Prunes as RayJobs of Kubernetes: KubeRay makes a Ray cluster for each, runs it, and removes the cluster.

What a RayJob looks like is the user's, in a manifest; here it gets a name, which is the submission's id, and the
command. So the RayJobs that are there tell a schedule what it has had done before.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import yaml
from lightkube import ApiError, Client
from lightkube.core.exceptions import ConfigError
from lightkube.generic_resource import create_namespaced_resource

from fapm.cluster.submission import NAME, Job, Submission, exit_code
from fapm.errors import PassingError, UserError

RayJob: Any = create_namespaced_resource("ray.io", "v1", "RayJob", "rayjobs")
_OURS: dict[str, Any] = {"app.kubernetes.io/name": NAME}
_OUT = "fapm/out"
_POLL_SECONDS = 5.0
_SILENT_SECONDS = 120.0


class RayJobObjects:
    """The prunes among the RayJobs of a namespace, and how to add one.

    Args:
        manifest: a YAML file with the RayJob that every prune becomes.

    Raises:
        UserError: the file holds no RayJob, or nothing says where Kubernetes is.
    """

    def __init__(self, manifest: str):
        self._manifest = _read_manifest(manifest)
        namespace = self._manifest["metadata"].get("namespace")
        try:
            self._client = Client(namespace=namespace)
        except ConfigError as error:
            raise UserError(f"nothing says where Kubernetes is ({error}); set KUBECONFIG, or run in a pod") from None
        self.where = {"namespace": self._client.namespace}

    def jobs(self) -> list[Job]:
        """The prunes among them."""
        with self._plain_errors():
            return [_job(found.to_dict()) for found in self._client.list(RayJob, labels=_OURS)]

    def submit(self, submission: Submission, id: str) -> bool:
        """Make a RayJob of this name, or say False if there is one.

        Raises:
            UserError: Kubernetes does not take it.
        """
        metadata = self._manifest["metadata"]
        labels = {**metadata.get("labels", {}), **_OURS}
        annotations = {**metadata.get("annotations", {}), _OUT: submission.out}
        spec = {**self._manifest["spec"], "entrypoint": shlex.join(["fapm", *submission.arguments])}
        about = {**metadata, "name": id, "labels": labels, "annotations": annotations}
        with self._plain_errors():
            try:
                self._client.create(RayJob.from_dict({**self._manifest, "metadata": about, "spec": spec}))
            except ApiError as error:
                if error.status.reason != "AlreadyExists":
                    raise
                return False
        return True

    def come_back(self, id: str) -> str:
        look, end = (f"kubectl -n {self._client.namespace} {verb} rayjob {id}" for verb in ("get", "delete"))
        return f"`{look}` shows how far it is, `{end}` ends it"

    def follow(self, id: str, hear: Callable[[str], None]) -> Job:
        """Say what becomes of a RayJob, until it has ended.

        Raises:
            PassingError: Kubernetes does not answer any more.
            UserError: the RayJob was removed.
        """
        said, answered = "", time.monotonic()
        while True:
            try:
                with self._plain_errors():
                    found = self._client.get(RayJob, id).to_dict()
                answered = time.monotonic()
            except PassingError:
                if time.monotonic() - answered > _SILENT_SECONDS:
                    raise
                time.sleep(_POLL_SECONDS)
                continue
            status = found.get("status") or {}
            now = status.get("jobDeploymentStatus") or "New"
            if now != said:
                said = now
                where = f" on the Ray cluster {status['rayClusterName']}" if status.get("rayClusterName") else ""
                hear(f"RayJob {id}: {now}{where}")
            job = _job(found)
            if job.is_over:
                return job
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            code = error.status.code or 0
            kind = PassingError if code == 429 or code >= 500 else UserError
            raise kind(f"Kubernetes, namespace {self._client.namespace}: {error.status.message}") from None
        except httpx2.HTTPError as error:
            raise PassingError(f"Kubernetes does not answer ({error or type(error).__name__})") from None


def _read_manifest(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            documents = [document for document in yaml.safe_load_all(file) if document]
    except OSError as error:
        raise UserError(f"--kubernetes {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--kubernetes {path}: not plain YAML: {getattr(error, 'problem', None) or error}") from None
    found = [
        d for d in documents if isinstance(d, dict) and d.get("kind") == "RayJob" and isinstance(d.get("spec"), dict)
    ]
    if len(found) != 1:
        raise UserError(f"--kubernetes {path}: give a file with one RayJob; it has {len(found)}")
    return {**found[0], "metadata": found[0].get("metadata") or {}}


def _job(found: dict[str, Any]) -> Job:
    """A RayJob's state as a job. Of the exit code only Ray's sentence about it gets there; without one the cluster
    was in trouble, not the run."""
    status = found.get("status") or {}
    stage, of_ray, message = (status.get(key, "") for key in ("jobDeploymentStatus", "jobStatus", "message"))
    state: str
    code: int | None = None
    if stage not in ("Complete", "Failed", "ValidationFailed"):
        state = "running" if stage == "Running" else "pending"
    elif of_ray == "SUCCEEDED":
        state, code = "succeeded", 0
    elif of_ray == "STOPPED":
        state, code = "stopped", 128 + signal.SIGTERM
    else:
        state = "failed"
        told = re.search(r"failed with exit code (-?\d+)", message)
        hopeless = "ValidationFailed" in (stage, status.get("reason"))
        code = exit_code(int(told[1])) if told else 1 if hopeless else os.EX_TEMPFAIL
    sentence = [line for line in message.splitlines() if line.startswith("fapm: ")][-1:] or [message]
    return Job(
        id=found["metadata"]["name"],
        state=state,
        code=code,
        out=found["metadata"].get("annotations", {}).get(_OUT, ""),
        begun=_seconds(status.get("startTime")),
        ended=_seconds(status.get("endTime")),
        message=sentence[0] if state == "failed" else "",
    )


def _seconds(time: str | None) -> float | None:
    return datetime.datetime.fromisoformat(time).timestamp() if time else None
