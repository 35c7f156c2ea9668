"""shards/verify.py reads every byte and says which shard is damaged."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from graft.data.cache import Cache, RemoteFiles
from graft.data.fetch import Patience, origin_of
from graft.data.shard_format import REJECTS
from graft.data.shard_writer import ShardWriter, merge_parts
from shards.verify import _arguments, find_sets, main, verify_set
from tests.file_server import error, serving
from tests.test_shard_format import DESCRIPTION, edit_index, features, utterance, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "sets" / "odd")


def test_a_whole_set(folder: Path) -> None:
    verified = verify_set(folder)
    assert verified.faults == []
    assert (verified.name, verified.num_samples, verified.num_rejects, verified.num_shards) == ("odd", 5, 1, 3)
    assert verified.size == sum(path.stat().st_size for path in folder.glob("*.tar"))


def reseal(folder: Path, shard: str) -> None:
    """Make the index agree with a changed shard, so that only what is inside can tell."""
    import json

    index = json.loads((folder / "index.json").read_text())
    for one in index["shards"]:
        if one["file"] == shard:
            one["sha256"] = sha256((folder / shard).read_bytes()).hexdigest()
    edit_index(folder, shards=index["shards"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"text": "text 1', b'"text": "next 1', "the JSON of 'u1.x' is not its line"),
        (b"u1%2Ex.json", b"u1%2Ey.json", "odd-000000.tar"),
        (b'"audio_features"', b'"audio_Features"', "'u0.x' is not where, or what"),
    ],
)
def test_a_shard_that_differs_inside(folder: Path, old: bytes, new: bytes, says: str) -> None:
    path = folder / "odd-000000.tar"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    reseal(folder, path.name)
    (fault,) = verify_set(folder).faults
    assert says in fault and "odd-000000.tar" in fault


def test_a_header_that_is_zeroed(folder: Path) -> None:
    """tarfile takes it for the end of the archive, without an error."""
    path = folder / "odd-000000.tar"
    data = bytearray(path.read_bytes())
    second = data.index(b"u1%2Ex.json")
    data[second : second + 512] = bytes(512)
    path.write_bytes(data)
    reseal(folder, path.name)
    (fault,) = verify_set(folder).faults
    assert "another number of samples" in fault and "odd-000000.tar" in fault


def test_not_a_number(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, DESCRIPTION, 0) as writer:
        writer.add(utterance(0), features(0), 900)
        writer.add(utterance(1), features(1).fill_(float("nan")), 300)
    merge_parts(tmp_path, DESCRIPTION, [writer.part], [])
    (fault,) = verify_set(tmp_path).faults
    assert "'u1.x' holds NaN" in fault and "odd-000000.tar" in fault


def test_all_damaged_shards_are_named(folder: Path) -> None:
    for name in ("odd-000000.tar", "odd-000002.tar"):
        data = bytearray((folder / name).read_bytes())
        data[700] ^= 4
        (folder / name).write_bytes(data)
    faults = verify_set(folder).faults
    assert len(faults) == 2 and "odd-000000.tar" in faults[0] and "odd-000002.tar" in faults[1]


def test_the_list_of_rejects_is_part_of_a_set(folder: Path) -> None:
    path = folder / REJECTS
    path.write_text(path.read_text() + '{"line": 9, "id": "x", "reason": "y"}\n')
    (fault,) = verify_set(folder).faults
    assert f"{path} has " in fault and "make the set anew" in fault
    path.unlink()
    (fault,) = verify_set(folder).faults
    assert f"{path} is not there" in fault


def test_an_unfinished_set_is_a_fault(folder: Path) -> None:
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "index.json").unlink()
    assert find_sets(folder.parent) == [folder]
    assert "run shards/precompute.py again to finish it" in verify_set(folder).faults[0]


def verify(where: str, cache: Path) -> int:
    return main(_arguments().parse_args([where, "--cache-dir", str(cache), "--cache-gb", "0.001"]))


def test_a_set_from_elsewhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What is in the cache is what training reads; an empty cache shows what the address holds now."""
    where = f"pipe:cat {folder}/{{file}}"
    assert verify(where, tmp_path / "cache") == 0 and " ok " in capsys.readouterr().out
    path = folder / "odd-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify(where, tmp_path / "cache") == 0
    capsys.readouterr()
    files = RemoteFiles(origin_of(where), Cache(tmp_path / "empty", 1e9, Patience(tries=2, wait_s=0.01)))
    (fault,) = verify_set(files).faults
    assert f"cat {path}: refused 2 times" in fault and "its sha256 is" in fault


def test_a_cached_shard_that_was_spoilt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert verify(f"pipe:cat {folder}/{{file}}", tmp_path / "cache") == 0
    (spoilt,) = (
        p for p in (tmp_path / "cache").iterdir() if p.read_bytes() == (folder / "odd-000002.tar").read_bytes()
    )
    data = bytearray(spoilt.read_bytes())
    data[-1] ^= 1
    spoilt.write_bytes(data)
    assert verify(f"pipe:cat {folder}/{{file}}", tmp_path / "cache") == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1 and "odd-000002.tar: its sha256 is not the index's" in told
    assert f"Delete {spoilt}" in told


def test_shards_that_cannot_be_had_are_all_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder) as server:
        server.misbehave("odd-000000.tar", error(503), times=9)
        server.misbehave("odd-000002.tar", error(404))
        cache = Cache(tmp_path / "cache", 1e9, Patience(tries=2, wait_s=0.01))
        first, second = verify_set(RemoteFiles(origin_of(server.address), cache)).faults
    assert "odd-000000.tar" in first and "503" in first and "odd-000002.tar: HTTP 404" in second
    (nothing,) = verify_set(RemoteFiles(origin_of("pipe:cat /nowhere/{file}"), cache)).faults
    assert "cat /nowhere/index.json could not be fetched in 2 tries" in nothing


def test_the_command(folder: Path, run_python) -> None:
    shutil.copytree(folder, folder.parent / "second")
    whole = run_python("shards/verify.py", folder.parent)
    assert whole.stdout.count(" ok ") == 2 and "0:00" in whole.stdout and not whole.stderr
    data = bytearray((folder / "odd-000001.tar").read_bytes())
    data[-1] ^= 1
    (folder / "odd-000001.tar").write_bytes(data)
    damaged = run_python("shards/verify.py", folder.parent, expect=2)
    assert "DAMAGED" in damaged.stdout and damaged.stdout.count(" ok ") == 1
    assert damaged.stderr.count("error:") == 1 and "odd/odd-000001.tar" in damaged.stderr
