"""configs/clusters/ is what Ray's cluster launcher takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).parents[2] / "configs" / "clusters"
FILES = sorted(FOLDER.glob("*.yaml"))


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_is_one_for_each_place():
    assert [path.stem for path in FILES] == ["aws", "gcp", "on-premise"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_it(path):
    validate_config(prepare_config(copy.deepcopy(load(path))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_would_refuse_a_typing_error(path):
    wrong = load(path) | {"idle_minutes": 3}
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_head_stays_and_workers_come_from_nothing_spot_ones_first(name):
    config = load(FOLDER / f"{name}.yaml")
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    spot, on_demand = types["spot"], types["on-demand" if name == "aws" else "on_demand"]
    market = {
        "aws": lambda t: t["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot",
        "gcp": lambda t: {"preemptible": True} in t["node_config"].get("scheduling", []),
    }[name]
    assert [market(t) for t in (head, spot, on_demand)] == [False, True, False]
    assert spot["priority"] > on_demand["priority"]
    for workers in types.values():
        assert workers["min_workers"] == 0 < workers["max_workers"] == config["max_workers"]
        assert workers["resources"]["memory"]  # else no worker that says what memory it needs gets a node


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_wants_a_token_and_listens_to_this_machine_alone(path):
    config = load(path)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for command in config["head_start_ray_commands"][1:] + config["worker_start_ray_commands"][1:]:
        assert command.startswith("RAY_AUTH_MODE=token ray start")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert config["docker"]["image"] == "registry.example.com/fapm:0.1.0"
