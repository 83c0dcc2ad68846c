"""pytest tests/pipeline/test_delta.py: the sparse task vector gives back the bytes of the checkpoint that it is of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import gaussian, load, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pace import wait_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.delta import apply_, as_shira, patches, revert_
from fapm.formats.sparse import COLUMNS, DELTA_BLOCK, check_table, encode
from fapm.shard.delta import DeltaWriter
from fapm.storage.address import layered

SHAPES = {
    "model.embed.weight": (40, 8), "model.layers.0.a": (300, 70), "model.layers.1.a": (1 << 20, 2), "norm": (5,),
    "one": (), "empty": (0, 3),
}  # fmt: skip
ALL = ["*=finetuned"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]


def run(folder: Path, out: str, finetuned: str = "finetuned", **choices: Any) -> Path:
    sides = {"base": str(folder / "base"), "finetuned": str(folder / finetuned), "out": str(folder / out)}
    defaults: dict[str, Any] = {"device": "cpu", "workers": 1, "shard_size": "3MB"}
    prune(Recipe.of(**sides, **{**defaults, **choices}))
    assert verify(sides["out"]) == []
    return folder / out


def put_together(folder: Path, delta: str, out: str, **choices: Any) -> dict[str, torch.Tensor]:
    return load(run(folder, out, delta, rules=ALL, **choices))


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (two[name].dtype, two[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), two[name].reshape(-1).view(torch.uint8)), name


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    base, finetuned = gaussian(SHAPES, torch.bfloat16)
    save(tmp_path / "base", base | {"ids": torch.arange(7), "old": torch.ones(2)})
    save(tmp_path / "finetuned", finetuned | {"ids": torch.arange(7), "new": torch.ones(3)})
    return tmp_path


# The bytes.


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_put_together_it_is_the_pruned_checkpoint(pair, scope, compression):
    expected = load(run(pair, "whole", scope=scope))
    run(pair, "delta", scope=scope, emit="delta", delta_compression=compression, workers=2)
    same(put_together(pair, "delta", "again", workers=2), expected)
    same(put_together(pair, "delta", "again in other shards", shard_size="100kB", memory="64MiB"), expected)


@pytest.mark.parametrize("density", [0.0, 1e-5, 0.5, 1.0])
def test_any_density(pair, density):
    expected = load(run(pair, "whole", density=density))
    run(pair, "delta", density=density, emit="delta")
    same(put_together(pair, "delta", "again"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_any_dtype(tmp_path, dtype, base_dtype):
    base, finetuned = gaussian(SHAPES, torch.float32)
    save(tmp_path / "base", {name: t.to(base_dtype) for name, t in base.items()})
    save(tmp_path / "finetuned", {name: t.to(dtype) for name, t in finetuned.items()})
    expected = load(run(tmp_path, "whole", density=0.3, plain_codes=True))
    run(tmp_path, "delta", density=0.3, emit="delta", plain_codes=True)
    same(put_together(tmp_path, "delta", "again", plain_codes=True), expected)


@pytest.mark.parametrize("method", ["magnitude", "dare", "wise-ft"])
def test_any_method(pair, method):
    expected = load(run(pair, "whole", method=method, density=0.3))
    run(pair, "delta", method=method, density=0.3, emit="delta")
    same(put_together(pair, "delta", "again"), expected)


def test_both_at_once(pair):
    expected = load(run(pair, "whole"))
    same(load(run(pair, "both", emit="both")), expected)
    alone = run(pair, "delta", emit="delta")
    for path in alone.glob("delta-*"):
        assert path.read_bytes() == (pair / "both" / path.name).read_bytes()
    (pair / "moved").mkdir()
    for path in [*(pair / "both").glob("delta*"), pair / "both" / "config.json"]:
        shutil.copy(path, pair / "moved")
    same(put_together(pair, "moved", "again"), expected)


def test_extracted_it_is_finetuned(pair):
    run(pair, "delta", emit="delta", rules=ALL)
    same(put_together(pair, "delta", "again"), load(pair / "finetuned"))


def test_where_nothing_differs_nothing_is_stored(pair):
    shutil.copytree(pair / "base", pair / "same")
    delta = run(pair, "delta", "same", emit="delta", rules=ALL)
    assert all(t["as"] == "base" for t in json.loads((delta / "delta.json").read_text())["tensors"].values())
    assert sum(path.stat().st_size for path in delta.glob("delta-*")) < 1000
    same(put_together(pair, "delta", "again"), load(pair / "base"))


def test_side_files_come_along(pair):
    (pair / "finetuned" / "tokenizer.json").write_text("{}")
    run(pair, "delta", emit="delta")
    run(pair, "again", "delta", rules=ALL)
    for name in ("config.json", "tokenizer.json"):
        assert (pair / "again" / name).read_bytes() == (pair / "finetuned" / name).read_bytes()


def test_a_resumed_run_leaves_the_same(pair):
    expected = run(pair, "delta", emit="delta", shard_size="500kB")
    shutil.copytree(expected, pair / "broken")
    files = sorted((pair / "broken").glob("delta-*"))
    assert len(files) > 3
    files[1].unlink()
    (pair / "broken" / "fapm" / "manifest.json").unlink()
    for file in (pair / "broken").glob("model*"):
        raise AssertionError(file)
    sides = {"base": str(pair / "base"), "finetuned": str(pair / "finetuned"), "out": str(pair / "broken")}
    prune(Recipe.of(**sides, device="cpu", workers=2, shard_size="500kB", emit="delta"))
    for path in expected.glob("delta*"):
        assert path.read_bytes() == (pair / "broken" / path.name).read_bytes()
    assert prune(Recipe.of(**sides, device="cpu", workers=2, shard_size="500kB", emit="delta")).nothing_to_do


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    base, finetuned = gaussian({f"model.layers.{i}.w": (400, 1000) for i in range(40)}, torch.bfloat16)
    save(tmp_path / "base", base)
    save(tmp_path / "finetuned", finetuned)
    choices = {"emit": "both", "shard_size": "1MB", "scope": "global"}
    expected = run(tmp_path, "expected", **choices)
    sides = ["--base", "base", "--finetuned", "finetuned", "--out", "out"]
    command = [sys.executable, "-m", "fapm", "prune", *sides, "--emit", "both", "--shard-size", "1MB"]
    random, killed = np.random.default_rng(0), 0
    for _ in range(5):
        process = subprocess.Popen(
            [*command, "--scope", "global"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        there = len(list((tmp_path / "out").glob("delta-*")))
        wait_until(
            lambda p=process, n=there: len(list((tmp_path / "out").glob("delta-*"))) > n or p.poll() is not None,
            pause=random.uniform(0, 0.02),
        )
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed >= 2
    run(tmp_path, "out", **choices)
    for path in expected.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert json.loads((expected / "delta.json").read_text()) == json.loads((tmp_path / "out/delta.json").read_text())


def test_a_delta_can_be_pruned_further(pair):
    """It is a checkpoint like any other."""
    run(pair, "delta", emit="delta", rules=ALL)
    same(load(run(pair, "from delta", "delta", density=0.2)), load(run(pair, "from whole", density=0.2)))


def test_over_an_adapter_and_quantized_base(tmp_path):
    codes = (torch.randn(128, 128) * 50).to(torch.float8_e4m3fn)
    quantized = {"a.weight": codes, "a.weight_scale_inv": torch.full((1, 1), 1e-2)}
    save(tmp_path / "base", quantized, 1, {"quantization_config": {"quant_method": "fp8"}})
    (tmp_path / "finetuned").mkdir()
    tensors = {"a.lora_A.weight": torch.randn(2, 128), "a.lora_B.weight": torch.randn(128, 2)}
    save_file(tensors, tmp_path / "finetuned" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "finetuned" / "adapter_config.json").write_text(json.dumps(config))
    expected = load(run(tmp_path, "whole"))
    run(tmp_path, "delta", emit="delta")
    same(put_together(tmp_path, "delta", "again"), expected)


# Several, one after the other.


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two fine-tunes of one base that differ from it in different halves of a tensor; the second in a place more."""
    base = {"a": torch.zeros(1 << 20, 2).bfloat16(), "b": torch.zeros(8).bfloat16(), "c": torch.zeros(3).bfloat16()}
    save(tmp_path / "base", base)
    one = {name: t.clone() for name, t in base.items()} | {"new": torch.ones(3)}
    other = {name: t.clone() for name, t in one.items()}
    one["a"][::2, 0] = 1
    other["a"][1::2, 1] = 2
    other["a"][4, 0] = 3
    other["b"][1] = 4
    save(tmp_path / "one", one)
    save(tmp_path / "other", other)
    for side in ("one", "other"):
        run(tmp_path, f"{side}-delta", side, emit="delta", rules=ALL)
    return tmp_path


