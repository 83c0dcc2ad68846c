"""Projection: of each matrix of a section the part of Δ that its lanes' methods keep, written in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fapm.errors import UserError, one_line
from fapm.formats.dtypes import itemsize, refuse_overflow, round_to
from fapm.layout import LIBRARY
from fapm.planning.plan import PairedTensor
from fapm.scoring.matrices import (
    BLOCK,
    Delta,
    Spectrum,
    decompose,
    factors,
    kept,
    library,
    one_thread,
    projector,
    rows_of,
)
from fapm.scoring.methods import METHODS, Matrix
from fapm.shard.chunk import count_nonfinite, pair_of_values
from fapm.shard.factors import Factors
from fapm.shard.passes import SectionState, pass_through, refuse_nonfinite
from fapm.shard.section import Slice
from fapm.shard.table import MEASURED
from fapm.shard.task import here
from fapm.shard.writing import AnySink
from fapm.storage.store import Store


def write(
    states: Sequence[SectionState], sinks: Sequence[AnySink], progress: Callable[[int], None] = lambda nbytes: None
) -> list[np.ndarray]:
    """Write a section's bytes in order; returns what was measured of its tensors, (t,) MEASURED, of each state.

    Raises:
        UserError: weights are not finite, or became infinite in the output's dtype.
    """
    found = [np.zeros(len(state.tensors), MEASURED) for state in states]
    first = states[0]
    for rows in found:
        for name in ("mean_abs_base", "before", "after", "norm_delta", "norm_base", "kept_share"):
            rows[name] = np.nan
    for i, tensor in enumerate(first.tensors):
        if tensor.operation:
            count, *shape = tensor.matrices
            sums = [_Sums() for _ in states]
            for matrix in range(count):
                _write_matrix(states, sinks, i, matrix, (shape[0], shape[1]), sums)
                progress(tensor.read_bytes // count if matrix < count - 1 else _rest(tensor, count))
            for rows, one in zip(found, sums, strict=True):
                one.into(rows[i : i + 1])
        for part, held in first.pieces.of(lambda part, i=i: part.raw and part.at == i):  # type: ignore[misc]
            first.check()
            for state, sink in zip(states, sinks, strict=True):
                pass_through(state.own(part), held[0], sink)
            progress(0 if tensor.operation else part.nbytes)
    return found


def _rest(tensor: PairedTensor, count: int) -> int:
    return tensor.read_bytes - (count - 1) * (tensor.read_bytes // count)


def check_library(out: Store) -> None:
    """Check that the shards of a run are all made with the linear algebra that is used here.

    Raises:
        UserError: others are made with another.
    """
    mine = library()
    if not out.has(LIBRARY):
        out.write(LIBRARY, mine.encode())
        return
    theirs = out.read(LIBRARY).decode(errors="replace")
    if theirs != mine:
        raise UserError(
            f"this run has shards made with {one_line(theirs)}, and {here()} has {mine}: their bits differ. Go on "
            "where that is (on Ray, --label says which nodes), or start again with --overwrite"
        )


class _Sums:
    """What is measured of the matrices of a tensor."""

    def __init__(self) -> None:
        self.numel = self.kept = self.changed = self.rank = 0
        self.squares: list[float] = []
        self.kept_squares: list[float] = []
        self.base_squares: list[float] = []

    def add(self, p: np.ndarray, f: np.ndarray) -> None:
        """Count rows of base and finetuned."""
        self.changed += int(np.count_nonzero(f != p))
        self.base_squares.append(float(np.vdot(p.astype(np.float64), p.astype(np.float64))))

    def into(self, row: np.ndarray) -> None:
        changed = self.changed
        row["kept"], row["changed"], row["rank"] = self.kept, changed, self.rank
        row["kept_changed"] = changed if self.kept else 0
        square, kept_square = math.fsum(self.squares), math.fsum(self.kept_squares)
        row["norm_delta"], row["norm_base"] = math.sqrt(square), math.sqrt(math.fsum(self.base_squares))
        row["kept_share"] = kept_square / square if square else np.nan


def _write_matrix(
    states: Sequence[SectionState],
    sinks: Sequence[AnySink],
    at: int,
    matrix: int,
    shape: tuple[int, int],
    sums: Sequence[_Sums],
) -> None:
    """Write one matrix of the tensor at a place of the section for all lanes."""
    first = states[0]
    tensor = first.tensors[at]
    delta = Delta(shape, lambda row: _pairs(first, at, matrix, shape, row))
    held = max(1, first.recipe.memory // 16 // (16 * rows_of(shape) * shape[1]))
    with one_thread:
        try:
            spectrum = decompose(delta, held)
        except np.linalg.LinAlgError as error:
            refuse_nonfinite(first)
            raise UserError(f"{tensor.name}: it has no singular values in float64 ({error})") from None
    for state, sink, one in zip(states, sinks, sums, strict=True):
        _write_kept(state, sink, state.tensors[at], delta, spectrum, held, one)


def _write_kept(
    state: SectionState,
    sink: AnySink,
    tensor: PairedTensor,
    delta: Delta,
    spectrum: Spectrum,
    held: int,
    sums: _Sums,
) -> None:
    """Write what the method of a lane keeps of a matrix: p + s·Δ', rounded once."""
    method = METHODS[state.recipe.method]
    assert isinstance(method, Matrix)
    gains = method.gains(spectrum.sigma, delta.shape, state.recipe.parameter)
    overflowed = 0
    with one_thread:
        if isinstance(sink, Factors):
            sink.take(tensor.name, *factors(delta, spectrum, gains * tensor.scale))
            for _, p, f, _ in delta.blocks():
                sums.add(p, f)
        else:
            for p, f, part in kept(delta, projector(spectrum, gains), held):
                with np.errstate(all="ignore"):
                    part = part.astype(p.dtype)
                    part = part if tensor.scale == 1 else p.dtype.type(tensor.scale) * part
                    out = round_to(p + part, tensor.dtype).reshape(-1).view(np.uint8)
                overflowed += sum(count_nonfinite(out, tensor.dtype))
                sink.append(out)
                sums.add(p, f)
    refuse_overflow(overflowed, tensor.dtype, tensor.name)
    squares = spectrum.sigma**2
    sums.squares.append(float(squares.sum()))
    sums.kept_squares.append(float((gains**2 * squares).sum()))
    sums.rank += int(np.count_nonzero(gains))
    sums.kept += delta.shape[0] * delta.shape[1] if gains.any() else 0


