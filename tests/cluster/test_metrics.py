"""pytest tests/cluster/test_metrics.py: what Prometheus and the dashboard of configs/ know of a run.

The slow test wants a `prometheus`.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import needs, program
from nodes import CHOICES, thirty_shards
from pace import wait_until
from ray_head import Head, free_ports, started_head

pytest.importorskip("ray")

from fapm.cluster.metrics import COUNTERS, GAUGES

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "configs" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_uses_every_metric_and_no_other():
    exported = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    lists = [variable["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    assert set(re.findall(r"ray_\w+", " ".join(QUERIES + lists))) == exported


def test_the_dashboard_filters_by_its_variables_alone():
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) == declared | {"__rate_interval"}
    for query in QUERIES:
        assert query.count('{out=~"$out"}') == len(re.findall(r"ray_\w+", query)), query
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)


class Prometheus:
    """One that scrapes the cluster."""

    def __init__(self, address: str):
        self._address = address

    def ask(self, query: str) -> list[dict[str, Any]]:
        url = f"{self._address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def value(self, query: str) -> float | None:
        found = self.ask(query)
        return float(found[0]["value"][1]) if found else None


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("head"), with_fapm=True) as started:
        yield started


@pytest.fixture(scope="module")
def prometheus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    [port] = free_ports(1)
    targets = [{"targets": [f"127.0.0.1:{head.metrics_port}"]}]
    scrape = {"job_name": "ray", "scrape_interval": "1s", "scrape_timeout": "1s", "static_configs": targets}
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))  # JSON is YAML
    command = [
        str(program("prometheus")),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
    ]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def of_three(done: float | None) -> float | None:
    """A number that is 3 or more: of five shards that are there, two may not have been told of."""
    return done if done and done >= 3 else None


@pytest.mark.slow
@pytest.mark.timeout(240)
@needs("Prometheus", "prometheus")
def test_prometheus_answers_the_dashboard_during_a_run(head, prometheus, tmp_path):
    runner = thirty_shards(tmp_path)
    recipe = runner.recipe("out", **CHOICES)
    command = [sys.executable, "-m", "fapm", "submit", "--address", head.address, "--json"]
    options = ["--base", recipe.base, "--finetuned", recipe.finetuned, "--out", recipe.out]
    options += ["--shard-size", "6MB", "--workers", "2", "--memory", "128MB"]
    job = subprocess.Popen([*command, *options], env=head.environment, stdout=subprocess.PIPE, text=True)
    try:
        finished = Path(recipe.out).glob
        wait_until(lambda: len(list(finished("model-*.safetensors"))) >= 5)
        head.signal_workers(signal.SIGSTOP)
        wait_until(lambda: (prometheus.value("sum(ray_fapm_workers_ready)") or 0) == 2)
        done = wait_until(lambda: of_three(prometheus.value("sum(ray_fapm_shards_done_total)")))
        time.sleep(3)  # for rates
        assert prometheus.value("sum(ray_fapm_shards)") == 30
        assert done < 30
        assert prometheus.value("sum(ray_fapm_workers_pending)") == 0
        for query in QUERIES:
            plain = query.replace("$out", ".*").replace("$__rate_interval", "30s")
            assert prometheus.ask(plain), query
        head.signal_workers(signal.SIGKILL)
        wait_until(lambda: job.poll() is not None, 120)
        facts = json.loads(job.stdout.read())
        assert facts["lost_workers"] == {"crashed": 2}
        wait_until(lambda: prometheus.value("sum(ray_fapm_shards_done_total)") == 30)
        label = f'{{out="{recipe.out}"}}'
        assert prometheus.value(f"sum(ray_fapm_written_bytes_total{label})") == facts["totals"]["written_bytes"]
        assert prometheus.value(f"sum(ray_fapm_read_bytes_total{label})") == facts["totals"]["read_bytes"]
        assert prometheus.value('sum(ray_fapm_workers_lost_total{how="crashed"})') == 2
        lost, retried = (prometheus.value(f"sum(ray_fapm_shards_{what}_total)") for what in ("lost", "retried"))
        assert 2 <= lost <= retried
        for what in ("reading", "computing", "writing"):
            assert prometheus.value(f"sum(ray_fapm_{what}_seconds_total)") > 0
    finally:
        job.kill()
        job.wait()
        job.stdout.close()
