"""Whether GPUs are worth asking for: what was measured of a core, against what the storage gives.

The figures are those of one small machine (2 cores, no GPU); another's cores may be twice as fast or half.
"""

from __future__ import annotations

import math
from typing import Any

from fapm.recipe import format_bytes

CORE_NS = {"once": 5.2, "twice": 8.4}
"""Of a core, for an element of a bfloat16 pair that is read once, or twice: reading from the page cache, arithmetic,
hashing and writing. tests/benchmarks/whole_run.py, tensor and global scope: its CPU seconds less the half that imports
take, by 1.1 billion elements."""

ARITHMETIC_NS = 1.95
"""Of those, what a GPU would take over: tests/benchmarks/kernel.py. It has to be done once more where an element is
read twice, of which that is the smaller part."""


def advise(rate: float, elements: int, pair_bytes: int, twice_bytes: int, cores_here: int) -> dict[str, Any]:
    """Advice on hardware: how many workers keep up with a storage, and whether GPUs are worth asking for.

    Args:
        rate: bytes a second that it gives.
        elements: of the output.
        pair_bytes: of the inputs, and `twice_bytes`: of those, what is read twice.
        cores_here: that there are.
    """
    share = twice_bytes / max(1, pair_bytes)
    ns = CORE_NS["once"] * (1 - share) + CORE_NS["twice"] * share
    cores = max(1, math.ceil(elements * ns * 1e-9 * rate / (pair_bytes + twice_bytes)))
    return {
        "read_bytes_per_second": rate,
        "cores_that_keep_up": cores,
        "cores_here": cores_here,
        "gpus_worth_having": cores > cores_here,
    }


def advice_text(advice: dict[str, Any]) -> str:
    """The same in a sentence."""
    keep_up, here = advice["cores_that_keep_up"], advice["cores_here"]
    says = f"the storage reads {format_bytes(advice['read_bytes_per_second'])}/s, with which "
    says += f"{keep_up} {'cores keep' if keep_up > 1 else 'core keeps'} up"
    if not advice["gpus_worth_having"]:
        return f"not worth asking for: {says}"
    most = CORE_NS["once"] / (CORE_NS["once"] - ARITHMETIC_NS)
    return (
        f"{says}, of which {here} {'are' if here > 1 else 'is'} here; beside a GPU each does at most {most:.1f} times "
        "as much, since reading, hashing and writing stay its own"
    )
