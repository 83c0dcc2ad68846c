"""Reading: a section's pieces, ahead of the arithmetic and within a memory budget.

A section that fits the budget is resident: each piece is read once, and every pass over it finds it in memory. One that
does not is streamed: every pass reads the pieces again, two at a time. The arithmetic cannot tell. What a device takes
goes through `staging`.
"""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fapm.formats.dtypes import itemsize
from fapm.formats.tensor import Part, Side, Sides, TensorInfo
from fapm.planning.plan import PairedTensor
from fapm.recipe import Recipe
from fapm.scoring.engine import DeviceEngine, StoredChunk
from fapm.shard.section import ALIGN, ALIGN_SMALL, LARGE, PIECE_BYTES, Piece, Section, Slice, sections, slack
from fapm.shard.staging import Shares, Staged, Staging
from fapm.storage.store import Store

BUFFER_BYTES = PIECE_BYTES + slack(PIECE_BYTES)
_FEWEST = 2  # buffers that streaming needs: one in use, one being read
_SPARE = 8  # buffers in which nothing is kept from one step to the next
OVERHEAD_BYTES = 48 << 20
"""Bytes that a worker needs beside its input buffers: output buffers, histograms, a chunk's temporaries."""

ENOUGH_BYTES = 384 << 20
"""Input buffers for local files, at most, whatever the budget. To read a file again from the system's cache costs less
than the first touch of fresh memory: a pair of 3 GB in one tensor takes 4 s by three readings and 6.5 s in memory of
its own. What comes over a network is worth all the memory that there is."""