@pytest.mark.parametrize("on_conflict", ["first", "last"])
def test_several_of_one_base_are_applied_in_order(two, on_conflict):
    deltas = layered([str(two / "one-delta"), str(two / "other-delta")])
    sides = {"base": str(two / "base"), "finetuned": deltas, "out": str(two / "together")}
    prune(Recipe.of(**sides, rules=ALL, device="cpu", workers=2, on_conflict=on_conflict))
    assert verify(sides["out"]) == []
    wanted, other = load(two / "one"), load(two / "other")
    wanted["a"][1::2, 1] = 2
    wanted["b"] = other["b"]
    wanted["a"][4, 0] = 1 if on_conflict == "first" else 3
    same(load(two / "together"), wanted)


def test_where_they_do_not_agree_it_is_said(two):
    deltas = layered([str(two / "one-delta"), str(two / "other-delta")])
    sides = {"base": str(two / "base"), "finetuned": deltas, "out": str(two / "together")}
    with pytest.raises(UserError, match=r"'a': .* different values to 1 of the same places; --on-conflict"):
        prune(Recipe.of(**sides, rules=ALL, device="cpu", workers=1))
    save(two / "other", load(two / "other") | {"new": torch.zeros(3), "a": load(two / "one")["a"]})
    run(two, "third-delta", "other", emit="delta", rules=ALL)
    sides["finetuned"] = layered([str(two / "one-delta"), str(two / "third-delta")])
    with pytest.raises(UserError, match="hold 'new' whole"):
        prune(Recipe.of(**sides, rules=ALL, device="cpu", workers=1))
    prune(Recipe.of(**sides, rules=ALL, device="cpu", workers=1, on_conflict="last"))
    assert torch.equal(load(two / "together")["new"], torch.zeros(3))


