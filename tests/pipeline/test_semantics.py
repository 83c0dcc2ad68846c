"""pytest tests/pipeline/test_semantics.py: whole prunes against the contract computed by a stable sort (oracle.py)."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from checkpoints import (
    DTYPES,
    MODEL_SHAPES,
    Tensors,
    bytes_of,
    coarse,
    gaussian,
    load,
    raw_tensors,
    same_bits,
    save,
    weights_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fapm import UserError, prune
from fapm.checking.verify import verify
from fapm.manifest.read import load_manifest, read_table
from fapm.shard import sample

METHODS = ["fapm", "magnitude", "relative", "random", "dare", "wise-ft"]
SCOPES = ["tensor", "layer", "global"]
SMALL = "2kB"  # shards so small that every group but a tensor's spans several


def check(runner, base: Tensors, finetuned: Tensors, **choices) -> Path:
    """Prune, and compare every tensor with the oracle's, bit for bit."""
    out, _ = runner.prune(**choices)
    means = {key: choices.pop(key, None) for key in ("shard_size", "workers", "memory", "nonfinite")}
    dtype = choices.pop("dtype", None)
    expected = oracle.prune(base, finetuned, dtype=getattr(torch, dtype) if dtype else None, **choices)
    found = load(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), (name, choices, means)
    return out


@pytest.fixture(scope="module", params=["gaussian", "coarse", "mostly unchanged"])
def pair(request) -> tuple[Tensors, Tensors]:
    if request.param == "coarse":
        return coarse(MODEL_SHAPES)
    base, finetuned = gaussian(MODEL_SHAPES)
    if request.param == "mostly unchanged":
        for i, name in enumerate(base):
            same = torch.rand(base[name].shape, generator=torch.Generator().manual_seed(i)) < 0.8
            finetuned[name] = torch.where(same, base[name], finetuned[name])
    return base, finetuned


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_scope_at_every_density(runner, pair, method, scope):
    runner.write(*pair)
    for density in (0, 0.001, 0.1, 0.5, 0.97, 1):
        check(runner, *pair, method=method, scope=scope, density=density, shard_size=SMALL)
    check(runner, *pair, method=method, scope=scope, seed=7)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(runner, dtype, scope):
    for make in (gaussian, coarse):
        base, finetuned = make(MODEL_SHAPES, dtype)
        runner.write(base, finetuned)
        for method in ("fapm", "relative"):
            check(runner, base, finetuned, method=method, scope=scope, density=0.3, shard_size=SMALL)


@pytest.mark.parametrize(
    ("p_dtype", "f_dtype"), [*itertools.permutations(["F32", "F16", "BF16"], 2), ("F8_E4M3", "BF16")]
)
def test_base_and_finetuned_of_different_dtypes(runner, p_dtype, f_dtype):
    base, _ = gaussian(MODEL_SHAPES, DTYPES[p_dtype])
    _, finetuned = gaussian(MODEL_SHAPES, DTYPES[f_dtype])
    runner.write(base, finetuned)
    for scope in SCOPES:
        check(runner, base, finetuned, scope=scope, density=0.3, shard_size=SMALL)
    check(runner, base, finetuned, density=0)
    check(runner, base, finetuned, density=1)


@pytest.mark.parametrize(("p_dtype", "f_dtype"), [("F64", "F32"), ("F32", "F64")])
def test_a_pair_with_doubles_on_one_side_is_scored_in_doubles(runner, p_dtype, f_dtype):
    base, finetuned = gaussian({"w": (40, 50)}, torch.float64, delta=1e-6)
    base["w"], finetuned["w"] = base["w"].to(DTYPES[p_dtype]), finetuned["w"].to(DTYPES[f_dtype])
    runner.write(base, finetuned)
    check(runner, base, finetuned)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "F8_E5M2"])
def test_the_dtype_that_is_asked_for(runner, stored, dtype):
    base, finetuned = gaussian(MODEL_SHAPES, DTYPES[stored])
    finetuned["only finetuned"] = torch.randn(5).to(DTYPES[stored])
    finetuned["model.count"] = torch.arange(5)
    base["model.count"] = torch.arange(5)
    runner.write(base, finetuned)
    for method in ("fapm", "dare"):
        check(
            runner,
            base,
            finetuned,
            dtype=dtype,
            method=method,
            density=0.3,
            rules=("*norm*=base", "*up.bias=finetuned"),
        )


