"""What a second worker brings and what losing a node costs: a 1.1-billion-parameter pair, a cluster of this machine.

    python tests/benchmarks/on_ray.py [--folder DIR] [--rounds 3]

Every node is a Ray node of one CPU. `work` is the sum of the workers' seconds on shards; what a run takes beyond
`work` ÷ workers, from the moment all are ready, is not work: handing out, waiting for the last shard, the manifest. A
node is killed when a third of the shards are finished, and no other comes in its place.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).parents[2]
sys.path += map(str, ROOT.glob("tests/support/**/"))

from llama_pair import make  # noqa: E402
from nodes import add_node, finished_shards, head_alone  # noqa: E402

from fapm import Recipe, prune  # noqa: E402
from fapm.cluster.pool import RayPool  # noqa: E402
from fapm.schedule import Watch  # noqa: E402


def run(folder: Path, workers: int, cluster: Any = None, victim: Any = None) -> dict[str, float]:
    """A run on nodes that are there, of which one is lost if it is named."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    ready, killed, shards = [0.0], [0.0], [0]

    def pool(plan: Any, held: Any, watch: Watch) -> RayPool:
        made = RayPool(plan, held, watch, "auto")
        made.wait_until_ready()
        ready[0] = time.perf_counter()
        return made

    def say(line: str) -> None:
        shards[0] += line.startswith("model-")
        if victim and shards[0] >= 8 and not killed[0]:
            killed[0] = time.perf_counter()
            cluster.remove_node(victim, allow_graceful=False)

    sides = {side: str(folder / side) for side in ("base", "finetuned", "out")}
    recipe = Recipe.of(**sides, workers=workers, shard_size="90MB", device="cpu")
    result = prune(recipe, pool=pool, watch=Watch(say=say))
    seconds = time.perf_counter() - ready[0]
    done = finished_shards(out)
    return {
        "seconds": seconds,
        "work": sum(shard["seconds"] for shard in done),
        "again": sum(shard["tries"] - 1 for shard in done),
        "shards": len(result.plan.shards),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fapm-benchmark")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    make(chosen.folder)
    for role in ("base", "finetuned"):
        shutil.copyfile(chosen.folder / role / "model.safetensors", "/dev/null")  # into the page cache
    found: dict[str, list[dict[str, float]]] = {"1 worker": [], "2 workers": [], "2 workers, a node lost": []}
    with head_alone() as cluster:
        first = add_node(cluster)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        for _ in range(chosen.rounds):
            found["1 worker"].append(run(chosen.folder, 1))
            second = add_node(cluster)
            found["2 workers"].append(run(chosen.folder, 2))
            found["2 workers, a node lost"].append(run(chosen.folder, 2, cluster, second))
        assert first
        ray.shutdown()
    print(
        f"{'':26}{'seconds':>9}{'work':>8}{'not work':>10}{'again':>7}  of {found['1 worker'][0]['shards']:.0f} shards"
    )
    for name, results in found.items():
        workers = 2 if name == "2 workers" else 1
        seconds, work = (statistics.median(r[key] for r in results) for key in ("seconds", "work"))
        idle = f"{seconds - work / workers:9.2f}" if "lost" not in name else f"{'':9}"
        print(f"{name:26}{seconds:9.2f}{work:8.2f}{idle:>10}{statistics.median(r['again'] for r in results):7.0f}")
    one, two, lost = (statistics.median(r["seconds"] for r in results) for results in found.values())
    print(f"speed-up {one / two:.2f}; a node lost after a third: {lost - two:.2f} s more than undisturbed")


if __name__ == "__main__":
    main()
