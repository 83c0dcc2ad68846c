"""Metrics of a run for Ray, which Prometheus collects; `configs/grafana.json` shows them.

Prometheus knows a gauge as `ray_NAME` and a counter as `ray_NAME_total`. They come from the driver alone, which hears
of everything that a worker has done. Every one has the label `out`, the output's folder.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from fapm.dispatcher import Dispatcher, Loss
from fapm.shard.task import Done

GAUGES = {
    "fapm_shards": "Shards that the run has to write.",
    "fapm_workers_ready": "Workers that work or wait for work.",
    "fapm_workers_pending": "Workers that the cluster was asked for and that cannot begin yet.",
}
COUNTERS = {
    "fapm_read_bytes": "Input bytes read by the workers.",
    "fapm_written_bytes": "Output bytes written by the workers.",
    "fapm_shards_done": "Shards written.",
    "fapm_shards_retried": "Times that a shard was begun again, for a try that failed, was lost or took long.",
    "fapm_shards_lost": "Times that a shard was lost with its worker.",
    "fapm_workers_lost": "Workers lost, by how: crashed, preempted, hung or device.",
    "fapm_reading_seconds": "Seconds of the workers' reading threads, while they read.",
    "fapm_computing_seconds": "CPU seconds of the workers' computing threads.",
    "fapm_writing_seconds": "Seconds of the workers' writing threads, while they hashed, wrote and made durable.",
}


class Metrics:
    """The metrics of one run.

    Args:
        out: the output's folder.
        shards: how many there are to write.
    """

    def __init__(self, out: str, shards: int):
        tags = {"out": out}
        self._gauges = {name: Gauge(name, text, ("out",)) for name, text in GAUGES.items()}
        self._counters = {
            name: Counter(name, text, ("out", "how") if name == "fapm_workers_lost" else ("out",))
            for name, text in COUNTERS.items()
        }
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags(tags)
        self._lost = dict.fromkeys(Loss, 0)
        self._lost_tries = 0
        self._shards = shards

    def done(self, done: Done, wrote: bool) -> None:
        """A worker has done a step of a shard.

        Args:
            wrote: the last one.
        """
        self._add("fapm_read_bytes", done.read_bytes)
        self._add("fapm_written_bytes", done.written_bytes)
        self._add("fapm_shards_done", int(wrote))
        self._add("fapm_shards_retried", done.tries - 1)
        self._add("fapm_reading_seconds", done.reading)
        self._add("fapm_computing_seconds", done.computing)
        self._add("fapm_writing_seconds", done.writing)

    def workers(self, dispatcher: Dispatcher) -> None:
        """Set the gauges of workers. To be called often: Ray forgets a gauge that is not set again."""
        self._gauges["fapm_shards"].set(self._shards)
        self._gauges["fapm_workers_ready"].set(dispatcher.ready_workers)
        self._gauges["fapm_workers_pending"].set(dispatcher.pending_workers)
        for how, lost in dispatcher.losses.items():
            self._add("fapm_workers_lost", lost - self._lost[how], how=how.value)
        self._add("fapm_shards_lost", dispatcher.lost_tries - self._lost_tries)
        self._lost, self._lost_tries = dict(dispatcher.losses), dispatcher.lost_tries

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray's counters refuse 0
            self._counters[name].inc(value, tags)
