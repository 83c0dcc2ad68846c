"""pytest tests/pipeline/test_advice.py: how fast a storage is, and whether a GPU would help with it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from pace import soon

from fapm.reporting.advice import advice_text, advise
from fapm.storage import rate
from fapm.storage.rate import ENOUGH_BYTES, read_rate

BILLION = 10**9
ONE = {"elements": BILLION, "pair_bytes": 4 * BILLION, "twice_bytes": 0}


def test_cores_that_keep_up_are_those_whose_arithmetic_takes_as_long_as_the_reading():
    # 4 GB at 2 GB/s are 2 s; 5.2 s of a core
    assert advise(2e9, **ONE, cores_here=3)["cores_that_keep_up"] == 3
    # 8 GB at 2 GB/s are 4 s; 8.4 s of a core
    assert advise(2e9, **ONE | {"twice_bytes": 4 * BILLION}, cores_here=3)["cores_that_keep_up"] == 3
    assert advise(1e6, **ONE, cores_here=1)["cores_that_keep_up"] == 1


def test_gpus_are_worth_having_where_cores_are_fewer_than_that():
    slow, fast = advise(1.5e9, **ONE, cores_here=2), advise(20e9, **ONE, cores_here=8)
    assert not slow["gpus_worth_having"]
    assert advice_text(slow) == "not worth asking for: the storage reads 1.5 GB/s, with which 2 cores keep up"
    assert fast["gpus_worth_having"]
    assert advice_text(fast).startswith("the storage reads 20 GB/s, with which 26 cores keep up, of which 8 are here; ")
    assert "at most 1.6 times as much" in advice_text(fast)


@pytest.fixture
def files(tmp_path):
    sizes = {str(tmp_path / "a"): ENOUGH_BYTES // 2, str(tmp_path / "b"): ENOUGH_BYTES // 2 + 12345}
    for path, size in sizes.items():
        Path(path).write_bytes(np.zeros(size, np.uint8).data)
    return sizes


def test_a_rate_is_that_of_reading(files, monkeypatch):
    assert read_rate(files) > 1e7
    read = []

    def slowly(path, start, buffer):
        time.sleep(0.01)
        read.append((path, start))
        return 1 << 20

    monkeypatch.setattr(rate, "_read", slowly)
    began = time.perf_counter()
    with soon(1):
        found = read_rate(files)
    seconds = time.perf_counter() - began
    assert len(set(read)) == len(read)
    assert len(read) * (1 << 20) / seconds <= found <= 2 * (1 << 20) / 0.01  # two at once


def test_a_file_system_that_knows_no_direct_reading_is_read_as_it_is(files, monkeypatch):
    opened, real = [], os.open

    def open_(path, flags):
        opened.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", open_)
    assert read_rate(files) > 0
    assert any(not flags & os.O_DIRECT for flags in opened)


def test_of_little_nothing_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_rate({str(tmp_path / "a"): 5}) is None
    with pytest.raises(OSError, match="No such file"):
        read_rate({str(tmp_path / "not there"): ENOUGH_BYTES})
