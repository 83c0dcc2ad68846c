"""Runs of the matrix methods, held to numpy's SVD in float64 (SEMANTICS.md, "Matrix methods")."""

from __future__ import annotations

import itertools
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.data.checkpoints import load, save

from fapm.checking.verify import verify
from fapm.choosing.candidates import candidates
from fapm.choosing.sweep import sweep
from fapm.cluster.cli import cli
from fapm.errors import UserError
from fapm.manifest.read import load_manifest, read_table
from fapm.planning.make import make_plan
from fapm.recipe import Recipe
from fapm.run import prune

METHODS = [("dg-hard", {}), ("dg-hard", {"strength": 0.5}), ("timber", {}), ("timber", {"tail": 0.3})]


def low_rank(shape: tuple[int, ...], seed: int, noise: float = 0.01) -> torch.Tensor:
    *stack, m, n = shape
    g = torch.Generator().manual_seed(seed)
    r = max(1, min(m, n) // 8)
    signal = torch.randn(*stack, m, r, generator=g) @ torch.randn(*stack, r, n, generator=g)
    return 0.05 * signal / math.sqrt(r) + noise * torch.randn(shape, generator=g)


SHAPES = {
    "model.embed_tokens.weight": (300, 48),
    "model.layers.0.mlp.down_proj.weight": (64, 200),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 96, 40),
    "model.layers.0.mlp.up_proj.weight": (200, 64),
    "model.layers.0.norm.weight": (64,),
    "model.layers.0.conv.weight": (64, 48, 3),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.small.weight": (8, 16),
}
MATRICES = [name for name in SHAPES if "norm" not in name and "conv" not in name and "small" not in name]


@pytest.fixture
def pair(tmp_path):
    def make(dtype=torch.bfloat16, shapes=SHAPES):
        g = torch.Generator().manual_seed(0)
        base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
        tuned = {}
        for i, (name, p) in enumerate(base.items()):
            change = low_rank(p.shape, i + 1) if p.ndim > 1 else 0.01 * torch.randn(p.shape, generator=g)
            tuned[name] = (p.float() + change).to(dtype)
        paths = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
        return {"base": str(paths[0]), "finetuned": str(paths[1]), "out": str(tmp_path / "out")}, base, tuned

    return make


def expected(method: str, p: np.ndarray, f: np.ndarray, choices: dict) -> tuple[np.ndarray, int]:
    """The definition in float64 from numpy's SVD, before rounding; and the rank that is kept."""
    delta = (f - p).astype(np.float64)
    u, sigma, v = np.linalg.svd(delta, full_matrices=False)
    if method == "dg-hard":
        beta = min(delta.shape) / max(delta.shape)
        omega = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
        tau = choices.get("strength", 1) * omega * np.median(sigma) / math.sqrt(median_by_quadrature(beta))
        gains = (sigma > tau).astype(float)
    else:
        q = sigma / sigma.sum()
        rank = math.ceil(math.exp(-sum(x * math.log(x) for x in q if x > 0)))
        gains = np.where(np.arange(sigma.size) < rank, 1, choices.get("tail", 0))
    return p + (u * (sigma * gains)) @ v, int(np.count_nonzero(gains))


@lru_cache
def median_by_quadrature(beta: float) -> float:
    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    t = (np.arange(1_000_000) + 0.5) / 1_000_000 * math.pi / 2  # x = a + (b − a)·sin² t: no singularity is left
    x = a + (b - a) * np.sin(t) ** 2
    mass = np.cumsum((b - a) ** 2 * 2 * (np.sin(t) * np.cos(t)) ** 2 / (2 * math.pi * beta * x) * (t[1] - t[0]))
    return float(x[np.searchsorted(mass, 0.5)])


def check(out: dict, base: dict, tuned: dict, method: str, choices: dict, ranks: dict) -> None:
    for name, p in base.items():
        if name not in MATRICES:
            assert torch.equal(out[name], tuned[name]), name
            continue
        stacked = zip(*(t.float().reshape(-1, *t.shape[-2:]).numpy() for t in (p, tuned[name], out[name])), strict=True)
        rank = 0
        for one, two, three in stacked:
            wanted, kept = expected(method, one, two, choices)
            rank += kept
            off = 1e-5 * np.abs(two - one).max()
            low, high = (torch.from_numpy(wanted + by).to(p.dtype).float().numpy() for by in (-off, off))
            assert (low <= three).all(), name
            assert (three <= high).all(), name
        assert ranks[name] == rank, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("method", "choices"), METHODS)
