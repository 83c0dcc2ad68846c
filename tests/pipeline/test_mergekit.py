"""Recipes of mergekit: those that mean the same make what the recipe here makes, the others are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from checkpoints import save, weights_of
from click.testing import CliRunner

from fapm import Recipe, prune
from fapm.cluster.cli import cli
from fapm.errors import UserError
from fapm.recipe import read_recipe

TIES = {
    "merge_method": "ties", "base_model": "base", "dtype": "float32",
    "models": [
        {"model": "base"},
        {"model": "f1", "parameters": {"weight": 0.5, "density": 0.4}},
        {"model": "f2", "parameters": {"weight": 1.0}},
    ],
    "parameters": {"density": 0.2, "normalize": True, "int8_mask": True, "lambda": 0.9},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.w": torch.randn(40, 50, generator=g).bfloat16() for i in range(3)}
    save(tmp_path / "base", base)
    for side in ("f1", "f2"):
        save(tmp_path / side, {n: (p + 0.1 * torch.randn(p.shape, generator=g)).bfloat16() for n, p in base.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder, said) -> dict:
    (folder / "merge.yaml").write_text(yaml.safe_dump(said))
    return read_recipe(folder / "merge.yaml")


def two(name: str, **more) -> dict:
    models = [{"model": "f1", "parameters": {"weight": 0.5}}, {"model": "f2", "parameters": {"weight": 1.0}}]
    return {"merge_method": name, "base_model": "base", "models": models, **more}


BOTH = [{"finetuned": "f1", "weight": 0.5}, {"finetuned": "f2", "weight": 1.0}]


def with_density(density: float) -> list[dict]:
    return [source | {"density": density} for source in BOTH]


@pytest.mark.parametrize(("said", "choices"), [
    (TIES, {"method": "magnitude", "combine": "ties", "scaling": 0.9, "dtype": "float32", "merged": [
        {"finetuned": "f1", "weight": 0.5, "density": 0.4}, {"finetuned": "f2", "weight": 1.0, "density": 0.2}]}),
    (two("task_arithmetic"), {"combine": "sum", "density": 1.0, "merged": BOTH}),
    (two("task_arithmetic", parameters={"normalize": True}), {"combine": "mean", "density": 1.0, "merged": BOTH}),
    (two("linear", out_dtype="float16", dtype="float32"),
     {"combine": "mean", "density": 1.0, "dtype": "float16", "merged": BOTH}),
    (two("dare_linear", parameters={"density": 0.3}),
     {"method": "dare", "combine": "sum", "merged": with_density(0.3)}),
    (two("dare_ties", parameters={"density": 0.3, "normalize": True}),
     {"method": "dare", "combine": "ties", "merged": with_density(0.3)}),
    (two("model_stock"),
     {"combine": "model-stock", "density": 1.0, "merged": [{"finetuned": "f1"}, {"finetuned": "f2"}]}),
    ({"merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "f1"}],
      "parameters": {"t": 0.3}},
     {"combine": "slerp", "density": 1.0, "merged": [{"finetuned": "f1", "weight": 0.3}]}),
])  # fmt: skip
def test_what_means_the_same_is_read(folder, said, choices):
    assert read(folder, said) == {"base": "base", **choices}
    done = CliRunner().invoke(cli, ["merge", "--config", "merge.yaml", "--out", "out", "--seed", "3"])
    assert done.exit_code == 0, done.output
    prune(Recipe.of(base="base", out="again", seed=3, **choices))
    assert weights_of(folder / "out") == weights_of(folder / "again")


def changed(**what) -> dict:
    return copy.deepcopy(TIES) | what


@pytest.mark.parametrize(("said", "why"), [
    (two("della"), "merge_method 'della' of mergekit is not known here; there are task_arithmetic"),
    (changed(tokenizer_source="union"), "'tokenizer_source' of mergekit has no meaning here"),
    (changed(parameters={"rescale": True}), "parameters: the parameter 'rescale' of mergekit has no meaning here"),
    (changed(parameters={"density": [0.1, 0.5]}), "density is a gradient or has a filter"),
    (changed(models=[{"model": "f1", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]),
     "f1: weight is a gradient or has a filter"),
    (changed(parameters={"normalize": False}), "ties without normalize has no meaning here.*normalize: true"),
    (two("dare_ties"), "dare_ties without normalize has no meaning here"),
    (two("linear", parameters={"normalize": False}), "linear without normalize"),
    ({**two("linear"), "base_model": None}, "say which it is: base_model"),
    (changed(models=[]), "models is to be a list"),
    (changed(models=[{"path": "f1"}]), "each of models is a mapping with a model"),
    (changed(models=[{"model": "base+lora"}]), "give the adapter alone"),
    (changed(models=[{"model": "f1", "layer_range": [0, 1]}]), "models: layer_range of mergekit has no meaning here"),
    (changed(dtype="int8"), "dtype 'int8': choose bfloat16"),
    (two("slerp", parameters={"t": 0.5}), "slerp goes from base_model to one other model, and there are 2"),
    ({"merge_method": "slerp", "base_model": "base", "models": [{"model": "f1"}]}, "slerp needs the parameter t"),
])  # fmt: skip
def test_what_there_is_not_is_refused_by_name(folder, said, why):
    with pytest.raises(UserError, match=why) as raised:
        read(folder, said)
    assert str(folder / "merge.yaml") in str(raised.value)
