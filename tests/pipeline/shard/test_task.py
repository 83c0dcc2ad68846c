"""pytest tests/pipeline/shard/test_task.py: what workers leave for the driver comes back as it was."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from fapm.shard.task import load_arrays, pack, save_arrays, saved_read_bytes, unpack
from fapm.storage.local import Folder

ARRAYS = {
    "bins": np.arange(70_000, dtype=np.uint32), "above": np.array([2**40], np.int64), "means": np.full((3, 2), np.nan),
    "empty": np.zeros((0, 4)), "strided": np.arange(10)[::2],
}  # fmt: skip


def test_arrays_come_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    groups = ["model.layers.0", "a/../b", "Δ"]
    save_arrays(folder, "fapm/work/x", 2**40, groups, **ARRAYS)
    names, found = load_arrays(folder, "fapm/work/x", *ARRAYS)
    assert names == groups
    assert saved_read_bytes(folder, "fapm/work/x") == 2**40
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array, equal_nan=array.dtype.kind == "f")


def test_reading_them_parses_no_python(monkeypatch) -> None:
    """Two threads that do so at once fail now and then: AST constructor recursion depth mismatch."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(ast, "parse", refuse)
    monkeypatch.setattr(ast, "literal_eval", refuse)
    assert unpack(pack(ARRAYS)).keys() == ARRAYS.keys()
