"""pytest tests/cluster/test_demand.py: what is asked of the cluster follows from the recipe and from what is there."""

from __future__ import annotations

import pytest

from fapm import Recipe, UserError
from fapm.cluster.demand import Demand, demand
from fapm.recipe import Workers

CPUS = {"CPU": 8.0, "memory": 1e11}
GPUS = {"CPU": 64.0, "GPU": 4.0}
MIB = 1 << 20


def asked(cluster, shards=100, **choices) -> Demand:
    return demand(Recipe.of(base="b", finetuned="f", out="o", **choices), shards, cluster)


@pytest.mark.parametrize(
    ("cluster", "choices", "workers", "options"),
    [
        (CPUS, {}, (1, 8), {"num_cpus": 1, "num_gpus": 0}),
        (CPUS, {"workers": 3}, (1, 3), {"num_cpus": 1}),
        (CPUS, {"workers": "2-30"}, (2, 30), {}),
        (CPUS, {"workers": "2-300"}, (2, 100), {}),  # no more than there are shards
        (CPUS, {"cpus_per_worker": 4}, (1, 2), {"num_cpus": 4, "max_concurrency": 4}),
        (GPUS, {}, (1, 4), {"num_cpus": 1, "num_gpus": 1}),
        (GPUS, {"gpus_per_worker": 0.25, "cpus_per_worker": 2}, (1, 16), {"num_cpus": 2, "num_gpus": 0.25}),
        (GPUS, {"device": "cpu"}, (1, 64), {"num_gpus": 0}),
        (GPUS, {"gpus_per_worker": 0}, (1, 64), {"num_gpus": 0}),
        ({}, {}, (1, 1), {"num_cpus": 1}),  # a head that scales from nothing
        (GPUS, {"method": "timber"}, (1, 64), {"num_cpus": 1, "num_gpus": 0}),  # which no GPU can do
        (GPUS, {"merged": [{"finetuned": "f"}], "device": "cuda"}, (1, 64), {"num_cpus": 1, "num_gpus": 0}),
        ({}, {"gpus_per_worker": 1, "workers": "0001-4"}, (1, 4), {"num_gpus": 1}),
        ({}, {"accelerator": "A100"}, (1, 1), {"num_gpus": 1, "accelerator_type": "A100"}),
        (CPUS, {"labels": ["market-type=!spot"]}, (1, 8), {"label_selector": {"market-type": "!spot"}}),
    ],
)
def test_workers_and_their_resources(cluster, choices, workers, options):
    found = asked(cluster, **choices)
    assert found.workers == Workers(*workers)
    assert found.options.items() >= options.items()
    assert found.options["max_restarts"] == 0
    assert ("max_concurrency" in found.options) == (found.slots > 1)


def test_memory_is_asked_for_and_divided_among_the_cpus_of_a_worker():
    one, four = asked(CPUS, memory="256MiB"), asked(CPUS, memory="1GiB", cpus_per_worker=4)
    assert one.memory == four.memory == 256 * MIB
    assert four.options["memory"] - one.options["memory"] == 3 * 256 * MIB
    assert asked(CPUS, memory="64GiB").options["memory"] < 1 << 30  # a worker uses no more than so much
    assert "4 CPU" in str(four)


def test_the_device_of_a_worker_is_the_only_one_that_it_has():
    recipe = Recipe.of(base="b", finetuned="f", out="o", device="cuda:3")
    assert demand(recipe, 5, GPUS).recipe(recipe).device == "cuda"
    recipe = Recipe.of(base="b", finetuned="f", out="o")
    assert demand(recipe, 5, CPUS).recipe(recipe).device == "cpu"


@pytest.mark.parametrize(
    ("cluster", "choices", "sentence"),
    [
        (CPUS, {"device": "cuda"}, r"--device cuda: the Ray cluster has no GPU now; .* --gpus-per-worker 1 to wait"),
        (GPUS, {"device": "cuda", "gpus_per_worker": 0}, "needs a GPU and --gpus-per-worker is 0"),
        (GPUS, {"device": "cpu", "gpus_per_worker": 1}, "--device cpu uses no GPU"),
        (GPUS, {"method": "dg-hard", "gpus_per_worker": 1}, "dg-hard, strength 1 uses no GPU"),
        (CPUS, {"memory": "128MiB", "cpus_per_worker": 4}, "--memory 128MiB: at least 64MiB for each of the 4 CPUs"),
    ],
)
def test_what_cannot_be_is_one_sentence(cluster, choices, sentence):
    with pytest.raises(UserError, match=sentence):
        asked(cluster, **choices)
