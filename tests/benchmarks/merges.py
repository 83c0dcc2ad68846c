"""Merges beside mergekit's of the same inputs, in the same run: seconds, memory, and how far the outputs differ.

    python tests/benchmarks/merges.py FOLDER [--mergekit PATH/TO/mergekit-yaml] [--layers N] [--sources 2,3,5]

makes a Llama-shaped base and fine-tuned checkpoints of it in FOLDER. mergekit, if it is given, works in float32 and
writes bfloat16, as fapm does, and needs an environment of its own (pip install mergekit). What is compared is what both
mean alike; docs/merging.md says where they do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from llama_pair import SIZES
from safetensors import safe_open
from safetensors.torch import save_file

from fapm.demo import shapes

JOBS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "ties": (["--method", "magnitude", "--density", "0.1", "--combine", "ties"], {"merge_method": "ties"}),
    "sum": (["--density", "1", "--combine", "sum"], {"merge_method": "task_arithmetic"}),
    "mean": (["--density", "1", "--combine", "mean"], {"merge_method": "task_arithmetic"}),
    "slerp": (["--density", "1", "--combine", "slerp"], {"merge_method": "slerp", "parameters": {"t": 0.5}}),
    "model-stock": (["--density", "1", "--combine", "model-stock"], {"merge_method": "model_stock"}),
}


def make(folder: Path, layers: int, count: int) -> None:
    random = torch.Generator().manual_seed(0)
    of = shapes(layers, **SIZES)
    base = {name: torch.empty(shape).normal_(0, 0.02, generator=random).bfloat16() for name, shape in of.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "num_hidden_layers": layers, "hidden_size": SIZES["hidden"], "intermediate_size": SIZES["intermediate"],
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": SIZES["vocabulary"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    for i in range(count + 1):
        where = folder / ("base" if i == 0 else f"f{i}")
        if (where / "config.json").exists():
            continue
        tensors = base
        if i:
            moved = {n: torch.empty(p.shape).normal_(0, 1e-3, generator=random) for n, p in base.items()}
            tensors = {n: (p.float() + moved[n]).bfloat16() for n, p in base.items()}
        where.mkdir(parents=True, exist_ok=True)
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
        (where / "config.json").write_text(json.dumps(config))


def timed(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and GB at most."""
    done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    wall, cpu, memory = map(float, done.stdout.split())
    return wall, cpu, memory


WATCH = """
import resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6)
sys.exit(code)
"""
"""In a small process of its own: the most memory that a process had counts what its parent had when it was made."""


def theirs(folder: Path, program: str, about: dict[str, Any], sources: list[str], normalize: bool) -> list[str]:
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0, "density": 0.1}} for name in sources]
    said: dict[str, Any] = {**about, "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    if about["merge_method"] == "slerp":
        said |= {"base_model": str(folder / sources[0]), "models": [{"model": str(folder / name)} for name in sources]}
    else:
        said |= {"base_model": str(folder / "base")}
    if about["merge_method"] in ("ties", "task_arithmetic"):
        said["parameters"] = {"normalize": normalize}
    recipe = folder / "mergekit.yaml"
    recipe.write_text(yaml.safe_dump(said))
    return [program, str(recipe), str(folder / "theirs"), "--copy-tokenizer", "--lazy-unpickle", "--quiet"]


def difference(one: Path, other: Path) -> str:
    """How many elements of two outputs differ, and by how many steps of bfloat16 at most."""
    files = {side: [safe_open(p, "pt") for p in sorted(side.glob("*.safetensors"))] for side in (one, other)}
    places = {name: file for file in files[other] for name in file.keys()}  # noqa: SIM118
    count = steps = total = 0
    for file in files[one]:
        for name in file.keys():  # noqa: SIM118
            a, b = file.get_tensor(name), places[name].get_tensor(name)
            apart = (ordered(a) - ordered(b)).abs()
            count, total = count + int((apart > 0).sum()), total + apart.numel()
            steps = max(steps, int(apart.max()))
    return f"{count / total:.2e} of the elements differ, by {steps} step(s) of bfloat16 at most"


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Numbers in the order of the values of bfloat16."""
    bits = x.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sources", default="2,3,5")
    parser.add_argument("--jobs", default=",".join(JOBS))
    asked = parser.parse_args()
    counts = [int(count) for count in asked.sources.split(",")]
    make(asked.folder, asked.layers, max(counts))
    fapm = shutil.which("fapm", path=str(Path(sys.executable).parent)) or "fapm"
    print("wall s, CPU s, GB at most")
    for job in asked.jobs.split(","):
        words, about = JOBS[job]
        for count in counts if job != "slerp" else [2]:
            sources = [f"f{i}" for i in range(1, count + 1)]
            sides = [word for name in sources for word in ("--finetuned", str(asked.folder / name))]
            ours = [
                fapm,
                "merge",
                "--base",
                str(asked.folder / "base"),
                *sides,
                *words,
                "--out",
                str(asked.folder / "ours"),
            ]
            for out in ("ours", "theirs"):
                shutil.rmtree(asked.folder / out, ignore_errors=True)
            wall, cpu, memory = timed([*ours, "-q"])
            line = f"{job:12} {count} sources  fapm {wall:6.1f} {cpu:6.1f} {memory:5.2f}"
            if asked.mergekit:
                normalize = job in ("ties", "mean")
                w, c, m = timed(theirs(asked.folder, asked.mergekit, about, sources, normalize))
                line += f"   mergekit {w:6.1f} {c:6.1f} {m:5.2f}   {w / wall:4.1f} and {c / cpu:4.1f} times ours; "
                line += difference(asked.folder / "ours", asked.folder / "theirs")
            print(line, flush=True)


if __name__ == "__main__":
    main()
