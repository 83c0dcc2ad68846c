"""pytest tests/pipeline/formats/test_quantized.py: codes and scales are the weights that their own libraries make."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from checkpoints import digests, load, save
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.planning.make import make_plan

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def random(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(folder: Path, side: str = "finetuned", **choices: object) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, by keeping all or nothing of it."""
    other = "base" if side == "finetuned" else "finetuned"
    sides = {side: str(folder / "quantized"), other: str(folder / "plain")}
    out = folder / f"all-{side}"
    recipe = Recipe.of(**sides, out=str(out), density=float(side == "finetuned"), device="cpu", workers=1, **choices)
    prune(recipe)
    assert verify(str(out)) == []
    return load(out)


def block_quantized(shapes: dict[str, tuple[int, int]], block: int = 128) -> dict[str, torch.Tensor]:
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        grid = tuple(math.ceil(n / block) for n in shape)
        tensors[f"{name}.weight"] = (random(shape, i) * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = random(grid, 100 + i).abs() * 1e-3
    return tensors


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_fp8_in_blocks_is_what_transformers_makes_of_it(tmp_path, side):
    shapes = {"model.layers.0.a": (256, 384), "model.layers.0.b": (128, 128), "model.layers.1.a": (384, 256)}
    quantized = block_quantized(shapes) | {"model.norm.weight": torch.ones(7).bfloat16()}
    # The scales lie in the other shard, as they may.
    save(tmp_path / "quantized", dict(sorted(quantized.items(), key=lambda t: "scale" in t[0])), 2, {
        "model_type": "test", "torch_dtype": "float8_e4m3fn", "quantization_config": FP8,
    })  # fmt: skip
    theirs = Fp8Dequantize(SimpleNamespace(quantization_config=None))
    wanted = {
        f"{name}.weight": theirs._dequantize_one(
            quantized[f"{name}.weight"], quantized[f"{name}.weight_scale_inv"], torch.bfloat16
        )
        for name in shapes
    } | {"model.norm.weight": quantized["model.norm.weight"]}
    save(tmp_path / "plain", {name: random(t.shape, 7).bfloat16() for name, t in wanted.items()})
    found = whole(tmp_path, side, memory="64MiB")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.reshape(tensor.shape)), name
    config = json.loads((tmp_path / f"all-{side}" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config.get("torch_dtype") == ("bfloat16" if side == "finetuned" else None)


def test_blocks_at_the_edge_may_be_smaller(tmp_path):
    quantized = block_quantized({"a": (576, 200)})
    save(tmp_path / "quantized", quantized, 1, {"quantization_config": FP8})
    save(tmp_path / "plain", {"a.weight": torch.zeros(576, 200).bfloat16()})
    scales = quantized["a.weight_scale_inv"].repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(whole(tmp_path)["a.weight"], (quantized["a.weight"].float() * scales).bfloat16())


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_compressed_tensors_is_what_its_library_makes_of_it(tmp_path, scheme):
    """A scale a tensor, an output, and a block, written and read by the library itself."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            shape = module.weight_scale.shape
            parts = module.weight.reshape(shape[0] if len(shape) > 1 else 1, -1)
            if len(shape) == 2 and shape[1] > 1:
                parts = module.weight.unfold(0, 128, 128).unfold(1, 128, 128).flatten(2)
            module.weight_scale.data = (parts.abs().amax(-1) / 448).reshape(shape).to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "quantized")
    compressor.update_config(tmp_path / "quantized")
    stored = load(tmp_path / "quantized")
    assert any(t.dtype == torch.float8_e4m3fn for t in stored.values())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    ).state_dict()  # fmt: skip
    found = whole(tmp_path)
    assert found.keys() == load(tmp_path / "plain").keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[name]), name


def microscaled(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(110, 135, shape, dtype=torch.uint8, generator=generator)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    quantized, wanted = {}, {"model.norm.weight": torch.ones(5).bfloat16()}
    for i, (name, shape) in enumerate({"gate_up_proj": (3, 96, 2), "down_proj": (3, 64, 5)}.items()):
        stem = f"model.layers.0.mlp.experts.{name}"
        blocks, scales = microscaled(shape, i)
        quantized |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
        wanted[stem] = convert_moe_packed_tensors(blocks, scales)
        quantized[f"{stem}_bias"] = wanted[f"{stem}_bias"] = random((3, 4), i).bfloat16()
    quantized["model.norm.weight"] = wanted["model.norm.weight"]
    save(tmp_path / "quantized", quantized, 2, {"quantization_config": {"quant_method": "mxfp4"}})
    save(tmp_path / "plain", {name: random(t.shape).bfloat16() for name, t in wanted.items()})
    found = whole(tmp_path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_the_same_bytes_as_from_the_dequantized_checkpoint(tmp_path):
    quantized = block_quantized({f"model.layers.{i}.a": (256, 128) for i in range(4)})
    save(tmp_path / "quantized", quantized, 1, {"quantization_config": FP8})
    save(tmp_path / "plain", {n: random(t.shape, 9).bfloat16() for n, t in quantized.items() if "scale" not in n})
    save(tmp_path / "whole", whole(tmp_path))
    found = []
    for side, workers in (("quantized", 2), ("whole", 1)):
        out = tmp_path / f"of-{side}"
        sides = {"base": str(tmp_path / "plain"), "finetuned": str(tmp_path / side), "out": str(out)}
        prune(Recipe.of(**sides, density=0.3, scope="global", device="cpu", workers=workers, shard_size="70kB"))
        assert verify(str(out)) == []
        found.append({name: digest for name, digest in digests(out).items() if name.endswith(".safetensors")})
    assert found[0] == found[1]


def test_another_scale_in_the_configuration_is_another_input(tmp_path):
    save(tmp_path / "quantized", block_quantized({"a": (256, 256)}), 1, {"quantization_config": FP8})
    save(tmp_path / "plain", {"a.weight": torch.zeros(256, 256).bfloat16()})
    whole(tmp_path)
    (tmp_path / "quantized" / "config.json").write_text(json.dumps({"quantization_config": FP8, "x": 1}))
    with pytest.raises(UserError, match=r"config\.json has changed since"):
        whole(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({"a.qweight": torch.zeros(2, dtype=torch.int32)}, {"quant_method": "gptq"}, "gptq"),
        ({"a.qweight": torch.zeros(2, dtype=torch.int32)}, {"quant_method": "awq"}, "awq"),
        ({"a.weight": torch.zeros(2, dtype=torch.uint8)}, {"load_in_4bit": True}, "bitsandbytes"),
        ({"a.weight.absmax": torch.zeros(2)}, None, "bitsandbytes"),
        ({"a.qzeros": torch.zeros(2)}, None, "GPTQ or AWQ"),
        ({"a.weight": torch.zeros(2)}, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-"),
        ({"a.weight": torch.zeros(2)}, {"quant_method": "\x1b[31m" + "x" * 99}, "quantized"),
        ({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, FP8, "has no scale beside it"),
        ({"a.weight": torch.zeros(2, 2), "a.weight_scale_inv": torch.zeros(1, 1)}, FP8, "only FP8 is read here"),
        (
            {"a.weight": torch.zeros(256, 2).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.zeros(3, 7)},
            FP8, "do not fit",
        ),
        (
            {"a.weight": torch.zeros(256, 2).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.zeros(0, 7)},
            FP8, "do not fit",
        ),
        (
            {f"a_{name}": torch.zeros(shape, dtype=torch.uint8) for name, shape in
             (("blocks", (2, 3, 4, 8)), ("scales", (2, 3, 4)))},
            None, "are not MXFP4",
        ),
    ],
)  # fmt: skip
def test_other_codes_are_refused_by_name(tmp_path, tensors, config, said):
    save(tmp_path / "quantized", tensors, 1, {"quantization_config": config} if config else {})
    save(tmp_path / "plain", {"a.weight": torch.zeros(2)})
    sides = {"base": str(tmp_path / "plain"), "finetuned": str(tmp_path / "quantized"), "out": str(tmp_path / "o")}
    with pytest.raises(UserError) as error:
        make_plan(Recipe.of(**sides))
    assert said in str(error.value)
    assert "\x1b" not in str(error.value)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"only model-Q4_K_M.gguf, which is not read"):
        make_plan(Recipe.of(base=str(tmp_path / "quantized"), finetuned=str(tmp_path), out=str(tmp_path / "o")))


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_no_quantizer_writes_is_refused(tmp_path, value, dtype):
    quantized = block_quantized({"a": (256, 256)})
    scales = quantized["a.weight_scale_inv"].to(dtype)
    scales[1, 0] = value
    save(tmp_path / "quantized", quantized | {"a.weight_scale_inv": scales}, 1, {"quantization_config": FP8})
    save(tmp_path / "plain", {"a.weight": random((256, 256)).bfloat16()})
    with pytest.raises(UserError, match=r"a\.weight_scale_inv hold .*a scale is above 0"):
        whole(tmp_path)


@pytest.mark.parametrize("kind", ["MXFP4", "E8M0"])
def test_a_power_of_two_that_is_none_is_refused(tmp_path, kind):
    """255 is NaN in E8M0 (OCP Microscaling Formats 1.0, 5.4.1)."""
    powers = (
        torch.full((2, 3, 2), 127, dtype=torch.uint8) if kind == "MXFP4" else torch.full((2, 2), 127, dtype=torch.uint8)
    )
    powers.view(-1)[1] = 255
    if kind == "MXFP4":
        tensors = {"a_blocks": torch.zeros(2, 3, 2, 16, dtype=torch.uint8), "a_scales": powers}
        config, plain = {"quantization_config": {"quant_method": "mxfp4"}}, {"a": random((2, 64, 3)).bfloat16()}
    else:
        tensors = {"a.weight": random((256, 256)).to(torch.float8_e4m3fn), "a.scale": powers.view(torch.float8_e8m0fnu)}
        config, plain = {"quantization_config": FP8}, {"a.weight": random((256, 256)).bfloat16()}
    save(tmp_path / "quantized", tensors, 1, config)
    save(tmp_path / "plain", plain)
    with pytest.raises(UserError, match="hold NaN"):
        whole(tmp_path)
