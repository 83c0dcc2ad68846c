"""Layer scale: what is kept in a layer is multiplied by a factor of its own (SEMANTICS.md, LiNeS)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, Tensors, load, save, weights_of
from click.testing import CliRunner

from fapm import Recipe, prune
from fapm.checking.verify import verify
from fapm.choosing.candidates import candidates
from fapm.choosing.sweep import sweep
from fapm.cluster.cli import cli
from fapm.errors import UserError
from fapm.planning.make import make_plan

SHAPES = {
    "model.embed_tokens.weight": (200, 40),
    **{f"model.layers.{i}.q.weight": (64, 48) for i in range(4)},
    **{f"model.layers.{i}.norm.weight": (64,) for i in range(4)},
    **{f"vision.blocks.{i}.up.weight": (300, 300) for i in range(3)},  # of more than one block
    "single.blocks.0.w": (40, 40),
}
FACTORS = {
    **{f"model.layers.{i}": 0.25 + 0.75 * i / 3 for i in range(4)},
    **{f"vision.blocks.{i}": 0.25 + 0.75 * i / 2 for i in range(3)},
}


def factor(name: str) -> float:
    return next((s for layer, s in FACTORS.items() if name.startswith(f"{layer}.")), 0.25)


@pytest.fixture
def pair(tmp_path):
    def make(dtype: torch.dtype = torch.float32) -> dict[str, str]:
        g = torch.Generator().manual_seed(0)
        base = {n: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for n, shape in SHAPES.items()}
        noise = {n: 0.05 * torch.randn(shape, generator=g, dtype=torch.float64) for n, shape in SHAPES.items()}
        save(tmp_path / "base", base, 2)
        save(tmp_path / "finetuned", {n: (p.double() + noise[n]).to(dtype) for n, p in base.items()})
        return {"base": str(tmp_path / "base"), "finetuned": str(tmp_path / "finetuned"), "memory": "128MB"}

    return make


def pruned(sides: dict[str, str], out, **choices) -> Tensors:
    prune(Recipe.of(**{**sides, "out": str(out), **choices}))
    return load(out)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize(("method", "value", "scope"), [
    ("fapm", 0.2, "tensor"), ("magnitude", 0.3, "layer"), ("dare", 0.5, "global"), ("wise-ft", 0.4, "tensor"),
    ("fapm", 1.0, "tensor"),
])  # fmt: skip
def test_it_is_the_formula_over_what_is_kept_without_it(pair, tmp_path, method, value, scope, dtype):
    sides, choices = pair(DTYPES[dtype]), {"method": method, "density": value, "scope": scope}
    wide = pruned(sides, tmp_path / "wide", **choices, dtype="float64" if dtype == "F64" else "float32")
    plain = pruned(sides, tmp_path / "plain", **choices)
    scaled = pruned(sides, tmp_path / "scaled", **choices, layer_scale="0.25:1", shard_size="100kB")
    base = load(tmp_path / "base")
    for name, p in base.items():
        x, v = p.to(wide[name].dtype), wide[name]
        s = torch.tensor(factor(name), dtype=x.dtype)
        wanted = plain[name] if s == 1 else torch.where(v != x, (x + s * (v - x)).to(p.dtype), p)
        assert torch.equal(scaled[name], wanted), name
    assert verify(str(tmp_path / "scaled")) == []


def test_by_one_nothing_changes(pair, tmp_path):
    sides = pair(torch.bfloat16)
    pruned(sides, tmp_path / "plain")
    pruned(sides, tmp_path / "scaled", layer_scale="1:1")
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "scaled")


@pytest.mark.parametrize("method", ["dg-hard", "timber"])
def test_what_a_matrix_method_keeps_is_scaled(pair, tmp_path, method):
    sides = pair()
    plain = pruned(sides, tmp_path / "plain", method=method, dtype="float64")
    scaled = pruned(sides, tmp_path / "scaled", method=method, layer_scale="0.25:1")
    base = load(tmp_path / "base")
    for name, p in base.items():
        if p.ndim == 2:
            wanted = p.double() + factor(name) * (plain[name] - p.double())
            assert torch.allclose(scaled[name].double(), wanted, atol=1e-6, rtol=1e-6), name
    assert verify(str(tmp_path / "scaled")) == []


def test_each_source_of_a_merge_is_scaled(pair, tmp_path):
    sides = pair()
    recipe = {"base": sides["base"], "memory": "128MB", "layer_scale": "0.25:1"}
    prune(Recipe.of(**recipe, merged=[{"finetuned": sides["finetuned"]}], out=str(tmp_path / "merged")))
    pruned(sides, tmp_path / "scaled", layer_scale="0.25:1")
    assert weights_of(tmp_path / "merged") == weights_of(tmp_path / "scaled")
    assert verify(str(tmp_path / "merged")) == []


def test_a_sweep_over_scales_is_one_reading_and_the_same_as_each_alone(pair, tmp_path):
    sides = pair(torch.bfloat16)
    choices = {**sides, "out": str(tmp_path / "out"), "density": "0.1,0.3", "layer_scale": ["0.25:1", "1:0.5"]}
    made = sweep(candidates(choices, str(tmp_path / "swept")))
    assert [one.candidate.name for one in made] == [
        "fapm-0.1-scale-0.25-1", "fapm-0.1-scale-1-0.5", "fapm-0.3-scale-0.25-1", "fapm-0.3-scale-1-0.5",
    ]  # fmt: skip
    for one, (density, scale) in zip(made, [(d, s) for d in (0.1, 0.3) for s in ("0.25:1", "1:0.5")], strict=True):
        pruned(sides, tmp_path / one.candidate.name, density=density, layer_scale=scale)
        assert weights_of(tmp_path / "swept" / one.candidate.name) == weights_of(tmp_path / one.candidate.name)


def test_it_is_said_and_stored(pair, tmp_path, monkeypatch):
    sides = pair()
    words = ["prune", "--base", sides["base"], "--finetuned", sides["finetuned"], "--layer-scale", "0.5:1"]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "fapm, density 0.1, scope tensor, layer scale 0.5:1.0" in done.output
    card = (tmp_path / "out/README.md").read_text()
    assert "--layer-scale 0.5:1.0" in card
    again = CliRunner().invoke(cli, ["prune", "--config", str(tmp_path / "out/fapm/recipe.yaml")])
    assert "nothing to do" in again.output
    other = CliRunner().invoke(cli, [*words[:-1], "0.5:0.9", "--out", str(tmp_path / "out")])
    assert other.exit_code == 1 and "layer_scale was '0.5:1.0' and is '0.5:0.9'" in other.output


@pytest.mark.parametrize("scale", ["1", "a:b", "1:2:3", "nan:1", "1:inf", ":", 5, "1e99:1"])
def test_what_is_no_scale_is_a_sentence(scale):
    with pytest.raises(UserError, match="--layer-scale: give the factors of the first and of the last layer"):
        Recipe.of(base="b", finetuned="f", out="o", layer_scale=scale)


def test_every_stack_counts_its_own_layers(pair, tmp_path):
    plan = make_plan(Recipe.of(**pair(), out=str(tmp_path / "out"), layer_scale="0.25:1"))
    assert np.allclose([t.scale for t in plan.tensors()], [factor(t.name) for t in plan.tensors()], atol=1e-15)
