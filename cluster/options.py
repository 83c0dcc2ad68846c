"""The options of `fapm prune` and `fapm plan`, and the recipe that they make together with a YAML file.

They take any text and default to None: the recipe knows what is allowed and what the defaults are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fapm.errors import UserError

if TYPE_CHECKING:
    from fapm.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


_RECIPE_OPTIONS = (
    click.option(
        "--base", metavar="FOLDER",
        help="Folder of the pre-trained checkpoint: a path, s3://, gs:// or az://, or org/name[@revision] on the Hub.",
    ),
    click.option(
        "--finetuned", metavar="FOLDER",
        help="Folder of the fine-tuned checkpoint; runs/latest is the newest in runs/ where nothing has that name.",
    ),
    click.option(
        "--out", metavar="FOLDER",
        help="Folder for the pruned checkpoint, or hf://org/name; may hold {date}, {time}, {base}, {finetuned}, "
        "{method}, {scope} and {density}.",
    ),
    click.option(
        "--density", metavar="SHARE",
        help="Share of the elements that stay fine-tuned, 0 to 1; for wise-ft it is α.  [0.1]",
    ),
    click.option("--method", metavar="NAME", help="fapm, magnitude, relative, random, dare or wise-ft.  [fapm]"),
    click.option("--scope", metavar="SCOPE", help="What shares one budget: tensor, layer or global.  [tensor]"),
    click.option(
        "--rule", "rules", metavar="PATTERN=ACTION", multiple=True,
        help="What becomes of the tensors whose name matches: prune, base, finetuned, or a density of their own. The "
        "first match decides; rules given here replace the recipe's. Repeatable.",
    ),
    click.option(
        "--rename", "renames", metavar="FROM=TO", multiple=True,
        help="base's names that begin with FROM are finetuned's that begin with TO; *FROM*=*TO* is the same in the "
        "middle of a name, *FROM=*TO at its end. Repeatable.",
    ),
    click.option(
        "--unpaired", metavar="WHAT",
        help="Where weights of one side have no partner on the other that they should have: error, or pass to take "
        "finetuned's as they are and leave out base's.  [error]",
    ),
    click.option(
        "--plain-codes", is_flag=True, default=None,
        help="FP8 tensors without scales are a plain cast: the values that they spell.",
    ),
    click.option(
        "--allow-pickle", is_flag=True, default=None,
        help="Look into pickled checkpoints (.bin, .distcp), in a process without network that can write nothing.",
    ),
    click.option(
        "--allow-code", is_flag=True, default=None,
        help="Copy Python and auto_map of the fine-tuned checkpoint too; it is never run.",
    ),
    click.option(
        "--emit", metavar="WHAT",
        help="checkpoint; delta, the sparse task vector: what differs from base; or both.  [checkpoint]",
    ),
    click.option(
        "--on-conflict", metavar="WHAT",
        help="Where several sparse task vectors write different values to one place: error, first or last.  [error]",
    ),
    click.option(
        "--reversible", is_flag=True, default=None,
        help="Let the sparse task vector carry base's values too, so that it can be taken back without base.",
    ),
    click.option("--delta-compression", metavar="HOW", help="zstd or none.  [zstd]"),
    click.option("--dtype", metavar="DTYPE", help="bfloat16, float16, float32 or float64.  [finetuned's]"),
    click.option("--seed", metavar="N", help="For random and dare; 0 to 9,223,372,036,854,775,807.  [0]"),
    click.option("--nonfinite", metavar="POLICY", help="At NaN and Inf: error, or base for base's value.  [error]"),
    click.option(
        "--shard-size", metavar="SIZE",
        help="Largest file to write, at least 1KiB.  [an eighth of all, 256MiB to 1GiB]",
    ),
    click.option("--memory", metavar="SIZE", help="Budget of each worker, at least 64MiB.  [1GiB]"),
    click.option(
        "--device", metavar="DEVICE",
        help="cpu, or for a GPU, AMD's too, cuda or cuda:N; auto takes one if it is there.  [auto]",
    ),
    click.option(
        "--device-memory", metavar="SIZE",
        help="Of its GPU for each worker, at least 256MiB.  [its share of what is free, less a margin]",
    ),
    click.option(
        "--staging", metavar="FOLDER",
        help="Where an output for the Hub is put together, seen by all workers.  [a folder of this user's cache]",
    ),
    click.option(
        "--alone", is_flag=True, default=None,
        help="No other run can be at work in OUT: write to a store too that lets two make the same lock.",
    ),
    click.option("--visibility", metavar="WHOSE", help="Of a new repository: private or public.  [private]"),
    click.option(
        "--workers", metavar="N|MIN-MAX",
        help="How many work at once, 1 to 100,000; on Ray, begin with MIN and ask for MAX.  [one for each core or GPU]",
    ),
    click.option(
        "--ray", metavar="WHERE", help="off, local, or a cluster's ADDRESS.  [RAY_ADDRESS if it is set, else off]"
    ),
    click.option(
        "--cpus-per-worker", metavar="N",
        help="On Ray, 1 to 1,024: a worker deals with as many shards at once, each with its part of --memory.  [1]",
    ),
    click.option(
        "--gpus-per-worker", metavar="SHARE", help="On Ray: 0 to 1; 0.5 lets two share a GPU.  [1 where there are GPUs]"
    ),
    click.option("--accelerator", metavar="TYPE", help="On Ray: a type of GPU, as A100; see ray.util.accelerators."),
    click.option(
        "--label", "labels", metavar="KEY=VALUE", multiple=True,
        help="On Ray: only nodes with this label, as market-type=!spot. Repeatable.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the checkpoint that the output folder holds."),
    json_option,
)  # fmt: skip


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


_OF_CONTENT = {"finetuned", "density", "method", "scope", "rules", "dtype", "seed", "nonfinite", "emit", "unpaired"}


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
