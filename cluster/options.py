"""The options of `fapm prune` and `fapm plan`, and the recipe that they make together with a YAML file.

They take any text and default to None: the recipe knows what is allowed and what the defaults are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import cloup

from fapm.descriptions import DESCRIPTIONS
from fapm.errors import UserError

if TYPE_CHECKING:
    from fapm.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def _as_detail(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.meta[DETAIL] = -1 if parameter.name == "quiet" else 1


DETAIL = "fapm.detail"
"""In the context of a command, what of its progress is shown, as `Progress` takes it."""
_quiet_option = cloup.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_as_detail, help="Say nothing on stderr but errors."
)
_verbose_option = cloup.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_as_detail, help="Say all that the log is told."
)
json_option = cloup.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def _flag(name: str) -> Any:
    """A flag that the recipe knows; None where it is not given."""
    field = name.removeprefix("--").replace("-", "_")
    return cloup.option(name, is_flag=True, default=None, help=DESCRIPTIONS[field])


def _option(name: str, metavar: str, field: str = "", help: str = "", **more: Any) -> Any:
    """An option for a field of the recipe, of the same name unless another is given."""
    names = (name, field) if field else (name,)
    text = help or DESCRIPTIONS[field or name.removeprefix("--").replace("-", "_")]
    return cloup.option(*names, metavar=metavar, help=text, **more)


_SECTIONS: dict[str, tuple[Any, ...]] = {
    "Checkpoints": (_option("--base", "FOLDER"), _option("--finetuned", "FOLDER"), _option("--out", "FOLDER")),
    "What is kept": (
        _option("--method", "NAME"),
        _option("--density", "SHARE"),
        _option("--strength", "FACTOR"),
        _option("--tail", "SHARE"),
        _option("--rank", "N"),
        _option("--scope", "SCOPE"),
        _option("--layer-scale", "A:B"),
        _option("--rule", "PATTERN=ACTION", "rules", multiple=True),
    ),
    "What is written": (
        _option("--emit", "WHAT"),
        _option("--dtype", "DTYPE"),
        cloup.option("--overwrite", is_flag=True, help="Replace the checkpoint that the output folder holds."),
    ),
    "Means": (
        _option("--memory", "SIZE"),
        _option("--workers", "N|MIN-MAX"),
        _option("--device", "DEVICE"),
        _option("--ray", "WHERE", help="off, local, or a cluster's ADDRESS.  [RAY_ADDRESS if it is set, else off]"),
    ),
    "More about the inputs": (
        _option("--rename", "FROM=TO", "renames", multiple=True),
        _option("--unpaired", "WHAT"),
        _option("--nonfinite", "POLICY"),
        _option("--seed", "N"),
        _flag("--plain-codes"),
        _flag("--allow-same"),
        _flag("--strict"),
        _flag("--allow-pickle"),
        _option("--on-conflict", "WHAT"),
    ),
    "More about the output": (
        _option("--shard-size", "SIZE"),
        _flag("--reversible"),
        _option("--delta-compression", "HOW"),
        _flag("--allow-code"),
        _option("--staging", "FOLDER"),
        _option("--visibility", "WHOSE"),
        _flag("--alone"),
    ),
    "More about workers": (
        _option("--device-memory", "SIZE"),
        _option("--cpus-per-worker", "N"),
        _option("--gpus-per-worker", "SHARE"),
        _option("--accelerator", "TYPE"),
        _option("--label", "KEY=VALUE", "labels", multiple=True),
    ),
}
"""The options of a prune by what they are about. `--help` leaves out those with more, `--help-all` shows all."""


class RecipeCommand(cloup.Command):
    """A command with so many options that its help shows the core of them."""

    _shows_all = "fapm.help_all"

    def format_params(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups = self.option_groups
        if not ctx.meta.get(self._shows_all):
            self.option_groups = [group for group in groups if not group.title.startswith("More about")]
        try:
            super().format_params(ctx, formatter)
        finally:
            self.option_groups = groups

    @classmethod
    def help_all(cls, ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            ctx.meta[cls._shows_all] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()


_help_all_option = cloup.option(
    "--help-all", is_flag=True, expose_value=False, is_eager=True, callback=RecipeCommand.help_all,
    help="Show this message with all options.",
)  # fmt: skip


_config_option = cloup.option(
    "--config", metavar="FILE", help="A recipe in YAML with these options; those given here override it."
)
address_option = cloup.option(
    "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", default="http://127.0.0.1:8265",
    help="The cluster's Jobs API, as http://HEAD:8265.  [RAY_API_SERVER_ADDRESS if it is set, else this machine]",
)  # fmt: skip


def choice_options(command: Command) -> Command:
    """Every option of a prune but the recipe's file."""
    return _with_sections(command, set())


