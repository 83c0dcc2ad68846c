"""The cross entropy of texts under a language model, in nats a token.

python -P text.py PATH old=corpus.txt new=notes.txt

The text is cut into windows as long as the model can see, 1,024 tokens at most; the standard error is that of the mean
over windows.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

WINDOW = 1024
_BATCH_TOKENS = 1 << 13


def cross_entropy(model: Any, tokens: Any, window: int) -> dict[str, float]:
    """Nats a token of a text, and the standard error.

    Args:
        model: a causal language model of transformers.
        tokens: (n,) int64.
    """
    import torch

    if tokens.numel() < 2:
        raise SystemExit("the text has less than two tokens")
    window = min(window, tokens.numel())
    count = tokens.numel() // window
    device = next(model.parameters()).device
    rows = tokens[: count * window].view(count, window)
    found = []
    with torch.inference_mode():
        for part in rows.split(max(1, _BATCH_TOKENS // window)):
            part = part.to(device)
            logits = model(part).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
            found.append(losses.double().mean(1).cpu())
    means = torch.cat(found)
    error = float(means.std()) / math.sqrt(count) if count > 1 else None
    return {"loss": float(means.mean()), "tokens": count * (window - 1), **({"stderr": error} if error else {})}


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, *texts = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model.to(device).train(False)
    seen = getattr(model.config, "max_position_embeddings", None) or WINDOW
    said = {}
    for word in texts:
        skill, _, file = word.partition("=")
        text = Path(file).read_text(errors="replace")
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        said[skill] = cross_entropy(model, tokens, min(WINDOW, seen))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
