"""Evaluations: what is asked, in which process, what is kept; and sweeps that choose."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian, load, save
from pace import soon, wait_until

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.choosing.candidates import candidates
from fapm.choosing.choice import Choice, choose
from fapm.choosing.compare import compare
from fapm.choosing.evaluation import Evaluation, Said, evaluate, evaluate_all, evaluation
from fapm.choosing.skills import Measure
from fapm.choosing.sources import Source
from fapm.choosing.sweep import Swept, evaluate_sweep, read_sweep, sweep, sweep_folder, take, write_sweep
from fapm.reporting.text import compare_text, sweep_text
from fapm.storage.address import open_store

SCORE = """
import glob, json, sys
from safetensors.torch import load_file

def of(folder):
    found = {}
    for path in glob.glob(folder + "/*.safetensors"):
        found |= load_file(path)
    return found

def score(folder):
    base, finetuned, here = of("base"), of("finetuned"), of(folder)
    def distance(one, two):
        return sum(float((one[k].float() - two[k].float()).square().sum()) for k in base)
    whole = distance(base, finetuned)
    return {"new": 1 - distance(here, finetuned) / whole, "old": 1 - 0.5 * distance(here, base) / whole}

if __name__ == "__main__":
    print("loading ...")
    print(json.dumps(score(sys.argv[1])))
"""
COMMAND = f"{sys.executable} score.py {{checkpoint}}"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base, finetuned = gaussian({"a": (300, 70), "b": (40, 8)}, torch.bfloat16)
    save(tmp_path / "base", base)
    save(tmp_path / "finetuned", finetuned)
    (tmp_path / "score.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(command: str, seconds: float | None = None) -> Evaluation:
    return evaluation([command], [], [], seconds)


def said(command: str, path: Path, seconds: float | None = None) -> Said:
    return evaluate(asked(command, seconds), Source("it", str(path), ""))


def swept(folder: Path, how: Evaluation, **choices: Any) -> Swept:
    choices = {"base": "base", "finetuned": "finetuned", "out": "out", "device": "cpu"} | choices
    home = sweep_folder(Recipe.of(base="base", finetuned="finetuned", out=choices["out"]))
    return evaluate_sweep(home, sweep(candidates(choices, home)), how)


def test_a_command_and_a_function_say_the_same(pair):
    one, two = said(COMMAND, pair / "finetuned"), said("score:score", pair / "finetuned")
    assert one.skills == two.skills == {"new": Measure(1.0), "old": Measure(0.5)}
    assert (one.error, one.name) == ("", "it")


def test_a_path_is_a_word(pair):
    odd = pair / "it's $HOME; touch x;#"
    shutil.copytree(pair / "base", odd)
    assert said(COMMAND, odd).skills["old"] == Measure(1.0)
    said("echo '{checkpoint}'", odd)
    shell = f"""sh -c '{sys.executable} score.py "$FAPM_CHECKPOINT" | tail -n 1'"""
    assert said(shell, odd).skills["old"] == Measure(1.0)
    assert not (pair / "x").exists()


@pytest.mark.parametrize(
    "command",
    [
        "sh -c 'echo {checkpoint}'", "sh -c {checkpoint}", "env bash -ec {checkpoint}", "ssh host 'score {checkpoint}'",
        "python -c \"score('{checkpoint}')\"", "{checkpoint} now", "echo '{checkpoint};'", "eval '$({checkpoint})'",
    ],
)  # fmt: skip
def test_where_a_path_could_be_code_it_is_refused(command):
    with pytest.raises(UserError, match="could be read as code"):
        asked(command)


LEFT_BEHIND = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("pid", "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
while not os.path.exists("pid") or not open("pid").read():
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
print('{"new": 1, "old": 1}')
"""


