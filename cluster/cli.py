"""The command `fapm`. Results go to stdout, everything else to stderr.

Exit codes: 0 fine; 1 what the user gave does not work, or problems were found; 2 wrong usage; 75 what may pass, so that
the same command is worth another try; 130 Ctrl-C; 143 SIGTERM. Only bugs show a traceback. What takes time to load is
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fapm.cluster.entering import before_jobs, before_ray
from fapm.cluster.options import (
    Evaluating,
    address_option,
    choice_options,
    evaluation_options,
    gather_choices,
    json_option,
    read_choices,
    recipe_options,
    work_options,
)
from fapm.errors import PassingError, UserError, one_line, printable, without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from fapm.choosing.evaluation import Evaluate, Said
    from fapm.cluster.submission import Place
    from fapm.planning.plan import Plan
    from fapm.pool import Pool
    from fapm.recipe import Recipe
    from fapm.run import MakePool
    from fapm.schedule import Watch
    from fapm.storage.store import Store


class Commands(click.Group):
    """The commands, and what becomes of their errors."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _log(" ".join(str(error).split()))
            ctx.exit(os.EX_TEMPFAIL if isinstance(error, PassingError) else 1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _log(
                f"no space left on a disk ({error.filename or 'of this machine'}); free some and give the command again"
            )
            ctx.exit(os.EX_TEMPFAIL)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if name in ("fapm", "") or name in sys.stdlib_module_names:
                raise
            extras = {"ray": "[ray]", "requests": "[ray]", "aiohttp": "[ray]", "lightkube": "[kubernetes]"}
            extra = extras.get(name, "")
            _log(f"the Python module {name} is not installed; install it with: pip install 'fapm{extra}'")
            ctx.exit(1)
        except KeyboardInterrupt as stopped:
            goes_on = ctx.invoked_subcommand in ("prune", "demo")
            _log("stopped" + ("; the same command goes on from here" if goes_on else ""))
            ctx.exit(_signalled(stopped))


def _signalled(stopped: KeyboardInterrupt) -> int:
    """The exit code of a process that was told to stop."""
    return 128 + (signal.SIGTERM if stopped.args == (signal.SIGTERM,) else signal.SIGINT)


def _log(line: str) -> None:
    click.echo(f"fapm: {one_line(line)}", err=True)


def _print(facts: dict[str, Any], text: str, as_json: bool) -> None:
    # In JSON everything but ASCII is escaped, and with it whatever could steer a terminal.
    click.echo(without_secrets(json.dumps(facts).replace("\x7f", "\\u007f")) if as_json else printable(text))


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fapm.version import version

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
    _prune(*read_choices(config, choices), overwrite, as_json)


def _prune(recipe: Recipe, ray: str, by: str, overwrite: bool, as_json: bool) -> None:
    from fapm.cluster.progress import Progress
    from fapm.publish import prune
    from fapm.reporting.facts import prune_facts

    with Progress() as progress:
        result = prune(recipe, overwrite=overwrite, pool=_pool(ray, by), watch=progress.watch())
    _print_result(prune_facts(result), as_json)


@cli.command()
@work_options("delta_compression", "reversible", "allow_pickle", "allow_code")
@click.option(
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


@cli.command()
@work_options("on_conflict")
@click.option("--finetuned", metavar="FOLDER", help="Folder of the fine-tuned checkpoint.")
def extract(finetuned: str | None, overwrite: bool, as_json: bool, **choices: Any) -> None:
    """Make a sparse task vector of any two checkpoints: all elements that differ, pruned or not.

    \b
    Examples:
      fapm extract --base llama/ --finetuned llama-math/ --out llama-math-delta/
    """
    _all_of_finetuned({**choices, "finetuned": finetuned, "emit": "delta"}, overwrite, as_json)


def _all_of_finetuned(choices: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    from fapm.recipe import EVERYTHING

    recipe, ray, by = read_choices(None, {**choices, "rules": EVERYTHING})
    _prune(recipe, ray, by, overwrite, as_json)


@cli.command(cls=Evaluating)
@recipe_options
@evaluation_options
@click.option(
    "--choose",
    metavar="HOW",
    help="Make OUT of a candidate: 'retained>=0.99' (of those the one with the least forgetting), 'forgetting<=0.02' "
    "(the one that retains most), knee, or its name.",
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
    **choices: Any,
) -> None:
    """Prune in many ways from one reading, evaluate each by your own means, and choose.

    --method, --scope and --density take several values between commas, or lists in the recipe. The candidates are in
    OUT/sweep/, each as complete as prune makes it; what is chosen becomes OUT. The same command again does what is
    missing.

    \b
    Examples:
      fapm sweep --base llama/ --finetuned llama-math/ --out pruned/ --density 0.05,0.1,0.2 --emit delta
      fapm sweep --base llama/ --finetuned llama-math/ --out pruned/ --method fapm,magnitude --density 0.1,0.2 \\
        --tasks new=gsm8k old=mmlu,hellaswag --choose 'retained>=0.99'
      fapm sweep --config recipe.yaml --evaluate './score.sh {checkpoint}' --choose knee --ray local
    """
    from fapm.choosing import sweep as sweeping
    from fapm.choosing.candidates import SWEPT, candidates
    from fapm.choosing.choice import by_name, check_choice
    from fapm.choosing.choice import choose as choose_from
    from fapm.choosing.evaluation import evaluation
    from fapm.cluster.progress import Progress
    from fapm.recipe import Recipe
    from fapm.reporting.text import sweep_text

    given, ray, by = gather_choices(config, choices)
    asked = evaluation(commands, tasks, texts, seconds)
    one = Recipe.of(**{name: value for name, value in given.items() if name not in SWEPT})
    folder = sweeping.sweep_folder(one)
    wanted = candidates(given, folder)
    names = [candidate.name for candidate in wanted]
    if choose:
        check_choice(choose, names)
        if asked.is_none and choose not in names:
            raise UserError(f"--choose {choose} needs --evaluate, --tasks or --text")
    pool = _pool(ray, by)
    with Progress() as progress:
        watch = progress.watch()
        made = sweeping.sweep(wanted, overwrite=overwrite, pool=pool, watch=watch)
    watch.say(f"{len(made)} candidate(s) in {folder}")
    swept = sweeping.evaluate_sweep(folder, made, asked, _evaluating(ray, made[0].plan.recipe), watch)
    facts = sweeping.write_sweep(swept)
    if choose:
        try:
            named = choose in names
            choice = by_name(choose, len(names)) if named else choose_from(choose, swept.candidate_points)
        except UserError:
            _print({"out": one.out, **facts}, sweep_text(facts, one.out), as_json)
            raise
        with Progress() as progress:
            sweeping.take(swept, choice, one.out, overwrite=overwrite, pool=pool, watch=progress.watch())
        facts = sweeping.write_sweep(replace(swept, choice=choice))
    _print({"out": one.out, **facts}, sweep_text(facts, one.out), as_json)
    _end_if_failed(list(swept.said.values()), "; the same command tries them again")


def _evaluating(ray: str, recipe: Recipe) -> Evaluate:
    if ray == "off":
        from fapm.choosing.evaluation import in_turn

        return in_turn
    before_ray(ray)
    from fapm.cluster.evaluating import on_ray

    return on_ray(ray, recipe, _log)


def _end_if_failed(said: Sequence[Said], hint: str = "") -> None:
    failed = [one for one in said if one.error]
    for one in failed:
        _log(str(one))
    if failed:
        _log(f"{len(failed)} of {len(said)} evaluations failed{hint}")
        sys.exit(1)


@cli.command(cls=Evaluating)
@click.argument("checkpoints", nargs=-1, metavar="CHECKPOINT CHECKPOINT…")
@evaluation_options
@click.option("--base", metavar="FOLDER", help="The pre-trained checkpoint.  [that of the outputs of fapm among them]")
@click.option("--finetuned", metavar="FOLDER", help="The fine-tuned checkpoint.  [likewise]")
@click.option(
    "--ray", metavar="WHERE", default="off", help="off, local, or a cluster's ADDRESS, to evaluate side by side.  [off]"
)
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
    compared = compare(checkpoints, asked, base, finetuned, _evaluating(ray, recipe), _log)
    _print(compared.facts(), compare_text(compared.facts()), as_json)
    _end_if_failed(list(compared.said.values()))


def _pool(ray: str, by: str) -> MakePool:
    """Makes the workers, and says which and why."""

    def make(plan: Plan, out: Store, watch: Watch) -> Pool:
        if ray == "off":
            from fapm.recipe import ON_RAY_ONLY
            from fapm.run import in_process

            threads = in_process(plan, out, watch)
            why = f"by {by}" if by else "give --ray to use a cluster"
            for name in (name for name in ON_RAY_ONLY if getattr(plan.recipe, name)):
                watch.say(f"note: {name.replace('_', '-')} means nothing without Ray")
            watch.say(f"running in this process with {threads.workers} worker(s) ({why})")
            return threads
        before_ray(ray)
        from fapm.cluster.pool import ray_pool

        known = {"local": "a Ray of its own on this machine", "auto": "the Ray cluster of this machine"}
        where = known.get(ray, f"the Ray cluster at {ray}")
        watch.say(f"running on {where} (by {by})")
        return ray_pool(ray)(plan, out, watch)

    return make


@cli.command()
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
    from fapm.storage.address import HUB, scheme_of
    from fapm.storage.rate import read_rate

    made, state = look(staged_recipe(recipe), overwrite)
    todo = len(made.shards) if state == "new" else len(unfinished_shards(made))
    if state != "finished":
        check_disk(made, state)
    sides = [side for side in (made.base, made.finetuned) if not scheme_of(side.folder.address)]
    files = {side.folder.at(name): entry["size"] for side in sides for name, entry in side.identity.items()}
    facts = plan_facts(made, state, todo, default_workers(recipe, len(made.shards)), read_rate(files))
    if scheme_of(recipe.out) == HUB:
        facts |= {"out": recipe.out, "upload_bytes": made.write_bytes}
    _print(facts, plan_text(facts), as_json)


@cli.command()
@click.argument("recipe", required=False, metavar="[RECIPE]")
@choice_options
@address_option
@click.option(
    "--kubernetes", metavar="FILE", help="Make a RayJob like that in this manifest, instead of a job of --address."
)
@click.option("--no-wait", is_flag=True, help="Return as soon as the cluster has it.")
@click.option("--install", is_flag=True, help="Have the cluster's nodes install what fapm needs, by pip.")
@click.option("--runtime-env", metavar="FILE", help="YAML with Ray's runtime environment for the job.")
def submit(
    recipe: str | None,
    overwrite: bool,
    as_json: bool,
    address: str,
    kubernetes: str | None,
    no_wait: bool,
    install: bool,
    runtime_env: str | None,
    **choices: Any,
) -> None:
    """Send a prune to a Ray cluster as a job, show how far it is, and end with its exit code.

    RECIPE is a YAML file with the options of prune; those given here override it. fapm ships itself: the cluster needs
    Python 3.11 and what fapm depends on, or --install. The same recipe over the same inputs is the same job: one that
    has ended well or is at work is not sent again. Ctrl-C leaves the job alone.

    \b
    Examples:
      fapm submit recipe.yaml --address http://10.0.0.1:8265
      fapm submit recipe.yaml --address http://10.0.0.1:8265 --workers 2-40 --density 0.2 --no-wait
      fapm submit --base /nfs/llama --finetuned /nfs/runs/latest --out '/nfs/pruned/{date}'
    """
    from fapm.cluster.submission import make_submission, send

    choice, ray, _ = read_choices(recipe, choices, ray="auto")
    place: Place
    if kubernetes:
        if install or runtime_env:
            raise UserError("--install and --runtime-env are not for --kubernetes; its manifest names an image")
        from fapm.cluster.kubernetes import RayJobObjects

        place = RayJobObjects(kubernetes)
    else:
        job = _job_module()
        place = job.RayJobs(address, job.runtime_env(runtime_env, install))
    submission = make_submission(choice, ray, overwrite, _log)
    sent = send(submission, place)
    facts = {"id": sent.id, "how": sent.how, "out": submission.out, **place.where}
    if sent.how == "nothing to do":
        again = "remove the folder to do it again"
        _print(facts, f"{submission.out}: this run is finished over the same inputs; nothing to do ({again})", as_json)
        return
    assert sent.id
    if sent.how == "already running":
        _print(facts, f"{sent.id} is at work on the same already; {place.come_back(sent.id)}", as_json)
    elif no_wait:
        _print(facts, f"{sent.id} is submitted; {place.come_back(sent.id)}", as_json)
    else:
        _log(f"{sent.id} is submitted; Ctrl-C leaves it alone")
        _follow(place, sent.id, as_json)


def _follow(place: Place, id: str, as_json: bool) -> NoReturn:
    """Show a job until it has ended, and end with its exit code."""
    from dataclasses import asdict

    from fapm.cluster.progress import Progress, Retold

    try:
        with Progress() as progress:
            retold = Retold(progress)
            job = place.follow(id, retold.hear)
    except KeyboardInterrupt as stopped:
        _log(f"detached, the job goes on: {place.come_back(id)}")
        sys.exit(_signalled(stopped))
    if retold.result is not None:
        _print_result(retold.result, as_json)
    elif as_json and job.code == 0:
        _print(asdict(job), "", as_json)
    if job.message:
        _log(" ".join(job.message.removeprefix("fapm: ").split()))
    if job.code:
        _log(f"{job.id} has {job.state}" + ("; submit it again to go on from here" if job.code != 1 else ""))
    sys.exit(job.code or 0)


def _print_result(facts: dict[str, Any], as_json: bool) -> None:
    from fapm.reporting.text import run_text

    _print(facts, run_text(facts), as_json)


def _job_module() -> ModuleType:
    """`fapm.cluster.job`, after what Ray looks at when it is loaded."""
    before_jobs()
    return importlib.import_module("fapm.cluster.job")


@cli.command()
@address_option
@json_option
def jobs(address: str, as_json: bool) -> None:
    """List the prunes that a Ray cluster has had as jobs, the newest first.

    \b
    Examples:
      fapm jobs --address http://10.0.0.1:8265
    """
    from dataclasses import asdict

    job = _job_module()
    found = job.RayJobs(address).jobs()
    _print({"jobs": [asdict(one) for one in found]}, job.table(found), as_json)


@cli.command()
@click.argument("id")
@address_option
@click.option("--follow", "-f", is_flag=True, help="Show how far it is until it ends, and end with its exit code.")
@json_option
def logs(id: str, address: str, follow: bool, as_json: bool) -> None:
    """Show what the job ID has said, or follow it. The beginning of an ID is enough.

    \b
    Examples:
      fapm logs fapm-3f2a9c01d4e5-1 --address http://10.0.0.1:8265
      fapm logs fapm-3f2a --follow
    """
    from fapm.cluster.progress import Progress, Retold

    place = _job_module().RayJobs(address)
    found = place.find(id)
    if follow:
        _follow(place, found.id, as_json)
    lines = place.logs(found)
    if as_json:
        _print({"id": found.id, "lines": lines}, "", as_json)
        return
    with Progress(sys.stdout, bar=False) as progress:
        retold = Retold(progress)
        for line in lines:
            retold.hear(line)
    if retold.result is not None:
        _print_result(retold.result, as_json)


@cli.command()
@click.argument("id")
@address_option
@json_option
def stop(id: str, address: str, as_json: bool) -> None:
    """End the job ID. What it has finished stays: submitted again, it goes on from there.

    \b
    Examples:
      fapm stop fapm-3f2a9c01d4e5-1 --address http://10.0.0.1:8265
    """
    from dataclasses import asdict

    place = _job_module().RayJobs(address)
    found = place.find(id, only=True)
    ended = place.stop(found)
    now = f"{ended.id} has {ended.state}" + (" before" if found.is_over else "; submitted again, it goes on from here")
    _print(asdict(ended), now, as_json)


@cli.command()
@click.argument("checkpoint")
@json_option
def inspect(checkpoint: str, as_json: bool) -> None:
    """List what the folder CHECKPOINT holds, from its headers alone.

    \b
    Examples:
      fapm inspect llama/
      fapm inspect runs/latest
      fapm inspect pruned/ --json
    """
    from fapm.formats.checkpoint import open_checkpoint
    from fapm.formats.newest import newest
    from fapm.reporting.facts import checkpoint_facts
    from fapm.reporting.text import checkpoint_text

    path, passed = newest(checkpoint, "checkpoint")
    facts = checkpoint_facts(open_checkpoint(path, "checkpoint"))
    facts["oddities"] = [*passed, *facts["oddities"]]
    _print(facts, checkpoint_text(facts), as_json)


@cli.command()
@click.argument("out")
@click.option("--html", metavar="FILE", help="Write it as one HTML file to look at instead. Needs fapm[page].")
@json_option
def report(out: str, html: str | None, as_json: bool) -> None:
    """Show again what the finished prune or sweep in the folder OUT has done, and what kept least and most of Δ.

    \b
    Examples:
      fapm report pruned/
      fapm report pruned/ --html report.html
      fapm report pruned/ --json
    """
    from fapm.choosing.sweep import read_sweep
    from fapm.layout import MANIFEST, SWEEP
    from fapm.manifest.read import load_manifest, read_table
    from fapm.reporting.facts import densities, extremes, run_facts
    from fapm.reporting.text import densities_text, extremes_text, run_text, sweep_text
    from fapm.storage.address import inside, open_store

    if html:
        from pathlib import Path

        from fapm.reporting.page import page
        from fapm.storage.local import plain_errors

        written, file = page(out).encode(), Path(html)
        with plain_errors(file):
            before = file.with_name(f".{file.name}.{os.getpid()}")
            with open(before, "xb") as made:  # and through no link
                made.write(written)
            before.replace(file)
        _print({"html": html, "bytes": len(written)}, html, as_json)
        return
    swept = read_sweep(inside(out, SWEEP))
    facts, texts = {"sweep": swept} if swept else {}, [sweep_text(swept, out)] if swept else []
    if not swept or open_store(out).has(MANIFEST):
        facts |= run_facts(load_manifest(out), out)
        rows = read_table(out)
        found = densities((row["name"], row["density"]) for row in rows if row["density"] is not None)
        facts |= extremes(rows) | {"densities": found}
        texts += [run_text(facts), extremes_text(facts)]
        texts += [f"densities: {densities_text(found)}"] if found else []
    _print(facts, "\n\n".join(texts), as_json)


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
    from fapm.reporting.status import status_facts, status_text

    facts = status_facts(out)
    _print(facts, status_text(facts), as_json)


@cli.command()
@click.argument("out")
@click.option("--base", metavar="FOLDER", help="Where the pre-trained checkpoint is now.  [where prune found it]")
@click.option("--finetuned", metavar="FOLDER", help="Where the fine-tuned checkpoint is now.  [where prune found it]")
@click.option("--load", is_flag=True, help="Ask transformers too whether the model that config.json names takes it.")
@json_option
def verify(out: str, base: str | None, finetuned: str | None, load: bool, as_json: bool) -> None:
    """Check the finished prune in the folder OUT against its inputs: checksums, every element, what each group keeps.

    Exits with 1 and a line for each problem if there are any.

    \b
    Examples:
      fapm verify pruned/
      fapm verify pruned/ --load
      fapm verify pruned/ --base /new/place/llama --finetuned /new/place/llama-math
    """
    from fapm.checking.verify import verify
    from fapm.cluster.progress import Progress
    from fapm.manifest.read import load_manifest

    run = load_manifest(out)
    with Progress() as progress:
        progress.count(run["totals"]["written_bytes"], "verify")
        problems = verify(out, base, finetuned, progress.advance, load)
    checked = f"{run['totals']['tensors']} tensor(s) in {len(run['shards'])} shard(s)"
    fine = f"{out}: {checked} checked: every element, what each group keeps, and all checksums are as they should be"
    alone = run["totals"].get("unpaired", 0)
    if alone:
        fine += f"\n{alone:,} of {run['totals']['weights']:,} weights have no partner in base and are finetuned's"
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

    from fapm.cluster.progress import Progress
    from fapm.demo import demo
    from fapm.reporting.facts import prune_facts
    from fapm.reporting.text import run_text

    with Progress() as progress:
        done = demo(Path(folder), progress.watch())
    click.echo(printable(f"{run_text(prune_facts(done.result))}\n\n{done.checked}"))


def _terminated(*_: object) -> None:
    """End gently on SIGTERM, which ends nodes and jobs: the run lets go of its folder and of its workers."""
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
        if "fapm.cluster.pool" in sys.modules and sys.modules["fapm.cluster.pool"].headless:
            # Without a head Ray would hold the process at its end for a minute and then kill it with a code of its own.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0)
        raise
