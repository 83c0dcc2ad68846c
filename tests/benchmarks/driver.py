"""What the driver costs where workers cost nothing: planning, adding up counts, sharing ties, the manifest.

    python tests/benchmarks/driver.py                 100,000 tensors in 500, 1,000 and 2,000 shards, every scope
    python tests/benchmarks/driver.py --ray           what handing out a shard on Ray costs beside that
    python tests/benchmarks/driver.py --deepseek      planning DeepSeek-V3, 685 billion elements in 46,000 tensors

Headers are real, weights are holes in sparse files, and the workers' work is faked: every shard leaves the counts that
a normal model's shard would leave, made once beforehand. `ms a shard` is the whole run's time, less the faking and less
the planning. Each line is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fapm import Recipe, prune, run
from fapm.formats.header import build_header
from fapm.layout import measure_name, record_name, rows_name, sample_name
from fapm.planning.make import make_plan
from fapm.scoring.threshold import coarse_histogram, histograms, key_of
from fapm.shard.table import MEASURED
from fapm.shard.task import Done, save_arrays
from fapm.shard.worker import Worker
from fapm.storage.local import Folder

SIDE = 1000
"""Every faked tensor is SIDE × SIDE."""


def hollow(folder: Path, shapes: dict[str, tuple[int, ...]], per_file: int) -> None:
    """A bfloat16 checkpoint of real headers, whose weights are holes."""
    folder.mkdir(parents=True)
    names = sorted(shapes)
    for first in range(0, len(names), per_file):
        part = {n: ("BF16", shapes[n], 2 * math.prod(shapes[n])) for n in names[first : first + per_file]}
        header = build_header((name, *rest) for name, rest in part.items())
        path = folder / f"model-{first // per_file:05d}.safetensors"
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(nbytes for _, _, nbytes in part.values()))


def deepseek_v3() -> dict[str, tuple[int, ...]]:
    """Names and shapes of DeepSeek-V3 without FP8's scales, by its published configuration and its README_WEIGHTS.

    They add up to what its model card says: 671 billion elements, and 14 of the module that predicts a second token.
    """
    hidden, vocabulary, dense, expert, layers = 7168, 129280, 18432, 2048, 61
    heads, q_rank, kv_rank, nope, rope, value, experts = 128, 1536, 512, 128, 64, 128, 256
    embedding = (vocabulary, hidden)
    shapes = {"model.embed_tokens.weight": embedding, "model.norm.weight": (hidden,), "lm_head.weight": embedding}
    for i in range(layers + 1):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        layer |= {
            "self_attn.q_a_proj": (q_rank, hidden), "self_attn.q_a_layernorm": (q_rank,),
            "self_attn.q_b_proj": (heads * (nope + rope), q_rank),
            "self_attn.kv_a_proj_with_mqa": (kv_rank + rope, hidden), "self_attn.kv_a_layernorm": (kv_rank,),
            "self_attn.kv_b_proj": (heads * (nope + value), kv_rank), "self_attn.o_proj": (hidden, heads * value),
        }  # fmt: skip
        blocks = {"mlp": dense} if i < 3 else {f"mlp.experts.{e}": expert for e in range(experts)}
        blocks |= {} if i < 3 else {"mlp.shared_experts": expert}
        for name, width in blocks.items():
            layer |= {f"{name}.gate_proj": (width, hidden), f"{name}.up_proj": (width, hidden)}
            layer |= {f"{name}.down_proj": (hidden, width)}
        if i >= 3:
            layer |= {"mlp.gate": (experts, hidden)}
            shapes[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] = (experts,)
        if i == layers:  # the module that predicts a second token
            layer |= {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden)}
            layer |= {"embed_tokens": embedding, "shared_head.norm": (hidden,), "shared_head.head": embedding}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


class Faked:
    """A pool that leaves what workers would leave, and counts the time that it takes for it."""

    workers = 1

    def __init__(self, plan: Any, out: Folder, watch: Any):
        random = np.random.default_rng(0)
        p = random.normal(0, 0.02, 1 << 20).astype(np.float32)
        d = np.abs(random.normal(0, 2e-4, p.size)).astype(np.float32)
        self._scores = d - np.abs(p).mean() * (d / np.abs(p))
        self._coarse = coarse_histogram(self._scores).astype(float)
        self._counts: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._out, self.seconds = out, 0.0

    def map(self, step: Any, tasks: Any) -> Iterator[Done]:
        for task in tasks:
            began = time.perf_counter()
            done = {"sample": self._sample, "measure": self._measure, "write": self._write}[step.__name__](task)
            self.seconds += time.perf_counter() - began
            yield done

    def _sample(self, task: Any) -> Done:
        groups = list({t.group: None for t in task.cross_shard()})
        weights = np.stack([self._coarse] * len(groups))
        means = np.full((len(task.shard.tensors), 2), np.nan)
        save_arrays(
            self._out, sample_name(task.shard.index), 0, groups, weights=weights, variance=np.full(len(groups), 1e3),
            means=means,
        )  # fmt: skip
        return Done(task.shard.index, 0, 0, 0, 0.0)

    def _measure(self, task: Any) -> Done:
        """Counts of the right kind and number: this shard's elements spread like the scores."""
        brackets = list(task.brackets.values())
        counted = histograms(brackets)
        for i, (name, bracket) in enumerate(task.brackets.items()):
            share = sum(t.common for t in task.cross_shard() if t.group == name) / self._scores.size
            if bracket not in self._counts:
                keys = key_of(self._scores).astype(np.int64)
                inside = keys[(keys >= bracket.lo) & (keys <= bracket.hi)]
                found = np.zeros(counted.layouts[i].size)
                for key in inside.tolist():
                    found[counted.layouts[i].place(key)] += 1
                self._counts[bracket] = found, np.array(np.count_nonzero(keys > bracket.hi))
            found, above = self._counts[bracket]
            counted.of(i)[:] = np.rint(found * share)
            counted.above[i] = round(float(above) * share)
        means = np.ones((len(task.shard.tensors), 2))
        save_arrays(
            self._out, measure_name(task.shard.index, task.round), 0, list(task.brackets), above=counted.above,
            bins=counted.bins.astype(np.uint32), starts=counted.starts, means=means,
        )  # fmt: skip
        return Done(task.shard.index, 0, 0, 0, 0.0)

    def _write(self, task: Any) -> Done:
        shard = task.shard
        path = self._out.path / shard.name
        path.touch()
        os.truncate(path, shard.nbytes)
        (self._out.path / "fapm/work").mkdir(exist_ok=True)
        (self._out.path / rows_name(shard.index)).write_bytes(np.zeros(len(shard.tensors), MEASURED).tobytes())
        record = {"name": shard.name, "nbytes": shard.nbytes, "xxh3_128": "0" * 32, "read_bytes": 0, "seconds": 0.0}
        (self._out.path / record_name(shard.index)).write_text(json.dumps(record))
        return Done(shard.index, 0, 0, shard.nbytes, 0.0)

    def close(self) -> None:
        pass


