"""The demonstration: a small Llama and its fine-tuned twin, pruned, and held against the formula in float64.

It needs no network and no model library, and writes what any of them loads:

    folder/base         one file
    folder/finetuned    two shards and an index; base plus a small change
    folder/pruned       what the prune makes of them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fapm.errors import UserError
from fapm.formats.checkpoint import open_checkpoint
from fapm.formats.dtypes import bits, round_to, upcast
from fapm.formats.header import build_header
from fapm.formats.tensor import TensorInfo
from fapm.layout import INDEX
from fapm.recipe import Recipe
from fapm.run import Result, prune
from fapm.schedule import Watch
from fapm.storage.address import open_store
from fapm.storage.store import Store

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 128, 352, 4, 4, 2, 2048

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2}

WEIGHT_STD, CHANGE_STD = 0.02, 1e-3

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo's prune, and a sentence that says what was checked."""

    result: Result
    checked: str


def demo(folder: Path, watch: Watch) -> DemoResult:
    """Make the pair unless it is there, prune it, and check the result.

    Raises:
        UserError: the folder holds something else, or the result is not what the formula gives.
    """
    base, finetuned = pair()
    one = {"model.safetensors": base}
    names = sorted(finetuned)
    half = len(names) // 2
    two = {
        "model-00001-of-00002.safetensors": {name: finetuned[name] for name in names[:half]},
        "model-00002-of-00002.safetensors": {name: finetuned[name] for name in names[half:]},
    }
    for role, files in (("base", one), ("finetuned", two)):
        _write_checkpoint(folder / role, files)
    recipe = Recipe.of(base=str(folder / "base"), finetuned=str(folder / "finetuned"), out=str(folder / "pruned"))
    result = prune(recipe, watch=watch)
    if result.nothing_to_do:
        watch.say(f"{recipe.out} was finished before: nothing to prune")
    return DemoResult(result, check(folder / "base", folder / "finetuned", folder / "pruned", recipe.density))


def pair() -> tuple[Tensors, Tensors]:
    """base's and finetuned's tensors, bits of bfloat16 (uint16); the same every time."""
    random = np.random.default_rng(2509_08255)
    base, finetuned = {}, {}
    for name, shape in shapes().items():
        weights = random.standard_normal(shape, np.float32) * np.float32(WEIGHT_STD)
        if name.endswith("norm.weight"):
            weights += 1
        base[name] = round_to(weights, "BF16")
        change = random.standard_normal(shape, np.float32) * np.float32(CHANGE_STD)
        finetuned[name] = round_to(upcast(base[name]) + change, "BF16")
    return base, finetuned