def test_the_output_is_that_of_a_float64_svd(pair, method, choices, dtype):
    paths, base, tuned = pair(dtype)
    prune(Recipe(**paths, method=method, **choices))
    rows = {row["name"]: row for row in read_table(paths["out"])}
    check(load_path(paths["out"]), base, tuned, method, choices, {name: row["rank"] for name, row in rows.items()})
    assert verify(paths["out"]) == []
    totals = load_manifest(paths["out"])["totals"]
    assert totals["full_rank"] == 48 + 64 + 3 * 40 + 64 + 64
    assert totals["rank"] == sum(row["rank"] or 0 for row in rows.values())
    deltas = {n: (tuned[n].double() - base[n].double()).norm() ** 2 for n in MATRICES}
    kept = {n: (load_path(paths["out"])[n].double() - base[n].double()).norm() ** 2 for n in MATRICES}
    share = float(sum(kept.values()) / sum(deltas.values()))
    assert totals["kept_share"] == pytest.approx(share, rel=0.02)


def load_path(path: str) -> dict[str, torch.Tensor]:
    return load(Path(path))


@pytest.mark.parametrize("method", ["dg-hard", "timber"])
def test_the_bytes_are_the_same_however_the_work_is_cut(pair, tmp_path, method):
    paths, *_ = pair(torch.float32, {f"layers.{i}.w": shape for i, shape in enumerate([(900, 400), (400, 2100)])})
    ways = [
        {"workers": 1}, {"workers": 3}, {"memory": "128MiB"}, {"memory": "112MiB", "workers": 2}, {"emit": "delta"}
    ]  # fmt: skip
    outs = []
    for i, way in enumerate(ways):
        out = str(tmp_path / f"out{i}")
        prune(Recipe(**paths | {"out": out}, method=method, shard_size="2MiB", **way))
        outs.append(out)
        assert verify(out) == []
    whole = [load_path(out) for out in outs[:-1]]
    for other in whole[1:]:
        assert all(torch.equal(whole[0][name], other[name]) for name in whole[0])


def test_it_goes_on_after_a_stop_and_not_with_another_library(pair, monkeypatch):
    paths, *_ = pair()
    recipe = Recipe(**paths, method="dg-hard", shard_size="16KiB", workers=1)
    done = []

    def stop(nbytes: int) -> None:
        done.append(nbytes)
        if len(done) > 3:
            raise KeyboardInterrupt

    from fapm.schedule import Watch

    with pytest.raises(KeyboardInterrupt):
        prune(recipe, watch=Watch(advance=stop))
    with monkeypatch.context() as patched:
        patched.setattr("fapm.shard.projection.library", lambda: "numpy 9.9 openblas Imaginary")
        with pytest.raises(UserError, match=r"numpy 9\.9 openblas Imaginary: their bits differ"):
            prune(recipe)
    result = prune(recipe)
    assert result.resumed
    assert verify(paths["out"]) == []
    assert len({shard.get("library") for shard in result.manifest["shards"]} - {None}) == 1


def test_a_sweep_over_kinds_makes_what_each_prune_makes(pair, tmp_path):
    paths, *_ = pair()
    folder = str(tmp_path / "sweep")
    choices = paths | {"method": "fapm,dg-hard,timber", "density": "0.1,0.2", "strength": "0.5,1", "emit": "both"}
    found = candidates(choices, folder)
    assert [one.name for one in found] == ["fapm-0.1", "fapm-0.2", "dg-hard-0.5", "dg-hard-1", "timber-0"]
    for one in sweep(found):
        alone = one.candidate.recipe.model_copy(update={"out": str(tmp_path / one.candidate.name)})
        prune(alone)
        ours, theirs = (load_path(path) for path in (one.plan.recipe.out, alone.out))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert verify(one.candidate.recipe.out) == []


