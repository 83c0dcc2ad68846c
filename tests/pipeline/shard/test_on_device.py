"""pytest tests/pipeline/shard/test_on_device.py: whole prunes by torch's engine, which converts large tensors itself.

The device is the CPU: the same code runs on a GPU. What goes there is counted.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import digests, gaussian
from chunks import Counted, OnTorch

from pipeline import Recipe, UserError, prune
from pipeline.scoring.accelerator import Accelerator
from pipeline.scoring.methods import METHODS
from pipeline.shard.table import from_parquet

SHAPES = {"model.layers.0.a": (300, 400), "model.layers.0.b": (70_001,), "model.layers.0.norm": (64,), "z": (512, 700)}
LARGE = [name for name, shape in SHAPES.items() if np.prod(shape) > 1 << 16]


def on_torch(recipe: Recipe, device: Accelerator | None = None) -> Path:
    prune(recipe, pool=lambda plan, out, watch: OnTorch(recipe, out, 1, device))
    return Path(recipe.out)


def same(one: Path, other: Path) -> None:
    assert digests(one) == digests(other)
    tables = [from_parquet((out / "fapm/tensors.parquet").read_bytes()) for out in (one, other)]
    for mine, theirs in zip(*tables, strict=True):
        for key in mine.keys() - {"seconds"}:
            exact = theirs[key] if not isinstance(theirs[key], float) else pytest.approx(theirs[key], rel=1e-12)
            assert mine[key] == exact, (mine["name"], key)


@pytest.mark.parametrize(("method", "scope"), list(itertools.product(METHODS, ("tensor", "layer", "global"))))
def test_methods_and_scopes(runner, method, scope):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    choices = {"method": method, "scope": scope, "density": 0.3, "shard_size": "800kB"}
    same(on_torch(runner.recipe(**choices)), runner.prune(**choices)[0])


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


@pytest.mark.parametrize("scope", ["tensor", "layer"])
def test_a_pair_that_stays_in_memory_goes_to_the_device_once(runner, scope):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    device = Counted()
    on_torch(runner.recipe(scope=scope), device)
    beside = 2048 + (0 if scope == "tensor" else 2 * 8 * (1 << 16))  # the small tensor; the cells of brackets
    assert pair_bytes() <= device.up_bytes <= pair_bytes() + beside
    assert device.waits <= 4 + len(SHAPES)  # means, counts, twice at most, and output; ties between large and small


def test_a_pair_that_does_not_goes_there_once_a_pass(runner):
    runner.write(*gaussian({"a": (4000, 4000)}, torch.bfloat16))
    device = Counted()
    recipe = runner.recipe(memory="64MiB")
    same(on_torch(recipe, device), runner.prune(memory="64MiB")[0])
    assert device.up_bytes == 3 * 2 * 2 * 4000 * 4000  # means, counts, output
