"""Evaluations of language models: texts, and tasks of lm-evaluation-harness, on a tiny Llama."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fapm.choosing.evaluation import Evaluation, evaluate, evaluation
from fapm.choosing.sources import Source

WORDS = [f"w{i}" for i in range(60)]
WINDOW = 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "yes", "no", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=WINDOW, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def text(folder: Path, words: int, seed: int) -> Path:
    chance = random.Random(seed)
    path = folder / f"text-{seed}.txt"
    path.write_text(" ".join(chance.choices(WORDS, k=words)))
    return path


def test_the_cross_entropy_of_a_text(llama, tmp_path):
    old, new = text(tmp_path, 500, 1), text(tmp_path, 70, 2)
    said = evaluate(evaluation([], [], [f"old={old} new={new}"]), Source("it", str(llama), ""))
    assert not said.error
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    for skill, path in (("old", old), ("new", new)):
        ids = tokenizer(path.read_text(), return_tensors="pt").input_ids[0]
        windows = [ids[i : i + WINDOW][None] for i in range(0, ids.numel() - WINDOW + 1, WINDOW)]
        with torch.no_grad():
            losses = torch.stack([model(window, labels=window).loss for window in windows]).double()
        probability = math.exp(-float(losses.mean()))
        assert said.skills[skill].value == pytest.approx(probability, rel=1e-4)
        error = float(losses.std()) / math.sqrt(len(losses)) * probability
        assert said.skills[skill].stderr == pytest.approx(error, rel=1e-3)


def task(folder: Path, name: str, seed: int) -> Path:
    """A task of choosing between two words, of 40 questions."""
    chance = random.Random(seed)
    rows = [{"q": " ".join(chance.choices(WORDS, k=5)), "a": chance.randrange(2)} for _ in range(40)]
    (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / name}.json
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: a
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return path


@pytest.mark.slow
def test_tasks_of_the_harness(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    one, two = task(tmp_path, "fapm_one", 1), task(tmp_path, "fapm_two", 2)
    asked = evaluation([], [f"old={one},{two} new={one}"], [])
    said = evaluate(asked, Source("it", str(llama), ""))
    assert not said.error, said.error
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    right = {}
    for path in (one, two):
        right[path] = 0
        for row in map(json.loads, path.with_suffix(".json").read_text().splitlines()):
            ids = tokenizer(row["q"], return_tensors="pt").input_ids
            with torch.no_grad():
                last = model(ids).logits[0, -1]
            yes, no = (float(last[tokenizer.convert_tokens_to_ids(word)]) for word in ("yes", "no"))
            right[path] += int((no > yes) == bool(row["a"]))
    assert said.skills["new"].value == pytest.approx(right[one] / 40)
    assert said.skills["old"].value == pytest.approx((right[one] + right[two]) / 80)
    share = right[one] / 40
    assert said.skills["new"].stderr == pytest.approx(math.sqrt(share * (1 - share) / 39), rel=1e-3)


@pytest.mark.slow
def test_a_task_that_there_is_not(llama, tmp_path):
    said = evaluate(Evaluation(tasks={"old": ("fapm_nothing_like_that",)}), Source("it", str(llama), ""))
    assert said.error.startswith("exit code 1") and "\n" not in said.error
