"""Remote shards, from a server on this machine that behaves as badly as it is told."""

import hashlib
import http.server
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from carrara.data import cache as cache_module
from carrara.data.cache import ShardCache, is_remote, size_of
from carrara.data.manifest import Manifest, scan_all
from carrara.data.module import ShardData
from carrara.data.reader import Decoding, Samples, ShardReader
from carrara.data.source import expand
from carrara.errors import MachineError, UserError


class Server(http.server.ThreadingHTTPServer):
    """`faults[name]` is taken from the front at every GET: a status, "cut", "half" (as if it were all) or "slow"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[int | str]] = {}
        self.gets: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self.server.gets[self.path[1:]] += 1
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        faults = self.server.faults.get(self.path[1:], [])
        fault = faults.pop(0) if body and faults else None
        path = self.server.folder / self.path[1:]
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        if fault == "half":
            data = data[: len(data) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            if fault == "slow":
                time.sleep(2)
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cache_module, "_FIRST_WAIT", 0.01)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def serve(server: Server, name: str, size: int = 100_000) -> bytes:
    data = np.random.default_rng(len(name)).bytes(size)
    (server.folder / name).write_bytes(data)
    return data


def files(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_what_is_remote():
    assert is_remote("https://a/b.tar") and is_remote("s3://bucket/b.tar")
    assert not is_remote("/data/b.tar") and not is_remote("pipe:cat") and not is_remote("ftp://a/b.tar")


def test_a_shard_is_fetched_once(server, tmp_path):
    data, cache = serve(server, "a.tar"), ShardCache(tmp_path, 1e9)
    assert size_of(server.url("a.tar")) == len(data)
    for _ in range(2):
        path = cache.local(server.url("a.tar"), len(data), hashlib.sha256(data).hexdigest())
        assert path.read_bytes() == data and path.name == "a.tar"
    assert server.gets["a.tar"] == 1 and files(cache) == ["a.tar"]


@pytest.mark.parametrize("faults", [[503, 503], ["cut"], ["half"], [429, "cut", 500]])
def test_what_fails_for_the_moment_is_tried_again(server, tmp_path, faults):
    data, cache = serve(server, "a.tar"), ShardCache(tmp_path, 1e9)
    server.faults["a.tar"] = list(faults)
    assert cache.local(server.url("a.tar")).read_bytes() == data
    assert server.gets["a.tar"] == len(faults) + 1


def test_a_server_that_falls_silent_is_not_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_SILENCE", 0.5)
    data, cache = serve(server, "a.tar"), ShardCache(tmp_path, 1e9)
    server.faults["a.tar"] = ["slow"]
    assert cache.local(server.url("a.tar")).read_bytes() == data
    assert server.gets["a.tar"] == 2


@pytest.mark.parametrize("fault", [503, "cut"])
def test_after_some_tries_it_is_the_machines_failure(server, tmp_path, fault):
    serve(server, "a.tar")
    server.faults["a.tar"] = [fault] * 99
    cache = ShardCache(tmp_path, 1e9)
    with pytest.raises(MachineError, match=r"a\.tar after 6 tries"):
        cache.local(server.url("a.tar"))
    assert files(cache) == []


@pytest.mark.parametrize("status", [404, 403])
def test_what_is_not_there_is_not_tried_again(server, tmp_path, status):
    cache = ShardCache(tmp_path, 1e9)
    if status != 404:
        serve(server, "a.tar")
        server.faults["a.tar"] = [status] * 9
    with pytest.raises(UserError, match=r"cannot read the shard http.*a\.tar"):
        cache.local(server.url("a.tar"))
    assert server.gets["a.tar"] <= 2 and files(cache) == []


def test_another_shard_than_the_known_one_is_refused(server, tmp_path):
    data, cache = serve(server, "a.tar"), ShardCache(tmp_path, 1e9)
    with pytest.raises(UserError, match="not the shard that was inspected"):
        cache.local(server.url("a.tar"), len(data), "0" * 64)
    assert files(cache) == []


def test_a_copy_of_another_size_is_fetched_again(server, tmp_path):
    data, cache = serve(server, "a.tar"), ShardCache(tmp_path, 1e9)
    path = cache.local(server.url("a.tar"))
    path.write_bytes(data[:100])
    assert cache.local(server.url("a.tar"), len(data)).read_bytes() == data


def test_the_least_recently_used_make_room(server, tmp_path):
    cache = ShardCache(tmp_path, 250_000)
    for number, name in enumerate(("a.tar", "b.tar", "c.tar")):
        serve(server, name)
        path = cache.local(server.url(name))
        os.utime(path, (number, number))
        if name == "b.tar":
            cache.local(server.url("a.tar"))
    assert files(cache) == ["a.tar", "c.tar"]
    serve(server, "huge.tar", 400_000)
    cache.local(server.url("huge.tar"))  # larger than all the room: it stays as long as it is the newest
    assert files(cache) == ["huge.tar"]


def test_remains_of_a_killed_process_go(server, tmp_path):
    data, cache = serve(server, "a.tar"), ShardCache(tmp_path, 1e9)
    folder = cache.path(server.url("a.tar")).parent
    folder.mkdir(parents=True)
    (folder / "x.partial").write_bytes(b"half")
    cache.local(server.url("a.tar"), len(data))
    assert files(cache) == ["a.tar"]


def test_many_who_ask_at_once_fetch_once(server, tmp_path):
    serve(server, "a.tar")
    server.faults["a.tar"] = ["slow"]
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: ShardCache(tmp_path, 1e9).local(server.url("a.tar")), range(4)))
    assert len(paths) == 1 and server.gets["a.tar"] == 1


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_package_that_is_missing_is_named(tmp_path, scheme):
    with pytest.raises(UserError, match=rf"pip install 'carrara\[{scheme}\]'"):
        ShardCache(tmp_path, 1e9).local(f"{scheme}://bucket/a.tar")


class Buckets(MemoryFileSystem):
    """What s3fs is to fsspec, in memory."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}


