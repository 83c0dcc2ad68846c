"""pytest tests/pipeline/scoring/test_accelerator.py: what is asked of torch's streams, in which order.

Where there is no GPU torch makes no streams; here are some that are recorded. What a real GPU answers is tested by
test_engine.py and test_on_device.py where there is one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chunks import Device

from fapm.scoring import accelerator
from fapm.scoring.accelerator import Accelerator


class Runtime:
    """What is asked of torch, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.streams = 0
        self.current = Stream(self, "compute")

    def stream(self, device: torch.device) -> Stream:
        self.streams += 1
        return Stream(self, {1: "up", 2: "down"}[self.streams])


class Stream:
    def __init__(self, runtime: Runtime, name: str):
        self._runtime, self.name = runtime, name

    def record_event(self):
        number = sum("records" in call for call in self._runtime.calls)
        self._runtime.calls.append(f"{self.name} records {number}")
        return Event(self._runtime, number)

    def wait_event(self, event):
        self._runtime.calls.append(f"{self.name} waits for {event.number}")


class Event:
    def __init__(self, runtime: Runtime, number: int):
        self._runtime, self.number = runtime, number

    def synchronize(self):
        self._runtime.calls.append(f"the host waits for {self.number}")


@pytest.fixture
def runtime(monkeypatch):
    recorded = Runtime()
    monkeypatch.setattr(torch, "Stream", recorded.stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: setattr(recorded, "current", stream))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: recorded.current)
    copy, keep = torch.Tensor.copy_, lambda tensor, stream: recorded.calls.append(f"kept until {stream.name} is done")

    def copied(tensor, source, non_blocking=False):
        recorded.calls.append(f"{recorded.current.name} copies{'' if non_blocking else ', and all wait'}")
        return copy(tensor, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", keep)
    return recorded


def test_copies_are_on_streams_of_their_own_and_the_arithmetic_waits_for_what_it_uses(runtime):
    device = Accelerator("cpu")
    assert device.device == torch.device("cpu", 0)
    put = device.up(np.arange(5, dtype=np.uint16))
    sent = device.sent()
    assert runtime.calls == ["up copies", "up records 0", "up records 1"]
    runtime.calls.clear()
    tensor = device.use(put)
    assert runtime.calls == ["compute waits for 0", "kept until compute is done"]
    assert tensor.dtype == torch.int16 and tensor.tolist() == [0, 1, 2, 3, 4]
    runtime.calls.clear()
    sent()
    assert runtime.calls == ["the host waits for 1"]


def test_an_output_is_copied_once_it_is_computed(runtime):
    device, out = Accelerator("cpu"), np.zeros(3, np.uint16)
    device.down(torch.tensor([1, 2, -1], dtype=torch.int16), out)
    received = device.received()
    waits = ["compute records 0", "down waits for 0", "kept until down is done"]
    assert runtime.calls == [*waits, "down copies", "down records 1"]
    received()
    assert runtime.calls[-1] == "the host waits for 1"
    assert out.tolist() == [1, 2, 65535]


def test_numbers_are_fetched_together(runtime):
    found = Accelerator("cpu").fetch([torch.tensor([[1, 2]]), torch.tensor([0.5, -torch.inf], dtype=torch.float64)])
    assert [part.tolist() for part in found] == [[1, 2], [0.5, -np.inf]]
    assert Accelerator.fetch(None, []) == []


def test_memory_that_cannot_be_locked_is_ordinary_memory(runtime, monkeypatch):
    def refuse(*_, **choices):
        assert choices["pin_memory"]
        raise RuntimeError("no more of it")

    monkeypatch.setattr(accelerator.torch, "empty", refuse)
    assert Accelerator("cpu").host(100).size == 100


def test_the_benchmark_of_a_device_runs_and_its_bus_moves_what_the_prune_moves(monkeypatch):
    """On the tests' device, whose times say nothing."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import device as benchmark

    lines = benchmark.in_memory(Device(), Device(), tensors=3, elements=1 << 17).splitlines()
    assert [line.split(":")[0] for line in lines] == ["bus", "pinned to pinned", "arithmetic alone"]
    moved, pruned = Device(), Device()
    for one, work in ((moved, benchmark.bus), (pruned, benchmark.prune_all)):
        sides = benchmark.pairs(one, 3, 1 << 17)
        work(one, sides, [one.host(1 << 18)])
    assert moved.down_bytes == pruned.down_bytes == 3 * (1 << 18)
    assert moved.up_bytes - (1 << 18) == pruned.up_bytes == 6 * (1 << 18)
