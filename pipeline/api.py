"""The public functions: what the commands of the same names do, for programs and notebooks.

Each takes a recipe's choices by name (`Recipe` has them) and shows its progress on a terminal or in a notebook, unless
`watch` says otherwise. On a cluster: `pool=fapm.cluster.pool.ray_pool("auto")`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fapm.choosing.evaluation import Evaluate, evaluation, in_turn
from fapm.choosing.sweep import run_sweep
from fapm.errors import UserError
from fapm.manifest.read import load_manifest
from fapm.manifest.state import look
from fapm.planning.plan import Plan
from fapm.publish import prune_and_publish, staged_recipe
from fapm.recipe import EVERYTHING, Recipe
from fapm.reporting.looking import Facts
from fapm.reporting.progress import Progress
from fapm.reporting.text import compare_text, sweep_text
from fapm.run import MakePool, Result, check_disk
from fapm.schedule import Watch
from fapm.storage.address import layered


@contextlib.contextmanager
def watching(watch: Watch | None) -> Iterator[Watch]:
    """The watch that was given, or one that shows progress where somebody looks on."""
    if watch:
        yield watch
        return
    with Progress() as progress:
        yield progress.watch() if progress.is_watched else Watch()


def _recipe(recipe: Recipe | None, choices: dict[str, Any]) -> Recipe:
    if recipe is None:
        return Recipe.of(**choices)
    return Recipe.of(**recipe.model_dump(exclude_unset=True) | choices) if choices else recipe


def prune(
    recipe: Recipe | None = None,
    /,
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
    **choices: Any,
) -> Result:
    """Prune a checkpoint, or go on with a prune that was stopped; finished, it does nothing.

    Args:
        recipe: what to do; `choices` by name go before what it says.
        overwrite: start again in a folder that holds something else.
        pool: makes the workers; threads of this process by default.
        watch: told about the progress, instead of whoever looks on.

    Raises:
        UserError: the inputs, the folder or the disk do not allow it. What is finished stays.
        PassingError: the same may work later, as where another run is at work there.
    """
    with watching(watch) as told:
        return prune_and_publish(_recipe(recipe, choices), overwrite=overwrite, pool=pool, watch=told)


def merge(
    sources: Sequence[str | Mapping[str, Any]],
    /,
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
    **choices: Any,
) -> Result:
    """Prune several fine-tuned checkpoints of one base, each as it would be alone, and combine what is kept of them.

    Args:
        sources: their folders, or mappings with `finetuned` and perhaps `weight`, `method`, `density`, `scope`, `seed`.
        overwrite, pool, watch: as of `prune`.
        choices: a recipe's: `base`, `out`, `combine`, `scaling`, and what is for all sources.

    Raises:
        UserError: the sources do not belong together, or as of `prune`.
    """
    merged = [{"finetuned": source} if isinstance(source, str) else dict(source) for source in sources]
    if not merged:
        raise UserError("give at least one fine-tuned checkpoint")
    return prune(Recipe.of(**choices, merged=merged), overwrite=overwrite, pool=pool, watch=watch)


def plan(recipe: Recipe | None = None, /, *, overwrite: bool = False, **choices: Any) -> Plan:
    """Plan a prune from headers alone, and check what it would check.

    Raises:
        UserError, PassingError: what `prune` would raise before it begins.
    """
    made, state = look(staged_recipe(_recipe(recipe, choices)), overwrite)
    if state != "finished":
        check_disk(made, state)
    return made


def sweep(
    *,
    evaluate: Sequence[str] = (),
    tasks: Sequence[str] = (),
    texts: Sequence[str] = (),
    evaluate_seconds: float | None = None,
    choose: str | None = None,
    choose_anyway: bool = False,
    overwrite: bool = False,
    pool: MakePool | None = None,
    evaluator: Callable[[Recipe], Evaluate] | None = None,
    watch: Watch | None = None,
    **choices: Any,
) -> Facts:
    """Prune in many ways from one reading, evaluate each, and choose.

    Args:
        evaluate, tasks, texts: as `--evaluate`, `--tasks` and `--text` take them.
        choose: as `--choose` takes it; `choose_anyway`: where the evaluations show neither skill.
        evaluator: makes what evaluates, for a recipe; one after the other in this process by default.
        choices: a recipe's; `method`, `scope`, `density`, `strength`, `tail` and `layer_scale` may be lists.

    Raises:
        UserError, PassingError: as of `prune`; no candidate can be chosen so.
    """
    asked = evaluation(evaluate, tasks, texts, evaluate_seconds)
    done = run_sweep(
        choices,
        asked,
        choose,
        choose_anyway=choose_anyway,
        overwrite=overwrite,
        pool=pool,
        evaluator=evaluator,
        watching=lambda: watching(watch),
    )
    return Facts(done.facts, sweep_text(done.facts, done.out))


def compare(
    *checkpoints: str,
    base: str | None = None,
    finetuned: str | None = None,
    evaluate: Sequence[str] = (),
    tasks: Sequence[str] = (),
    texts: Sequence[str] = (),
    evaluate_seconds: float | None = None,
    evaluator: Evaluate = in_turn,
) -> Facts:
    """Finished checkpoints side by side: what was kept in each, and the same evaluations of all.

    Raises:
        UserError: a checkpoint cannot be read, or their inputs are not the same.
    """
    if len(checkpoints) < 2:
        raise UserError("give two checkpoints or more")
    from fapm.choosing import compare as comparing

    asked = evaluation(evaluate, tasks, texts, evaluate_seconds)
    facts = comparing.compare(checkpoints, asked, base, finetuned, evaluator).facts()
    return Facts(facts, compare_text(facts))


def verify(
    out: str, *, base: str | None = None, finetuned: str | Sequence[str] | None = None, load: bool = False
) -> list[str]:
    """Check a finished prune against its inputs; returns its problems, a sentence each, none if all is well.

    Args:
        base, finetuned: where they are now, if not where prune found them.
        load: let transformers build the model that config.json names, too.
    """
    from fapm.checking import verify as checking  # loads torch

    made = load_manifest(out)
    with Progress() as progress:
        progress.count(made["totals"]["written_bytes"], "verify")
        return checking.verify(out, base, finetuned, progress.advance, load)


def apply(deltas: str | Sequence[str], **how: Any) -> Result:
    """Put a checkpoint together from base and sparse task vectors, applied in order, byte for byte.

    Args:
        how: `base`, `out`, and means, as of `prune`.

    Raises:
        UserError: base is not the one over which they were made.
    """
    finetuned = layered([deltas] if isinstance(deltas, str) else list(deltas))
    return prune(**{**how, "finetuned": finetuned, "allow_code": True, "rules": EVERYTHING})


def extract(*, lora: int | None = None, **how: Any) -> Result:
    """Make a sparse task vector of any two checkpoints: all elements that differ, pruned or not.

    Args:
        lora: make a LoRA adapter of this rank instead: of each linear layer's change the nearest matrix of it.
        how: `base`, `finetuned`, `out`, and means, as of `prune`.
    """
    if lora is not None:
        return prune(**{**how, "method": "low-rank", "rank": lora, "emit": "adapter"})
    return prune(**{**how, "emit": "delta", "rules": EVERYTHING})
