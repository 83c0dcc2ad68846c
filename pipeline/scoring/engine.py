"""Engines: everything that is done to elements, in passes over chunks.

Two answer it: `compiled`, loops for a CPU, and `torch_engine`, for any other device. Both return the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np

from fapm.scoring.methods import BLOCK
from fapm.scoring.threshold import Histograms


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements in host memory, n of r runs side by side: one run of a tensor, or several small tensors whole.

    Attributes:
        starts: (r + 1,) int64, where each run begins and the last one ends. Of several, none is longer than BLOCK.
        start: flat index of a single run's first element in its tensor, a multiple of BLOCK; 0 for several.
        streams: (r,) int64, where each tensor's random numbers come from.
        p, f: values, (n,): uint16 bits of bfloat16, float32 or float64; both of one dtype.
        pruned, kept: bits in the output's dtype, (n,): what an element becomes.
        rounded: whether any of them had to be rounded, so that it may have become infinite.
    """

    starts: np.ndarray
    start: int
    streams: np.ndarray
    p: np.ndarray
    f: np.ndarray
    pruned: np.ndarray
    kept: np.ndarray
    rounded: bool = False

    @property
    def runs(self) -> int:
        return self.starts.size - 1

    @property
    def numel(self) -> int:
        return self.p.size

    @property
    def blocks(self) -> int:
        """How many blocks its sums come in: those of a single run, or one for each of several."""
        return max(1, -(-self.p.size // BLOCK)) if self.runs == 1 else self.runs

    @property
    def real(self) -> type[np.floating]:
        """The type of the arithmetic."""
        return np.float64 if self.p.dtype == np.float64 else np.float32


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A run of one tensor's elements on an engine's device, as they are stored.

    Attributes:
        start: flat index of the first element, a multiple of BLOCK; `stream`: where its random numbers come from.
        put: the bytes of base and finetuned, as the engine has put them there.
        p_dtype, f_dtype, dtype: torch's names of the dtypes of both and of the output.
        repair: finetuned's values that are not finite become base's.
        mixed: what kept elements are mixed by, None where they keep the fine-tuned value.
        scale: what their change is multiplied by.
    """

    start: int
    stream: int
    put: tuple[Any, Any]
    p_dtype: str
    f_dtype: str
    dtype: str
    numel: int
    repair: bool = False
    mixed: float | None = None
    scale: float = 1.0

    @property
    def runs(self) -> int:
        return 1

    @property
    def rounded(self) -> bool:
        """As of a Chunk."""
        return self.mixed is not None or self.scale != 1 or {self.p_dtype, self.f_dtype} != {self.dtype}


@dataclass(slots=True)
class Applied:
    """Effect of a mask on a chunk: (r,) int64 counts of elements, and Σd² of each block, of all and of the kept ones.

    `overflowed`: of a StoredChunk, how many elements of the output are not finite.
    """

    kept: np.ndarray
    changed: np.ndarray
    kept_changed: np.ndarray
    squares: np.ndarray
    kept_squares: np.ndarray
    overflowed: int = 0


class Counted(NamedTuple):
    """Of a chunk whose scores were counted: whether all d are finite; and whether the pass has found so many in the
    brackets as it can take. If not, it has counted no StoredChunk, and a thorough one has to."""

    finite: bool
    complete: bool = True


AnyChunk = Any
"""A Chunk, or, where the engine `converts`, a StoredChunk."""

Operands = ParamSpec("Operands")
Found = TypeVar("Found")


class Pass(Protocol[Operands, Found]):
    """One pass over chunks: they are added in the order of their positions, and what was found is asked for once."""

    def add(self, *operands: Operands.args, **named: Operands.kwargs) -> None: ...

    def result(self) -> list[Found]:
        """Results of each chunk, in the order in which they were added."""
        ...


class AtOnce(Generic[Operands, Found]):
    """A pass that does its work as chunks are added."""

    def __init__(self, work: Callable[Operands, Found]):
        self._work = work
        self._found: list[Found] = []

    def add(self, *operands: Operands.args, **named: Operands.kwargs) -> None:
        self._found.append(self._work(*operands, **named))

    def result(self) -> list[Found]:
        return self._found


Application = Pass[[AnyChunk, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Applied]


class Engine(Protocol):
    """Everything that is done to elements. `m` is mean|p| of each run's tensor, (r,) float32."""

    @property
    def device(self) -> DeviceEngine | None:
        """The engine itself if it has memory of its own, where large tensors go as they are stored."""
        ...

    def like(self, method: str) -> Engine:
        """The engine for another method, where this one is, which takes what this one has put on its device."""
        ...

    def sums(self) -> Pass[[AnyChunk], tuple[np.ndarray, np.ndarray]]:
        """Σ|p| and Σp² of each block, float64."""
        ...

    def selection(self) -> Pass[[Chunk, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Of chunk, m, k: the k-th highest key of every run of at most BLOCK elements (k: (r,) int64, from 1; 0 for
        none), and how many elements equal to it belong to the k highest; (r,) int64 both."""
        ...

    def counting(
        self, histograms: Histograms, thorough: bool = False
    ) -> Pass[[AnyChunk, np.ndarray, np.ndarray], Counted]:
        """Of chunk, m, groups: the keys of each run are added to the histogram of its group ((r,) int64, −1 for none),
        or of several, (r, n), once the result was asked for.

        Args:
            thorough: all of them, however many lie in the brackets.
        """
        ...

    def application(
        self, ties: np.ndarray
    ) -> Pass[[AnyChunk, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Applied]:
        """Of chunk, m, thresholds, groups, out: the output's bits are written to `out`. Kept are the scores above the
        run's threshold ((r,) float32), and of those equal to it the first `ties[group]`, which are used up."""
        ...


class DeviceEngine(Engine, Protocol):
    """One with memory of its own. What it computes has come to the host only where that is said."""

    def memory(self) -> tuple[int, int]:
        """Bytes that are free there now, and all that there are."""
        ...

    def host(self, nbytes: int) -> np.ndarray:
        """Host memory (uint8) from and to which is copied while something is computed."""
        ...

    def put(self, p: np.ndarray, f: np.ndarray) -> tuple[Any, Any]:
        """Begin to copy the bytes of base and finetuned there, for a StoredChunk; from any thread."""
        ...

    def sent(self) -> Callable[[], None]:
        """Waiter until all has been copied that was put there before: its source may be used again then."""
        ...

    def received(self) -> Callable[[], None]:
        """Waiter until all outputs of chunks that were added before are in host memory."""
        ...

    def take(self, chunk: StoredChunk, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes (uint8) of base and finetuned of runs of `length` elements that begin at `starts` of the chunk."""
        ...
