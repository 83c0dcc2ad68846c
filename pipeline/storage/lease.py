"""Who may change an output folder: one run at a time, also over machines that share nothing but where it is.

A run that wants the folder makes the file `fapm/lock/N` for the next N, which only one can, and touches it every few
seconds; the highest N counts. Another run that finds the file watches it. If it is touched, the run is refused. If it
is not for LEASE_SECONDS, or was made on this machine by a process that is gone, the run makes N + 1, and takes it back
if by then another lock counts than the one that it had watched. No two clocks are ever compared.

The holder may only have been paused. So what it writes lies in a folder of its own, `fapm/tmp/TOKEN`, until it is
renamed to its place, and what it removes is renamed into that folder first. A successor begins by renaming that folder
away: from then on every change that the predecessor or its workers try fails, however late it comes.

In an object store the lock is an object that only one can make, the touch is a second object that is written again, and
what `storage.bucket` says takes the place of the renaming.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fapm.errors import PassingError, UserError
from fapm.layout import LOCKS, TEMPORARY
from fapm.storage.address import open_store
from fapm.storage.local import Folder, plain_errors
from fapm.storage.records import Count, Record, checked
from fapm.storage.store import Store

_Word = Annotated[str, Field(max_length=300)]

BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0
_MOST_BYTES = 1 << 14  # of a lock that is read
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a folder.

    Attributes:
        machine: what its process number belongs to, empty where that cannot be known.
        started: when its process began, in the machine's own ticks: a number may be used again.
        token: of this lease alone.
    """

    host: str
    process: int
    since: str
    machine: str
    started: str
    token: str

    @property
    def gone(self) -> bool:
        """Whether it certainly lives no more: its process would have to be here and is not."""
        return bool(self.machine) and self.machine == _machine() and _started(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


class _Lock(Record, extra="forbid"):
    """Contents of a lock, of any version."""

    host: _Word
    process: Count
    since: _Word
    machine: _Word
    started: _Word
    token: _Word


@contextlib.contextmanager
def lease(address: str, say: Callable[[str], None] = lambda line: None, alone: bool = False) -> Iterator[Store]:
    """Hold the folder at `address`, which is made if it is not there.

    Args:
        alone: no other run can want it, so a store that lets several make one lock will do.

    Yields:
        The folder, to be changed as long as nobody has taken it over; after that every change is a PassingError.

    Raises:
        PassingError: another run holds it.
        UserError: it cannot be written.
    """
    me = Holder(
        host=socket.gethostname(),
        process=os.getpid(),
        since=datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        machine=_machine(),
        started=_started(os.getpid()),
        token=uuid.uuid4().hex,
    )
    there = open_store(address)
    with _lease_folder(there, me, say) if isinstance(there, Folder) else _lease_bucket(there, me, say, alone) as held:
        yield held


@contextlib.contextmanager
def _lease_folder(there: Folder, me: Holder, say: Callable[[str], None]) -> Iterator[Folder]:
    held = Folder(there.path, me.token)
    try:
        number = _take(there, functools.partial(_make, there, me), say)
        with held.changing(there.path):
            lock = held.open(_lock(number), os.O_RDONLY)
        try:
            with _beating(functools.partial(os.utime, lock)):  # one that has been replaced is not touched
                _sweep(held, me, number)
                yield held
        finally:
            os.close(lock)
            with contextlib.suppress(UserError):  # it is the successor's, or cannot be written any more
                held.remove(_lock(number))
    finally:
        _leave(there, me)


@contextlib.contextmanager
def _lease_bucket(there: Any, me: Holder, say: Callable[[str], None], alone: bool) -> Iterator[Any]:
    number = _take(there, functools.partial(_make_object, there, me, alone), say)
    held = there.under(me.token, number)
    beats = itertools.count()
    beat_now = functools.partial(_beat_bucket, there, number, beats)
    try:
        with _beating(beat_now):
            held.check()  # it may have been paused until now, and the uploads are the successor's
            held.end_uploads()
            for name in there.files(LOCKS):
                if int(name.rpartition("/")[2].split(".")[0]) < number:
                    there.remove(name)
            yield held
    finally:
        with contextlib.suppress(UserError):
            held.check()  # else they are the successor's
            held.end_uploads()  # of workers that were lost
            held.remove_folder(LOCKS)


def _make_object(there: Any, me: Holder, alone: bool, name: str) -> bool:
    """Make a lock in a store, and see whether no other can have made it too."""
    text = json.dumps(asdict(me)).encode()
    if not there.write_new(name, text):
        return False
    if alone or there.refuses_a_second(name, text):
        return True
    there.remove(name)
    raise UserError(
        f"--out {there.address}: this store accepts a file that may only be made once (If-None-Match) a second time: "
        "two runs could write there at once; write to another store, or say --alone if no other can be at work there"
    )


def _beat_bucket(there: Any, number: int, beats: Iterator[int]) -> None:
    there.write(f"{_lock(number)}.beat", str(next(beats)).encode())


def _lock(number: int) -> str:
    return f"{LOCKS}/{number:06d}"


def _take(folder: Store, make: Callable[[str], bool], say: Callable[[str], None]) -> int:
    """Make the next lock, once the newest there is has no living holder; returns its number."""
    while True:
        number = _newest(folder)
        silent = _wait_until_silent(folder, _lock(number), say) if number else None
        if number and silent is None:
            continue  # it has ended, and others may have begun
        mine = number + 1
        if not make(_lock(mine)):
            continue
        # Who looked before one lock was there, and made its own after that was gone, would be a second one at work.
        if _newest(folder, but=mine) == number and (not number or _look(folder, _lock(number)) == silent):
            return mine
        folder.remove(_lock(mine))


def _make(folder: Folder, me: Holder, name: str) -> bool:
    """Make a lock, and the folder without which its holder cannot change anything."""
    mine = f"{TEMPORARY}/{me.token}"
    _make_folders(folder, mine, LOCKS)
    with plain_errors(folder.path):
        try:
            _write(folder, f"{mine}/lock", me, os.O_CREAT | os.O_TRUNC)
            _make_exclusively(folder, f"{mine}/lock", name, me)
        except (FileExistsError, FileNotFoundError):
            return False  # another run was faster, or has ended and removed what was empty
    if folder.is_there(mine):
        return True
    with contextlib.suppress(FileNotFoundError):
        folder.unlink(name)  # swept away before it could count
    return False


def _write(folder: Folder, name: str, me: Holder, flags: int) -> None:
    file = folder.open(name, os.O_WRONLY | flags)
    try:
        os.write(file, json.dumps(asdict(me)).encode())
    finally:
        os.close(file)


def _newest(folder: Store, but: int = 0) -> int:
    """The highest number of a lock, 0 if there is none."""
    return max((number for number in map(int, _numbers(folder)) if number != but), default=0)


def _make_folders(folder: Folder, *names: str) -> None:
    for name in names:
        with plain_errors(folder.path):
            for more in reversed(range(_TRIES)):
                try:
                    folder.make_folder(name)
                    break
                except FileNotFoundError:  # another run that ended has just removed the parent, which was empty
                    if not more:
                        raise


def _numbers(folder: Store) -> list[str]:
    if not isinstance(folder, Folder):
        return [name for name in (path.rpartition("/")[2] for path in folder.files(LOCKS)) if name.isdecimal()]
    with plain_errors(folder.path), contextlib.suppress(FileNotFoundError):
        return [name for name in folder.names(LOCKS) if name.isdecimal()]
    return []


def _make_exclusively(folder: Folder, text: str, name: str, me: Holder) -> None:
    """Let a file appear under a name that no other has, with its content where the file system can."""
    try:
        folder.link(text, name)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # no hard links there
        _write(folder, name, me, os.O_CREAT | os.O_EXCL)


def _wait_until_silent(folder: Store, lock: str, say: Callable[[str], None]) -> tuple[Holder | None, Any] | None:
    """Contents of a lock whose holder is gone or has not touched it for long; None when it is not there.

    Raises:
        PassingError: it touches it.
    """
    began, said = time.monotonic(), False
    first = _look(folder, lock)
    while first:
        holder, touched = first
        silent = time.monotonic() - began
        if holder and holder.gone:
            say(f"note: {folder.address} was held by {holder}, which is gone")
            return first
        if silent >= LEASE_SECONDS:
            say(f"note: {folder.address} was held by {holder or 'a run'}, silent since: taken over")
            return first
        if silent > 2 * BEAT_SECONDS and not said:
            said = True
            say(f"note: {folder.address} is held by {holder or 'a run'}, but silent: waiting whether it is gone")
        time.sleep(BEAT_SECONDS / 10)
        now = _look(folder, lock)
        if now is None:
            break
        if now[1] != touched:
            who = now[0] or "another run"
            raise PassingError(f"--out {folder.address} is being written by {who}; wait until it has ended, or stop it")
    return None


def _look(folder: Store, lock: str) -> tuple[Holder | None, Any] | None:
    """Contents of a lock, and something that differs after each touch; None if it is not there."""
    touched: Any
    if isinstance(folder, Folder):
        try:
            file = folder.open(lock, os.O_RDONLY)  # opening it asks a file server for the truth
            try:
                text, touched = os.read(file, _MOST_BYTES), os.fstat(file).st_mtime_ns
            finally:
                os.close(file)
        except OSError:
            return None
    else:
        there = folder.files(LOCKS)
        if lock not in there:
            return None
        try:
            text, touched = folder.read(lock), there.get(f"{lock}.beat")
        except PassingError:
            raise
        except UserError:
            return None
    try:
        return Holder(**checked(text, _Lock, lock)), touched
    except UserError:
        return None, touched


def last_sign_of_life(folder: Store) -> tuple[str, float] | None:
    """Who holds a folder, and for how many seconds nothing was heard of it; None if nobody does, or it is gone.

    Only to be shown: it takes this machine's clock for that of where the folder is.
    """
    number = _newest(folder)
    found = _look(folder, _lock(number)) if number else None
    if found is None:
        return None
    holder, _ = found
    if holder and holder.gone:
        return None
    touched = max(folder.changed(name) for name in (_lock(number), f"{_lock(number)}.beat") if folder.has(name))
    return str(holder or "another run"), max(0.0, time.time() - touched)


@contextlib.contextmanager
def _beating(touch: Callable[[], None]) -> Iterator[None]:
    """Touch a lock meanwhile, on a thread."""
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(touch, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _beat(touch: Callable[[], None], ended: threading.Event) -> None:
    """Touch a lock, again and again."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError, UserError):
            touch()


def _sweep(held: Folder, me: Holder, number: int) -> None:
    """Take all other runs their means to change anything, and remove what they left half-written."""
    with held.changing(held.path):
        others = [name for name in held.names(TEMPORARY) if name != me.token]
    for name in others:
        held.remove_folder(f"{TEMPORARY}/{name}")
    for name in _numbers(held):
        if int(name) < number:
            held.remove(f"{LOCKS}/{name}")
    with contextlib.suppress(FileNotFoundError):
        held.unlink(f"{TEMPORARY}/{me.token}/lock")


def _leave(folder: Folder, me: Holder) -> None:
    """Remove what only the lease needed."""
    with contextlib.suppress(OSError, UserError):
        folder.remove_folder(f"{TEMPORARY}/{me.token}")
    for name in (TEMPORARY, LOCKS, "fapm"):
        with contextlib.suppress(OSError, UserError):
            folder.remove_empty(name)


def _machine() -> str:
    """Identity of what process numbers here belong to: this start of the machine, and the container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process of this machine began, empty if it is not there."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
