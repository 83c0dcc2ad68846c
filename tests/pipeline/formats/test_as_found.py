"""pytest tests/pipeline/formats/test_as_found.py: folders as people have them, by the situations of public reports.

Each is made with the real writers, and what comes out is loaded with the library that people would use.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Tensors, gaussian, load, save
from layouts import make, sweep
from safetensors.torch import load_file

from fapm import Recipe, UserError, prune
from fapm.checking.folder import check_folder, refused_by_transformers
from fapm.checking.verify import verify
from fapm.formats import layouts
from fapm.formats.checkpoint import open_checkpoint
from fapm.formats.header import read_header
from fapm.formats.unpaired import SMALL_SHARE
from fapm.planning.make import make_plan
from fapm.storage.local import Folder

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def recipe(folder: Path, out: str = "out", **choices: Any) -> Recipe:
    sides = {side: str(folder / side) for side in ("base", "finetuned")} | {"out": str(folder / out)}
    return Recipe.of(**sides, **{"density": 0.3, "device": "cpu", "workers": 1} | choices)


def pruned(folder: Path, out: str = "out", load_it: bool = True, **choices: Any) -> Tensors:
    """What comes out, which `verify` and transformers find nothing wrong with."""
    prune(recipe(folder, out, **choices))
    assert verify(str(folder / out), load=load_it) == []
    return load(folder / out)


def refusal(folder: Path, **choices: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(recipe(folder, **choices))
    text = str(caught.value)
    assert "\n" not in text
    return text


def noise(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape) * 0.1).to(parameter.dtype))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """base and finetuned in one file each."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    noise(model)
    model.save_pretrained(tmp_path / "finetuned")
    return tmp_path


def changed(folder: Path, tensors: Tensors, **config: Any) -> None:
    """Other tensors in finetuned, and more in its configuration."""
    path = folder / "finetuned" / "config.json"
    save(folder / "finetuned", tensors, config=json.loads(path.read_text()) | config)


# What has no partner.


def test_a_part_of_a_model_under_other_names_is_a_question(llama):
    tensors = load(llama / "finetuned")
    others = {f"net.{name}" if name != "lm_head.weight" else name: t for name, t in tensors.items()}
    changed(llama, others)
    text = refusal(llama)
    assert "20 weight(s) of finetuned and 20 of base have no partner" in text
    expected = pruned_by(llama, tensors)
    found = pruned(llama, load_it=False, renames=[text.split("--rename '")[1].split("'")[0]])
    assert all(torch.equal(found[f"net.{name}"], t) for name, t in expected.items() if name != "lm_head.weight")


def pruned_by(folder: Path, finetuned: Tensors) -> Tensors:
    """What a prune of the same tensors by base's names gives."""
    other = folder / "plain"
    shutil.copytree(folder / "base", other / "base")
    save(other / "finetuned", finetuned, config=json.loads((folder / "base" / "config.json").read_text()))
    return pruned(other)


@pytest.mark.parametrize(
    ("before", "after", "renaming"),
    [
        (".mlp.", ".feed_forward.", "*.mlp.*=*.feed_forward.*"),
        ("norm.weight", "norm.scale", ""),
        ("model.layers.", "model.blocks.", "model.layers.=model.blocks."),
    ],
)
def test_the_rename_that_is_named_works(llama, before, after, renaming):
    tensors = load(llama / "finetuned")
    changed(llama, {name.replace(before, after): t for name, t in tensors.items()})
    text = refusal(llama)
    if renaming:
        assert f"--rename '{renaming}'" in text
        found = pruned(llama, load_it=False, renames=[renaming])
        assert all(torch.equal(found[n.replace(before, after)], t) for n, t in pruned_by(llama, tensors).items())
    else:
        found = pruned(llama, load_it=False, renames=["*norm.weight=*norm.scale"])
        assert all(torch.equal(found[n.replace(before, after)], t) for n, t in pruned_by(llama, tensors).items())


