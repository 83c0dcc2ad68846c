"""pytest tests/pipeline/shard/test_table.py: the table is written and read without threads of pyarrow's, and pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from support.data.checkpoints import save_pair

from fapm.shard.table import QUANTILES, change_quantiles

THREADS = """
import os
import sys
import pyarrow, pyarrow.parquet
from fapm.shard.table import from_parquet

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
rows = from_parquet(open(sys.argv[1], "rb").read())
print(len(rows), threads() - before)
"""


def test_reading_the_table_starts_no_thread(runner):
    """Those that pyarrow starts abort the process at its end, now and then."""
    import torch

    runner.write({"a": torch.zeros(5), "b": torch.ones(3)}, {"a": torch.ones(5), "b": torch.ones(3)})
    out, _ = runner.prune()
    command = [sys.executable, "-c", THREADS, str(out / "fapm" / "tensors.parquet")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["2", "0"]


@pytest.mark.parametrize("kept_from", [-np.inf, 0.3, np.inf])
def test_quantiles_of_many_tensors_are_those_of_each(kept_from):
    random = np.random.default_rng(0)
    sizes = [5, 1, 40, 3]
    starts = np.cumsum([0, *sizes])
    p, f, scores = (random.normal(size=starts[-1]).astype(np.float32) for _ in range(3))
    f[:5] = p[:5]  # unchanged: nothing to tell
    p[6:10] = 0
    before, after = change_quantiles(p, f, scores, np.full(4, kept_from, np.float32), starts)
    for i in range(4):
        here = slice(starts[i], starts[i + 1])
        with np.errstate(all="ignore"):
            change = (np.abs(f - p) / np.abs(p))[here]
        defined = (p[here] != 0) & (f[here] != p[here])
        for found, chosen in ((before, defined), (after, defined & (scores[here] >= kept_from))):
            ordered = np.sort(change[chosen])
            expected = [ordered[int(q * ordered.size)] for q in QUANTILES] if ordered.size else [np.nan] * 5
            assert np.array_equal(found[i], np.array(expected, float), equal_nan=True)


def test_a_prune_imports_nothing_large_that_it_has_no_use_for(tmp_path):
    """pyarrow would import pandas on its own, for a third of a second of every prune, and numba scipy."""
    save_pair(tmp_path, {"a": (40, 30), "b": (7,)})
    code = (
        "import sys; from fapm import Recipe, prune; prune(Recipe.of(base=sys.argv[1], finetuned=sys.argv[2], "
        "out=sys.argv[3])); print([name for name in ('pandas', 'scipy.linalg', 'torch') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("base", "finetuned", "out"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
