"""Adapters as outputs: loaded and merged by PEFT, and held to numpy's SVD in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load, save
from click.testing import CliRunner
from killing import killed_until_done
from safetensors.torch import load_file

import fapm
from fapm import Recipe, prune
from fapm.checking.verify import verify
from fapm.cluster.cli import cli
from fapm.errors import UserError
from fapm.manifest.read import load_manifest, read_table

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    """A small Llama, tuned by changes of falling singular values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"}))
    base = {name: t.detach().clone() for name, t in model.state_dict().items()}
    tuned = {}
    for name, p in base.items():
        change = 0.01 * torch.randn(p.shape)
        if p.ndim == 2:
            u, s, vt = torch.linalg.svd(change, full_matrices=False)
            change = (u * s * 0.7 ** torch.arange(s.numel())) @ vt * 10
        tuned[name] = p + change
    save(tmp_path / "base", base, config=CONFIG)
    save(tmp_path / "finetuned", tuned, config=CONFIG)
    return {"base": str(tmp_path / "base"), "finetuned": str(tmp_path / "finetuned"), "memory": "128MB"}


def nearest(p: torch.Tensor, f: torch.Tensor, rank: int) -> np.ndarray:
    """Of Δ the nearest matrix of a rank, from numpy's SVD."""
    u, s, vt = np.linalg.svd((f - p).double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def is_linear(name: str) -> bool:
    return name == "lm_head.weight" or any(f".{part}." in name for part in LINEAR)


@pytest.mark.parametrize("rank", [1, 8])
def test_peft_merges_it_into_base_and_the_nearest_matrices(pair, tmp_path, rank):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = fapm.extract(**pair, out=str(tmp_path / "lora"), lora=rank)
    model = AutoModelForCausalLM.from_pretrained(pair["base"])
    merged = PeftModel.from_pretrained(model, str(tmp_path / "lora")).merge_and_unload().state_dict()
    base, tuned = load(tmp_path / "base"), load(tmp_path / "finetuned")
    for name, p in base.items():
        wanted = p.double().numpy() + (nearest(p, tuned[name], rank) if is_linear(name) else 0)
        assert np.allclose(merged[name].double().numpy(), wanted, atol=1e-6), name
    assert verify(str(tmp_path / "lora")) == []
    assert any("have no place in an adapter" in warning for warning in result.plan.warnings)
    kept = sum(np.linalg.norm(nearest(p, tuned[n], rank)) ** 2 for n, p in base.items() if is_linear(n))
    whole = sum(float((tuned[n] - p).double().norm()) ** 2 for n, p in base.items() if is_linear(n))
    assert result.manifest["totals"]["kept_share"] == pytest.approx(kept / whole, rel=1e-5)
    assert not (tmp_path / "lora/config.json").exists() and not (tmp_path / "lora/fapm/work").exists()
    assert str(tmp_path) not in (tmp_path / "lora/adapter_config.json").read_text()


@pytest.mark.parametrize(("method", "choices"), [("dg-hard", {}), ("timber", {}), ("low-rank", {"rank": 3})])
def test_what_any_matrix_method_keeps_is_read_back_as_it_writes_it(pair, tmp_path, method, choices):
    """Ranks of their own, as patterns of the configuration; our own reader and the checkpoint of the same method."""
    how = {"method": method, **choices}
    prune(Recipe.of(**pair, out=str(tmp_path / "lora"), emit="adapter", **how))
    prune(Recipe.of(**pair, out=str(tmp_path / "whole"), **how))
    sides = pair | {"finetuned": str(tmp_path / "lora"), "out": str(tmp_path / "applied")}
    prune(Recipe.of(**sides, rules=["*=finetuned"]))
    applied, whole, base = (load(tmp_path / name) for name in ("applied", "whole", "base"))
    for name, p in base.items():
        assert torch.allclose(applied[name], whole[name] if is_linear(name) else p, atol=1e-6), name
    assert verify(str(tmp_path / "lora")) == []
    ranks = {row["name"]: row["rank"] for row in read_table(str(tmp_path / "lora"))}
    stored = load_file(tmp_path / "lora/adapter_model.safetensors")
    for name, rank in ranks.items():
        a = stored.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        assert rank == (0 if a is None else len(a))


def test_layers_may_be_scaled(pair, tmp_path):
    prune(Recipe.of(**pair, out=str(tmp_path / "lora"), emit="adapter", method="low-rank", rank=4, layer_scale="0.5:1"))
    prune(Recipe.of(**pair, out=str(tmp_path / "plain"), emit="adapter", method="low-rank", rank=4))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "plain"))
    for name, tensor in one.items():
        a, b = (side[name.replace("lora_B", "lora_A")].double() for side in (one, other))
        if "lora_B" in name:
            factor = 0.5 if "layers.0." in name or "lm_head" in name else 1.0
            assert torch.allclose(tensor.double() @ a, factor * (other[name].double() @ b), atol=1e-7)
    assert verify(str(tmp_path / "lora")) == []