def _with_sections(command: Command, left_out: set[str]) -> Command:
    command = _quiet_option(_verbose_option(json_option(_help_all_option(command))))
    for title, options in reversed(_SECTIONS.items()):
        wanted = [option for option in options if _name_of(option) not in left_out]
        command = cloup.option_group(title, *wanted)(command) if wanted else command
    return command


_OF_CONTENT = {
    "finetuned", "method", "density", "strength", "tail", "rank", "scope", "layer_scale", "rules", "dtype", "seed",
    "nonfinite", "emit", "unpaired",
}  # fmt: skip


def work_options(*left_out: str) -> Callable[[Command], Command]:
    """The options that say where and with what to work, and not what is to be pruned.

    Args:
        left_out: others that are not wanted.
    """

    return lambda command: _with_sections(command, _OF_CONTENT | set(left_out))


def _name_of(option: Any) -> str:
    def probe() -> None: ...

    (made,) = option(probe).__click_params__
    return str(made.name)


_OF_SOURCES = {
    "weights": "What its changes are multiplied by.  [1]",
    "methods": "A method that chooses or mixes elements.  [fapm]",
    "densities": "Share of its elements that it changes, 0 to 1.  [0.1]",
    "scopes": "What shares one budget of it: tensor, layer or global.  [tensor]",
    "seeds": "For random and dare; give each its own, or all choose the same places.  [0]",
}
"""Options of a merge that are given once for all sources, or as often as there are."""
_SINGULAR = {"weights": "weight", "methods": "method", "densities": "density", "scopes": "scope", "seeds": "seed"}
_METAVARS = {"weights": "W", "methods": "NAME", "densities": "SHARE", "scopes": "SCOPE", "seeds": "N"}


def merge_options(command: Command) -> Command:
    """The options of a merge: of each source, of how they are combined, and those of a prune."""
    sources = [
        cloup.option("--finetuned", "finetuned", metavar="FOLDER", multiple=True, help="One of them. Repeatable."),
        *(
            cloup.option(f"--{_SINGULAR[name]}", name, metavar=_METAVARS[name], multiple=True, help=text)
            for name, text in _OF_SOURCES.items()
        ),
    ]
    combination = [_option("--combine", "HOW"), _option("--scaling", "FACTOR")]
    command = _with_sections(
        command, {"finetuned", "method", "density", "strength", "tail", "rank", "scope", "seed", "on_conflict"}
    )
    command = cloup.option_group("How they are combined", *combination)(command)
    title = "Fine-tuned checkpoints, each with its options, or all with the same"
    return _config_option(cloup.option_group(title, *sources)(command))