def test_a_new_head_is_none_and_is_said(llama):
    tensors = load(llama / "finetuned")
    total = sum(t.numel() for t in tensors.values())
    small = torch.ones(1, int(total * SMALL_SHARE) - 2).bfloat16()
    changed(llama, tensors | {"score.weight": small})
    prune(recipe(llama))
    totals = json.loads((llama / "out/fapm/manifest.json").read_text())["totals"]
    assert (totals["weights"], totals["unpaired"]) == (total + small.numel(), small.numel())
    fine = totals["kept"] + small.numel()
    assert totals["density_of_all"] == pytest.approx(fine / totals["weights"])
    assert f"{small.numel():,} have no partner in base" in (llama / "out" / "README.md").read_text()
    changed(llama, tensors | {"score.weight": torch.ones(1, small.numel() + 99).bfloat16()})
    assert "of finetuned's weights (1 tensor(s), score.weight" in refusal(llama)
    make_plan(recipe(llama, unpaired="pass"))
    make_plan(recipe(llama, rules=["score.*=finetuned"]))


def test_a_weight_that_would_fit_is_a_question_however_small(llama):
    base, tensors = load(llama / "base"), load(llama / "finetuned")
    save(llama / "base", base | {"old.bias": torch.ones(3).bfloat16()})
    changed(llama, tensors | {"new.bias": torch.ones(3).bfloat16()})
    assert "old.bias of base [3] has the shape of new.bias of finetuned [3]" in refusal(llama)


# Layouts of one model.

SAMPLE = ["mixtral", "granitemoe", "nemotron_h", "phimoe", "hrm_text", "llava", "qwen2_vl"]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_layouts_of_the_hub_and_of_memory_are_one_model(model_type):
    """The whole list: python tests/layouts/sweep.py."""
    found = sweep.main([model_type])
    assert found
    assert set(found.values()) == {"works"}


def test_streamed_and_on_several_workers_it_is_the_same(tmp_path):
    assert sweep.make(tmp_path, "mixtral", "MixtralForCausalLM")
    for layout in (("hub", "memory"), ("memory", "hub")):
        made = []
        for memory, workers, size in (("1GiB", 1, "1GB"), ("64MiB", 2, "10kB")):
            sides = {
                "base": f"base-{layout[0]}",
                "finetuned": f"finetuned-{layout[1]}",
                "out": f"{layout[0]}-{workers}",
            }
            paths = {side: str(tmp_path / name) for side, name in sides.items()}
            prune(Recipe.of(**paths, scope="layer", device="cpu", memory=memory, workers=workers, shard_size=size))
            assert verify(paths["out"]) == []
            made.append(load(Path(paths["out"])))
        assert made[0].keys() == made[1].keys()
        assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_one_name_for_two_orders_of_elements_is_refused(tmp_path):
    """PermuteForRope and the like change what a name holds: where one side shows to be in another layout."""
    shapes = {"model.audio_tower.a.weight": (4, 4), "model.language_model.layers.0.mixer.experts.up_proj": (2, 4, 4)}
    base, finetuned = gaussian(shapes)
    base["llm.lm_head.weight"], finetuned["lm_head.weight"] = torch.ones(5, 4), torch.zeros(5, 4)
    kind = {"architectures": ["Nemotron3_5TranscribeForConditionalGeneration"]}
    name = "model.audio_tower.mixer.experts.down_projs"
    for side, tensors in (("base", base), ("finetuned", finetuned)):
        save(tmp_path / side, tensors | {name: torch.randn(2, 3, 3)}, config=kind)
    assert f"{name}, which has one name in both, is not the same in both" in refusal(tmp_path)


@pytest.mark.slow
def test_the_table_of_layouts_is_that_of_transformers():
    known = json.loads(make.TABLE.read_text())
    version = f"transformers {transformers.__version__},"
    if not known["made from"].startswith(version):
        warnings.warn(f"layouts.json is of {known['made from']}: python tests/layouts/make.py", stacklevel=1)
        return
    assert make.table() == known
    assert layouts.known_since() == known["made from"]


