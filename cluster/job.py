"""Prunes as Ray jobs: sent to a cluster by its Jobs API, followed, looked up and stopped.

What is shipped is fapm itself, never the folder from which somebody sends it. The recipe goes as options, so that what
is shipped stays the same and is kept by the cluster.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import logging
import os
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import fapm
import fapm.cluster
from fapm.cluster.submission import NAME, Job, Submission, exit_code
from fapm.errors import PassingError, UserError, duration
from fapm.recipe import read_yaml
from fapm.reporting.progress import TELL
from fapm.reporting.text import layout
from fapm.version import version

_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 60.0
"""For one answer of the cluster; and in all without an answer, before a follower gives up."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray logs of its uploads."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _staged() -> Iterator[str]:
    """A folder with what is shipped: the package, and what says its version."""
    with tempfile.TemporaryDirectory(prefix="fapm-") as folder:
        for package in (fapm, fapm.cluster):  # of an editable install they are two folders
            there = Path(folder, *package.__name__.split("."))
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package.__path__[0], there, ignore=ignored, dirs_exist_ok=True)
        if version() != "unknown":
            about = Path(folder, f"{NAME}-{version()}.dist-info", "METADATA")
            about.parent.mkdir()
            about.write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version()}\n")
        yield folder


def requirements() -> list[str]:
    """Requirements of fapm beside Ray, for pip; also for buckets in S3."""
    wanted = (text.partition("; extra ==") for text in importlib.metadata.requires(NAME) or [])
    return [name for name, _, extra in wanted if extra.strip(" \"'") in ("", "s3")]


def runtime_env(path: str | None, install: bool) -> dict[str, Any]:
    """Ray's runtime environment of a job, without what is shipped.

    Args:
        path: of a YAML or JSON file with one.
        install: add a pip that installs what fapm needs.

    Raises:
        UserError: the file is not one, or sets what only fapm can set.
    """
    env = read_yaml(path) if path else {}
    taken = [key for key in ("working_dir", "py_modules") if key in env]
    if taken:
        raise UserError(f"--runtime-env {path}: leave {taken[0]} out; fapm ships itself")
    if install:
        installers = [key for key in ("pip", "uv", "conda") if key in env]
        if installers:
            raise UserError(f"--install does nothing beside {installers[0]} in {path}; list there what fapm needs")
        env["pip"] = requirements()
    return env


# The cluster.


