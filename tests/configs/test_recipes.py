"""Every recipe in configs/ does what a user who copies it expects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import load
from conftest import Runner

from fapm import Recipe, prune

CONFIGS = Path(__file__).parents[2] / "configs"


# That of a sweep is tests/cluster/test_sweeping.py's.
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "sweep")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_prunes(path: Path, runner: Runner) -> None:
    random = torch.Generator().manual_seed(2)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    names += [
        f"model.layers.{i}.{part}" for i in range(2) for part in ("mlp.gate.weight", "mlp.up.weight", "mlp.up.bias")
    ]
    base = {name: torch.randn(40, 30, generator=random) for name in names}
    finetuned = {name: w + 0.01 * torch.randn(w.shape, generator=random) for name, w in base.items()}
    runner.write(base, finetuned)
    sides = {side: str(runner.folder / side) for side in ("base", "finetuned", "out")}
    result = prune(Recipe.load(path, **sides, workers=1))
    pruned = load(runner.folder / "out")
    assert result.plan.warnings == tuple(
        o for o in result.plan.warnings if "router" in o
    )  # of Llama 4; not in this one
    for name, weights in pruned.items():
        action = result.plan.recipe.action(name)
        if action in ("base", "finetuned"):
            assert torch.equal(weights, (base if action == "base" else finetuned)[name]), name
        else:
            assert 0 < (weights != base[name]).sum() < base[name].numel(), name
    competing = [t.name for t in result.plan.tensors() if t.action == "prune"]
    kept = sum(int((pruned[name] == finetuned[name]).sum()) for name in competing)
    budget = sum(group.k for group in result.plan.groups.values())
    assert kept == budget


def test_the_paper_is_the_default(runner: Runner) -> None:
    sides = {"base": "b", "finetuned": "f", "out": "o"}
    assert Recipe.load(CONFIGS / "paper.yaml", **sides) == Recipe(**sides)


def test_the_page_on_scale_is_what_the_model_says() -> None:
    page = (CONFIGS / "scale.md").read_text()
    command = [sys.executable, str(CONFIGS.parent / "tests" / "benchmarks" / "scale.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert page.split("<!-- scale.py -->\n")[1].split("<!-- end -->")[0] == table