def test_old_names_of_layer_norms(tmp_path):
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**small))
    model.save_pretrained(tmp_path / "base")
    noise(model)
    model.save_pretrained(tmp_path / "finetuned")
    expected = pruned(tmp_path, "expected")
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
           for n, t in load(tmp_path / "base").items()}  # fmt: skip
    save(tmp_path / "base", old, config=json.loads((tmp_path / "base" / "config.json").read_text()))
    found = pruned(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_prefix_three_times(llama):
    tensors = load(llama / "finetuned")
    prefix = "model.language_model.language_model.language_model."
    thrice = {n.replace("model.", prefix, 1): t for n, t in tensors.items()}
    save(llama / "base", {n.replace("model.", "model.language_model.", 1): t for n, t in load(llama / "base").items()})
    changed(llama, thrice)
    text = refusal(llama)
    renaming = text.split("--rename '")[1].split("'")[0]
    shutil.rmtree(llama / "plain", ignore_errors=True)
    found = pruned(llama, load_it=False, renames=[renaming])
    assert found.keys() == thrice.keys()
    assert not any(torch.equal(found[name], t) for name, t in thrice.items() if "proj" in name)


# Codes.


def quantized(tensors: Tensors, scale: str, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> Tensors:
    found: Tensors = {}
    for name, t in tensors.items():
        if "proj" not in name:
            found[name] = t
            continue
        s = (t.float().abs().max() / 448).to(dtype)
        found[name] = (t.float() / s.float()).to(torch.float8_e4m3fn)
        found[name.replace("weight", scale)] = s
        found |= {name.replace("weight", key): value.clone() for key, value in more.items()}
    return found


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_codes_with_a_scale_that_is_known_by_its_name(llama, scale):
    tensors = quantized(load(llama / "finetuned"), scale)
    changed(llama, tensors)
    found = pruned(llama, density=1.0)
    for name, t in found.items():
        codes = tensors[name]
        scaled = codes.float() * tensors[name.replace("weight", scale)].float() if "proj" in name else codes
        assert torch.equal(t, scaled.bfloat16())


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "fp8"}}])
@pytest.mark.parametrize("scale", ["scale", "weight_scaling", "weight.absmax_scale", "scale_of_weight", "amax"])
def test_codes_with_another_are_refused_and_it_is_named(llama, scale, config):
    changed(llama, quantized(load(llama / "finetuned"), scale), **config)
    name = "model.layers.0.mlp.down_proj"
    text = refusal(llama)
    assert f"{name}.weight is F8_E4M3" in text
    assert f"{name}.{scale}" in text
    assert "looks like its scale" in text
    assert "looks like its scale" in refusal(llama, plain_codes=True)


def test_codes_without_any_are_refused_unless_they_are_said_to_be_plain(llama):
    plain = {name: t.to(torch.float8_e4m3fn) if "proj" in name else t for name, t in load(llama / "finetuned").items()}
    changed(llama, plain)
    assert "has no scale beside it that is known here" in refusal(llama)
    found = pruned(llama, load_it=False, density=1.0, plain_codes=True)
    assert all(torch.equal(found[name].float(), t.float()) for name, t in plain.items())


def test_blocks_whose_size_nobody_says_are_not_guessed(llama):
    tensors = load(llama / "finetuned")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    changed(llama, tensors | {name + "_scale_inv": torch.ones(2, 3)})
    assert "no configuration says the size of their blocks" in refusal(llama)
    changed(llama, tensors | {name + "_scale_inv": torch.ones(2, 3)}, quantization_config={
        "quant_method": "fp8", "weight_block_size": [16, 16],
    })  # fmt: skip
    make_plan(recipe(llama))


