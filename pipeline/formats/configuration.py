"""A model's configuration, brought in line with the tensors that are written beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

_WITH_A_HEAD = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM", "PreTraining")
_OF_CODES = ("quantization_config", "compression_config")


def followed(
    config: dict[str, Any],
    dtype: str | None = None,
    quantized: bool = False,
    vocabulary: tuple[Collection[int], int] | None = None,
    untied: bool = False,
) -> dict[str, Any]:
    """config.json as it describes an output; nested configurations too.

    Args:
        dtype: of the weights, if it is another than finetuned's.
        quantized: finetuned's weights were codes, and the output's are not.
        vocabulary: the rows that either input has for its tokens, and those of the output.
        untied: the output has a head of its own where the configuration may say that the embedding serves as one.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if quantized and key in _OF_CODES:
            continue
        found[key] = followed(value, dtype, quantized, vocabulary, False) if isinstance(value, dict) else value
    for key in ("dtype", "torch_dtype"):
        if dtype and isinstance(found.get(key), str):
            found[key] = dtype
    if vocabulary and type(found.get("vocab_size")) is int and found["vocab_size"] in vocabulary[0]:
        found["vocab_size"] = vocabulary[1]
    if untied:
        for part in _parts(found):
            if part is found or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    return found


def ties(config: dict[str, Any]) -> bool:
    """Whether a model takes its embedding for its head.

    `tie_word_embeddings` says so, at the top or in the part about the text; where it says nothing, models with a head
    do, since transformers leaves out what is its default.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return any(isinstance(name, str) and name.endswith(_WITH_A_HEAD) for name in names)


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)
