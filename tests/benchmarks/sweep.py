"""Ten candidates from one reading: as sparse task vectors against one prune, as checkpoints against reading the inputs
once and writing ten outputs.

    python tests/benchmarks/sweep.py [--layers 8] [--rounds 2]

The floor reads both inputs and writes the output's bytes ten times, by two threads and durably, and computes nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from delta import PIECE, run, timed
from llama_pair import make

from fapm import Recipe
from fapm.choosing.candidates import candidates
from fapm.choosing.sweep import sweep, sweep_folder

DENSITIES = "0.05,0.1,0.2,0.3,0.4"
METHODS = "fapm,magnitude"
MANY = 10


def swept(folder: Path, emit: str) -> float:
    """Seconds."""
    shutil.rmtree(folder / "swept", ignore_errors=True)
    given = {"base": str(folder / "base"), "finetuned": str(folder / "finetuned"), "out": str(folder / "swept")}
    choices = given | {"device": "cpu", "emit": emit, "density": DENSITIES, "method": METHODS}
    began = time.perf_counter()
    made = sweep(candidates(choices, sweep_folder(Recipe.of(**given))))
    assert len(made) == MANY
    return time.perf_counter() - began


def floor(folder: Path) -> float:
    """Seconds to read the pair once and write the output ten times."""
    files = sorted((folder / "base").glob("model*.safetensors"))

    def copy(path: Path) -> None:
        buffer, other = bytearray(PIECE), bytearray(PIECE)
        with ExitStack() as opened:
            names = [folder / "copies" / f"{path.name}-{i}" for i in range(MANY)]
            targets = [opened.enter_context(open(name, "wb", 0)) for name in names]
            one = opened.enter_context(open(path, "rb", 0))
            two = opened.enter_context(open(folder / "finetuned" / path.name, "rb", 0))
            while got := one.readinto(buffer):
                two.readinto(other)
                for target in targets:
                    target.write(memoryview(buffer)[:got])
            for target in targets:
                os.fsync(target.fileno())

    (folder / "copies").mkdir()
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(copy, files))
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "copies")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, layers=chosen.layers)
        one = timed(chosen.rounds, lambda: run(folder, "out"))
        deltas = timed(chosen.rounds, lambda: swept(folder, "delta"))
        size = sum(path.stat().st_size for path in (folder / "swept").rglob("delta*.safetensors"))
        whole = sum(path.stat().st_size for path in (folder / "out").glob("model*.safetensors"))
        print(f"one prune {one:.2f} s; {MANY} candidates as deltas {deltas:.2f} s, {deltas / one:.1f} ×", flush=True)
        print(f"their size: {size / whole:.2f} of one checkpoint", flush=True)
        checkpoints = timed(chosen.rounds, lambda: swept(folder, "checkpoint"))
        shutil.rmtree(folder / "swept")
        least = timed(chosen.rounds, lambda: floor(folder))
        print(f"as checkpoints {checkpoints:.2f} s; the floor {least:.2f} s: {checkpoints / least:.2f} ×")


if __name__ == "__main__":
    main()
