"""Evaluations on the nodes of a Ray cluster, side by side: one a GPU, or where there is none one a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fapm.choosing.evaluation import Begun, Evaluate, Evaluation, Said, evaluate
from fapm.choosing.sources import Source
from fapm.cluster.pool import connected
from fapm.recipe import Recipe


def on_ray(address: str, recipe: Recipe, say: Callable[[str], None]) -> Evaluate:
    """Evaluator on the cluster at `address`; `local` starts one on this machine for the time that it takes."""

    def do(asked: Evaluation, sources: Sequence[Source], begun: Begun) -> Iterator[Said]:
        with connected(address, recipe, say):
            gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
            means = {"num_gpus": 1} if gpus else {"num_cpus": 1}
            task: Any = ray.remote(evaluate)
            calls = {task.options(name=f"fapm evaluate {s.name}", **means).remote(asked, s): s for s in sources}
            for source in sources:  # the cluster has to know of all of them, to grow
                begun(source.name)
            while calls:
                (call,), _ = ray.wait(list(calls), num_returns=1)
                source = calls.pop(call)
                yield _heard(call, source)

    return do


def _heard(call: Any, source: Source) -> Said:
    try:
        said: Said = ray.get(call)
        return said
    except RayTaskError as error:
        return Said(source.name, {}, f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:  # its node was lost too often
        return Said(source.name, {}, str(error).strip().split("\n")[0])