def gather_sources(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices of a merge as its recipe has them.

    Raises:
        UsageError: an option is given neither once nor for each source.
    """
    given = {_SINGULAR[name]: choices.pop(name) for name in _OF_SOURCES}
    paths = choices.pop("finetuned")
    merged: list[dict[str, Any]] = [{"finetuned": path} for path in paths]
    for name, values in given.items():
        if len(values) == 1 and name != "weight":
            choices[name] = values[0]
        elif values and len(values) not in (1, len(paths)):
            raise click.UsageError(
                f"--{name} is given {len(values)} times, and --finetuned {len(paths)} times; give it once for all, or "
                "for each in their order."
            )
        else:
            for source, value in zip(merged, values * len(paths) if len(values) == 1 else values, strict=False):
                source[name] = value
    return {**choices, "merged": merged or None}


def recipe_options(command: Command) -> Command:
    return _config_option(choice_options(command))


def read_choices(config: str | None, choices: dict[str, Any], ray: str | None = None) -> tuple[Recipe, str, str]:
    """The recipe, where to run it (`off`, `local` or a Ray address), and who said so.

    Args:
        ray: where, unless an option says otherwise; what the file and the environment say is for this machine.
    """
    from fapm.recipe import Recipe

    given, where, by = gather_choices(config, choices, ray)
    return Recipe.of(**given), where, by


def gather_choices(
    config: str | None, choices: dict[str, Any], ray: str | None = None
) -> tuple[dict[str, Any], str, str]:
    """The same, the choices as they were given."""
    from fapm.recipe import read_recipe

    given, by = choices.pop("ray"), "--ray"
    ray = ray if given is None else given
    choices = {name: value for name, value in choices.items() if value not in (None, ())}
    if config:
        from_file = read_recipe(config)
        in_file = from_file.pop("ray", None)
        choices = from_file | choices
        if ray is None and in_file is not None:
            ray, by = "off" if in_file is False else in_file, f"ray in {config}"  # YAML reads `off` as false
    if ray is None:
        ray, by = (os.environ["RAY_ADDRESS"], "RAY_ADDRESS") if os.environ.get("RAY_ADDRESS") else ("off", "")
    if not isinstance(ray, str) or not ray:
        raise UserError(f"{by}: give off, local or the address of a Ray cluster (it is {ray!r})")
    if choices.get("merged"):
        choices.pop("finetuned", None)  # the first one's
    sides = ("base", "merged" if choices.get("merged") else "finetuned", "out")
    missing = [f"--{side}" for side in sides if choices.get(side) is None]
    if missing:
        raise click.UsageError(f"missing: {', '.join(missing)}. Give each here or in the recipe of --config.")
    return choices, ray, by


_EVALUATION_OPTIONS = (
    cloup.option(
        "--evaluate", "commands", metavar="COMMAND", multiple=True,
        help="Evaluate every checkpoint by a command (no shell) with {checkpoint} in it, that prints JSON like "
        '{"new": 0.93, "old": 0.81}, or by package.module:function, that returns such. Repeatable.',
    ),
    cloup.option(
        "--tasks", metavar="SKILL=TASK,…", multiple=True,
        help="Evaluate by tasks of lm-evaluation-harness, names or YAML files: new=gsm8k old=mmlu,hellaswag. "
        "Needs fapm[eval].",
    ),
    cloup.option(
        "--text", "texts", metavar="SKILL=FILE", multiple=True,
        help="Evaluate a language model by its cross entropy on a text: old=corpus.txt. Needs fapm[eval].",
    ),
    cloup.option(
        "--evaluate-seconds", "seconds", metavar="S", type=float, help="How long an evaluation may take.  [3600]"
    ),
)  # fmt: skip


def evaluation_options(command: Command) -> Command:
    """How checkpoints are evaluated."""
    for option in reversed(_EVALUATION_OPTIONS):
        command = option(command)
    return command


class Evaluating(RecipeCommand):
    """A command whose --tasks and --text take all the words that follow them and say which skill they are about."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        option = ""
        for word in args:
            if option and words[-1] != option and word.partition("=")[0] in ("new", "old"):
                words.append(option)
            elif word.startswith("-"):
                option = word if word in ("--tasks", "--text") else ""
            words.append(word)
        return super().parse_args(ctx, words)