def test_verify_finds_an_element_that_is_not_what_is_kept(pair):
    paths, *_ = pair()
    prune(Recipe(**paths, method="dg-hard"))
    file = Path(paths["out"]) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x04  # of the small tensor, which passes through
    data[-2 * 8 * 16 - 1] ^= 0x04  # of q_proj's last element
    file.write_bytes(data)
    problems = "\n".join(verify(paths["out"]))
    assert "q_proj.weight': 1 element(s), the first at flat index 4095, are not what dg-hard keeps" in problems
    assert "small.weight': 1 element(s)" in problems


def test_a_matrix_that_does_not_fit_is_refused_before_anything_is_read(pair):
    paths, *_ = pair(torch.bfloat16, {"w": (1500, 1500)})
    with pytest.raises(UserError, match=r"dg-hard: w \[1500, 1500\] takes .* give --memory 192MiB"):
        make_plan(Recipe(**paths, method="dg-hard", memory="64MiB"))
    prune(Recipe(**paths, method="dg-hard", memory="192MiB"))
    assert verify(paths["out"]) == []


def test_what_has_no_meaning_for_a_method_is_said(pair):
    paths, *_ = pair()
    plan = make_plan(Recipe(**paths, method="timber", strength=2, density=0.3, scope="layer"))
    said = "\n".join(plan.warnings)
    assert "--strength has no meaning for timber, whose parameter is --tail" in said
    assert "--density has no meaning for timber, whose parameter is --tail" in said
    assert "--scope layer has no meaning for timber" in said
    stored = Recipe.of(**make_plan(Recipe(**paths)).recipe.model_dump())  # in which every choice is made
    assert not any("has no meaning" in line for line in make_plan(stored).warnings)
    assert "3 tensor(s) are no matrices of 1,024 elements, and timber takes them from finetuned" in said
    with pytest.raises(UserError, match=r"--rule \*q_proj\*=0.5: dg-hard has no density"):
        make_plan(Recipe(**paths, method="dg-hard", rules=["*q_proj*=0.5"]))


def test_rules_decide_for_matrices_too(pair):
    paths, base, tuned = pair()
    prune(Recipe(**paths, method="dg-hard", rules=["*q_proj*=base", "*norm*=base", "*up_proj.weight=finetuned"]))
    out = load_path(paths["out"])
    for name, side in (("self_attn.q_proj", base), ("norm", base), ("mlp.up_proj", tuned)):
        assert torch.equal(out[f"model.layers.0.{name}.weight"], side[f"model.layers.0.{name}.weight"])
    assert verify(paths["out"]) == []


def test_weights_that_are_not_finite_are_named(pair, tmp_path):
    paths, _, tuned = pair()
    name = "model.layers.0.mlp.up_proj.weight"
    tuned[name][3, 4] = math.nan
    save(tmp_path / "tuned", tuned)
    with pytest.raises(UserError, match=r"finetuned 'model.layers.0.mlp.up_proj.weight' has 1 NaN and 0 Inf"):
        prune(Recipe(**paths, method="dg-hard"))
    prune(Recipe(**paths, method="dg-hard", nonfinite="base"), overwrite=True)
    assert verify(paths["out"]) == []


def test_grown_vocabularies_keep_their_new_rows(pair, tmp_path):
    paths, _, tuned = pair()
    name = "model.embed_tokens.weight"
    tuned[name] = torch.cat([tuned[name], torch.ones(5, 48, dtype=torch.bfloat16)])
    save(tmp_path / "tuned", tuned, config={"model_type": "test", "vocab_size": 305})
    prune(Recipe(**paths, method="dg-hard"))
    assert torch.equal(load_path(paths["out"])[name][300:], tuned[name][300:])
    assert verify(paths["out"]) == []


def test_the_command_line_says_the_rank_and_how(pair):
    paths, *_ = pair()
    words = list(itertools.chain.from_iterable((f"--{name}", value) for name, value in paths.items()))
    done = CliRunner().invoke(cli, ["prune", *words, "--method", "dg-hard", "--strength", "0.5", "--ray", "off"])
    assert done.exit_code == 0, done.output
    assert "dg-hard, strength 0.5" in done.output
    assert " of 360 singular values" in done.output
    for command in ("report", "verify"):
        done = CliRunner().invoke(cli, [command, paths["out"]])
        assert done.exit_code == 0, done.output
    words[-1] += "2"
    done = CliRunner().invoke(cli, ["plan", *words, "--method", "timber"])
    assert re.search(r"matrices +7, some [\d.e-]+ s here with \d workers?\n", done.output), done.output
