"""sweep and compare."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
import cloup

from fapm.cluster.commands.saying import log, print_facts, print_page, shown
from fapm.cluster.commands.where import evaluator_at, pool_at
from fapm.cluster.options import Evaluating, evaluation_options, gather_choices, json_option, recipe_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fapm.choosing.evaluation import Said


@cloup.command(cls=Evaluating, short_help="Prune in many ways, evaluate each, and choose.")
@recipe_options
@evaluation_options
@cloup.option("--combine", metavar="HOW", help="Of merges, whose sources are in the recipe: how they are combined.")
@cloup.option("--scaling", metavar="FACTOR", help="Of merges: λ.")
@cloup.option(
    "--choose",
    metavar="HOW",
    help="Make OUT of a candidate: 'retained>=0.99' (of those the one with the least forgetting), 'forgetting<=0.02' "
    "(the one that retains most), knee, or its name.",
)
@cloup.option(
    "--choose-anyway",
    is_flag=True,
    help="Choose also where the evaluations do not show that finetuned has learned something, and forgotten something.",
)
def sweep(
    config: str | None,
    overwrite: bool,
    as_json: bool,
    commands: tuple[str, ...],
    tasks: tuple[str, ...],
    texts: tuple[str, ...],
    seconds: float | None,
    choose: str | None,
    choose_anyway: bool,
    **choices: Any,
) -> None:
    """Prune in many ways from one reading, evaluate each by your own means, and choose.

    --method, --scope, --density, --strength, --tail and --layer-scale take several values between commas, or lists in
    the recipe. base and finetuned are evaluated first. The candidates are in OUT/sweep/, each as complete as prune
    makes it; what is chosen becomes OUT, where --overwrite replaces another choice. The same command again does what
    is missing.

    \b
    Examples:
      fapm sweep --base llama/ --finetuned llama-math/ --out pruned/ --density 0.05,0.1,0.2 --emit delta
      fapm sweep --base llama/ --finetuned llama-math/ --out pruned/ --method fapm,magnitude --density 0.1,0.2 \\
        --tasks new=gsm8k old=mmlu,hellaswag --choose 'retained>=0.99'
      fapm sweep --config recipe.yaml --evaluate './score.sh {checkpoint}' --choose knee --ray local
    """
    from fapm.choosing.evaluation import evaluation
    from fapm.choosing.sweep import NoChoiceError, run_sweep
    from fapm.reporting.text import sweep_text

    given, ray, by = gather_choices(config, choices)
    asked = evaluation(commands, tasks, texts, seconds)
    try:
        done = run_sweep(
            given,
            asked,
            choose,
            choose_anyway=choose_anyway,
            overwrite=overwrite,
            pool=pool_at(ray, by),
            evaluator=lambda recipe: evaluator_at(ray, recipe),
            watching=shown,
        )
    except NoChoiceError as error:
        print_facts(error.facts, sweep_text(error.facts, error.out), as_json)
        raise
    print_facts(done.facts, sweep_text(done.facts, done.out), as_json)
    _end_if_failed(done.failed, done.evaluations, "; the same command tries them again")


def _end_if_failed(failed: Sequence[Said], of: int, hint: str = "") -> None:
    for one in failed:
        log(str(one))
    if failed:
        log(f"{len(failed)} of {of} evaluations failed{hint}")
        sys.exit(1)


@cloup.command(cls=Evaluating, short_help="Show finished checkpoints side by side.")
@cloup.argument("checkpoints", nargs=-1, metavar="CHECKPOINT CHECKPOINT…")
@evaluation_options
@cloup.option("--base", metavar="FOLDER", help="The pre-trained checkpoint.  [that of the outputs of fapm among them]")
@cloup.option("--finetuned", metavar="FOLDER", help="The fine-tuned checkpoint.  [likewise]")
@cloup.option(
    "--ray", metavar="WHERE", default="off", help="off, local, or a cluster's ADDRESS, to evaluate side by side.  [off]"
)
@cloup.option("--html", metavar="FILE", help="Write it as one HTML file to look at instead. Needs fapm[page].")
@json_option
def compare(
    checkpoints: tuple[str, ...],
    commands: tuple[str, ...],
    tasks: tuple[str, ...],
    texts: tuple[str, ...],
    seconds: float | None,
    base: str | None,
    finetuned: str | None,
    ray: str,
    html: str | None,
    as_json: bool,
) -> None:
    """Show two or more finished checkpoints side by side: what was kept in each, and the same evaluations of all.

    \b
    Examples:
      fapm compare pruned-0.1/ pruned-0.2/
      fapm compare pruned/ merged/ --base llama/ --finetuned llama-math/ --tasks new=gsm8k old=hellaswag
    """
    from fapm.choosing.compare import compare
    from fapm.choosing.evaluation import evaluation
    from fapm.recipe import Recipe
    from fapm.reporting.text import compare_text

    if len(checkpoints) < 2:
        raise click.UsageError("give two checkpoints or more")
    asked = evaluation(commands, tasks, texts, seconds)
    recipe = Recipe.of(base=checkpoints[0], finetuned=checkpoints[1], out="-")
    compared = compare(checkpoints, asked, base, finetuned, evaluator_at(ray, recipe), log)
    facts = compared.facts()
    if html:
        from fapm.reporting.page import compared_page

        print_page(compared_page(facts), html, as_json)
    else:
        print_facts(facts, compare_text(facts), as_json)
    _end_if_failed([said for said in compared.said.values() if said.error], len(compared.said))
