"""pytest tests/pipeline/test_plan.py: the plan is made from headers alone, and knows what can be known."""

from __future__ import annotations

import itertools
import json
import math

import oracle
import pytest
from checkpoints import MODEL_SHAPES, gaussian, raw_file, save
from hypothesis import given
from hypothesis import strategies as st
from pace import at_once

from fapm import Recipe, UserError
from fapm.formats.checkpoint import Checkpoint
from fapm.formats.tensor import TensorInfo
from fapm.planning.make import make_plan, plan_pair
from fapm.planning.plan import PairedTensor
from fapm.planning.shards import MOST_TENSORS, cut, group, group_of, index_json
from fapm.selection import to_measure
from fapm.storage.local import Folder

SIDES = {"base": "b", "finetuned": "f", "out": "o"}


def checkpoint(role: str, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Checkpoint:
    tensors, position = {}, 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * 4
        tensors[name] = TensorInfo(name, dtype, tuple(shape), "model.safetensors", position, nbytes)
        position += nbytes
    return Checkpoint(role, Folder(role), tensors, {"model.safetensors": {"size": position}}, ())


def plan_of(base: dict, finetuned: dict | None = None, **choices):
    sides = checkpoint("base", base), checkpoint("finetuned", base if finetuned is None else finetuned)
    return plan_pair(Recipe.of(**{**SIDES, **choices}), *sides)


def tensor(name: str, nbytes: int) -> PairedTensor:
    info = TensorInfo(name, "U8", (nbytes,), "x", 0, nbytes)
    return PairedTensor(name, "finetuned", None, info, "U8", (nbytes,), nbytes, 0, "", nbytes)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120))
def test_every_tensor_lies_in_one_shard_in_order_within_its_size(sizes, shard_size):
    tensors = [tensor(f"t{i:03d}", n) for i, n in enumerate(sizes)]
    shards = cut(tensors, shard_size)
    assert [t.name for s in shards for t in s.tensors] == [t.name for t in tensors]
    assert [s.index for s in shards] == list(range(len(shards)))
    for shard in shards:
        assert shard.tensors or not tensors
        assert sum(t.nbytes for t in shard.tensors) <= shard_size or sum(t.nbytes > 0 for t in shard.tensors) == 1
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        ends = list(itertools.accumulate(t.nbytes for t in shard.tensors))
        assert {n: e["data_offsets"] for n, e in header.items()} == {
            t.name: [end - t.nbytes, end] for t, end in zip(shard.tensors, ends, strict=True)
        }
        assert shard.nbytes == len(shard.header) + (ends[-1] if ends else 0)
    assert len(shards) <= 2 * math.ceil(sum(sizes) / shard_size) + 1
    assert cut(tensors, shard_size) == shards


def test_many_small_tensors_are_cut_by_their_number():
    tensors = [tensor(f"t{i:06d}", 4) for i in range(50_000)]
    shards = cut(tensors, 1 << 30)
    assert [t for s in shards for t in s.tensors] == tensors
    assert len(shards) == 4
    assert max(len(s.tensors) for s in shards) - min(len(s.tensors) for s in shards) <= 1
    few = [tensor("a", 1 << 20), *tensors[:40_000]]  # bytes and number far apart
    assert all(len(s.tensors) <= MOST_TENSORS for s in cut(few, 1 << 30))


def test_the_names_of_the_shards():
    three = cut([tensor(f"t{i}", 10) for i in range(3)], 10)
    assert [s.name for s in three] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert cut([tensor("t", 10)], 10)[0].name == "model.safetensors"
    index = index_json(three)
    assert index["metadata"] == {"total_size": 30}
    assert index["weight_map"] == {t.name: s.name for s in three for t in s.tensors}


LAYERS = {
    "model.layers.7.self_attn.q_proj.weight": "model.layers.7",
    "model.layers.17.mlp.experts.3.w1.weight": "model.layers.17",
    "model.layers.3.block_sparse_moe.experts.2.w1.weight": "model.layers.3",
    "model.layers.0.input_layernorm.weight": "model.layers.0",
    "transformer.h.7.attn.c_attn.weight": "transformer.h.7",
    "h.7.attn.c_attn.weight": "h.7",
    "bert.encoder.layer.11.attention.self.query.weight": "bert.encoder.layer.11",
    "encoder.layer.11.output.dense.bias": "encoder.layer.11",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "encoder.block.0",
    "decoder.block.0.layer.2.DenseReluDense.wi.weight": "decoder.block.0",
    "gpt_neox.layers.5.mlp.dense_h_to_4h.weight": "gpt_neox.layers.5",
    "0.auto_model.encoder.layer.3.output.dense.weight": "0.auto_model.encoder.layer.3",
    "model.vision_tower.encoder.layers.2.fc1.weight": "model.vision_tower.encoder.layers.2",
}
ALONE = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "transformer.wte.weight", "shared.weight",
    "bert.embeddings.position_embeddings.weight", "encoder.final_layer_norm.weight", "bert.pooler.dense.bias",
    "cls.predictions.bias", "weight", "model.layers.7", "fc1.weight", "layer7.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_of_a_tensor(name):
    assert group_of(name, "layer") == LAYERS[name] == oracle.group_of(name, "layer")
    assert group_of(name, "tensor") == name
    assert group_of(name, "global") == group_of("anything", "global")


