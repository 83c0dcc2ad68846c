"""submit, jobs, logs, stop."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import cloup

from fapm.cluster.commands.saying import detail, log, print_facts, print_result, signalled
from fapm.cluster.entering import before_jobs
from fapm.cluster.options import RecipeCommand, address_option, choice_options, json_option, read_choices
from fapm.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

    from fapm.cluster.submission import Place


@cloup.command(cls=RecipeCommand, short_help="Send a prune to a Ray cluster as a job.")
@cloup.argument("recipe", required=False, metavar="[RECIPE]")
@choice_options
@address_option
@cloup.option(
    "--kubernetes", metavar="FILE", help="Make a RayJob like that in this manifest, instead of a job of --address."
)
@cloup.option("--no-wait", is_flag=True, help="Return as soon as the cluster has it.")
@cloup.option("--install", is_flag=True, help="Have the cluster's nodes install what fapm needs, by pip.")
@cloup.option("--runtime-env", metavar="FILE", help="YAML with Ray's runtime environment for the job.")
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
    submission = make_submission(choice, ray, overwrite, log)
    sent = send(submission, place)
    facts = {"id": sent.id, "how": sent.how, "out": submission.out, **place.where}
    if sent.how == "nothing to do":
        again = "remove the folder to do it again"
        print_facts(
            facts, f"{submission.out}: this run is finished over the same inputs; nothing to do ({again})", as_json
        )
        return
    assert sent.id
    if sent.how == "already running":
        print_facts(facts, f"{sent.id} is at work on the same already; {place.come_back(sent.id)}", as_json)
    elif no_wait:
        print_facts(facts, f"{sent.id} is submitted; {place.come_back(sent.id)}", as_json)
    else:
        log(f"{sent.id} is submitted; Ctrl-C leaves it alone")
        _follow(place, sent.id, as_json)


def _follow(place: Place, id: str, as_json: bool) -> NoReturn:
    """Show a job until it has ended, and end with its exit code."""
    from dataclasses import asdict

    from fapm.reporting.progress import Progress, Retold

    try:
        with Progress(detail=detail()) as progress:
            retold = Retold(progress)
            job = place.follow(id, retold.hear)
    except KeyboardInterrupt as stopped:
        log(f"detached, the job goes on: {place.come_back(id)}")
        sys.exit(signalled(stopped))
    if retold.result is not None:
        print_result(retold.result, as_json)
    elif as_json and job.code == 0:
        print_facts(asdict(job), "", as_json)
    if job.message:
        log(" ".join(job.message.removeprefix("fapm: ").split()))
    if job.code:
        log(f"{job.id} has {job.state}" + ("; submit it again to go on from here" if job.code != 1 else ""))
    sys.exit(job.code or 0)


def _job_module() -> ModuleType:
    """`fapm.cluster.job`, after what Ray looks at when it is loaded."""
    before_jobs()
    return importlib.import_module("fapm.cluster.job")


@cloup.command(short_help="List the prunes of a Ray cluster.")
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
    print_facts({"jobs": [asdict(one) for one in found]}, job.table(found), as_json)


@cloup.command(short_help="Show or follow what a job has said.")
@cloup.argument("id")
@address_option
@cloup.option("--follow", "-f", is_flag=True, help="Show how far it is until it ends, and end with its exit code.")
@json_option
def logs(id: str, address: str, follow: bool, as_json: bool) -> None:
    """Show what the job ID has said, or follow it. The beginning of an ID is enough.

    \b
    Examples:
      fapm logs fapm-3f2a9c01d4e5-1 --address http://10.0.0.1:8265
      fapm logs fapm-3f2a --follow
    """
    from fapm.reporting.progress import Progress, Retold

    place = _job_module().RayJobs(address)
    found = place.find(id)
    if follow:
        _follow(place, found.id, as_json)
    lines = place.logs(found)
    if as_json:
        print_facts({"id": found.id, "lines": lines}, "", as_json)
        return
    with Progress(sys.stdout, bar=False) as progress:
        retold = Retold(progress)
        for line in lines:
            retold.hear(line)
    if retold.result is not None:
        print_result(retold.result, as_json)


@cloup.command(short_help="End a job.")
@cloup.argument("id")
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
    print_facts(asdict(ended), now, as_json)
