"""pytest tests/pipeline/formats/test_header.py

Headers are what the safetensors library writes and reads, or one error.
"""

from __future__ import annotations

import json
import resource

import pytest
import torch
from checkpoints import raw_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pace import at_once
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fapm.errors import UserError
from fapm.formats.header import MAX_HEADER_BYTES, build_header, is_name, read_header
from fapm.storage.local import Reader

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

names = st.text(st.characters(min_codepoint=33, exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
layouts = st.dictionaries(
    names.filter(lambda n: n != "__metadata__" and is_name(n)), st.tuples(st.sampled_from(list(TORCH)), shapes)
)


def read(path):
    reader = Reader(path)
    try:
        return read_header(reader, path.name, str(path)).tensors
    finally:
        reader.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(layout=layouts)
def test_what_the_library_writes_is_read(tmp_path, layout):
    tensors = {name: torch.zeros(shape, dtype=TORCH[dtype]) for name, (dtype, shape) in layout.items()}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "ü": "x"})
    found = read(path)
    assert {t.name: (t.dtype, t.shape) for t in found} == layout
    assert [t.offset for t in found] == sorted(t.offset for t in found)
    content = path.read_bytes()
    assert sum(t.nbytes for t in found) + int.from_bytes(content[:8], "little") + 8 == len(content)
    assert all(t.numel == tensors[t.name].numel() for t in found)
    assert all(t.file == "a.safetensors" for t in found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(layout=layouts)
def test_what_is_written_is_read_by_the_library(tmp_path, layout):
    sizes = {n: torch.zeros(s, dtype=TORCH[d]).nbytes for n, (d, s) in layout.items()}
    header = build_header((name, dtype, shape, sizes[name]) for name, (dtype, shape) in layout.items())
    assert len(header) % 8 == 0
    path = tmp_path / "b.safetensors"
    path.write_bytes(header + bytes(range(256)) * (sum(sizes.values()) // 256 + 1))
    path.write_bytes(path.read_bytes()[: len(header) + sum(sizes.values())])
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(layout)
        for name, (dtype, shape) in layout.items():
            tensor = opened.get_slice(name)
            assert tensor.get_dtype() == dtype
            assert tuple(tensor.get_shape()) == shape
    assert {t.name: (t.dtype, t.shape) for t in read(path)} == layout


def entry(begin: int = 0, end: int = 8, dtype="F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = json.dumps({"a": entry()}).encode()

BROKEN = {
    "an empty file": b"",
    "seven bytes": b"1234567",
    "a length beyond the file": (100).to_bytes(8, "little") + b"{}",
    "a length beyond the limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "a length of 2^64-1": b"\xff" * 8 + b"{}",
    "an ASCII file": b"PK\x03\x04" + b"x" * 1000,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4\n",
    "a length of nothing": bytes(8),
    "half a header": (10).to_bytes(8, "little") + GOOD[:10],
    "no JSON": b"not json at all",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "JSON in depth": b"[" * 100_000,
    "objects in depth": b'{"a":' * 50_000,
    "a number of many digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "NaN for an entry": b'{"a": NaN}',
    "a key twice": b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}",
    "a field twice": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "UTF-16": GOOD.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "trailing text": GOOD + b" x",
}


def wrapped(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_no_safetensors_is_one_error(tmp_path, what):
    path = tmp_path / "x.safetensors"
    raw = what in list(BROKEN)[:9]
    path.write_bytes(BROKEN[what] if raw else wrapped(BROKEN[what]))
    if "twice" not in what:  # those two the library lets pass
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass
    with pytest.raises(UserError, match="not a valid safetensors file") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


LYING = {
    "an overlap": ({"a": entry(), "b": entry(4, 12)}, 12),
    "the same bytes twice": ({"a": entry(), "b": entry()}, 8),
    "a gap": ({"a": entry(), "b": entry(12, 20)}, 20),
    "a gap at the beginning": ({"a": entry(4, 12)}, 12),
    "trailing bytes": ({"a": entry()}, 9),
    "missing bytes": ({"a": entry()}, 7),
    "no tensor but bytes": ({}, 1),
    "an end before its beginning": ({"a": entry(8, 0)}, 8),
    "negative offsets": ({"a": entry(-8, 0)}, 8),
    "a negative shape": ({"a": entry(shape=(-2,))}, 8),
    "two negative lengths": ({"a": entry(shape=(-2, -1))}, 8),
    "a shape of floats": ({"a": entry(shape=(2.0,))}, 8),
    "a shape of bools": ({"a": entry(0, 4, shape=(True,))}, 4),
    "a shape of text": ({"a": {**entry(), "shape": "2"}}, 8),
    "a shape that is not its bytes": ({"a": entry(shape=(3,))}, 8),
    "2^63 elements": ({"a": entry(shape=(2**63,))}, 8),
    "a product that overflows 64 bits to 2": ({"a": entry(shape=(2**32 + 1, 2**32 - 1, 2))}, 8),
    "64 lengths of 2^40": ({"a": entry(shape=(2**40,) * 64)}, 8),
    "a length of 400 digits": ({"a": entry(shape=(10**400,))}, 8),
    "an offset of 400 digits": ({"a": entry(0, 10**400)}, 8),
    "nothing times 2^63": ({"a": entry(0, 0, shape=(0, 2**63))}, 0),
    "a thousand dimensions": ({"a": entry(0, 4, shape=(1,) * 1000)}, 4),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "another field": ({"a": {**entry(), "x": 1}}, 8),
    "an unknown dtype": ({"a": entry(dtype="F31")}, 8),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, 8),
    "an entry that is a list": ({"a": [0, 8]}, 8),
    "a name of nothing": ({"": entry()}, 8),
    "a NUL in a name": ({"a\0b": entry()}, 8),
    "a newline in a name": ({"a\nb": entry()}, 8),
    "half a surrogate in a name": ({"a\ud800": entry()}, 8),
}


@pytest.mark.parametrize("what", LYING)
def test_a_header_that_lies_is_one_error(tmp_path, what):
    header, data = LYING[what]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(UserError, match="not a valid safetensors file") as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    text.encode()  # printable


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../b", "..", "a\\..", "\x9b31m", "a\nb", "a\x1b[2J", ""])
def test_a_name_that_a_path_or_a_terminal_would_take_for_more(tmp_path, name):
    path = raw_file(tmp_path / "x.safetensors", {name: entry()}, bytes(8))
    with pytest.raises(UserError, match="a tensor is named") as caught:
        read(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a..b", "/etc/passwd", "a/b", "ü.weight", "..a", "a b"])
def test_all_other_names_are_only_names(tmp_path, name):
    path = raw_file(tmp_path / "x.safetensors", {name: entry()}, bytes(8))
    assert [t.name for t in read(path)] == [name]


def test_any_order_of_tensors_and_no_alignment(tmp_path):
    header = {
        "z": entry(0, 3, "U8", (3,)),
        "b": entry(11, 13, "BF16", (1,)),
        "a": entry(3, 11),
        "e": entry(3, 3, "F32", (0,)),
    }
    path = raw_file(tmp_path / "x.safetensors", header, bytes(13))
    start = path.stat().st_size - 13
    assert [(t.name, t.offset - start) for t in read(path)] == [("z", 0), ("e", 3), ("a", 3), ("b", 11)]
    assert raw_file(tmp_path / "y.safetensors", {}, b"")
    assert read(tmp_path / "y.safetensors") == []


def test_types_narrower_than_a_byte(tmp_path):
    path = raw_file(
        tmp_path / "x.safetensors", {"a": entry(0, 3, "F4", (6,)), "b": entry(3, 6, "F6_E2M3", (4,))}, bytes(6)
    )
    assert [t.nbytes for t in read(path)] == [3, 3]
    path = raw_file(tmp_path / "x.safetensors", {"a": entry(0, 3, "F4", (5,))}, bytes(3))
    with pytest.raises(UserError):
        read(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60), st.integers(0, 90), st.data())
def test_bytes_changed_at_random_are_read_or_are_one_error(tmp_path, noise, where, data):
    header = {"a": entry(), "bcd": entry(8, 10, "BF16", (1,))}
    good = raw_file(tmp_path / "x.safetensors", header, bytes(10)).read_bytes()
    broken = good[:where] + noise + good[where + data.draw(st.integers(0, len(noise))) :]
    path = tmp_path / "y.safetensors"
    path.write_bytes(broken)
    try:
        found = read(path)
    except UserError:
        return
    with safe_open(path, "pt") as opened:  # whatever is accepted, the library accepts too
        assert set(opened.keys()) == {t.name for t in found}


@pytest.mark.parametrize("text", [b"[" * 90_000_000, b'{"a":' + b" " * 90_000_000, b'"' + b"a" * 90_000_000])
def test_a_large_header_of_nonsense_is_refused_quickly(tmp_path, text):
    path = raw_file(tmp_path / "x.safetensors", text, b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with at_once(5), pytest.raises(UserError):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # kB: the text, and it decoded


def test_a_claim_of_a_huge_header_allocates_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_BYTES).to_bytes(8, "little") + b"{}")
    with at_once(0.5), pytest.raises(UserError, match="truncated"):
        read(path)