class _Client(JobSubmissionClient):
    """Waits for an answer for a minute; Ray's own waits forever."""

    def _do_request(self, method: str, endpoint: str, **how: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": _ANSWER_SECONDS, **how})


class RayJobs:
    """The prunes among the jobs of a Ray cluster, and how to add one.

    Args:
        address: of its Jobs API, as `http://HEAD:8265`.
        env: Ray's runtime environment of new jobs, without what is shipped.

    Raises:
        PassingError: nothing answers there; so by every method.
        UserError: it wants a token that it does not get, or is something else.
    """

    def __init__(self, address: str, env: dict[str, Any] | None = None):
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address {address}: give the cluster's Jobs API, as http://HEAD:8265")
        self.where = {"address": address}
        self._address, self._env = address, env or {}
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray heeds that and RAY_ADDRESS more than what it is told
        with self._plain_errors():
            self._client = _Client(address)

    def jobs(self) -> list[Job]:
        """Jobs that the cluster knows, the newest first."""
        with self._plain_errors():
            known = self._client.list_jobs()
        ours = [_job(details) for details in known if NAME in (details.metadata or {}) and details.submission_id]
        return sorted(ours, key=lambda job: -(job.begun or 0))

    def find(self, id: str, only: bool = False) -> Job:
        """A job by its id, or the newest whose id begins so.

        Args:
            only: there may be no other that begins so.

        Raises:
            UserError: there is none, or several.
        """
        known = self.jobs()
        found = [job for job in known if job.id == id] or [job for job in known if job.id.startswith(id)]
        if not found:
            there = f"it has {', '.join(job.id for job in known[:3])}" if known else "it has none of fapm"
            raise UserError(f"the cluster has no job {id}; {there}")
        if only and len(found) > 1:
            listed = ", ".join(job.id for job in found[:8]) + (", …" if len(found) > 8 else "")
            raise UserError(f"{len(found)} jobs begin with {id}: {listed}; give one of these")
        return found[0]

    def submit(self, submission: Submission, id: str) -> bool:
        """Submit under an id, or say False if there is such a job.

        Raises:
            UserError: the cluster does not take it.
        """
        # A shell that stays would be what Ray's signals reach first.
        command = f"exec env {TELL}=json python3 -m fapm {shlex.join(submission.arguments)} --json"
        about = {NAME: version(), "out": submission.out}
        began = time.monotonic()
        with _staged() as folder, self._plain_errors(), _quiet():
            env = {**self._env, "working_dir": folder}
            for again in itertools.count():
                try:
                    self._client.submit_job(entrypoint=command, submission_id=id, runtime_env=env, metadata=about)
                    return True
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return again > 0  # then it is ours, and the answer was lost
                    if not _may_pass(error) or time.monotonic() - began > _ANSWER_SECONDS:
                        raise
                    time.sleep(_POLL_SECONDS)
        raise AssertionError("not reached")

    def come_back(self, id: str) -> str:
        """How to see what a job does, and how to end it."""
        there = f"{id} --address {self._address}"
        return f"`fapm logs --follow {there}` shows how far it is, `fapm stop {there}` ends it"

    def follow(self, id: str, hear: Callable[[str], None]) -> Job:
        """Give every line that a job says to `hear`, until it has ended."""
        heard, answered = 0, time.monotonic()
        while True:
            try:
                job = _job(self._client.get_job_info(id))
                text = self._said(job)
                answered = time.monotonic()
            except (OSError, RuntimeError, requests.RequestException) as error:
                if time.monotonic() - answered > _ANSWER_SECONDS:
                    gone = f"the Ray cluster at {self._address} does not answer any more ({_short(error)})"
                    raise PassingError(f"{gone}; the job may go on") from None
                time.sleep(_POLL_SECONDS)
                continue
            whole = text if job.is_over else text[: text.rfind("\n") + 1]
            for line in whole[heard:].split("\n"):
                if line:
                    hear(line)
            heard = max(heard, len(whole))
            if job.is_over:
                return job
            time.sleep(_POLL_SECONDS)

    def logs(self, job: Job) -> list[str]:
        """The lines that a job has said until now."""
        with self._plain_errors():
            return self._said(job).splitlines()

    def _said(self, job: Job) -> str:
        if job.state == "pending" or job.message:  # it has not begun, or never did
            return ""
        text: str = self._client.get_job_logs(job.id)
        return text

    def stop(self, job: Job) -> Job:
        """End a job, and wait until it has ended."""
        with self._plain_errors():
            if not job.is_over:
                self._client.stop_job(job.id)
            while not job.is_over:
                time.sleep(_POLL_SECONDS / 5)
                job = _job(self._client.get_job_info(job.id))
        return job

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"--address {self._address}: the cluster wants a token that was not given; set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to the file that holds it"
            ) from None
        except (OSError, requests.RequestException) as error:
            raise PassingError(f"--address {self._address}: no Ray cluster answers there ({_short(error)})") from None
        except (RuntimeError, ValueError) as error:
            kind = PassingError if _may_pass(error) else UserError
            raise kind(f"--address {self._address}: {_short(error)}") from None


def _may_pass(error: Exception) -> bool:
    """Whether the cluster says that it cannot answer now, as one that has just begun does."""
    return "status code 5" in str(error)


def _short(error: BaseException) -> str:
    """Last line of an error; of what requests wraps, only what the system said."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    of_the_system = re.search(r"\[Errno -?\d+\] ([^'\")]+)", lines[-1])
    return of_the_system[1] if of_the_system else lines[-1].strip()[:300]


# Of a failure without a driver's code: the cluster's trouble, which may pass. The environment's will not.
_PASSING = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")


def _job(details: JobDetails) -> Job:
    code = details.driver_exit_code
    if details.status is JobStatus.SUCCEEDED:
        code = 0
    elif details.status is JobStatus.STOPPED:
        code = 128 + signal.SIGTERM
    elif details.status is JobStatus.FAILED:
        if code is None:
            code = os.EX_TEMPFAIL if details.error_type in _PASSING else 1
        code = exit_code(code)
    began = details.driver_exit_code is not None or details.status is not JobStatus.FAILED
    return Job(
        id=str(details.submission_id),
        state=details.status.value.lower(),
        code=code,
        out=(details.metadata or {}).get("out", ""),
        begun=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        message="" if began else (details.message or ""),
    )


def table(found: Sequence[Job]) -> str:
    """Jobs, a line each."""
    if not found:
        return "no job of fapm is known there"
    rows = [("job", "state", "exit", "begun", "took", "out")]
    for job in found:
        begun = datetime.datetime.fromtimestamp(job.begun).isoformat(" ", "seconds") if job.begun else ""
        took = duration((job.ended or time.time()) - job.begun) if job.begun else ""
        rows.append((job.id, job.state, "" if job.code is None else str(job.code), begun, took, job.out))
    return layout(rows, right=(2, 4))
