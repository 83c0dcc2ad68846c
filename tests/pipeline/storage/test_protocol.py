"""pytest tests/pipeline/storage/test_protocol.py: the protocol of the hold as a model, in every order of its steps.

Two runs with different recipes want one folder; each has a worker that writes one object of it. Every step of
`storage.lease` and `storage.bucket` that others can see is one of the model's. Between any two steps a run may be
paused for long, go on, or die, and so may its worker. All states that can be reached are looked at, and in each:

- what is written by a run that another has taken the folder over from does not appear, where it is moved into place or
  uploaded in parts;
- an object that the successor has written stays the successor's, where it is written in one request.

A step that is left out (`without`) makes the search find the order in which that goes wrong: so the model can fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

A, B = 0, 1


@dataclass(frozen=True)
class Run:
    """A run: what its driver does next, what it has seen, and how it and its worker are.

    Attributes:
        seen: number of the lock that was newest, its owner and how often it had been touched.
        was: `alive`, `paused`, or `dead`; `pauses` that are left to it.
        worker: what its worker does next; `version` that the object had when it looked; `stuck`: it is paused.
    """

    at: str = "look"
    seen: tuple[int, int, int] | None = None
    number: int = 0
    was: str = "alive"
    pauses: int = 1
    worker: str = "idle"
    version: int = 0
    stuck: bool = False
    rests: int = 1


@dataclass(frozen=True)
class World:
    """The folder, and the runs.

    Attributes:
        locks: (number, owner, touches).
        means: runs whose folder for temporary files is there; in a store those with an upload under way.
        version, owner: of the object that both write.
        entered: the runs that took others their means.
        last: the run whose lock was made last.
    """

    runs: tuple[Run, Run] = (Run(), Run())
    locks: frozenset[tuple[int, int, int]] = frozenset()
    means: frozenset[int] = frozenset()
    version: int = 0
    owner: int | None = None
    entered: frozenset[int] = frozenset()
    last: int = -1
    wrong: str = ""

    def of(self, me: int, **changes: object) -> World:
        runs = list(self.runs)
        runs[me] = replace(runs[me], **changes)  # type: ignore[arg-type]
        return replace(self, runs=tuple(runs))

    def successor(self, me: int) -> int | None:
        """The other run, if it has taken the folder over: its lock was made later, and it took this one its means."""
        other = 1 - me
        return other if other in self.entered and self.last == other else None

    @property
    def newest(self) -> tuple[int, int, int]:
        return max(self.locks, default=(0, -1, 0))

    def lock(self, number: int) -> tuple[int, int, int] | None:
        return next((lock for lock in self.locks if lock[0] == number), None)

    def without_lock(self, number: int) -> World:
        return replace(self, locks=frozenset(lock for lock in self.locks if lock[0] != number))

    def touched(self, me: int) -> World:
        """One that works touches its lock, if that is still its own."""
        locks = frozenset((n, o, t + 1 if o == me and t < 2 else t) for n, o, t in self.locks)
        return replace(self, locks=locks)


WORKING = ("sweep", "abort", "clean", "work", "leave", "leave means", "leave lock")


def looked(world: World, me: int) -> Iterator[World]:
    """The steps by which a lock is watched, the same in both protocols."""
    run = world.runs[me]
    if run.at == "look":
        newest = world.newest
        yield world.of(me, at="watch" if newest[0] else "means", seen=newest)
    elif run.at == "watch":
        there = world.lock(run.seen[0])
        if there is None:
            yield world.of(me, at="look")
        elif there != run.seen or world.runs[there[1]].was == "alive":
            yield world.of(me, at="refused")
        else:  # not touched for LEASE_SECONDS: its holder is dead, or stands still
            yield world.of(me, at="means")
    elif run.at == "verify":
        others = max((lock for lock in world.locks if lock[0] != run.number), default=(0, -1, 0))
        if others == run.seen:
            yield world.of(me, at="sweep")
        else:
            yield world.without_lock(run.number).of(me, at="look")
    elif run.at == "clean":
        kept = frozenset(lock for lock in world.locks if lock[0] >= run.number)
        yield replace(world, locks=kept).of(me, at="work")


def local(world: World, me: int, without: str) -> Iterator[World]:
    """`storage.lease` in a folder: what is not in its place lies in a folder of the run's own."""
    run = world.runs[me]
    yield from looked(world, me)
    if run.at == "means":
        yield replace(world, means=world.means | {me}).of(me, at="lock")
    elif run.at == "lock":
        number = run.seen[0] + 1
        if world.lock(number) or me not in world.means:
            yield world.of(me, at="look")
        else:
            made = replace(world, locks=world.locks | {(number, me, 0)}, last=me)
            yield made.of(me, at="verify" if without == "mine" else "mine", number=number)
    elif run.at == "mine":
        yield world.of(me, at="verify") if me in world.means else world.without_lock(run.number).of(me, at="look")
    elif run.at == "sweep":
        if me not in world.means:  # what it removes it moves there first
            yield world.of(me, at="refused")
        else:
            swept = world if without == "sweep" else replace(world, means=frozenset({me}))
            yield replace(swept, entered=world.entered | {me}).of(me, at="clean")
    elif run.at == "work":
        yield world.of(me, at="leave")
    elif run.at == "leave":
        yield (world.without_lock(run.number) if me in world.means else world).of(me, at="leave means")
    elif run.at == "leave means":
        yield replace(world, means=world.means - {me}).of(me, at="done")


