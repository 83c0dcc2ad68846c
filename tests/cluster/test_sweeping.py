"""`fapm sweep` and `fapm compare` from the command line, in one process and on Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian, save

ROOT = Path(__file__).parents[2]
SCORE = """
import glob, json, os, sys
from safetensors.torch import load_file

def score(folder):
    found = {}
    for path in glob.glob(folder + "/*.safetensors"):
        found |= load_file(path)
    base = load_file("base/model.safetensors")
    same = sum(float((found[k] == base[k]).float().mean()) for k in base) / len(base)
    with open("asked", "a") as asked:
        asked.write(folder + "\\n")
    return {"new": 1.1 - same, "old": 0.1 + 0.9 * same}
"""
SHAPES = {f"model.layers.{i}.w": (130, 70) for i in range(6)} | {"head": (40, 30)}
SWEEP = (
    "sweep", "--base", "base", "--finetuned", "finetuned", "--method", "fapm,wise-ft", "--scope", "tensor,global",
    "--density", "0.1,0.3", "--shard-size", "40kB", "--evaluate", "score:score", "--emit", "delta",
)  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for side, tensors in zip(("base", "finetuned"), gaussian(SHAPES, torch.bfloat16), strict=True):
        save(tmp_path / side, tensors)
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fapm", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **pipes)


def fapm(folder: Path, *words: str, code: int = 0) -> tuple[str, str]:
    process = started(folder, *words)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def stored(folder: Path) -> dict[str, bytes]:
    """What the candidates consist of."""
    names = [path for path in folder.glob("*/*") if path.suffix == ".safetensors" or path.name == "delta.json"]
    assert len(names) > 20
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def test_the_whole_of_it(pair: Path) -> None:
    out, err = fapm(pair, *SWEEP, "--out", "out", "--choose", "retained>=0.8", "--json")
    facts = json.loads(out)
    names = [row["name"] for row in facts["candidates"]]
    assert names == [
        "fapm-tensor-0.1", "fapm-tensor-0.3", "fapm-global-0.1", "fapm-global-0.3", "wise-ft-0.1", "wise-ft-0.3",
    ]  # fmt: skip
    assert "6 candidate(s) from one reading" in err
    assert facts["chosen"]["name"].startswith("wise-ft")  # what is mixed differs everywhere, so this score likes it
    assert "all checksums" in fapm(pair, "verify", "out")[0]
    asked = (pair / "asked").read_text()
    again, err = fapm(pair, *SWEEP, "--out", "out", "--choose", "retained>=0.8", "--json")
    assert json.loads(again) == facts
    assert (pair / "asked").read_text() == asked  # nothing was evaluated twice
    words = *SWEEP, "--out", "out", "--choose", "fapm-tensor-0.1"
    _, err = fapm(pair, *words, code=1)  # something else was chosen before
    assert "belongs to another run" in err and "--overwrite" in err
    made = stored(pair / "out" / "sweep")
    _, err = fapm(pair, *words, "--overwrite")
    assert "from one reading" not in err and stored(pair / "out" / "sweep") == made  # the candidates stay
    assert json.loads((pair / "out/fapm/manifest.json").read_text())["recipe"]["density"] == 0.1
    fapm(pair, *SWEEP, "--out", "out", "--choose", "retained>=0.8", "--overwrite")
    shown = fapm(pair, "report", "out")[0]
    assert "chosen" in shown and "on the front" in shown and "written" in shown
    fapm(pair, "report", "out", "--html", "page.html")
    assert (pair / "page.html").read_text().startswith("<!doctype html>")
    one, other = "out/sweep/fapm-tensor-0.1", "out"
    out, _ = fapm(pair, "compare", one, other, "--evaluate", "score:score", "--json")
    rows = {row["name"]: row for row in json.loads(out)["checkpoints"]}
    assert rows[one]["retained"] == facts["candidates"][0]["retained"]
    assert set(rows) == {"base", "finetuned", one, other}
    fapm(pair, "compare", one, other, "--evaluate", "score:score", "--html", "compared.html")
    assert f"{one}: retained" in (pair / "compared.html").read_text()
    command = json.loads((pair / "out/sweep/sweep.json").read_text())["command"]
    assert command[:2] == ["fapm", "sweep"] and command[-2:] == ["--choose", "retained>=0.8"]
    fapm(pair, *command[1:])  # it is the same sweep, in which nothing is left to do


def test_a_recipe_with_lists(pair: Path) -> None:
    recipe = (ROOT / "configs" / "sweep.yaml").read_text()
    (pair / "recipe.yaml").write_text(recipe)
    sides = ("--base", "base", "--finetuned", "finetuned", "--out", "out")
    out, _ = fapm(pair, "sweep", "--config", "recipe.yaml", *sides, "--json")
    assert len(json.loads(out)["candidates"]) == 12


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--choose", "best"), 1, "give 'retained>=0.99'"),
        (("--density", "0.1,x"), 1, "--density"),
        (("--method", "fapm,ties"), 1, "--method"),
        (("--tasks", "gsm8k"), 1, "--tasks gsm8k: write it like old="),
        (("--text", "old=missing.txt", "new=x"), 1, "--text missing.txt: there is no such file"),
        (("--out", "out/{date}"), 1, "no fields"),
        (("--choose", "retained>=2"), 1, "no candidate is like that"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(pair: Path, words: tuple[str, ...], code: int, why: str) -> None:
    _, err = fapm(pair, *SWEEP, "--out", "out", *words, code=code)
    assert why in err.splitlines()[-1]
    if why != "no candidate is like that":
        assert not (pair / "out").exists()


def test_without_an_evaluation_one_is_chosen_by_name(pair: Path) -> None:
    words = [word for word in SWEEP if word not in ("--evaluate", "score:score")]
    fapm(pair, *words, "--out", "out", "--choose", "fapm-global-0.3")
    assert json.loads((pair / "out/fapm/manifest.json").read_text())["recipe"]["scope"] == "global"
    _, err = fapm(pair, *words, "--out", "other", "--choose", "knee", code=1)
    assert "--choose knee needs --evaluate, --tasks or --text" in err


def test_base_and_finetuned_are_evaluated_before_anything_is_pruned(pair: Path) -> None:
    words = [word for word in SWEEP if word not in ("--evaluate", "score:score")]
    _, err = fapm(pair, *words, "--out", "out", "--evaluate", "score:nothing", code=1)
    assert "evaluating base (1 of 2)" in err
    assert err.count("could not be evaluated") == 3  # base, finetuned, and why it ends
    assert "has no attribute 'nothing'" in err and "nothing was pruned" in err.splitlines()[-1]
    assert str(pair / "out/sweep/evaluations") in err or "out/sweep/evaluations" in err
    assert not list(pair.glob("out/sweep/*/*.safetensors")) and not list(pair.glob("out/*.safetensors"))
    _, err = fapm(pair, *SWEEP, "--out", "out")
    assert re.search(r"evaluating fapm-global-0\.3 \(4 of 6\), some [\d.]+ s left", err)


def test_what_an_evaluation_prints_can_be_followed(pair: Path) -> None:
    half = "print('half of it', file=sys.stderr, flush=True)"
    (pair / "score.py").write_text(f"import sys, time\ndef score(folder):\n    {half}\n    time.sleep(600)\n")
    process = started(pair, *SWEEP, "--out", "out")
    log = pair / "out/sweep/evaluations/base.log"
    until = time.monotonic() + 60
    while not (log.exists() and "half of it" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert log.read_text() == "half of it\n" and log.stat().st_mode & 0o777 == 0o600
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_the_wrong_way_round_nothing_is_chosen(pair: Path) -> None:
    (pair / "score.py").write_text(SCORE + "\nright = score\ndef score(folder):\n    said = right(folder)\n"
                                   "    return {'new': said['old'], 'old': said['new']}\n")  # fmt: skip
    words = *SWEEP, "--out", "out", "--choose", "retained>=0.5"
    _, err = fapm(pair, *words, code=1)
    assert "finetuned is not better than base at the new skill" in err
    assert "Are the two swapped, or is it the wrong test? --choose-anyway goes on" in err.splitlines()[-1]
    assert not list(pair.glob("out/sweep/*/*.safetensors"))
    _, err = fapm(pair, *words, "--choose-anyway")
    assert "is better than finetuned at the new skill: it retains" in err
    assert (pair / "out/fapm/manifest.json").exists()


def test_an_output_that_is_another_model_is_refused_before_anything_is_evaluated(pair: Path) -> None:
    (pair / "out").mkdir()
    (pair / "out" / "model.safetensors").write_bytes(b"precious")
    _, err = fapm(pair, *SWEEP, "--out", "out", "--choose", "retained>=0.5", code=1)
    assert "is not empty and was not made by fapm" in err.splitlines()[-1]
    assert not (pair / "asked").exists()


def test_the_commands_of_the_readme(pair: Path) -> None:
    (block,) = re.findall(r"```sh\n(fapm sweep .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (pair / "BASE").symlink_to("base")
    (pair / "FINETUNED").symlink_to("finetuned")
    script = f"#!{sys.executable}\n{SCORE}\nprint(json.dumps(score(sys.argv[1])))\n"
    (pair / "score.py").write_text(script)
    (pair / "score.py").chmod(0o755)
    (pair / "fapm").write_text(f'#!/bin/sh\nexec {sys.executable} -m fapm "$@"\n')
    (pair / "fapm").chmod(0o755)
    path = f"{pair}:{os.environ['PATH']}"
    command = block.replace("retained>=0.95", "retained>=0.7")  # this score's skills are others
    subprocess.run(
        ["bash", "-euc", command], cwd=pair, env=os.environ | {"PATH": path}, check=True,
    )  # fmt: skip
    assert (pair / "report.html").stat().st_size > 10_000
    assert (pair / "OUT" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_on_ray_it_is_the_same(pair: Path) -> None:
    fapm(pair, *SWEEP, "--out", "out", "--choose", "retained>=0.8")
    out, err = fapm(
        pair, *SWEEP, "--out", "ray", "--choose", "retained>=0.8", "--ray", "local", "--workers", "2", "--json"
    )
    assert "running on a Ray of its own" in err
    assert stored(pair / "ray" / "sweep") == stored(pair / "out" / "sweep")
    assert (pair / "ray" / "model-00001-of-00003.safetensors").read_bytes() == (
        pair / "out" / "model-00001-of-00003.safetensors"
    ).read_bytes()
    facts = json.loads(out)
    before = json.loads((pair / "out" / "sweep" / "sweep.json").read_text())
    assert [row["retained"] for row in facts["candidates"]] == [row["retained"] for row in before["candidates"]]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_at_any_moment_it_goes_on(pair: Path) -> None:
    fapm(pair, *SWEEP, "--out", "out", "--choose", "retained>=0.8")
    for wait in (0.9, 1.3, 1.7, 2.2, 3.0, 5.0):
        process = started(pair, *SWEEP, "--out", "killed", "--choose", "retained>=0.8")
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    fapm(pair, *SWEEP, "--out", "killed", "--choose", "retained>=0.8")
    assert stored(pair / "killed" / "sweep") == stored(pair / "out" / "sweep")
    for path in (pair / "out").glob("*.safetensors"):
        assert (pair / "killed" / path.name).read_bytes() == path.read_bytes()
