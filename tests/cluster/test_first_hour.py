"""The command line as a new user meets it: help, recipes, mistakes, and what to do next."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from checkpoints import load, save_pair
from click.testing import CliRunner

from fapm.cluster.cli import cli
from fapm.recipe import Recipe, parse_rule, template

PAIR = ["--base", "base", "--finetuned", "finetuned", "--out", "out"]


@pytest.fixture(autouse=True)
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shapes = {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.0.input_layernorm.weight": (32,)}
    return save_pair(tmp_path, shapes)


def fapm(*words: str, code: int = 0):
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == code, done.output
    return done


def test_commands_come_in_groups_with_summaries_that_fit():
    shown = fapm("--help").stdout
    titles = ["Begin:", "Prune:", "Choose:", "Look:", "On a cluster:", "For the shell:"]
    assert [line for line in shown.splitlines() if line in titles] == titles
    assert "..." not in shown.replace("[ARGS]...", "")
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("command", ["prune", "plan", "submit", "sweep", "apply", "extract"])
def test_help_shows_the_core_and_help_all_the_rest(command):
    core, whole = fapm(command, "--help").stdout, fapm(command, "--help-all").stdout
    assert "--memory" in core and "Checkpoints:" in core and "More about" not in core
    offered = {option for p in cli.commands[command].params for option in p.opts if option.startswith("--")}
    assert all(option in whole for option in offered)
    assert any(option not in core for option in offered)


def test_a_recipe_to_edit_has_every_choice_and_means_what_is_the_default():
    text = fapm("init").stdout
    assert text == template()
    assert set(yaml.safe_load(text)) == {"base", "finetuned", "out"}
    chosen = "\n".join(line.removeprefix("#") for line in text.splitlines() if not line.startswith("# "))
    recipe = yaml.safe_load(chosen)
    assert recipe.pop("ray") == "local"
    assert recipe.keys() == Recipe.model_fields.keys()
    assert Recipe.of(**recipe) == Recipe(base="BASE", finetuned="FINETUNED", out="OUT")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_words(shell):
    script = fapm("completion", shell).stdout
    assert f"_FAPM_COMPLETE={shell}_complete" in script
    asked = {"_FAPM_COMPLETE": "bash_complete", "COMP_WORDS": "fapm prune --dens", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-m", "fapm"], env=asked, capture_output=True, text=True)
    assert done.stdout == "plain,--density\n"


def test_a_misspelt_field_of_a_recipe_names_file_line_and_the_nearest(tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: base\nfinetuned: finetuned\n\ndensty: 0.2\nout: out\n")
    said = fapm("prune", "--config", "recipe.yaml", code=1).stderr
    assert said == "fapm: recipe.yaml, line 4: there is no option 'densty'; do you mean 'density'?\n"


@pytest.mark.parametrize(
    ("rule", "meant"),
    [("*q_porj*=base", "do you mean '*q_proj*'?"), ("model.layers.*.self_atn.q_proj.weight=0.2", "do you mean"),
     ("zzz=base", "names are like 'model.layers.*.")],
)  # fmt: skip
def test_a_rule_that_matches_nothing_suggests_names(rule, meant):
    said = fapm("plan", *PAIR, "--rule", rule).stdout
    assert f"the rule '{rule}' matches no tensor; {meant}" in said


def test_strict_makes_errors_of_warnings(pair):
    said = fapm("prune", *PAIR, "--rule", "zzz=base", "--strict", code=1).stderr
    assert "fapm: --strict: 1 warning: the rule 'zzz=base' matches no tensor" in said
    assert not (pair / "out").exists()
    fapm("prune", *PAIR, "--strict")


def test_shares_may_be_in_percent(pair):
    fapm("prune", *PAIR, "--density", "12.5%", "--rule", "*norm*=50%")
    made = yaml.safe_load((pair / "out/fapm/recipe.yaml").read_text())
    assert made["density"] == 0.125
    assert parse_rule("*norm*=50%").density == 0.5
    assert Recipe.of(base="a", finetuned="b", out="c", density="0.1%").density == 0.001
    with pytest.raises(Exception, match="0 to 1"):
        Recipe.of(base="a", finetuned="b", out="c", density="101%")


def test_base_and_finetuned_are_not_the_same_unless_that_is_meant(pair):
    same = ["--base", "base", "--finetuned", "base", "--out", "out"]
    said = fapm("prune", *same, code=1).stderr
    assert "base and finetuned are the same checkpoint" in said and "--allow-same if that is meant" in said
    fapm("prune", *same, "--allow-same")
    assert all(torch.equal(t, load(pair / "base")[name]) for name, t in load(pair / "out").items())


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_an_output_inside_an_input_is_refused(pair, side):
    said = fapm("prune", *PAIR[:4], "--out", f"{side}/pruned", code=1).stderr
    assert f"lies in the {side} checkpoint" in said and "give a folder beside it" in said
    assert not (pair / side / "pruned").exists()


def test_a_stored_recipe_works_from_another_folder(pair, monkeypatch):
    fapm("prune", *PAIR, "--density", "0.3")
    (pair / "elsewhere").mkdir()
    monkeypatch.chdir(pair / "elsewhere")
    fapm("prune", "--config", str(pair / "out/fapm/recipe.yaml"), "--out", "again")
    again = (pair / "elsewhere/again/model.safetensors").read_bytes()
    assert again == (pair / "out/model.safetensors").read_bytes()


def test_a_prune_ends_with_what_to_do_next_and_quiet_says_nothing(pair):
    done = fapm("prune", *PAIR)
    assert "load it     AutoModelForCausalLM.from_pretrained('out')" in done.stderr
    assert "fapm verify out" in done.stderr and "fapm sweep --base base --finetuned finetuned" in done.stderr
    assert fapm("prune", *PAIR[:4], "--out", "quiet", "-q").stderr == ""
    delta = fapm("prune", *PAIR[:4], "--out", "delta", "--emit", "delta").stderr
    assert "fapm apply --base base --delta delta --out WHOLE" in delta
    loud = fapm("prune", *PAIR[:4], "--out", "loud", "-v").stderr
    assert "shard shard=model.safetensors" in loud and "read_bytes=" in loud


def test_colour_is_for_terminals_only():
    assert "\x1b[" not in fapm("--help").stdout
    assert "\x1b[" in CliRunner().invoke(cli, ["--help"], color=True).stdout
