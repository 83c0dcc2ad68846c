"""pytest tests/pipeline/test_recipe.py: what a user may choose, and one sentence for what they may not."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fapm import Recipe, UserError
from fapm.recipe import format_bytes, parse_bytes

SIDES = {"base": "b", "finetuned": "f", "out": "o"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096), (4096, 4096), ("512MB", 512 * 10**6), ("1.5GiB", 3 << 29), ("1g", 10**9), (" 2 kib ", 2048),
        ("1TB", 10**12), ("0.5MiB", 1 << 19), ("10b", 10),
    ],
)  # fmt: skip
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1e9", "-5", "1.5.5GB", "GB", "1PB", None, True, [], "nan", "inf", "١GB\n\n1"]
)
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + ".5 TiB"])
def test_a_size_beyond_all_numbers_is_one_sentence(text):
    with pytest.raises(UserError, match="--memory"):
        Recipe.of(**SIDES, memory=text)


def test_sizes_for_people():
    assert [format_bytes(n) for n in (0, 999, 1000, 1.5e9, 2.81e11)] == ["0 B", "999 B", "1 kB", "1.5 GB", "281 GB"]
    assert format_bytes(5e15) == "5000 TB"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"density": -0.1}, "--density"), ({"density": 1.1}, "--density"), ({"density": float("nan")}, "--density"),
        ({"density": "much"}, "--density"), ({"method": "best"}, "--method"), ({"scope": "shard"}, "--scope"),
        ({"seed": -1}, "--seed"), ({"seed": 2**63}, "--seed"), ({"workers": 0}, "--workers"),
        ({"memory": "1MB"}, "--memory"), ({"memory": "lots"}, "--memory"), ({"shard_size": 0}, "--shard-size"),
        ({"device": "tpu"}, "--device"), ({"device": "cuda:x"}, "--device"), ({"dtype": "int8"}, "--dtype"),
        ({"nonfinite": "zero"}, "--nonfinite"), ({"rules": ["*.bias"]}, "rule"), ({"rules": ["=base"]}, "rule"),
        ({"rules": ["*.bias=zero"]}, "rule"), ({"rules": "*.bias=base"}, "rule"), ({"rules": [5]}, "rule"),
        ({"rules": {"*.bias": "base"}}, "rule"), ({"rules": 5}, "rule"), ({"rules": True}, "rule"),
        ({"colour": "red"}, "no option 'colour'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(choices, message):
    with pytest.raises(UserError, match=message) as caught:
        Recipe.of(**{**SIDES, **choices})
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"--base is missing; --finetuned is missing"):
        Recipe.of(out="o")


def test_none_leaves_the_default():
    assert Recipe.of(**SIDES, density=None, dtype=None, workers=None) == Recipe.of(**SIDES)
    assert Recipe.of(**SIDES).density == 0.1
    assert Recipe.of(**SIDES).scope == "tensor"
    assert Recipe.of(**SIDES).method == "fapm"


def test_the_first_rule_that_matches_decides():
    recipe = Recipe.of(**SIDES, rules=["a.*=base", "*.b=finetuned", "*=prune"])
    assert recipe.action("a.b") == "base"
    assert recipe.action("c.b") == "finetuned"
    assert recipe.action("c.d") == "prune"
    assert Recipe.of(**SIDES).action("a.b") is None
    assert Recipe.of(**SIDES, rules=["x=y=base"]).action("x=y") == "base"
    assert Recipe.of(**SIDES, rules=["layer?.w=base"]).action("Layer1.w") is None


def test_yaml_there_and_back(tmp_path):
    recipe = Recipe.of(**SIDES, density=0.25, rules=["*.bias=base"], memory="512MB", dtype="bfloat16", workers=3)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert Recipe.load(tmp_path / "r.yaml", density=0.5, memory=None).density == 0.5
    assert yaml.safe_load(recipe.to_yaml())["memory"] == 512_000_000


def test_yaml_keys_may_be_written_as_the_options(tmp_path):
    (tmp_path / "r.yaml").write_text("base: b\nfinetuned: f\nout: o\nshard-size: 1MiB\n")
    assert Recipe.load(tmp_path / "r.yaml").shard_size == 1 << 20


@pytest.mark.parametrize(
    "text",
    [
        b"density: [", b"- a\n- b\n", b"5", b"", b"\xff\xfe\x00", b"density: !!python/object/apply:os.system ['true']",
        b"!!python/name:os.system", b"a: &a [*a]", b"[" * 1500, b"rules: 5", b"rules: {a: b}", b"base: [1]\nout: {}",
        b"? [a, b]\n: c\n", b"? {a: b}\n: c\n", b"density: 2020-01-01", b"a: \x00", b"memory: .inf", b"density: .nan",
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_one_error(tmp_path, text):
    (tmp_path / "r.yaml").write_bytes(text)
    with pytest.raises(UserError):
        Recipe.load(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="directory"):
        Recipe.load(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("key", ["density", "memory", "base", "rules"])
def test_a_bomb_of_yaml_references_is_refused_at_once(tmp_path, key):
    """Levels of ten references each: a few hundred bytes, and a hundred thousand items to whoever prints them."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 5)]
    (tmp_path / "r.yaml").write_text("\n".join([*levels, f"{key}: *a4"]))
    with pytest.raises(UserError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    length = len(str(caught.value))
    assert length < 2_000


def test_the_means_do_not_decide_the_bytes():
    one = Recipe.of(**SIDES, memory="1GB", workers=1, device="cpu")
    other = Recipe.of(base="x", finetuned="y", out="z", memory="2GB", workers=5, device="cuda")
    assert one.decides() == other.decides()
    for choice in (
        {"density": 0.2}, {"method": "magnitude"}, {"scope": "global"}, {"rules": ["*=base"]}, {"dtype": "float32"},
        {"seed": 1}, {"nonfinite": "base"}, {"shard_size": "1MB"},
    ):  # fmt: skip
        assert Recipe.of(**SIDES, **choice).decides() != one.decides()


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), anything))
def test_any_values_give_a_recipe_or_one_sentence(choices):
    with contextlib.suppress(UserError):
        assert isinstance(Recipe.of(**{**SIDES, **choices}), Recipe)
