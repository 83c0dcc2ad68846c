"""Results on stdout, as text or JSON, and lines on stderr."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fapm.cluster.options import DETAIL
from fapm.errors import one_line, printable, without_secrets

if TYPE_CHECKING:
    from fapm.schedule import Watch


def signalled(stopped: KeyboardInterrupt) -> int:
    """The exit code of a process that was told to stop."""
    return 128 + (signal.SIGTERM if stopped.args == (signal.SIGTERM,) else signal.SIGINT)


def log(line: str) -> None:
    click.echo(f"fapm: {one_line(line)}", err=True)


def print_facts(facts: dict[str, Any], text: str, as_json: bool) -> None:
    # In JSON everything but ASCII is escaped, and with it whatever could steer a terminal.
    click.echo(without_secrets(json.dumps(facts).replace("\x7f", "\\u007f")) if as_json else printable(text))


def detail() -> int:
    """What of the progress -q and -v say to show, as `Progress` takes it."""
    found: int = click.get_current_context().meta.get(DETAIL, 0)
    return found


@contextlib.contextmanager
def shown() -> Iterator[Watch]:
    """The watch of a command, shown as -q and -v say."""
    from fapm.reporting.progress import watched

    with watched(detail()) as watch:
        yield watch


def print_page(page: str, file: str, as_json: bool) -> None:
    """Write a page, and say where it is."""
    from pathlib import Path

    from fapm.reporting.page import write_page

    print_facts({"html": file, "bytes": write_page(page, Path(file))}, file, as_json)


def print_result(facts: dict[str, Any], as_json: bool) -> None:
    from fapm.reporting.text import run_text

    print_facts(facts, run_text(facts), as_json)