@pytest.mark.parametrize("method", ["fapm", "magnitude", "relative"])
def test_ties_go_to_the_lower_position_over_tensors_and_shards(runner, method):
    shapes = {f"model.layers.{i}.{part}": (97,) for i in range(3) for part in ("a", "b", "c")}
    base, finetuned = ({n: torch.full(s, v) for n, s in shapes.items()} for v in (1.0, 1.5))
    runner.write(base, finetuned)
    for scope, total in (("tensor", 97), ("layer", 3 * 97), ("global", 9 * 97)):
        out = load(check(runner, base, finetuned, method=method, scope=scope, density=0.4, shard_size="1KiB"))
        kept = torch.cat([out[name] == 1.5 for name in sorted(out)]).reshape(-1, total)
        k = int(total * 0.4)
        assert kept[:, :k].all()
        assert not kept[:, k:].any()


def test_exactly_k_are_kept_and_the_table_says_so(runner, pair):
    base, finetuned = pair
    runner.write(base, finetuned)
    for scope in SCOPES:
        out, result = runner.prune(scope=scope, density=0.3, shard_size=SMALL)
        rows = {row["name"]: row for row in read_table(str(out))}
        assert rows.keys() == base.keys()
        groups: dict[str, list] = {}
        for name, row in rows.items():
            groups.setdefault(oracle.group_of(name, scope), []).append(row)
            p, f = oracle.real(base[name]), oracle.real(finetuned[name])
            assert row["changed"] == int((p != f).sum())
            assert math.isclose(row["mean_abs_base"], np.abs(p.astype(np.float64)).mean(), rel_tol=1e-12)
            assert math.isclose(row["norm_delta"], np.linalg.norm((f - p).astype(np.float64)), rel_tol=1e-9)
        for members in groups.values():
            k = int(sum(row["numel"] for row in members) * 0.3)
            assert sum(row["kept"] for row in members) == k
            assert {row["k"] for row in members} == {k}
        assert result.manifest["totals"]["kept"] == sum(row["kept"] for row in rows.values())


def test_it_is_the_authors_algorithm_where_no_score_is_shared(runner):
    base, finetuned = gaussian({"a": (50, 60), "b": (777,)}, delta=0.3)
    base = {name: p + 3 * p.sign() for name, p in base.items()}  # no small |p|, so the mean's last bit decides nothing
    runner.write(base, finetuned)
    out = runner.pruned()
    for name in base:
        scores = oracle.scores("fapm", oracle.real(base[name]), oracle.real(finetuned[name]))
        k = int(scores.size * 0.1)
        ordered = np.sort(scores)[::-1]
        assert ordered[k - 1] - ordered[k] > 1e-5
        assert torch.equal(out[name], oracle.authors(base[name], finetuned[name], 0.1))


def test_density_one_gives_finetuned_and_zero_gives_base(runner, pair):
    base, finetuned = pair
    runner.write(base, finetuned)
    for method in METHODS:
        for density, side in ((0, base), (1, finetuned)):
            out = runner.pruned(method=method, density=density)
            assert all(same_bits(out[name], side[name]) for name in side)


