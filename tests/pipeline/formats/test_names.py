"""pytest tests/pipeline/formats/test_names.py: tensors that are called or packed differently on one side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import digests, load, save, save_pair

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify

SHAPES = {"model.embed_tokens.weight": (40, 8), "model.layers.0.q.weight": (8, 16), "lm_head.weight": (40, 8)}


def pruned(folder: Path, base: str, finetuned: str, **choices: Any) -> tuple[dict[str, torch.Tensor], Any]:
    out = folder / f"{base}-{finetuned}-{len(list(folder.iterdir()))}"
    sides = {"base": str(folder / base), "finetuned": str(folder / finetuned), "out": str(out)}
    defaults = {"density": 0.3, "device": "cpu", "workers": 1}
    result = prune(Recipe.of(**sides, **defaults, **choices))
    assert verify(str(out)) == []
    return load(out), result


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return save_pair(tmp_path, SHAPES)


def renamed(folder: Path, side: str, **prefixes: str) -> str:
    """A copy of one side under other names."""
    tensors = {}
    for name, tensor in load(folder / side).items():
        for before, after in prefixes.items():
            before = before.replace("_", ".") if before != "lm_head" else before
            name = after + name[len(before) :] if name.startswith(before) else name
        tensors[name] = tensor
    save(folder / f"{side}-renamed", tensors)
    return f"{side}-renamed"


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_what_training_adds_to_names_is_taken_off(pair, wrapper, side):
    expected, _ = pruned(pair, "base", "finetuned")
    save(pair / "wrapped", {wrapper + name: tensor for name, tensor in load(pair / side).items()})
    sides = {"base": "base", "finetuned": "finetuned"} | {side: "wrapped"}
    found, result = pruned(pair, sides["base"], sides["finetuned"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("names are taken without what training has added" in warning for warning in result.plan.warnings)


def test_in_the_middle_of_a_name_too(pair):
    tensors = {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): t
               for name, t in load(pair / "finetuned").items()}  # fmt: skip
    save(pair / "wrapped", tensors)
    expected, _ = pruned(pair, "base", "finetuned")
    found, _ = pruned(pair, "base", "wrapped")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    shapes = {"visual.module.a": (3, 4), "module.b": (5,)}
    assert pruned(save_pair(tmp_path, shapes), "base", "finetuned")[0].keys() == shapes.keys()


def test_two_that_would_have_one_name(pair):
    tensors = load(pair / "finetuned")
    save(pair / "wrapped", tensors | {"_orig_mod.lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(UserError, match=r"'_orig_mod.lm_head.weight' .* 'lm_head.weight' are both 'lm_head.weight'"):
        pruned(pair, "base", "wrapped")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "transformer."])
def test_a_text_model_and_the_same_inside_another(pair, prefix):
    """finetuned's names stay; the mapping is told."""
    expected, _ = pruned(pair, "base", "finetuned")
    other = renamed(pair, "finetuned", model_=prefix)
    found, result = pruned(pair, "base", other)
    assert found.keys() == load(pair / other).keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name.replace("model.", prefix, 1)], tensor)
    assert f"base's model.* is compared with finetuned's {prefix}* (2 tensors)" in result.plan.warnings
    back, _ = pruned(pair, renamed(pair, "base", model_=prefix), "finetuned")
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_any_other_prefix_by_rename(pair):
    expected, _ = pruned(pair, "base", "finetuned")
    other = renamed(pair, "finetuned", model_="tower.text.", lm_head="tower.out")
    with pytest.raises(UserError, match="no tensor name in common"):
        pruned(pair, "base", other)
    renames = ("model.=tower.text.", "lm_head=tower.out")
    found, result = pruned(pair, "base", other, renames=renames)
    assert torch.equal(found["tower.out.weight"], expected["lm_head.weight"])
    assert torch.equal(found["tower.text.layers.0.q.weight"], expected["model.layers.0.q.weight"])
    assert result.manifest["recipe"]["renames"] == list(renames)


