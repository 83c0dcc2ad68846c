"""pytest tests/pipeline/formats/test_adapter.py: what base becomes with an adapter, against PEFT's merge_and_unload."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from checkpoints import digests, load, save
from pace import at_once
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.formats.adapter import _pattern_for, read_adapter
from fapm.planning.make import make_plan

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda **more: transformers.LlamaConfig(**SMALL, **HEADS, attention_bias=True, **more),
    "mixtral": lambda **more: transformers.MixtralConfig(
        **SMALL, **HEADS, num_local_experts=4, num_experts_per_tok=2, **more
    ),
    "gpt2": lambda **more: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_inner=48, **more),
    "gpt_oss": lambda **more: transformers.GptOssConfig(
        **SMALL, **HEADS, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2,
        **more,
    ),
    "square gpt_oss": lambda: transformers.GptOssConfig(
        **{**SMALL, "intermediate_size": 32}, **HEADS, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    ),
    "square mixtral": lambda: transformers.MixtralConfig(
        **{**SMALL, "intermediate_size": 32}, **HEADS, num_local_experts=4, num_experts_per_tok=2
    ),
    "tied": lambda: transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "square gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_inner=32),
}  # fmt: skip


def make(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """base/, adapter/ and merged/: with random numbers wherever PEFT begins with zeros. Returns the merged model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
    model.save_pretrained(folder / "base")
    lora.setdefault("target_modules", ["q_proj", "down_proj"])
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | lora))
    for name, tensor in wrapped.named_parameters():
        if tensor.requires_grad:
            with torch.no_grad():
                noise = torch.randn_like(tensor, dtype=torch.float32) * 0.1
                tensor.copy_(tensor.abs() + noise.abs() if "magnitude" in name else tensor + noise)
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return merged


def all_of(folder: Path, name: str = "out", **choices: Any) -> dict[str, torch.Tensor]:
    """Everything that finetuned is, by keeping all of it."""
    sides = {"base": str(folder / "base"), "finetuned": str(folder / "adapter")}
    out = folder / name
    recipe = Recipe.of(**sides, out=str(out), density=1.0, device="cpu", workers=1, **choices)
    prune(recipe)
    assert verify(recipe.out) == []
    return load(out)