def test_only_sparse_task_vectors_can_be_several(two):
    sides = {"base": str(two / "base"), "finetuned": layered([str(two / "one-delta"), str(two / "one")])}
    with pytest.raises(UserError, match="holds no sparse task vector, and only those can be several"):
        prune(Recipe.of(**sides, out=str(two / "x"), rules=ALL))


# The layout, read without our code.


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_the_layout_is_what_its_page_says(pair, compression, density):
    """The page's own loader reads it."""
    page = (Path(__file__).parents[2] / "configs" / "delta.md").read_text()
    code = page.partition("```python")[2].partition("```")[0]
    loader: dict[str, Any] = {}
    exec(code, loader)
    delta = run(pair, "delta", density=density, emit="delta", delta_compression=compression)
    expected, base = load(run(pair, "whole", density=density)), load(pair / "base")
    tensors = json.loads((delta / "delta.json").read_text())["tensors"]
    assert {about["as"] for about in tensors.values()} == {"sparse", "whole", "base"}
    for name in (name for name, about in tensors.items() if about["as"] == "sparse"):
        before = base[name].reshape(-1).view(torch.int16).numpy().view(np.uint16)
        made = torch.from_numpy(loader["load_sparse"](delta, name, before).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(made, expected[name].reshape(-1))


def test_its_size_at_a_tenth(tmp_path):
    """bfloat16: at most 2.6 bits a weight as they are, 1.8 compressed."""
    base, finetuned = gaussian({"a": (2000, 2000)}, torch.bfloat16)
    save(tmp_path / "base", base)
    save(tmp_path / "finetuned", finetuned)
    for compression, most in (("none", 2.6), ("zstd", 1.8)):
        delta = run(tmp_path, compression, emit="delta", delta_compression=compression)
        assert 8 * sum(path.stat().st_size for path in delta.glob("delta-*")) / 4e6 <= most


# One block.

blocks = st.integers(0, 600).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.uint16, n, elements=st.integers(0, 3)), hnp.arrays(np.uint16, n, elements=st.integers(0, 3))
    )
)


@settings(max_examples=200, deadline=None)
@given(pair=blocks, compress=st.booleans())
def test_any_block_comes_back(pair, compress):
    base, out = pair
    row, places, values, _ = encode(base, out, compress)
    table = np.array([row], np.int64) if out.size else np.zeros((0, COLUMNS), np.int64)
    check_table(table, "a", out.size, 2, len(places), len(values), "x")
    assert row[0] == int((base != out).sum())


