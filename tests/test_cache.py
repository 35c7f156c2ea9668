"""Shards from elsewhere: the cache gives what is in the folder over there, once, whole, or an error that names it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graft.data import cache as cache_module
from graft.data import shard_format
from graft.data.cache import PART, Cache, FetchFailed, RemoteFiles
from graft.data.fetch import Patience, Unavailable, origin_of
from graft.data.shard_format import DamagedShard, FeatureSet
from graft.recipe import Recipe
from graft.sources import open_set
from tests import file_server
from tests.file_server import FileServer, serving
from tests.test_shard_format import edit_index, features, write_set

PATIENCE = Patience(tries=3, wait_s=0.01, stall_s=20)
SHORT_S = 0.7  # where the server stalls
SHARD_SIZE = 10_240  # of each of the three: tar's own block
SHARD, SECOND, THIRD, SAMPLES = (
    f"odd/{name}" for name in ("odd-000000.tar", "odd-000001.tar", "odd-000002.tar", "samples.jsonl")
)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_set(tmp_path / "there" / "odd")
    with serving(tmp_path / "there") as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1e9, PATIENCE)


def remote(server: FileServer, cache: Cache) -> RemoteFiles:
    return RemoteFiles(origin_of(server.address, "odd"), cache)


def read_all(opened: FeatureSet) -> None:
    assert len(opened) == 5
    for number, entry in enumerate(opened.entries):
        assert torch.equal(opened.read(number), features(number)) and entry.text == f"text {number} é"


def kept(cache: Cache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if len(path.name) >= 64]


def shard_files(server: FileServer, cache: Cache) -> list[Path]:
    """Where the three shards are in the cache when they are there."""
    index = json.loads((server.folder / "odd" / "index.json").read_text())
    return [cache.folder / shard["sha256"] for shard in index["shards"]]


def test_the_whole_set_equals_the_local_one_and_is_fetched_once(server: FileServer, cache: Cache) -> None:
    for _ in range(2):
        read_all(FeatureSet.open(remote(server, cache), "f" * 64))
    assert server.requests == {"odd/index.json": 2, SAMPLES: 1, SHARD: 1, SECOND: 1, THIRD: 1}
    assert sorted(path.stat().st_size for path in kept(cache))[1:] == [SHARD_SIZE] * 3
    there = {path.read_bytes() for path in (server.folder / "odd").iterdir() if path.is_file()}
    assert {path.read_bytes() for path in kept(cache)} <= there


def test_the_whole_set_through_a_command(server: FileServer, tmp_path: Path) -> None:
    """As a recipe says it."""
    data = {"shards": f"pipe:cat '{server.folder}/{{file}}'", "cache_dir": str(tmp_path / "a" / "b")}
    recipe = Recipe(bases={"whisper": "w", "qwen2_vl": "q"}, data=data)
    read_all(open_set(recipe, "odd"))
    with pytest.raises(ValueError, match="made by another encoder.*data.shards"):
        open_set(recipe, "odd", "9" * 64)
    with pytest.raises(FetchFailed, match="even/index.json.*exit code 1: cat: .*No such file"):
        FeatureSet.open(RemoteFiles(origin_of(data["shards"], "even"), Cache(tmp_path / "c", 1e9, PATIENCE)))


@pytest.mark.parametrize(
    "how",
    [file_server.cut, file_server.cut_unnoticed, file_server.flip, file_server.stall, file_server.endless]
    + [file_server.error(500)],
)
def test_what_goes_wrong_once_or_twice_is_fetched_again(server: FileServer, cache: Cache, how: object) -> None:
    server.misbehave(SHARD, how, times=2)
    server.misbehave(SAMPLES, how)
    if how is file_server.stall:
        cache.patience = replace(PATIENCE, stall_s=SHORT_S)
    read_all(FeatureSet.open(remote(server, cache)))
    assert (server.requests[SHARD], server.requests[SAMPLES], server.requests[SECOND]) == (3, 2, 1)
    assert len(kept(cache)) == 4


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        (file_server.cut, FetchFailed, "cut: 5120 of 10240 bytes came"),
        (file_server.cut_unnoticed, DamagedShard, "refused 3 times.*5120 bytes came, the index says 10240"),
        (file_server.flip, DamagedShard, "refused 3 times.*its sha256 is .*, the index says"),
        (file_server.stall, FetchFailed, "in 3 tries; the last one: no byte for 0.7 s"),
        (file_server.endless, DamagedShard, "more than the 10240 bytes came that it may have"),
        (file_server.error(500), FetchFailed, "HTTP 500"),
        (file_server.error(404), Unavailable, "HTTP 404 Not Found"),
    ],
)
def test_what_keeps_going_wrong_is_named(
    server: FileServer, cache: Cache, how: object, kind: type[Exception], says: str
) -> None:
    server.misbehave(SHARD, how, times=9)
    opened = FeatureSet.open(remote(server, cache))
    if how is file_server.stall:
        cache.patience = replace(PATIENCE, stall_s=SHORT_S)
    with pytest.raises(kind, match=f"{server.address}/odd/odd-000000.tar.*{says}") as error:
        opened.read(1)
    assert "rank" not in str(error.value)
    assert server.requests[SHARD] == (1 if kind is Unavailable else 3)
    assert torch.equal(opened.read(2), features(2))
    assert len(kept(cache)) == 2, "what was refused is still there"


def test_too_much_is_cut_off_early(server: FileServer, cache: Cache) -> None:
    for file in (SHARD, "odd/index.json"):
        server.misbehave(file, file_server.endless, times=3)
    with pytest.raises(DamagedShard, match="index.json.*more than the 2000 bytes"):
        cache.read(origin_of(server.address, "odd"), "index.json", 2000)
    with pytest.raises(DamagedShard, match="more than the 10240 bytes"):
        FeatureSet.open(remote(server, cache)).read(0)
    assert server.blocks_sent < 6 * file_server.MOST_BLOCKS / 4


def test_an_index_has_a_size(server: FileServer, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MOST_INDEX_BYTES", 1000)
    for where in (remote(server, cache), server.folder / "odd"):
        with pytest.raises(DamagedShard, match="index.json.*1000"):
            FeatureSet.open(where)


def test_a_transfer_that_drips_is_given_up(server: FileServer, tmp_path: Path) -> None:
    hasty = Cache(tmp_path / "cache", 1e9, Patience(tries=1, stall_s=0.3, least_speed=1e9))
    endless_drip = origin_of("pipe:sh -c 'while :; do echo; sleep 0.05; done' {file}")
    started = time.monotonic()
    with pytest.raises(FetchFailed, match="slower than 1e.06 kB/s"):
        hasty.read(endless_drip, "index.json", 1000)
    assert time.monotonic() - started < 10


def test_no_set_there(server: FileServer, cache: Cache) -> None:
    with pytest.raises(Unavailable, match=f"no finished feature set: {server.address}/even/index.json: HTTP 404"):
        FeatureSet.open(RemoteFiles(origin_of(server.address, "even"), cache))


@pytest.mark.parametrize("name", ["-rf.tar", "a;b.tar", "$(id).tar", "a b.tar", ".hidden", "é.tar", "a\nb.tar"])
def test_names_that_a_shell_could_read_are_refused(server: FileServer, cache: Cache, name: str) -> None:
    """The user's command may be ssh, which hands its words to a shell over there."""
    index = json.loads((server.folder / "odd" / "index.json").read_text())
    index["shards"][1]["file"] = name
    edit_index(server.folder / "odd", shards=index["shards"])
    with pytest.raises(DamagedShard, match="is no name of a file that can be fetched"):
        FeatureSet.open(remote(server, cache))