def _pairs(
    state: SectionState, at: int, matrix: int, shape: tuple[int, int], row: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Base's and finetuned's rows of a matrix from a row on, in blocks."""
    rows, width = rows_of(shape), shape[1]
    start, stop = (matrix * shape[0] + row) * width, (matrix + 1) * shape[0] * width
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    wanted, here = min(rows, shape[0] - row) * width, 0
    for p, f in _elements(state, at, start, stop):
        begin = 0
        while begin < p.size:
            end = min(p.size, begin + wanted - here)
            waiting.append((p[begin:end], f[begin:end]))
            here += end - begin
            begin = end
            if here == wanted:
                one, two = (np.concatenate(side).reshape(-1, width) for side in zip(*waiting, strict=True))
                yield row, one, two
                row, waiting, here = row + rows, [], 0
                wanted = min(rows, shape[0] - row) * width


def _elements(state: SectionState, at: int, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values of elements `start` to `stop` of base and finetuned, BLOCK at most at once."""
    tensor = state.tensors[at]

    def wanted(part: Slice) -> bool:
        inside = part.at <= at < part.at + len(part.tensors)
        return not part.raw and inside and (len(part.tensors) > 1 or (part.start < stop and start < part.stop))

    for part, held in state.pieces.of(wanted):
        state.check()
        before = sum(t.common for t in part.tensors[: at - part.at])  # elements of others, in front of its own
        begin = part.start if len(part.tensors) == 1 else 0
        end = part.stop if len(part.tensors) == 1 else tensor.common
        for i in range(max(begin, start), min(end, stop), BLOCK):
            j = min(i + BLOCK, end, stop)
            sides = []
            for side, (_, info) in zip(held, tensor.sources, strict=True):
                width = itemsize(info.dtype)
                sides.append(side[(before + i - begin) * width : (before + j - begin) * width])
            p, f = pair_of_values(sides[0], sides[1], tensor, state.recipe)
            yield p, f
