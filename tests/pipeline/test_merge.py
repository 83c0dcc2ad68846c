"""Merges, held to what a prune of each source alone makes and to the formulas of SEMANTICS.md in torch."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, Tensors, load, save, weights_of
from click.testing import CliRunner
from killing import killed_until_done

import fapm
from fapm import Recipe, prune
from fapm.checking.verify import verify
from fapm.cluster.cli import cli
from fapm.errors import UserError
from fapm.manifest.read import load_manifest, read_table
from fapm.recipe import read_recipe
from fapm.reporting.page import page

COMBINATIONS = ("sum", "mean", "ties", "slerp", "model-stock", "first", "last")
SHAPES = {
    "model.embed_tokens.weight": (300, 40),
    "model.layers.0.norm.weight": (64,),
    "model.layers.0.q.weight": (64, 64),
    "model.layers.1.norm.weight": (64,),
    "model.layers.1.q.weight": (70_000, 5),  # of more than one block
    "scale": (1,),
}


def tensors_of(seed: int, dtype: torch.dtype, near: Tensors | None = None, shapes: dict = SHAPES) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g, dtype=torch.float64)
        found[name] = (noise if near is None else near[name].double() + 0.05 * noise).to(dtype)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, dtype: torch.dtype = torch.float32, sources: int = 2) -> list[dict[str, str]]:
    """base/ and f1/, f2/ …; returns the sources of a recipe."""
    base = tensors_of(0, dtype)
    save(folder / "base", base, 2)
    found = []
    for i in range(1, sources + 1):
        save(folder / f"f{i}", tensors_of(i, dtype, base), 1 + i % 2)
        found.append({"finetuned": str(folder / f"f{i}")})
    return found


def merged(folder: Path, sources: list, out: str = "out", **choices) -> Path:
    common = {"workers": 1, "device": "cpu", "memory": "128MB"} | choices
    prune(Recipe.of(base=str(folder / "base"), merged=sources, out=str(folder / out), **common))
    return folder / out


def alone(folder: Path, source: dict, out: str, **choices) -> Tensors:
    """What a source's prune makes, in a dtype in which it is not rounded."""
    own = {name: value for name, value in source.items() if name != "weight"}
    shared = {name: value for name, value in choices.items() if name not in ("combine", "scaling")}
    wide = "float64" if load(folder / "base")["scale"].dtype == torch.float64 else "float32"
    prune(Recipe.of(**{"base": str(folder / "base"), "out": str(folder / out), "dtype": wide, **shared, **own}))
    return load(folder / out)


def formula(how: str, p: torch.Tensor, values: list, weights: list[float], scaling: float) -> torch.Tensor:
    """SEMANTICS.md, "Several fine-tuned checkpoints", in the dtype of p."""
    deltas = [v - p for v in values]
    w = [torch.tensor(x, dtype=p.dtype) for x in weights]
    lam = torch.tensor(scaling, dtype=p.dtype)
    total = sum((x * d for x, d in zip(w[1:], deltas[1:], strict=True)), w[0] * deltas[0])
    if how == "sum":
        return values[0] if len(values) == 1 and weights[0] == scaling == 1 else p + lam * total
    if how == "mean":
        return p + lam * (total / sum(w[1:], w[0]))
    if how == "ties":
        sign = torch.sign(total)
        masks = [(torch.sign(d) == sign) & (d != 0) for d in deltas]
        part, share = torch.zeros_like(p), torch.zeros_like(p)
        for x, d, mask in zip(w, deltas, masks, strict=True):
            part, share = part + torch.where(mask, x * d, 0), share + torch.where(mask, x, 0)
        return torch.where(share == 0, p, p + lam * (part / share))
    if how in ("first", "last"):
        found = p
        for v in values if how == "last" else values[::-1]:
            found = torch.where(v != p, v, found)
        return found
    wide = [d.double().flatten() for d in deltas]
    if how == "slerp":
        one, other = [p, *values][-2:]
        a, b = one.double().flatten(), other.double().flatten()
        t = weights[1] / sum(weights) if len(weights) == 2 else weights[0]
        cosine = a @ b / (a.norm() * b.norm())
        if abs(cosine) > 0.9995:
            return one + torch.tensor(t, dtype=torch.float32).to(p.dtype) * (other - one)
        theta = torch.arccos(cosine)
        factors = [torch.sin(x * theta) / torch.sin(theta) for x in (1 - t, t)]
        return factors[0].float().to(p.dtype) * one + factors[1].float().to(p.dtype) * other
    none = torch.zeros((), dtype=torch.float64)
    pairs = [
        a @ b / (a.norm() * b.norm()) if a.norm() and b.norm() else none for a, b in itertools.combinations(wide, 2)
    ]
    n, c = len(deltas), sum(pairs) / len(pairs)
    return p + (n * c / (1 + (n - 1) * c)).float().to(p.dtype) * (sum(deltas[1:], deltas[0]) / n)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F16"])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_it_is_the_formula_over_what_a_prune_of_each_makes(folder, how, dtype):
    sources = write(folder, DTYPES[dtype], 2 if how == "slerp" else 3)
    sources[1] |= {"density": 0.4, "scope": "layer"}
    if how not in ("model-stock", "first", "last"):
        sources[0] |= {"weight": 0.7}
        sources[1] |= {"weight": 1.3}
    scaling = 0.9 if how in ("sum", "mean", "ties") else 1.0
    out = load(merged(folder, sources, combine=how, scaling=scaling, density=0.2, shard_size="60kB"))
    values = [alone(folder, {"density": 0.2} | of, f"alone-{i}") for i, of in enumerate(sources)]
    base = load(folder / "base")
    for name, p in base.items():
        wide = p.to(values[0][name].dtype)
        of_sources = [v[name] for v in values]
        wanted = formula(how, wide, of_sources, [of.get("weight", 1.0) for of in sources], scaling)
        changed = sum((v != wide) for v in of_sources) > 0
        changed |= how == "slerp"  # along the arc all move, and straight none that it should not
        assert torch.equal(out[name], torch.where(changed, wanted.to(p.dtype), p)), name
    assert verify(str(folder / "out")) == []


