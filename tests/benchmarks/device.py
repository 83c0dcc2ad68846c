"""What a GPU makes of a bfloat16 pair, against the rate of the bus to it and against moving the files.

    python tests/benchmarks/device.py [--device cuda] [--folder DIR]

Three figures of the same minute. *Bus*: both sides copied there and one back, page-locked memory on both ends, with no
arithmetic. *Pinned to pinned*: the same with all passes of a prune, the next tensor on its way while one is worked on;
the device waits for the rest of the time that its arithmetic alone takes. *End to end*: `prune` of 1.1 billion
parameters from the page cache, against the floor of whole_run.py and against this machine's cores.

Aim: pinned to pinned at 0.8 of the bus. Without a GPU it says so; record the figures in configs/scale.md.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fapm.scoring.accelerator import Accelerator
from fapm.scoring.device import gpus
from fapm.scoring.engine import StoredChunk
from fapm.scoring.threshold import COARSE_BINS, Bracket, Threshold, float_thresholds, histograms
from fapm.scoring.torch_engine import TorchEngine

ELEMENTS = 1 << 24  # of a tensor: 64 MiB of pair bytes
TENSORS = 24
DENSITY = 0.1


class OneWay(Accelerator):
    """One from which nothing is copied back."""

    def down(self, tensor: torch.Tensor, target: np.ndarray) -> None:
        pass


def pairs(device: Accelerator, tensors: int, elements: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bytes of bfloat16 in page-locked memory: base ~ N(0, 0.02²), Δ ~ N(0, (2e-4)²)."""
    random = torch.Generator().manual_seed(0)
    base = torch.empty(elements).normal_(0, 0.02, generator=random).bfloat16()
    tuned = torch.empty(elements).normal_(0, 2e-4, generator=random).add_(base).bfloat16()
    found = []
    for _ in range(tensors):
        sides = device.host(2 * elements), device.host(2 * elements)
        for side, values in zip(sides, (base, tuned), strict=True):
            side[:] = values.view(torch.uint8).numpy()
        found.append(sides)
    return found


def put(engine: TorchEngine, p: np.ndarray, f: np.ndarray) -> StoredChunk:
    return StoredChunk(0, 0, engine.put(p, f), *["bfloat16"] * 3, numel=p.size // 2)


def prune_one(engine: TorchEngine, chunk: StoredChunk, out: np.ndarray) -> Threshold:
    """The passes of `shard.passes` over one tensor that is on the device."""
    group = np.zeros(1, np.int64)
    sums = engine.sums()
    sums.add(chunk)
    [(one, _)] = sums.result()
    m = np.array([math.fsum(one) / chunk.numel], np.float32)
    found: Bracket | Threshold = Bracket()
    while isinstance(found, Bracket):
        counted = histograms([found], [COARSE_BINS])
        counting = engine.counting(counted)
        counting.add(chunk, m, group)
        counting.result()
        found = counted.narrow(0, int(chunk.numel * DENSITY))
    application = engine.application(np.array([found.ties]))
    application.add(chunk, m, float_thresholds(np.array([found.key])), group, out.view(np.uint16))
    application.result()
    return found


def prune_all(device: Accelerator, sides: list[tuple[np.ndarray, np.ndarray]], outs: list[np.ndarray]) -> None:
    engine = TorchEngine("fapm", device)
    ahead = put(engine, *sides[0])
    for i in range(len(sides)):
        chunk = ahead
        if i + 1 < len(sides):
            ahead = put(engine, *sides[i + 1])
        prune_one(engine, chunk, outs[i % len(outs)])
    device.received()()


def bus(device: Accelerator, sides: list[tuple[np.ndarray, np.ndarray]], outs: list[np.ndarray]) -> None:
    back = device.use(device.up(outs[0]))
    for i, (p, f) in enumerate(sides):
        device.up(p), device.up(f)
        device.down(back, outs[i % len(outs)])
    device.sent()()
    device.received()()


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The best of some rounds, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def in_memory(device: Accelerator, one_way: Accelerator, tensors: int = TENSORS, elements: int = ELEMENTS) -> str:
    """The first two figures, as lines."""
    sides = pairs(device, tensors, elements)
    outs = [device.host(2 * elements) for _ in range(3)]
    gb = tensors * elements * 4 / 1e9
    copied = seconds(lambda: bus(device, sides, outs))
    pruned = seconds(lambda: prune_all(device, sides, outs))
    engine = TorchEngine("fapm", one_way)
    there = [put(engine, *pair) for pair in sides]
    one_way.sent()()
    computed = seconds(lambda: [prune_one(engine, chunk, outs[0]) for chunk in there])
    return (
        f"bus:              {gb / copied:6.1f} GB/s of pair bytes\n"
        f"pinned to pinned: {gb / pruned:6.1f} GB/s, {copied / pruned:.2f} of the bus\n"
        f"arithmetic alone: {gb / computed:6.1f} GB/s; the device waits for {max(0.0, 1 - computed / pruned):.0%}"
    )


def end_to_end(folder: Path, device: str) -> str:
    from llama_pair import make
    from whole_run import floor, run

    make(folder)
    weights = [folder / role / "model.safetensors" for role in ("base", "finetuned")]
    least = min(floor(*weights, folder / "floor") for _ in range(3))
    lines = [f"end to end:       floor {least:.2f} s"]
    for name, choices in {"GPU": {"device": device, "workers": 1}, "cores": {"device": "cpu"}}.items():
        best = min((run(folder, choices) for _ in range(3)), key=lambda found: found["seconds"])
        times, gb = best["seconds"] / least, 4.4 / best["seconds"]
        lines.append(
            f"  {name:16}{best['seconds']:6.2f} s, {times:.2f} × floor, {gb:.1f} GB/s, CPU {best['cpu']:.1f} s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fapm-benchmark")
    chosen = parser.parse_args()
    if not gpus():
        print("torch finds no GPU here: nothing is measured")
        return
    device = Accelerator(chosen.device)
    print(f"{getattr(torch, device.device.type).get_device_name(device.device)}, torch {torch.__version__}")
    print(in_memory(device, OneWay(chosen.device)))
    print(end_to_end(chosen.folder, chosen.device))


if __name__ == "__main__":
    main()
