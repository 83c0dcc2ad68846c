"""The options of `fapm prune` and `fapm plan`, and the recipe that they make together with a YAML file.

They take any text and default to None: the recipe knows what is allowed and what the defaults are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fapm.descriptions import DESCRIPTIONS
from fapm.errors import UserError

if TYPE_CHECKING:
    from fapm.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


_RECIPE_OPTIONS = (
    click.option("--base", metavar="FOLDER", help=DESCRIPTIONS["base"]),
    click.option("--finetuned", metavar="FOLDER", help=DESCRIPTIONS["finetuned"]),
    click.option("--out", metavar="FOLDER", help=DESCRIPTIONS["out"]),
    click.option("--density", metavar="SHARE", help=DESCRIPTIONS["density"]),
    click.option("--method", metavar="NAME", help=DESCRIPTIONS["method"]),
    click.option("--strength", metavar="FACTOR", help=DESCRIPTIONS["strength"]),
    click.option("--tail", metavar="SHARE", help=DESCRIPTIONS["tail"]),
    click.option("--scope", metavar="SCOPE", help=DESCRIPTIONS["scope"]),
    click.option("--rule", "rules", metavar="PATTERN=ACTION", multiple=True, help=DESCRIPTIONS["rules"]),
    click.option("--rename", "renames", metavar="FROM=TO", multiple=True, help=DESCRIPTIONS["renames"]),
    click.option("--unpaired", metavar="WHAT", help=DESCRIPTIONS["unpaired"]),
    click.option("--plain-codes", is_flag=True, default=None, help=DESCRIPTIONS["plain_codes"]),
    click.option("--allow-pickle", is_flag=True, default=None, help=DESCRIPTIONS["allow_pickle"]),
    click.option("--allow-code", is_flag=True, default=None, help=DESCRIPTIONS["allow_code"]),
    click.option("--emit", metavar="WHAT", help=DESCRIPTIONS["emit"]),
    click.option("--on-conflict", metavar="WHAT", help=DESCRIPTIONS["on_conflict"]),
    click.option("--reversible", is_flag=True, default=None, help=DESCRIPTIONS["reversible"]),
    click.option("--delta-compression", metavar="HOW", help=DESCRIPTIONS["delta_compression"]),
    click.option("--dtype", metavar="DTYPE", help=DESCRIPTIONS["dtype"]),
    click.option("--seed", metavar="N", help=DESCRIPTIONS["seed"]),
    click.option("--nonfinite", metavar="POLICY", help=DESCRIPTIONS["nonfinite"]),
    click.option("--shard-size", metavar="SIZE", help=DESCRIPTIONS["shard_size"]),
    click.option("--memory", metavar="SIZE", help=DESCRIPTIONS["memory"]),
    click.option("--device", metavar="DEVICE", help=DESCRIPTIONS["device"]),
    click.option("--device-memory", metavar="SIZE", help=DESCRIPTIONS["device_memory"]),
    click.option("--staging", metavar="FOLDER", help=DESCRIPTIONS["staging"]),
    click.option("--alone", is_flag=True, default=None, help=DESCRIPTIONS["alone"]),
    click.option("--visibility", metavar="WHOSE", help=DESCRIPTIONS["visibility"]),
    click.option("--workers", metavar="N|MIN-MAX", help=DESCRIPTIONS["workers"]),
    click.option(
        "--ray", metavar="WHERE", help="off, local, or a cluster's ADDRESS.  [RAY_ADDRESS if it is set, else off]"
    ),
    click.option("--cpus-per-worker", metavar="N", help=DESCRIPTIONS["cpus_per_worker"]),
    click.option("--gpus-per-worker", metavar="SHARE", help=DESCRIPTIONS["gpus_per_worker"]),
    click.option("--accelerator", metavar="TYPE", help=DESCRIPTIONS["accelerator"]),
    click.option("--label", "labels", metavar="KEY=VALUE", multiple=True, help=DESCRIPTIONS["labels"]),
    click.option("--overwrite", is_flag=True, help="Replace the checkpoint that the output folder holds."),
    json_option,
)


_config_option = click.option(
    "--config", metavar="FILE", help="A recipe in YAML with these options; those given here override it."
)
address_option = click.option(
    "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", default="http://127.0.0.1:8265",
    help="The cluster's Jobs API, as http://HEAD:8265.  [RAY_API_SERVER_ADDRESS if it is set, else this machine]",
)  # fmt: skip


def choice_options(command: Command) -> Command:
    """Every option of a prune but the recipe's file."""
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


_OF_CONTENT = {
    "finetuned", "method", "density", "strength", "tail", "scope", "rules", "dtype", "seed", "nonfinite", "emit",
    "unpaired",
}  # fmt: skip


def work_options(*left_out: str) -> Callable[[Command], Command]:
    """The options that say where and with what to work, and not what is to be pruned.

    Args:
        left_out: others that are not wanted.
    """

    def decorate(command: Command) -> Command:
        for option in reversed(_RECIPE_OPTIONS):
            if _name_of(option) not in _OF_CONTENT | set(left_out):
                command = option(command)
        return command

    return decorate


def _name_of(option: Any) -> str:
    def probe() -> None: ...

    (made,) = option(probe).__click_params__
    return str(made.name)


def recipe_options(command: Command) -> Command:
    return _config_option(choice_options(command))


def as_arguments(recipe: Recipe) -> list[str]:
    """The options with which `fapm prune` makes this recipe again."""
    from fapm.recipe import option_words

    arguments = []
    for field, value in recipe.model_dump(mode="json", exclude_defaults=True).items():
        arguments += option_words(field, value)
    return arguments


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
    from fapm.recipe import read_yaml

    given, by = choices.pop("ray"), "--ray"
    ray = ray if given is None else given
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
    return choices, ray, by


_EVALUATION_OPTIONS = (
    click.option(
        "--evaluate", "commands", metavar="COMMAND", multiple=True,
        help="Evaluate every checkpoint by a command (no shell) with {checkpoint} in it, that prints JSON like "
        '{"new": 0.93, "old": 0.81}, or by package.module:function, that returns such. Repeatable.',
    ),
    click.option(
        "--tasks", metavar="SKILL=TASK,…", multiple=True,
        help="Evaluate by tasks of lm-evaluation-harness, names or YAML files: new=gsm8k old=mmlu,hellaswag. "
        "Needs fapm[eval].",
    ),
    click.option(
        "--text", "texts", metavar="SKILL=FILE", multiple=True,
        help="Evaluate a language model by its cross entropy on a text: old=corpus.txt. Needs fapm[eval].",
    ),
    click.option(
        "--evaluate-seconds", "seconds", metavar="S", type=float, help="How long an evaluation may take.  [3600]"
    ),
)  # fmt: skip


def evaluation_options(command: Command) -> Command:
    """How checkpoints are evaluated."""
    for option in reversed(_EVALUATION_OPTIONS):
        command = option(command)
    return command


class Evaluating(click.Command):
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
