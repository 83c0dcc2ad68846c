"""Memory of a worker: what several lanes take beside the first, and what of a device is its own."""

from __future__ import annotations

from fapm.recipe import LEAST_MEMORY, Recipe
from fapm.scoring.engine import DeviceEngine
from fapm.shard.reading import OVERHEAD_BYTES
from fapm.shard.writing import BUFFER_BYTES, BUFFERS
from fapm.storage.store import Store


def lane_bytes(recipe: Recipe, out: Store, buffer: int = BUFFER_BYTES) -> int:
    """Bytes that a worker needs for each run beside the first that it does in the same reading.

    Args:
        buffer: bytes of each on the way to the output.
    """
    sparse = 16 << 20 if recipe.emit != "checkpoint" else 0
    return BUFFERS * buffer + out.writing_bytes + COUNTS_BYTES + sparse


COUNTS_BYTES = 8 << 20
"""Of the counts of a lane."""


def runs_at_once(recipe: Recipe, out: Store) -> int:
    """How many runs a worker's memory allows in one reading."""
    left = recipe.memory - OVERHEAD_BYTES - out.writing_bytes - LEAST_MEMORY // 4
    return 1 + max(0, left // lane_bytes(recipe, out))


def device_memory(device: DeviceEngine, recipe: Recipe, share: float) -> int:
    """Bytes of a device's memory for a worker: what the recipe says, or its share of what is free, less a margin."""
    if recipe.device_memory:
        return recipe.device_memory
    free, total = device.memory()
    return int(min(free, share * total) - max(_MARGIN_BYTES * share, 0.05 * share * total))


_MARGIN_BYTES = 1 << 30  # the driver's context, torch's caches, whoever else is there
