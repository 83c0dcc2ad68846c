"""The page of an output: what is in it, and how a real browser shows it."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian, save
from needs import needs, program

from fapm import Recipe, UserError, prune
from fapm.choosing.candidates import candidates
from fapm.choosing.choice import choose
from fapm.choosing.evaluation import Said
from fapm.choosing.skills import Measure
from fapm.choosing.sweep import Swept, sweep, sweep_folder, take, write_sweep
from fapm.reporting.page import compared_page, page

EVIL = 'x</script><img src="http://evil.test/a.png" onerror="alert(1)">$\\frac{'
MODULES = {"self_attn.q_proj.weight": (24, 16), "mlp.up_proj.weight": (40, 16), f"{EVIL}.weight": (9, 9)}
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in MODULES.items()} | {"head": (7, 5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for side, tensors in zip(("base", "finetuned"), gaussian(SHAPES, torch.bfloat16), strict=True):
        save(folder / side, tensors)
    return folder


def swept(folder: Path, out: str, evaluated: bool = True, chosen: str = "retained>=0.5") -> Path:
    given = {"base": str(folder / "base"), "finetuned": str(folder / "finetuned"), "out": str(folder / out)}
    home = sweep_folder(Recipe.of(**given))
    choices = given | {"device": "cpu", "method": "fapm,magnitude,wise-ft", "density": "0.05,0.1,0.2"}
    found = sweep(candidates(choices, home))
    said = {"base": (0.1, 0.8), "finetuned": (0.9, 0.6)}
    for one in found:
        recipe = one.candidate.recipe
        said[one.candidate.name] = (0.9 - 0.1 / (1 + 30 * recipe.density), 0.8 - 0.3 * recipe.density)
    measures = {
        name: Said(name, {"new": Measure(new, 0.01), "old": Measure(old, 0.012)})
        for name, (new, old) in said.items()
        if evaluated
    }
    result = Swept(home, found, measures)
    write_sweep(result)
    if chosen and evaluated:
        choice = choose(chosen, result.candidate_points)
        take(result, choice, given["out"])
        write_sweep(Swept(home, found, measures, choice))
    return folder / out


@pytest.fixture(scope="module")
def chosen(folder: Path) -> Path:
    return swept(folder, "chosen")


class Parsed(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_it_needs_nothing_else(chosen):
    text = page(str(chosen))
    parsed = Parsed(text)
    assert not parsed.all("script") and not parsed.all("img") and not parsed.all("iframe")
    assert [link["href"] for link in parsed.all("link")] == ["data:,"]
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert sorted(ids) == sorted(set(ids))
    assert "http://evil.test" in parsed.words  # as text


def test_it_says_in_words_what_it_shows(chosen):
    parsed = Parsed(page(str(chosen)))
    figures = [svg for svg in parsed.all("svg") if svg.get("role") == "img"]
    assert len(figures) == 3
    ids = {attributes.get("id") for _, attributes in parsed.tags}
    for svg in figures:
        assert set((svg["aria-labelledby"] or "").split()) <= ids
    assert "Chosen: " in parsed.words and "is one standard error" in parsed.words
    for name in ("fapm-0.05", "magnitude-0.2", "wise-ft-0.1", "0.8750 ±0.0100", "on the front", "α 0.2", "fapm prune"):
        assert name in parsed.words, name
    assert page(str(chosen)) == page(str(chosen))


def test_the_verdict_comes_first_then_the_chart_then_the_table_then_how_to_do_it_again(chosen):
    words = Parsed(page(str(chosen))).words
    places = [words.index(text) for text in (
        "finetuned pruned against base", "with fapm", "is fapm-", "It retains ", "The trade-off", "checkpoint",
        "What was done", "By kind of tensor", "How to do it again", "fapm verify",
    )]  # fmt: skip
    assert places == sorted(places)
    assert re.search(r"It retains [\d.]+ % ±[\d.]+ of the new skill and forgets [\d.]+ % ±[\d.]+ of the old", words)
    assert "where finetuned forgets 25.0 %" in words


def test_points_say_what_they_are_and_the_chart_and_the_table_agree(chosen):
    text = page(str(chosen))
    said = re.findall(r"<g id=\"trade-off-point-\d+\"><title>([^<]*)</title>", text)
    assert len(said) == 11
    (point,) = (words for words in said if words.startswith("magnitude-0.2: "))
    retained, forgotten = re.findall(r"([\d.]+) % ±", point)
    assert f"<td>{retained} % ±" in text and f"<td>{forgotten} % ±" in text
    for legend in ("all of the new skill", "nothing forgotten", "retained 50 %", "the front", "chosen"):
        assert f">{legend}</text>" in text


def test_what_is_the_same_everywhere_by_construction_is_left_out(folder, chosen):
    given = {side: str(folder / side) for side in ("base", "finetuned")}
    prune(Recipe.of(**given, out=str(folder / "tensor"), device="cpu"))
    prune(Recipe.of(**given, out=str(folder / "all"), device="cpu", density=1))
    shown = page(str(folder / "tensor"))
    assert ">elements kept, %</text>" not in shown and ">‖Δ‖² kept, %</text>" in shown
    assert "What was kept" not in page(str(folder / "all"))


def test_a_sweep_that_is_doubted_says_so(folder, chosen):
    facts = json.loads((chosen / "sweep" / "sweep.json").read_text())
    swapped = folder / "swapped"
    shutil.copytree(chosen, swapped)
    facts["base"]["new"], facts["finetuned"]["new"] = facts["finetuned"]["new"], facts["base"]["new"]
    facts["command"] = ["fapm", "sweep", "--evaluate", "./it's.sh {checkpoint}"]
    (swapped / "sweep" / "sweep.json").write_text(json.dumps(facts))
    words = Parsed(page(str(swapped))).words
    assert "finetuned is not better than base at the new skill" in words
    assert """fapm sweep --evaluate './it'"'"'s.sh {checkpoint}'""" in words


def test_several_runs_on_one_page(folder, chosen):
    facts = json.loads((chosen / "sweep" / "sweep.json").read_text())
    rows = [{"name": side, **facts[side]} for side in ("base", "finetuned")] + facts["candidates"][:3]
    measured = {key: facts["candidates"][1][key] for key in ("new", "old", "retained", "forgetting")}
    rows.append({"name": "merged/", "error": "", **measured})
    text = compared_page({"checkpoints": rows})
    assert "Checkpoints side by side" in text and text.count('role="img"') == 1
    assert "merged/: retained" in text and "fapm-0.05: retained" in text


def test_a_single_prune_has_a_page_too(folder):
    given = {side: str(folder / side) for side in ("base", "finetuned")}
    prune(Recipe.of(**given, out=str(folder / "single"), device="cpu", scope="global"))
    parsed = Parsed(page(str(folder / "single")))
    assert len([svg for svg in parsed.all("svg") if svg.get("role")]) == 2
    assert "trade-off" not in parsed.words and "scope global" in parsed.words
    with pytest.raises(UserError, match="no output of fapm"):
        page(str(folder / "base"))


def test_a_sweep_that_was_not_evaluated_or_only_half(folder):
    out = swept(folder, "bare", evaluated=False)
    assert "Nothing was evaluated" in page(str(out))
    facts = json.loads((out / "sweep" / "sweep.json").read_text())
    for row in (facts["base"], facts["finetuned"], *facts["candidates"]):
        row |= {"old": {"value": 0.5, "stderr": None}, "error": "", "seconds": 1.0}
    (out / "sweep" / "sweep.json").write_text(json.dumps(facts))
    assert "The old skill by density" in page(str(out))


def test_without_layers_there_is_no_heat_map(tmp_path):
    for side, tensors in zip(("base", "finetuned"), gaussian({"a": (30, 7), "b": ()}, torch.float32), strict=True):
        save(tmp_path / side, tensors)
    given = {side: str(tmp_path / side) for side in ("base", "finetuned", "out")}
    prune(Recipe.of(**given, device="cpu"))
    assert "<svg" not in page(given["out"])


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,1400"):
        options.add_argument(argument)
    options.binary_location = str(program("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
    yield driver
    driver.quit()


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of `rgb(1, 2, 3)`."""
    parts = [int(float(part)) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@needs("Chromium", "chromium", "chromedriver")
@pytest.mark.parametrize("media", ["light", "dark", "print"])
def test_a_browser_shows_it(browser, chosen, tmp_path, media):
    import numpy as np
    from PIL import Image

    (tmp_path / "page.html").write_text(page(str(chosen)))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if media == "dark" else "light"}
    kind = "print" if media == "print" else "screen"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": [scheme]})
    browser.get_log("performance")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("file:", "data:")) for url in urls), urls
    assert browser.execute_script("return document.querySelectorAll('img, script').length") == 0
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.1) == (media == "dark")
    inks = browser.execute_script(
        "return [...document.querySelectorAll('svg text, p, td, th, h1, h2, pre')]"
        ".filter(e => !e.closest('#kept-axes_1') && !e.closest('#kept-axes_2') || !e.closest('svg'))"
        ".map(e => e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color)"
    )
    assert len(inks) > 50
    assert min(contrast(ink, ground) for ink in inks) >= 4.5
    lines = browser.execute_script(
        "return [...document.querySelectorAll('#trade-off-axes_1 > g > path[style*=\"--s\"]')]"
        ".map(e => getComputedStyle(e).stroke)"
    )
    assert len(set(lines)) == 3 and min(contrast(line, ground) for line in lines) >= 3
    cut = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => { const r = s.getBoundingClientRect();"
        "return [r.width, [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();"
        "return b.width && (b.left < r.left - 2 || b.right > r.right + 2 || b.top < r.top - 2 "
        "|| b.bottom > r.bottom + 2);"
        "}).length]; })"
    )
    assert len(cut) == 3 and all(width > 400 and outside == 0 for width, outside in cut), cut
    shot = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")).reshape(-1, 3)
    for line in set(lines):  # each curve is there to be seen
        wanted = np.array([int(float(part)) for part in re.findall(r"[\d.]+", line)[:3]])
        assert (np.abs(shot.astype(int) - wanted).max(1) <= 8).sum() > 100, line