def test_kept_and_dropped_elements_are_bit_for_bit_those_of_the_inputs(runner):
    """−0 and denormals survive; adding a rounded Δ back would lose them."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for _ in range(2):
        codes = torch.randint(-(2**15), 2**15, (5000,), generator=generator, dtype=torch.int16)
        sides.append(torch.where((codes & 0x7F80) == 0x7F80, codes & ~0x4000, codes).view(torch.bfloat16))
    base, finetuned = ({"w": side} for side in sides)
    runner.write(base, finetuned)
    for method in ("fapm", "magnitude", "relative"):
        out = load(check(runner, base, finetuned, method=method))["w"].view(torch.int16)
        p, f = base["w"].view(torch.int16), finetuned["w"].view(torch.int16)
        assert ((out == p) | (out == f)).all()


# Groups large enough that a sample suggests the first bracket.


def structured(numel: int, share: float) -> np.ndarray:
    """Whether an element is one of those that a sample of evenly spread runs looks at."""
    starts, length = sample._runs(numel, share)
    seen = np.zeros(numel, bool)
    seen[(starts[:, None] + np.arange(length)).reshape(-1)] = True
    return seen


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("unseen", [1.0, 1.5, 40.0], ids=["unchanged", "alike", "much changed"])
def test_a_sample_that_misleads_costs_time_only(runner, unseen, scope, density):
    """What the sample sees is changed and shared out evenly; what it does not see is another world."""
    numel = 4 * sample.LOCAL
    seen = structured(numel, sample.LOCAL / numel)
    p = np.random.default_rng(0).normal(1, 0.1, numel).astype(np.float32)
    f = np.where(seen, p * np.random.default_rng(1).uniform(1, 2, numel).astype(np.float32), p * np.float32(unseen))
    base, finetuned = {"a": torch.from_numpy(p), "b": torch.ones(100)}, {"a": torch.from_numpy(f), "b": torch.ones(100)}
    runner.write(base, finetuned)
    check(runner, base, finetuned, scope=scope, density=density, shard_size="64kB" if scope == "global" else "1GB")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("density", [0.2, 0.55, 0.9])
def test_where_a_sample_sees_only_unchanged_weights(runner, density):
    """Then the first bracket is the score 0 alone, and the threshold may lie right above it or below it."""
    numel = 4 * sample.LOCAL
    seen = structured(numel, sample.LOCAL / numel)
    p = np.random.default_rng(0).normal(0, 1, numel).astype(np.float32)
    f = np.where(seen, p, p + np.random.default_rng(1).normal(0, 0.1, numel).astype(np.float32))
    base, finetuned = {"w": torch.from_numpy(p)}, {"w": torch.from_numpy(f)}
    runner.write(base, finetuned)
    check(runner, base, finetuned, density=density)


# Odd shapes, other dtypes, tensors on one side.


ODD = {"scalar": (), "one": (1,), "empty": (0,), "empty.matrix": (0, 7), "row": (1, 5), "odd": (3, 5, 7)}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 1])
def test_scalars_and_empty_tensors(runner, scope, density):
    shapes = ODD | {f"model.layers.0.{name}": shape for name, shape in ODD.items()}
    base, finetuned = gaussian(shapes)
    runner.write(base, finetuned)
    for method in METHODS:
        check(runner, base, finetuned, scope=scope, density=density, method=method, shard_size="1KiB")


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_but_empty_tensors(runner, scope):
    base, finetuned = gaussian({"model.layers.0.a": (0,), "model.layers.0.b": (0, 3)})
    runner.write(base, finetuned)
    check(runner, base, finetuned, scope=scope)


def test_an_empty_tensor_alone_in_a_shard_of_its_group(runner):
    shapes = {
        f"model.layers.0.{n}": s for n, s in {"a": (300,), "b": (300,), "c": (0,), "d": (600,), "e": (0, 2)}.items()
    }
    for make in (gaussian, coarse):
        base, finetuned = make(shapes)
        runner.write(base, finetuned)
        for scope in SCOPES:
            check(runner, base, finetuned, scope=scope, shard_size="1200")


def test_integers_and_bools_pass_through_from_finetuned(runner):
    base, finetuned = gaussian(MODEL_SHAPES)
    kinds = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32]
    for i, kind in enumerate(kinds):
        base[f"z.{kind}"], finetuned[f"z.{kind}"] = torch.ones(5 + i).to(kind), torch.zeros(5 + i).to(kind)
    runner.write(base, finetuned)
    for scope in SCOPES:
        check(runner, base, finetuned, scope=scope, shard_size=SMALL)
    _, result = runner.prune(dtype="bfloat16")
    assert any(f"{len(kinds)} tensor(s) are not floating point" in line for line in result.plan.warnings)


def test_a_tensor_that_is_an_integer_on_one_side_only_passes_through(runner):
    base, finetuned = {"w": torch.ones(8), "v": torch.arange(8)}, {"w": torch.arange(8), "v": torch.ones(8)}
    runner.write(base, finetuned)
    out = runner.pruned()
    assert same_bits(out["w"], finetuned["w"])
    assert same_bits(out["v"], finetuned["v"])


def test_tensors_on_one_side_are_taken_or_left_out_and_listed(runner):
    base, finetuned = gaussian(MODEL_SHAPES)
    base["gone.weight"] = torch.ones(3)
    finetuned["new.weight"] = torch.ones(7)
    runner.write(base, finetuned)
    out, result = runner.prune()
    found = load(out)
    assert "gone.weight" not in found
    assert same_bits(found["new.weight"], finetuned["new.weight"])
    assert result.plan.left_out == ("gone.weight",)
    assert result.plan.added == ("new.weight",)
    assert load_manifest(str(out))["left_out"] == ["gone.weight"]
    text = " ".join(result.plan.warnings)
    assert "gone.weight" in text
    assert "new.weight" in text


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_rows_added_to_a_vocabulary_are_finetuned_s(runner, name, scope):
    base, finetuned = gaussian(MODEL_SHAPES)
    new = torch.full((3, 16), 9.0)
    runner.write(base, {**finetuned, name: torch.cat([finetuned[name], new])})
    expected = oracle.prune(base, finetuned, scope=scope)
    found = runner.pruned(scope=scope, shard_size=SMALL)
    assert same_bits(found[name], torch.cat([expected[name], new]))
    assert all(same_bits(found[n], expected[n]) for n in expected if n != name)


def test_rows_added_to_an_empty_base(runner):
    base, finetuned = gaussian({"lm_head.weight": (4, 8), "w": (50,)})
    runner.write({**base, "lm_head.weight": torch.zeros(0, 8)}, finetuned)
    for scope in SCOPES:
        found = runner.pruned(scope=scope, density=0.5)
        assert same_bits(found["lm_head.weight"], finetuned["lm_head.weight"])
        assert same_bits(found["w"], oracle.prune(base, finetuned, scope="tensor", density=0.5)["w"])


def test_other_shapes_stop_the_run_and_a_rule_decides(runner):
    base, finetuned = gaussian(MODEL_SHAPES)
    name = "model.layers.0.mlp.up.weight"
    base[name] = torch.ones(16, 33)
    runner.write(base, finetuned)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up\.weight \(base \[16, 33\], finetuned \[33, 16\]\)"):
        runner.prune()
    found = runner.pruned(rules=[f"{name}=finetuned"])
    assert same_bits(found[name], finetuned[name])
    found = runner.pruned(rules=[f"{name}=base"])
    assert same_bits(found[name], base[name])


@pytest.mark.parametrize("scope", SCOPES)
def test_rules_take_tensors_out_of_the_groups(runner, pair, scope):
    runner.write(*pair)
    for rules in (("*norm*=base", "*.bias=finetuned"), ("*.1.*=prune", "model.layers.*=base"), ("*=finetuned",)):
        check(runner, *pair, scope=scope, rules=rules, density=0.3, shard_size=SMALL)


DENSITY_RULES = [
    ("*mlp*=0.05", "lm_head.weight=0"),
    ("*.weight=0.7", "*=1"),
    ("model.layers.1.*=base", "model.layers.10.*=1e-1", "*bias=0.333", "*norm*=prune"),
]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rules", DENSITY_RULES)
def test_a_density_by_rule_adds_to_its_groups_budget(runner, pair, scope, method, rules):
    runner.write(*pair)
    out = check(runner, *pair, scope=scope, method=method, rules=rules, density=0.3, shard_size=SMALL)
    assert verify(str(out)) == []


def test_the_table_has_the_density_of_each_tensor(runner, pair):
    runner.write(*pair)
    out, _ = runner.prune(rules=("*mlp*=0.05", "*norm*=base"), density=0.3)
    for row in read_table(str(out)):
        expected = 0.05 if "mlp" in row["name"] else None if "norm" in row["name"] else 0.3
        assert row["density"] == expected
        assert row["kept"] == (None if expected is None else int(row["numel"] * expected))


# Weights that are not finite.


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0, 0.1, 1])
def test_nan_and_inf_stop_the_run_with_names_and_counts(runner, scope, method, density):
    base, finetuned = gaussian(MODEL_SHAPES)
    broken = finetuned["model.layers.1.mlp.up.weight"] = finetuned["model.layers.1.mlp.up.weight"].clone()
    broken[0, :3], broken[5, 5], broken[6, 6] = math.nan, math.inf, -math.inf
    runner.write(base, finetuned)
    with pytest.raises(UserError, match=r"finetuned '?model\.layers\.1\.mlp\.up\.weight'? has 3 NaN and 2 Inf"):
        runner.prune("out", scope=scope, method=method, density=density, shard_size=SMALL)
    assert not (runner.folder / "out" / "config.json").exists()
    assert not (runner.folder / "out" / "fapm" / "manifest.json").exists()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64", "F8_E4M3"])
def test_nan_in_base_stops_the_run_even_where_finetuned_has_one_too(runner, scope, dtype):
    base, finetuned = gaussian(MODEL_SHAPES, DTYPES[dtype])
    for side in (base, finetuned):
        side["model.norm.weight"][2] = math.nan
    runner.write(base, finetuned)
    with pytest.raises(UserError, match=r"base '?model\.norm\.weight'? has 1 NaN and 0 Inf"):
        runner.prune(scope=scope, shard_size=SMALL)
    with pytest.raises(UserError, match=r"base '?model\.norm\.weight'? has 1 NaN and 0 Inf"):
        runner.prune(scope=scope, shard_size=SMALL, nonfinite="base")


@pytest.mark.parametrize("scope", SCOPES)
def test_nonfinite_base_takes_base_s_value(runner, scope):
    base, finetuned = gaussian(MODEL_SHAPES, torch.bfloat16)
    repaired = {name: f.clone() for name, f in finetuned.items()}
    for i, name in enumerate(finetuned):
        flat, whole = finetuned[name].view(-1), repaired[name].view(-1)
        flat[i], flat[i + 2] = math.nan, -math.inf
        whole[[i, i + 2]] = base[name].view(-1)[[i, i + 2]]
    runner.write(base, finetuned)
    for method in ("fapm", "magnitude"):
        expected = oracle.prune(base, repaired, scope=scope, method=method, density=0.5)
        found = runner.pruned(scope=scope, method=method, density=0.5, nonfinite="base", shard_size=SMALL)
        assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["fapm", "magnitude", "relative"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_huge_weights_whose_difference_overflows(runner, method, dtype):
    """Finite weights are no error, though their difference, its square or their mean is beyond the type."""
    big = torch.finfo(DTYPES[dtype]).max
    base = {"w": torch.tensor([big, -big, big, 1.0, 2.0, 3.0, 0.0, 1.0] * 40, dtype=torch.float64).to(DTYPES[dtype])}
    finetuned = {
        "w": torch.tensor([-big, big, big / 2, 1.5, 2.0, -3.0, 4.0, big] * 40, dtype=torch.float64).to(DTYPES[dtype])
    }
    runner.write(base, finetuned)
    check(runner, base, finetuned, method=method, density=0.4)


def test_the_manifest_is_json_whatever_the_weights(runner):
    runner.write({"w": torch.full((50,), -3e38)}, {"w": torch.full((50,), 3e38)})
    out, _ = runner.prune()
    text = (out / "fapm" / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_huge_doubles_over_many_blocks(runner):
    """Sums of finite block sums may overflow a float64; the run goes on with m = inf."""
    numel = 3 << 16
    base = {"w": torch.full((numel,), 1e303, dtype=torch.float64)}
    finetuned = {"w": base["w"] * torch.linspace(0.5, 2, numel, dtype=torch.float64)}
    base["w"][:] = torch.finfo(torch.float64).max / 70_000
    runner.write(base, finetuned)
    check(runner, base, finetuned, method="magnitude")


def test_dare_that_overflows_is_refused_and_never_written(runner):
    base, finetuned = {"w": torch.zeros(50)}, {"w": torch.full((50,), 2e38)}
    runner.write(base, finetuned)
    with pytest.raises(UserError, match="too large for float32"):
        runner.prune(method="dare", density=0.5)


def test_dare_does_not_stop_for_an_element_that_it_drops(runner):
    base, finetuned = {"w": torch.zeros(50, dtype=torch.float16)}, {"w": torch.ones(50, dtype=torch.float16)}
    dropped = int(oracle.uniform(0, "w", 50).argmin())
    finetuned["w"][dropped] = 60000
    runner.write(base, finetuned)
    check(runner, base, finetuned, method="dare", density=0.1)


def test_a_value_too_large_for_the_dtype_asked_for_is_refused(runner):
    base, finetuned = gaussian({"w": (100,)})
    finetuned["w"][3] = 1e6
    runner.write(base, finetuned)
    with pytest.raises(UserError, match=r"'w': 1 values are too large for float16"):
        runner.prune(dtype="float16", method="magnitude")


# Files.


@pytest.mark.parametrize("shards", [(1, 3), (3, 1), (4, 3)])
def test_inputs_that_are_sharded_differently(runner, pair, shards):
    runner.write(*pair, shards=shards)
    for scope in SCOPES:
        check(runner, *pair, scope=scope, shard_size=SMALL)


def test_tensors_that_are_not_aligned_in_their_file(runner):
    """A file may begin with an odd number of bytes of bools; what follows lies at odd addresses."""
    shapes = {"a.weight": (30, 7), "b.weight": (50,), "c.weight": (1,)}
    for dtype in ("F32", "F64", "BF16", "F16"):
        base, finetuned = gaussian(shapes, DTYPES[dtype])
        for side, tensors, odd in (("base", base, 3), ("finetuned", finetuned, 1)):
            tensors["0.flags"] = torch.ones(odd, dtype=torch.bool)
            order = ["0.flags", *reversed(shapes)]
            stored = []
            for name in order:
                kind = "BOOL" if name == "0.flags" else dtype
                stored.append((name, kind, list(tensors[name].shape), bytes_of(tensors[name])))
            raw_tensors(runner.folder / side / "model.safetensors", stored)
        for scope in SCOPES:
            check(runner, base, finetuned, scope=scope, density=0.3)


def test_the_output_s_files(runner, pair):
    runner.write(*pair)
    (runner.folder / "finetuned" / "tokenizer.json").write_text("{}")
    (runner.folder / "finetuned" / "pytorch_model.bin").write_bytes(b"weights in another format")
    (runner.folder / "finetuned" / "optimizer.pt").write_bytes(b"a state")
    out, result = runner.prune(shard_size=SMALL)
    files = {f.name for f in out.iterdir() if f.is_file()}
    shards = sorted(f for f in files if f.endswith(".safetensors"))
    count = len(shards)
    assert count > 5
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    beside = {"model.safetensors.index.json", "config.json", "tokenizer.json", "README.md"}
    assert files - set(shards) == beside
    assert {f.name for f in (out / "fapm").iterdir()} == {
        "log.jsonl", "manifest.json", "recipe.yaml", "run.json", "tensors.parquet"
    }  # fmt: skip
    assert len(result.manifest["shards"]) == count
    (single, _) = runner.prune()
    assert not (single / "model.safetensors.index.json").exists()
    assert (single / "model.safetensors").exists()


def test_the_config_says_the_dtype_that_was_asked_for(runner):
    base, finetuned = gaussian({"w": (10,)})
    for config, expected in (
        ({"torch_dtype": "float32", "x": 1}, {"torch_dtype": "bfloat16", "x": 1}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ([], []),
        (None, None),
        (5, 5),
    ):
        save(runner.folder / "base", base)
        save(runner.folder / "finetuned", finetuned)
        (runner.folder / "finetuned" / "config.json").write_text(json.dumps(config))
        out, _ = runner.prune(dtype="bfloat16")
        assert json.loads((out / "config.json").read_text()) == expected


def test_side_files_never_stop_a_run_at_its_end(runner):
    runner.write(*gaussian({"w": (10,)}))
    for name in ("back\\slash.json", "new\nline.txt", "ü" * 100 + ".json", "x" * 250 + ".txt"):
        (runner.folder / "finetuned" / name).write_text("{}")
    out, _ = runner.prune()
    assert (out / ("ü" * 100 + ".json")).exists()


# The same bytes by any means.


@pytest.mark.parametrize("method", ["fapm", "random"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_bytes_from_any_number_of_workers_and_any_budget(runner, pair, scope, method):
    runner.write(*pair, shards=(2, 3))
    first, _ = runner.prune(scope=scope, method=method, shard_size=SMALL)
    expected = weights_of(first)
    for workers in (1, 2, 3):
        for memory in ("64MiB", "1GiB"):
            again, _ = runner.prune(scope=scope, method=method, shard_size=SMALL, workers=workers, memory=memory)
            assert weights_of(again) == expected


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_bytes_where_tensors_are_streamed(runner, scope):
    """Under the smallest budget these sections do not fit, so that every pass reads them again."""
    shapes = {f"model.layers.{i}.{n}": (3000, 2500 + i) for i in range(2) for n in "ab"} | {
        "lm_head.weight": (2000, 999)
    }
    base, finetuned = gaussian(shapes, torch.bfloat16, delta=0.01)
    runner.write(base, finetuned)
    out = check(runner, base, finetuned, scope=scope, memory="64MiB", shard_size="25MB")
    for workers, memory in ((2, "64MiB"), (1, "2GiB"), (3, "2GiB")):
        again, _ = runner.prune(scope=scope, memory=memory, workers=workers, shard_size="25MB")
        assert weights_of(again) == weights_of(out)
    whole, _ = runner.prune(scope=scope, memory="2GiB")
    assert all(same_bits(t, load(out)[name]) for name, t in load(whole).items())


def test_the_size_of_the_shards_changes_no_tensor(runner, pair):
    runner.write(*pair)
    for scope in SCOPES:
        first = runner.pruned(scope=scope)
        for shard_size in ("1KiB", "3kB", "10kB"):
            again = runner.pruned(scope=scope, shard_size=shard_size)
            assert all(same_bits(again[name], first[name]) for name in first)


def test_many_tiny_tensors_in_one_piece(runner):
    """Their gaps of alignment must fit the buffer that they are read into."""
    shapes = {f"model.layers.{i % 7}.t{i}": (3,) for i in range(1200)}
    base, finetuned = gaussian(shapes, torch.bfloat16)
    runner.write(base, finetuned)
    for scope in SCOPES:
        check(runner, base, finetuned, scope=scope, density=0.4)


names = st.sampled_from(
    [f"{block}{leaf}" for block in ("", "h.0.", "h.1.", "h.10.") for leaf in ("w", "b", "x.y", "z")]
)
shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)
kind = st.sampled_from(list(DTYPES.values()))
element = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 2.0, 0.0625])


@st.composite
def pairs(draw) -> tuple[Tensors, Tensors]:
    shapes = draw(st.dictionaries(names, shape, min_size=1, max_size=8))
    sides: tuple[Tensors, Tensors] = ({}, {})
    for name, size in shapes.items():
        dtype = draw(kind)
        for side in sides:
            numbers = draw(st.lists(element, min_size=math.prod(size), max_size=math.prod(size)))
            side[name] = torch.tensor(numbers).reshape(size).to(dtype)
    return sides


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pairs(),
    st.sampled_from(METHODS[:4]),
    st.sampled_from(SCOPES),
    st.floats(0, 1),
    st.integers(1, 2),
    st.integers(0, 5),
)
def test_any_small_checkpoint(new_runner, sides, method, scope, density, workers, seed):
    runner = new_runner()
    runner.write(*sides)
    check(runner, *sides, method=method, scope=scope, density=density, workers=workers, seed=seed, shard_size="1KiB")


def test_the_same_folder_twice_gives_its_copy(runner):
    base, _ = gaussian(MODEL_SHAPES)
    save(runner.folder / "base", base)
    recipe = runner.recipe("out").model_copy(update={"finetuned": str(runner.folder / "base"), "allow_same": True})
    result = prune(recipe)
    assert all(same_bits(t, base[name]) for name, t in load(runner.folder / "out").items())
    assert any("same folder" in line for line in result.plan.warnings)
