"""A small Llama, trained here from scratch on a dictionary of computing (FOLDOC) and fine-tuned on fortune cookies,
both from Debian's packages. Its skills are the cross entropy of what it has not seen of either.
"""

from __future__ import annotations

import gzip
import os
import random
import re
from pathlib import Path
from typing import Any

import torch
from needs import DEBIAN

FOLDOC, FORTUNES = DEBIAN / "usr/share/dictd/foldoc.dict.dz", DEBIAN / "usr/share/games/fortunes"
FULL = "FAPM_SEEDS" in os.environ
"""Whether the README's table is measured; else a smaller model and a part of the texts show that all of it works."""
WORDS, WIDTH, LAYERS, STEPS = (2048, 192, 4, (200, 80)) if FULL else (1024, 96, 3, (160, 60))
WINDOW = 128
LEARNED, HELD_OUT = (5_000_000, 60_000) if FULL else (600_000, 20_000)  # characters


def texts() -> dict[str, tuple[str, str]]:
    """What to learn from and what is held out, of `old` and `new`."""
    foldoc = gzip.decompress(FOLDOC.read_bytes()).decode(errors="replace")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n\n(?=\S)", foldoc) if 80 < len(entry) < 2000]
    cookies = []
    for path in sorted(FORTUNES.iterdir()):
        if path.is_file() and not path.suffix:
            cookies += [" ".join(cookie.split()) for cookie in path.read_text(errors="replace").split("\n%\n")]
    return {"old": _split(entries), "new": _split([cookie for cookie in cookies if 40 < len(cookie) < 2000])}


def _split(parts: list[str]) -> tuple[str, str]:
    random.Random(0).shuffle(parts)
    held: list[str] = []
    while sum(map(len, held)) < HELD_OUT:
        held.append(parts.pop())
    return "\n".join(parts)[:LEARNED], "\n".join(held)


def make(folder: Path, learned: dict[str, str]) -> None:
    """base/ and finetuned/ with their tokenizer, in bfloat16."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([learned["old"][:2_000_000]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=WINDOW, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    for side, skill, many, rate in zip(("base", "finetuned"), ("old", "new"), STEPS, (2e-3, 1e-3), strict=True):
        tokens = torch.tensor(tokenizer.encode(learned[skill]).ids)
        _train(model, tokens, many, rate)
        for saved in (model, fast):
            saved.save_pretrained(folder / side)


def _train(model: Any, tokens: torch.Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(tokens.numel() - WINDOW, (10,))
        batch = torch.stack([tokens[start : start + WINDOW] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
