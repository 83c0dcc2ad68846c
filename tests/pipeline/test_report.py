"""pytest tests/pipeline/test_report.py: the tables that people read."""

from __future__ import annotations

import pytest
import torch
from checkpoints import gaussian, save

from fapm import prune
from fapm.formats.checkpoint import open_checkpoint
from fapm.manifest.read import read_table
from fapm.planning.make import make_plan
from fapm.reporting.facts import checkpoint_facts, extremes, plan_facts, prune_facts
from fapm.reporting.text import checkpoint_text, extremes_text, layout, plan_text, run_text
from fapm.schedule import Watch

SHAPES = {f"model.layers.{i}.up.weight": (16, 8) for i in range(12)}


def field(text: str, name: str) -> str:
    """What a table says of a field."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(name + "  "))
    return line.strip().removeprefix(name).strip()


def test_columns_are_aligned_and_numbers_flush_right():
    assert layout([("name", "n"), ("a", "10"), ("longer", "2")], right=(1,)) == "name     n\na       10\nlonger   2"


def test_the_table_of_a_run_has_its_numbers(runner):
    base, finetuned = gaussian(SHAPES)
    finetuned["model.layers.0.up.weight"] = base["model.layers.0.up.weight"].clone()
    runner.write(base, finetuned)
    out, result = runner.prune(density=0.5)
    text = run_text(prune_facts(result))
    assert text.splitlines()[0] == f"{out}: fapm, density 0.5, scope tensor"
    assert field(text, "tensors") == "12, 12 of them pruned, in 1 shard"
    # All 128 elements of the tensor without change score 0: its budget is spent on elements that are the same.
    kept, effective = 0.5, 11 * 64 / (12 * 128)
    assert field(text, "density") == f"0.5 asked, {kept:g} kept, {effective:.4g} effective (kept and changed)"
    assert field(text, "written") == f"{(out / 'model.safetensors').stat().st_size / 1000:.3g} kB"
    assert field(text, "warnings") == "none"
    assert "1 worker" in field(text, "time")


def test_the_table_says_where_finetuned_is_base(runner):
    base, _ = gaussian(SHAPES)
    runner.write(base, base)
    out, result = runner.prune()
    assert "finetuned equals base" in field(run_text(prune_facts(result)), "kept ‖Δ‖²")
    assert extremes_text(extremes(read_table(str(out)))) == "no tensor has changed"


def test_density_is_alpha_for_a_blend(runner):
    runner.write(*gaussian(SHAPES))
    _, result = runner.prune(method="wise-ft", density=0.25)
    text = run_text(prune_facts(result))
    assert "α 0.25" in text.splitlines()[0]
    assert not any(line.strip().startswith(("density", "kept")) for line in text.splitlines())


def test_a_resumed_run_says_from_where_and_gives_no_rate(runner):
    runner.write(*gaussian(SHAPES))
    _, whole = runner.prune(shard_size=1024)
    assert "/s" in field(run_text(prune_facts(whole)), "read")
    count, said = len(whole.plan.shards), []

    def stop_before_the_last(line: str) -> None:
        said.append(line)
        if len(said) == count - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(runner.recipe("out", shard_size=1024), watch=Watch(say=stop_before_the_last))
    _, second = runner.prune("out", shard_size=1024)
    text = run_text(prune_facts(second))
    assert f"went on from {second.resumed} of {count} shards" in text
    assert second.resumed >= count - 1
    assert "/s" not in field(text, "read")


def test_extremes_are_ranked_and_never_listed_twice():
    def row(i: int) -> dict:
        return {"name": f"t{i}", "shape": [2], "kept_share": i / 100, "norm_delta": 1.0, "norm_base": 2.0}

    same = {"name": "same", "shape": [2], "kept_share": None, "norm_delta": 0.0, "norm_base": 2.0}
    many = extremes([same, *(row(i) for i in (7, 3, 9, 1, 12, 5, 2, 4, 6, 8, 10, 11))])
    assert [r["name"] for r in many["lowest"]] == ["t1", "t2", "t3", "t4", "t5"]
    assert [r["name"] for r in many["highest"]] == ["t12", "t11", "t10", "t9", "t8"]
    lines = extremes_text(many).splitlines()
    assert [line.split()[2] for line in lines if " t" in line and "[" in line] == [
        "t12", "t11", "t10", "t9", "t8", "t5", "t4", "t3", "t2", "t1",
    ]  # fmt: skip
    assert "(2 tensors between)" in lines[6]
    few = extremes([row(1), row(2), row(3)])
    assert [r["name"] for r in (*few["highest"], *few["lowest"])] == ["t3", "t2", "t1"]
    assert [r["name"] for r in extremes([row(1)])["highest"]] == ["t1"]
    assert extremes([row(1) | {"norm_delta": None}])["changed_tensors"] == 0  # of a table that somebody has changed


def test_the_table_of_a_plan_names_wide_groups(runner):
    runner.write(*gaussian(SHAPES))
    plan = make_plan(runner.recipe(scope="global", shard_size=1024, memory="64MiB"))
    facts = plan_facts(plan, "unfinished", 2, workers=2)
    text = plan_text(facts)
    assert "unfinished run" in text
    assert "2 of them to do" in field(text, "shards")
    assert field(text, "groups") == "1, 1 of them over several shards"
    assert field(text, "kept") == f"{int(12 * 128 * 0.1)} of {12 * 128:,} elements"
    assert "twice" in field(text, "to read")


def test_numbers_inside_names_are_no_pattern(tmp_path):
    names = ("h.0.mlp2.w", "h.1.mlp2.w", "h.0.mlp3.w", "v1.w", "h.1.attn.0")
    save(tmp_path, {name: torch.ones(4, dtype=torch.bfloat16) for name in names} | {"none": torch.ones(0, 3)})
    facts = checkpoint_facts(open_checkpoint(str(tmp_path), "checkpoint"))
    assert {p["name"]: p["tensors"] for p in facts["patterns"]} == {
        "h.*.mlp2.w": 2, "h.*.mlp3.w": 1, "v1.w": 1, "h.*.attn.*": 1, "none": 1,
    }  # fmt: skip
    assert facts["layers"] == {"h": 2}
    assert facts["oddities"] == ["tensors without elements: 1: none"]
    assert "BF16 100.0%" in checkpoint_text(facts)
