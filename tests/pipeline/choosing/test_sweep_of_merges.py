"""Sweeps over merges: every candidate is what `merge` makes alone, and one is chosen like any other."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from checkpoints import load, save, weights_of
from click.testing import CliRunner

from fapm import Recipe, prune
from fapm.checking.verify import verify
from fapm.choosing.candidates import candidates
from fapm.choosing.sweep import sweep
from fapm.cluster.cli import cli
from fapm.errors import UserError

SCORE = """
import json, os, sys
sys.path[:0] = json.loads(os.environ["ROOMS"])
from checkpoints import load
from pathlib import Path
base, one, two, this = (load(Path(p)) for p in ("base", "f1", "f2", sys.argv[1]))
def near(a, b):
    d = sum(float((a[n].double() - b[n].double()).norm()) ** 2 for n in a)
    whole = sum(float((base[n].double() - b[n].double()).norm()) ** 2 for n in a)
    return 1 - d / (2 * whole + 1e-9)
print(json.dumps({"new": (near(this, one) + near(this, two)) / 2, "old": 1 - abs(near(this, base) - 1)}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.w": torch.randn(60, 50, generator=g).bfloat16() for i in range(3)}
    save(tmp_path / "base", base, 2)
    for side in ("f1", "f2"):
        save(tmp_path / side, {n: (p + 0.1 * torch.randn(p.shape, generator=g)).bfloat16() for n, p in base.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


MERGE = {
    "base": "base", "shard_size": "8kB", "workers": 1, "memory": "128MB",
    "merged": [{"finetuned": "f1", "weight": [0.5, 1.0]}, {"finetuned": "f2", "density": 0.4}],
}  # fmt: skip


def test_candidates_are_what_merge_makes_alone(folder):
    choices = MERGE | {"out": "out", "combine": "sum,ties", "scaling": [1.0, 0.5], "scope": "global", "density": 0.2}
    made = sweep(candidates(choices, str(folder / "swept")))
    assert [one.candidate.name for one in made] == [
        f"{how}-scaling-{scaling}-weight1-{weight}"
        for how in ("sum", "ties") for scaling in ("1", "0.5") for weight in ("0.5", "1")
    ]  # fmt: skip
    for one in made:
        recipe = one.candidate.recipe
        assert verify(recipe.out) == []
        prune(recipe.model_copy(update={"out": str(folder / "alone" / one.candidate.name)}))
        assert weights_of(folder / "swept" / one.candidate.name) == weights_of(folder / "alone" / one.candidate.name)
    assert len({one.manifest["totals"]["read_bytes"] for one in made}) == 1


def test_one_is_chosen_and_measured_by_the_best_source(folder, monkeypatch):
    import sys

    monkeypatch.setenv("ROOMS", json.dumps(sys.path))
    (folder / "score.py").write_text(SCORE)
    (folder / "merge.yaml").write_text(yaml.safe_dump(MERGE | {"out": "out"}))
    words = ["sweep", "--config", "merge.yaml", "--density", "0.1,0.5", "--combine", "sum", "--choose-anyway"]
    words += ["--evaluate", f"{sys.executable} score.py {{checkpoint}}", "--choose", "retained>=0.5"]
    done = CliRunner().invoke(cli, [*words, "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [row["name"] for row in facts["candidates"]] == [
        f"sum-{density}-weight1-{weight}" for density in ("0.1", "0.5") for weight in ("0.5", "1")
    ]
    sides = {facts["finetuned"]["path"]: facts["finetuned"], facts["sources"][0]["path"]: facts["sources"][0]}
    assert {path.rpartition("/")[2] for path in sides} == {"f1", "f2"}
    best = max(side["new"]["value"] for side in sides.values())
    assert facts["finetuned"]["new"]["value"] == best and facts["finetuned"]["retained"]["value"] == 1
    for row in facts["candidates"]:
        assert row["retained"]["value"] == pytest.approx(row["new"]["value"] / best)
    chosen = facts["chosen"]["name"]
    assert weights_of(folder / "out") == weights_of(folder / "out/sweep" / chosen)
    assert verify("out") == [] and load(folder / "out").keys() == load(folder / "base").keys()
    shown = CliRunner().invoke(cli, ["report", "out", "--html", "page.html"])
    assert shown.exit_code == 0, shown.output
    page = (folder / "page.html").read_text()
    assert f"finetuned, {next(iter(sides))}" in page and "Who has changed what" in page
    again = CliRunner().invoke(cli, [*words, "--json"])
    assert json.loads(again.stdout) == facts


def test_what_is_of_merges_is_not_for_prunes(folder):
    with pytest.raises(UserError, match="--combine is for merges, whose sources are listed in a recipe"):
        candidates({"base": "base", "finetuned": "f1", "out": "out", "combine": "sum,ties"}, "swept")
    with pytest.raises(
        UserError, match=r"--strict.*--scaling has no meaning where one fine-tuned checkpoint is pruned"
    ):
        prune(Recipe.of(base="base", finetuned="f1", out="out", scaling=0.5, strict=True))
