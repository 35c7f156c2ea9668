"""Addresses and commands: what they mean, how they fail, and that a name never becomes more than a name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.data.fetch import CommandOrigin, HttpOrigin, Origin, Patience, TransferFailed, Unavailable, origin_of
from tests import file_server
from tests.file_server import FileServer, serving

PATIENT_S, SHORT_S = 20, 0.3


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.tar").write_bytes(bytes(range(256)) * 5)
    with serving(folder) as server:
        yield server


def whole(origin: Origin, file: str, stall_s: float = PATIENT_S) -> bytes:
    return b"".join(origin.blocks(file, stall_s))


def test_what_is_a_folder_and_what_is_not() -> None:
    assert origin_of("shards/sets/tiny") is None and origin_of("/fast/a:b") is None
    assert origin_of("https://host/sets/tiny/", "a b") == HttpOrigin("https://host/sets/tiny/a%20b")
    assert origin_of("pipe:cat '/a b/{file}'", "train") == CommandOrigin(("cat", "/a b/{file}"), "train")


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ("s3://bucket/sets", "pipe:aws s3 cp"),
        ("file:///sets", "none of a folder"),
        ("http:///sets", "an address is"),
        ("http://me:secret@host/sets", "without user name"),
        ("pipe:cat /sets/train.tar", "needs {file} where"),
        ("pipe:{file}", "needs {file} where"),  # a name from the index would be the command
        ("pipe:", "needs {file} where"),
        ("pipe:cat '/sets/{file}", "No closing quotation"),
    ],
)
def test_addresses_that_are_none(shards: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        origin_of(shards)
    assert "secret" not in str(error.value)


def test_a_file_over_http(server: FileServer) -> None:
    origin = origin_of(f"{server.address}/?key=7%2F", "train")
    assert whole(origin, "a.tar") == bytes(range(256)) * 5
    assert server.queries == {"key=7%2F"} and "key" not in origin.name("a.tar")


def test_a_redirection_is_followed_to_http_alone(server: FileServer, tmp_path: Path) -> None:
    origin = origin_of(server.address, "train")
    server.misbehave("train/b.tar", file_server.redirect(f"{server.address}/train/a.tar"))
    assert whole(origin, "b.tar") == bytes(range(256)) * 5
    for place in (f"file://{tmp_path}/served/train/a.tar", "ftp://127.0.0.1/a.tar", "data:,a"):
        server.misbehave("train/b.tar", file_server.redirect(place))
        with pytest.raises((Unavailable, TransferFailed), match="302|unknown url type"):
            whole(origin, "b.tar")


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        (file_server.error(404), Unavailable, "train/a.tar: HTTP 404 Not Found"),
        (file_server.error(403), Unavailable, "train/a.tar: HTTP 403"),
        (file_server.error(429), TransferFailed, "HTTP 429"),
        (file_server.error(503), TransferFailed, "HTTP 503 Service Unavailable"),
        (file_server.cut, TransferFailed, "cut: 640 of 1280 bytes came"),
        (file_server.stall, TransferFailed, "no byte for 0.3 s"),
    ],
)
def test_a_server_that_fails(server: FileServer, how: object, kind: type[Exception], says: str) -> None:
    server.misbehave("train/a.tar", how)  # type: ignore[arg-type]
    with pytest.raises(kind, match=says):
        whole(origin_of(server.address, "train"), "a.tar", SHORT_S if "0.3 s" in says else PATIENT_S)


def test_nobody_listens(server: FileServer) -> None:
    origin = origin_of(server.address, "train")
    server.shutdown()
    server.server_close()
    with pytest.raises(TransferFailed, match="ConnectionRefusedError"):
        whole(origin, "a.tar")


def test_a_command_gives_files(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)  # more than a pipe holds
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").write_bytes(data)
    assert whole(origin_of(f"pipe:cat {tmp_path}/{{file}}", "train"), "a.tar") == data


def test_no_name_becomes_two_words_or_a_command(tmp_path: Path) -> None:
    for name in ("a b", "$(touch x); `touch x`", "'\"", "--help"):
        assert whole(origin_of("pipe:printf <%s> {file} {file}", "s p"), name) == f"<s p/{name}>".encode() * 2


def command(line: str) -> CommandOrigin:
    return CommandOrigin(("sh", "-c", line, "{file}"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("echo some bytes; echo no such bucket >&2; exit 3", "exit code 3: no such bucket"),
        ("head -c 100000 /dev/zero >&2; exit 1", "exit code 1"),
        ("echo some bytes; sleep 30", "no byte for 0.3 s"),
        ("echo some bytes; exec >&-; sleep 30", "does not end, 0.3 s after its last byte"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_a_command_that_fails(line: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(TransferFailed, match=says):
        whole(command(line), "a.tar", SHORT_S if "0.3 s" in says else PATIENT_S)
    assert time.monotonic() - started < 10


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(Unavailable, match="graft-no-such-command.*cannot be run"):
        whole(origin_of("pipe:graft-no-such-command {file}"), "a.tar")


@pytest.mark.parametrize("goes_on", ["yes", "echo some bytes; sleep 60", "echo some bytes; exit 0"])
def test_nothing_of_a_command_stays(tmp_path: Path, goes_on: str) -> None:
    """Neither the command nor what it started, when its reader has had enough or it has ended by itself."""
    line = f"sleep 60 > /dev/null & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/parent; {goes_on}"
    blocks = command(line).blocks("a.tar", 5)
    next(blocks)
    if goes_on.endswith("exit 0"):
        assert list(blocks) == []
    blocks.close()
    for name in ("child", "parent"):
        pid = int((tmp_path / name).read_text())
        patience = time.monotonic() + 5
        while is_running(pid) and time.monotonic() < patience:
            time.sleep(0.02)
        assert not is_running(pid), name


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_waits_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for number in range(5):
        Patience(wait_s=3).wait(number)
    assert len(slept) == 4 and all(low <= s <= 1.5 * low for low, s in zip((3, 6, 12, 24), slept, strict=True))
