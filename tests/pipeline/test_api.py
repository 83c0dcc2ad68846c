"""pytest tests/pipeline/test_api.py: `import fapm` does what the command line does, and is pleasant in a notebook."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from checkpoints import save_pair, weights_of
from click.testing import CliRunner

import fapm
from fapm.cluster.cli import cli
from fapm.descriptions import DESCRIPTIONS

SIDES = {"base": "base", "finetuned": "finetuned"}


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_pair(tmp_path, {"model.layers.0.a.weight": (60, 40), "model.layers.1.a.weight": (60, 40), "b": (8,)})


def command(*words: str) -> str:
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_all_that_is_named_is_there_and_nothing_is_loaded_before():
    code = "import sys, fapm; print(len(sys.modules.keys() & {'torch', 'numba', 'numpy', 'pydantic'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
    for name in fapm.__all__:
        assert getattr(fapm, name).__doc__
    assert dir(fapm) == fapm.__all__
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        fapm.prun  # noqa: B018


def test_a_prune_by_names_is_that_of_the_command(pair):
    result = fapm.prune(**SIDES, out="here", density=0.2)
    command("prune", "--base", "base", "--finetuned", "finetuned", "--out", "there", "--density", "0.2")
    assert weights_of(pair / "here") == weights_of(pair / "there")
    assert fapm.prune(result.plan.recipe).nothing_to_do
    assert fapm.prune(result.plan.recipe, out="third", density=0.5).plan.recipe.density == 0.5
    assert fapm.verify("here") == []


def test_what_comes_back_is_shown_in_a_line_or_as_the_command_shows_it(pair):
    made = fapm.plan(**SIDES, out="out", scope="global")
    result = fapm.prune(made.recipe)
    for one, begins in ((made, "Plan(out: 3 tensors in 1 shard"), (result, "Result(out: fapm, density 0.1")):
        assert repr(one).startswith(begins)
        assert len(repr(one)) < 300
        assert "<p>" in one._repr_html_() and len(one._repr_html_()) < 1000
    for shown, words in (
        (fapm.report("out"), ("report", "out")),
        (fapm.inspect("base"), ("inspect", "base")),
        (fapm.status("out"), ("status", "out")),
    ):
        assert repr(shown) == command(*words).rstrip("\n")
        assert json.loads(json.dumps(shown)) == json.loads(command(*words, "--json"))
        assert shown._repr_html_().startswith("<pre>")


def test_what_a_notebook_shows_runs_nothing_of_a_strangers(pair):
    (pair / "finetuned").rename(pair / "<script>")
    result = fapm.prune(base="base", finetuned="<script>", out="<b>out")
    assert "<b>" not in result._repr_html_() and "<script>" not in result.plan._repr_html_()
    assert "<b>" not in fapm.report("<b>out")._repr_html_()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"densty": 0.1}, "there is no option 'densty'; do you mean 'density'?"),
        ({"wrkers": 1}, "do you mean 'workers'?"),
        ({"zzz": 1}, "there is no option 'zzz'"),
        ({"density": 2}, "--density: 0 to 1"),
        ({}, "--out is missing"),
    ],
)
def test_a_choice_that_cannot_be_is_a_sentence(choices, said):
    given = {**SIDES, **({"out": "out"} if choices else {}), **choices}
    for ask in (fapm.Recipe, fapm.prune, fapm.plan):
        with pytest.raises(fapm.UserError) as raised:
            ask(**given)
        assert said in str(raised.value)


def test_descriptions_are_those_of_the_help():
    shown = "".join((command("prune", "--help-all") + command("merge", "--help-all")).split())
    assert DESCRIPTIONS.keys() == fapm.Recipe.model_fields.keys()
    for name, field in fapm.Recipe.model_fields.items():
        assert field.description == DESCRIPTIONS[name]
        assert "".join(DESCRIPTIONS[name].split()) in shown or name == "merged"  # which has an option for each part
        assert DESCRIPTIONS[name] in (fapm.Recipe.__doc__ or "")


def test_a_task_vector_there_and_back(pair):
    fapm.extract(**SIDES, out="delta")
    fapm.apply("delta", base="base", out="whole")
    assert weights_of(pair / "whole") == weights_of(pair / "finetuned")


def test_a_sweep_and_a_comparison_by_lists(pair):
    (pair / "score.py").write_text(
        "import json, sys, pathlib\n"
        "size = sum(len(p.read_bytes()) for p in pathlib.Path(sys.argv[1]).glob('*.safetensors'))\n"
        "print(json.dumps({'new': 0.5, 'old': 0.5}))\n"
    )
    how = {"evaluate": [f"{sys.executable} score.py {{checkpoint}}"]}
    swept = fapm.sweep(**SIDES, out="out", density=[0.1, 0.2], **how, choose="fapm-0.2")
    assert [one["name"] for one in swept["candidates"]] == ["fapm-0.1", "fapm-0.2"]
    assert swept["chosen"]["name"] == "fapm-0.2" and "fapm-0.2" in repr(swept)
    assert weights_of(pair / "out") == weights_of(pair / "out/sweep/fapm-0.2")
    compared = fapm.compare("out/sweep/fapm-0.1", "out", **how)
    assert len(compared["checkpoints"]) == 4 and repr(compared)
    with pytest.raises(fapm.UserError, match="give two checkpoints"):
        fapm.compare("out")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ZMQInteractiveShell:
    """As the one of a notebook is called."""


def test_progress_is_shown_where_somebody_looks_on(pair, monkeypatch):
    def shown(out: str, stream: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        fapm.prune(**SIDES, out=out)
        return stream.getvalue()

    assert shown("a", io.StringIO()) == ""
    assert "shard 0/1" in shown("b", Terminal())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=ZMQInteractiveShell))
    assert "shard 0/1" in shown("c", io.StringIO())
    heard: list[str] = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    fapm.prune(**SIDES, out="d", watch=fapm.Watch(say=heard.append))
    assert heard and sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
