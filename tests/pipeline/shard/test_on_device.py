"""pytest tests/pipeline/shard/test_on_device.py: whole prunes by torch's engine, which converts large tensors itself.

The device is the CPU: the same code runs on a GPU. What goes there is counted.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import chunks
import numpy as np
import pytest
import torch
from checkpoints import digests, gaussian
from chunks import Device

from fapm import Recipe, UserError, prune
from fapm.choosing.candidates import candidates
from fapm.choosing.sweep import sweep
from fapm.errors import DeviceError, PassingError
from fapm.schedule import Watch
from fapm.scoring.device import gpus
from fapm.scoring.methods import BLOCK
from fapm.scoring.methods import METHODS as ALL
from fapm.shard import worker
from fapm.shard.section import Sizes, slack
from fapm.shard.staging import RING, WORK_BYTES, Shares, shares
from fapm.shard.table import from_parquet
from fapm.shard.task import here
from fapm.shard.writing import BUFFERS

SHAPES = {"model.layers.0.a": (300, 400), "model.layers.0.b": (70_001,), "model.layers.0.norm": (64,), "z": (512, 700)}
LARGE = [name for name, shape in SHAPES.items() if np.prod(shape) > 1 << 16]


def on_torch(recipe: Recipe, device: Device | None = None, **choices) -> Path:
    prune(recipe, pool=chunks.on_torch(device or Device()), **choices)
    return Path(recipe.out)


def same(one: Path, other: Path) -> None:
    assert digests(one) == digests(other)
    tables = [from_parquet((out / "fapm/tensors.parquet").read_bytes()) for out in (one, other)]
    for mine, theirs in zip(*tables, strict=True):
        for key in mine.keys() - {"seconds"}:
            exact = theirs[key] if not isinstance(theirs[key], float) else pytest.approx(theirs[key], rel=1e-12)
            assert mine[key] == exact, (mine["name"], key)


METHODS = [name for name, method in ALL.items() if method.kind != "matrix"]


@pytest.mark.parametrize(("method", "scope"), list(itertools.product(METHODS, ("tensor", "layer", "global"))))
def test_methods_and_scopes(runner, method, scope):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    choices = {"method": method, "scope": scope, "density": 0.3, "shard_size": "800kB"}
    same(on_torch(runner.recipe(**choices)), runner.prune(**choices)[0])


@pytest.mark.parametrize("method", ["fapm", "dare", "wise-ft"])
def test_what_is_kept_is_scaled_by_its_layer(runner, method):
    runner.write(*gaussian(SHAPES | {f"model.layers.{i}.a": (300, 400) for i in range(3)}, torch.bfloat16))
    choices = {"method": method, "density": 0.3, "layer_scale": "0.3:1"}
    same(on_torch(runner.recipe(**choices)), runner.prune(**choices)[0])


@pytest.mark.parametrize("emit", ["checkpoint", "delta"])
def test_candidates_from_one_reading(runner, emit):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    recipe = runner.recipe(shard_size="800kB", emit=emit)
    choices = recipe.model_dump() | {"method": list(METHODS), "scope": "tensor,global", "density": "0.1,0.4"}
    device = Device()
    made = sweep(candidates(choices, str(runner.folder / "swept")), pool=chunks.on_torch(device))
    assert len(made) == 2 * (2 * (len(METHODS) - 1) + 1)
    for one in made:
        alone = one.candidate.recipe.model_copy(update={"out": str(runner.folder / "alone" / one.candidate.name)})
        prune(alone)
        same(Path(one.candidate.recipe.out), Path(alone.out))


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(("base", "finetuned"), list(itertools.product(DTYPES, DTYPES)))
def test_stored_dtypes(runner, base, finetuned):
    p, f = gaussian(SHAPES, torch.float64, delta=0.5)
    runner.write({name: w.to(base) for name, w in p.items()}, {name: w.to(finetuned) for name, w in f.items()})
    same(on_torch(runner.recipe()), runner.prune()[0])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("method", ["fapm", "dare", "wise-ft"])
def test_output_dtypes_are_rounded_once(runner, stored, dtype, method):
    runner.write(*gaussian(SHAPES, stored))
    choices = {"dtype": dtype, "method": method, "density": 0.3}
    same(on_torch(runner.recipe(**choices)), runner.prune(**choices)[0])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_what_is_not_finite_is_base_s_where_that_is_asked_and_refused_elsewhere(runner, stored):
    base, finetuned = ({n: w.to(stored) for n, w in side.items()} for side in gaussian(SHAPES, torch.float64))
    for name, bad in zip(LARGE, (torch.nan, torch.inf, -torch.inf), strict=True):
        wide = finetuned[name].to(torch.float64).flatten()
        wide[::1000] = bad
        finetuned[name] = wide.reshape(SHAPES[name]).to(stored)
    runner.write(base, finetuned)
    same(on_torch(runner.recipe(nonfinite="base")), runner.prune(nonfinite="base")[0])
    with pytest.raises(UserError, match=r"finetuned 'model.layers.0.a' has 120 NaN and 0 Inf"):
        on_torch(runner.recipe())


def test_ties_are_handed_out_over_large_and_small_tensors_of_a_layer(runner):
    """Whole steps of δ, so that most scores are equal, in tensors of which the device has some and the host others."""
    random = torch.Generator().manual_seed(4)
    shapes = {"layers.0.a": (300, 300), "layers.0.b": (50,), "layers.0.c": (300, 301), "layers.0.d": (2, 20)}
    base = {name: torch.ones(shape) for name, shape in shapes.items()}
    finetuned = {name: w + torch.randint(0, 3, w.shape, generator=random) for name, w in base.items()}
    runner.write(base, finetuned)
    for density in (0.1, 0.3334, 0.5, 0.9):
        choices = {"scope": "layer", "density": density, "method": "magnitude"}
        same(on_torch(runner.recipe(**choices)), runner.prune(**choices)[0])


def pair_bytes() -> int:
    return 2 * 2 * sum(int(np.prod(SHAPES[name])) for name in LARGE)


def read_bytes(out: Path) -> int:
    """Of all steps but the one that samples."""
    events = [json.loads(line) for line in (out / "fapm/log.jsonl").read_text().splitlines()]
    return sum(event["read_bytes"] for event in events if event["event"] in ("counted", "shard"))


BESIDE = 40_000  # where samples begin; 8 bytes each


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("memory", ["64MiB", "1GiB"])
def test_a_pair_is_read_once_goes_to_the_device_once_and_comes_back_once(runner, scope, memory):
    """In global scope it stays there from the step that counts to the one that writes."""
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    device = Device()
    out = on_torch(runner.recipe(scope=scope, memory=memory, shard_size="400kB"), device)
    assert read_bytes(out) <= pair_bytes() + 4 * (2 * 2 * 64)  # the small tensor again, where there is no room for it
    cells = 2 * 8 * (1 << 16) if scope == "global" else 0  # of brackets
    assert pair_bytes() <= device.up_bytes <= pair_bytes() + cells * 4 + BESIDE
    assert device.down_bytes == pair_bytes() // 2
    assert device.waits <= 4 * len(SHAPES)  # means, two counts, output


def test_a_pair_that_does_not_fit_goes_there_once_a_pass(runner, monkeypatch):
    base, finetuned = gaussian({"a": (4000, 2000)}, torch.bfloat16)
    runner.write(base, finetuned)
    monkeypatch.setattr(worker, "shares", lambda memory, device, streamed: shares(memory, device, True))
    device, nbytes = Device(), 2 * 2 * 4000 * 2000
    same(on_torch(runner.recipe(memory="64MiB"), device), runner.prune(memory="64MiB")[0])
    assert device.up_bytes - BESIDE <= 3 * nbytes <= device.up_bytes  # means, counts, output
    assert device.down_bytes == nbytes // 2
    assert device.waits == 3


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("resident", [0, 3, 8, 100])
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_depends_on_how_much_stays_on_the_device(runner, monkeypatch, scope, resident, workers):
    """Chunks of one block, and room for so many of them."""
    runner.write(*gaussian(SHAPES, torch.float32))
    small = Sizes(BLOCK, 1 << 19, 1 << 20, 1 << 20)

    def tiny(memory: int, device_memory: int, streamed: bool = False) -> Shares:
        return Shares(small, 1 << 21, 1 << 19, 1 << 26, resident * BLOCK * 8)

    monkeypatch.setattr(worker, "shares", tiny)
    choices = {"scope": scope, "density": 0.3, "shard_size": "1MB", "workers": workers}
    same(on_torch(runner.recipe(**choices)), runner.prune(**choices | {"workers": 1})[0])


class Troubled(Device):
    """A device that raises an error at some of the copies to it, counted from 1."""

    def __init__(self, error: Exception, at: range):
        super().__init__()
        self._error, self._at, self._copies = error, at, 0

    def up(self, array: np.ndarray):
        self._copies += 1
        if self._copies in self._at:
            raise self._error
        return super().up(array)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("at", [1, 2, 5, 7, 9])
def test_out_of_its_memory_a_device_is_streamed_to_and_then_left_alone(runner, scope, at):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    choices = {"scope": scope, "shard_size": "400kB"}
    expected, said, progress = runner.prune(**choices)[0], [], []
    watch = Watch(say=said.append, advance=progress.append)
    once = on_torch(runner.recipe(**choices), Troubled(FULL, range(at, at + 1)), watch=watch)
    same(once, expected)
    assert [line for line in said if line.startswith("note:")] == [said_of("it goes on in smaller pieces")]
    passed = {"tensor": 1, "global": 2}[scope]
    assert sum(progress) == passed * (pair_bytes() + 2 * 2 * 64)
    said.clear()
    again = on_torch(runner.recipe(**choices), Troubled(FULL, range(at, 10**6)), watch=watch)
    same(again, expected)
    notes = [line for line in said if line.startswith("note:")]
    assert "; ".join(notes).count("it goes on in smaller pieces") == 1
    assert notes[-1].endswith("its CPU goes on")


def said_of(what: str) -> str:
    return f"note: the GPU of {here()} has less memory left than 16.1 GB: {what}"


def test_a_device_without_memory_from_the_start_is_left_alone(runner):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    device = Device(free=1 << 20)
    same(on_torch(runner.recipe(), device), runner.prune()[0])
    assert device.up_bytes == 0


def test_a_device_that_fails_ends_a_run_of_one_process_which_goes_on_later(runner):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    recipe = runner.recipe(shard_size="400kB")
    failure = torch.AcceleratorError("CUDA error: an illegal memory access was met\nDo try again")
    with pytest.raises(DeviceError, match=r"has failed: CUDA error: an illegal memory access was met; .* again$"):
        on_torch(recipe, Troubled(failure, range(5, 10**6)))
    assert issubclass(DeviceError, PassingError)
    same(on_torch(recipe), runner.prune(shard_size="400kB")[0])


@pytest.mark.skipif(not gpus(), reason="torch finds no GPU here")
@pytest.mark.parametrize(("method", "scope"), list(itertools.product(METHODS, ("tensor", "layer", "global"))))
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)])
def test_on_a_gpu(runner, method, scope, dtypes):
    sides = zip(gaussian(SHAPES, torch.float64), dtypes, strict=True)
    runner.write(*({name: w.to(dtype) for name, w in side.items()} for side, dtype in sides))
    choices = {"method": method, "scope": scope, "density": 0.3, "shard_size": "800kB"}
    expected = runner.prune(**choices)[0]
    for memory in (None, "256MiB"):
        same(runner.prune(**choices, device="cuda", device_memory=memory)[0], expected)


def test_the_memory_of_a_worker_holds_with_its_buffers_for_the_device():
    for memory in (1 << 24, 100 << 20, 976 << 20, 1 << 36):
        for device_memory in (1 << 28, 1 << 30, 80 << 30):
            for streamed in (False, True):
                found = shares(memory, device_memory, streamed)
                assert found.ring * RING + found.output * BUFFERS + found.host == memory
                assert found.host >= memory // 4
                assert found.cut.piece_bytes + slack(found.cut.piece_bytes) <= found.ring
                assert found.cut.piece_bytes // 16 >= BLOCK
                assert found.cut.output_bytes // 8 >= BLOCK
                assert found.resident + found.cut.chunk * WORK_BYTES <= device_memory
                assert streamed == (found.resident == 0)
