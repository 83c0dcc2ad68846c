"""pytest tests/pipeline/formats/test_vocabulary.py: rows are compared only where they are the same token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Tensors, gaussian, load, same_bits, save

from fapm import UserError
from fapm.checking.verify import verify
from fapm.formats.checkpoint import open_checkpoint, read_config
from fapm.formats.configuration import ties
from fapm.formats.vocabulary import moved, token_ids
from fapm.planning.make import make_plan

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBEDDING: (20, 8), "model.layers.0.up.weight": (8, 8)}
CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def write(folder: Path, base: Tensors, finetuned: Tensors, base_config: Any = CAUSAL, config: Any = CAUSAL) -> None:
    save(folder / "base", base, config=base_config)
    save(folder / "finetuned", finetuned, config=config)


def with_head(side: Tensors, seed: int, rows: int = 20) -> Tensors:
    return {**side, HEAD: torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))}


def test_a_head_that_only_finetuned_stores_is_compared_with_the_embedding_it_was_tied_to(runner):
    base, finetuned = gaussian(SHAPES)
    finetuned[HEAD] = base[EMBEDDING] + 0.01 * torch.randn(20, 8)
    write(
        runner.folder, base, finetuned, CAUSAL | {"tie_word_embeddings": True}, CAUSAL | {"tie_word_embeddings": False}
    )
    out, result = runner.prune(density=0.25)
    said = [line for line in result.plan.warnings if HEAD in line]
    assert said == [f"{HEAD} is compared with {EMBEDDING}, to which base ties it"]
    head = load(out)[HEAD]
    kept = head != base[EMBEDDING]
    assert int(kept.sum()) == 40
    assert torch.equal(head[kept], finetuned[HEAD][kept])
    assert verify(str(out)) == []


def test_the_head_is_pruned_like_any_tensor_with_the_embedding_as_its_base(runner):
    base, finetuned = gaussian(SHAPES)
    finetuned[HEAD] = finetuned[EMBEDDING].clone()  # untied, and the same
    write(runner.folder, base, finetuned, CAUSAL | {"tie_word_embeddings": True})
    out = runner.pruned()
    assert same_bits(out[HEAD], out[EMBEDDING])


@pytest.mark.parametrize(
    "config", [CAUSAL | {"tie_word_embeddings": False}, {"architectures": ["LlamaModel"]}, {"model_type": "x"}, ["odd"]]
)
def test_a_head_that_base_does_not_tie_is_finetuneds(runner, config):
    base, finetuned = gaussian(SHAPES)
    write(runner.folder, base, with_head(finetuned, 1), config)
    with pytest.raises(UserError, match=rf"of finetuned's weights \(1 tensor\(s\), {HEAD} .* have no partner"):
        runner.prune()
    out, result = runner.prune(unpaired="pass")
    assert torch.equal(load(out)[HEAD], with_head(finetuned, 1)[HEAD])
    assert result.plan.added == (HEAD,)


def test_a_head_that_finetuned_ties_is_left_out_and_said_once(runner):
    base, finetuned = gaussian(SHAPES)
    write(runner.folder, with_head(base, 1), finetuned, CAUSAL, CAUSAL | {"tie_word_embeddings": True})
    out, result = runner.prune()
    assert HEAD not in load(out)
    said = [line for line in result.plan.warnings if HEAD in line]
    assert said == [f"{HEAD} is left out: finetuned ties it to {EMBEDDING}"]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False, "architectures": ["GPT2LMHeadModel"]}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["BertModel"]}, False),
        ({"architectures": 3, "tie_word_embeddings": "yes"}, False),
    ],
)
def test_where_a_configuration_ties(tmp_path, config, tied):
    save(tmp_path / "c", {"a": torch.ones(2)}, config=config)
    assert ties(read_config(open_checkpoint(str(tmp_path / "c"), "base"))) is tied


# Which row is which token.


def tokenizer(ids: dict[str, int], added: dict[str, int] | None = None) -> str:
    entries = [{"id": i, "content": token} for token, i in (added or {}).items()]
    return json.dumps({"model": {"type": "BPE", "vocab": ids}, "added_tokens": entries})


TOKENS = {f"t{i}": i for i in range(20)}


def with_tokenizers(folder: Path, base: str, finetuned: str, rows: int = 20, name: str = "tokenizer.json") -> None:
    one, _ = gaussian(SHAPES)
    _, other = gaussian({**SHAPES, EMBEDDING: (rows, 8)})
    write(folder, one, other)
    (folder / "base" / name).write_text(base)
    (folder / "finetuned" / name).write_text(finetuned)


def test_a_token_with_another_id_stops_the_run_with_an_example(runner):
    shuffled = TOKENS | {"t3": 7, "t7": 3}
    with_tokenizers(runner.folder, tokenizer(TOKENS), tokenizer(shuffled))
    with pytest.raises(UserError) as caught:
        make_plan(runner.recipe())
    said = str(caught.value)
    assert EMBEDDING in said
    assert "'t3' is 3 in base's tokenizer.json and 7 in finetuned's, and 1 more" in said
    assert "--rule" in said


@pytest.mark.parametrize("rule", [f"{EMBEDDING}=finetuned", "*embed*=prune", f"{EMBEDDING}=0.5", "*=base"])
def test_a_rule_decides_for_the_matrix(runner, rule):
    with_tokenizers(runner.folder, tokenizer(TOKENS), tokenizer(TOKENS | {"t3": 7, "t7": 3}))
    make_plan(runner.recipe(rules=[rule]))


def test_rows_added_at_the_end_are_fine(runner):
    grown = tokenizer(TOKENS, {"<new>": 20, "<other>": 21})
    with_tokenizers(runner.folder, tokenizer(TOKENS), grown, rows=22)
    assert make_plan(runner.recipe()).groups[EMBEDDING].numel == 160


def test_a_token_in_place_of_another_moves_nothing(runner):
    renamed = {token if i != 5 else "<mine>": i for token, i in TOKENS.items()}
    with_tokenizers(runner.folder, tokenizer(TOKENS), tokenizer(renamed))
    make_plan(runner.recipe())


def test_rows_that_were_added_before_the_end(runner):
    inserted = {"<new>": 0} | {token: i + 1 for token, i in TOKENS.items()}
    with_tokenizers(runner.folder, tokenizer(TOKENS), tokenizer(inserted), rows=21)
    with pytest.raises(UserError, match="'t0' is 0 in base's"):
        make_plan(runner.recipe())


def test_other_kinds_of_vocabulary_files(runner):
    with_tokenizers(runner.folder, "a\nb\nc", "b\na\nc", name="vocab.txt")
    with pytest.raises(UserError, match=r"'a' is 0 in base's vocab\.txt and 1"):
        make_plan(runner.recipe())
    (runner.folder / "base" / "vocab.json").write_text('{"a": 0}')
    (runner.folder / "finetuned" / "vocab.json").write_text('{"a": 2}')
    with pytest.raises(UserError, match=r"vocab\.json"):
        make_plan(runner.recipe())


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"model": 3}', '{"model": {"vocab": {"a": "x"}}}', '"\\ud800'])
def test_a_tokenizer_that_is_none_is_said_and_no_error(runner, broken):
    with_tokenizers(runner.folder, tokenizer(TOKENS), broken)
    assert any("tokenizer.json is not one" in line for line in make_plan(runner.recipe()).warnings)


def test_grown_without_a_tokenizer_is_said(runner):
    one, _ = gaussian(SHAPES)
    _, other = gaussian({**SHAPES, EMBEDDING: (22, 8)})
    write(runner.folder, one, other)
    assert any("no tokenizer on both sides" in line for line in make_plan(runner.recipe()).warnings)


def test_reading_token_ids():
    assert token_ids(tokenizer({"a": 0}, {"<s>": 1}).encode(), "tokenizer.json") == {"a": 0, "<s>": 1}
    unigram = json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}})
    assert token_ids(unigram.encode(), "tokenizer.json") == {"a": 0, "b": 1}
    assert moved({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 5}) == ["b"]