@pytest.mark.parametrize("digest", ["../../../../etc/passwd", "f" * 63, "F" * 64, 7, None])
def test_digests_that_are_none_are_refused(server: FileServer, cache: Cache, digest: object) -> None:
    index = json.loads((server.folder / "odd" / "index.json").read_text())
    index["shards"][1]["sha256"] = digest
    edit_index(server.folder / "odd", shards=index["shards"])
    with pytest.raises(DamagedShard, match="expected 64 hexadecimal digits"):
        FeatureSet.open(remote(server, cache))


def test_an_index_that_does_not_tell_the_size_of_its_samples(server: FileServer, cache: Cache) -> None:
    index = json.loads((server.folder / "odd" / "index.json").read_text())
    del index["samples"]["size"]
    edit_index(server.folder / "odd", samples=index["samples"])
    server.misbehave(SAMPLES, file_server.cut_unnoticed)
    read_all(FeatureSet.open(remote(server, cache)))
    assert server.requests[SAMPLES] == 2


def test_a_set_made_anew_is_not_mixed_with_the_old_one(server: FileServer, cache: Cache) -> None:
    opened = FeatureSet.open(remote(server, cache))
    opened.read(0)
    (server.folder / SECOND).write_bytes((server.folder / THIRD).read_bytes())
    with pytest.raises(DamagedShard, match="odd-000001.tar.*the set there was made anew"):
        opened.read(2)
    assert torch.equal(opened.read(1), features(1))


def test_a_file_of_the_cache_that_was_spoilt(server: FileServer, cache: Cache) -> None:
    """A cut one is fetched again; one with other bytes is refused with the name of the file to delete."""
    FeatureSet.open(remote(server, cache)).read(0)
    path = shard_files(server, cache)[0]
    path.write_bytes(path.read_bytes()[:3000])
    read_all(FeatureSet.open(remote(server, cache)))
    data = bytearray(path.read_bytes())
    opened = FeatureSet.open(remote(server, cache))
    data[opened.entries[0].offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedShard, match=f"odd-000000.tar: the features of 'u0.x' .* Delete {path}"):
        opened.read(0)
    path.unlink()
    read_all(FeatureSet.open(remote(server, cache)))


