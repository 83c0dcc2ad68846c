"""Factors: what a matrix method keeps of a shard's matrices, as a PEFT adapter has it: Δ' = B·A.

Each matrix's factors go into a file of the work folder as soon as they are known; `manifest.adapter` puts them
together.
"""

from __future__ import annotations

import numpy as np
import xxhash
from safetensors.numpy import save

from fapm.layout import factors_name
from fapm.planning.plan import Shard
from fapm.storage.store import Store

PREFIX = "base_model.model."
"""With which PEFT begins the names of an adapter's tensors."""


class Factors:
    """A sink that takes factors, and no bytes of tensors; and their writer.

    Attributes:
        nbytes: that were written.
    """

    seconds = 0.0

    def __init__(self, shard: Shard, out: Store):
        self._out, self._digest, self.nbytes = out, xxhash.xxh3_128(), 0
        self._shard, self._place = shard.index, {t.name: i for i, t in enumerate(shard.tensors)}

    def take(self, name: str, a: np.ndarray, b: np.ndarray) -> None:
        """The factors of a matrix (m, n): A (r, n) and B (m, r), float32."""
        if not len(a):
            return
        module = PREFIX + name.removesuffix(".weight")
        arrays = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        data = save({key: np.ascontiguousarray(array, np.float32) for key, array in arrays.items()})
        self._out.write(factors_name(self._shard, self._place[name]), data)
        self._digest.update(data)
        self.nbytes += len(data)

    def reserve(self, nbytes: int, align: int = 1) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def filled_from(self, name: str, start: int, base: np.ndarray) -> None:
        pass

    def append(self, data: np.ndarray | bytes) -> None:
        """Nothing: an adapter has no tensors of its own."""

    def finish(self) -> str:
        """The xxh3-128 of what was written, in hexadecimal."""
        return self._digest.hexdigest()

    def abandon(self) -> None:
        pass

    def write(self, offset: int, data: np.ndarray | bytes) -> None:
        pass

    def publish(self) -> None:
        pass

    def discard(self) -> None:
        pass