def test_integers_that_stand_for_weights_are_refused(llama):
    tensors = load(llama / "finetuned")
    name = "model.layers.0.mlp.down_proj.weight"
    changed(llama, tensors | {name: torch.ones(32, 48, dtype=torch.int8)})
    assert f"{name} is I8 and has no scale" in refusal(llama)


def test_modelopt_s_codes_leave_nothing_behind(llama):
    tensors = quantized(load(llama / "finetuned"), "weight_scale", input_scale=torch.tensor(0.01))
    changed(llama, tensors)
    path = llama / "finetuned" / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}))
    found = pruned(llama)
    assert found.keys() == load(llama / "base").keys()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert not (llama / "out" / "hf_quant_config.json").exists()
    path.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert "modelopt NVFP4" in refusal(llama)


def test_weights_that_claim_to_be_codes_are_refused(llama):
    changed(llama, load(llama / "finetuned"), quantization_config={"quant_method": "fp8"})
    text = refusal(llama)
    assert "says that its weights are fp8 codes, and none of its tensors holds any" in text
    assert "take quantization_config out of config.json" in text


# Which files count.


def test_a_file_beside_an_index_of_an_older_save(llama):
    """As transformers itself leaves it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.bfloat16)
    tensors = load(llama / "finetuned")
    shutil.rmtree(llama / "finetuned")
    model.save_pretrained(llama / "finetuned", max_shard_size="20KB")
    model.load_state_dict(tensors)
    model.save_pretrained(llama / "finetuned")
    assert (llama / "finetuned" / "model.safetensors.index.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama / "finetuned", dtype=torch.bfloat16).state_dict()
    found = pruned(llama, density=1.0)
    assert all(torch.equal(found[name], theirs[name]) for name in found)
    assert "model.safetensors is read, as transformers does" in " ".join(make_plan(recipe(llama, "o")).warnings)


def test_two_whole_checkpoints_in_one_folder_are_refused(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama / "base")
    model.save_pretrained(llama / "other", max_shard_size="20KB")
    for path in (llama / "other").glob("model*"):
        shutil.copy(path, llama / "finetuned")
    text = refusal(llama)
    assert "holds two checkpoints, model.safetensors and the" in text
    assert "transformers would read model.safetensors" in text


def test_half_of_the_files_and_no_index(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama / "finetuned")
    shutil.rmtree(llama / "finetuned")
    model.save_pretrained(llama / "finetuned", max_shard_size="20KB")
    (llama / "finetuned" / "model.safetensors.index.json").unlink()
    assert len(make_plan(recipe(llama)).finetuned.tensors) == 21
    next((llama / "finetuned").glob("model-00002*")).unlink()
    assert "files of model, and no index; fetch the checkpoint again" in refusal(llama)


def test_a_pipeline_is_named(llama):
    (llama / "finetuned" / "model.safetensors").rename(llama / "finetuned" / "x")
    (llama / "finetuned" / "x").unlink()
    (llama / "finetuned" / "model_index.json").write_text("{}")
    (llama / "finetuned" / "text_encoder").mkdir()
    assert "is a pipeline of several models (model_index.json); prune each by its own folder (text_encoder)" in refusal(
        llama
    )


# Models of several folders.


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    import sentence_transformers

    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that the library has moved
        from sentence_transformers import models

        modules = [models.Transformer(str(tmp_path / "bert")), models.Pooling(32), models.Dense(32, 16)]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    model.save(str(tmp_path / "base"))
    noise(model)
    model.save(str(tmp_path / "finetuned"))
    return tmp_path


@pytest.mark.parametrize("shard_size", ["1GB", "20kB"])
def test_a_model_of_several_folders_is_pruned_in_all_of_them(sentences, shard_size):
    import sentence_transformers

    prune(recipe(sentences, shard_size=shard_size, scope="global"))
    assert verify(str(sentences / "out")) == []
    model = sentence_transformers.SentenceTransformer(str(sentences / "out"), device="cpu")
    assert model.encode(["a b c"]).shape == (1, 16)
    sides = [load_file(sentences / side / "2_Dense/model.safetensors") for side in ("base", "finetuned", "out")]
    for name, out in sides[2].items():
        base, finetuned = sides[0][name], sides[1][name]
        assert bool(((out == base) | (out == finetuned)).all())
        assert 0 < int((out == finetuned).sum()) < out.numel() or out.numel() < 40
    assert torch.equal(dict(model[2].named_parameters())["linear.weight"], sides[2]["linear.weight"])
    (sentences / "out" / "2_Dense" / "model.safetensors").unlink()
    assert "2_Dense/model.safetensors: missing" in verify(str(sentences / "out"))


def test_weights_of_such_a_folder_that_are_not_read_stop_the_run(sentences):
    (sentences / "finetuned" / "2_Dense" / "model.safetensors").rename(
        sentences / "finetuned" / "2_Dense" / "pytorch_model.bin"
    )
    assert "2_Dense/pytorch_model.bin is not read; save it with safetensors" in refusal(sentences)
    assert "a sparse task vector is of one folder" in refusal_of_delta(sentences)


def refusal_of_delta(folder: Path) -> str:
    shutil.rmtree(folder / "finetuned")
    shutil.copytree(folder / "base", folder / "finetuned")
    return refusal(folder, emit="delta")


# True reasons.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"pretrained_model.{n}": v for n, v in t.items()} | {"v_head.summary.weight": torch.ones(1, 32)},
         "it is a model with a value head, as TRL saves it"),
        (lambda t: {n: torch.empty(0).bfloat16() if "layers" in n else v for n, v in t.items()},
         "DeepSpeed's ZeRO-3 saves what it has not gathered"),
        (lambda t: {f"other.{n}": v for n, v in t.items()}, "say --rename '=other.'"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_it_found(llama, change, said):
    changed(llama, change(load(llama / "finetuned")))
    assert said in refusal(llama)


# The second look.


def test_verify_sees_what_a_library_would_stumble_over(llama):
    pruned(llama)
    out, wanted = Folder(llama / "out"), open_checkpoint(str(llama / "base"), "base").tensors
    path = llama / "out" / "config.json"
    config = json.loads(path.read_text())

    def found(**changes: Any) -> str:
        path.write_text(json.dumps(config | changes))
        header = read_header(out.reader("model.safetensors"), "model.safetensors", "it")
        out.close()
        tensors = {info.name: info for info in header.tensors}
        return "; ".join(check_folder(out, tensors, wanted))

    assert found() == ""
    assert "96 rows, and config.json says vocab_size [97]" in found(vocab_size=97)
    assert "32 columns, and config.json says hidden_size 33" in found(hidden_size=33)
    assert "quantization_config speaks of codes" in found(quantization_config={"quant_method": "fp8"})
    (llama / "out" / "adapter_config.json").write_text("{}")
    assert "libraries would take the output for an adapter" in found()
    (llama / "out" / "adapter_config.json").unlink()
    (llama / "out" / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": "x.Dense"}]))
    assert "2_Dense: modules.json names it, and its weights are not there" in found()
    (llama / "out" / "modules.json").unlink()
    tensors = load(llama / "out")
    name = "model.layers.0.mlp.down_proj"
    more = {f"{name}.lora_A.default.weight": torch.ones(2, 2), f"{name}.weight_scale": torch.ones(1)}
    save(llama / "out", {n: t for n, t in tensors.items() if "norm" not in n} | more, config=config)
    assert found().count("that should have become part of the weights") == 2
    said = "; ".join(refused_by_transformers(out))
    assert "model.norm.weight: transformers' LlamaForCausalLM has no values for it" in said
    assert f"{name}.weight_scale: transformers' LlamaForCausalLM has no use for it" in said
    path.write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "LlamaForCausalLM wants another shape" in "; ".join(refused_by_transformers(out))
    path.write_text("{}")
    with pytest.raises(UserError, match="names no class of transformers"):
        refused_by_transformers(out)
