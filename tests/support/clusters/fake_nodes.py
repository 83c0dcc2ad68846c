"""Nodes for an autoscaler to launch: processes of this machine. Loaded by Ray's monitor, not by pytest."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Nodes(FakeMultiNodeProvider):
    """Ray's fake nodes cannot start where their type says how much memory they have, as types of real clouds do."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, Any], labels: Any
    ) -> Any:
        resources = {name: value for name, value in resources.items() if name != "memory"}
        return super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