def moving(world: World, me: int, without: str) -> Iterator[World]:
    """A worker that writes into its run's own folder, and moves it into place."""
    run = world.runs[me]
    if run.worker == "idle" and run.at in ("work", "leave"):
        yield world.of(me, worker="move")
    elif run.worker == "move":
        if me in world.means:
            late = world.successor(me) is not None
            said = f"{'AB'[me]} has moved something into place after it was taken over" if late else ""
            yield replace(world, version=world.version + 1, owner=me, wrong=said).of(me, worker="ended")
        else:
            yield world.of(me, worker="ended")


def bucket(world: World, me: int, without: str) -> Iterator[World]:
    """`storage.lease` in a store. Uploads under way take the place of the run's own folder."""
    run = world.runs[me]
    yield from looked(world, me)
    ignores = without == "conditions"
    if run.at == "means":
        yield world.of(me, at="lock")
    elif run.at == "lock":
        number = run.seen[0] + 1
        if world.lock(number) and not ignores:
            yield world.of(me, at="look")
        else:
            made = world.without_lock(number)
            made = replace(made, locks=made.locks | {(number, me, 0)}, last=me)
            yield made.of(me, at="back", number=number)
            yield made.of(me, at="lock again", number=number)  # the answer was lost
    elif run.at == "lock again":
        there = world.lock(run.number)
        if there is None:
            made = replace(world, locks=world.locks | {(run.number, me, 0)}, last=me)
            yield made.of(me, at="back")
        else:
            yield world.of(me, at="back")
    elif run.at == "back":
        there = world.lock(run.number)
        yield world.of(me, at="probe" if there and there[1] == me else "look")
    elif run.at == "probe":  # the same once more, which a store that keeps its word refuses
        yield world.of(me, at="refused" if ignores else "verify")
    elif run.at == "sweep":
        yield world.of(me, at="abort" if checks(world, me) else "refused")
    elif run.at == "abort":
        swept = world if without == "sweep" else replace(world, means=frozenset())
        yield replace(swept, entered=world.entered | {me}).of(me, at="clean")
    elif run.at == "work":
        yield world.of(me, at="leave")
    elif run.at == "leave":  # else all of it is the successor's
        mine = checks(world, me)
        yield (replace(world, means=frozenset()) if mine else world).of(me, at="leave lock" if mine else "done")
    elif run.at == "leave lock":
        yield (world if without == "token" else world.without_lock(run.number)).of(me, at="done")


def checks(world: World, me: int) -> bool:
    """Bucket.check: the newest lock is this run's, by its token."""
    return world.newest[:2] == (world.runs[me].number, me)


