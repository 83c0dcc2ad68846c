"""prune, merge, plan, apply, extract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import cloup

from fapm.cluster.commands.saying import detail, print_facts, print_result, shown
from fapm.cluster.commands.where import pool_at
from fapm.cluster.options import (
    RecipeCommand,
    gather_sources,
    merge_options,
    read_choices,
    recipe_options,
    work_options,
)
from fapm.errors import printable

if TYPE_CHECKING:
    from fapm.recipe import Recipe


@cloup.command(cls=RecipeCommand, short_help="Prune a checkpoint.")
@recipe_options
def prune(config: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Prune a checkpoint.

    Stopped, it goes on when the same command is given again. Finished, it does nothing.

    \b
    Examples:
      fapm prune --base llama/ --finetuned llama-math/ --out pruned/
      fapm prune --base llama/ --finetuned llama-math/ --out pruned/ --density 0.05 --scope layer
      fapm prune --base llama/ --finetuned llama-math/ --out pruned/ --rule '*norm*=finetuned' --rule 'lm_head.*=base'
      fapm prune --base llama/ --finetuned llama-math/ --out blend/ --method wise-ft --density 0.5
      fapm prune --config recipe.yaml --density 0.2 --ray local --workers 4
      fapm prune --config recipe.yaml --ray 10.0.0.1:6379 --workers 2-40 --cpus-per-worker 4 --memory 4GiB
    """
    _prune(*read_choices(config, choices), overwrite, as_json)


def _prune(recipe: Recipe, ray: str, by: str, overwrite: bool, as_json: bool) -> None:
    from fapm.publish import prune_and_publish
    from fapm.reporting.facts import prune_facts

    with shown() as watch:
        result = prune_and_publish(recipe, overwrite=overwrite, pool=pool_at(ray, by), watch=watch)
    facts = prune_facts(result)
    print_result(facts, as_json)
    if not as_json and detail() >= 0:
        from fapm.reporting.text import next_text

        click.echo(f"\n{printable(next_text(facts, recipe.emit))}", err=True)


@cloup.command(cls=RecipeCommand, short_help="Merge several fine-tuned checkpoints of one base.")
@merge_options
def merge(config: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Prune several fine-tuned checkpoints of one base, each as it would be alone, and combine what is kept of them.

    sum adds the changes up, mean takes their mean, ties only those of the sign that weighs more. slerp goes along the
    arc between two, model-stock toward the mean by the angles between them. first, last and error let one source
    decide. Stopped, it goes on when the same command is given again.

    \b
    Examples:
      fapm merge --base llama/ --finetuned llama-math/ --finetuned llama-code/ --out both/
      fapm merge --base llama/ --finetuned math/ --density 0.1 --finetuned code/ --density 0.2 --combine ties --out b/
      fapm merge --base llama/ --finetuned math/ --weight 1 --finetuned code-lora/ --weight 0.5 --method dare --out b/
      fapm merge --config merge.yaml --ray local --workers 4
    """
    _prune(*read_choices(config, gather_sources(choices)), overwrite, as_json)


@cloup.command(cls=RecipeCommand, short_help="Put a checkpoint together from base and a delta.")
@work_options("delta_compression", "reversible", "allow_pickle", "allow_code")
@cloup.option(
    "--delta", "deltas", metavar="FOLDER", multiple=True, help="The sparse task vector; several are applied in order."
)
def apply(deltas: tuple[str, ...], overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Put a checkpoint together from base and a sparse task vector, byte for byte.

    Another base than the one that it was made over is refused.

    \b
    Examples:
      fapm apply --base llama/ --delta llama-math-delta/ --out llama-math/
      fapm apply --base org/llama --delta s3://bucket/delta --out llama-math/ --ray local
    """
    from fapm.storage.address import layered

    finetuned = layered(deltas) if deltas else None
    _all_of_finetuned({**choices, "finetuned": finetuned, "allow_code": True}, overwrite, as_json)


@cloup.command(cls=RecipeCommand, short_help="Make a delta of any two checkpoints.")
@work_options("on_conflict")
@cloup.option("--finetuned", metavar="FOLDER", help="Folder of the fine-tuned checkpoint.")
@cloup.option("--lora", "rank", metavar="RANK", help="Make a LoRA adapter of this rank instead.")
def extract(finetuned: str | None, rank: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Make a sparse task vector of any two checkpoints: all elements that differ, pruned or not.

    With --lora an adapter for PEFT: of each linear layer's change the nearest matrix of that rank. What it cannot hold,
    norms, embeddings, stacked experts, stays base's and is named; the table says which share of ‖Δ‖² it has.

    \b
    Examples:
      fapm extract --base llama/ --finetuned llama-math/ --out llama-math-delta/
      fapm extract --base llama/ --finetuned llama-math/ --out llama-math-lora/ --lora 64 --memory 4GiB
    """
    choices = {**choices, "finetuned": finetuned}
    if rank is None:
        return _all_of_finetuned({**choices, "emit": "delta"}, overwrite, as_json)
    adapter = {"method": "low-rank", "rank": rank, "emit": "adapter"}
    return _prune(*read_choices(None, {**choices, **adapter}), overwrite, as_json)


def _all_of_finetuned(choices: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    from fapm.recipe import EVERYTHING

    recipe, ray, by = read_choices(None, {**choices, "rules": EVERYTHING})
    _prune(recipe, ray, by, overwrite, as_json)


@cloup.command(cls=RecipeCommand, short_help="Say what prune would do, and check it.")
@recipe_options
def plan(config: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Say what prune would do with the same arguments, and check what it would check.

    Of the weights it reads only a few, to see how fast the storage is.

    \b
    Examples:
      fapm plan --base llama/ --finetuned llama-math/ --out pruned/
      fapm plan --config recipe.yaml --scope global --shard-size 2GiB --json
    """
    recipe, _, _ = read_choices(config, choices)
    from fapm.manifest.state import look, unfinished_shards
    from fapm.pool import default_workers
    from fapm.publish import staged_recipe
    from fapm.reporting.facts import plan_facts
    from fapm.reporting.text import plan_text
    from fapm.run import check_disk
    from fapm.storage.address import is_repository, scheme_of
    from fapm.storage.rate import read_rate

    made, state = look(staged_recipe(recipe), overwrite)
    todo = len(made.shards) if state == "new" else len(unfinished_shards(made))
    if state != "finished":
        check_disk(made, state)
    sides = [side for side in made.inputs.values() if not scheme_of(side.folder.address)]
    files = {side.folder.at(name): entry["size"] for side in sides for name, entry in side.identity.items()}
    facts = plan_facts(made, state, todo, default_workers(recipe, len(made.shards)), read_rate(files))
    if is_repository(recipe.out):
        facts |= {"out": recipe.out, "upload_bytes": made.write_bytes}
    print_facts(facts, plan_text(facts), as_json)
