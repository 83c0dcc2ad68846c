"""The command `fapm`. Results go to stdout, everything else to stderr.

Exit codes: 0 fine; 1 what the user gave does not work, or problems were found; 2 wrong usage; 130 Ctrl-C. Only bugs
show a traceback. What takes time to load is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.pool import Pool
    from pipeline.recipe import Recipe
    from pipeline.run import Watch

Command = TypeVar("Command", bound=Callable[..., Any])
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


class Commands(click.Group):
    """The commands, and what becomes of their errors."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _log(" ".join(str(error).split()))
            ctx.exit(1)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in ("prune", "demo")
            _log("stopped" + ("; the same command goes on from here" if goes_on else ""))
            ctx.exit(130)


def _log(line: str) -> None:
    click.echo(f"fapm: {line}", err=True)


def _print(facts: dict[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else text)


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pipeline.manifest import version

        click.echo(f"fapm {version()}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="The version."
)
def cli() -> None:
    """Prune the task vector of a fine-tuned checkpoint: keep the elements that carry the new skill, give all others
    their pre-trained value back (FAPM, arXiv 2509.08255).

    \b
    Examples:
      fapm demo
      fapm prune --base llama/ --finetuned llama-math/ --out pruned/
      fapm plan --base llama/ --finetuned llama-math/ --out pruned/ --scope global
    """


_RECIPE_OPTIONS = (
    click.option("--base", metavar="FOLDER", help="Folder of the pre-trained checkpoint."),
    click.option("--finetuned", metavar="FOLDER", help="Folder of the fine-tuned checkpoint."),
    click.option("--out", metavar="FOLDER", help="Folder for the pruned checkpoint."),
    click.option(
        "--density", metavar="SHARE", help="Share of the elements that stay fine-tuned; for wise-ft it is α.  [0.1]"
    ),
    click.option("--method", metavar="NAME", help="fapm, magnitude, relative, random, dare or wise-ft.  [fapm]"),
    click.option("--scope", metavar="SCOPE", help="What shares one budget: tensor, layer or global.  [tensor]"),
    click.option(
        "--rule", "rules", metavar="PATTERN=ACTION", multiple=True,
        help="What becomes of the tensors whose name matches: prune, base or finetuned. The first match decides; "
        "rules given here replace the recipe's. Repeatable.",
    ),
    click.option("--dtype", metavar="DTYPE", help="bfloat16, float16, float32 or float64.  [finetuned's]"),
    click.option("--seed", metavar="N", help="For random and dare.  [0]"),
    click.option("--nonfinite", metavar="POLICY", help="At NaN and Inf: error, or base for base's value.  [error]"),
    click.option("--shard-size", metavar="SIZE", help="Largest file to write.  [1GiB]"),
    click.option("--memory", metavar="SIZE", help="Budget of each worker.  [1GiB]"),
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.  [auto]"),
    click.option("--workers", metavar="N", help="How many work side by side.  [one for each core or GPU]"),
    click.option(
        "--ray", metavar="WHERE", help="off, local, or a cluster's ADDRESS.  [RAY_ADDRESS if it is set, else off]"
    ),
    click.option("--config", metavar="FILE", help="A recipe in YAML with these options; those given here override it."),
    click.option("--overwrite", is_flag=True, help="Replace the checkpoint that the output folder holds."),
    _json_option,
)  # fmt: skip


def _recipe_options(command: Command) -> Command:
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


def _read_choices(config: str | None, choices: dict[str, Any]) -> tuple[Recipe, str, str]:
    """The recipe, where to run it (`off`, `local` or a Ray address), and who said so."""
    from pipeline.recipe import Recipe, read_yaml

    ray, by = choices.pop("ray"), "--ray"
    choices = {name: value for name, value in choices.items() if value not in (None, ())}
    if config:
        from_file = read_yaml(config)
        in_file = from_file.pop("ray", None)
        choices = from_file | choices
        if ray is None and in_file is not None:
            ray, by = "off" if in_file is False else in_file, f"ray in {config}"  # YAML reads `off` as false
    if ray is None:
        ray, by = (os.environ["RAY_ADDRESS"], "RAY_ADDRESS") if os.environ.get("RAY_ADDRESS") else ("off", "")
    if not isinstance(ray, str) or not ray:
        raise UserError(f"{by}: give off, local or the address of a Ray cluster (it is {ray!r})")
    missing = [f"--{side}" for side in ("base", "finetuned", "out") if choices.get(side) is None]
    if missing:
        raise click.UsageError(f"missing: {', '.join(missing)}. Give each here or in the recipe of --config.")
    return Recipe.of(**choices), ray, by


@cli.command()
@_recipe_options
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
    """
    recipe, ray, by = _read_choices(config, choices)
    from cluster.progress import Progress
    from pipeline.report import prune_facts, run_text
    from pipeline.run import prune

    with Progress() as progress:
        result = prune(recipe, overwrite=overwrite, pool=_pool(ray, by), watch=progress.watch())
    facts = prune_facts(result)
    _print(facts, run_text(facts), as_json)


def _pool(ray: str, by: str) -> Callable[[Plan, Watch], Pool]:
    """Makes the workers, and says which and why."""

    def make(plan: Plan, watch: Watch) -> Pool:
        if ray == "off":
            from pipeline.run import in_process

            threads = in_process(plan, watch)
            why = f"by {by}" if by else "give --ray to use a cluster"
            watch.say(f"running in this process with {threads.workers} worker(s) ({why})")
            return threads
        try:
            from cluster.pool import ray_pool
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError(
                "Ray is not installed; install it with: pip install 'fapm[ray]', or use --ray off"
            ) from None
        where = "a Ray of its own on this machine" if ray == "local" else f"the Ray cluster at {ray}"
        watch.say(f"running on {where} (by {by})")
        return ray_pool(ray)(plan, watch)

    return make


@cli.command()
@_recipe_options
def plan(config: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Say what prune would do with the same arguments, and check what it would check. Reads no weights.

    \b
    Examples:
      fapm plan --base llama/ --finetuned llama-math/ --out pruned/
      fapm plan --config recipe.yaml --scope global --shard-size 2GiB --json
    """
    recipe, _, _ = _read_choices(config, choices)
    from pipeline.manifest import check_folder, unfinished_shards
    from pipeline.plan import make_plan
    from pipeline.pool import default_workers
    from pipeline.report import plan_facts, plan_text
    from pipeline.run import check_means

    made = make_plan(recipe)
    state = check_folder(made, overwrite)
    todo = len(made.shards) if state == "new" else len(unfinished_shards(made))
    if state != "finished":
        check_means(made, state)
    facts = plan_facts(made, state, todo, default_workers(recipe, len(made.shards)))
    _print(facts, plan_text(facts), as_json)


@cli.command()
@click.argument("checkpoint")
@_json_option
def inspect(checkpoint: str, as_json: bool) -> None:
    """List what the folder CHECKPOINT holds, from its headers alone.

    \b
    Examples:
      fapm inspect llama/
      fapm inspect pruned/ --json
    """
    from pipeline.checkpoint import open_checkpoint
    from pipeline.report import checkpoint_facts, checkpoint_text

    facts = checkpoint_facts(open_checkpoint(checkpoint, "checkpoint"))
    _print(facts, checkpoint_text(facts), as_json)


@cli.command()
@click.argument("out")
@_json_option
def report(out: str, as_json: bool) -> None:
    """Show again what the finished prune in the folder OUT has done, and which tensors kept least and most of Δ.

    \b
    Examples:
      fapm report pruned/
      fapm report pruned/ --json
    """
    from pipeline.manifest import load_manifest, read_table
    from pipeline.report import extremes, extremes_text, run_facts, run_text

    facts = run_facts(load_manifest(out), out) | extremes(read_table(out))
    _print(facts, f"{run_text(facts)}\n\n{extremes_text(facts)}", as_json)


@cli.command()
@click.argument("out")
@click.option("--base", metavar="FOLDER", help="Where the pre-trained checkpoint is now.  [where prune found it]")
@click.option("--finetuned", metavar="FOLDER", help="Where the fine-tuned checkpoint is now.  [where prune found it]")
@_json_option
def verify(out: str, base: str | None, finetuned: str | None, as_json: bool) -> None:
    """Check the finished prune in the folder OUT against its inputs: checksums, every element, what each group keeps.

    Exits with 1 and a line for each problem if there are any.

    \b
    Examples:
      fapm verify pruned/
      fapm verify pruned/ --base /new/place/llama --finetuned /new/place/llama-math
    """
    from cluster.progress import Progress
    from pipeline.manifest import load_manifest
    from pipeline.verify import verify

    run = load_manifest(out)
    with Progress() as progress:
        progress.count(run["totals"]["written_bytes"], "verify")
        problems = verify(out, base, finetuned, progress.advance)
    checked = f"{run['totals']['tensors']} tensor(s) in {len(run['shards'])} shard(s)"
    fine = f"{out}: {checked} checked: every element, what each group keeps, and all checksums are as they should be"
    _print({"out": out, "checked": checked, "problems": problems}, "\n".join(problems) or fine, as_json)
    if problems:
        _log(f"{out}: {len(problems)} problem(s) in {checked}")
        sys.exit(1)


@cli.command()
@click.argument("folder", default="fapm-demo", metavar="[DIR]")
def demo(folder: str) -> None:
    """Make a small pair of checkpoints in the folder DIR (fapm-demo), prune it, and verify the result by the formula.

    \b
    Examples:
      fapm demo
      fapm demo /tmp/try
    """
    from pathlib import Path

    from cluster.progress import Progress
    from pipeline.demo import demo
    from pipeline.report import prune_facts, run_text

    with Progress() as progress:
        done = demo(Path(folder), progress.watch())
    click.echo(f"{run_text(prune_facts(done.result))}\n\n{done.checked}")


def main() -> None:
    """The program `fapm`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no Δ shall not stop a run
    cli(prog_name="fapm")
