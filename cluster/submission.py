"""Submissions: recipes whose paths are settled, sent to a cluster under an id of their own.

The id is made of the recipe and the identity of its inputs, and ends with the number of the try: a schedule that fires
again over the same inputs finds the job of last time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fapm import fields
from fapm.errors import UserError
from fapm.formats.newest import LATEST
from fapm.manifest.state import State, identity, look
from fapm.recipe import PATHS, Recipe, command_words
from fapm.storage.address import absolute, input_elsewhere, is_repository, open_store, split

NAME = "fapm"


@dataclass(frozen=True)
class Submission:
    """A prune that is ready to be sent.

    Attributes:
        recipe: its paths are absolute, without fields where they could be settled.
        digest: of the recipe as it was given and of the inputs.
        state: of the output folder, None where the inputs are not seen from here.
        ray: where the job runs: `auto` for the cluster's workers.
    """

    recipe: Recipe
    digest: str
    state: State | None
    ray: str
    overwrite: bool

    @property
    def out(self) -> str:
        return self.recipe.out

    def id(self, attempt: int) -> str:
        """Of the job that it becomes at its first, second, … try."""
        return f"{NAME}-{self.digest}-{attempt}"

    @property
    def arguments(self) -> list[str]:
        """Of `fapm`."""
        return [*command_words(self.recipe), "--ray", self.ray, *(["--overwrite"] if self.overwrite else [])]


def make_submission(recipe: Recipe, ray: str, overwrite: bool, say: Callable[[str], None]) -> Submission:
    """Check a prune as far as that is possible from here, and settle its paths.

    Raises:
        UserError: what `fapm prune` would raise before it begins.
    """
    base, *finetuned = map(input_elsewhere, recipe.checkpoints)
    given = recipe.at(base, finetuned).model_copy(update={"out": absolute(recipe.out)})
    if is_repository(given.out):
        return Submission(given, _digest(given, None), None, ray, overwrite)
    if not _is_seen(given):
        say(f"note: {' and '.join(given.checkpoints)} are not seen from here; the cluster will look")
        return Submission(given, _digest(given, None), None, ray, overwrite)
    try:
        plan, state = look(given)
        overwrite = overwrite and state == "new"
    except UserError:
        if not overwrite:
            raise
        plan, state = look(given, overwrite)
    for side in PATHS:
        if getattr(plan.recipe, side) != getattr(given, side):
            say(f"{side}: {getattr(recipe, side)} is {getattr(plan.recipe, side)}")
    for warning in plan.warnings:
        say(f"note: {warning}")
    settled = plan.recipe.literal()
    return Submission(settled, _digest(given, identity(plan)), state, ray, overwrite)


def _is_seen(recipe: Recipe) -> bool:
    """Whether any input is seen from this machine: if only one is, the others are missing."""
    for path in recipe.checkpoints:
        address = fields.fill(path, fields.times())
        folder, name = split(address)
        with contextlib.suppress(UserError):  # perhaps only the cluster may look
            if open_store(address).exists() or (name == LATEST and open_store(folder).exists()):
                return True
    return False


def _digest(given: Recipe, inputs: dict[str, Any] | None) -> str:
    what = [given.decides(), {side: getattr(given, side) for side in PATHS}, inputs, *given.checkpoints[2:]]
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Job:
    """A prune as a cluster knows it.

    Attributes:
        state: pending, running, stopped, succeeded or failed.
        code: that with which it ended, None as long as it has not; as `fapm prune` would end, 128 + N after signal N.
        begun, ended: seconds since 1970.
        message: the cluster's own about a job that never began.
    """

    id: str
    state: str
    code: int | None
    out: str
    begun: float | None
    ended: float | None
    message: str

    @property
    def is_over(self) -> bool:
        return self.state not in ("pending", "running")

    @property
    def attempt(self) -> int:
        number = self.id.rpartition("-")[2]
        return int(number) if number.isdecimal() else 0


def exit_code(returned: int) -> int:
    """Exit code as a shell gives it: 128 + N where signal N has ended the process, which others write as -N."""
    return 128 - returned if returned < 0 else returned


@dataclass(frozen=True)
class Sent:
    """Fate of a submission: `nothing to do`, `already running`, or `submitted`; and the job, if there is one."""

    how: str
    id: str | None


class Place(Protocol):
    """Where jobs go to: `fapm.cluster.job` and `fapm.cluster.kubernetes` have one each.

    Attributes:
        where: says which, in the facts of a submission.
    """

    where: dict[str, str]

    def jobs(self) -> list[Job]:
        """The prunes that are known there."""
        ...

    def submit(self, submission: Submission, id: str) -> bool:
        """Submit under an id, or say False if there is such a job."""
        ...

    def come_back(self, id: str) -> str:
        """How to see what a job does, and how to end it."""
        ...

    def follow(self, id: str, hear: Callable[[str], None]) -> Job:
        """Give what there is to hear of a job to `hear`, a line at a time, until it has ended."""
        ...


def send(submission: Submission, place: Place) -> Sent:
    """Submit, unless the same has been done or is being done."""
    earlier = [job for job in place.jobs() if job.id == submission.id(job.attempt)]
    instead = decide(earlier, submission.state)
    if instead:
        return instead
    id = submission.id(1 + max((job.attempt for job in earlier), default=0))
    return Sent("submitted" if place.submit(submission, id) else "already running", id)  # else somebody was faster


def decide(earlier: Sequence[Job], state: State | None) -> Sent | None:
    """Alternative to submitting, if there is one.

    Args:
        earlier: the jobs of the same submission.
        state: of the output folder, None where it is not seen: then a new job finds out what there is to do.
    """
    at_work = next((job for job in earlier if not job.is_over), None)
    if at_work:
        return Sent("already running", at_work.id)
    if state == "finished":
        return Sent("nothing to do", next((job.id for job in earlier if job.code == 0), None))
    return None
