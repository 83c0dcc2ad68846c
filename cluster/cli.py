"""The command `fapm`. Results go to stdout, everything else to stderr.

Exit codes: 0 fine; 1 what the user gave does not work, or problems were found; 2 wrong usage; 75 what may pass, so that
the same command is worth another try; 130 Ctrl-C; 143 SIGTERM. Only bugs show a traceback. What takes time to load is
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from cluster.options import json_option, read_choices, recipe_options
from pipeline.errors import PassingError, UserError

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.pool import Pool
    from pipeline.run import MakePool, Watch
    from pipeline.storage.local import Folder


class Commands(click.Group):
    """The commands, and what becomes of their errors."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _log(" ".join(str(error).split()))
            ctx.exit(os.EX_TEMPFAIL if isinstance(error, PassingError) else 1)
        except KeyboardInterrupt as stopped:
            goes_on = ctx.invoked_subcommand in ("prune", "demo")
            _log("stopped" + ("; the same command goes on from here" if goes_on else ""))
            ctx.exit(128 + (signal.SIGTERM if stopped.args == (signal.SIGTERM,) else signal.SIGINT))


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


@cli.command()
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
    recipe, ray, by = read_choices(config, choices)
    from cluster.progress import Progress
    from pipeline.report import prune_facts, run_text
    from pipeline.run import prune

    with Progress() as progress:
        result = prune(recipe, overwrite=overwrite, pool=_pool(ray, by), watch=progress.watch())
    facts = prune_facts(result)
    _print(facts, run_text(facts), as_json)


def _pool(ray: str, by: str) -> MakePool:
    """Makes the workers, and says which and why."""

    def make(plan: Plan, out: Folder, watch: Watch) -> Pool:
        if ray == "off":
            from pipeline.recipe import ON_RAY_ONLY
            from pipeline.run import in_process

            threads = in_process(plan, out, watch)
            why = f"by {by}" if by else "give --ray to use a cluster"
            for name in (name for name in ON_RAY_ONLY if getattr(plan.recipe, name)):
                watch.say(f"note: {name.replace('_', '-')} means nothing without Ray")
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
        return ray_pool(ray)(plan, out, watch)

    return make


@cli.command()
@recipe_options
def plan(config: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Say what prune would do with the same arguments, and check what it would check. Reads no weights.

    \b
    Examples:
      fapm plan --base llama/ --finetuned llama-math/ --out pruned/
      fapm plan --config recipe.yaml --scope global --shard-size 2GiB --json
    """
    recipe, _, _ = read_choices(config, choices)
    from pipeline.manifest import look, unfinished_shards
    from pipeline.pool import default_workers
    from pipeline.report import plan_facts, plan_text
    from pipeline.run import check_disk

    made, state = look(recipe, overwrite)
    todo = len(made.shards) if state == "new" else len(unfinished_shards(made))
    if state != "finished":
        check_disk(made, state)
    facts = plan_facts(made, state, todo, default_workers(recipe, len(made.shards)))
    _print(facts, plan_text(facts), as_json)


@cli.command()
@click.argument("checkpoint")
@json_option
def inspect(checkpoint: str, as_json: bool) -> None:
    """List what the folder CHECKPOINT holds, from its headers alone.

    \b
    Examples:
      fapm inspect llama/
      fapm inspect pruned/ --json
    """
    from pipeline.formats.checkpoint import open_checkpoint
    from pipeline.report import checkpoint_facts, checkpoint_text

    facts = checkpoint_facts(open_checkpoint(checkpoint, "checkpoint"))
    _print(facts, checkpoint_text(facts), as_json)


@cli.command()
@click.argument("out")
@json_option
def report(out: str, as_json: bool) -> None:
    """Show again what the finished prune in the folder OUT has done, and which tensors kept least and most of Δ.

    \b
    Examples:
      fapm report pruned/
      fapm report pruned/ --json
    """
    from pipeline.manifest import load_manifest, read_table
    from pipeline.report import densities, densities_text, extremes, extremes_text, run_facts, run_text

    facts = run_facts(load_manifest(out), out)
    rows = read_table(out)
    found = densities((row["name"], row["density"]) for row in rows if row["density"] is not None)
    facts |= extremes(rows) | {"densities": found}
    text = f"{run_text(facts)}\n\n{extremes_text(facts)}"
    _print(facts, text + (f"\n\ndensities: {densities_text(found)}" if found else ""), as_json)


@cli.command()
@click.argument("out")
@json_option
def status(out: str, as_json: bool) -> None:
    """Say how far the run in the folder OUT is, while it is at work and after it has ended or died.

    Reads that folder alone, so it can be asked from any machine that sees it.

    \b
    Examples:
      fapm status pruned/
      watch fapm status pruned/
      fapm status pruned/ --json
    """
    from pipeline.status import status_facts, status_text

    facts = status_facts(out)
    _print(facts, status_text(facts), as_json)


@cli.command()
@click.argument("out")
@click.option("--base", metavar="FOLDER", help="Where the pre-trained checkpoint is now.  [where prune found it]")
@click.option("--finetuned", metavar="FOLDER", help="Where the fine-tuned checkpoint is now.  [where prune found it]")
@json_option
def verify(out: str, base: str | None, finetuned: str | None, as_json: bool) -> None:
    """Check the finished prune in the folder OUT against its inputs: checksums, every element, what each group keeps.

    Exits with 1 and a line for each problem if there are any.

    \b
    Examples:
      fapm verify pruned/
      fapm verify pruned/ --base /new/place/llama --finetuned /new/place/llama-math
    """
    from cluster.progress import Progress
    from pipeline.checking.verify import verify
    from pipeline.manifest import load_manifest

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


def _terminated(*_: object) -> None:
    """What ends a node or a job gently says so by SIGTERM: the run lets go of its folder and of its workers."""
    raise KeyboardInterrupt(signal.SIGTERM)


def main() -> None:
    """The program `fapm`."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no Δ shall not stop a run
    try:
        cli(prog_name="fapm")
    except SystemExit as ended:
        if "cluster.pool" in sys.modules and sys.modules["cluster.pool"].headless:
            # Without a head Ray would hold the process at its end for a minute and then kill it with a code of its own.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0)
        raise