def test_the_same_bytes_from_any_number_of_workers_and_after_being_killed(pair, tmp_path):
    choices = {"emit": "adapter", "method": "low-rank", "rank": 8, "shard_size": "100kB"}
    prune(Recipe.of(**pair, out=str(tmp_path / "one"), workers=1, **choices))
    wanted = (tmp_path / "one/adapter_model.safetensors").read_bytes()
    prune(Recipe.of(**pair | {"memory": "1GiB"}, out=str(tmp_path / "three"), workers=3, **choices))
    assert (tmp_path / "three/adapter_model.safetensors").read_bytes() == wanted
    words = (
        "extract --base base --finetuned finetuned --lora 8 --out killed --shard-size 100kB --memory 128MB --workers 1"
    )
    killed_until_done(words, tmp_path)
    assert (tmp_path / "killed/adapter_model.safetensors").read_bytes() == wanted
    # What is gone is made again, and what is there is not.
    again = CliRunner().invoke(cli, ["extract", *(f"--{k}={v}" for k, v in pair.items()), "--lora=8",
                                     "--shard-size=100kB", f"--out={tmp_path / 'killed'}"])  # fmt: skip
    assert "nothing to do" in again.output
    (tmp_path / "killed/adapter_model.safetensors").unlink()
    killed_until_done(words, tmp_path, ())
    assert (tmp_path / "killed/adapter_model.safetensors").read_bytes() == wanted


@pytest.mark.parametrize(("choices", "config", "said"), [
    ({"method": "fapm"}, CONFIG, "--emit adapter: an adapter is a part of each matrix; take --method dg-hard or"),
    ({}, CONFIG | {"model_type": "gpt2"}, "type gpt2 stores its layers the other way round"),
    ({"rules": ["*=base"]}, CONFIG, "no tensor is the matrix of a linear layer"),
    ({"method": "dg-hard", "strength": 1e6}, CONFIG, "dg-hard keeps no singular value of any matrix"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(pair, tmp_path, choices, config, said):
    (tmp_path / "finetuned/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        prune(Recipe.of(**pair, out=str(tmp_path / "out"), **{"emit": "adapter", "method": "low-rank", **choices}))
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_verify_finds_what_is_wrong(pair, tmp_path):
    fapm.extract(**pair, out=str(tmp_path / "lora"), lora=4)
    path = tmp_path / "lora/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(data)
    problems = verify(str(tmp_path / "lora"))
    assert any("its xxh3-128 is" in problem for problem in problems)
    assert any("are not what low-rank keeps" in problem for problem in problems)
    path.unlink()
    assert verify(str(tmp_path / "lora"))[0] == "adapter_model.safetensors: missing"


def test_it_says_what_it_is(pair, tmp_path):
    done = CliRunner().invoke(cli, ["extract", *(f"--{k}={v}" for k, v in pair.items()), "--lora=2",
                                    f"--out={tmp_path / 'lora'}"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "low-rank, rank 2" in done.output and "PeftModel.from_pretrained(" in done.output
    assert "A LoRA adapter for `base`" in (tmp_path / "lora/README.md").read_text()
    account = load_manifest(str(tmp_path / "lora"))["accounts"]["finetuned"]
    assert account["counts"] == {"pruned": 15, "left out": 6}
    assert account["left_out"]["model.norm.weight"] == "an adapter has no place for it"
    refused = CliRunner().invoke(cli, ["extract", *(f"--{k}={v}" for k, v in pair.items()), "--lora=0", "--out=x"])
    assert refused.exit_code == 1 and "--rank: at least 1" in refused.output.replace("1 to 1,048,576", "at least 1")