METHODS = [
    ("fapm", 0.1),
    ("magnitude", 0.3),
    ("relative", 0.2),
    ("random", 0.5),
    ("dare", 0.25),
    ("wise-ft", 0.4),
    ("fapm", 1.0),
]


@pytest.mark.parametrize(("method", "density"), METHODS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_of_one_source_it_is_its_prune(folder, method, density, dtype):
    sources = write(folder, DTYPES[dtype], 1)
    choices = {"method": method, "density": density, "seed": 7}
    out = merged(folder, sources, **choices)
    prune(Recipe.of(base=str(folder / "base"), finetuned=str(folder / "f1"), out=str(folder / "pruned"), **choices))
    assert weights_of(out) == weights_of(folder / "pruned")


@pytest.mark.parametrize("how", ["ties", "slerp"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_the_same_bytes_from_any_number_of_workers_and_any_budget(folder, how, scope):
    sources = write(folder, torch.bfloat16)
    sources[0] |= {"method": "dare", "seed": 3}
    wanted = weights_of(merged(folder, sources, combine=how, scope=scope, shard_size="60kB"))
    for i, (workers, memory) in enumerate([(2, "64MiB"), (3, "1GiB")]):
        again = merged(
            folder, sources, f"again-{i}", combine=how, scope=scope, shard_size="60kB", workers=workers, memory=memory
        )
        assert weights_of(again) == wanted
    assert verify(str(folder / "out")) == []


def test_a_tensor_that_a_source_lacks_is_no_change_of_it(folder):
    sources = write(folder)
    lacking = load(folder / "f2")
    del lacking["model.layers.0.q.weight"]
    save(folder / "f2", lacking)
    out = load(merged(folder, sources, unpaired="pass"))
    pruned = alone(folder, sources[0], "alone")
    name = "model.layers.0.q.weight"
    base = load(folder / "base")[name]
    wanted = base + (pruned[name] - base)
    assert torch.equal(out[name], torch.where(pruned[name] != base, wanted, base))
    assert verify(str(folder / "out")) == []
    with pytest.raises(UserError, match=r"not in all of them: model\.layers\.0\.q\.weight"):
        merged(folder, sources, "arc", unpaired="pass", combine="slerp")


def test_adapters_and_deltas_are_sources(folder):
    sources = write(folder, torch.bfloat16)
    base = load(folder / "base")
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
    (folder / "lora").mkdir()
    from safetensors.torch import save_file

    prefix = "base_model.model.model.layers.0.q"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "base_model_name_or_path": "base"}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    prune(Recipe.of(base=str(folder / "base"), finetuned=str(folder / "f1"), out=str(folder / "delta"), emit="delta",
                    rules=["*=finetuned"]))  # fmt: skip
    from_parts = merged(
        folder, [{"finetuned": str(folder / "delta")}, {"finetuned": str(folder / "lora")}], combine="ties"
    )
    grown = dict(base)
    q = "model.layers.0.q.weight"
    grown[q] = (base[q].float() + 2 * (b @ a)).to(torch.bfloat16)
    save(folder / "merged-lora", grown)
    whole = merged(folder, [sources[0], {"finetuned": str(folder / "merged-lora")}], "whole", combine="ties")
    assert weights_of(from_parts) == weights_of(whole)
    assert verify(str(from_parts)) == []


@pytest.mark.parametrize(("change", "said"), [
    ({"method": "dg-hard"}, "--method dg-hard works on whole matrices"),
    ({"rules": ["*norm*=finetuned"]}, r"--rule \*norm\*=finetuned: a merge has several"),
    ({"combine": "first", "scaling": 0.5}, "--scaling has no meaning for --combine first"),
    ({"combine": "slerp", "scaling": 0.5}, "--scaling has no meaning for --combine slerp"),
    ({"combine": "slerp", "count": 3}, "--combine slerp takes at most 2 fine-tuned checkpoints, and there are 3"),
    ({"combine": "model-stock", "count": 1}, "--combine model-stock takes at least 2"),
    ({"combine": "model-stock", "weights": (1, 2)}, "--combine model-stock has no use for weights"),
    ({"combine": "mean", "weights": (1, -1)}, "divides by the sum of the weights, which is 0"),
    ({"combine": "error"}, "two sources make different values"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(folder, change, said):
    change = dict(change)
    sources = write(folder, sources=change.pop("count", 2))
    for source, weight in zip(sources, change.pop("weights", ()), strict=False):
        source["weight"] = weight
    with pytest.raises(UserError, match=said):
        merged(folder, sources, **change)
    assert not (folder / "out/model.safetensors").exists()


def test_sources_that_do_not_fit_each_other_are_refused_by_name(folder):
    write(folder)
    for name, tensor, said in (
        ("model.embed_tokens.weight", torch.zeros(310, 40), "another shape or kind"),
        ("scale", torch.zeros(1, dtype=torch.int64), "another shape or kind"),
        ("new.weight", torch.zeros(3), "not floating point, or not in base"),
    ):
        changed = [load(folder / "f1"), load(folder / "f2")]
        if name == "new.weight":
            changed[0][name] = tensor + 1
        changed[1][name] = tensor
        for i, tensors in enumerate(changed, 1):
            save(folder / f"g{i}", tensors)
        with pytest.raises(UserError, match=f"{said}.*{name}"):
            merged(folder, [{"finetuned": str(folder / f"g{i}")} for i in (1, 2)], unpaired="pass")


def test_the_same_bytes_of_what_has_no_partner_are_taken(folder):
    write(folder)
    for i in (1, 2):
        save(folder / f"g{i}", load(folder / f"f{i}") | {"ids": torch.arange(5), "new.weight": torch.ones(3)})
    out = load(merged(folder, [{"finetuned": str(folder / f"g{i}")} for i in (1, 2)], unpaired="pass"))
    assert torch.equal(out["ids"], torch.arange(5)) and torch.equal(out["new.weight"], torch.ones(3))


def test_of_what_is_not_floating_point_only_those_count_that_change_it(folder):
    """As where one of several deltas has moved a counter; where two have, first and last decide."""
    write(folder)
    ids = torch.arange(5)
    save(folder / "base", load(folder / "base") | {"ids": ids}, 2)
    save(folder / "g1", load(folder / "f1") | {"ids": ids})
    for i, changed in (("2", ids + 1), ("3", ids + 2)):
        save(folder / f"g{i}", load(folder / "f2") | {"ids": changed})
    one, two, three = ({"finetuned": str(folder / f"g{i}")} for i in (1, 2, 3))
    assert torch.equal(load(merged(folder, [one, two], "out-1"))["ids"], ids + 1)
    assert torch.equal(load(merged(folder, [one, two, three], "out-2", combine="last"))["ids"], ids + 2)
    assert torch.equal(load(merged(folder, [one, three, two], "out-3", combine="first"))["ids"], ids + 2)
    with pytest.raises(UserError, match="differ between the sources: ids"):
        merged(folder, [one, two, three], "out-4")
    assert verify(str(folder / "out-2")) == []


def test_error_lets_pass_what_sources_agree_on(folder):
    write(folder)
    one, base = load(folder / "f1"), load(folder / "base")
    save(folder / "f2", base | {"scale": one["scale"]})
    both = [{"finetuned": str(folder / f"f{i}"), "density": 1.0} for i in (1, 2)]
    out = load(merged(folder, both, combine="error"))
    assert all(torch.equal(out[name], one[name]) for name in one)


def test_nothing_changes_where_no_source_does(folder):
    """−0 in base stays it, too."""
    base = tensors_of(0, torch.float32)
    base["model.layers.0.q.weight"][:] = -0.0
    save(folder / "base", base)
    for i in (1, 2):
        changed = {name: t.clone() for name, t in base.items()}
        changed["model.embed_tokens.weight"][i] += 1
        save(folder / f"f{i}", changed)
    sources = [{"finetuned": str(folder / f"f{i}"), "density": 1.0, "weight": 0.5} for i in (1, 2)]
    for how in ("sum", "mean", "ties", "slerp"):
        out = load(merged(folder, sources, how, combine=how))
        same = out["model.layers.0.q.weight"], base["model.layers.0.q.weight"]
        assert same[0].numpy().tobytes() == same[1].numpy().tobytes(), how


def test_the_tables_say_who_gave_what(folder):
    sources = write(folder)
    out = merged(folder, sources, density=0.3, scope="global")
    base = load(folder / "base")
    values = [alone(folder, of, f"alone-{i}", density=0.3, scope="global") for i, of in enumerate(sources)]
    rows = {row["name"]: row for row in read_table(str(out))}
    for name, p in base.items():
        moved = [torch.sign(v[name] - p) for v in values]
        both = (moved[0] != 0) & (moved[1] != 0)
        row = rows[name]
        assert row["kept"] == int(((moved[0] != 0) | (moved[1] != 0)).sum())
        assert row["shared"] == int(both.sum())
        assert row["opposed"] == int((both & (moved[0] != moved[1])).sum())
    made = load_manifest(str(out))
    for i, source in enumerate(made["sources"], 1):
        of_source = read_table(str(out), i)
        assert source["kept"] == sum(row["kept"] for row in of_source) == int(0.3 * source["pruned_numel"])
    assert made["totals"]["shared"] == sum(row["shared"] for row in rows.values())
    said = CliRunner().invoke(cli, ["report", str(out)]).output
    assert f"source 2  {sources[1]['finetuned']}: fapm, density 0.3, scope global, weight 1; 0.3 kept" in said


@pytest.mark.parametrize("place", ["value", "table"])
def test_verify_finds_what_is_wrong(folder, place):
    sources = write(folder)
    out = merged(folder, sources, combine="ties")
    if place == "value":
        path = out / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        wanted = r"tensor 'scale': 1 element\(s\), the first at flat index 0, are not the ties"
    else:
        (out / "fapm/source-2.parquet").write_bytes((out / "fapm/source-1.parquet").read_bytes())
        wanted = "source 2: group"
    assert any(re.search(wanted, problem) for problem in verify(str(out)))


def test_on_the_command_line(folder, monkeypatch):
    write(folder)
    monkeypatch.chdir(folder)
    run = CliRunner().invoke
    words = [
        "merge",
        "--base",
        "base",
        "--finetuned",
        "f1",
        "--weight",
        "0.5",
        "--density",
        "0.2",
        "--finetuned",
        "f2",
        "--weight",
        "2",
        "--density",
        "0.4",
        "--scope",
        "layer",
        "--combine",
        "ties",
        "--scaling",
        "0.9",
    ]
    done = run(cli, [*words, "--out", "out"])
    assert done.exit_code == 0, done.output
    wanted = [{"finetuned": "f1", "weight": 0.5, "density": 0.2}, {"finetuned": "f2", "weight": 2.0, "density": 0.4}]
    placed = [of | {"finetuned": str(folder / of["finetuned"])} for of in wanted]
    again = merged(folder, placed, "again", combine="ties", scaling=0.9, scope="layer")
    assert weights_of(folder / "out") == weights_of(again)
    # What is stored makes it again, from anywhere.
    stored = read_recipe(folder / "out/fapm/recipe.yaml")
    assert [of["weight"] for of in stored["merged"]] == [0.5, 2.0]
    monkeypatch.chdir("/")
    done = run(cli, ["merge", "--config", str(folder / "out/fapm/recipe.yaml"), "--out", str(folder / "third")])
    assert done.exit_code == 0, done.output
    assert weights_of(folder / "third") == weights_of(again)
    done = run(cli, ["merge", "--config", str(folder / "out/fapm/recipe.yaml")])
    assert "nothing to do" in done.output
    assert "nothing to do" not in run(cli, [*words[:-1], "0.8", "--out", "out"]).output


@pytest.mark.parametrize(("words", "said"), [
    (["--weight", "1"], None),
    (["--weight", "1", "--weight", "2", "--weight", "3"], "--weight is given 3 times, and --finetuned 2 times"),
    (["--weight", "much"], "--merged.weight"),
    (["--combine", "sums"], "--combine"),
    (["--method", "fapn"], "there is no such method"),
])  # fmt: skip
def test_options_that_cannot_be(folder, words, said):
    write(folder)
    sides = ["--base", str(folder / "base"), "--finetuned", str(folder / "f1"), "--finetuned", str(folder / "f2")]
    done = CliRunner().invoke(cli, ["merge", *sides, *words, "--out", str(folder / "out")])
    assert (done.exit_code == 0) == (said is None), done.output
    assert said is None or said in done.output
    assert said is None or not (folder / "out").exists()


def test_killed_at_any_moment_it_goes_on(folder):
    sources = write(folder, torch.bfloat16)
    wanted = weights_of(merged(folder, sources, combine="ties", scope="global", shard_size="60kB"))
    killed_until_done(
        "merge --base base --finetuned f1 --finetuned f2 --combine ties --scope global --shard-size 60kB "
        "--memory 128MB --workers 1 --device cpu --out killed",
        folder,
    )
    assert weights_of(folder / "killed") == wanted
    assert not (folder / "killed/fapm/work").exists()


def test_a_source_that_has_changed_is_named(folder):
    sources = write(folder)
    out = merged(folder, sources)
    changed = load(folder / "f2")
    changed["scale"] += 1
    save(folder / "f2", changed, 1)
    with pytest.raises(UserError, match=r"finetuned-2: model\.safetensors has changed since"):
        merged(folder, sources)
    with pytest.raises(UserError, match="is not the file that was pruned"):
        verify(str(out))


def test_the_output_is_none_of_the_inputs(folder):
    sources = write(folder)
    with pytest.raises(UserError, match="is the finetuned-2 checkpoint itself"):
        merged(folder, sources, "f2")


@pytest.mark.slow
def test_on_ray_it_is_the_same(folder):
    from fapm.cluster.pool import ray_pool

    sources = write(folder, torch.bfloat16)
    wanted = weights_of(merged(folder, sources, combine="mean", scope="global", shard_size="60kB"))
    choices = {"combine": "mean", "scope": "global", "shard_size": "60kB", "memory": "128MB", "workers": 2}
    recipe = Recipe.of(base=str(folder / "base"), merged=sources, out=str(folder / "on-ray"), **choices)
    prune(recipe, pool=ray_pool("local"))
    assert weights_of(folder / "on-ray") == wanted


def test_a_sparse_task_vector_of_a_merge(folder):
    sources = write(folder, torch.bfloat16)
    whole = merged(folder, sources, combine="ties")
    delta = merged(folder, sources, "delta", combine="ties", emit="delta")
    assert verify(str(delta)) == []
    prune(
        Recipe.of(base=str(folder / "base"), finetuned=str(delta), out=str(folder / "applied"), rules=["*=finetuned"])
    )
    for name, tensor in load(whole).items():
        assert np.array_equal(load(folder / "applied")[name].float().numpy(), tensor.float().numpy())


def test_from_python_with_its_card_and_its_page(folder, monkeypatch):
    sources = write(folder)
    sources[1] |= {"density": 0.4}
    result = fapm.merge(
        [sources[0]["finetuned"], sources[1]], base=str(folder / "base"), out=str(folder / "out"), combine="ties"
    )
    assert "ties of 2 fine-tuned checkpoints" in repr(result)
    card = (folder / "out/README.md").read_text()
    assert "# f1 and f2, merged" in card
    changed, numel = (result.manifest["totals"][key] for key in ("kept", "pruned_numel"))
    assert f"put together by `ties`: {changed:,} of {numel:,} elements are other than in base" in card
    (command,) = [line for line in card.splitlines() if line.startswith("fapm merge")]
    wanted = weights_of(folder / "out")
    done = CliRunner().invoke(cli, shlex.split(command.replace("OUT", str(folder / "again")))[1:])
    assert done.exit_code == 1  # the card has no path of this machine
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(cli, shlex.split(command.replace("OUT", "again"))[1:])
    assert done.exit_code == 0, done.output
    assert weights_of(folder / "again") == wanted
    made = page(str(folder / "out"))
    assert "Who has changed what" in made and "f1 and f2 merged over base" in made
    layers = fapm.report(str(folder / "out"))["layers"]
    assert [cell["layer"] for cell in layers] == ["model.layers.0", "model.layers.1", "outside layers"]
    assert sum(cell["changed"] for cell in layers) == changed
    assert [sum(cell["kept"][i] for cell in layers) for i in (0, 1)] == [
        of["kept"] for of in result.manifest["sources"]
    ]
    with pytest.raises(UserError, match="at least one fine-tuned checkpoint"):
        fapm.merge([], base="base", out="none")
