"""init and completion."""

from __future__ import annotations

import click
import cloup


@cloup.command(short_help="Print a recipe with every choice explained.")
def init() -> None:
    """Print a recipe in YAML with every choice, its default, and what it means, to edit and give to --config.

    \b
    Examples:
      fapm init > recipe.yaml
    """
    from fapm.recipe import template

    click.echo(template(), nl=False)


@cloup.command(short_help="Print the shell's completion.")
@cloup.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL (bash, zsh or fish) complete the words of fapm.

    \b
    Examples:
      fapm completion bash >> ~/.bashrc
      fapm completion zsh >> ~/.zshrc
      fapm completion fish > ~/.config/fish/completions/fapm.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made
    click.echo(made(ctx.find_root().command, {}, "fapm", "_FAPM_COMPLETE").source())
