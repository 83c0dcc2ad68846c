"""pytest tests/pipeline/checking/test_verify.py

What `verify` accepts, and that it names whatever is changed in an output.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from fapm import Recipe, UserError, prune
from fapm.checking.consumers import read_as_consumers_do
from fapm.checking.verify import verify
from fapm.formats.dtypes import itemsize
from fapm.formats.header import read_header
from fapm.storage.local import Folder

SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    "model.layers.0.mlp.weight": (24, 16),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.mlp.weight": (24, 16),
    "model.layers.1.norm.weight": (16,),
    "model.norm.weight": (16,),
}
A, B = "model.layers.0.mlp.weight", "model.layers.1.mlp.weight"


def make_pair(folder: Path, base_dtype=torch.float32, finetuned_dtype=None, step: float = 0.0) -> None:
    """A pair with tensors to pass through. A `step` makes values multiples of it, so that many scores are equal."""
    random = np.random.default_rng(7)
    base, finetuned = {}, {}
    for name, shape in SHAPES.items():
        p = random.normal(0, 0.1, shape)
        f = p + random.normal(0, 0.02, shape) * (random.random(shape) < 0.7)
        if step:
            p, f = np.round(p / step) * step, np.round(f / step) * step
        base[name] = torch.tensor(p).to(base_dtype)
        finetuned[name] = torch.tensor(f).to(finetuned_dtype or base_dtype)
    finetuned["model.new.weight"] = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    base["model.steps"], finetuned["model.steps"] = torch.tensor([1, 2]), torch.tensor([3, 4])
    for role, tensors in (("base", base), ("finetuned", finetuned)):
        (folder / role).mkdir(parents=True)
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
        (folder / role / "config.json").write_text("{}")


def pruned(folder: Path, **choices) -> Path:
    out = folder / "out"
    recipe = {"base": str(folder / "base"), "finetuned": str(folder / "finetuned"), "out": str(out)}
    prune(Recipe.of(**{"density": 0.3, "unpaired": "pass", "plain_codes": True, **recipe, **choices}))
    return out


def shard_of(out: Path, name: str) -> Path:
    for path in sorted(out.glob("*.safetensors")):
        if name in load_file(path):
            return path
    raise AssertionError(name)


def edit(out: Path, name: str, change) -> None:
    """Let `change` alter a tensor of the output, and make the checksums right again."""
    path = shard_of(out, name)
    tensors = load_file(path)
    change(tensors[name])
    stored = bytearray(path.read_bytes())
    length = int.from_bytes(stored[:8], "little")
    begin, end = json.loads(stored[8 : 8 + length])[name]["data_offsets"]
    stored[8 + length + begin : 8 + length + end] = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(stored)
    mend_checksum(out, path.name)


def mend_checksum(out: Path, shard: str) -> None:
    manifest = json.loads((out / "fapm/manifest.json").read_text())
    stored = (out / shard).read_bytes()
    for record in manifest["shards"]:
        if record["name"] == shard:
            record["xxh3_128"], record["nbytes"] = xxhash.xxh3_128_hexdigest(stored), len(stored)
    (out / "fapm/manifest.json").write_text(json.dumps(manifest))


def edit_table(out: Path, change) -> None:
    path = out / "fapm/tensors.parquet"
    table = pq.read_table(path)
    rows = {row["name"]: row for row in table.to_pylist()}
    change(rows)
    pq.write_table(pa.Table.from_pylist(list(rows.values()), schema=table.schema), path)


def both(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """base's and finetuned's float32 values of a tensor, flat."""
    return tuple(
        load_file(folder / r / "model.safetensors")[name].float().numpy().ravel() for r in ("base", "finetuned")
    )


@pytest.fixture
def run(tmp_path):
    make_pair(tmp_path)
    return pruned(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    make_pair(tmp_path)
    return pruned(tmp_path, shard_size=2048, scope="layer")


# What is right is found to be right.


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("method", ["fapm", "magnitude", "relative", "random", "dare", "wise-ft"])
@pytest.mark.parametrize("shard_size", [1024, 2**20])
def test_every_method_and_scope_passes(tmp_path, method, scope, shard_size):
    make_pair(tmp_path, step=1 / 64)
    assert verify(str(pruned(tmp_path, method=method, scope=scope, shard_size=shard_size))) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_every_dtype_passes(tmp_path, dtype, scope):
    make_pair(tmp_path, dtype)
    assert verify(str(pruned(tmp_path, scope=scope, shard_size=1024))) == []


@pytest.mark.parametrize("pair", [("float32", "bfloat16"), ("bfloat16", "float64"), ("float16", "bfloat16")])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float16", "float32"])
def test_mixed_dtypes_pass(tmp_path, pair, asked):
    make_pair(tmp_path, *(getattr(torch, name) for name in pair))
    assert verify(str(pruned(tmp_path, dtype=asked))) == []
    shutil.rmtree(tmp_path / "out")
    assert verify(str(pruned(tmp_path, dtype=asked, method="dare"))) == []


@pytest.mark.parametrize("density", [0, 0.001, 1])
@pytest.mark.parametrize("method", ["fapm", "dare", "wise-ft"])
def test_the_ends_of_the_density_pass(tmp_path, density, method):
    make_pair(tmp_path)
    assert verify(str(pruned(tmp_path, density=density, method=method))) == []


def test_replaced_nonfinite_weights_pass(tmp_path):
    make_pair(tmp_path, torch.float32, torch.bfloat16)
    path = tmp_path / "finetuned/model.safetensors"
    tensors = load_file(path)
    tensors[A][2, 3], tensors[A][4, 5] = torch.nan, torch.inf
    save_file(tensors, path)
    assert verify(str(pruned(tmp_path, nonfinite="base"))) == []


def test_added_rows_and_rules_pass(tmp_path):
    make_pair(tmp_path)
    path = tmp_path / "finetuned/model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], torch.ones(3, 16)])
    save_file(tensors, path)
    out = pruned(tmp_path, rules=["*.norm.weight=base", "model.layers.0.mlp*=finetuned"], dtype="bfloat16")
    assert verify(str(out)) == []
    edit(out, "model.embed_tokens.weight", lambda t: t[51, 2].add_(1))
    edit(out, "model.norm.weight", lambda t: t[3].add_(1))
    found = verify(str(out))
    assert len(found) == 2
    assert "'model.embed_tokens.weight': 1 element(s), the first at flat index 818, differ from finetuned" in found[0]
    assert "'model.norm.weight': 1 element(s), the first at flat index 3, differ from base" in found[1]


@pytest.mark.parametrize("method", ["fapm", "random"])
def test_chunks_and_blocks_do_not_show(tmp_path, method):
    """A tensor of several chunks, with ties and a quota that spans them."""
    random = np.random.default_rng(1)
    shape = (3, (1 << 18) + 77)
    p = random.integers(-8, 9, shape).astype(np.float32) / 8
    f = p + random.integers(-2, 3, shape).astype(np.float32) / 16
    for role, values in (("base", p), ("finetuned", f)):
        (tmp_path / role).mkdir()
        save_file({"w": torch.tensor(values)}, tmp_path / role / "model.safetensors")
    out = pruned(tmp_path, method=method)
    assert verify(str(out)) == []
    edit(out, "w", lambda t: t.view(-1)[600_000].add_(1))
    assert "flat index 600000" in " ".join(verify(str(out)))


def test_progress_adds_up_to_the_output(sharded):
    told: list[int] = []
    verify(str(sharded), progress=told.append)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sum(told) == index["metadata"]["total_size"]


def test_inputs_may_have_moved(run, tmp_path):
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"base checkpoint of this run.*--base"):
        verify(str(run))
    assert verify(str(run), base=str(tmp_path / "elsewhere")) == []


# What is wrong is named.


def test_a_kept_element_that_was_lost_is_named(run, tmp_path):
    p, _ = both(tmp_path, A)
    kept = load_file(run / "model.safetensors")[A].numpy().ravel() != p
    at = int(np.flatnonzero(kept)[5])
    edit(run, A, lambda t: t.view(-1)[at].copy_(torch.tensor(p[at])))
    (found,) = verify(str(run))
    assert A in found
    assert f"flat index {at}, are dropped and should be kept" in found


def test_a_swap_of_a_kept_and_a_dropped_element_is_named(run, tmp_path):
    p, f = both(tmp_path, A)
    out = load_file(run / "model.safetensors")[A].numpy().ravel()
    kept, dropped = int(np.flatnonzero(out != p)[2]), int(np.flatnonzero(out != f)[4])

    def swap(t):
        t.view(-1)[kept], t.view(-1)[dropped] = float(p[kept]), float(f[dropped])

    edit(run, A, swap)
    found = verify(str(run))
    assert [A in line for line in found] == [True, True]
    assert f"flat index {kept}, are dropped and should be kept" in found[0]
    assert f"flat index {dropped}, are kept and should be dropped" in found[1]


def test_a_tie_given_to_the_higher_position_is_named(tmp_path):
    make_pair(tmp_path, step=1 / 64)
    out = pruned(tmp_path, method="magnitude")
    p, f = both(tmp_path, A)
    result = load_file(out / "model.safetensors")[A].numpy().ravel()
    kept, size = result != p, np.abs(f - p)
    threshold = size[kept].min()
    first = int(np.flatnonzero(kept & (size == threshold))[0])
    last = int(np.flatnonzero(~kept & (size == threshold))[-1])
    assert first < last

    def swap(t):
        t.view(-1)[first], t.view(-1)[last] = float(p[first]), float(f[last])

    edit(out, A, swap)
    found = verify(str(out))
    assert f"flat index {first}, are dropped and should be kept" in found[0]
    assert f"flat index {last}, are kept and should be dropped" in found[1]


def test_a_value_of_neither_side_is_named(run):
    edit(run, B, lambda t: t.view(-1)[17].add_(0.5))
    (found,) = verify(str(run))
    assert found.startswith(f"tensor {B!r}: 1 element(s), the first at flat index 17, are neither")


def test_the_sign_of_a_zero_is_a_difference(tmp_path):
    make_pair(tmp_path, step=1 / 64)
    out = pruned(tmp_path)
    zero = int(np.flatnonzero(load_file(out / "model.safetensors")[B].numpy().ravel() == 0)[0])
    edit(out, B, lambda t: t.view(-1)[zero].copy_(-t.view(-1)[zero]))
    (found,) = verify(str(out))
    assert f"flat index {zero}, are neither" in found


@pytest.mark.parametrize("method", ["dare", "wise-ft"])
def test_a_wrong_rescaled_value_is_named(tmp_path, method):
    make_pair(tmp_path)
    out = pruned(tmp_path, method=method)
    edit(out, B, lambda t: t.view(-1)[9].add_(0.5))
    (found,) = verify(str(out))
    assert f"{B!r}: 1 element(s), the first at flat index 9, are neither" in found
    assert method in found


@pytest.mark.parametrize("name", ["model.new.weight", "model.steps"])
def test_an_edited_tensor_that_passes_through_is_named(run, name):
    edit(run, name, lambda t: t.view(-1)[1].add_(1))
    (found,) = verify(str(run))
    assert found.startswith(f"tensor {name!r}: 1 element(s)") or name == "model.steps"
    assert name in found
    assert "differ from finetuned" in found


def test_another_threshold_is_named(run):
    key = int(np.float32(0.01).view(np.uint32)) | 1 << 31
    edit_table(run, lambda rows: rows[A].update(threshold_key=key))
    found = verify(str(run))
    assert any(line.startswith(f"group {A!r}") and "exactly 115" in line for line in found)
    assert any(f"tensor {A!r}" in line and "are kept and should be dropped" in line for line in found)


def test_more_ties_than_there_are_is_named(run):
    edit_table(run, lambda rows: rows[A].update(ties=rows[A]["ties"] - 1))
    assert any(line.startswith(f"group {A!r}: 114 elements") for line in verify(str(run)))


def test_a_threshold_that_differs_within_a_group_is_named(sharded):
    edit_table(sharded, lambda rows: rows[A].update(threshold_key=rows[A]["threshold_key"] + 1))
    assert any("group 'model.layers.0'" in line and "one threshold" in line for line in verify(str(sharded)))


@pytest.mark.parametrize("column", ["mean_abs_base", "kept"])
def test_a_false_column_of_the_table_is_named(run, column):
    edit_table(run, lambda rows: rows[A].update({column: rows[A][column] * 2}))
    (found,) = verify(str(run))
    assert A in found
    assert "tensors.parquet says" in found


def test_a_lost_table_is_named(run):
    (run / "fapm/tensors.parquet").write_bytes(b"PAR1")
    (found,) = verify(str(run))
    assert "fapm/tensors.parquet: missing or damaged" in found


def test_a_truncated_shard_is_named(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    found = " ".join(verify(str(run)))
    assert "model.safetensors: has" in found
    assert "truncated" in found


def test_a_lost_shard_is_named(sharded):
    path = shard_of(sharded, B)
    path.unlink()
    assert verify(str(sharded)) == [f"{path.name}: missing"]


def test_a_wrong_checksum_alone_is_named(run):
    manifest = json.loads((run / "fapm/manifest.json").read_text())
    manifest["shards"][0]["xxh3_128"] = "0" * 32
    (run / "fapm/manifest.json").write_text(json.dumps(manifest))
    (found,) = verify(str(run))
    assert found.startswith("model.safetensors: its xxh3-128 is")


def test_a_flipped_bit_of_the_header_is_named(run):
    path = run / "model.safetensors"
    stored = bytearray(path.read_bytes())
    stored[8] ^= 1
    path.write_bytes(stored)
    mend_checksum(run, path.name)
    assert any("not a valid safetensors file" in line for line in verify(str(run)))


@pytest.mark.parametrize("change", ["file", "missing", "extra", "total"])
def test_a_changed_index_is_named(sharded, change):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change == "file":
        index["weight_map"][A] = index["weight_map"][B]
        assert index["weight_map"][A] != shard_of(sharded, A).name
    elif change == "missing":
        del index["weight_map"][A]
    elif change == "extra":
        index["weight_map"]["nowhere.weight"] = index["weight_map"][A]
    else:
        index["metadata"]["total_size"] += 4
    path.write_text(json.dumps(index))
    (found,) = verify(str(sharded))
    assert found.startswith("model.safetensors.index.json")
    assert {"file": A, "missing": A, "extra": "nowhere.weight", "total": "bytes in all"}[change] in found


def test_a_lost_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert verify(str(sharded)) == ["model.safetensors.index.json: missing"]


def test_tensors_left_out_added_and_reshaped_are_named(run):
    path = run / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["stranger"] = torch.ones(2)
    tensors[A] = tensors[A].reshape(16, 24)
    tensors[B] = tensors[B].double()
    save_file(tensors, path)
    mend_checksum(run, path.name)
    found = verify(str(run))
    assert len(found) == 4
    for name, what in (
        ("model.norm.weight", "missing"),
        ("stranger", "not in the inputs"),
        (A, r"[16, 24]"),
        (B, "F64"),
    ):
        assert any(repr(name) in line and what in line for line in found), (name, found)


def test_a_strange_shard_beside_the_others_is_named(run):
    save_file({"x": torch.ones(1)}, run / "model-00009-of-00009.safetensors")
    (found,) = verify(str(run))
    assert "model-00009-of-00009.safetensors" in found


# What cannot be verified.


def test_only_a_finished_run_can_be_verified(run, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no output of fapm"):
        verify(str(tmp_path / "base"))
    (run / "fapm/manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished run"):
        verify(str(run))


@pytest.mark.parametrize("role", ["base", "finetuned"])
def test_changed_inputs_are_refused(run, tmp_path, role):
    path = tmp_path / role / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "one.more": torch.ones(1)}, path)
    with pytest.raises(UserError, match=f"{role}: .*model.safetensors is not the file that was pruned"):
        verify(str(run))


# What those see who load the output.


def test_the_librarys_opinion_counts_too(tmp_path):
    """Our reader is made to see other things than are there: verify says so."""
    make_pair(tmp_path)
    folder = Folder(pruned(tmp_path))
    (name,) = [n for n in folder.files() if n.endswith(".safetensors")]
    found = read_header(folder.reader(name), name, name).tensors
    assert read_as_consumers_do(folder, name, found) == []
    first, *others = found
    assert "only one of" in read_as_consumers_do(folder, name, others)[0]
    for changed, said in (
        (replace(first, dtype="F16" if first.dtype != "F16" else "BF16"), "to the safetensors library, not"),
        (replace(first, shape=(*first.shape, 1)), "to the safetensors library, not"),
        (replace(first, offset=others[-1].offset), "its first element is another one"),
        (replace(first, nbytes=first.nbytes - 2 * itemsize(first.dtype)), "its last element is another one"),
    ):
        (problem,) = read_as_consumers_do(folder, name, [changed, *others])
        assert said in problem
        assert first.name in problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_library_reads_every_dtype_of_weights(tmp_path, dtype):
    shapes = {"matrix": (5, 7), "vector": (3,), "scalar": (), "empty": (0, 4), "cube": (2, 3, 4)}
    save_file({name: torch.rand(shape).to(dtype) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    folder = Folder(tmp_path)
    found = read_header(folder.reader("a.safetensors"), "a.safetensors", "a").tensors
    assert read_as_consumers_do(folder, "a.safetensors", found) == []


def test_a_file_that_the_library_does_not_open(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    (problem,) = read_as_consumers_do(Folder(tmp_path), "a.safetensors", [])
    assert problem.startswith("a.safetensors: the safetensors library does not open it")
