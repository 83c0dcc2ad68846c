"""Make a Llama-shaped pair of 1.1 billion parameters in bfloat16, 2.2 GB each, from a seed.

    python tests/benchmarks/llama_pair.py FOLDER        writes FOLDER/base and FOLDER/finetuned

base ~ N(0, 0.02²) and finetuned − base ~ N(0, (2e-4)²): the shapes of TinyLlama-1.1B.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fapm.demo import shapes

SIZES = {"hidden": 2048, "intermediate": 5632, "kv": 256, "vocabulary": 32000}
LAYERS = 22


def make(folder: Path, seed: int = 0, layers: int = LAYERS) -> None:
    """Write both checkpoints, unless they are there."""
    if (folder / "finetuned" / "config.json").exists():
        return
    random = torch.Generator().manual_seed(seed)
    base, finetuned = {}, {}
    for name, shape in shapes(layers, **SIZES).items():
        weights = torch.empty(shape).normal_(0, 0.02, generator=random).bfloat16()
        delta = torch.empty(shape).normal_(0, 2e-4, generator=random)
        base[name], finetuned[name] = weights, delta.add_(weights).bfloat16()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    for role, tensors in (("base", base), ("finetuned", finetuned)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
        (folder / role / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    chosen = parser.parse_args()
    make(chosen.folder, layers=chosen.layers)