def uploading(world: World, me: int, without: str) -> Iterator[World]:
    """A worker that uploads in parts: the upload is there before the look at the lock, and completed after it."""
    run = world.runs[me]
    if run.worker == "idle" and run.at in ("work", "leave"):
        yield world.of(me, worker="begin")
    elif run.worker == "begin":
        yield replace(world, means=world.means | {me}).of(me, worker="check")
    elif run.worker == "check":
        yield world.of(me, worker="complete" if without == "check" or checks(world, me) else "ended")
    elif run.worker == "complete":
        if me in world.means:
            late = world.successor(me) is not None
            said = f"{'AB'[me]} has completed an upload after it was taken over" if late else ""
            made = replace(world, version=world.version + 1, owner=me, means=world.means - {me}, wrong=said)
            yield made.of(me, worker="ended")
        else:
            yield world.of(me, worker="ended")


def putting(world: World, me: int, without: str) -> Iterator[World]:
    """A worker that writes in one request, on the condition that nobody has written since it looked."""
    run = world.runs[me]
    if run.worker == "idle" and run.at in ("work", "leave"):
        yield world.of(me, worker="head")
    elif run.worker == "head":
        yield world.of(me, worker="check", version=world.version)
    elif run.worker == "check":
        yield world.of(me, worker="put" if checks(world, me) else "ended")
    elif run.worker == "put":
        if world.version != run.version and without != "etag":
            yield world.of(me, worker="head")
        else:
            of_a_successor = world.owner is not None and world.successor(me) == world.owner
            said = f"{'AB'[me]} has written over what its successor had written" if of_a_successor else ""
            made = replace(world, version=world.version + 1, owner=me, wrong=said)
            yield made.of(me, worker="ended")
            yield made.of(me, worker="put again")  # the answer was lost
    elif run.worker == "put again":  # refused, since it is there: its own
        yield world.of(me, worker="ended" if world.owner == me else "head")


PROTOCOLS = {"folder": (local, moving), "uploads": (bucket, uploading), "requests": (bucket, putting)}


def next_of(world: World, protocol: str, without: str) -> Iterator[World]:
    """Every state that may follow."""
    drive, write = PROTOCOLS[protocol]
    for me in (A, B):
        run = world.runs[me]
        ended = run.at in ("refused", "done")
        if run.was == "alive" and not ended:
            yield from drive(world, me, without)
            yield world.of(me, was="dead")
            if run.pauses:
                yield world.of(me, was="paused", pauses=run.pauses - 1)
        if run.was == "paused":
            yield world.touched(me).of(me, was="alive") if run.at in WORKING else world.of(me, was="alive")
        if not run.stuck and run.worker not in ("idle", "ended"):
            yield from write(world, me, without)
            if run.rests:
                yield world.of(me, stuck=True, rests=run.rests - 1)
        elif run.stuck:
            yield world.of(me, stuck=False)
        elif run.worker == "idle" and run.was == "alive":
            yield from write(world, me, without)


@dataclass
class Found:
    """What a search has come to: how many states there are, the first that is wrong, and whether both can work."""

    states: int
    wrong: str
    both_worked: bool
    taken_over: bool


def search(protocol: str, without: str = "") -> Found:
    """Look at every state that can be reached."""
    seen, waiting = {World()}, deque([World()])
    found = Found(0, "", False, False)
    while waiting:
        world = waiting.popleft()
        found.both_worked |= len(world.entered) == 2
        found.taken_over |= any(world.runs[me].at == "work" and world.successor(me) is not None for me in (A, B))
        for following in next_of(world, protocol, without):
            if following.wrong:
                return replace(found, states=len(seen), wrong=following.wrong)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return replace(found, states=len(seen))


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whatever_the_order_no_two_publish(protocol):
    found = search(protocol)
    assert not found.wrong
    assert found.both_worked and found.taken_over  # one after the other, and one instead of the other
    assert found.states > 10_000
    print(f"{protocol}: {found.states:,} states")


@pytest.mark.parametrize(
    ("protocol", "without"),
    [("folder", "sweep"), ("uploads", "sweep"), ("requests", "etag")],
)  # fmt: skip
def test_without_a_step_the_search_finds_what_goes_wrong(protocol, without):
    assert "taken over" in search(protocol, without).wrong or "successor" in search(protocol, without).wrong


@pytest.mark.parametrize("protocol", ["uploads", "requests"])
def test_where_conditions_are_ignored_nobody_works(protocol):
    found = search(protocol, "conditions")
    assert not found.wrong and not found.both_worked
