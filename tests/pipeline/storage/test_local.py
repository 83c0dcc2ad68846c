"""pytest tests/pipeline/storage/test_local.py

Nothing outside a folder is reached, and files appear whole or not at all.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from fapm.errors import UserError
from fapm.layout import TEMPORARY
from fapm.shard.writing import BUFFER_BYTES, Sink
from fapm.storage.local import Folder, Reader

OUTSIDE = [
    "../x", "a/../../x", "/etc/passwd", "..", ".", "", "a/..", "a//b", "a/", "./a", "a/./b", "a\0b",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "x").write_text("secret")
    (tmp_path / "f").mkdir()
    folder = Folder(tmp_path / "f")
    for action in (
        folder.read, folder.reader, folder.has, folder.size, folder.remove, folder.remove_folder,
        lambda n: folder.write(n, b"x"), lambda n: folder.create(n, 1),
    ):  # fmt: skip
        with pytest.raises(UserError, match="leads out of the folder"):
            action(name)
    assert (tmp_path / "x").read_text() == "secret"
    assert list((tmp_path / "f").iterdir()) == []


def test_a_backslash_is_a_letter_like_any_other(tmp_path):
    (tmp_path / "x").write_text("secret")
    folder = Folder(tmp_path / "f")
    folder.write("..\\x", b"mine")
    assert folder.read("..\\x") == b"mine"
    assert (tmp_path / "x").read_text() == "secret"


def left_behind(folder) -> list:
    return list((folder / TEMPORARY).iterdir()) if (folder / TEMPORARY).exists() else []


def test_a_file_appears_when_it_is_published(tmp_path):
    folder = Folder(tmp_path / "f")
    writer = folder.create("sub/a.bin", 10)
    writer.write(5, b"56789")
    writer.write(0, np.frombuffer(b"01234", np.uint8))
    assert not folder.has("sub/a.bin")
    writer.publish()
    assert folder.read("sub/a.bin") == b"0123456789"
    assert left_behind(tmp_path / "f") == []
    assert oct((tmp_path / "f" / "sub" / "a.bin").stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_discarded_file_leaves_nothing(tmp_path):
    folder = Folder(tmp_path)
    writer = folder.create("a.bin", 10)
    writer.discard()
    writer.discard()
    assert not folder.has("a.bin")
    assert left_behind(tmp_path) == []


def test_a_published_file_replaces_one_in_a_single_step(tmp_path):
    folder = Folder(tmp_path)
    folder.write("a", b"old")
    writer = folder.create("a", 3)
    writer.write(0, b"new")
    assert folder.read("a") == b"old"
    writer.publish()
    assert folder.read("a") == b"new"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = Folder(tmp_path / "f")
    folder.write("x", b"")
    (tmp_path / "f" / "a").symlink_to(tmp_path / "secret")
    folder.write("a", b"new")
    assert (tmp_path / "secret").read_text() == "secret"
    assert not (tmp_path / "f" / "a").is_symlink()


def test_a_failed_publish_closes_its_file_once(tmp_path):
    """The number of a closed file may belong to another thread's by the time it would be closed again."""
    folder = Folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    writer = folder.create("a", 1)
    writer.write(0, b"x")
    with pytest.raises(UserError):
        writer.publish()
    innocent = os.open(tmp_path, os.O_RDONLY)
    writer.discard()
    os.fstat(innocent)  # still open
    os.close(innocent)
    assert left_behind(tmp_path) == []


def test_small_files_are_whole_to_whoever_reads_them_meanwhile(tmp_path):
    folder = Folder(tmp_path)
    contents = [bytes([i]) * 50_000 for i in range(2)]
    folder.write("a", contents[0])
    stop = threading.Event()
    torn = []

    def watch() -> None:
        while not stop.is_set():
            if (tmp_path / "a").read_bytes() not in contents:
                torn.append(1)

    thread = threading.Thread(target=watch)
    thread.start()
    for i in range(100):
        folder.write("a", contents[i % 2])
    stop.set()
    thread.join()
    assert not torn


