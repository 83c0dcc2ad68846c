"""pytest tests/configs/test_docs.py: what the docs name is there, and what they show works."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture import draw

from fapm.scoring.methods import METHODS, Selection, evaluate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("configs/*.md"))
TASKS = sorted(ROOT.glob("docs/add-a-*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:pipeline|cluster|tests|configs|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [ROOT / "docs/architecture.md", *TASKS], ids=lambda page: page.name)
def test_modules_and_what_is_in_them_are_there(page):
    """Of `planning.make`, `storage/store.py`, `pool.Threads`, `fapm.cluster.commands` and the like."""
    for name in re.findall(r"`((?:fapm\.)?[a-z_]+(?:\.\w+)+)`", page.read_text()):
        if name.endswith((".py", ".md", ".json", ".toml", ".bin")):
            continue
        parts = name.removeprefix("fapm.").split(".")
        for start in ("fapm", "fapm.formats", "fapm.storage", "fapm.shard"):
            try:
                there: Any = importlib.import_module(".".join([start, parts[0]]))
            except ModuleNotFoundError:
                continue
            for part in parts[1:]:
                if not hasattr(there, part):
                    importlib.import_module(f"{there.__name__}.{part}")
                there = getattr(there, part)
            break
        else:
            raise AssertionError(name)


def test_rooms_of_the_architecture_are_those_of_the_stairs():
    rows = re.findall(r"^\| (`fapm\.[^|]*)\|", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)
    told = {name.removeprefix("fapm.") for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    stairs = re.search(r"layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert stairs
    held = {name.removeprefix("fapm.") for name in re.findall(r"fapm\.[\w.]+", stairs[1])} - {"__main__"}
    assert held - {"cluster"} == told - {"cluster", "cluster.commands", "cli"}


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.name)
def test_a_task_names_three_files_at_most(page):
    files = set(re.findall(r"`(pipeline/[\w./]+\.py)`", page.read_text()))
    assert 1 <= len(files) <= 3


def test_the_method_that_is_shown_is_one():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-method.md").read_text(), re.DOTALL)
    lines: dict[str, Any] = {"Any": Any}
    exec("\n".join(line.removeprefix("   ") for line in code.splitlines()), lines)
    assert "mine" not in METHODS
    p, f = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    m = np.float32(np.abs(p).mean())
    scores = evaluate(Selection(lines["mine"]), p, f, m, 0, np.arange(100))
    exact = np.abs(f.astype(float) - p) / (np.abs(p.astype(float)) + m)
    assert np.allclose(scores, exact, rtol=1e-6)


def test_the_matrix_method_that_is_shown_is_one():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-matrix-method.md").read_text(), re.DOTALL)
    lines: dict[str, Any] = {"np": np}
    exec("\n".join(line.removeprefix("   ") for line in code.splitlines()), lines)
    sigma = np.array([4.0, 2.0, 1.0, 0.5])
    assert lines["energy"](sigma, (4, 9), 16 / 21.25).tolist() == [1, 0, 0, 0]
    assert lines["energy"](sigma, (4, 9), 0.76).tolist() == [1, 1, 0, 0]


def test_the_picture_is_what_the_product_draws_of_the_table():
    def words(svg: str) -> list[str]:
        return re.findall(r">([^<>\n]+)</(?:text|title|desc)>", svg)

    drawn = draw((ROOT / "docs/choosing.md").read_text())
    assert words((ROOT / "docs/trade-off.svg").read_text()) == words(drawn)
    assert len(re.findall(r"<title>fapm-0", drawn)) == 2


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "commands.html").read_text()
    assert all(name in commands for name in ("fapm prune", "--allow-same", "fapm completion"))
    assert "Prune in many ways from one reading" in (tmp_path / "api.html").read_text()
    pages = [page.read_text() for page in tmp_path.glob("*.html")]
    elsewhere = re.compile(r"""<(?:script|link|img)\b[^>]+(?:src|href)=["'](?:https?:)?//""")
    assert not any(elsewhere.search(text) for text in pages)


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(sh|python)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def in_shell(folder: Path, script: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    for name, words in (("fapm", "-m fapm"), ("python3", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorial_works_as_it_stands(tmp_path):
    for kind, block in blocks("docs/tutorial.md"):
        if kind == "sh":
            in_shell(tmp_path, block)
        elif "sys.argv" in block:
            (tmp_path / "score.py").write_text(block)
        else:
            in_shell(tmp_path, f"python3 - <<'END'\n{block}\nEND")
    assert "It retains " in (tmp_path / "swept.html").read_text()
    assert (tmp_path / "mine/fapm/manifest.json").exists() and (tmp_path / "swept/model.safetensors").exists()


@pytest.mark.slow
def test_what_is_said_of_merges_works(tmp_path):
    (first, merge), (second, code) = blocks("docs/merging.md")
    assert (first, second) == ("sh", "python")
    links = "ln -s fapm-demo/base base && ln -s fapm-demo/finetuned math && ln -s fapm-demo/pruned code"
    in_shell(tmp_path, f"fapm demo && {links}\n{merge}")
    in_shell(tmp_path, f"python3 - <<'END'\n{code}\nEND")
    for name in ("both", "both-ties", "from-python"):
        assert (tmp_path / name / "fapm/manifest.json").exists()


@pytest.mark.slow
def test_what_is_said_of_the_neighbours_works(tmp_path):
    merge, sweep, score = (block for _, block in blocks("docs/neighbours.md"))
    (tmp_path / "classify.py").write_text(score)
    links = "ln -s fapm-demo/base base && ln -s fapm-demo/finetuned branch-1 && ln -s fapm-demo/pruned branch-2"
    in_shell(tmp_path, f"fapm demo && {links}\n{merge}\n{sweep}")
    for name in ("next", "chosen"):
        assert (tmp_path / name / "fapm/manifest.json").exists()


@pytest.mark.slow
def test_the_readme_prunes_and_loads(tmp_path):
    found = [
        (kind, block) for kind, block in blocks("README.md") if block.startswith(("fapm prune", "from transformers"))
    ]
    assert [kind for kind, _ in found] == ["sh", "python"]
    in_shell(tmp_path, "fapm demo && ln -s fapm-demo/base BASE && ln -s fapm-demo/finetuned FINETUNED\n" + found[0][1])
    in_shell(tmp_path, f"python3 - <<'END'\n{found[1][1]}\nEND")