class Memory:
    """Buffers of one size within a budget of bytes. Those given back are used again: fresh pages cost ten reads.

    For one thread: buffers are taken and given back by the one that computes.
    """

    def __init__(self, budget: int):
        self._left = self.buffers = max(_FEWEST, budget // BUFFER_BYTES)
        self._free: list[mmap.mmap] = []

    def limit(self, budget: int) -> None:
        """Have another budget from now on; what is taken comes back first."""
        buffers = max(_FEWEST, budget // BUFFER_BYTES)
        self._left += buffers - self.buffers
        self.buffers = buffers
        while self._left < 0 and self._free:
            self._free.pop().close()
            self._left += 1

    @property
    def room(self) -> int:
        """How many buffers can be taken now."""
        return self._left + len(self._free)

    def take(self) -> mmap.mmap:
        """A buffer of BUFFER_BYTES; there must be room for it."""
        if self._free:
            return self._free.pop()
        assert self._left > 0, "no room"
        self._left -= 1
        return mmap.mmap(-1, BUFFER_BYTES)

    def give(self, buffer: mmap.mmap) -> None:
        self._free.append(buffer)


@dataclass
class Loaded:
    """A piece in memory: for every slice the bytes of its sides, in the order of `Slice.sources`; and what it took."""

    piece: Piece
    held: list[list[np.ndarray]]
    seconds: float

    def slices(self) -> Iterator[tuple[Slice, list[np.ndarray]]]:
        return zip(self.piece.slices, self.held, strict=True)


class Loading(NamedTuple):
    """A piece on its way into memory. `counted`: it was kept by a step before, to which its bytes count."""

    future: Future[Loaded]
    buffer: mmap.mmap
    counted: bool = False


class Held(NamedTuple):
    """Pieces of a section that stay in memory while it is worked on, or are on their way. None: they are streamed."""

    host: list[Loading] | None
    device: list[Future[Staged]] | None


NOTHING = Held(None, None)


class SectionReader:
    """Reads pieces on threads of its own, ahead of the one that computes.

    `bytes_read` counts what that one has used, or thrown away; `seconds` how long the threads took for it.

    Args:
        checkpoints: where the tensors lie: base, and the fine-tuned ones, as they are numbered.
        budget: bytes for buffers.
    """

    def __init__(self, checkpoints: Sequence[Store], budget: int):
        base, *finetuned = checkpoints
        self._pairs = [Sides(base, one) for one in finetuned]
        self._at_once = max(store.reads_at_once for store in checkpoints)
        self.is_far = self._at_once > _FEWEST
        self._budget = budget
        self.memory = Memory(self._most(budget))
        self._threads = ThreadPoolExecutor(self._at_once, thread_name_prefix="read")
        self._staging: Staging | None = None
        self._kept: dict[_Key, Loading] = {}
        self.bytes_read = 0
        self.seconds = 0.0

    def _most(self, budget: int) -> int:
        return budget if self.is_far else min(budget, ENOUGH_BYTES)

    def lend(self, nbytes: int) -> None:
        """Have so much less than the whole budget from now on."""
        self.memory.limit(self._most(self._budget - nbytes))

    def stage_on(self, device: DeviceEngine, recipe: Recipe, shares: Shares) -> None:
        """From now on pieces for a device go there."""

        def load(piece: Piece, buffer: np.ndarray) -> tuple[list[list[np.ndarray]], float]:
            loaded = self._load(piece, buffer)
            return loaded.held, loaded.seconds

        self._staging = Staging(device, recipe, shares, load)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._staging:
            self._staging.close()

    def fits(self, section: Section) -> bool:
        """Whether there is room for a whole section now."""
        return self._has_room(section) and (self._staging is None or self._staging.fits(section))

    def _has_room(self, section: Section) -> bool:
        keys = {_key(piece) for piece in section.on_host}
        missing = sum(key not in self._kept for key in keys)
        return missing <= self.memory.room + len(self._kept.keys() - keys) - _FEWEST

    def can_keep(self, nbytes: int) -> bool:
        """Whether so many bytes of input, read now, need not be read again by the step after this one."""
        return self.is_far and nbytes <= (self.memory.buffers - _SPARE) * PIECE_BYTES

    def start(self, section: Section, held: Held = NOTHING) -> Held:
        """Begin to read what is not held yet of a section and for which there is room now."""
        host, device = held
        if host is None and self._has_room(section):
            known = [self._kept.pop(_key(piece), None) for piece in section.on_host]
            while self.memory.room - _FEWEST < sum(load is None for load in known):
                self._give_back([self._kept.pop(next(iter(self._kept)))])
            pairs = zip(known, section.on_host, strict=True)
            host = [load or self._submit(piece) for load, piece in pairs]
        if device is None:
            device = self._staging.start(section) if self._staging else []
        return Held(host, device)

    def _submit(self, piece: Piece) -> Loading:
        buffer = self.memory.take()
        return Loading(self._threads.submit(self._load, piece, buffer), buffer)

    def release(self, held: Held, section: Section, keep: bool = False) -> None:
        """Forget a section, once nothing writes to its buffers any more.

        Args:
            keep: what is on a device, or came over a network, may stay for the step after this one.
        """
        for load in held.host or ():
            wait([load.future])
            if keep and self.is_far and not load.future.exception() and self.memory.room > _SPARE:
                loaded = load.future.result()
                if not load.counted:
                    self._count(loaded.piece.nbytes, loaded.seconds)
                self._kept[_key(loaded.piece)] = load._replace(counted=True)
            else:
                self._give_back([load])
        if self._staging and held.device:
            self._staging.release(held.device, section, keep)
            for staging in held.device:
                if not staging.exception():
                    self._count(staging.result().read_bytes, staging.result().seconds)

    def _give_back(self, loads: Sequence[Loading]) -> None:
        wait([load.future for load in loads])
        for load in loads:
            self.memory.give(load.buffer)
            if not load.counted and not load.future.exception():
                loaded = load.future.result()
                self._count(loaded.piece.nbytes, loaded.seconds)

    def _count(self, nbytes: int, seconds: float) -> None:
        self.bytes_read += nbytes
        self.seconds += seconds

    def stream(self, pieces: Sequence[Piece]) -> Iterator[Loaded]:
        """One pass over pieces that do not all fit: the next is read while one is used."""
        ahead: list[Loading] = []
        waiting = list(reversed(pieces))
        try:
            while waiting or ahead:
                while waiting and (len(ahead) < _FEWEST or self._may_read_on(len(ahead))):
                    ahead.append(self._submit(waiting.pop()))
                yield ahead[0].future.result()
                self._give_back([ahead.pop(0)])
        finally:
            self._give_back(ahead)

    def _may_read_on(self, ahead: int) -> bool:
        return ahead < 2 * self._at_once and self.memory.room > _FEWEST and self.is_far

    def stream_to_device(self, pieces: Sequence[Piece]) -> Iterator[Staged]:
        """The same of pieces for the device."""
        for staged in self._staging.stream(pieces) if self._staging else ():
            self._count(staged.read_bytes, staged.seconds)
            yield staged

    def _load(self, piece: Piece, buffer: mmap.mmap | np.ndarray) -> Loaded:
        """Read a piece, neighbouring bytes of a file in one go."""
        began = time.perf_counter()
        whole = np.frombuffer(buffer, np.uint8)
        ranges: list[tuple[int, TensorInfo, int, int]] = []  # a checkpoint's number, a tensor, bytes from and to
        for part in piece.slices:
            for number, infos in part.sources:
                many = len(infos) > 1
                for info in infos:
                    width = 1 if part.raw or many else itemsize(info.dtype)
                    begin, end = (0, info.nbytes) if many else (part.start * width, part.stop * width)
                    ranges.append((number, info, begin, end))
        places = [0] * len(ranges)
        position = 0
        stored = [
            (number, info.file, info.offset + begin, end - begin, i)
            for i, (number, info, begin, end) in enumerate(ranges)
            if info.form is None
        ]
        runs: list[tuple[int, str, int, int, int]] = []  # offset, bytes, place in the buffer
        for number, file, offset, nbytes, i in sorted(stored):
            if runs and runs[-1][:2] == (number, file) and runs[-1][2] + runs[-1][3] == offset:
                runs[-1] = (number, file, runs[-1][2], runs[-1][3] + nbytes, runs[-1][4])
            else:
                position += (offset - position) % (ALIGN if nbytes >= LARGE else ALIGN_SMALL)
                runs.append((number, file, offset, nbytes, position))
            places[i] = position
            position += nbytes
        for number, file, offset, nbytes, place in runs:
            sides, side = self._of(number)
            sides.folder(side).reader(file).read_into(offset, whole[place : place + nbytes])
        if len(stored) < len(ranges):
            there: dict[int, dict[tuple[str, int, int], np.ndarray]] = {}
            for number, file, offset, nbytes, i in stored:
                there.setdefault(number, {})[file, offset, offset + nbytes] = whole[places[i] : places[i] + nbytes]
            beside: dict[int, Sides] = {}
            for i, (number, info, begin, end) in enumerate(ranges):
                if info.form:
                    sides, side = self._of(number)
                    if number not in beside:
                        pair = {_side(of): found for of, found in there.items() if of in (0, number or 1)}
                        loaded = {(of, *at): view for of, found in pair.items() for at, view in found.items()}
                        beside[number] = sides.beside(loaded)
                    position += -position % (ALIGN if end - begin >= LARGE else ALIGN_SMALL)
                    places[i] = position
                    beside[number].read_into(Part(side, info), begin, end, whole[position : position + end - begin])
                    position += end - begin
        views: list[list[np.ndarray]] = []
        i = 0
        for part in piece.slices:
            views.append([])
            for _, infos in part.sources:
                spans = [(places[j], ranges[j][3] - ranges[j][2]) for j in range(i, i + len(infos))]
                views[-1].append(_side_by_side(whole, spans))
                i += len(infos)
        return Loaded(piece, views, time.perf_counter() - began)

    def _of(self, number: int) -> tuple[Sides, Side]:
        """Where a checkpoint's tensors lie, and as which side: forms know base and the fine-tuned one that they are
        of."""
        return self._pairs[max(0, number - 1)], _side(number)

    def read_runs(self, tensor: PairedTensor, starts: np.ndarray, length: int) -> list[np.ndarray]:
        """Bytes of short runs of elements, base's and finetuned's, without loading the tensor."""
        found, began = [], time.perf_counter()
        for number, info in tensor.sources:
            sides, side = self._of(number)
            width = itemsize(info.dtype)
            target = np.empty((len(starts), length * width), np.uint8)
            sides.read_rows(Part(side, info), (starts * width).tolist(), target)
            self.bytes_read += target.nbytes
            found.append(target.reshape(-1))
        self.seconds += time.perf_counter() - began
        return found


def _side(number: int) -> Side:
    return "finetuned" if number else "base"


def _side_by_side(whole: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """The bytes of spans (place, length), one after the other: where they lie like that, without a copy."""
    first, last = spans[0], spans[-1]
    if all(place + nbytes == following for (place, nbytes), (following, _) in itertools.pairwise(spans)):
        return whole[first[0] : last[0] + last[1]]
    return np.concatenate([whole[place : place + nbytes] for place, nbytes in spans])


_Key = tuple[tuple[str, int, int, int], ...]


def _key(piece: Piece) -> _Key:
    """Key of a piece: what it consists of, whoever has cut it."""
    return tuple((part.tensors[0].name, part.start, part.stop, len(part.tensors)) for part in piece.slices)


class Pieces:
    """A section's pieces, as often as they are asked for: from memory what is resident, the others read again."""

    def __init__(self, reader: SectionReader, section: Section, held: Held = NOTHING):
        self.reader, self.section, self._held = reader, section, held
        self._parts: dict[str, list[tuple[Slice, list[np.ndarray] | StoredChunk]]] | None = None

    @property
    def resident(self) -> bool:
        return self._held.host is not None and self.resident_on_device

    @property
    def resident_on_device(self) -> bool:
        """Whether what a device takes of the section is there."""
        return self._held.device is not None or not self.section.on_device

    def __iter__(self) -> Iterator[Loaded | Staged]:
        with closing(self._of_host()) as host, closing(self._of_device()) as device:
            for piece in self.section.pieces:
                yield next(device) if piece.on_device else next(host)

    def _of_host(self) -> Generator[Loaded]:
        if self._held.host is None:
            yield from self.reader.stream(self.section.on_host)
        else:
            yield from (load.future.result() for load in self._held.host)

    def _of_device(self) -> Generator[Staged]:
        if self._held.device is None:
            yield from self.reader.stream_to_device(self.section.on_device)
        else:
            yield from (staging.result() for staging in self._held.device)

    def bytes(self) -> Iterator[tuple[Slice, list[np.ndarray]]]:
        """Every slice with the bytes of its sides in host memory; what is not there is read again, in other slices."""
        if self.section.on_device:
            pieces = self.reader.stream([p for section in sections(self.section.tensors) for p in section.pieces])
        else:
            pieces = self._of_host()
        for loaded in pieces:
            yield from loaded.slices()

    def of(self, wanted: Callable[[Slice], bool]) -> Iterator[tuple[Slice, list[np.ndarray]]]:
        """The slices that are wanted, with the bytes of their sides; a piece without any is not read again."""
        chosen = [i for i, piece in enumerate(self.section.on_host) if any(map(wanted, piece.slices))]
        if self._held.host is None:
            loaded = self.reader.stream([self.section.on_host[i] for i in chosen])
        else:
            loaded = (self._held.host[i].future.result() for i in chosen)
        for one in loaded:
            yield from ((part, held) for part, held in one.slices() if wanted(part))

    def parts(self, tensor: PairedTensor) -> list[tuple[Slice, list[np.ndarray] | StoredChunk]]:
        """The slices that hold a pruned tensor's elements alone, if they are in memory, else none."""
        if self._parts is None:
            self._parts = {}
            host = self._of_host() if self._held.host else ()
            device = self._of_device() if self._held.device else ()
            for loaded in (*host, *device):
                for part, held in loaded.slices():
                    if not part.raw and len(part.tensors) == 1:
                        self._parts.setdefault(part.tensors[0].name, []).append((part, held))
        return self._parts.get(tensor.name, [])