@pytest.mark.parametrize("name", ALONE)
def test_a_tensor_outside_any_block_is_a_group_of_its_own(name):
    assert group_of(name, "layer") == name


def test_layers_one_and_ten_are_two():
    assert group_of("model.layers.1.a", "layer") != group_of("model.layers.10.a", "layer")


def test_an_encoder_s_block_is_not_the_decoder_s():
    assert group_of("encoder.block.1.x.weight", "layer") != group_of("decoder.block.1.x.weight", "layer")


@given(
    st.dictionaries(st.sampled_from([f"h.{i}.{n}" for i in range(3) for n in "abc"] + ["x", "y"]), st.integers(0, 300)),
    st.floats(0, 1),
    st.sampled_from(["tensor", "layer", "global"]),
)
def test_groups_and_their_budgets(sizes, density, scope):
    if not sizes:
        return
    plan = plan_of({n: (size,) for n, size in sizes.items()}, density=density, scope=scope, shard_size=1024)
    expected: dict[str, int] = {}
    for name, size in sizes.items():
        key = oracle.group_of(name, scope)
        expected[key] = expected.get(key, 0) + size
    found = {g.numel: g for g in plan.groups.values()}
    assert sorted(g.numel for g in plan.groups.values()) == sorted(expected.values())
    for g in found.values():
        assert g.k == int(g.numel * density)
    for name, g in plan.groups.items():
        shards = {s.index for s in plan.shards for t in s.tensors if t.group == name}
        assert g.cross_shard == (len(shards) > 1)
        assert g.tensors == sum(t.group == name for t in plan.tensors())


def test_k_is_the_integer_part_of_the_float_product():
    for numel, density in ((100, 0.29), (1000, 0.1), (30, 0.1), (9, 0.1), (7, 1 / 7), (2048 * 5632, 0.1)):
        plan = plan_of({"w": (numel,)}, density=density)
        assert plan.groups["w"].k == int(numel * density)


