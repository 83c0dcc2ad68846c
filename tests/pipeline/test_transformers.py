"""pytest tests/pipeline/test_transformers.py: models that transformers made and saved, pruned, and loaded by it again.

The expected weights come from SEMANTICS.md written out in numpy with a stable argsort, on the files as saved.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from fapm import Recipe, prune
from fapm.planning.make import make_plan

DENSITY = 0.15
SMALL: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = SMALL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, how its two sides are cut into files, and what its layers are called."""

    model: Any
    config: Any
    dtype: torch.dtype
    layer: str
    layers: int
    alone: tuple[str, ...]
    base_shards: str = "1GB"
    finetuned_shards: str = "1GB"


CASES = {
    "llama": Case(
        tf.LlamaForCausalLM, tf.LlamaConfig(**DECODER), torch.float32, r"model\.layers\.\d+", 2,
        ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"), finetuned_shards="20KB",
    ),
    "qwen2": Case(
        tf.Qwen2ForCausalLM, tf.Qwen2Config(**DECODER, tie_word_embeddings=True), torch.bfloat16,
        r"model\.layers\.\d+", 2, ("model.embed_tokens.weight", "model.norm.weight"),
        base_shards="10KB", finetuned_shards="15KB",
    ),
    "mixtral": Case(
        tf.MixtralForCausalLM, tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
        torch.bfloat16, r"model\.layers\.\d+", 2,
        ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"), base_shards="30KB",
    ),
    "gpt2": Case(
        tf.GPT2LMHeadModel, tf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        torch.float32, r"transformer\.h\.\d+", 2,
        ("transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.wpe.weight", "transformer.wte.weight"),
    ),
    "bert": Case(
        tf.BertForMaskedLM, tf.BertConfig(**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}),
        torch.float16, r"bert\.encoder\.layer\.\d+", 2,
        tuple(f"bert.embeddings.{n}" for n in ("LayerNorm.bias", "LayerNorm.weight", "position_embeddings.weight",
                                               "token_type_embeddings.weight", "word_embeddings.weight"))
        + tuple(f"cls.predictions.{n}" for n in ("bias", "transform.LayerNorm.bias", "transform.LayerNorm.weight",
                                                 "transform.dense.bias", "transform.dense.weight")),
        finetuned_shards="20KB",
    ),
    "t5": Case(
        tf.T5ForConditionalGeneration,
        tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        torch.float32, r"(encoder|decoder)\.block\.\d+", 4,
        ("decoder.final_layer_norm.weight", "encoder.final_layer_norm.weight", "shared.weight"), base_shards="20KB",
    ),
}  # fmt: skip


def make_pair(case: Case, folder: Path, resize: int = 0) -> None:
    """Save a seeded model as base, and it with changes in most of its elements as finetuned."""
    torch.manual_seed(11)
    model = case.model(copy.deepcopy(case.config)).to(case.dtype)  # a resize changes its configuration
    model.save_pretrained(folder / "base", max_shard_size=case.base_shards)
    if resize:
        model.resize_token_embeddings(case.config.vocab_size + resize, mean_resizing=False)
    with torch.no_grad():
        for weights in model.parameters():
            change = torch.randn(weights.shape) * 0.01 * (torch.rand(weights.shape) < 0.8)
            weights += change.to(weights.dtype)
    model.save_pretrained(folder / "finetuned", max_shard_size=case.finetuned_shards)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each architecture's pair, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_pair(CASES[name], made[name])
        return made[name]

    return get


def recipe(folder: Path, out: Path, **choices: Any) -> Recipe:
    paths = {"base": str(folder / "base"), "finetuned": str(folder / "finetuned"), "out": str(out)}
    return Recipe.of(**{"density": DENSITY, **paths, **choices})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not found.keys() & tensors.keys()
        tensors |= found
    return tensors