def assert_like(found: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {}),
    "rank-stabilized": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {r"layers\.0.*": 7}}),
    "dora": ("llama", {"use_dora": True}),
    "embeddings and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "tokens": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 0, 95]}}),
    "all biases": ("llama", {"bias": "all"}),
    "its own biases": ("llama", {"bias": "lora_only"}),
    "bias of B": ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d with dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "embeddings of gpt2": ("gpt2", {"target_modules": ["wpe"], "fan_in_fan_out": True}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one kind of experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
    ),
    "transposed experts": (
        "gpt_oss",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "transposed square experts": (
        "square gpt_oss",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "square experts": (
        "square mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "square conv1d": ("square gpt2", {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True}),
    "a head that was tied": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a head and an embedding that were tied": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a head and an embedding that stay tied": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_base_becomes_is_what_peft_makes_of_it(tmp_path, case):
    kind, lora = CASES[case]
    make(tmp_path, kind, **lora)
    found, merged = all_of(tmp_path, memory="64MiB"), load(tmp_path / "merged")
    assert_like(found, merged, rtol=1e-5, atol=1e-6)
    base = load(tmp_path / "base")
    assert any(not torch.equal(base[name], merged[name]) for name in base)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_in_bfloat16_it_is_the_sum_in_float32_rounded_once(tmp_path, kind):
    make(tmp_path, kind, torch.bfloat16, target_modules=["q_proj", "down_proj"])
    base, adapter = load(tmp_path / "base"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = all_of(tmp_path)
    checked = 0
    for name, p in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if key not in adapter:
            assert torch.equal(found[name], p)
            continue
        a, b = adapter[key].float(), adapter[key.replace("lora_A", "lora_B")].float()
        total = torch.zeros(b.shape[0], a.shape[1])
        for k in range(a.shape[0]):
            total = total + b[:, k : k + 1] * a[k]
        assert torch.equal(found[name], (p.float() + np.float32(10 / 4) * total).bfloat16())
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("case", ["dora", "experts", "conv1d with dora"])
def test_pruning_with_an_adapter_is_pruning_the_merged_checkpoint(tmp_path, case, scope):
    """To the bit, however the shards are cut and in whatever memory: the merged one is what density 1 gives."""
    kind, lora = CASES[case]
    make(tmp_path, kind, torch.bfloat16, **lora)
    save(tmp_path / "whole", all_of(tmp_path))
    outs = {}
    for side, workers, shard_size in (("whole", 1, "1GB"), ("adapter", 2, "20kB")):
        out = tmp_path / f"of-{side}"
        sides = {"base": str(tmp_path / "base"), "finetuned": str(tmp_path / side), "out": str(out)}
        prune(Recipe.of(**sides, density=0.2, scope=scope, device="cpu", workers=workers, shard_size=shard_size))
        assert verify(str(out)) == []
        outs[side] = load(out)
    assert outs["whole"].keys() == outs["adapter"].keys()
    for name, tensor in outs["whole"].items():
        assert torch.equal(tensor.view(torch.uint8), outs["adapter"][name].view(torch.uint8)), name


def test_a_large_matrix_in_little_memory_has_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(1)
    base = {"model.layers.0.q_proj.weight": torch.randn(3000, 2000, generator=generator).bfloat16()}
    save(tmp_path / "base", base)
    name = "base_model.model.model.layers.0.q_proj"
    shapes = {"lora_A.weight": (5, 2000), "lora_B.weight": (3000, 5), "lora_magnitude_vector": (3000,)}
    (tmp_path / "adapter").mkdir()
    tensors = {f"{name}.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 3, "use_dora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = set()
    for memory, workers in (("64MiB", 2), ("1GiB", 1)):
        out = tmp_path / memory
        sides = {"base": str(tmp_path / "base"), "finetuned": str(tmp_path / "adapter"), "out": str(out)}
        prune(Recipe.of(**sides, device="cpu", memory=memory, workers=workers))
        found.add(tuple(digests(out).values()))
    assert len(found) == 1


def test_side_files_are_base_s_and_the_tokenizer_the_adapter_s_if_it_has_one(tmp_path):
    make(tmp_path, "llama")
    (tmp_path / "base" / "tokenizer.json").write_text('{"of": "base"}')
    (tmp_path / "base" / "generation_config.json").write_text('{"of": "base"}')
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"of": "adapter"}')
    all_of(tmp_path)
    out = tmp_path / "out"
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "adapter"}
    assert json.loads((out / "generation_config.json").read_text()) == {"of": "base"}
    assert not (out / "adapter_config.json").exists()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(out)) is transformers.LlamaForCausalLM


def test_a_changed_configuration_is_another_input(tmp_path):
    make(tmp_path, "llama")
    all_of(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 10', '"lora_alpha": 11'))
    with pytest.raises(UserError, match=r"finetuned: adapter_config\.json has changed since"):
        all_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "VERA"}, "an adapter of type 'VERA'; LORA is read here"),
        ({"use_qalora": True}, "use_qalora is not read here"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not read here"),
        ({"init_lora_weights": "pissa_niter_4"}, "trained on a base that this changed"),
        ({"r": 1 << 40}, "1099511627776 where a whole number should be"),
        ({"r": "4"}, "4 where a whole number should be"),
        ({"r": 8}, "the rank 8, and its A has 4"),
        ({"lora_alpha": float("nan")}, "nan where a number above 0 should be"),
        ({"lora_alpha": 0}, "0 where a number above 0 should be"),
        ({"lora_alpha": -8}, "-8 where a number above 0 should be"),
        ({"lora_alpha": 1e300}, "1e+300 where a number above 0 should be"),
        ({"lora_alpha": [1]}, "[1] where a number above 0 should be"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "0.0 where a number above 0 should be"),
        ({"rank_pattern": {"(": 4}}, "is not one of module names"),
        ({"rank_pattern": {r"(?=q)q_proj": 4}}, "is not one of module names"),
        ({"rank_pattern": {r"(q)\1": 4}}, "is not one of module names"),
        ({"rank_pattern": {"q" * 301: 4}}, "more modules, or longer ones, than any model has"),
        ({"modules_to_save": ["m"] * 30_000}, "more modules, or longer ones, than any model has"),
        ({"rank_pattern": 3}, "adapter_config.json"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_what_cannot_be_formed_exactly_is_refused_by_name(tmp_path, changes, said):
    make(tmp_path, "llama")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as error:
        plan_of(tmp_path)
    assert said in str(error.value)
    assert len(str(error.value)) < 400


PATTERNS = (
    "q_proj", "layers.0.q_proj", r"model\.layers\.\d+\.self_attn\.(q|v)_proj", "(a+)+b", "(a|a)*b", ".*.*.*b",
    ".?" * 149 + "x", r"(?:.*\.)?q_proj", "^model.*q_proj", "q_proj$", "[kq]_proj", "q_pro", "proj",
)  # fmt: skip
MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.q_proj",
    "q_proj",
    "a" * 250 + "c",
    "aab",
    "x.aab",
    "x" * 200,
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_peft_matches_in_linear_time(pattern):
    """PEFT's get_pattern_key takes re.match(rf"(.*\\.)?({key})$", name), which for some of these never ends."""
    said = read_adapter(json.dumps({"peft_type": "LORA", "rank_pattern": {pattern: 3}}).encode(), "x")
    with at_once(1):
        found = [_pattern_for(module, said.rank_pattern) == pattern for module in MODULES]
    for module, matches in zip(MODULES, found, strict=True):
        if len(module) < 50:  # re would try for ever
            simple = pattern if len(pattern) < 50 else ".{0,149}x"
            assert matches == bool(re.match(rf"(.*\.)?({simple})$", module)), module


@pytest.mark.parametrize(("version", "turned"), [("0.18.0", True), (None, True), ("0.19.0", False)])
def test_square_experts_lie_as_the_version_of_peft_that_trained_them_had_them(tmp_path, version, turned):
    """To 0.18 it kept B·A of every stack turned; it said its version from 0.18 on."""
    make(tmp_path, "square mixtral", target_modules=[], target_parameters=["experts.down_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text()) | {"peft_version": version}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    found = all_of(tmp_path)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, merged = load(tmp_path / "base"), load(tmp_path / "merged")
    for name in base:
        if not (matched := re.fullmatch(r"(model\.layers\.\d+\.)\S+experts\.(\d)\.(w2|down_proj)\.weight", name)):
            continue
        a, b = (next(t for n, t in adapter.items() if matched[1] in n and f"lora_{x}" in n) for x in "AB")
        expert = int(matched[2])
        delta = b.reshape(32, 4, 4)[:, :, expert] @ a.reshape(4, 4, 32)[expert] * 2.5
        wanted = base[name] + (delta.T if turned else delta)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
        assert turned or torch.allclose(merged[name], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "config", "said"),
    [("0.18.2.dev0@abc", True, "peft_version is no release"), ("0.21.0", False, "names no type of model")],
)
def test_square_experts_of_which_that_is_not_known_are_refused(tmp_path, version, config, said):
    make(tmp_path, "square mixtral", target_modules=[], target_parameters=["experts.down_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": version}))
    if not config:
        (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(UserError, match=said):
        plan_of(tmp_path)


def test_a_square_matrix_among_others_that_lie_otherwise_is_refused(tmp_path):
    """`fan_in_fan_out` is true of Conv1D, and here it is said of a Linear."""
    make(tmp_path, "llama", target_modules=["q_proj", "down_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    with pytest.raises(UserError, match=r"fan_in_fan_out: true, which does not hold for .*down_proj"):
        plan_of(tmp_path)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_what_an_adapter_of_tied_matrices_means_is_not_guessed(tmp_path, lora):
    make(tmp_path, "tied", **lora)
    with pytest.raises(UserError, match="base ties its head to its embedding"):
        plan_of(tmp_path)


def test_the_configuration_says_whether_they_are_still_tied(tmp_path):
    for name, lora in (("apart", {}), ("tied", {"ensure_weight_tying": True})):
        folder = tmp_path / name
        modules = ["embed_tokens"] if lora else ["embed_tokens", "lm_head"]
        merged = make(folder, "tied", target_modules=["q_proj"], modules_to_save=modules, **lora)
        all_of(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        assert (embedding.data_ptr() == head.data_ptr()) == bool(lora)
        assert torch.equal(embedding, merged.model.embed_tokens.weight)
        assert torch.equal(head, merged.lm_head.weight)
        assert verify(str(folder / "out"), load=True) == []


def test_a_tensor_that_is_not_understood_is_no_tensor_of_the_model(tmp_path):
    make(tmp_path, "llama")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.layers.0.self_attn.q_proj.velora": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"it is not known what model\.layers\.0\.self_attn\.q_proj\.velora means"):
        plan_of(tmp_path)


def test_several_adapters_in_one_file_are_refused(tmp_path):
    make(tmp_path, "llama")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {n.replace("lora_A.", "lora_A.other."): t.clone() for n, t in tensors.items()}, path)
    with pytest.raises(UserError, match="it has several adapters of"):
        plan_of(tmp_path)


def test_a_state_dict_with_an_adapter_in_it_is_merged_where_it_is_said_how(tmp_path):
    """As FSDP's FULL_STATE_DICT of a PEFT model is written."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    save(tmp_path / "adapter", {name: t.clone() for name, t in wrapped.state_dict().items()})
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"belongs to an adapter that was not merged, and there is no adapter_config"):
        plan_of(tmp_path)
    wrapped.peft_config["default"].save_pretrained(tmp_path / "adapter")
    found = all_of(tmp_path)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_like(found, load(tmp_path / "merged"), rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert verify(str(tmp_path / "out"), load=True) == []


def test_more_rows_are_in_the_configuration(tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    found = all_of(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == 100
    assert torch.equal(loaded.lm_head.weight, found["lm_head.weight"])
    assert torch.equal(found["lm_head.weight"], wrapped.merge_and_unload().lm_head.weight)
    assert verify(str(tmp_path / "out"), load=True) == []


def test_an_adapter_that_torch_has_saved(tmp_path):
    make(tmp_path, "llama")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = all_of(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="--allow-pickle looks into them"):
        plan_of(tmp_path)
    found = all_of(tmp_path, "pickled", allow_pickle=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_which_of_several_is_meant_is_not_guessed(tmp_path):
    make(tmp_path, "llama")
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "adapter", tmp_path / "run" / "best")
    shutil.copytree(tmp_path / "adapter", tmp_path / "run" / "last")
    sides = {"base": str(tmp_path / "base"), "out": str(tmp_path / "o")}
    with pytest.raises(UserError, match="and adapters in best, last; give the folder of the one that counts"):
        make_plan(Recipe.of(**sides, finetuned=str(tmp_path / "run")))
    shutil.copy(tmp_path / "merged" / "model.safetensors", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"holds an adapter .* and a whole model"):
        plan_of(tmp_path)


def test_experts_that_unsloth_has_taken_apart_are_named(tmp_path):
    make(tmp_path, "gpt_oss", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.experts.gate_up_projs.0"
    more = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(96, 4)}
    save_file(load_file(path) | more, path)
    with pytest.raises(UserError, match=r"gate_up_projs\.0 \(experts one by one: unsloth's layout\?\)"):
        plan_of(tmp_path)


def plan_of(folder: Path, **choices: Any) -> Any:
    sides = {"base": str(folder / "base"), "finetuned": str(folder / "adapter"), "out": str(folder / "out")}
    return make_plan(Recipe.of(**sides, **choices))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"base_model.model.model.layers.9.q_proj.lora_A.weight": torch.zeros(4, 32)}, "does not have"),
        (lambda t: {n: v for n, v in t.items() if "lora_B" not in n}, "is not A and B of a LoRA"),
        (lambda t: {n: v[:, :5] if "lora_A" in n else v for n, v in t.items()}, "do not fit base's"),
        (lambda t: {n: v[..., None, None] if "lora_A" in n else v for n, v in t.items()}, "is no matrix"),
    ],
)
def test_what_does_not_fit_base_is_said(tmp_path, change, said):
    make(tmp_path, "llama")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: v.contiguous() for n, v in change(load_file(path)).items()}, path)
    with pytest.raises(UserError, match=said):
        plan_of(tmp_path)


def test_an_adapter_is_no_base(tmp_path):
    make(tmp_path, "llama")
    with pytest.raises(UserError, match="holds a LoRA adapter, which is no base"):
        make_plan(Recipe.of(base=str(tmp_path / "adapter"), finetuned=str(tmp_path / "base"), out=str(tmp_path / "o")))


def test_vera_is_refused_as_peft_writes_it(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, peft.VeraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="an adapter of type 'VERA'"):
        plan_of(tmp_path)


def test_an_embedding_that_the_adapter_brings_is_what_its_update_is_added_to(tmp_path):
    """PEFT saves embeddings that it has wrapped; here they are not base's."""
    make(tmp_path, "llama", target_modules=["embed_tokens"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    before, plain = load_file(path), all_of(tmp_path)["model.embed_tokens.weight"]
    save_file(before | {name: before[name] + 1}, path)
    found = all_of(tmp_path, "other")["model.embed_tokens.weight"]
    torch.testing.assert_close(found, plain + 1, rtol=1e-5, atol=1e-6)


def test_what_is_formed_travels_to_other_processes(tmp_path):
    make(tmp_path, "mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    shards = plan_of(tmp_path, shard_size="10kB").shards
    assert any(t.finetuned.form for shard in shards for t in shard.tensors)
    assert pickle.loads(pickle.dumps(shards)) == shards
