"""The whole of it on real weights, through the command line: `pytest -s` shows the tables.

MiniLM-L6 with seeds of fine-tuning, and a small decoder trained here. Nothing is asserted of which method is
better; that there is something to choose from, and that what is chosen is what was asked for, is. FAPM_SEEDS=3 takes
all methods, texts and seeds of the README's table, CI a part.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import decoder
import minilm
import pytest
import torch
from needs import ROOMS, needs

from fapm import Recipe, prune
from fapm.choosing.skills import Measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SEEDS = int(os.environ.get("FAPM_SEEDS", "1"))  # of fine-tuning; the README's table is of three
METHODS = "fapm,magnitude,wise-ft" if minilm.FULL else "fapm,magnitude"


def fapm(folder: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fapm", *words, "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(ROOMS)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def value(row: dict[str, Any], axis: str) -> float:
    return float(row[axis]["value"])


def rows_of(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sides = {side: {"name": side, **facts[side]} for side in ("base", "finetuned")}
    rows = sides | {row["name"]: row for row in facts["candidates"]}
    assert not any(row["error"] for row in rows.values()), rows
    return rows


def follows_its_words(facts: dict[str, Any], floor: float) -> None:
    """The chosen one has the least forgetting above the floor, as far as the standard errors tell."""
    rows = {row["name"]: row for row in facts["candidates"]}
    fits = [row for row in rows.values() if value(row, "retained") >= floor]
    chosen, least = rows[facts["chosen"]["name"]], min(fits, key=lambda row: value(row, "forgetting"))
    assert value(chosen, "retained") >= floor
    error = math.hypot(chosen["forgetting"]["stderr"], least["forgetting"]["stderr"])
    assert value(chosen, "forgetting") - value(least, "forgetting") <= error


@needs("the list of Debian's packages", files=(minilm.AVAILABLE,))
def test_minilm_learns_to_sort_packages(tmp_path, monkeypatch):
    # In a process of its own: what a library has depends on what else was imported.
    keep = "import minilm, pathlib, sys; minilm.keep(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(ROOMS)}
    subprocess.run([sys.executable, "-c", keep, str(tmp_path / "texts.json")], env=environment, check=True)
    monkeypatch.setenv(minilm.KEPT, str(tmp_path / "texts.json"))
    said: dict[str, list[dict[str, Any]]] = {}
    chosen: list[str] = []
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        minilm.tune(folder / "finetuned", seed)
        facts = fapm(
            folder, "sweep", "--base", str(minilm.base()), "--finetuned", "finetuned", "--out", "out",
            "--emit", "delta", "--method", METHODS, "--density", "0.1,0.3",
            "--evaluate", "minilm:score", "--choose", "retained>=0.95",
            "--choose-anyway",  # of a part of the texts: its errors may hide what was forgotten
        )  # fmt: skip
        for name, row in rows_of(facts).items():
            said.setdefault(name, []).append(row)
        follows_its_words(facts, 0.95)
        chosen.append(facts["chosen"]["name"])
        recipe = next(row["decides"] for row in facts["candidates"] if row["name"] == facts["chosen"]["name"])
        sides = {"base": str(minilm.base()), "finetuned": str(folder / "finetuned"), "out": str(folder / "alone")}
        prune(Recipe.of(**{**recipe, **sides, "emit": "checkpoint"}))
        stored = [(folder / out / "model.safetensors").read_bytes() for out in ("out", "alone")]
        assert stored[0] == stored[1]
    print(f"\n| | new skill | old skill | retained | forgetting |\n| --- | {'---: | ' * 4}")
    for name, rows in said.items():
        cells = []
        for axis in ("new", "old", "retained", "forgetting"):
            seeds = [value(row, axis) for row in rows]
            error = f" ±{statistics.stdev(seeds) / math.sqrt(SEEDS):.3f}" if SEEDS > 1 else ""
            cells.append(f"{statistics.mean(seeds):.3f}{error}")
        print(f"| {name} | {' | '.join(cells)} |")
    for tuned, known in zip(said["finetuned"], said["base"], strict=True):  # else there would be nothing to choose
        assert value(tuned, "new") > value(known, "new") and value(tuned, "old") < value(known, "old")
    again = minilm.score(str(tmp_path / "0" / "out"))
    for axis in ("new", "old"):
        assert again[axis]["value"] == pytest.approx(value(said[chosen[0]][0], axis), abs=0.01)
    page = fapm(tmp_path / "0", "report", "out", "--html", "page.html")
    assert page["bytes"] > 10_000 and (tmp_path / "0" / "page.html").read_text().count("<svg") == 3


@needs("a dictionary and fortune cookies", files=(decoder.FOLDOC, decoder.FORTUNES))
def test_a_decoder_learns_another_kind_of_text(tmp_path):
    texts = decoder.texts()
    decoder.make(tmp_path, {skill: learned for skill, (learned, _) in texts.items()})
    for skill, (_, held_out) in texts.items():
        (tmp_path / f"{skill}.txt").write_text(held_out)
    facts = fapm(
        tmp_path, "sweep", "--base", "base", "--finetuned", "finetuned", "--out", "out",
        "--method", METHODS, "--density", "0.1,0.3", "--text", "old=old.txt", "new=new.txt",
        "--choose", "retained>=0.5",
    )  # fmt: skip
    rows = rows_of(facts)
    follows_its_words(facts, 0.5)
    print(f"\n| | new, nats a token | old, nats a token | retained | forgetting |\n| --- | {'---: | ' * 4}")
    for name, row in rows.items():
        nats = [f"{-math.log(value(row, skill)):.3f}" for skill in ("new", "old")]
        shares = [Measure(**row[axis]) for axis in ("retained", "forgetting")]
        print(f"| {name} | {' | '.join(nats)} | {' | '.join(f'{m.value:.3f} ±{m.stderr or 0:.3f}' for m in shares)} |")
    assert value(rows["finetuned"], "new") > value(rows["base"], "new")
    assert value(rows["finetuned"], "old") < value(rows["base"], "old")
    # One number once more, by transformers alone.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "finetuned")(texts["new"][1], return_tensors="pt").input_ids[0]
    with torch.no_grad():
        windows = tokens[: tokens.numel() // decoder.WINDOW * decoder.WINDOW].view(-1, decoder.WINDOW)[:40]
        nats = float(model(windows, labels=windows).loss)
    assert math.exp(-nats) == pytest.approx(value(rows["finetuned"], "new"), rel=0.15)
