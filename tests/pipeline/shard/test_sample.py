"""pytest tests/pipeline/shard/test_sample.py: what a sample suggests is right, so that one count is enough."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import Tensors, gaussian

from fapm import prune
from fapm.planning.make import make_plan
from fapm.schedule import Watch
from fapm.shard import sample
from fapm.shard.sample import Sample, survey

CASES = int(os.environ.get("FAPM_CASES", "50"))
METHODS = ["fapm", "magnitude", "relative", "random", "dare"]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
KINDS = ["gaussian", "heavy tails", "rows of their own scale", "tensors of their own scale", "ties"]


def random_model(seed: int, kind: str, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """A model of some 5 million elements: matrices, norms and biases of random sizes."""
    random, torch_random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    hidden, wide = int(random.choice([384, 512, 768])), float(random.choice([2, 2.75, 4]))
    inner = int(hidden * wide)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (int(random.integers(1000, 5000)), hidden)}
    for i in range(int(random.integers(2, 5))):
        for name, shape in {
            "q": (hidden, hidden), "k": (hidden // 4, hidden), "up": (inner, hidden), "down": (hidden, inner),
            "norm": (hidden,), "bias": (inner,),
        }.items():  # fmt: skip
            shapes[f"layers.{i}.{name}.weight"] = shape
    base, finetuned = {}, {}
    for name, shape in shapes.items():
        own = kind == "tensors of their own scale"
        size = 0.02 * (math.exp(random.normal()) if own else 1)
        p = torch.randn(shape, generator=torch_random) * size
        d = torch.randn(shape, generator=torch_random) * (float(random.choice([2e-5, 2e-4, 1e-3])) if own else 2e-4)
        if kind == "heavy tails":
            p /= torch.randn(shape, generator=torch_random).abs() + 0.05
            d /= torch.randn(shape, generator=torch_random).abs() + 1e-3
        if kind == "rows of their own scale" and len(shape) == 2:
            p *= torch.exp(0.3 * torch.randn(shape[0], 1, generator=torch_random))
            d *= torch.exp(0.5 * torch.randn(shape[0], 1, generator=torch_random))
        if kind == "ties":
            p, d = (p * 256).round() / 256, (d / 2e-4).round() * 2e-4
        base[name] = (p + ("norm" in name)).to(dtype)
        finetuned[name] = (p + ("norm" in name) + d).to(dtype)
    return base, finetuned


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_count_is_nearly_always_enough(new_runner: Callable) -> None:
    """Of fifty groups over several shards (FAPM_CASES) hardly one is counted twice, and nothing is read more than that
    costs."""
    random = np.random.default_rng(0)
    cases, missed, worst = 0, [], 0.0
    for seed in range(CASES // 2):
        runner, kind, dtype = new_runner(), KINDS[seed % 5], DTYPES[seed % 3]
        runner.write(*random_model(seed, kind, dtype))
        for memory, limit in (("1GiB", 2.2), ("64MiB", 3.2)):
            method = str(random.choice(METHODS))
            density = float(random.choice([0.05, 0.1, 0.2, 0.3, 0.45, 0.5, random.uniform(0.01, 0.6)]))
            choices = {"scope": "global", "method": method, "density": density, "shard_size": "3MB", "memory": memory}
            expected: list[int] = []
            recipe = runner.recipe(workers=2, **choices)
            result = prune(recipe, watch=Watch(begin=lambda _, n, e=expected: e.append(n), expect=expected.append))
            pair = result.plan.pair_bytes
            cases += 1
            read = result.manifest["totals"]["read_bytes"] / pair
            worst = max(worst, read)
            if result.manifest["rounds"] > 1:
                missed.append((seed, kind, dtype, choices))
            assert result.manifest["rounds"] <= 2
            # Of two workers one may have begun to read what the other then took, once in counting and once in writing.
            ahead = 2 * max(sum(t.read_bytes for t in shard.tensors) for shard in result.plan.shards) / pair
            assert read <= limit + ahead + (result.manifest["rounds"] - 1), (seed, kind, dtype, choices)
            assert sum(expected) == pair * (1 + result.manifest["rounds"])  # what the progress was told
    assert cases == CASES
    assert len(missed) <= 1, missed


def test_a_survey_weighs_tensors_by_what_they_stand_for(runner):
    """Norms are a thousandth of the elements and would be most of an even look at every tensor."""
    shapes = {"big": (2000, 1000), **{f"norm.{i:03d}": (64,) for i in range(30)}}
    base, finetuned = gaussian(shapes, delta=0.01)
    for i in range(30):
        finetuned[f"norm.{i:03d}"] = base[f"norm.{i:03d}"] + 1000
    runner.write(base, finetuned)
    recipe = runner.recipe(scope="global", method="magnitude")
    plan = make_plan(recipe)
    group, tensors = plan.groups["all"], plan.shards[0].tensors

    def take(tensor, share):
        starts, length = sample._runs(tensor.common, share)
        places = (starts[:, None] + np.arange(length)).reshape(-1)
        p, f = (side[tensor.name].numpy().reshape(-1)[places] for side in (base, finetuned))
        return Sample(places, p, f, starts.size)

    found = survey(tensors, group, 1 << 15, take, recipe, {})
    assert math.isclose(found.weights.sum(), group.numel, rel_tol=1e-9)
    far_off = found.weights[0xC400:].sum()  # scores of 512 and more
    assert math.isclose(far_off, 30 * 64, rel_tol=1e-9)
    deltas = np.concatenate([(finetuned[n] - base[n]).abs().numpy().reshape(-1) for n in shapes])
    threshold = np.sort(deltas)[::-1][group.k - 1]
    lo, hi = (found.bracket(group).lo, found.bracket(group).hi)
    key = int(np.float32(threshold).view(np.uint32)) | 1 << 31
    assert lo <= key <= hi
    assert key >> 16 in found.bracket(group).fine
    assert 0 < found.variance < (0.01 * group.numel) ** 2


@pytest.mark.parametrize("numel", [1, 5, 255, 256, 1000, 4096, 1 << 18, (1 << 18) + 1, 10_000_019])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.3, 0.9, 1.0])
def test_runs_lie_inside_a_tensor_and_never_overlap(numel, share):
    starts, length = sample._runs(numel, share)
    assert starts[0] == 0
    assert starts[-1] + length <= numel
    assert (np.diff(starts) >= length).all()
    assert length == numel or length & (length - 1) == 0
    taken = starts.size * length
    assert taken >= min(numel, share * numel) * 0.9 or taken == numel
    assert taken <= max(512, 2.1 * share * numel)
