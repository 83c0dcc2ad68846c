"""pytest tests/pipeline/storage/test_bucket.py: a folder in an object store is one like any other; on moto's server."""

from __future__ import annotations

import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import obstore
import pytest
import s3
from faulty import proxy
from pace import soon

from fapm.errors import PassingError, TakenOverError, UserError
from fapm.storage import bucket
from fapm.storage import lease as holding
from fapm.storage.address import inside, matching, open_store, split
from fapm.storage.bucket import Bucket
from fapm.storage.lease import last_sign_of_life, lease
from fapm.storage.s3 import boto3_client
from fapm.storage.store import Store


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.moto() as found:
        yield found


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield s3.use(monkeypatch, endpoint)
    s3.forget()


@pytest.fixture
def name(client: Any) -> str:
    """Of a new bucket."""
    found = f"b-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=found)
    return found


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path) -> Store:
    """Both, so that what is said of one holds of the other."""
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    return open_store(f"s3://{request.getfixturevalue('name')}/some/out")


def bytes_of(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


# What a store does.


def test_files_come_and_go(folder):
    assert not folder.exists() and folder.is_empty() and folder.files() == {} and not folder.is_file()
    folder.write("a", b"1")
    folder.write("sub/b", b"22")
    folder.write(".hidden", b"3")
    assert folder.exists() and not folder.is_empty()
    assert {name: stat.size for name, stat in folder.files().items()} == {"a": 1, "sub/b": 2}
    assert list(folder.files("sub")) == ["sub/b"]
    assert [name for name in folder.folders() if name != "fapm"] == ["sub"]
    assert (folder.has("a"), folder.has("b"), folder.has_folder("sub"), folder.has_folder("a b")) == (1, 0, 1, 0)
    assert (folder.size("sub/b"), folder.read("sub/b")) == (2, b"22")
    assert abs(folder.changed("a") - time.time()) < 60
    folder.remove("a")
    folder.remove("not there")
    folder.remove_folder("sub")
    folder.remove_folder("nor this")
    assert folder.files() == {}


def test_what_is_written_again_has_another_version(folder):
    folder.write("a", b"1")
    before = folder.files()["a"]
    assert folder.files()["a"] == before
    time.sleep(0.02)
    folder.write("a", b"2")
    assert folder.files()["a"].version != before.version


def test_ranges_are_read_exactly(folder):
    data = bytes_of(40 << 20)  # more than is asked for at once
    folder.write("a", data)
    reader = folder.reader("a")
    assert reader.size == len(data)
    for offset, length in ((0, len(data)), (5, 1), (7, 33 << 20), (len(data) - 3, 3), (9, 0)):
        assert reader.read(offset, length) == data[offset : offset + length]
    rows, offsets = np.empty((100, 256), np.uint8), list(range(0, 100 * 100_003, 100_003))
    reader.read_rows(offsets, rows)
    assert [row.tobytes() for row in rows] == [data[o : o + 256] for o in offsets]
    with pytest.raises(UserError, match=r"a: the file ends at byte 41943040; it was cut short"):
        reader.read(len(data) - 1, 2)
    folder.close()


@pytest.mark.parametrize("size", [0, 1, 5 << 20, 40_000_001])
def test_a_file_appears_when_it_is_published_whole(folder, size):
    data = bytes_of(size)
    writer = folder.create("sub/a", size)
    for start in range(0, size, 9_000_000):
        writer.write(start, np.frombuffer(data[start : start + 9_000_000], np.uint8))
    assert not folder.has("sub/a")
    writer.publish()
    assert folder.read("sub/a") == data


def test_a_buffer_may_be_used_again_once_it_is_written(folder):
    size, buffer = 4 << 20, np.empty(4 << 20, np.uint8)
    writer = folder.create("big", 16 * size)
    for number in range(16):
        buffer[:] = number
        writer.write(number * size, buffer)
    buffer[:] = 255
    writer.publish()
    assert folder.read("big") == b"".join(bytes([number]) * size for number in range(16))


def test_one_that_is_discarded_never_does(folder):
    writer = folder.create("a", 20 << 20)
    writer.write(0, bytes(20 << 20))
    writer.discard()
    assert folder.files() == {}
    if isinstance(folder, Bucket):
        assert s3.uploads(boto3_client(folder._root[5:]), folder._root.removeprefix("s3://")) == []


def test_files_are_added_to(folder):
    for i in range(20):
        folder.append("log", b"%d\n" % i, now=i == 19)
    assert folder.read("log") == b"".join(b"%d\n" % i for i in range(20))
    again = open_store(folder.address)
    again.append("log", b"more\n", now=True)
    assert again.read("log").endswith(b"19\nmore\n")


@pytest.mark.parametrize("bad", ["../a", "/a", "a/../../b", "a//b", "", ".", "a\0b"])
def test_no_name_leads_out(folder, bad):
    for work in (folder.read, folder.has, folder.remove, folder.reader, lambda name: folder.write(name, b"")):
        with pytest.raises(UserError, match="leads out of the folder"):
            work(bad)


def test_it_travels(folder):
    folder.write("a", b"1")
    folder.reader("a")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"1"
    assert folder.absolute().read("a") == b"1"


def test_overlaps(folder):
    address = folder.address
    assert folder.overlaps(open_store(address)) == "same"
    assert folder.overlaps(open_store(inside(address, "sub"))) == "holds"
    assert open_store(inside(address, "sub")).overlaps(folder) == "inside"
    assert not folder.overlaps(open_store(address + "-2"))
    assert split(inside(address, "sub")) == (address, "sub")


def test_patterns(folder):
    for name in ("2026-01-01/a/x", "2026-01-02/a/x", "2026-01-02/b/x", "other/a/x"):
        folder.write(name, b"")
    found = matching(inside(folder.address, "2026-*") + "/a")
    assert sorted(found) == [inside(folder.address, f"2026-01-0{i}") + "/a" for i in (1, 2)]


# What goes wrong.


def test_what_is_not_there(name, client):
    there = open_store(f"s3://{name}/x")
    for work in (there.read, there.reader, there.size):
        with pytest.raises(UserError, match=rf"^there is no s3://{name}/x/nothing$"):
            work("nothing")
    for work in (lambda s: s.exists(), lambda s: s.read("a"), lambda s: s.write("a", b"")):
        with pytest.raises(UserError, match="no such bucket") as caught:
            work(open_store("s3://not-a-bucket-of-anybody/x"))
        assert not isinstance(caught.value, PassingError)


@pytest.mark.parametrize(
    "address", ["s3://", "s3:///x", "s3://bucket//x", "s3://bucket/../x", "s4://bucket/x", "http://a/b"]
)
def test_addresses_that_cannot_be(address):
    with pytest.raises(UserError, match="s3://"):
        open_store(address)


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(name, client):
    there = open_store(f"s3://{name}/x")
    there.write("a", b"12345")
    reader = there.reader("a")
    assert reader.read(1, 2) == b"23"
    there.write("a", b"54321")
    with pytest.raises(UserError, match="was replaced while it was in use"):
        reader.read(1, 2)


def test_without_credentials_it_is_said_which(name, monkeypatch):
    for key in s3.KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3.forget()
    said = "no credentials were found; they come from AWS_ACCESS_KEY_ID, AWS_PROFILE"
    with soon(4), pytest.raises(UserError, match=said):
        open_store(f"s3://{name}/x").exists()


@pytest.mark.parametrize(
    ("answer", "passes", "sentence"),
    [
        ("status code: 403 Forbidden: <Code>SignatureDoesNotMatch</Code>", False, "does not accept the secret key"),
        (
            "status code: 403 Forbidden: <Code>AccessDenied</Code>",
            False,
            r"denies access \(AccessDenied\)",
        ),
        ("status code: 400 Bad Request: <Code>ExpiredToken</Code>", False, "credentials have expired"),
        ("status code: 301: <Code>PermanentRedirect</Code>", False, "another region than .* set AWS_REGION"),
        ("status code: 400 Bad Request: <Code>EntityTooSmall</Code>", False, "refuses it: 400 EntityTooSmall"),
        (
            "status code: 503 Slow: <Code>SlowDown</Code>?X-Amz-Signature=abc",
            True,
            r"\(503 SlowDown\)",
        ),
        ("status code: 429 Too Many Requests: ", True, r"\(429\)"),
        (
            "HTTP error: error sending request for http://h/?sig=abc",
            True,
            "cannot be reached",
        ),
    ],
)
def test_answers_in_a_sentence(answer, passes, sentence):
    with pytest.raises(UserError, match=sentence) as caught, bucket.plain_errors("s3://b/x"):
        raise bucket.BaseError(f"Generic S3 error: Error performing GET http://h/b/x in 1ms - Server {answer} source")
    assert isinstance(caught.value, PassingError) == passes
    assert "sig" not in str(caught.value).lower()


def test_a_store_that_is_away_is_waited_for_within_bounds(monkeypatch):
    s3.use(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 1.0)
    began = time.monotonic()
    with soon(10), pytest.raises(PassingError, match="nothing listens there"):
        open_store("s3://bucket/x").exists()
    assert time.monotonic() - began >= 1
    s3.forget()


# Under a hold.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(holding, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(holding, "LEASE_SECONDS", 2.0)


def test_nothing_of_a_hold_is_left(name, client, quick):
    with lease(f"s3://{name}/out") as out:
        out.write("a", b"1")
        assert last_sign_of_life(open_store(f"s3://{name}/out"))[0].startswith("process")
    assert list(s3.download(client, f"s3://{name}/out")) == ["a"]
    assert last_sign_of_life(open_store(f"s3://{name}/out")) is None


def test_a_second_run_is_told_who_holds_it(name, client, quick):
    with lease(f"s3://{name}/out") as out:
        with pytest.raises(PassingError, match="is being written by process"):
            lease(f"s3://{name}/out").__enter__()
        out.write("a", b"1")
    with lease(f"s3://{name}/out"):
        pass


CHANGES = {
    "write": lambda out, begun: out.write("new", b"x"),
    "append": lambda out, begun: out.append("new", b"x", now=True),
    "create": lambda out, begun: out.create("new", 5),
    "publish": lambda out, begun: begun.publish(),
    "remove": lambda out, begun: out.remove("theirs"),
    "remove_folder": lambda out, begun: out.remove_folder("folder"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_comes_back_changes_nothing(name, client, quick, monkeypatch, change):
    monkeypatch.setattr(holding, "_beat", lambda *_: None)  # paused from the beginning
    first = lease(f"s3://{name}/out")
    out = first.__enter__()
    begun = out.create("theirs", 20 << 20)
    begun.write(0, bytes(20 << 20))
    assert s3.uploads(client, name) == ["out/theirs"]
    time.sleep(bucket.CHECK_SECONDS)
    with lease(f"s3://{name}/out") as successor:
        assert s3.uploads(client, name) == []
        successor.write("theirs", b"n")
        successor.write("folder/theirs", b"n")
        with pytest.raises(PassingError, match="was taken over by another run or removed"):
            CHANGES[change](pickle.loads(pickle.dumps(out)) if change != "append" else out, begun)
        first.__exit__(None, None, None)
        mine = successor.create("mine", 20 << 20)
        mine.write(0, bytes(20 << 20))
        mine.publish()
    assert list(s3.download(client, f"s3://{name}/out")) == ["folder/theirs", "mine", "theirs"]
    assert s3.uploads(client, name) == []


def test_an_upload_that_was_ended_cannot_be_completed_however_late(name, client, quick):
    """The check before it was made in time, and the pause came then."""
    with lease(f"s3://{name}/out") as out:
        begun = out.create("theirs", 20 << 20)
        begun.write(0, bytes(20 << 20))
        out.end_uploads()
        with pytest.raises(UserError):
            begun.publish()
        assert not out.has("theirs")


def test_of_many_at_once_one_wins(name, client, quick):
    won, lost = [], []
    ready = threading.Barrier(6)

    def run() -> None:
        ready.wait()
        try:
            with lease(f"s3://{name}/out"):
                won.append(1)
                time.sleep(3)
        except PassingError:
            lost.append(1)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 5)


# A store that does not keep its word.


@pytest.fixture
def forgetful(endpoint: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a folder in a store that ignores conditions, as several compatible ones do."""
    found = f"b-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=found)
    with proxy(endpoint) as between:
        between.forgets = ("if-none-match", "if-match")
        s3.use(monkeypatch, between.url)
        yield f"s3://{found}/out"


def test_where_a_lock_can_be_made_twice_nothing_is_written(forgetful):
    with pytest.raises(UserError, match=r"accepts a file that may only be made once .* a second time.*--alone"):
        lease(forgetful).__enter__()
    assert open_store(forgetful).files() == {}


def test_who_is_alone_may_write_there(forgetful):
    with lease(forgetful, alone=True) as out:
        out.write("a", b"1")
        out.write("a", b"2")
    assert open_store(forgetful).files().keys() == {"a"} and open_store(forgetful).read("a") == b"2"


def test_a_store_that_does_not_know_its_own_tag_is_written_without_it(endpoint, name, monkeypatch):
    """As Ceph's gateway, to which a tag in quotes is another: the run once asked it again for ever."""
    with proxy(endpoint) as between:
        s3.use(monkeypatch, between.url)
        with lease(f"s3://{name}/out") as out:
            out.write("a", b"1")
            between.refuses = lambda asked: (
                (412, "<Error><Code>PreconditionFailed</Code></Error>")
                if asked.command == "PUT" and "If-Match" in asked.headers
                else None
            )
            out.write("a", b"2")
            out.append("log", b"3", now=True)
            out.append("log", b"4", now=True)
    assert open_store(f"s3://{name}/out").read("a") == b"2" and open_store(f"s3://{name}/out").read("log") == b"34"


def test_a_file_that_another_writes_all_the_time_is_given_up(name, monkeypatch):
    with lease(f"s3://{name}/out") as out:
        out.write("a", b"0")
        tags = iter(range(1000))
        monkeypatch.setattr(out, "_tag", lambda key: {"e_tag": f'"{next(tags)}"'})
        with pytest.raises(PassingError, match="a is written again and again by another"):
            out.write("a", b"1")


def test_another_s_lock_under_the_same_number_is_noticed(forgetful, monkeypatch):
    """As where both were told that they are alone."""
    monkeypatch.setattr(bucket, "CHECK_SECONDS", 0.0)
    with lease(forgetful, alone=True) as out:
        writer = out.create("b", 20 << 20)
        writer.write(0, bytes(20 << 20))
        open_store(forgetful).write("fapm/lock/000001", b'{"token": "another"}')
        with pytest.raises(PassingError, match="taken over"):
            out.write("a", b"1")
        with pytest.raises(PassingError, match="taken over"):
            writer.publish()
        writer.discard()
    assert open_store(forgetful).files().keys() == {"fapm/lock/000001"}  # which is not this one's to remove


def test_a_late_request_does_not_write_over_a_successor_s(name, monkeypatch):
    """It was sent after the look at the lock, and comes when another has taken over and written."""
    address = f"s3://{name}/out"
    put, late = obstore.put, []

    def slow(store, path, data, **how):
        if path.endswith("/a") and not late:
            late.append(path)
            open_store(address).write("a", b"the successor's")
        return put(store, path, data, **how)

    with lease(address) as out:
        monkeypatch.setattr(bucket.obstore, "put", slow)
        monkeypatch.setattr(bucket, "CHECK_SECONDS", 0.0)
        looked = out.check

        def taken_over() -> None:
            if late:
                raise TakenOverError("taken over")
            looked()

        monkeypatch.setattr(out, "check", taken_over)
        with pytest.raises(TakenOverError):
            out.write("a", b"late")
        monkeypatch.undo()
    assert open_store(address).read("a") == b"the successor's"


@pytest.mark.parametrize("marker", ["some/out/", "some/out/sub/"])
def test_a_folder_s_marker_is_an_empty_folder(client, name, marker):
    """As the consoles of stores leave one: an object of no bytes, whose name ends with a slash."""
    client.put_object(Bucket=name, Key=marker, Body=b"")
    folder = open_store(f"s3://{name}/some/out")
    assert folder.is_empty() and folder.files() == {} and not folder.is_file()
    with lease(folder.address) as out:
        out.write("a", b"1")
    assert folder.files().keys() == {"a"}
