"""pytest tests/pipeline/shard/test_memory.py: memory follows the budget, and the bytes do not."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import gaussian, save, weights_of

from fapm import Recipe, prune
from fapm.formats.header import build_header
from fapm.manifest.read import load_manifest
from fapm.shard.reading import ENOUGH_BYTES, OVERHEAD_BYTES
from fapm.storage.local import Reader

RUN = """
import json, sys
from fapm import Recipe, prune
prune(Recipe.of(**json.loads(sys.argv[1])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_kib(recipe: Recipe) -> int:
    """Peak resident memory of a process of its own that prunes, in KiB.

    From /proc: `ru_maxrss` begins with what the parent had when it started the process.
    """
    command = [sys.executable, "-c", RUN, recipe.model_dump_json(exclude_none=True)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


ROWS, COLUMNS = 375_000, 2_000  # 1.5 GB of bfloat16


def write_huge(folder: Path, changed: bool) -> None:
    """One tensor of 1.5 GB, a block of random weights over and over, and a few small ones beside it."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    random = np.random.default_rng(0)
    p = random.normal(0, 0.02, 1 << 22).astype(np.float32)
    if changed:
        p += np.random.default_rng(1).normal(0, 2e-4, p.size).astype(np.float32)
    block = torch.from_numpy(p).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    shapes = {"model.layers.0.a": (ROWS, COLUMNS), "model.layers.0.b": (300, 1000), "model.layers.1.c": (300, 1000)}
    tensors = [(name, "BF16", shape, 2 * shape[0] * shape[1]) for name, shape in shapes.items()]
    with (folder / "model.safetensors").open("wb", buffering=0) as file:
        file.write(build_header(tensors))
        for _, _, _, left in tensors:
            while left:
                left -= file.write(block[:left])


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huge")
    write_huge(folder / "base", False)
    write_huge(folder / "finetuned", True)
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.fixture(scope="module")
def floor(tmp_path_factory) -> int:
    """What the interpreter, the libraries and a tiny prune take, in KiB, once the kernels are compiled."""
    folder = tmp_path_factory.mktemp("tiny")
    base, finetuned = gaussian({"model.layers.0.a": (64, 64), "model.layers.1.b": (64, 64)}, torch.bfloat16)
    save(folder / "base", base)
    save(folder / "finetuned", finetuned)
    sides = {"base": str(folder / "base"), "finetuned": str(folder / "finetuned")}
    runs = [
        Recipe.of(**sides, out=str(folder / f"out-{i}"), memory="64MiB", workers=1, device="cpu", shard_size="8kB")
        for i in range(2)
    ]
    return [peak_kib(recipe) for recipe in runs][-1]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_a_tensor_of_six_times_the_budget(huge, floor, scope):
    """Peak memory above that of a tiny run stays within the budget, and the bytes are those of a large budget."""
    sides = {"base": str(huge / "base"), "finetuned": str(huge / "finetuned"), "scope": scope}
    choices = {"workers": 1, "device": "cpu", "shard_size": "200MB"}
    small = Recipe.of(**sides, **choices, out=str(huge / f"small-{scope}"), memory="256MB")
    large = Recipe.of(**sides, **choices, out=str(huge / f"large-{scope}"), memory="6GB")
    used = (peak_kib(small) - floor) * 1024
    much = (peak_kib(large) - floor) * 1024
    read = [load_manifest(r.out)["totals"]["read_bytes"] for r in (small, large)]
    print(f"\n{scope}: {used / 1e6:.0f} MB above the floor of {floor * 1024 / 1e6:.0f} MB; bytes read {read}")
    one, other = weights_and_index(Path(small.out)), weights_and_index(Path(large.out))
    assert one.keys() == other.keys()
    for name, file in one.items():
        assert subprocess.run(["cmp", file, other[name]]).returncode == 0, name
    for recipe in (small, large):
        for file in Path(recipe.out).glob("*.safetensors"):
            file.unlink()
    assert used < 1.1 * 256e6
    assert much < 1.1 * (ENOUGH_BYTES + OVERHEAD_BYTES)  # fresh memory costs more than reading a cached file again


@pytest.mark.slow
def test_a_merge_stays_within_the_budget_of_a_prune(huge, floor):
    sources = [{"finetuned": str(huge / "finetuned"), "density": density} for density in (0.1, 0.3)]
    shared = {"merged": sources, "combine": "ties", "workers": 1, "device": "cpu", "memory": "256MB"}
    tiny = huge / "tiny"
    save(tiny, {"model.layers.0.a": torch.ones(64, 64).bfloat16()})
    save(tiny / "tuned", {"model.layers.0.a": torch.zeros(64, 64).bfloat16()})
    few = [source | {"finetuned": str(tiny / "tuned")} for source in sources]
    peak_kib(Recipe.of(base=str(tiny), **shared | {"merged": few}, out=str(huge / "compiled")))
    merge = Recipe.of(base=str(huge / "base"), **shared, out=str(huge / "merged"), shard_size="200MB")
    used = (peak_kib(merge) - floor) * 1024
    for file in Path(merge.out).glob("*.safetensors"):
        file.unlink()
    print(f"\na merge of two: {used / 1e6:.0f} MB above the floor")
    assert used < 1.1 * 256e6


def weights_and_index(folder: Path) -> dict[str, Path]:
    return {f.name: f for f in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]}


@pytest.mark.slow
def test_global_scope_reads_little_more_than_twice_and_the_manifest_says_so(tmp_path, monkeypatch):
    """2.1 times what tensor scope reads, whatever the budget: reading a cached file is cheaper than keeping it."""
    shapes = {f"model.layers.{i}.w": (2000, 2500) for i in range(12)}  # 240 MB of both sides together
    base, finetuned = gaussian(shapes, torch.bfloat16, delta=0.01)
    save(tmp_path / "base", base)
    save(tmp_path / "finetuned", finetuned)
    choices = {
        "base": str(tmp_path / "base"), "finetuned": str(tmp_path / "finetuned"), "device": "cpu", "shard_size": "12MB"
    }  # fmt: skip

    lock, seen = threading.Lock(), [0]
    read_into = Reader.read_into

    def counted(self, offset, target):
        with lock:
            seen[0] += target.nbytes
        read_into(self, offset, target)

    monkeypatch.setattr(Reader, "read_into", counted)
    read_rows = Reader.read_rows

    def counted_rows(self, offsets, rows):
        with lock:
            seen[0] += rows.nbytes
        read_rows(self, offsets, rows)

    monkeypatch.setattr(Reader, "read_rows", counted_rows)

    def read_bytes(scope: str, memory: str) -> int:
        recipe = Recipe.of(**choices, out=str(tmp_path / f"{scope}-{memory}"), scope=scope, memory=memory, workers=1)
        seen[0] = 0
        said = prune(recipe).manifest["totals"]["read_bytes"]
        runs.append((scope, memory, said, seen[0]))
        return seen[0]

    runs: list[tuple[str, str, int, int]] = []
    needed = 2 * sum(t.nbytes for t in base.values())
    once = read_bytes("tensor", "256MB")
    assert needed <= once <= 1.02 * needed
    for scope in ("layer", "global"):
        assert read_bytes(scope, "128MB") <= 2.1 * once
    assert 2 * once <= read_bytes("global", "1GB") <= 2.1 * once
    assert weights_of(tmp_path / "global-128MB") == weights_of(tmp_path / "global-1GB")
    for scope, memory, said, truth in runs:
        assert abs(said - truth) <= 0.01 * truth, (scope, memory, said, truth)


@pytest.mark.slow
def test_many_small_tensors_take_no_more_than_the_budget(tmp_path, floor):
    shapes = {f"model.layers.{i // 100}.t{i}": (40, 100) for i in range(10_000)}
    base, finetuned = gaussian(shapes, torch.bfloat16)
    save(tmp_path / "base", base)
    save(tmp_path / "finetuned", finetuned)
    sides = {"base": str(tmp_path / "base"), "finetuned": str(tmp_path / "finetuned")}
    choices = {"memory": "128MB", "workers": 1, "device": "cpu", "shard_size": "1GB"}
    for scope in ("tensor", "global"):
        recipe = Recipe.of(**sides, **choices, out=str(tmp_path / scope), scope=scope)
        assert (peak_kib(recipe) - floor) * 1024 < 1.1 * 128e6 + 10_000 * 4_000  # headers and rows: 4 kB a tensor
