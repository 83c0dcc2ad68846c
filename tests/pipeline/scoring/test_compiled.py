"""What numba keeps on disk stays what it was compiled from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import numpy as np
from pipeline.scoring.engine import Chunk
from pipeline.scoring.compiled import CpuEngine

random = np.random.default_rng(0)
p = random.normal(0, 1, 5000).astype(np.float32)
f = p + random.normal(0, 0.1, 5000).astype(np.float32)
chunk = Chunk(np.array([0, 5000]), 0, np.array([1]), p, f, p.view(np.uint32), f.view(np.uint32))
m, threshold, zero = np.abs(p).mean().reshape(1), np.array([0.05], np.float32), np.zeros(1, np.int64)
for name in sys.argv[1:]:
    out = np.empty(5000, np.uint32)
    print(name, CpuEngine(name).apply(chunk, m, threshold, zero, zero.copy(), out).kept[0])
"""


def kept(cache: Path, *methods: str) -> dict[str, str]:
    """How many elements each method keeps, by loops that are compiled into `cache` or loaded from it."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT, *methods]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_loops_that_several_processes_compiled_do_not_mix_in_one_that_loads_them(tmp_path: Path) -> None:
    methods = ("fapm", "magnitude", "random")
    fresh = kept(tmp_path / "together", *methods)
    assert len(set(fresh.values())) == len(methods)
    for name in methods:
        assert kept(tmp_path / "apart", name)[name] == fresh[name]
    assert kept(tmp_path / "apart", *methods) == fresh
