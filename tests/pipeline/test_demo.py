"""pytest tests/pipeline/test_demo.py: the demo's checkpoints load in transformers, and its check can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from fapm import UserError
from fapm.demo import check, check_tensor, demo
from fapm.schedule import Watch


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, Watch())


def parameters(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_the_pair_is_what_transformers_expects(shown):
    folder, _ = shown
    config = AutoConfig.from_pretrained(folder / "base")
    expected = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).state_dict().items()}
    for role in ("base", "finetuned", "pruned"):
        stored = parameters(folder / role)
        assert {name: tuple(t.shape) for name, t in stored.items()} == expected
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert len(list((folder / "base").glob("*.safetensors"))) == 1
    assert len(list((folder / "finetuned").glob("*.safetensors"))) == 2


def test_transformers_loads_the_result_and_it_is_another_model(shown):
    folder, _ = shown
    tokens = torch.arange(3, 19)[None]
    logits = {}
    for role in ("base", "finetuned", "pruned"):
        model, info = LlamaForCausalLM.from_pretrained(folder / role, output_loading_info=True, dtype=torch.float32)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits[role] = model(tokens).logits
    assert logits["pruned"].isfinite().all()
    assert not torch.equal(logits["pruned"], logits["base"])
    assert not torch.equal(logits["pruned"], logits["finetuned"])


def test_the_sentence_has_the_numbers(shown):
    folder, result = shown
    stored = {role: parameters(folder / role) for role in ("base", "pruned")}
    numel = sum(t.numel() for t in stored["base"].values())
    kept = sum(int((stored["pruned"][name] != t).sum()) for name, t in stored["base"].items())
    budget = sum(int(t.numel() * 0.1) for t in stored["base"].values())
    assert f"{numel:,} elements of {len(stored['base'])} tensors" in result.checked
    assert f"({budget:,}, of which {budget - kept:,} are the same in base" in result.checked
    assert kept <= budget


def test_a_second_time_there_is_nothing_to_do(shown):
    folder, first = shown
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    said: list[str] = []
    second = demo(folder, Watch(say=said.append))
    assert second.result.nothing_to_do
    assert any("nothing to prune" in line for line in said)
    assert second.checked == first.checked
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_folder_makes_the_same_files(shown, tmp_path):
    folder, _ = shown
    demo(tmp_path, Watch())
    for path in folder.rglob("*.safetensors"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_files_of_someone_else_are_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    mine = tmp_path / "base/model.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"model\.safetensors is there and not the demo's"):
        demo(tmp_path, Watch())
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("how", ["drop the best", "keep the worst", "neither"])
def test_a_tampered_result_is_noticed(tmp_path, how):
    demo(tmp_path, Watch())
    path = tmp_path / "pruned/model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    p, f = (parameters(tmp_path / role)[name].double().view(-1) for role in ("base", "finetuned"))
    score = (f - p).abs() - p.abs().mean() * (f - p).abs() / p.abs()
    changed = torch.where(p != f, score, torch.nan)
    at = int(np.nanargmax(changed) if how == "drop the best" else np.nanargmin(changed))
    tensors[name].view(-1)[at] = {"drop the best": p, "keep the worst": f, "neither": p + 1}[how][at]
    save_file(tensors, path, metadata={"format": "pt"})
    reason = {"drop the best": "dropped that score above", "keep the worst": "kept that score below"}
    with pytest.raises(UserError, match=f"{name}.*{reason.get(how, 'neither')}"):
        check(tmp_path / "base", tmp_path / "finetuned", tmp_path / "pruned", 0.1)


def bf16(*values: float) -> np.ndarray:
    return torch.tensor(values, dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_the_number_kept_is_checked_where_no_single_element_can_be():
    """Four equal scores and k = 2: any two will do for the float64 check, one or three will not."""
    p, f = bf16(1, 1, 1, 1, 0.25, 0.25), bf16(2, 2, 2, 2, 0.25, 0.25)
    assert check_tensor(p, f, bf16(2, 2, 1, 1, 0.25, 0.25), 2) == (2, 4)
    for out in (bf16(2, 1, 1, 1, 0.25, 0.25), bf16(2, 2, 2, 1, 0.25, 0.25)):
        with pytest.raises(ValueError, match="2 should be"):
            check_tensor(p, f, out, 2)


def test_unchanged_elements_may_use_up_the_budget():
    p, f = bf16(1, 1, 1, 0.125), bf16(1, 1, 1, 0.25)  # S = 0, 0, 0 and less than 0
    assert check_tensor(p, f, p, 3) == (0, 0)
    with pytest.raises(ValueError, match="kept that score below"):
        check_tensor(p, f, f, 3)


def test_the_config_says_what_the_files_hold(shown):
    folder, _ = shown
    for role in ("base", "finetuned", "pruned"):
        assert json.loads((folder / role / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert (folder / role / "generation_config.json").exists()
