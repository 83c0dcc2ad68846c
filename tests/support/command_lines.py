"""Command lines that stand in files, read by the command line itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fapm import Recipe
from fapm.cluster.cli import cli
from fapm.cluster.options import read_choices

_PRUNES = ("prune", "plan", "submit")
_NOT_OF_A_RECIPE = ("overwrite", "as_json", "address", "kubernetes", "no_wait", "install", "runtime_env")


@dataclass
class Command:
    """A command with its options, and the recipe that it means, if it means one."""

    given: dict[str, Any]
    recipe: Recipe | None


def check_command(words: list[str]) -> Command:
    """What `fapm …` means; an error of click or the recipe if it means nothing."""
    assert words[0] == "fapm", words
    name, *arguments = words[1:]
    with cli.commands[name].make_context(name, arguments) as context:
        given = dict(context.params)
    if name not in _PRUNES:
        return Command(given, None)
    choices = {key: value for key, value in given.items() if key not in _NOT_OF_A_RECIPE}
    file = choices.pop("config" if name != "submit" else "recipe")
    recipe, _, _ = read_choices(file, choices, ray="off")
    return Command(given, recipe)