VOCABULARY = [
    "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "transformer.wte.weight", "shared.weight",
    "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias",
    "embed_out.weight", "gpt_neox.embed_in.weight", "encoder.embed_tokens.weight", "output.weight",
    "tok_embeddings.weight", "model.language_model.embed_tokens.weight",
]  # fmt: skip
NOT_VOCABULARY = [
    "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate.weight", "transformer.wpe.weight",
    "model.norm.weight", "bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
    "rwkv.blocks.0.attention.output.weight", "encoder.layers.3.overhead.weight", "blocks.2.attn.score_head.weight",
    "model.decoder.embed_positions.weight", "model.layers.4.shared.weight", "model.layers.0.self_attn.head.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARY)
def test_rows_added_to_a_vocabulary_matrix_are_taken_from_finetuned(name):
    width = () if name.endswith("bias") else (8,)
    plan = plan_of({name: (10, *width)}, {name: (13, *width)}, density=0.5)
    (t,) = plan.tensors()
    assert t.action == "prune"
    assert t.shape == (13, *width)
    assert t.common == 10 * math.prod(width)
    assert plan.groups[name].k == t.common // 2
    assert any("10 → 13 rows" in line for line in plan.warnings)


@pytest.mark.parametrize("name", VOCABULARY)
def test_rows_taken_away_or_other_columns_are_an_error(name):
    for base, finetuned in (((13, 8), (10, 8)), ((10, 8), (10, 9)), ((10, 8), (13, 9)), ((10, 8), (10, 8, 1))):
        with pytest.raises(UserError, match="another shape"):
            plan_of({name: base, "w": (3,)}, {name: finetuned, "w": (3,)})


@pytest.mark.parametrize("name", NOT_VOCABULARY)
def test_rows_added_to_any_other_matrix_are_an_error(name):
    with pytest.raises(UserError, match="another shape"):
        plan_of({name: (10, 8), "w": (3,)}, {name: (13, 8), "w": (3,)})


def test_a_rule_takes_the_common_rows_of_any_matrix():
    plan = plan_of({"w": (10, 8)}, {"w": (13, 8)}, rules=["w=prune"])
    assert [t.common for t in plan.tensors()] == [80]


def test_all_wrong_shapes_are_counted_and_some_are_named():
    base = {f"w{i}": (i + 1, 2) for i in range(9)}
    with pytest.raises(UserError, match=r"9 tensor\(s\).*w0 \(base \[1, 2\], finetuned \[2, 1\]\)"):
        plan_of(base, {n: s[::-1] if s != (2, 2) else (4,) for n, s in base.items()})


def test_two_models_without_a_name_in_common():
    with pytest.raises(UserError, match="no tensor name in common"):
        plan_of({"a": (3,)}, {"b": (3,)})


def test_a_rule_that_matches_nothing_is_mentioned():
    plan = plan_of({"a": (3,)}, rules=["*.bias=base", "a=base"])
    assert any("'*.bias=base' matches no tensor" in line for line in plan.warnings)
    assert not any("'a=base'" in line for line in plan.warnings)


def test_the_bytes_that_will_be_read_and_written():
    plan = plan_of({"h.0.a": (1000,), "h.0.b": (1000,), "x": (500,)}, scope="layer", shard_size=4096, rules=["x=base"])
    assert plan.pair_bytes == 4 * (2 * 1000 + 2 * 1000 + 500)
    assert to_measure(plan) == 4 * 4000
    assert plan.write_bytes == sum(len(s.header) for s in plan.shards) + 4 * 2500


def test_no_weight_is_read(runner):
    """A plan of files whose tensors are holes of a terabyte each."""
    for side in ("base", "finetuned"):
        header = {"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
        path = raw_file(runner.folder / side / "model.safetensors", header, b"")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + 2**40)
    plan = make_plan(runner.recipe())
    assert plan.groups["w"].k == int(2**38 * 0.1)


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(runner):
    test_no_weight_is_read(runner)
    with pytest.raises(UserError, match=r"needs 1\.1 TB and its disk has"):
        runner.prune("out")
    assert not (runner.folder / "out").exists()


def test_the_plan_depends_on_no_order(runner):
    base, finetuned = gaussian(MODEL_SHAPES)
    runner.write(base, finetuned, shards=(2, 3))
    first = make_plan(runner.recipe("out", shard_size="2kB"))
    save(runner.folder / "finetuned", dict(reversed(finetuned.items())), 5)
    again = make_plan(runner.recipe("out", shard_size="2kB"))
    assert [s.header for s in first.shards] == [s.header for s in again.shards]
    assert [t.name for t in first.tensors()] == sorted(MODEL_SHAPES)


def test_a_hundred_thousand_tensors_are_planned_in_seconds():
    shapes = {f"model.layers.{i // 1000}.experts.{i % 1000}.w.weight": (64, 32) for i in range(100_000)}
    for scope in ("tensor", "layer"):
        with at_once(30):
            plan = plan_of(shapes, scope=scope, shard_size="8MB", rules=["*.bias=base", "*norm*=finetuned"])
        assert sum(len(s.tensors) for s in plan.shards) == 100_000
        assert len(plan.groups) == (100_000 if scope == "tensor" else 100)


def test_a_dtype_changes_the_size_of_what_is_written():
    plan = plan_of({"a": (1000,)}, dtype="bfloat16")
    assert sum(t.nbytes for t in plan.tensors()) == 2000


def test_half_a_surrogate_in_a_name_is_no_traceback(runner):
    header = '{"a\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    for side in ("base", "finetuned"):
        raw_file(runner.folder / side / "model.safetensors", header.encode(), bytes(8))
    with pytest.raises(UserError):
        runner.prune()


def test_a_group_is_a_function_of_the_shards_only():
    plan = plan_of({"h.0.a": (10,), "h.0.b": (30,)}, scope="layer", density=0.5)
    assert group(plan.shards) == plan.groups
    assert plan.groups["h.0"].k == 20


def test_each_density_of_a_group_adds_to_its_budget():
    shapes = {"h.0.a": (10,), "h.0.b": (30,), "h.0.c": (7,), "h.1.a": (10,)}
    for scope, budgets in {
        "tensor": {"h.0.a": 5, "h.0.b": 3, "h.0.c": 0, "h.1.a": 5},
        "layer": {"h.0": int(7 * 0 + 30 * 0.11 + 10 * 0.5), "h.1": 5},
        "global": {"all": int(7 * 0 + 30 * 0.11 + 20 * 0.5)},
    }.items():
        plan = plan_of(shapes, scope=scope, density=0.5, rules=["*.b=0.11", "*.c=0"])
        assert {name: g.k for name, g in plan.groups.items()} == budgets
        assert {t.name: t.parameter for t in plan.tensors()} == {"h.0.a": 0.5, "h.0.b": 0.11, "h.0.c": 0, "h.1.a": 0.5}