def peak() -> float:
    """The most memory that this process has held, in MB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000


def one(folder: Path, scope: str, shards: int) -> None:
    """A line: a run of this scope with about so many shards."""
    size = 2 * SIDE * SIDE * 100_000 // shards
    choices = {"scope": scope, "shard_size": size, "device": "cpu", "workers": 1}
    recipe = Recipe.of(
        base=str(folder / "base"), finetuned=str(folder / "finetuned"), out=str(folder / "out"), **choices
    )
    began = time.perf_counter()
    plan = make_plan(recipe)
    planning, planned = time.perf_counter() - began, peak()
    pools: list[Faked] = []

    def pool(*arguments: Any) -> Faked:
        pools.append(Faked(*arguments))
        return pools[0]

    run.check_disk = lambda *_: None
    result = prune(recipe, pool=pool)  # plans once more
    seconds = result.seconds - pools[0].seconds - planning
    count = len(plan.shards)
    print(
        f"{scope:8}{count:8,}{planning:12.2f} s{planned:8.0f} MB{seconds:10.2f} s{1000 * seconds / count:9.2f} ms"
        f"{peak():8.0f} MB{result.manifest['rounds']:7}"
    )
    shutil.rmtree(folder / "out")


def nothing(worker: Worker, task: Any, following: Any) -> Done:
    """A step that does nothing."""
    return Done(task.shard.index, 0, 0, 0, 0.0)


def on_ray(folder: Path, shards: int, workers: int) -> None:
    """What a shard costs that is handed to a Ray actor and comes back at once."""
    from fapm.cluster.pool import RayPool
    from fapm.manifest import state
    from fapm.schedule import Watch
    from fapm.selection import groups_of
    from fapm.shard.task import LaneTask, Task
    from fapm.storage.lease import lease

    size = 2 * SIDE * SIDE * 100_000 // shards
    choices = {"shard_size": size, "device": "cpu", "workers": workers}
    recipe = Recipe.of(
        base=str(folder / "base"), finetuned=str(folder / "finetuned"), out=str(folder / "out"), **choices
    )
    plan = make_plan(recipe)
    with lease(recipe.out) as out:
        state.begin(plan, "new", out)
        pool = RayPool(plan, out, Watch(), "local")
        pool.wait_until_ready()
        tasks = [Task((LaneTask(recipe, out, shard, groups_of(plan, shard)),)) for shard in plan.shards]
        for first in (0, 1):  # the first time actors load what they need
            cpu, began = time.process_time(), time.perf_counter()
            assert sum(1 for _ in pool.map(nothing, tasks)) == len(tasks)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            if first:
                print(
                    f"{len(tasks):,} shards, {workers} actors: {1000 * seconds / len(tasks):.2f} ms a shard, of which "
                    f"the driver computes {1000 * cpu / len(tasks):.2f} ms; peak {peak():.0f} MB"
                )
        pool.close()


def deepseek(folder: Path) -> None:
    """Planning DeepSeek-V3."""
    shapes = deepseek_v3()
    if not folder.exists():
        for role in ("base", "finetuned"):
            hollow(folder / role, shapes, 280)
    for scope in ("tensor", "layer", "global"):
        sides = {side: str(folder / side) for side in ("base", "finetuned", "out")}
        began = time.perf_counter()
        plan = make_plan(Recipe.of(**sides, scope=scope))
        seconds = time.perf_counter() - began
        elements = sum(t.numel for t in plan.tensors())
        tasks = sum(len(s.tensors) for s in plan.shards)
        print(
            f"{scope:8}{elements / 1e9:6.1f} billion elements, {tasks:,} tensors, {len(plan.shards):,} shards: "
            f"{seconds:.2f} s, {1e6 * seconds / tasks:.0f} µs a tensor, peak {peak():.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fapm-driver")
    parser.add_argument("--deepseek", action="store_true")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SCOPE", "SHARDS"))
    chosen = parser.parse_args()
    if chosen.deepseek:
        deepseek(chosen.folder / "deepseek")
        return
    model = chosen.folder / "model"
    if chosen.one:
        one(model, chosen.one[0], int(chosen.one[1]))
        return
    if not model.exists():
        names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(100) for e in range(1000)]
        for role in ("base", "finetuned"):
            hollow(model / role, dict.fromkeys(names, (SIDE, SIDE)), 2500)
    if chosen.ray:
        on_ray(model, 2000, 2)
        return
    print("scope     shards    planning     peak   the driver    a shard    peak  counts")
    for scope in ("tensor", "layer", "global"):
        for shards in (500, 1000, 2000):
            arguments = ["--folder", str(chosen.folder), "--one", scope, str(shards)]
            subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