def test_least_recently_used_shards_go_first(server: FileServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2 * SHARD_SIZE + 3000, PATIENCE)
    (cache.folder / "notes.txt").write_text("of somebody")
    files = remote(server, cache)
    opened = FeatureSet.open(files)
    files.most_open = 1
    for number in (0, 2, 1, 4, 3):  # shards 0, 1, 0, 2, 1
        assert torch.equal(opened.read(number), features(number))
        assert sum(path.stat().st_size for path in kept(cache)) <= cache.limit
    assert server.requests[SHARD] == 1 and server.requests[SECOND] == 2 and server.requests[THIRD] == 1
    first, second, third = shard_files(server, cache)
    assert third.exists() and second.exists() and not first.exists()
    assert (cache.folder / "notes.txt").exists(), "what is not the cache's own must stay"


def test_a_shard_that_is_removed_while_it_is_open_is_read_on(server: FileServer, cache: Cache) -> None:
    opened = FeatureSet.open(remote(server, cache))
    opened.read(0)
    shard_files(server, cache)[0].unlink()
    assert torch.equal(opened.read(1), features(1)) and server.requests[SHARD] == 1


def test_what_is_being_fetched_is_not_removed(server: FileServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", SHARD_SIZE + 3000, Patience(tries=1, stall_s=20))
    server.misbehave(SHARD, file_server.stall)
    opened, got = FeatureSet.open(remote(server, cache)), []
    reader = threading.Thread(target=lambda: got.append(opened.read(0)))
    reader.start()
    assert server.halfway.wait(20)
    for number in (2, 4, 3):
        assert torch.equal(opened.read(number), features(number))
    server.released.set()
    reader.join(20)
    assert torch.equal(got[0], features(0)) and server.requests[SHARD] == 1


def test_a_cache_that_is_too_small(server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="data.cache_gb is 1e-05.*give the whole set room"):
        FeatureSet.open(remote(server, Cache(tmp_path / "cache", 10_000, PATIENCE)))
    FeatureSet.open(remote(server, Cache(tmp_path / "cache", 2 * SHARD_SIZE, PATIENCE)))
    assert "will be fetched again and again" in caplog.text and "3 shards" in caplog.text


def read_in_child(server: FileServer, cache: Cache) -> None:
    for number in range(5):
        FeatureSet.open(remote(server, cache)).read(number)


def test_processes_at_once_fetch_each_file_once(server: FileServer, cache: Cache) -> None:
    for file in (SAMPLES, SHARD, SECOND, THIRD):
        server.misbehave(file, file_server.slow, times=3)
    children = [FORK.Process(target=read_in_child, args=(server, cache)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    del server.requests["odd/index.json"]
    assert server.requests == Counter([SAMPLES, SHARD, SECOND, THIRD])
    assert not [path for path in kept(cache) if path.name.endswith(PART)]


def test_threads_at_once_fetch_each_file_once(server: FileServer, cache: Cache) -> None:
    opened = FeatureSet.open(remote(server, cache))
    server.misbehave(SHARD, file_server.slow, times=9)
    threads = [threading.Thread(target=opened.read, args=(turn % 2,)) for turn in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert server.requests[SHARD] == 1
    read_all(opened)


def test_another_was_quicker(server: FileServer, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches the whole file between our look for it and our lock."""
    opened, other = (FeatureSet.open(remote(server, Cache(cache.folder, 1e9, PATIENCE))) for _ in range(2))
    real = cache_module._locked

    def late(path: Path) -> int | None:
        monkeypatch.setattr(cache_module, "_locked", real)
        other.read(0)
        return real(path)

    monkeypatch.setattr(cache_module, "_locked", late)
    assert torch.equal(opened.read(0), features(0))
    assert server.requests[SHARD] == 1 and len(kept(cache)) == 2


def test_killed_in_the_middle_and_started_again(server: FileServer, cache: Cache) -> None:
    server.misbehave(SHARD, file_server.stall)
    patient = Cache(cache.folder, 1e9, Patience(stall_s=20))
    child = FORK.Process(target=read_in_child, args=(server, patient))
    child.start()
    assert server.halfway.wait(20)
    part = Path(f"{shard_files(server, cache)[0]}{PART}")
    assert part.stat().st_size == SHARD_SIZE, "its place is not taken in advance"
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert part.exists() and not shard_files(server, cache)[0].exists()
    read_all(FeatureSet.open(remote(server, cache)))
    assert server.requests[SHARD] == 2 and not part.exists()


def test_what_killed_processes_left_makes_room(server: FileServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3 * SHARD_SIZE + 3000, PATIENCE)
    stale = cache.folder / f"{'0' * 64}{PART}"
    stale.write_bytes(bytes(3 * SHARD_SIZE))
    os.utime(stale, (0, 0))
    read_all(FeatureSet.open(remote(server, cache)))
    assert not stale.exists() and len(kept(cache)) == 4


def test_a_full_disk_is_named(server: FileServer, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own refusal: /dev/full takes nothing."""
    real = os.pwrite
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(os, "pwrite", lambda _, data, offset: real(full.fileno(), data, offset))
        with pytest.raises(OSError, match="cannot take samples.jsonl: No space left.*lower data.cache_gb"):
            FeatureSet.open(remote(server, cache))
    assert not kept(cache) and server.requests[SAMPLES] == 1
