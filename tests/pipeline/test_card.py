"""pytest tests/pipeline/test_card.py: the model card of an output, read as huggingface_hub reads it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from checkpoints import digests, gaussian
from huggingface_hub import ModelCard

from fapm import prune

SHAPES = {"model.layers.0.a": (30, 40), "model.layers.1.a": (30, 40), "model.layers.0.norm": (8,), "x|`y": (5,)}

CARD = """---
license: other
license_name: llama3
license_link: LICENSE
language: [en, de]
base_model: meta/base
tags: [chat, math]
library_name: something
eval_results: {nested: [1]}
---

# Mathematician

Counts.
"""


@pytest.fixture
def pair(runner):
    runner.write(*gaussian(SHAPES, torch.bfloat16))
    for side in ("base", "finetuned"):
        (runner.folder / side / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return runner


def card_of(runner, **choices) -> ModelCard:
    out, _ = runner.prune(**choices)
    return ModelCard.load(out / "README.md")


def test_it_says_what_is_in_it_and_how_to_make_it_again(pair):
    card = card_of(pair, scope="layer", density=0.25, rules=["*norm=base"], nonfinite="base")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["fapm", "pruned", "task-vector"]
    assert card.data.base_model is None  # nothing knows what they are called on the Hub
    (command,) = [line for line in card.text.splitlines() if line.startswith("fapm prune")]
    assert shlex.split(command)[2:] == [
        "--base", "base", "--finetuned", "finetuned", "--out", "OUT", "--density", "0.25", "--scope", "layer",
        "--rule", "*norm=base", "--nonfinite", "base",
    ]  # fmt: skip
    assert "# finetuned, pruned" in card.text
    assert "of 2,405 elements 601 (24.99%) are fine-tuned" in card.text
    assert "| `model.layers.*.a` | 2 | 2,400 | 25.0% |" in card.text
    assert "| `model.layers.*.norm` | 1 | 8 | not pruned | – |" in card.text
    assert r"| `x\|'y` | 1 | 5 | 20.0% |" in card.text
    assert str(pair.folder) not in str(card)


def test_the_fine_tuned_model_s_card_is_kept_below_and_its_licence_carried_over(pair):
    (pair.folder / "finetuned" / "README.md").write_text(CARD)
    (pair.folder / "base" / "README.md").write_text(
        "---\nlicense: mit\npipeline_tag: text-generation\n---\nOf base only.\n"
    )
    card = card_of(pair)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "llama3", "LICENSE")
    assert card.data.language == ["en", "de"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == ["meta/base"]
    assert card.data.tags == ["chat", "math", "fapm", "pruned", "task-vector"]
    assert card.text.rstrip().endswith("# Mathematician\n\nCounts.")
    assert "Of base." not in card.text


def test_names_that_the_configurations_remember(pair):
    (pair.folder / "base" / "config.json").write_text(json.dumps({"_name_or_path": "meta/llama", "model_type": "l"}))
    (pair.folder / "finetuned" / "config.json").write_text(json.dumps({"_name_or_path": "/home/me/runs/7"}))
    card = card_of(pair)
    assert card.data.base_model == ["meta/llama"]
    assert card.data.library_name is None


@pytest.mark.parametrize(
    "odd",
    [
        b"\xff\xfe", b"---\n: [\n---\n", b"---\n- a\n---\n", b"---\n---", b"---\nlicense: {a: b}\ntags: 5\n---\nok",
        b"---\nlicense: !!python/object/apply:os.system ['touch pwned']\n---\n", b"x" * (2 << 20), b"",
    ],
)  # fmt: skip
def test_an_odd_card_is_no_obstacle(pair, odd):
    (pair.folder / "finetuned" / "README.md").write_bytes(odd)
    card = card_of(pair)
    assert card.data.tags == ["fapm", "pruned", "task-vector"]
    assert len(str(card)) < 1 << 20
    assert not Path("pwned").exists()


def test_the_same_card_wherever_the_output_lies_and_it_comes_back_if_it_is_lost(pair):
    one, _ = pair.prune(scope="global")
    other, _ = pair.prune(scope="global")
    assert (one / "README.md").read_bytes() == (other / "README.md").read_bytes()
    before = digests(one)
    (one / "README.md").unlink()
    assert prune(pair.recipe(one.name, scope="global")).nothing_to_do
    assert digests(one) == before


def test_a_mixture_has_no_density(pair):
    assert "`base` and `finetuned`, mixed: in every element 0.3 of the change" in str(
        card_of(pair, method="wise-ft", density=0.3)
    )