def is_gone(pid: Path) -> bool:
    stat = Path("/proc", pid.read_text().strip(), "stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"  # not buried yet
    except OSError:
        return True


@pytest.mark.parametrize(("sleeps", "seconds", "skills"), [(0, None, 2), (600, 3, 0)])
def test_what_has_a_session_of_its_own_is_ended_too(pair, sleeps, seconds, skills):
    (pair / "left.py").write_text(LEFT_BEHIND)
    found = said(f"{sys.executable} left.py {{checkpoint}} {sleeps}", pair / "base", seconds)
    assert len(found.skills) == skills
    wait_until(lambda: is_gone(pair / "pid"))


def test_an_evaluation_ends_with_the_process_that_asked(pair):
    (pair / "left.py").write_text(LEFT_BEHIND)
    code = (
        "from fapm.choosing.evaluation import evaluate, evaluation\n"
        "from fapm.choosing.sources import Source\n"
        f"evaluate(evaluation(['{sys.executable} left.py {{checkpoint}} 600'], [], []), Source('it', 'base', ''))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: (pair / "pid").exists() and (pair / "pid").read_text())
    process.kill()
    process.wait()
    wait_until(lambda: is_gone(pair / "pid"))


def test_what_an_evaluation_prints_is_kept_for_the_user_alone(pair):
    """Its last line is shown, and stands in no file that could be published with the output."""
    (pair / "telling.py").write_text("import sys\nsys.exit('cannot log in with hunter2')")
    found = swept(pair, asked(f"{sys.executable} telling.py {{checkpoint}}"), density="0.1")
    write_sweep(found)
    assert "hunter2" in str(found.said["fapm-0.1"])
    telling = [path for path in (pair / "out").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert {path.suffix for path in telling} == {".log"} and len(telling) == 3
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in telling)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("sh -c 'echo oh no >&2; exit 3' {checkpoint}", "exit code 3: oh no"),
        ("echo {checkpoint}", "no JSON object"),
        ("echo '[1]' {checkpoint}", "no JSON object"),
        ("sh -c 'echo {\\\"acc\\\": 1}' {checkpoint}", "at least one of"),
        ("sh -c 'kill -9 $$' {checkpoint}", "signal 9"),
        ("nothing-of-that-name {checkpoint}", "exit code 1: there is no program nothing-of-that-name"),
        ("score:nothing", "AttributeError"),
        ("json:dumps", "no JSON object"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line(pair, command, why):
    found = said(command, pair / "base")
    assert found.skills == {} and why in str(found) and "\n" not in str(found)


def test_what_takes_too_long_is_ended_with_all_that_it_started(pair):
    command = """sh -c "sh -c 'sleep 60; touch late' & echo $! > pid; sleep 60" {checkpoint}"""
    with soon(20):
        assert "longer than 1 s" in said(command, pair / "base", 1).error
    stat = Path("/proc", (pair / "pid").read_text().strip(), "stat")
    wait_until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")  # not buried yet


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((["./score.sh"], [], []), "{checkpoint} where the path belongs"),
        (([], ["gsm8k"], []), "write it like old="),
        (([], ["old=a old=b"], []), "given twice"),
        (([], ["old=missing.yaml"], []), "there is no such file"),
        (([], [], ["old=missing.txt"]), "there is no such file"),
        (([], [], ["oldest=score.py"]), "write it like old="),
        (([COMMAND], [], [], 0), "above 0"),
    ],
)
def test_what_cannot_be_asked(pair, given, why):
    with pytest.raises(UserError, match=why):
        evaluation(*given)


def test_what_is_kept_is_not_asked_again(pair):
    kept, how, calls = open_store(str(pair / "kept")), asked(COMMAND), []

    def do(how: Evaluation, sources: Sequence[Source], begun):
        calls.append([source.name for source in sources])
        for source in sources:
            yield Said(source.name, {}, "broken") if source.name == "b" else evaluate(how, source)

    sources = [Source("a", str(pair / "base"), "1"), Source("b", str(pair / "base"), "2")]
    first = evaluate_all(how, sources, kept, do)
    assert first["b"].error == "broken"
    assert evaluate_all(how, sources, kept, do)["a"] == first["a"]
    assert calls == [["a", "b"], ["b"]]  # what failed is tried again
    evaluate_all(how, [Source("a", str(pair / "base"), "other")], kept, do)
    evaluate_all(asked(COMMAND + " "), sources[:1], kept, do)
    assert calls[2:] == [["a"], ["a"]]
    (pair / "kept" / "evaluations" / "a.json").write_text("{")
    evaluate_all(asked(COMMAND + " "), sources[:1], kept, do)
    assert calls[4:] == [["a"]]


def test_a_changed_text_is_another_question(pair):
    (pair / "text.txt").write_text("one")
    key = Evaluation(texts={"old": "text.txt"}).key()
    assert Evaluation(texts={"old": "text.txt"}).key() == key
    (pair / "text.txt").write_text("two")
    assert Evaluation(texts={"old": "text.txt"}).key() != key


@pytest.mark.parametrize("emit", ["checkpoint", "delta"])
def test_a_sweep_is_evaluated_and_one_becomes_the_output(pair, emit):
    found = swept(pair, asked(COMMAND), density="0.1,0.3,0.6", method="fapm,magnitude", emit=emit)
    assert list(found.said) == ["base", "finetuned", *(one.candidate.name for one in found.made)]
    tensors, base, finetuned = load(pair / "out" / "sweep" / "fapm-0.3") if emit == "checkpoint" else None, *(
        load(pair / side) for side in ("base", "finetuned")
    )  # fmt: skip
    if tensors:
        distance = sum(float((t.float() - finetuned[n].float()).square().sum()) for n, t in tensors.items())
        whole = sum(float((base[n].float() - t.float()).square().sum()) for n, t in finetuned.items())
        assert found.points["fapm-0.3"].retained.value == pytest.approx(1 - distance / whole)
    choice = choose("retained>=0.5", found.candidate_points)
    recipe = next(one.candidate.recipe for one in found.made if one.candidate.name == choice.name)
    take(found, choice, "out")
    assert verify("out") == []
    prune(recipe.model_copy(update={"out": "alone", "emit": "checkpoint"}))
    assert (pair / "out" / "model.safetensors").read_bytes() == (pair / "alone" / "model.safetensors").read_bytes()
    card = (pair / "out" / "README.md").read_text()
    assert "## How it was chosen" in card and choice.why in card and f"**{choice.name}**" in card


@pytest.mark.parametrize("emit", ["checkpoint", "delta"])
def test_another_choice_of_the_same_sweep_takes_its_place_where_that_is_said(pair, emit):
    found = swept(pair, asked(COMMAND), density="0.1,0.3", emit=emit)
    for name in ("fapm-0.1", "fapm-0.3", "fapm-0.3"):
        choice = Choice(name, "it was wanted")
        write_sweep(found)  # as the command does before it chooses
        if name != "fapm-0.1" and json.loads((pair / "out/fapm/manifest.json").read_text())["recipe"]["density"] == 0.1:
            with pytest.raises(UserError, match=r"density was 0\.1 and is 0\.3; give another folder, or --overwrite"):
                take(found, choice, "out")
            assert verify("out") == []
            take(found, choice, "out", overwrite=True)
        take(found, choice, "out")
        write_sweep(Swept(found.folder, found.made, found.said, choice))
        manifest = json.loads((pair / "out" / "fapm" / "manifest.json").read_text())
        assert f"fapm-{manifest['recipe']['density']:g}" == name
    assert read_sweep(found.folder)["chosen"]["name"] == "fapm-0.3"
    assert len(list((pair / "out" / "sweep").glob("fapm-*"))) == 2  # the candidates are still there
    mine = Recipe.of(base="base", finetuned="finetuned", out="out", density=0.7, device="cpu")
    with pytest.raises(UserError, match="belongs to another run"):
        prune(mine)
    prune(mine, overwrite=True)  # now it is not of the sweep any more
    with pytest.raises(UserError, match="belongs to another run"):
        take(found, choice, "out")


def test_a_failed_evaluation_does_not_end_the_others(pair):
    (pair / "picky.py").write_text("import sys\nif 'fapm-0.3' in sys.argv[1]: sys.exit('not this one')\n" + SCORE)
    found = swept(pair, asked(f"{sys.executable} picky.py {{checkpoint}}"), density="0.1,0.3")
    assert str(found.said["fapm-0.3"]).endswith("exit code 1: not this one")
    assert found.said["fapm-0.1"].skills
    text = sweep_text(write_sweep(found), "out")
    assert "not evaluated: exit code 1" in text and "on the front" in text


def test_an_adapter_is_evaluated_merged(pair):
    """Whatever finetuned is stored like, what is evaluated is a checkpoint."""
    from fapm.choosing.sources import at_hand, inputs
    from fapm.planning.make import make_plan

    prune(Recipe.of(base="base", finetuned="finetuned", out="delta", emit="delta", rules=["*=finetuned"], device="cpu"))
    plan = make_plan(Recipe.of(base="base", finetuned="delta", out="out", device="cpu"))
    base, finetuned = inputs(plan)
    with at_hand(finetuned) as path:
        there = Path(path)
        assert {n: t.tolist() for n, t in load(there).items()} == {
            n: t.tolist() for n, t in load(pair / "finetuned").items()
        }
    assert not there.exists()
    with at_hand(base) as path:
        assert path == str(pair / "base")


def test_compared_side_by_side(pair):
    for density in (0.1, 0.4):
        sides = {"base": "base", "finetuned": "finetuned", "out": f"p{density}"}
        prune(Recipe.of(**sides, density=density, device="cpu", emit="delta" if density == 0.1 else "checkpoint"))
    found = compare(["p0.1", "p0.4", str(pair / "finetuned")], asked(COMMAND))
    rows = {row["name"]: row for row in found.facts()["checkpoints"]}
    assert list(rows) == ["base", "finetuned", "p0.1", "p0.4", str(pair / "finetuned")]
    assert rows["p0.1"]["density"] == 0.1 and rows["p0.1"]["retained"]["value"] < rows["p0.4"]["retained"]["value"]
    assert rows[str(pair / "finetuned")]["retained"]["value"] == 1
    assert "p0.4" in compare_text(found.facts())
    without = compare(["p0.1", "p0.4"], Evaluation())
    assert "retained" not in compare_text(without.facts())
    save(pair / "other", gaussian({"a": (3, 7)}, torch.bfloat16)[0])
    save(pair / "other2", gaussian({"a": (3, 7)}, torch.bfloat16)[1])
    prune(Recipe.of(base="other", finetuned="other2", out="p", device="cpu"))
    with pytest.raises(UserError, match="made from several"):
        compare(["p0.1", "p"], asked(COMMAND))
    with pytest.raises(UserError, match="there is no folder nowhere"):
        compare(["p0.1", "nowhere"], asked(COMMAND))
