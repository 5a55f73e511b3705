"""A bucket is a store of whole objects, created once, read from checked local copies; every refusal is one line."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from object_servers import BUCKET, ObjectServer

from cache_kd.cache.fetch_ahead import FetchAhead
from cache_kd.cache.object_process import OBJECTS
from cache_kd.cache.object_store import Fetching, ObjectStore
from cache_kd.cache.places import open_store, parse_place
from cache_kd.cache.records import FileEntry
from cache_kd.cache.store import Store, Url
from cache_kd.errors import CacheKDError, DamagedCacheError, DiskSpaceError, MissingFileError, SettingError

LIMIT = 10_000


@pytest.fixture(scope="module", params=["moto", "localbucket"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    running = ObjectServer(request.param, tmp_path_factory.mktemp("objects"))
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def reached(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment in which the server is reached, with a short patience."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "CACHE_KD_RETRY_SECONDS": "2",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Url:
    return Url(f"s3://{BUCKET}/{request.node.name.replace('[', '-').strip(']')}/cache")


@pytest.fixture
def store(place: Url, tmp_path: Path) -> ObjectStore:
    return ObjectStore(place, Fetching(tmp_path / "fetched", LIMIT))


def shard(store: Store, name: str, content: bytes) -> FileEntry:
    """Put a shard and return what a list says of it."""
    path = f"views/mixed-0000/x/c/{name}"
    store.write(path, content)
    return FileEntry(path, len(content), hashlib.sha256(content).hexdigest(), "00000000")


def content(store: Store, entry: FileEntry) -> bytes:
    descriptor = store.open(entry)
    try:
        return os.pread(descriptor, 1 << 20, 0)
    finally:
        os.close(descriptor)


def copies(store: ObjectStore) -> list[str]:
    """Return the names of the local copies, those that are being made included."""
    return sorted(path.name for path in store.fetching.folder.glob("??/*"))


def test_a_bucket_and_a_folder_are_alike_as_stores(place: Url, tmp_path: Path) -> None:
    seen = []
    for store in (open_store(place), open_store(tmp_path / "cache")):
        said: list[object] = [store.entries()]
        store.begin()
        said += [store.create("a/one", b"1"), store.create("a/one", b"2"), store.read("a/one", 1)]
        store.write("a/one", b"three")
        store.write("two", b"")
        said += [store.read("a/one", 5), store.size("a/one"), store.size("two"), store.size("a"), store.size("none")]
        said += [store.exists("a/one"), store.exists("none"), store.find("none", 1), store.modified("none")]
        said += [sorted(store.files()), list(store.files("a")), list(store.files("none")), store.entries()]
        for relative, limit in (("none", 1), ("a/one", 4)):
            with pytest.raises(DamagedCacheError, match=r"missing|has 5 bytes, at most 4 are allowed"):
                store.read(relative, limit)
        store.delete("none")
        store.delete_below("a")
        said += [sorted(store.files()), store.exists("a/one")]
        store.delete("two")
        store.end()
        said.append(store.entries())
        seen.append(said)
    assert seen[0] == seen[1]
    assert seen[0][1:4] == [True, False, b"1"]


def test_one_of_many_creators_wins(store: ObjectStore) -> None:
    won: list[bytes] = []

    def create(own: bytes) -> None:
        if store.create("unit.json", own):
            won.append(own)

    threads = [threading.Thread(target=create, args=(f"{n}".encode(),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("unit.json", 10) == won[0]


def test_a_server_that_ignores_create_only_is_told_of(
    store: ObjectStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.begin()
    assert not caplog.records
    ask = OBJECTS.ask
    monkeypatch.setattr(OBJECTS, "ask", lambda name, *rest: ("ok", False) if name == "creates" else ask(name, *rest))
    store.begin()
    assert "this server ignores create-only writes; let one extraction at a time write here" in caplog.text
    assert store.create("unit.json", b"1")
    assert not store.create("unit.json", b"2")
    assert store.read("unit.json", 1) == b"1"


def test_the_probe_leaves_nothing_behind(store: ObjectStore) -> None:
    store.begin()
    assert store.entries() is None


def test_a_shard_is_fetched_once_and_shared(store: ObjectStore, server: ObjectServer) -> None:
    entry = shard(store, "0", b"x" * 1000)
    before = len(server.wire.requests)
    assert content(store, entry) == b"x" * 1000
    assert len(server.wire.requests) == before + 1
    assert content(store, entry) == content(ObjectStore(store.place, store.fetching), entry)  # type: ignore[arg-type]  # a Url
    assert len(server.wire.requests) == before + 1
    assert copies(store) == [entry.sha256]


@pytest.mark.parametrize("there", [b"y" * 1000, b"x" * 999, None], ids=["changed", "torn", "missing"])
def test_another_object_than_the_listed_one_is_never_used(store: ObjectStore, there: bytes | None) -> None:
    entry = shard(store, "0", b"x" * 1000)
    if there is None:
        store.delete(entry.path)
    else:
        store.write(entry.path, there)
    with pytest.raises(DamagedCacheError, match=r"sha256 is not the one|has 999 bytes, shards.json says 1000|missing"):
        store.open(entry)
    assert copies(store) == []


def test_local_copies_keep_within_their_limit_and_the_last_used_stay(store: ObjectStore) -> None:
    entries = [shard(store, str(n), bytes([n]) * 4000) for n in range(3)]
    for entry in entries[:2]:
        content(store, entry)
    for entry, used in zip(entries, (200, 100), strict=False):
        path = store.fetching.folder / entry.sha256[:2] / entry.sha256
        os.utime(path, (path.stat().st_mtime - 500 + used,) * 2)
    content(store, entries[2])
    assert copies(store) == sorted([entries[0].sha256, entries[2].sha256])


def test_what_is_fetched_ahead_is_not_evicted_before_it_is_used(store: ObjectStore, server: ObjectServer) -> None:
    groups = [[shard(store, f"{n}-{k}", bytes([n, k]) * 500) for k in range(4)] for n in range(3)]  # 2.5 fit
    before = len(server.wire.requests)
    ahead = FetchAhead(store, iter(groups))
    ahead.use(0)
    _wait_until(lambda: copies(store) == sorted(entry.sha256 for group in groups[:2] for entry in group))
    for path in store.fetching.folder.glob("??/*"):
        os.utime(path, (path.stat().st_mtime - 100,) * 2)
    for entry in groups[0]:  # used later than the next group was fetched
        content(store, entry)
    time.sleep(0.1)  # times of files may be told in steps of a few milliseconds
    ahead.use(1)
    _wait_until(lambda: {entry.sha256 for entry in groups[2]} <= {*copies(store)})
    ahead.close()
    assert {entry.sha256 for entry in groups[1]} <= {*copies(store)}
    assert len(server.wire.requests) == before + 12


def test_groups_beyond_the_limit_wait(store: ObjectStore, server: ObjectServer) -> None:
    groups = [[shard(store, f"{n}-{k}", bytes([n, k]) * 500) for k in range(4)] for n in range(4)]
    ahead = FetchAhead(store, iter(groups))
    _wait_until(lambda: len(copies(store)) == 8)
    time.sleep(0.3)
    assert copies(store) == sorted(entry.sha256 for group in groups[:2] for entry in group)
    ahead.close()


def _wait_until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not true() and time.monotonic() < ends:
        time.sleep(0.02)
    assert true()


def test_a_shard_over_the_limit_is_refused(store: ObjectStore) -> None:
    with pytest.raises(
        DiskSpaceError, match=r"may hold 10000 bytes and a shard has 10001; give a larger --fetch-limit"
    ):
        store.open(shard(store, "0", bytes(LIMIT + 1)))


def test_a_file_that_is_open_stays_readable_when_it_is_evicted(store: ObjectStore) -> None:
    first, second = (shard(store, str(n), bytes([n]) * 8000) for n in range(2))
    descriptor = store.open(first)
    content(store, second)
    assert copies(store) == [second.sha256]
    assert os.pread(descriptor, 10, 0) == bytes(10)
    os.close(descriptor)


def _read_in_child(store: ObjectStore, entries: list[FileEntry], said: Callable[[object], None]) -> None:
    said([hashlib.sha256(content(store, entry)).hexdigest() for entry in entries])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_the_copies(store: ObjectStore, server: ObjectServer, start: str) -> None:
    entries = [shard(store, str(n), bytes([n]) * 100_0) for n in range(6)]
    before = len(server.wire.requests)
    context = multiprocessing.get_context(start)
    queue = context.SimpleQueue()
    children = [context.Process(target=_read_in_child, args=(store, entries, queue.put)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [queue.get(), queue.get()] == [[entry.sha256 for entry in entries]] * 2
    assert len(server.wire.requests) == before + len(entries)


def test_a_cut_connection_is_waited_for(
    store: ObjectStore, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_KD_RETRY_SECONDS", "30")
    entry = shard(store, "0", b"x" * 1000)
    server.wire.cut()
    timer = threading.Timer(1.5, server.wire.mend)
    timer.start()
    assert content(store, entry) == b"x" * 1000
    timer.join()


def test_a_connection_that_stays_cut_is_one_line(store: ObjectStore, server: ObjectServer) -> None:
    store.write("x", b"1")
    server.wire.cut()
    try:
        with pytest.raises(
            CacheKDError, match=r"^s3://\S+: the object store cannot be used, after trying for 2 s \(.*\)"
        ):
            store.read("x", 1)
    finally:
        server.wire.mend()
    assert store.read("x", 1) == b"1"


def test_after_an_interrupt_answers_belong_to_their_requests(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("one", b"1")
    store.write("two", b"2")
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "recv", lambda self: (_ for _ in ()).throw(KeyboardInterrupt("while waiting")))
        with pytest.raises(KeyboardInterrupt, match="while waiting"):
            store.read("one", 1)
    assert store.read("two", 1) == b"2"


def test_a_missing_bucket_is_one_line() -> None:
    store = open_store("s3://no-such-bucket/cache")
    for ask in (store.entries, store.begin):
        with pytest.raises(MissingFileError, match=r"^s3://no-such-bucket: there is no such bucket .*; create it"):
            ask()


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # localbucket checks no credentials
def test_wrong_credentials_are_one_line(store: ObjectStore, server: ObjectServer) -> None:
    server.tell("POST", "/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(
            CacheKDError, match=r"^s3://bucket: the credentials are refused or absent .*; set AWS_ACCESS"
        ):
            store.read("x", 1)
    finally:
        server.tell("POST", "/moto-api/reset-auth", b"1e9")


@pytest.mark.parametrize("server", ["localbucket"], indirect=True)  # moto answers nobody without a signature
def test_plain_web_servers_are_read_only(server: ObjectServer, store: ObjectStore) -> None:
    store.write("x", b"1")
    web = open_store(f"{server.endpoint}/{BUCKET}/{str(store.place).split('/', 3)[3]}")
    assert web.read("x", 1) == b"1"
    with pytest.raises(SettingError, match="http is read-only; write to s3://, gs:// or az://, or a folder"):
        web.begin()


@pytest.mark.parametrize(
    "text", ["s4://bucket/x", "s3://", "s3://bucket//x", "s3://bucket/../x"], ids=["scheme", "empty", "hole", "up"]
)
def test_an_address_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(
        SettingError, match=r"unknown scheme 's4'; known: az, gs, http, https, s3|allowed: s3://BUCKET/"
    ):
        parse_place(text)


def test_without_obstore_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "obstore.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    OBJECTS.close()
    with pytest.raises(CacheKDError, match=r"need the package obstore: pip install 'cache-kd\[remote\]'"):
        open_store("s3://bucket/x").entries()