def score(p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """S of one tensor in float32, flat; SEMANTICS.md, 2 to 4."""
    p, f = p.ravel(), f.ravel()
    m = np.float32(math.fsum(np.abs(p).tolist()) / p.size)
    with np.errstate(all="ignore"):
        d = np.abs(f - p)
        s = d - m * (d / np.abs(p))
    s[(p == 0) & (d != 0)] = -np.inf
    s[d == 0] = 0
    assert s.dtype == np.float32
    return s


def group_of(case: Case, name: str, scope: str) -> str:
    match = re.match(case.layer + r"\.", name)
    return match[0] if scope == "layer" and match else name


def oracle(case: Case, folder: Path, scope: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """where(mask, f, p) for every tensor; rows that only finetuned has are its own."""
    base, finetuned = stored(folder / "base"), stored(folder / "finetuned")
    assert base.keys() == finetuned.keys()
    groups: dict[str, list[str]] = {}
    for name in sorted(base):
        groups.setdefault(group_of(case, name, scope), []).append(name)
    masks: dict[str, torch.Tensor] = {}
    for names in groups.values():
        common = {name: finetuned[name][: len(base[name])] for name in names}
        scores = [score(base[name].float().numpy(), common[name].float().numpy()) for name in names]
        whole = np.concatenate(scores)
        kept = np.zeros(whole.size, bool)
        kept[np.argsort(-whole, kind="stable")[: int(whole.size * DENSITY)]] = True
        for name, part in zip(names, np.split(kept, np.cumsum([s.size for s in scores])[:-1]), strict=True):
            masks[name] = torch.from_numpy(part).reshape(base[name].shape)
    result = {}
    for name, p in base.items():
        f = finetuned[name]
        result[name] = torch.cat([torch.where(masks[name], f[: len(p)], p), f[len(p) :]]).to(dtype or f.dtype)
    return result


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def load(case: Case, folder: Path):
    model, info = case.model.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def assert_loads_as(case: Case, out: Path, expected: dict[str, torch.Tensor], config_from: Path, tmp_path: Path):
    """Every parameter in memory is that of the expected checkpoint; returns the model."""
    wanted = tmp_path / "expected"
    wanted.mkdir()
    save_file(expected, wanted / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(config_from / "config.json", wanted)
    model = load(case, out)
    assert_same(model.state_dict(), load(case, wanted).state_dict())
    loaded = {n: t for n, t in model.state_dict().items() if n in expected}
    # transformers holds some of T5's weights in float32 when it loads float16: the values are the same.
    assert_same(loaded, {n: expected[n].to(t.dtype) for n, t in loaded.items()})
    return model


def run_forward(model) -> torch.Tensor:
    tokens = torch.arange(3, 15)[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("scope", ["tensor", "layer"])
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_what_the_formula_keeps(pairs, tmp_path, name, scope):
    case, folder, out = CASES[name], pairs(name), tmp_path / "out"
    prune(recipe(folder, out, scope=scope, shard_size=20_000))
    expected = oracle(case, folder, scope)
    assert_same(stored(out), expected)
    model = assert_loads_as(case, out, expected, folder / "finetuned", tmp_path)
    logits = run_forward(model)
    assert logits.isfinite().all()
    for role in ("base", "finetuned"):
        assert not torch.equal(logits, run_forward(load(case, folder / role)))


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_a_numbered_block_with_all_that_is_in_it(pairs, tmp_path, name):
    case, folder = CASES[name], pairs(name)
    plan = make_plan(recipe(folder, tmp_path / "out", scope="layer"))
    members: dict[str, list[str]] = {}
    for tensor in plan.tensors():
        members.setdefault(tensor.group, []).append(tensor.name)
    layers = {group for group, names in members.items() if all(re.match(case.layer + r"\.", n) for n in names)}
    assert len(layers) == case.layers
    assert all(re.fullmatch(case.layer, group) for group in layers)
    for group in layers:
        assert all(n.startswith(group + ".") for n in members[group])
    assert {group: members[group] for group in members.keys() - layers} == {n: [n] for n in case.alone}
    numel = {n: t.numel() for n, t in stored(folder / "base").items()}
    for group, names in members.items():
        assert plan.groups[group].numel == sum(numel[n] for n in names)


def test_experts_compete_inside_their_layer(pairs, tmp_path):
    plan = make_plan(recipe(pairs("mixtral"), tmp_path / "out", scope="layer"))
    experts = [t for t in plan.tensors() if ".experts." in t.name]
    assert len(experts) == 2 * 4 * 3
    assert {t.group for t in experts} == {"model.layers.0", "model.layers.1"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("scope", ["tensor", "layer"])
def test_a_resized_vocabulary_keeps_its_new_rows(tmp_path, name, scope):
    case, out = CASES[name], tmp_path / "out"
    make_pair(case, tmp_path, resize=8)
    prune(recipe(tmp_path, out, scope=scope))
    expected = oracle(case, tmp_path, scope)
    finetuned = stored(tmp_path / "finetuned")
    grown = [n for n, t in stored(tmp_path / "base").items() if t.shape != finetuned[n].shape]
    assert len(grown) == {"llama": 2, "gpt2": 1, "bert": 2}[name]
    for tensor in grown:
        assert torch.equal(expected[tensor][97:], finetuned[tensor][97:])
    assert_same(stored(out), expected)
    model = assert_loads_as(case, out, expected, tmp_path / "finetuned", tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == 105


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_another_dtype_is_in_the_files_and_in_the_config(pairs, tmp_path, name, dtype):
    case, folder, out = CASES[name], pairs(name), tmp_path / "out"
    prune(recipe(folder, out, dtype=dtype))
    expected = oracle(case, folder, "tensor", getattr(torch, dtype))
    assert_same(stored(out), expected)
    config = json.loads((out / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {dtype}
    model = assert_loads_as(case, out, expected, out, tmp_path)
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)


def test_a_step_of_an_optimizer_is_pruned_as_any_change(tmp_path):
    case, out = CASES["llama"], tmp_path / "out"
    torch.manual_seed(5)
    model = case.model(copy.deepcopy(case.config))
    model.save_pretrained(tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(3, 97, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "finetuned")
    prune(recipe(tmp_path, out))
    expected = oracle(case, tmp_path, "tensor")
    assert_same(stored(out), expected)
    assert_loads_as(case, out, expected, tmp_path / "finetuned", tmp_path)
