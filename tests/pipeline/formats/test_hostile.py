"""pytest tests/pipeline/formats/test_hostile.py: files from strangers are refused soon, in little memory, in one line.

The fuzzer runs for a few seconds here; for long with `FAPM_FUZZ=100000 pytest …/test_hostile.py -k fuzz`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian, load, raw_file, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fapm import Recipe, UserError, prune
from fapm.formats.adapter import read_adapter
from fapm.formats.checkpoint import open_checkpoint
from fapm.formats.header import MAX_HEADER_BYTES
from fapm.planning.make import make_plan

FUZZ = int(os.environ.get("FAPM_FUZZ", "300"))


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def with_header(folder: Path, text: bytes, data: bytes = b"") -> None:
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))


MOST = MAX_HEADER_BYTES - 64
SCRAPS = {
    "numbers": b'{"a": [' + b"1000," * (MOST // 5 - 4) + b"0]}",
    "floats": b'{"a": [' + b"1.5," * (MOST // 4 - 4) + b"0]}",
    "lists": b"[" + b"[]," * (MOST // 3 - 2) + b"0]",
    "objects": b"[" + b"{}," * (MOST // 3 - 2) + b"0]",
    "depth": b"[" * MOST,
    "metadata": b'{"__metadata__": {' + b",".join(b'"%07x":""' % i for i in range(MOST // 13)) + b"}}",
    "keys": b"{" + b",".join(b'"%07x":0' % i for i in range(MOST // 12)) + b"}",
    "offsets": b'{"a": [' + b'"data_offsets",[],[],' * (MOST // 21 - 2) + b"0]}",
    "spaces": b"{" + b" " * MOST,
    "escapes": b'{"' + b"\\u0000" * (MOST // 6 - 4) + b'": 1}',
    "a long name": b'{"' + b"a" * MOST + b'": 1}',
    "digits": b'{"a": ' + b"9" * MOST + b"}",
}
CASES = {
    **{f"a header of {what}": (lambda f, text=text: with_header(f, text)) for what, text in SCRAPS.items()},
    "a header of 100 MB": lambda f: (
        sparse(f / "model.safetensors", 200 << 20),
        (f / "model.safetensors").open("r+b").write((100 << 20).to_bytes(8, "little")),
    ),
    "a file of 1 EB in its header": lambda f: with_header(
        f, json.dumps({"a": entry(0, 1 << 60, "U8", (1 << 60,))}).encode()
    ),
    "an index that leads up": lambda f: (
        save(f, {"a": torch.ones(2)}, 2),
        (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}})),
    ),
    "an index to an absolute path": lambda f: (
        save(f, {"a": torch.ones(2)}, 2),
        (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}})),
    ),
    "an index of 1 GB": lambda f: sparse(f / "model.safetensors.index.json", 1 << 30),
    "a link out of the folder": lambda f: (
        save(f.parent / "elsewhere", {"a": torch.ones(2)}),
        (f / "model.safetensors").symlink_to("../elsewhere/model.safetensors"),
    ),
    "a side file that is a link": lambda f: (
        save(f, {"a": torch.ones(2)}),
        (f / "tokenizer.json").symlink_to("/etc/hostname"),
    ),
    "a config.json of 1 GB": lambda f: (save(f, {"a": torch.ones(2)}), sparse(f / "config.json", 1 << 30)),
    "an adapter's config of 1 GB": lambda f: (
        adapter(f, {"a.lora_A.weight": torch.ones(2, 2)}),
        sparse(f / "adapter_config.json", 1 << 30),
    ),
    "an adapter of rank 2^40": lambda f: adapter(f, {"a.lora_A.weight": torch.ones(2, 2)}, r=1 << 40),
    "an adapter of another rank": lambda f: adapter(
        f, {"a.lora_A.weight": torch.ones(2, 2), "a.lora_B.weight": torch.ones(2, 2)}, r=1 << 30
    ),
    "an adapter of what is not there": lambda f: adapter(f, {"../x.lora_A.weight": torch.ones(2, 2)}),
    "a pattern that never ends": lambda f: adapter(
        f, {"a.lora_A.weight": torch.ones(2, 2)}, rank_pattern={"(a*)*" * 20 + "b": 3}
    ),
    "patterns that could match nothing": lambda f: adapter(
        f,
        {f"m{i}.lora_{s}.weight": torch.ones(2, 2) for i in range(3000) for s in "AB"},
        rank_pattern={".?" * 149 + f"{i}": 3 for i in range(3000)},
    ),
    "a pattern that could match nothing": lambda f: adapter(
        f,
        {f"base_model.model.{'a' * 200}{i}.lora_{s}.weight": torch.ones(2, 2) for i in range(2000) for s in "AB"},
        rank_pattern={".?" * 149 + "b": 3},
    ),
    "more modules than any model": lambda f: adapter(
        f, {"a.lora_A.weight": torch.ones(2, 2)}, modules_to_save=["m"] * 1_000_000
    ),
    "an adapter's config of lists": lambda f: (
        adapter(f, {"a.lora_A.weight": torch.ones(2, 2)}),
        (f / "adapter_config.json").write_bytes(b"[" + b"[]," * (MOST // 3 - 2) + b"0]"),
    ),
    "an index of lists": lambda f: (
        save(f, {"a": torch.ones(2)}, 2),
        (f / "model.safetensors.index.json").write_bytes(b"[" + b"[]," * (MOST // 3 - 2) + b"0]"),
    ),
    "a list of folders of lists": lambda f: (
        save(f, {"a": torch.ones(2)}),
        (f / "modules.json").write_bytes(b"[" + b"[]," * (MOST // 3 - 2) + b"0]"),
    ),
    "a GGUF file": lambda f: (f / "model.gguf").write_bytes(b"GGUF" * 100),
    "a pickle": lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
}


WATCHED = """
import resource, sys, time
from fapm import Recipe, UserError
from fapm.planning.make import make_plan
recipe = Recipe.of(base="base", finetuned="finetuned", out="out")
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    make_plan(recipe)
except UserError as error:
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(time.process_time() - began, more, str(error).isprintable(), error)
"""


@pytest.mark.parametrize("case", CASES)
def test_refused_in_a_second_and_in_200_mb(tmp_path, case):
    """Of processor time, and beside what the program takes for itself."""
    save(tmp_path / "base", {"a.weight": torch.ones(2, 2)})
    (tmp_path / "finetuned").mkdir()
    CASES[case](tmp_path / "finetuned")
    command = [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert not done.stderr
    seconds, kilobytes, printable, text = done.stdout.split(" ", 3)
    assert printable == "True"
    assert "finetuned" in text and len(text) < 1000
    assert int(kilobytes) < 200_000
    assert float(seconds) < 2  # one second on a machine that does nothing else


def test_the_tensors_that_a_header_may_hold_at_most(tmp_path):
    """The largest that is read still takes little."""
    many = {f"model.layers.{i // 100}.mlp.experts.{i % 100}.w": entry(0, 0, "BF16", (0, 7)) for i in range(140_000)}
    raw_file(tmp_path / "model.safetensors", many, b"")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert len(open_checkpoint(str(tmp_path), "base").tensors) == 140_000
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_code_is_left_behind_unless_it_is_allowed(tmp_path):
    base, finetuned = gaussian({"a": (3, 4)})
    save(tmp_path / "base", base)
    config = {"model_type": "x", "auto_map": {"AutoModel": "modeling_x.X"}}
    save(tmp_path / "finetuned", finetuned, 1, config)
    (tmp_path / "finetuned" / "modeling_x.py").write_text("raise SystemExit")
    (tmp_path / "finetuned" / "tokenizer_config.json").write_text(json.dumps({"auto_map": {}, "a": "ü"}))
    (tmp_path / "finetuned" / "generation_config.json").write_text('{"a":   1}')
    sides = {side: str(tmp_path / side) for side in ("base", "finetuned")}
    for allowed in (False, True):
        out = tmp_path / f"out-{allowed}"
        result = prune(Recipe.of(**sides, out=str(out), device="cpu", workers=1, allow_code=allowed))
        assert (out / "modeling_x.py").exists() is allowed
        assert ("auto_map" in json.loads((out / "config.json").read_text())) is allowed
        assert json.loads((out / "tokenizer_config.json").read_text())["a"] == "ü"
        assert ("auto_map" in (out / "tokenizer_config.json").read_text()) is allowed
        assert (out / "generation_config.json").read_text() == '{"a":   1}'
        said = "code of finetuned is left behind: modeling_x.py, config.json's auto_map; --allow-code copies it"
        assert (said in result.plan.warnings) is not allowed
        assert prune(Recipe.of(**sides, out=str(out), device="cpu", workers=1, allow_code=allowed)).nothing_to_do


# Every tensor is accounted for.


def test_what_becomes_of_every_stored_tensor_is_reported(tmp_path):
    base, finetuned = gaussian({"a": (3, 4), "b": (5,), "c": (2, 2)})
    save(tmp_path / "base", base | {"old": torch.ones(2), "ids": torch.arange(3)})
    save(tmp_path / "finetuned", finetuned | {"new": torch.ones(3), "ids": torch.arange(3)})
    sides = {side: str(tmp_path / side) for side in ("base", "finetuned")}
    choices = {"device": "cpu", "workers": 1, "rules": ["c=base"], "unpaired": "pass"}
    result = prune(Recipe.of(**sides, out=str(tmp_path / "out"), **choices))
    assert result.manifest["accounts"] == {
        "base": {
            "counts": {"left out": 1, "not taken, finetuned's is": 1, "passed through": 1, "pruned": 2},
            "left_out": {"old": "finetuned does not have it"},
        },
        "finetuned": {"counts": {"not taken, base's is": 1, "passed through": 2, "pruned": 2}, "left_out": {}},
    }
    done = subprocess.run(
        [sys.executable, "-m", "fapm", "report", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "1 left out, 1 not taken, finetuned's is, 1 passed through, 2 pruned" in done.stdout
    assert "finetuned does not have it (1: old)" in done.stdout


def test_scales_are_made_into_others(tmp_path):
    codes = {"a.weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    codes["a.input_scale"] = torch.ones(1)
    save(tmp_path / "finetuned", codes, 1, {"quantization_config": {"quant_method": "fp8"}})
    save(tmp_path / "base", {"a.weight": torch.ones(128, 128).bfloat16()})
    sides = {side: str(tmp_path / side) for side in ("base", "finetuned")}
    accounts = make_plan(Recipe.of(**sides, out=str(tmp_path / "out"))).accounts
    assert dict(accounts["finetuned"].counts) == {"left out": 1, "made into others": 2}
    assert dict(accounts["finetuned"].left_out) == {"a.input_scale": "it is about activations in another dtype"}


# The fuzzer: whatever the bytes, a checkpoint is opened or refused, and nothing else happens.

quickly = settings(
    max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
near = st.sampled_from([0, 1, 2, 8, 16, 2**31, 2**48, 2**63, 2**64, -1, -8])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "U8", "BOOL", "X", 3]),
        "shape": st.lists(near, max_size=4) | anything,
        "data_offsets": st.lists(near, min_size=2, max_size=2) | anything,
    }
)
tensor_names = st.sampled_from(
    ["a.weight", "a.weight_scale_inv", "a_blocks", "a_scales", "a.lora_A.weight", "a.lora_B.weight", "__metadata__"]
) | st.text(max_size=8)
headers = st.dictionaries(tensor_names, entries | anything, max_size=5)


def opened_or_refused(folder: Path) -> None:
    for role in ("base", "finetuned"):
        with contextlib.suppress(UserError):
            open_checkpoint(str(folder), role)
    with contextlib.suppress(UserError):
        sides = {"base": str(folder.parent / "base"), "finetuned": str(folder)}
        plan = make_plan(Recipe.of(**sides, out=str(folder.parent / "out")))
        assert all(t.nbytes >= 0 for t in plan.tensors())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "base", {"a.weight": torch.ones(2, 2), "a_blocks": torch.ones(2)})
    (tmp_path / "x").mkdir()
    return tmp_path / "x"


@quickly
@given(header=headers | anything, data=st.binary(max_size=40), cut=st.integers(0, 3))
def test_fuzz_headers(folder, header, data, cut):
    text = json.dumps(header).encode()[cut if cut < 3 else 0 :]
    with_header(folder, text, data)
    opened_or_refused(folder)


@quickly
@given(data=st.binary(max_size=200))
def test_fuzz_files(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    opened_or_refused(folder)


@quickly
@given(index=anything | st.fixed_dictionaries({"weight_map": st.dictionaries(tensor_names, st.text(max_size=8))}))
def test_fuzz_indices(folder, index):
    save(folder, {"a.weight": torch.ones(2, 2)})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened_or_refused(folder)


@quickly
@given(config=anything, data=st.binary(max_size=30) | st.none())
def test_fuzz_configurations(folder, config, data):
    save(folder, {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)})
    said = {"quantization_config": config, "architectures": config, "text_config": config}
    (folder / "config.json").write_bytes(json.dumps(said).encode() if data is None else data)
    opened_or_refused(folder)


options = st.fixed_dictionaries(
    {"peft_type": st.sampled_from(["LORA", "TRAINABLE_TOKENS"]) | anything},
    optional={
        "r": near | anything, "lora_alpha": near | anything,
        "rank_pattern": st.dictionaries(st.text(), near) | anything,
        "alpha_pattern": anything, "use_rslora": anything, "target_parameters": anything,
        "trainable_token_indices": anything, "token_indices": anything, "init_lora_weights": anything,
    },
)  # fmt: skip


@quickly
@given(config=options | anything, shape=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_fuzz_adapters(folder, config, shape):
    with contextlib.suppress(UserError):
        read_adapter(json.dumps(config).encode(), "x")
    tensors = {f"base_model.model.a.lora_{side}.weight": torch.ones(shape) for side in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    opened_or_refused(folder)


recipes = st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), anything, max_size=4)


@quickly
@given(recipe=recipes | anything, text=st.text(max_size=60) | st.none())
def test_fuzz_recipes(folder, recipe, text):
    path = folder / "recipe.yaml"
    path.write_bytes((json.dumps(recipe) if text is None else text).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        Recipe.load(path)


def test_what_was_opened_is_what_the_library_sees(folder):
    assert load(folder.parent / "base").keys() == open_checkpoint(str(folder.parent / "base"), "base").tensors.keys()


def test_no_file_stays_open_when_one_is_refused(folder):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with_header(folder, b"{}", b"x")
        opened_or_refused(folder)
    assert len(os.listdir("/proc/self/fd")) <= before
