"""configs/README.md: its commands are understood, its files are there, and its figures are the model's."""

from __future__ import annotations

import errno
import re
import shlex
from pathlib import Path

import pytest
from click import Context
from command_lines import check_command
from obstore.exceptions import BaseError

from fapm.cluster.cli import cli
from fapm.errors import PassingError
from fapm.storage import answers, local

CONFIGS = Path(__file__).parents[2] / "configs"
PAGE = (CONFIGS / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
FAPM = [line[line.index("fapm ") :] for line in LINES if re.match(r"(30 2 \* \* \* +)?fapm ", line)]
EDITED = {"/etc/fapm/recipe.yaml": str(CONFIGS / "kubernetes" / "recipe.yaml")}


@pytest.mark.parametrize("line", FAPM)
def test_a_command_of_fapm_is_understood(line):
    check_command([EDITED.get(word, word) for word in shlex.split(line)])


def test_each_way_takes_five_commands():
    assert len(FAPM) == 6
    assert [len(block.splitlines()) for block in BLOCKS] == [5, 5, 5, 1]


def test_the_files_that_it_names_are_there():
    for path in re.findall(r"configs/[\w./-]+\w", PAGE):
        assert (CONFIGS.parent / path).exists(), path
    listed = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)[:8]
    named = {name for line in listed for name in re.findall(r"`([^`]+)`", line)}
    here = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file()}
    inside = {name if "/" in name or name in here else f"clusters/{name}" for name in named}
    pages = {name for name in here if name.endswith(".md")} - {"README.md"}
    assert inside == here - pages - {"README.md"}
    assert all(f"[{page}]({page})" in PAGE for page in pages)


def test_the_options_that_it_names_are_options():
    known = {
        option for command in cli.commands.values() for p in command.get_params(Context(command)) for option in p.opts
    }
    words = re.findall(r"`(--[a-z-]+)", PAGE)
    assert words
    assert set(words) <= known


def test_the_figures_are_those_of_the_model():
    rows = [line.strip("| ").split(" | ") for line in (CONFIGS / "scale.md").read_text().splitlines()]
    model = {row[3]: (row[9], row[10]) for row in rows if row[:3] == ["70B", "8", "tensor"]}
    shown = [line.strip("| ").split(" | ") for line in PAGE.splitlines()]
    assert {row[0]: (row[1], row[2]) for row in shown if row[0] in model} == model


def test_what_is_final_and_what_may_pass_is_as_it_is_said():
    """Of the codes and errors in the table's two columns."""
    page = PAGE[PAGE.index("## What is final") :]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    codes = {1: set(), 75: set()}
    for row in rows:
        for code, cell in zip((1, 75), row[1:], strict=False):
            codes[code] |= set(re.findall(r"`([A-Z][A-Za-z]{4,})`", cell))
    passing_errors = {name for name in codes[75] if name.isupper()}
    assert passing_errors >= {"ENOSPC", "EDQUOT", "ENOTCONN", "ESTALE"}
    assert {getattr(errno, name) for name in passing_errors} <= local._PASSING | {errno.ENOSPC, errno.EDQUOT}
    for code in codes[75] - passing_errors:
        assert isinstance(answers.explained("s3://b/x", error_of(code, 400)), PassingError), code
    for code in codes[1]:
        found = answers.explained("s3://b/x", error_of(code, 503 if code in answers.FINAL else 403))
        assert not isinstance(found, PassingError), code
    for status in re.findall(r"\b([45]\d\d)\b", rows[0][2]):
        assert isinstance(answers.explained("s3://b/x", error_of("", int(status))), PassingError), status


def error_of(code: str, status: int) -> BaseError:
    body = f": <Code>{code}</Code>" if code else ""
    return BaseError(f"Generic S3 error: status code: {status} Words{body}")
