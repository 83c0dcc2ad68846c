"""The command `fapm`. Results go to stdout, everything else to stderr.

Exit codes: 0 fine; 1 what the user gave does not work, or problems were found; 2 wrong usage; 75 what may pass, so that
the same command is worth another try; 130 Ctrl-C; 143 SIGTERM. Only bugs show a traceback. What takes time to load is
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import click
import cloup

from fapm.cluster.commands.beginning import completion, init
from fapm.cluster.commands.choosing import compare, sweep
from fapm.cluster.commands.jobs import jobs, logs, stop, submit
from fapm.cluster.commands.looking import demo, inspect, report, status, verify
from fapm.cluster.commands.pruning import apply, extract, merge, plan, prune
from fapm.cluster.commands.saying import log, signalled
from fapm.errors import PassingError, UserError


class Commands(cloup.Group):
    """The commands, and what becomes of their errors."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            log(" ".join(str(error).split()))
            ctx.exit(os.EX_TEMPFAIL if isinstance(error, PassingError) else 1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log(
                f"no space left on a disk ({error.filename or 'of this machine'}); free some and give the command again"
            )
            ctx.exit(os.EX_TEMPFAIL)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if name in ("fapm", "") or name in sys.stdlib_module_names:
                raise
            extras = {"ray": "[ray]", "requests": "[ray]", "aiohttp": "[ray]", "lightkube": "[kubernetes]"}
            extra = extras.get(name, "")
            log(f"the Python module {name} is not installed; install it with: pip install 'fapm{extra}'")
            ctx.exit(1)
        except KeyboardInterrupt as stopped:
            goes_on = ctx.invoked_subcommand in ("prune", "merge", "demo")
            log("stopped" + ("; the same command goes on from here" if goes_on else ""))
            ctx.exit(signalled(stopped))


_STYLE = cloup.Style(fg="cyan")
_SETTINGS: Any = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "align_option_groups": False,
    "align_sections": True,
    "show_subcommand_aliases": False,
    "formatter_settings": cloup.HelpFormatter.settings(
        col1_max_width=28,
        theme=cloup.HelpTheme(heading=cloup.Style(bold=True), col1=_STYLE, invoked_command=_STYLE),
    ),
}


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fapm.version import version

        click.echo(f"fapm {version()}")
        ctx.exit()


@cloup.group(cls=Commands, context_settings=cloup.Context.settings(**_SETTINGS))
@cloup.option(
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


_SECTIONS = {
    "Begin": (demo, init, plan),
    "Prune": (prune, merge, apply, extract),
    "Choose": (sweep, compare),
    "Look": (inspect, status, report, verify),
    "On a cluster": (submit, jobs, logs, stop),
    "For the shell": (completion,),
}
for title, commands in _SECTIONS.items():
    cli.add_section(cloup.Section(title, commands))


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