def test_buckets_are_read_as_servers_are(write_shard, tmp_path, monkeypatch, value_of):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Buckets)
    for s in range(3):
        content = write_shard(f"{s}.tar", range(10 * s, 10 * s + 10)).read_bytes()
        fsspec.filesystem("s3").pipe_file(f"s3://bucket/{s}.tar", content)
    urls = expand("s3://bucket/{0..2}.tar")
    scan_all(urls, tmp_path / "cache", cache=ShardCache(tmp_path / "cache", 1e9))
    data = ShardData("far", urls, 8, cache_dir=str(tmp_path / "cache"), val_samples=3, memory_limit=0)
    assert len({value_of(image) for batch in data.train_loader(9) for image in batch["images"].numpy()}) == 27
    with pytest.raises(UserError, match=r"s3://bucket/9\.tar: there is nothing at this address"):
        ShardCache(tmp_path, 1e9).local("s3://bucket/9.tar")


# --- as data ---


@pytest.fixture
def urls(server, write_shard) -> list[str]:
    for s in range(6):
        path = write_shard(f"{s}.tar", range(10 * s, 10 * s + 10))
        path.rename(server.folder / path.name)
    return expand(server.url("{0..5}.tar"))


def test_shards_that_are_not_known_yet_name_the_command(urls, tmp_path):
    with pytest.raises(UserError, match=r"6 of 6 shards .*python shards\.py do=inspect .* about 0\.00 GB"):
        Manifest.load(urls, tmp_path / "cache")


@pytest.mark.parametrize("url", ["{server}/none.tar", "http://127.0.0.1:9/none.tar"])
def test_so_do_those_that_are_not_there(server, tmp_path, url):
    """do=inspect says what is wrong with them."""
    with pytest.raises(UserError, match=r"1 of 1 shards .*python shards\.py do=inspect"):
        Manifest.load([url.replace("{server}", server.url("").rstrip("/"))], tmp_path / "cache")


def test_known_shards_are_trained_on_without_their_server(server, urls, tmp_path, value_of):
    cache = ShardCache(tmp_path / "cache", 1e9)
    server.faults["3.tar"] = [503, "cut"]
    scan_all(urls, tmp_path / "cache", cache=cache)
    server.shutdown()
    data = ShardData("far", urls, 8, cache_dir=str(tmp_path / "cache"), val_samples=6, memory_limit=0, num_workers=2)
    seen = [value_of(image) for batch in data.train_loader(9) for image in batch["images"].numpy()]
    assert len(set(seen)) == 54 and len(list(data.captions())) == 54


def test_shards_are_there_before_they_are_needed(server, urls, tmp_path, value_of):
    """With a server that takes its time: after the first window nothing is waited for."""
    scan_all(urls, tmp_path / "cache", cache=ShardCache(tmp_path / "cache", 1e9))
    cache = ShardCache(tmp_path / "elsewhere", 1e9)
    manifest = Manifest.load(urls, tmp_path / "cache")
    reader = ShardReader(manifest, 2, cache)
    reader.prefetch(np.array([2, 4]))
    reader.prefetch(np.array([2, 4]))
    for shard in (2, 4):
        for _ in range(200):
            if cache.path(urls[shard]).exists():
                break
            time.sleep(0.05)
        assert cache.path(urls[shard]).exists()
    assert not cache.path(urls[1]).exists()
    assert [server.gets[f"{k}.tar"] for k in range(6)] == [1, 1, 2, 1, 2, 1]
    server.shutdown()
    assert value_of(Samples(reader, Decoding(8, ".txt")).load(45).image) == 45


def test_what_cannot_be_fetched_ahead_is_told_when_it_is_opened(server, urls, tmp_path):
    scan_all(urls, tmp_path / "cache", cache=ShardCache(tmp_path / "cache", 1e9))
    reader = ShardReader(Manifest.load(urls, tmp_path / "cache"), 2, ShardCache(tmp_path / "elsewhere", 1e9))
    (server.folder / "2.tar").unlink()
    reader.prefetch(np.array([2]))
    with pytest.raises(UserError, match=r"2\.tar: there is nothing at this address"):
        reader.read(25, 0)


def test_with_little_room_shards_come_and_go(server, urls, tmp_path, value_of):
    size = (server.folder / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2.5 * size)
    scan_all(urls, tmp_path / "cache", cache=cache)
    manifest = Manifest.load(urls, tmp_path / "cache")
    samples = Samples(ShardReader(manifest, 1, cache), Decoding(8, ".txt"))
    assert [value_of(samples.load(k).image) for k in range(60)] == list(range(60))
    assert len(files(cache)) == 2


def test_a_shard_that_changed_since_it_was_known_is_named(server, urls, tmp_path, write_shard):
    cache = ShardCache(tmp_path / "cache", 0)
    scan_all(urls, tmp_path / "cache", cache=cache)
    (server.folder / "0.tar").write_bytes(write_shard("new.tar", range(100, 110)).read_bytes())
    samples = Samples(ShardReader(Manifest.load(urls, tmp_path / "cache"), 1, cache), Decoding(8, ".txt"))
    with pytest.raises(UserError, match=r"0\.tar is not the shard that was inspected"):
        samples.load(0)
