"""pytest tests/pipeline/formats/test_checkpoint.py: folders as found in the wild: a checkpoint or one error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import gaussian, raw_file, save
from pace import at_once

from fapm.errors import UserError
from fapm.formats.checkpoint import open_checkpoint

TENSORS = {"a": torch.ones(3), "b": torch.zeros(2, 2), "c": torch.arange(4)}


def error_of(folder: Path) -> str:
    with at_once(1), pytest.raises(UserError) as caught:
        open_checkpoint(str(folder), "finetuned")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("finetuned: ")
    return text


def index_of(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_one_file_or_many(tmp_path, shards):
    found = open_checkpoint(str(save(tmp_path / "c", TENSORS, shards)), "base")
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()} == {
        "a": ("F32", (3,), 12), "b": ("F32", (2, 2), 16), "c": ("I64", (4,), 32)
    }  # fmt: skip
    assert found.nbytes == 60
    assert len(found.identity) == shards
    assert found.warnings == ()
    for tensor in found.tensors.values():
        data = (tmp_path / "c" / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == TENSORS[tensor.name].numpy().tobytes()


def test_no_folder(tmp_path):
    assert "no folder" in error_of(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder(tmp_path):
    save(tmp_path, TENSORS)
    assert "is a file; give the folder" in error_of(tmp_path / "model.safetensors")


def test_an_empty_folder(tmp_path):
    assert "no safetensors" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickled_weights_only(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    text = error_of(tmp_path)
    assert name in text
    assert "--allow-pickle" in text or "save it as safetensors first" in text


def test_an_adapter(tmp_path):
    save(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert "holds a LoRA adapter without its adapter_config.json" in error_of(tmp_path)


def test_a_directory_with_a_weights_name(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "no safetensors" in error_of(tmp_path)
    save(tmp_path / "x", TENSORS, 2)
    (tmp_path / "x" / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "x" / "model-00001-of-00002.safetensors").mkdir()
    assert "model-00001-of-00002.safetensors" in error_of(tmp_path / "x")


def test_a_pipe_with_a_weights_name_blocks_nobody(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "no safetensors" in error_of(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "'model-00002-of-00003.safetensors'" in error_of(tmp_path)


def test_a_shard_that_lies_is_named(tmp_path):
    save(tmp_path, TENSORS, 3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in error_of(tmp_path)
    assert "truncated" in error_of(tmp_path)


HOSTILE_FILES = [
    "../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "./model.safetensors", ".", "..", "",
    "model.safetensors\0", "model.safetensors\n", "..\\outside.safetensors", "\ud800.safetensors", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("file", HOSTILE_FILES)
def test_an_index_reaches_nothing_but_files_of_its_folder(tmp_path, file):
    save(tmp_path / "c", TENSORS)
    save(tmp_path / "c" / "sub", TENSORS)
    save(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index_of(tmp_path / "c", {"a": file})
    error_of(tmp_path / "c").encode()


def test_an_index_of_an_absolute_path(tmp_path):
    save(tmp_path / "other", TENSORS)
    (tmp_path / "c").mkdir()
    index_of(tmp_path / "c", {"a": str(tmp_path / "other" / "model.safetensors")})
    error_of(tmp_path / "c")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"5", b"{}", b'{"weight_map": null}', b'{"weight_map": []}', b'{"weight_map": {}}',
        b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": ["model.safetensors"]}}', b'{"weight_map": "model"}',
        b'\xff\xfe{"weight_map"', b"[" * 100_000, b'{"weight_map":' * 50_000, b'{"weight_map": ' + b"9" * 9000 + b"}",
    ],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path, text):
    save(tmp_path, TENSORS)
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    assert "is not an index" in error_of(tmp_path)


def test_several_indices(tmp_path):
    save(tmp_path, TENSORS, 2)
    index_of(tmp_path, {"a": "model.safetensors"}, "model.fp16.safetensors.index.json")
    assert "several indices" in error_of(tmp_path)


def test_the_headers_are_the_truth_where_the_index_does_not_agree(tmp_path):
    save(tmp_path, TENSORS, 2)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index_of(tmp_path, {"a": files[1], "b": files[0]})
    found = open_checkpoint(str(tmp_path), "base")
    assert found.tensors.keys() == TENSORS.keys()
    assert found.tensors["a"].file == files[0]
    text = " ".join(found.warnings)
    assert "'c' is in a file and not in the index" in text
    assert "'a' (and 1 more) is in another file than the index says" in text
    index_of(tmp_path, {"a": files[0], "b": files[1], "c": files[1], "gone": files[0]})
    assert "the index names 'gone', and none of its files has it" in error_of(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    save(tmp_path, TENSORS, 2)
    raw = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(raw)
    assert "is in both" in error_of(tmp_path)


def test_shards_without_an_index(tmp_path):
    save(tmp_path, TENSORS, 3)
    (tmp_path / "model.safetensors.index.json").unlink()
    found = open_checkpoint(str(tmp_path), "base")
    assert found.tensors.keys() == TENSORS.keys()
    assert "no index" in found.warnings[0]


def test_consolidated_weights_beside_others_are_ignored_and_said(tmp_path):
    save(tmp_path, TENSORS, 2)
    raw_file(tmp_path / "consolidated.safetensors", {}, b"")
    for index in (True, False):
        if not index:
            (tmp_path / "model.safetensors.index.json").unlink()
        found = open_checkpoint(str(tmp_path), "base")
        assert found.tensors.keys() == TENSORS.keys()
        assert any("consolidated.safetensors" in line and "ignored" in line for line in found.warnings)


def test_a_hub_cache_is_made_of_links(tmp_path):
    save(tmp_path / "blobs", TENSORS)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    found = open_checkpoint(str(snapshot), "base")
    assert found.tensors.keys() == TENSORS.keys()
    assert found.side_files == ("config.json",)


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    assert "no safetensors" in error_of(tmp_path)


def test_the_identity_notices_another_file(tmp_path):
    folder = save(tmp_path, TENSORS)
    path = folder / "model.safetensors"
    first = open_checkpoint(str(folder), "base").identity
    assert open_checkpoint(str(folder), "base").identity == first
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_checkpoint(str(folder), "base").identity != first
    save(folder, {**TENSORS, "a": TENSORS["a"].to(torch.int32)})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_checkpoint(str(folder), "base").identity != first  # same size, same time, another header


def test_what_comes_along_and_what_stays_behind(tmp_path):
    save(tmp_path, TENSORS)
    along = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt",
        "chat_template.jinja", "LICENSE", "modeling_x.py", "1_Pooling/config.json", "special_tokens_map.json",
    }  # fmt: skip
    behind = {
        "pytorch_model.bin", "optimizer.pt", "model.gguf", "tf_model.h5", "trainer_state.json", ".git/config.json",
        "checkpoint-500/config.json", "runs/x/events.txt", "pytorch_model.bin.index.json", "rng_state.pth", ".env.json",
        "model.onnx", "training_args.bin", "fapm/recipe.yaml", "original/params.json", "flax_model.msgpack",
    }  # fmt: skip
    for name in along | behind:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(open_checkpoint(str(tmp_path), "finetuned").side_files) == along


def test_a_hundred_thousand_tensors_open_in_seconds(tmp_path):
    entry = {"dtype": "BF16", "shape": [0, 2048], "data_offsets": [0, 0]}
    raw_file(tmp_path / "model.safetensors", {f"model.layers.{i}.weight": entry for i in range(100_000)}, b"")
    with at_once(15):
        assert len(open_checkpoint(str(tmp_path), "base").tensors) == 100_000


def test_a_checkpoint_without_a_tensor(tmp_path, runner):
    base, finetuned = gaussian({"w": (10,)})
    runner.write(base, finetuned)
    raw_file(runner.folder / "finetuned" / "model.safetensors", {}, b"")
    with pytest.raises(UserError):
        runner.prune()


def test_a_file_too_large_to_come_along_is_said_and_a_tokenizer_refused(tmp_path):
    save(tmp_path / "c", {"a": torch.ones(2)})
    for name in ("notes.md", "tokenizer.json"):
        with (tmp_path / "c" / name).open("wb") as file:
            file.truncate(257 << 20)
        if name == "notes.md":
            opened = open_checkpoint(str(tmp_path / "c"), "finetuned")
            assert "notes.md" in opened.warnings[-1] and "256 MiB" in opened.warnings[-1]
        else:
            with pytest.raises(UserError, match=r"tokenizer\.json has 269484032 bytes, more than any tokenizer"):
                open_checkpoint(str(tmp_path / "c"), "finetuned")
