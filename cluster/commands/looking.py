"""inspect, report, status, verify, demo."""

from __future__ import annotations

import sys

import click
import cloup

from fapm.cluster.commands.saying import log, print_facts, print_page
from fapm.cluster.options import json_option
from fapm.errors import printable


@cloup.command(short_help="List what a checkpoint holds.")
@cloup.argument("checkpoint")
@json_option
def inspect(checkpoint: str, as_json: bool) -> None:
    """List what the folder CHECKPOINT holds, from its headers alone.

    \b
    Examples:
      fapm inspect llama/
      fapm inspect runs/latest
      fapm inspect pruned/ --json
    """
    from fapm.reporting import looking

    facts = looking.inspect(checkpoint)
    print_facts(facts, repr(facts), as_json)


@cloup.command(short_help="Show what a prune or a sweep has done.")
@cloup.argument("out")
@cloup.option("--html", metavar="FILE", help="Write it as one HTML file to look at instead. Needs fapm[page].")
@json_option
def report(out: str, html: str | None, as_json: bool) -> None:
    """Show again what the finished prune or sweep in the folder OUT has done, and what kept least and most of Δ.

    \b
    Examples:
      fapm report pruned/
      fapm report pruned/ --html report.html
      fapm report pruned/ --json
    """
    from fapm.reporting import looking

    if html:
        from fapm.reporting.page import page

        print_page(page(out), html, as_json)
        return
    facts = looking.report(out)
    print_facts(facts, repr(facts), as_json)


@cloup.command(short_help="Say how far a run is.")
@cloup.argument("out")
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
    from fapm.reporting import looking

    facts = looking.status(out)
    print_facts(facts, repr(facts), as_json)


@cloup.command(short_help="Check an output against its inputs.")
@cloup.argument("out")
@cloup.option("--base", metavar="FOLDER", help="Where the pre-trained checkpoint is now.  [where prune found it]")
@cloup.option(
    "--finetuned", metavar="FOLDER", multiple=True,
    help="Where the fine-tuned checkpoint is now, or those of a merge.  [where prune found it]",
)  # fmt: skip
@cloup.option("--load", is_flag=True, help="Ask transformers too whether the model that config.json names takes it.")
@json_option
def verify(out: str, base: str | None, finetuned: tuple[str, ...], load: bool, as_json: bool) -> None:
    """Check the finished prune in the folder OUT against its inputs: checksums, every element, what each group keeps.

    Exits with 1 and a line for each problem if there are any.

    \b
    Examples:
      fapm verify pruned/
      fapm verify pruned/ --load
      fapm verify pruned/ --base /new/place/llama --finetuned /new/place/llama-math
    """
    from fapm.checking.verify import verify
    from fapm.manifest.read import load_manifest
    from fapm.reporting.progress import Progress

    run = load_manifest(out)
    with Progress() as progress:
        progress.count(run["totals"]["written_bytes"], "verify")
        problems = verify(out, base, finetuned, progress.advance, load)
    checked = f"{run['totals']['tensors']} tensor(s) in {len(run['shards'])} shard(s)"
    fine = f"{out}: {checked} checked: every element, what each group keeps, and all checksums are as they should be"
    alone = run["totals"].get("unpaired", 0)
    if alone:
        fine += f"\n{alone:,} of {run['totals']['weights']:,} weights have no partner in base and are finetuned's"
    print_facts({"out": out, "checked": checked, "problems": problems}, "\n".join(problems) or fine, as_json)
    if problems:
        log(f"{out}: {len(problems)} problem(s) in {checked}")
        sys.exit(1)


@cloup.command(short_help="Make a small pair, prune it, and verify.")
@cloup.argument("folder", default="fapm-demo", metavar="[DIR]")
def demo(folder: str) -> None:
    """Make a small pair of checkpoints in the folder DIR (fapm-demo), prune it, and verify the result by the formula.

    \b
    Examples:
      fapm demo
      fapm demo /tmp/try
    """
    from pathlib import Path

    from fapm.demo import demo
    from fapm.reporting.facts import prune_facts
    from fapm.reporting.progress import watched
    from fapm.reporting.text import run_text

    with watched() as watch:
        done = demo(Path(folder), watch)
    click.echo(printable(f"{run_text(prune_facts(done.result))}\n\n{done.checked}"))
