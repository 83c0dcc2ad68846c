"""A 1.1-billion-parameter bfloat16 pair pruned on one machine, against moving the same bytes without arithmetic.

    python tests/benchmarks/whole_run.py [--folder DIR] [--rounds 3]

The floor reads both files by large preads into reused buffers and writes a file of the output's size, made durable,
with two threads. Every run is a process of its own on a warm page cache; `seconds` is that of `prune`, `process` counts
the interpreter and the imports too. Needs some 12 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from llama_pair import make

PIECE = 16 << 20

RUN = """
import json, sys, time
from fapm import Recipe, prune
base, finetuned, out, choices, ray = sys.argv[1:4] + [json.loads(sys.argv[4]), sys.argv[5]]
pool, starting = None, [0.0]
if ray:
    from fapm.cluster.pool import ray_pool
    def pool(plan, out, watch):
        began = time.perf_counter()
        made = ray_pool(ray)(plan, out, watch)
        made.wait_until_ready()
        starting[0] = time.perf_counter() - began
        return made
result = prune(Recipe.of(base=base, finetuned=finetuned, out=out, **choices), pool=pool)
totals = result.manifest["totals"]
status = open("/proc/self/status").read()  # ru_maxrss begins with the parent's, which made the pair
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({
    "seconds": result.seconds, "starting": starting[0],
    "read": totals["read_bytes"], "written": totals["written_bytes"],
    "rss": peak, "share": totals["kept_share"],
    "cpu": time.process_time(), "workers": result.manifest["workers"],
}))
"""


def floor(base: Path, finetuned: Path, out: Path, threads: int = 2) -> float:
    """Seconds to read both and write one of the same size."""
    size = base.stat().st_size
    inputs = [os.open(path, os.O_RDONLY) for path in (base, finetuned)]
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pieces = iter(range(0, size, PIECE))
    lock = threading.Lock()

    def work() -> None:
        buffers = mmap.mmap(-1, PIECE), mmap.mmap(-1, PIECE)
        while True:
            with lock:
                offset = next(pieces, None)
            if offset is None:
                return
            length = min(PIECE, size - offset)
            for fd, buffer in zip(inputs, buffers, strict=True):
                os.preadv(fd, [memoryview(buffer)[:length]], offset)
            os.pwrite(target, memoryview(buffers[0])[:length], offset)

    began = time.perf_counter()
    os.posix_fallocate(target, 0, size)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.fsync(target)
    seconds = time.perf_counter() - began
    for fd in (*inputs, target):
        os.close(fd)
    out.unlink()
    return seconds


def run(folder: Path, choices: dict[str, object], ray: str = "") -> dict[str, float]:
    out = folder / "pruned"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [str(folder / "base"), str(folder / "finetuned"), str(out), json.dumps(choices), ray]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True, text=True)
    process = time.perf_counter() - began
    shutil.rmtree(out)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fapm-benchmark")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    make(chosen.folder)
    weights = [chosen.folder / role / "model.safetensors" for role in ("base", "finetuned")]
    for path in weights:
        shutil.copyfile(path, os.devnull)  # into the page cache
    ways: dict[str, tuple[dict[str, object], str]] = {
        "in process, 2 threads": ({"workers": 2}, ""),
        "in process, 1 thread": ({"workers": 1}, ""),
        "scope layer": ({"workers": 2, "scope": "layer"}, ""),
        "scope global": ({"workers": 2, "scope": "global"}, ""),
        "scope global, 8 GiB a worker": ({"workers": 2, "scope": "global", "memory": "8GiB"}, ""),
        "--memory 128MiB": ({"workers": 2, "memory": "128MiB"}, ""),
        "--ray local, 2 workers": ({"workers": 2}, "local"),
    }
    floors: list[float] = []
    best: dict[str, dict[str, float]] = {}
    for _ in range(chosen.rounds):
        for name, (choices, ray) in ways.items():
            floors.append(floor(*weights, chosen.folder / "floor"))
            result = run(chosen.folder, choices, ray)
            if name not in best or result["seconds"] < best[name]["seconds"]:
                best[name] = result
    least = min(floors)
    print(f"floor: {least:.2f} s (of {', '.join(f'{x:.2f}' for x in floors)})")
    print(f"{'':30}{'seconds':>9}{'process':>9}{'CPU':>7}{'× floor':>9}{'read':>9}{'peak RSS':>10}")
    for name, r in best.items():
        seconds = r["seconds"] - r["starting"]
        print(
            f"{name:30}{seconds:9.2f}{r['process']:9.2f}{r['cpu']:7.2f}{seconds / least:9.2f}"
            f"{r['read'] / 1e9:6.2f} GB{r['rss'] / 1e6:7.0f} MB"
            + (f"  + {r['starting']:.1f} s to start Ray" if r["starting"] else "")
        )


if __name__ == "__main__":
    main()