def shapes(
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    kv: int = HIDDEN // HEADS * KV_HEADS,
    vocabulary: int = VOCABULARY,
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama of these sizes; by default of the one that CONFIG describes."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "mlp.down_proj.weight": (hidden, intermediate),
            layer + "mlp.gate_proj.weight": (intermediate, hidden),
            layer + "mlp.up_proj.weight": (intermediate, hidden),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "self_attn.q_proj.weight": (hidden, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _write_checkpoint(folder: Path, files: dict[str, Tensors]) -> None:
    """Write a checkpoint's files, config.json last. What is there already is left as it is, or refused."""
    contents = {name: _safetensors(tensors) for name, tensors in files.items()}
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        total = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        contents[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    contents["generation_config.json"] = _json(GENERATION_CONFIG)
    contents["config.json"] = _json(CONFIG)
    out = open_store(str(folder))
    strange = sorted(
        n for n in out.files() if not n.startswith("fapm/") and (n not in contents or out.read(n) != contents[n])
    )
    if strange:
        raise UserError(f"{folder / strange[0]} is there and not the demo's; give the demo an empty folder")
    for name, content in contents.items():
        if not out.has(name):
            out.write(name, content)
    out.remove_folder("fapm")  # where files lie while they are written


def _safetensors(tensors: Tensors) -> bytes:
    header = build_header((name, "BF16", t.shape, t.nbytes) for name, t in tensors.items())
    return header + b"".join(t.tobytes() for t in tensors.values())


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# The check: nothing of the pipeline but the reader of headers.


def check(base: Path, finetuned: Path, pruned: Path, density: float) -> str:
    """Hold a pruned bfloat16 checkpoint against S = |Δ| − m·(|Δ|/|p|), evaluated in float64, tensor by tensor.

    Returns:
        A sentence with the numbers.

    Raises:
        UserError: a tensor is not what the formula gives.
    """
    opened = [open_checkpoint(str(path), path.name) for path in (base, finetuned, pruned)]
    if not opened[0].tensors.keys() == opened[1].tensors.keys() == opened[2].tensors.keys():
        raise UserError(f"{pruned} has other tensors than {base}; remove it and run the demo again")
    numel = budget = kept = close = 0
    for name in sorted(opened[0].tensors):
        p, f, out = (_stored(checkpoint.folder, checkpoint.tensors[name]) for checkpoint in opened)
        k = int(p.size * density)
        try:
            took, near = check_tensor(p, f, out, k)
        except ValueError as error:
            raise UserError(f"{pruned}, tensor {name!r}: {error}; remove the folder and run the demo again") from None
        numel, budget, kept, close = numel + p.size, budget + k, kept + took, close + near
    for checkpoint in opened:
        checkpoint.folder.close()
    return (
        f"{numel:,} elements of {len(opened[0].tensors)} tensors checked against the formula in float64: each is "
        f"base's or finetuned's bit for bit, and finetuned's are the int({density} · n) highest-scored of each tensor "
        f"({budget:,}, of which {budget - kept:,} are the same in base; {close:,} elements lie within float32 rounding "
        "of a threshold)"
    )


def check_tensor(p: np.ndarray, f: np.ndarray, out: np.ndarray, k: int) -> tuple[int, int]:
    """Check one tensor; p, f, out: bits of bfloat16, flat.

    Float32 gives each score an error of at most e. So the threshold lies between the k-th highest of S − e and
    the k-th highest of S + e, and only what may be on either side of it is left open, its number not.

    Returns:
        How many elements take a finetuned value that differs from base's, and how many were left open.

    Raises:
        ValueError: what is wrong.
    """
    if not ((out == p) | (out == f)).all():
        raise ValueError(f"{int(((out != p) & (out != f)).sum())} elements are neither base's nor finetuned's")
    kept = (out == f) & (p != f)
    if k == 0:
        if kept.any():
            raise ValueError(f"{int(kept.sum())} elements are kept, and none should be")
        return 0, 0
    x, y = (upcast(side).astype(np.float64) for side in (p, f))
    size, change = np.abs(x), np.abs(y - x)
    with np.errstate(all="ignore"):
        penalty = size.mean() * (change / size)
        score = np.where(change == 0, 0, np.where(size == 0, -np.inf, change - penalty))
        error = np.where(np.isfinite(score) & (change != 0), 4 * np.finfo(np.float32).eps * (change + penalty), 0)
    lowest, highest = (np.partition(score + side * error, p.size - k)[p.size - k] for side in (-1, 1))
    differ = p != f
    must_keep, must_drop = differ & (score - error > highest), differ & (score + error < lowest)
    if (must_keep & ~kept).any():
        raise ValueError(f"{int((must_keep & ~kept).sum())} elements are dropped that score above the threshold")
    if (must_drop & kept).any():
        raise ValueError(f"{int((must_drop & kept).sum())} elements are kept that score below the threshold")
    # Where unchanged elements reach the threshold they use up a part of k without leaving a trace.
    exact = lowest > 0
    if kept.sum() > k or (exact and kept.sum() != k):
        raise ValueError(f"{int(kept.sum())} elements are kept, and {k} should be")
    return int(kept.sum()), int((differ & ~must_keep & ~must_drop).sum())


def _stored(folder: Store, tensor: TensorInfo) -> np.ndarray:
    stored = np.frombuffer(folder.reader(tensor.file).read(tensor.offset, tensor.nbytes), np.uint8)
    return bits(stored, tensor.dtype)
