"""Staging between host and device: inputs are read into page-locked memory, copied on, and stay while there is room.

The pairs of a section that fit the device's budget go there once, while the section before is worked on, and stay for
all passes; those whose scores were counted for groups over several shards stay until the shard is written, while there
is room. What does not fit goes there again for every pass, a piece ahead of the arithmetic.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fapm.recipe import Recipe
from fapm.scoring.engine import DeviceEngine, StoredChunk
from fapm.scoring.methods import BLOCK
from fapm.shard.chunk import stored_chunk
from fapm.shard.section import Piece, Section, Sizes, Slice, slack
from fapm.shard.writing import BUFFERS, already_done

RING = 4
"""Buffers between storage and device, and reads under way at once."""

WORK_BYTES = 128
"""Of the device, that a pass takes for each element of a chunk beside what is stored of it, at most."""

_STREAMED = 3  # pieces that do not stay, at once: one in use, the next on their way
_CHUNK = 1 << 24  # elements: so many that starting an operation costs less than it
_BUFFER = 64 << 20  # bytes
_BATCH = 256 << 20
ENOUGH_BYTES = RING * _BUFFER + BUFFERS * _BUFFER // 2
"""Buffers between storage, device and output, at most, whatever the budget."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How a worker divides its memory and its device's, in bytes.

    Attributes:
        cut: sizes of what goes to the device.
        ring: each of RING buffers on the way there.
        output: each of the buffers on the way back.
        host: what is left for all other input buffers.
        resident: pairs on the device, in all.
    """

    cut: Sizes
    ring: int
    output: int
    host: int
    resident: int


def shares(memory: int, device_memory: int, streamed: bool = False) -> Shares:
    """Divide `memory`, a worker's for input and output buffers, and `device_memory`.

    Args:
        streamed: nothing stays on the device, and less is there at once.
    """
    ring = min(_BUFFER, max(BLOCK * 32, _power_of_two(min(memory // (2 * RING), device_memory // 16))))
    output = ring // 2
    work = device_memory // (32 if streamed else 4)
    chunk = min(_CHUNK, max(BLOCK, _power_of_two(work // WORK_BYTES)))
    resident = 0 if streamed else max(0, device_memory - chunk * WORK_BYTES - _STREAMED * ring)
    cut = Sizes(chunk, output, ring - slack(ring), min(_BATCH, max(ring, resident // 4)))
    return Shares(cut, ring, output, memory - RING * ring - BUFFERS * output, resident)


def _power_of_two(n: int) -> int:
    """The highest that is not above n."""
    return 1 << max(0, n.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Staged:
    """A piece on the device; how many bytes of it were read now, and the seconds that this took."""

    piece: Piece
    held: list[StoredChunk]
    read_bytes: int
    seconds: float

    def slices(self) -> Iterator[tuple[Slice, StoredChunk]]:
        return zip(self.piece.slices, self.held, strict=True)


ReadPiece = Callable[[Piece, np.ndarray], tuple[list[list[np.ndarray]], float]]
"""Reads a piece into a buffer; returns the bytes of the sides of each slice, and the seconds that it took."""


_Key = tuple[str, int]  # tensor, first element


class _Kept(NamedTuple):
    chunk: StoredChunk
    nbytes: int


class Staging:
    """A worker's device. All but the staging itself is for the thread that computes."""

    def __init__(self, device: DeviceEngine, recipe: Recipe, shares: Shares, load: ReadPiece):
        self._device, self._recipe, self._load = device, recipe, load
        self._threads = ThreadPoolExecutor(RING, thread_name_prefix="stage")
        self._ring: queue.SimpleQueue[tuple[np.ndarray, Callable[[], None]]] = queue.SimpleQueue()
        for _ in range(RING):
            self._ring.put((device.host(shares.ring), already_done))
        self._room = shares.resident
        self._spare = shares.resident // 2  # stays free of what is only kept
        self._kept: dict[_Key, _Kept] = {}

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._kept.clear()

    def fits(self, section: Section) -> bool:
        """Whether there is room for a section's pairs, where others that are only kept make way."""
        parts = _parts(section)
        missing = sum(part.nbytes for key, part in parts.items() if key not in self._kept)
        return missing <= self._room + sum(kept.nbytes for key, kept in self._kept.items() if key not in parts)

    def start(self, section: Section) -> list[Future[Staged]] | None:
        """Begin to bring a section's pairs, or say None if there is no room for them now."""
        if not self.fits(section):
            return None
        parts = _parts(section)
        known = {key: self._kept.pop(key, None) for key in parts}
        self._room -= sum(part.nbytes for key, part in parts.items() if not known[key])
        while self._room < 0:
            self._room += self._kept.pop(next(iter(self._kept))).nbytes
        return [self._submit(piece, [known[_key(part)] for part in piece.slices]) for piece in section.on_device]

    def _submit(self, piece: Piece, known: Sequence[_Kept | None]) -> Future[Staged]:
        return self._threads.submit(self._stage, piece, [kept and kept.chunk for kept in known])

    def release(self, stagings: Sequence[Future[Staged]], section: Section, keep: bool) -> None:
        """Forget a section's pairs, or keep them for the step after this one while there is room."""
        wait(stagings)
        for piece, staging in zip(section.on_device, stagings, strict=True):
            self._room += piece.nbytes
            if staging.exception() or not keep:
                continue
            for part, chunk in zip(piece.slices, staging.result().held, strict=True):
                if self._room - part.nbytes >= self._spare:
                    self._room -= part.nbytes
                    self._kept[_key(part)] = _Kept(chunk, part.nbytes)

    def stream(self, pieces: Sequence[Piece]) -> Iterator[Staged]:
        """One pass over pieces that do not stay: the next is on its way while one is used."""
        ahead: list[Future[Staged]] = []
        waiting = list(reversed(pieces))
        try:
            while waiting or ahead:
                while waiting and len(ahead) < _STREAMED - 1:
                    piece = waiting.pop()
                    ahead.append(self._submit(piece, [self._kept.get(_key(part)) for part in piece.slices]))
                yield ahead.pop(0).result()
        finally:
            wait(ahead)

    def _stage(self, piece: Piece, known: Sequence[StoredChunk | None]) -> Staged:
        missing = [part for part, chunk in zip(piece.slices, known, strict=True) if chunk is None]
        if not missing:
            return Staged(piece, [chunk for chunk in known if chunk], 0, 0.0)
        buffer, sent = self._ring.get()
        try:
            sent()
            nbytes = sum(part.nbytes for part in missing)
            views, seconds = self._load(Piece(tuple(missing), nbytes), buffer)
            puts = zip(missing, views, strict=True)
            made = iter([stored_chunk(part, self._device.put(*sides), self._recipe) for part, sides in puts])
            sent = self._device.sent()
        except BaseException:
            self._ring.put((buffer, already_done))  # whatever is on its way from it will not be used
            raise
        self._ring.put((buffer, sent))
        return Staged(piece, [chunk or next(made) for chunk in known], nbytes, seconds)


def _key(part: Slice) -> _Key:
    return part.tensors[0].name, part.start


def _parts(section: Section) -> dict[_Key, Slice]:
    """Slices that go to the device."""
    return {_key(part): part for piece in section.on_device for part in piece.slices}