def test_listing_leaves_out_what_is_hidden(tmp_path):
    for name in ("a", "sub/b", ".git/c", "sub/.d", ".e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling").symlink_to("nowhere")
    files = Folder(tmp_path).files()
    assert set(files) == {"a", "sub/b"}
    assert files["sub/b"].size == 5
    about = (tmp_path / "a").stat()
    assert files["a"].version["mtime_ns"] == about.st_mtime_ns
    assert files["a"].version.get("ctime_ns", about.st_ctime_ns) == about.st_ctime_ns
    assert set(Folder(tmp_path).files("sub")) == {"sub/b"}
    assert Folder(tmp_path / "nowhere").files() == {}


def test_a_reader_gives_ranges_and_says_when_the_file_is_too_short(tmp_path):
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    reader = Reader(tmp_path / "a")
    assert reader.size == 100_000
    target = np.zeros(70_001, np.uint8)
    reader.read_into(17, target)
    assert target.tobytes() == data[17 : 17 + 70_001]
    assert reader.read(99_999, 1) == data[-1:]
    assert reader.read(5, 0) == b""
    with pytest.raises(UserError, match="the file ends at byte 100000"):
        reader.read(99_990, 20)
    os.truncate(tmp_path / "a", 50)
    with pytest.raises(UserError, match="cut short while in use"):
        reader.read(0, 100)
    reader.close()


def test_what_is_not_there_is_one_error(tmp_path):
    folder = Folder(tmp_path)
    for action in (folder.read, folder.reader):
        with pytest.raises(UserError, match="No such file"):
            action("a")
    folder.remove("a")
    folder.remove_folder("a")
    assert not folder.has("a")


def test_a_folder_travels_without_its_open_files(tmp_path):
    folder = Folder(tmp_path)
    folder.write("a", b"x")
    folder.reader("a")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"x"
    folder.close()


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert Folder(tmp_path / "a" / "b" / "c").free_bytes() > 0


def test_the_free_bytes_are_those_a_user_may_fill(tmp_path):
    stat = os.statvfs(tmp_path)
    free = Folder(tmp_path).free_bytes()
    assert abs(free - stat.f_bavail * stat.f_frsize) < 1 << 30


# The sink.


@pytest.mark.parametrize("size", [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES + 17])
def test_a_sink_writes_every_byte_in_order(tmp_path, size):
    import xxhash

    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    folder = Folder(tmp_path)
    writer = folder.create("a", size)
    sink = Sink(writer, size)
    sink.append(data[: size // 3])
    for start in range(size // 3, size, 1 << 20):
        part = data[start : start + (1 << 20)]
        lent = sink.reserve(part.size, 8)
        assert lent.ctypes.data % 8 == 0
        lent[:] = part
    assert sink.finish() == xxhash.xxh3_128_hexdigest(data.tobytes())
    writer.publish()
    assert folder.read("a") == data.tobytes()


@pytest.mark.parametrize("written", [5, 15])
def test_a_sink_that_got_too_few_or_too_many_bytes_is_a_bug(tmp_path, written):
    writer = Folder(tmp_path).create("a", 10)
    sink = Sink(writer, 10)
    sink.append(bytes(written))
    with pytest.raises(AssertionError):
        sink.finish()
    writer.discard()


def test_an_error_of_the_writing_thread_reaches_the_one_that_computes(tmp_path):
    writer = Folder(tmp_path).create("a", 10 * BUFFER_BYTES)

    def full(offset, data):
        raise UserError("no space left")

    writer.write = full
    sink = Sink(writer, 10 * BUFFER_BYTES)
    with pytest.raises(UserError, match="no space left"):
        sink.append(np.zeros(10 * BUFFER_BYTES, np.uint8))
    sink.abandon()
    assert left_behind(tmp_path) == []


FULL = """
import resource, sys
from fapm.errors import UserError
from fapm.storage.local import Folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for action in (lambda f: f.write("a", bytes(2000)), lambda f: f.create("b", 2000)):
    try:
        action(Folder(sys.argv[1]))
    except UserError as error:
        print(error)
"""


def test_a_file_that_may_not_grow_is_one_error_and_leaves_nothing(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2
    assert "File too large" in run.stdout
    assert left_behind(tmp_path) == []
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