def test_gaps_longer_than_a_byte():
    for gap in (253, 254, 255, 256, 509, 510, 511, 100_000):
        base = np.zeros(DELTA_BLOCK, np.uint8)
        out = base.copy()
        out[gap] = out[2 * gap + 1] = 1
        row, places, *_ = encode(base, out, False)
        assert row[0] == 2
        assert places == (bytes([255] * (gap // 255)) + bytes([gap % 255])) * 2


# What is refused.


def test_another_base_is_refused_by_name(pair):
    run(pair, "delta", emit="delta")
    base = load(pair / "base")
    save(pair / "base", base | {"old": torch.ones(3)})
    with pytest.raises(
        UserError, match=r"was made over base, and base, .*/base, is another: model.safetensors differs"
    ):
        put_together(pair, "delta", "again")


def test_other_bytes_under_the_same_header_are_noticed_before_the_shard_appears(pair):
    run(pair, "delta", emit="delta")
    path = pair / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    with safe_open(path, "pt") as opened:
        assert "model.layers.1.a" in opened.keys()  # noqa: SIM118
    data[-100_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="do not give what it was made from"):
        put_together(pair, "delta", "again")
    assert not list((pair / "again").glob("*.json"))


def test_a_sparse_task_vector_is_no_base(pair):
    run(pair, "delta", emit="delta")
    sides = {"base": str(pair / "delta"), "finetuned": str(pair / "finetuned"), "out": str(pair / "x")}
    with pytest.raises(UserError, match="holds a sparse task vector, which is no base"):
        prune(Recipe.of(**sides))


def damage(delta: Path, change: Any) -> None:
    (file,) = delta.glob("delta*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


A = "model.layers.0.a"
DAMAGES = {
    "a place beyond the end": lambda t: t[f"{A}#places"].fill_(254),
    "fewer places than it says": lambda t: t[f"{A}#places"].fill_(255),
    "a count that lies": lambda t: t[f"{A}#blocks"].__setitem__((0, 0), 7),
    "more kept than there are": lambda t: t[f"{A}#blocks"].__setitem__((0, 0), 1 << 40),
    "negative bytes": lambda t: t[f"{A}#blocks"].__setitem__((0, 3), -1),
    "a bomb": lambda t: t[f"{A}#blocks"].__setitem__((0, 2), 1 << 40),
    "unknown flags": lambda t: t[f"{A}#blocks"].__setitem__((0, 1), 64),
    "compressed, it says": lambda t: t[f"{A}#blocks"].__setitem__((0, 1), 4),
    "blocks too many": lambda t: t.update({f"{A}#blocks": torch.zeros(9, 6, dtype=torch.int64)}),
    "blocks of another shape": lambda t: t.update({f"{A}#blocks": torch.zeros(1, 4, dtype=torch.int64)}),
    "no places": lambda t: t.pop(f"{A}#places"),
    "values of another size": lambda t: t.update({f"{A}#values": torch.zeros(3, dtype=torch.uint8)}),
    "another value": lambda t: t[f"{A}#values"].__setitem__(0, t[f"{A}#values"][0] ^ 1),
    "another of a whole one": lambda t: t["new"].fill_(2),
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_is_damaged_is_refused(pair, case, compression):
    run(pair, "delta", emit="delta", shard_size="1GB", delta_compression=compression)
    damage(pair / "delta", DAMAGES[case])
    with pytest.raises(UserError):
        put_together(pair, "delta", "again")
    assert not (pair / "again" / "config.json").exists()
    assert verify(str(pair / "delta")) != []


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(format=2), lambda said: said.pop("base"), lambda said: said.update(tensors=[]),
        lambda said: said["tensors"][A].update(shape=[1 << 60]), lambda said: said["tensors"][A].update(dtype="X"),
        lambda said: said["tensors"].update({"a\x1b": said["tensors"][A]}),
        lambda said: said.update(files={"../x.safetensors": {}}), lambda said: said.update(files={"gone": {}}),
        lambda said: said["tensors"].pop(A), lambda said: said["tensors"][A].update(xxh3_128="0"),
        lambda said: said["tensors"][A].update(xxh3_128=""), lambda said: said["tensors"][A].update(kept=-1),
        lambda said: said["tensors"][A].update(kept=1 << 60), lambda said: said["tensors"][A].update(kept="1"),
        lambda said: said["tensors"][A].update(shape=[1] * 70), lambda said: said["tensors"][A].update(shape=[True]),
    ],
)  # fmt: skip
def test_a_description_that_lies(pair, change):
    run(pair, "delta", emit="delta")
    path = pair / "delta" / "delta.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    with pytest.raises(UserError):
        put_together(pair, "delta", "again")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=hnp.arrays(np.int64, (1, COLUMNS), elements=st.integers(-5, 40) | st.integers(-(2**62), 2**62)))
def test_a_table_of_any_numbers_promises_no_more_than_there_is(table):
    try:
        check_table(table, "a", 30, 2, int(table[0, 3]), int(table[0, 4]), "x", int(table[0, 5]))
    except UserError:
        return
    kept, _, plain, packed, valued, given = table[0].tolist()
    assert 0 <= kept <= 30 and 0 <= plain <= 60 and 0 <= packed <= plain and 0 <= valued <= 60 and 0 <= given <= 60


# A model that is loaded.


class Model(torch.nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.names = {name.replace(".", "_"): name for name in tensors}
        for name, tensor in tensors.items():
            holder: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(holder, part):
                    holder.add_module(part, torch.nn.Module())
                holder = getattr(holder, part)
            holder.register_buffer(last, tensor.clone())


def test_in_place_and_back(pair):
    finetuned = load(run(pair, "whole"))
    finetuned.pop("new")
    save(pair / "finetuned", finetuned)
    delta = str(run(pair, "delta", emit="delta", rules=ALL))
    base = {name: t for name, t in load(pair / "base").items() if name != "old"}
    model = Model(base)
    places = {name: t.data_ptr() for name, t in model.state_dict().items()}
    undo = apply_(model, delta)
    same(dict(model.state_dict()), finetuned)
    undo()
    same(dict(model.state_dict()), base)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == places
    state = {name: t.clone() for name, t in base.items()}
    apply_(state, delta)
    same(state, finetuned)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_taken_back_without_base(pair, compression):
    finetuned = {name: t for name, t in load(pair / "finetuned").items() if name != "new"}
    save(pair / "finetuned", finetuned)
    choices = {"emit": "delta", "rules": ALL, "delta_compression": compression}
    delta = str(run(pair, "delta", reversible=True, **choices))
    same(put_together(pair, "delta", "again"), finetuned)
    model = Model(finetuned)
    revert_(model, delta)
    same(dict(model.state_dict()), {name: t for name, t in load(pair / "base").items() if name != "old"})
    plain = str(run(pair, "plain", **choices))
    state = {name: t.clone() for name, t in finetuned.items()}
    with pytest.raises(UserError, match="was made without --reversible"):
        revert_(state, plain)
    same(state, finetuned)


def test_a_model_that_is_another_is_left_alone(pair):
    delta = str(run(pair, "delta", emit="delta"))
    base = load(pair / "base") | {"new": torch.zeros(3)}
    for change, said in (
        (lambda t: t.pop(A), "has no tensor"),
        (lambda t: t.update({A: t[A].float()}), "the model's torch.float32"),
        (lambda t: t.update({A: t[A].t()}), "the model's torch.bfloat16"),
    ):
        state = {name: t.clone() for name, t in base.items()}
        change(state)
        before = {name: t.clone() for name, t in state.items()}
        with pytest.raises(UserError, match=said):
            apply_(state, delta)
        same(state, before)


def test_patches_are_what_is_written(pair):
    delta, expected = str(run(pair, "delta", emit="delta")), load(run(pair, "whole"))
    state = {name: t.clone() for name, t in load(pair / "base").items()} | {"new": torch.zeros(3)}
    seen: set[str] = set()
    for patch in patches(delta):
        assert patch.shape == tuple(expected[patch.name].shape)
        # vLLM 0.33: fields by these names, indices of int32 or int64 or None for all of a tensor, one patch a tensor
        assert patch.dtype == patch.values.dtype == expected[patch.name].dtype
        assert patch.values.dim() == 1 and patch.name not in seen
        seen.add(patch.name)
        if patch.indices is None:
            assert patch.name == "new"
            state[patch.name].view(-1).copy_(patch.values)
        else:
            assert patch.indices.dtype == torch.int32 and bool((patch.indices.diff() > 0).all())
            state[patch.name].view(-1)[patch.indices] = patch.values
    assert A in seen
    state.pop("old")
    same(state, expected)


def test_the_file_is_put_together_piece_by_piece(pair, monkeypatch):
    save(pair / "finetuned", load(pair / "finetuned") | {"new": torch.zeros(16 << 20)})
    peaks, finish = [], DeltaWriter.finish

    def measured(self):
        tracemalloc.start()
        try:
            return finish(self)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(DeltaWriter, "finish", measured)
    delta = run(pair, "delta", emit="delta", unpaired="pass")
    assert sum(path.stat().st_size for path in delta.glob("*.safetensors")) > 64 << 20
    assert max(peaks) < 20 << 20


# The command line.


def fapm(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fapm", *args]
    return subprocess.run(command, cwd=folder, env={"PATH": "", "HOME": str(folder)},
                          capture_output=True, text=True)  # fmt: skip


def test_from_the_command_line(pair):
    extracted = fapm(pair, "extract", "--base", "base", "--finetuned", "finetuned", "--out", "delta", "--json")
    assert extracted.returncode == 0, extracted.stderr
    assert json.loads(extracted.stdout)["totals"]["delta_bytes"] > 0
    applied = fapm(pair, "apply", "--base", "base", "--delta", "delta", "--out", "again")
    assert applied.returncode == 0, applied.stderr
    assert "again: all of delta" in applied.stdout
    same(load(pair / "again"), load(pair / "finetuned"))
    assert "nothing to do" in fapm(pair, "apply", "--base", "base", "--delta", "delta", "--out", "again").stdout
    inspected = fapm(pair, "inspect", "delta")
    assert "a sparse task vector over base: " in inspected.stdout
    assert A in inspected.stdout.replace("*", "0")
    pruned = fapm(pair, "prune", "--base", "base", "--finetuned", "finetuned", "--out", "p", "--emit", "both")
    assert "bits an element" in pruned.stdout
    assert fapm(pair, "verify", "p").returncode == 0
    assert fapm(pair, "verify", "delta").returncode == 0
    run(pair, "more", "finetuned", emit="delta", density=0.2)
    several = ["apply", "--base", "base", "--delta", "delta", "--delta", "more", "--out", "several"]
    assert fapm(pair, *several).returncode == 0  # what both write is the same
    same(load(pair / "several"), load(pair / "finetuned"))
    wrong = fapm(pair, "apply", "--base", "finetuned", "--delta", "delta", "--out", "no")
    assert wrong.returncode == 1
    assert "was made over base" in wrong.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_peft_s_shira(tmp_path, dtype):
    """Merged by PEFT it is the pruned checkpoint; switched off it is base."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    for seed, side in enumerate(("base", "finetuned")):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            for number, tensor in enumerate(model.parameters()):
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) * 1e-3
                tensor.add_((noise * seed).to(dtype))
        model.save_pretrained(tmp_path / side)
    expected = load(run(tmp_path, "whole", density=0.2))
    delta = str(run(tmp_path, "delta", density=0.2, emit="delta"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    base = {name: t.clone() for name, t in model.state_dict().items()}
    wrapped, left_out = as_shira(model, delta)
    linear = {name for name in expected if "proj" in name or name == "lm_head.weight"}
    assert set(left_out) == {n for n in expected if n not in linear and not torch.equal(expected[n], base[n])}
    merged = wrapped.merge_and_unload().state_dict()
    for name in linear:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-9)


def test_too_many_changes_for_shira(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 10, bias=False))
    save(tmp_path / "base", {"0.weight": model[0].weight.detach().clone()})
    save(tmp_path / "finetuned", {"0.weight": model[0].weight.detach() + 1})
    delta = str(run(tmp_path, "delta", emit="delta", density=0.95))
    with pytest.raises(UserError, match="SHiRA of rank 4 would need more than all of them"):
        as_shira(model, delta)


def test_its_card_says_that_it_is_no_whole_checkpoint(pair):
    card = (run(pair, "delta", emit="delta", allow_code=True) / "README.md").read_text()
    assert "Not a whole checkpoint but its sparse task vector: what differs from `base`" in card
    assert "--emit delta" in card and "--allow-code --" in card
    assert "All of `delta`." in (run(pair, "again", "delta", rules=ALL) / "README.md").read_text()