@pytest.mark.parametrize(
    ("renames", "said"),
    [
        (("nothing.=model.",), "--rename nothing.=model.: base has no tensor that would then be one of finetuned's"),
        (("no equals sign",), "is not FROM=TO"),
    ],
)
def test_a_rename_that_cannot_be(pair, renames, said):
    with pytest.raises(UserError, match=said):
        pruned(pair, "base", renamed(pair, "finetuned", model_="x."), renames=renames)


def test_a_recipe_without_renames_is_the_run_that_it_was(pair):
    assert "renames" not in Recipe.of(base="a", finetuned="b", out="c").decides()


# Experts.

MIXTRAL = transformers.MixtralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
)  # fmt: skip
QWEN = transformers.Qwen3MoeConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=["mixtral", "qwen3"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_experts_one_by_one_and_stacked(tmp_path, config, scope):
    """transformers itself writes both layouts: one on disk, one in memory."""
    for seed, side in enumerate(("base", "finetuned")):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
        model.save_pretrained(tmp_path / side)
        save(tmp_path / f"{side}-stacked", {n: t for n, t in model.state_dict().items() if not n.endswith("inv_freq")})
    assert any("experts.2.w" in n or "experts.2.gate" in n for n in load(tmp_path / "base"))
    assert any(n.endswith("experts.gate_up_proj") for n in load(tmp_path / "base-stacked"))
    both, _ = pruned(tmp_path, "base-stacked", "finetuned-stacked", scope=scope)
    found, result = pruned(tmp_path, "base", "finetuned-stacked", scope=scope)
    assert found.keys() == both.keys()
    assert all(torch.equal(found[name], both[name]) for name in both)
    assert any("compared in finetuned's layout" in warning for warning in result.plan.warnings)
    both, _ = pruned(tmp_path, "base", "finetuned", scope=scope)
    found, result = pruned(tmp_path, "base-stacked", "finetuned", scope=scope)
    assert found.keys() == both.keys()
    assert all(torch.equal(found[name], both[name]) for name in both)
    assert any("compared in finetuned's layout" in warning for warning in result.plan.warnings)


def test_square_experts_are_stacked_only_where_the_model_is_known(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    for seed, side in enumerate(("base", "finetuned")):
        torch.manual_seed(seed)
        model = transformers.MixtralForCausalLM(config)
        model.save_pretrained(tmp_path / side, save_original_format=side == "base")
    pruned(tmp_path, "base", "finetuned")
    for side in ("base", "finetuned"):
        (tmp_path / side / "config.json").unlink()
    with pytest.raises(UserError, match=r"is a stack of square matrices .* and no architecture in config.json says"):
        pruned(tmp_path, "base", "finetuned")


def test_a_renamed_run_goes_on_and_is_the_same_on_more_workers(pair):
    other = renamed(pair, "finetuned", model_="transformer.")
    found = set()
    for workers in (1, 2):
        out = pair / f"w{workers}"
        sides = {"base": str(pair / "base"), "finetuned": str(pair / other), "out": str(out)}
        prune(Recipe.of(**sides, device="cpu", workers=workers, shard_size="1KiB"))
        assert prune(Recipe.of(**sides, device="cpu", workers=1, shard_size="1KiB")).nothing_to_do
        found.add(tuple(digest for name, digest in digests(out).items() if name.endswith(".safetensors")))
    assert len(found) == 1


def test_weights_that_base_does_not_know_are_kept(pair):
    """A multi-token head that a model class ignores, say."""
    extra = {"model.layers.61.eh_proj.weight": torch.ones(3, 3).bfloat16()}
    save(pair / "finetuned", load(pair / "finetuned") | extra)
    found, _ = pruned(pair, "base", "finetuned", unpaired="pass")
    assert torch.equal(found["model.layers.61.eh_proj.weight"], extra["model.layers.61.eh_proj.weight"])
