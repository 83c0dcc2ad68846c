"""Tasks of lm-evaluation-harness on a checkpoint.

python -P harness.py PATH new=gsm8k old=mmlu,hellaswag,my/task.yaml

Of each task counts the first metric that it lists, of a perplexity its inverse; of several tasks the mean.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def measure(results: dict[str, Any], task: str) -> dict[str, float]:
    """Value and standard error of a task, from what the harness found."""
    found = results["results"][task]
    listed = results.get("configs", {}).get(task, {}).get("metric_list") or []
    wanted = [entry["metric"] for entry in listed if isinstance(entry.get("metric"), str)]
    names = [name for name in found if "," in name and "_stderr," not in name]
    if not names:
        raise SystemExit(f"{task}: the harness found no metric")
    name = next((n for metric in wanted for n in names if n.split(",")[0] == metric), names[0])
    metric, _, kind = name.partition(",")
    value, stderr = found[name], found.get(f"{metric}_stderr,{kind}")
    stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
    if metric.endswith("perplexity"):
        value, stderr = 1 / value, stderr and stderr / value**2
    elif metric == "bits_per_byte":
        value, stderr = 2**-value, stderr and stderr * 2**-value * math.log(2)
    elif results.get("higher_is_better", {}).get(task, {}).get(metric) is False:
        raise SystemExit(f"{task}: of {metric} less is better, and it is not known how to make a skill of it")
    return {"value": float(value), **({} if stderr is None else {"stderr": stderr})}


def main() -> None:
    import lm_eval  # type: ignore[import-untyped]
    import torch
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    path, *given = sys.argv[1:]
    wanted = {skill: names.split(",") for skill, _, names in (word.partition("=") for word in given)}
    names, folders = {}, set()
    for task in (task for tasks in wanted.values() for task in tasks):
        if task.endswith((".yaml", ".yml")):
            folders.add(str(Path(task).parent))
            names[task] = next(
                line.partition(":")[2].strip()
                for line in Path(task).read_text().splitlines()
                if line.startswith("task:")
            )
        else:
            names[task] = task
    on_gpu = torch.cuda.is_available()
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": path, "dtype": "auto"},
        tasks=list(dict.fromkeys(names.values())),
        task_manager=TaskManager(include_path=sorted(folders) or None),
        device="cuda" if on_gpu else "cpu",
        batch_size="auto" if on_gpu else 8,
        log_samples=False,
    )
    said = {skill: {task: measure(results, names[task]) for task in tasks} for skill, tasks in wanted.items()}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
