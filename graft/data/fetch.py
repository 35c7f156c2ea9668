"""Files of a feature set that is not on a local disk: over HTTP, or written out by a command of the user's.

``data.shards`` names the place: ``https://host/sets/tiny``, or ``pipe:aws s3 cp s3://bucket/sets/tiny/{file} -``, where
``{file}`` stands for ``train/index.json`` and the like. The command comes from the recipe alone and is run without a
shell. What arrives here is believed by nobody: :mod:`graft.data.cache` holds it against the index.
"""

from __future__ import annotations

import http.client
import os
import re
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Protocol
from urllib.parse import quote, urlsplit

BLOCK = 1 << 20  # bytes read at once, at most
MOST_SAID = 500  # characters of a command's stderr that an error repeats
PASSING = {408, 425, 429}  # HTTP codes that ask to come again; so do 500 and above
COMMAND, PLACE = "pipe:", "{file}"


class Unavailable(ValueError):
    """A file cannot be had from where the recipe says, however often one asks; the message names both."""


class TransferFailed(OSError):
    """A transfer broke off; the next one may go through."""


class Origin(Protocol):
    """Where the files of a set come from."""

    def name(self, file: str) -> str:
        """What a message calls ``file``."""
        ...

    def blocks(self, file: str, stall_s: float) -> Iterator[bytes]:
        """The bytes of ``file``, until they end or the iterator is closed.

        Raises:
            TransferFailed: refused for now, cut, or ``stall_s`` seconds without a byte.
            Unavailable: no other try will help.
        """
        ...


def origin_of(shards: str, split: str = "") -> Origin | None:
    """The origin that ``data.shards`` names, of one split of it; None for a folder.

    Raises:
        ValueError: an address of a kind that is not understood, or a command without ``{file}``.
    """
    if shards.startswith(COMMAND):
        return CommandOrigin.parse(shards, split)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", shards)
    if scheme is None:
        return None
    if scheme[1].lower() in ("http", "https"):
        return HttpOrigin.parse(shards, split)
    raise ValueError(
        f"data.shards: '{shards}' is none of a folder, http(s)://... and pipe:COMMAND. For object stores give the "
        "command that writes a file to its output, such as pipe:aws s3 cp s3://bucket/sets/tiny/{file} -"
    )


@dataclass(frozen=True)
class HttpOrigin:
    """Files below an address; ``query`` goes with every request and into no message, for it may hold a key."""

    address: str
    query: str = ""

    @classmethod
    def parse(cls, text: str, split: str = "") -> HttpOrigin:
        """``https://host/path[?query]``."""
        parts = urlsplit(text)
        if not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise ValueError("data.shards: an address is http(s)://host[:port]/path[?query], without user name or '#'")
        below = f"/{quote(split)}" if split else ""
        address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}{below}"
        return cls(address, f"?{parts.query}" if parts.query else "")

    def name(self, file: str) -> str:
        """The address of ``file``."""
        return f"{self.address}/{quote(file)}"

    def blocks(self, file: str, stall_s: float) -> Iterator[bytes]:
        """The body of the reply; see :class:`Origin`."""
        headers = {"User-Agent": "graft", "Accept-Encoding": "identity"}
        try:
            request = urllib.request.Request(self.name(file) + self.query, headers=headers)
            with _opener().open(request, timeout=stall_s) as response:
                yield from _body(response)
        except urllib.error.HTTPError as error:
            error.close()
            told = f"HTTP {error.code} {error.reason}"
            if error.code >= 500 or error.code in PASSING:
                raise TransferFailed(told) from error
            raise Unavailable(f"{self.name(file)}: {told}") from error
        except TransferFailed:
            raise
        except http.client.InvalidURL as error:
            raise Unavailable(f"{self.name(file)}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise TransferFailed(_told(error, stall_s)) from error


@dataclass(frozen=True)
class CommandOrigin:
    """Files that a command writes to its standard output."""

    words: tuple[str, ...]
    split: str = ""

    @classmethod
    def parse(cls, text: str, split: str = "") -> CommandOrigin:
        """``pipe:COMMAND``; ``{file}`` is put in after the words are split, so no name can become two words."""
        try:
            words = tuple(shlex.split(text.removeprefix(COMMAND)))
        except ValueError as error:
            raise ValueError(f"data.shards: '{text}': {error}") from error
        if not any(PLACE in word for word in words[1:]):
            raise ValueError(f"data.shards: '{text}' needs {PLACE} where the file's name belongs")
        return cls(words, split)

    def name(self, file: str) -> str:
        """The command that gives ``file``."""
        return COMMAND + shlex.join(self._line(file))

    def blocks(self, file: str, stall_s: float) -> Iterator[bytes]:
        """What the command writes, if it ends with code 0; see :class:`Origin`."""
        with tempfile.TemporaryFile() as said:
            process = self._start(file, said)
            try:
                yield from _output(process, stall_s)
                code = process.wait(stall_s)
            except subprocess.TimeoutExpired as error:
                raise TransferFailed(f"does not end, {stall_s:g} s after its last byte") from error
            finally:
                _end(process)
            if code:
                said.seek(max(0, said.seek(0, os.SEEK_END) - MOST_SAID))
                words = said.read().decode("utf-8", "replace").strip()
                raise TransferFailed(f"exit code {code}{f': {words}' if words else ''}")

    def _line(self, file: str) -> list[str]:
        path = str(PurePosixPath(self.split, file))
        return [word.replace(PLACE, path) for word in self.words]

    def _start(self, file: str, said: object) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._line(file),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                bufsize=0,
                start_new_session=True,  # what it starts is ended with it
            )
        except OSError as error:
            raise Unavailable(f"{self.name(file)}: cannot be run: {error}") from error


def _output(process: subprocess.Popen[bytes], stall_s: float) -> Iterator[bytes]:
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(stall_s):
                raise TransferFailed(f"no byte for {stall_s:g} s")
            block = os.read(process.stdout.fileno(), BLOCK)
            if not block:
                return
            yield block


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of the command behind, not even what outlives it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a number still in use by a group is given to no new process
    process.stdout.close()
    process.wait()


def _body(response: http.client.HTTPResponse) -> Iterator[bytes]:
    if response.status != http.HTTPStatus.OK:
        raise TransferFailed(f"HTTP {response.status} where 200 was expected")
    promised, received = response.length, 0  # as Content-Length says, or None
    while block := response.read1(BLOCK):
        received += len(block)
        yield block
    if promised is not None and received != promised:
        raise TransferFailed(f"cut: {received} of {promised} bytes came")


def _told(error: Exception, stall_s: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no byte for {stall_s:g} s"
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Speaks HTTP and HTTPS only: a redirection leads to no file of this machine and to no other protocol."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


@dataclass(frozen=True)
class Patience:
    """How long a transfer is waited for, and how often it is begun again."""

    tries: int = 5
    wait_s: float = 1.0  # before the second try, twice as long before each further one
    stall_s: float = 60.0  # without a byte
    least_speed: float = 50_000.0  # bytes/s over the whole transfer, beyond the first stall_s

    def wait(self, number: int) -> None:
        """Sleep before try ``number``, the first being 0: at once."""
        if number:
            # Ranks that failed together do not come back together.
            spread = 1 + int.from_bytes(os.urandom(1)) / 512
            time.sleep(self.wait_s * 2 ** (number - 1) * spread)

    def deadline(self, size: int) -> float:
        """When a transfer of ``size`` bytes that begins now must be over, on the monotonic clock."""
        return time.monotonic() + self.stall_s + size / self.least_speed
