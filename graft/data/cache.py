"""A folder of fetched files that all ranks and runs of a machine share.

A file is named by the SHA-256 that the set's index promises. It arrives as ``<sha256>.part`` and gets its name when
size and digest are right, so what has its name is whole, whoever was killed in the middle, and a file of another build
of the set is another file. Who fetches holds a lock on the ``.part``; the kernel lets go of it when that process ends.
Others wait for the lock and find the file. When the folder is full, the files opened longest ago go; who still reads
one keeps reading it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from graft.data.fetch import Origin, Patience, TransferFailed, Unavailable
from graft.data.shard_format import INDEX, DamagedShard

LOG = logging.getLogger(__name__)
PART, ROOM = ".part", ".room"
OURS = re.compile(r"[0-9a-f]{64}(\.part)?")  # nothing else in the folder is ever removed
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # it may become a word of a user's command on another machine
MOST_LINE_BYTES = 1 << 16  # of samples.jsonl, where an older index does not tell its size
GB = 10**9

Result = TypeVar("Result")


class FetchFailed(OSError):
    """A file could not be had after several tries; the message names it, its origin and the last cause."""


class _Refused(Exception):
    """What came is not what the index promises."""


@dataclass(frozen=True)
class Promise:
    """What the index says of a file: ``size`` in bytes, or None where only ``most`` is known."""

    file: str
    sha256: str
    size: int | None
    most: int


class Cache:
    """Fetched files below ``folder``, at most ``limit`` bytes of them, files being fetched included."""

    def __init__(self, folder: Path, limit: float, patience: Patience | None = None) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience or Patience()
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, origin: Origin, promise: Promise) -> int:
        """A descriptor of the file, which is fetched when it is not here.

        Raises:
            FetchFailed, Unavailable: it cannot be had.
            DamagedShard: what the origin has is not what the index promises.
        """
        path = self.path(promise)
        while (found := _opened(path, promise.size)) is None:
            part = _locked(path.with_name(path.name + PART))
            if part is None:
                continue  # another has just finished it, or given up
            if (found := _opened(path, promise.size)) is None:
                return self._fetch(origin, promise, part)
            _drop(part, path.with_name(path.name + PART))
            return found
        return found

    def path(self, promise: Promise) -> Path:
        """Where the file is, or will be."""
        return self.folder / promise.sha256

    def read(self, origin: Origin, file: str, most: int) -> bytes:
        """A small file of which nothing is known but that it has at most ``most`` bytes; it is not kept.

        Raises:
            FetchFailed, Unavailable: it cannot be had.
            DamagedShard: it is larger.
        """

        def receive() -> bytes:
            return b"".join(_bounded(origin, file, most, self.patience))

        return self._several_times(receive, origin.name(file))

    def _fetch(self, origin: Origin, promise: Promise, part: int) -> int:
        path = self.path(promise)
        part_path = path.with_name(path.name + PART)
        try:
            self._make_room(part, promise)
            self._several_times(lambda: self._receive(origin, promise, part), origin.name(promise.file))
            os.fsync(part)
            _use(part)
            os.replace(part_path, path)
        except BaseException:
            _drop(part, part_path)
            raise
        fcntl.flock(part, fcntl.LOCK_UN)  # those who waited find the file
        return part

    def _receive(self, origin: Origin, promise: Promise, part: int) -> None:
        digest, received = sha256(), 0
        for block in _bounded(origin, promise.file, promise.most, self.patience):
            digest.update(block)
            self._write(part, block, received, promise.file)
            received += len(block)
        if promise.size not in (None, received):
            raise _Refused(f"{received} bytes came, the index says {promise.size}")
        if digest.hexdigest() != promise.sha256:
            raise _Refused(f"its sha256 is {digest.hexdigest()[:12]}..., the index says {promise.sha256[:12]}...")
        os.ftruncate(part, received)

    def _write(self, part: int, block: bytes, offset: int, file: str) -> None:
        view = memoryview(block)
        try:
            while view:
                written = os.pwrite(part, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.folder} cannot take {file}: {error.strerror}; lower data.cache_gb or give data.cache_dir a "
                "larger disk",
            ) from error

    def _several_times(self, receive: Callable[[], Result], name: str) -> Result:
        """The result of the first try that succeeds."""
        tries = self.patience.tries
        for number in range(tries):
            self.patience.wait(number)
            try:
                return receive()
            except (TransferFailed, _Refused) as error:
                failure = error
                LOG.warning("%s: try %d of %d failed: %s", name, number + 1, tries, error)
        if isinstance(failure, _Refused):
            raise DamagedShard(
                f"shard {name}: refused {tries} times, the last time because {failure}. It was altered there or on its "
                "way, or the set there was made anew: start again, and if that does not help put the shard there again."
            ) from failure
        raise FetchFailed(f"{name} could not be fetched in {tries} tries; the last one: {failure}") from failure

    def _make_room(self, part: int, promise: Promise) -> None:
        """Remove the files opened longest ago until ``promise`` fits, and take its place at once."""
        with _exclusively(self.folder / ROOM):
            os.ftruncate(part, 0)  # what a killed process has left in it
            files = sorted(self._files())
            excess = sum(size for _, size, _ in files) + (promise.size or 0) - self.limit
            for _, size, path in files:
                if excess <= 0:
                    break
                excess -= size if _removed(path) else 0
            os.ftruncate(part, promise.size or 0)  # no disk is used yet, but it counts from now on

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(when it was opened last, bytes, path) of what is ours."""
        for file in os.scandir(self.folder):
            if OURS.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    about = file.stat(follow_symlinks=False)
                    yield about.st_mtime_ns, about.st_size, Path(file.path)


class RemoteFiles:
    """The files of a set that comes from an origin through a cache; what :class:`FeatureSet` asks for."""

    most_open = 4  # descriptors: a file that is removed while it is open keeps its place on the disk

    def __init__(self, origin: Origin, cache: Cache) -> None:
        self.origin, self.cache = origin, cache
        self._promises: dict[str, Promise] = {}

    def name(self, file: str) -> str:
        """Its address or command."""
        return self.origin.name(file)

    def read_index(self, most: int) -> bytes:
        """``index.json``, fetched anew: it alone tells whether the set is still the one in the cache."""
        try:
            return self.cache.read(self.origin, INDEX, most)
        except Unavailable as error:
            raise Unavailable(f"no finished feature set: {error}") from error

    def expect(self, index: Mapping[str, Any]) -> None:
        """Take note of sizes and digests.

        Raises:
            ValueError: a name that could mean something to a shell, or a shard larger than the cache.
        """
        samples, size = index["samples"], index["samples"].get("size")
        most = index["num_samples"] * MOST_LINE_BYTES if size is None else size
        promises = [Promise(samples["file"], samples["sha256"], size, most)]
        promises += [Promise(s["file"], s["sha256"], s["size"], s["size"]) for s in index["shards"]]
        for promise in promises:
            if not SAFE_NAME.fullmatch(promise.file):
                raise DamagedShard(f"{self.name(INDEX)}: '{promise.file}' is no name of a file that can be fetched")
        self._promises = {promise.file: promise for promise in promises}
        self._check_limit(index["name"], [promise.most for promise in promises])

    def open(self, file: str) -> int:
        """A descriptor for reading; see :meth:`Cache.open`."""
        return self.cache.open(self.origin, self._promises[file])

    def damaged(self, file: str, what: str) -> DamagedShard:
        """The error for a file that is not as it arrived."""
        path = self.cache.path(self._promises[file])
        return DamagedShard(f"shard {self.name(file)}: {what}. Delete {path}, it is then fetched again.")

    def _check_limit(self, name: str, sizes: list[int]) -> None:
        limit, largest, total = self.cache.limit, max(sizes), sum(sizes)
        if largest > limit:
            raise ValueError(
                f"data.cache_gb is {limit / GB:g}, a single file of set '{name}' takes {largest / GB:.3g} GB: give "
                f"the whole set room, {total / GB:.3g} GB"
            )
        shards = f"{name}: {len(sizes) - 1} shards, {total / GB:.3g} GB"
        LOG.info("%s, from %s, kept in %s", shards, self.name(""), self.cache.folder)
        if total > limit:
            LOG.warning(
                "%s: data.cache_gb is %g, and training reads in random order: shards will be fetched again and again. "
                "Give the whole set room",
                shards,
                limit / GB,
            )


def _bounded(origin: Origin, file: str, most: int, patience: Patience) -> Iterator[bytes]:
    """The bytes of a transfer, which ends with an error when they are too many or come too slowly."""
    received, deadline = 0, patience.deadline(most)
    with closing(origin.blocks(file, patience.stall_s)) as blocks:
        for block in blocks:
            received += len(block)
            if received > most:
                raise _Refused(f"more than the {most} bytes came that it may have")
            if time.monotonic() > deadline:
                raise TransferFailed(f"slower than {patience.least_speed / 1000:g} kB/s")
            yield block


def _opened(path: Path, size: int | None) -> int | None:
    """A descriptor of a file of the cache, or None; to open it is to use it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if size not in (None, os.fstat(descriptor).st_size):  # cut since: it is fetched again
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    _use(descriptor)
    return descriptor


def _use(descriptor: int) -> None:
    """Note that a file is opened now; the kernel's own clock would tick too coarsely."""
    now = time.time_ns()
    with suppress(PermissionError):  # another user's
        os.utime(descriptor, ns=(now, now))


def _locked(path: Path) -> int | None:
    """A descriptor of ``path`` that no other process or thread holds; None if the file was taken away meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _drop(part: int, path: Path) -> None:
    """Give up a locked ``.part``. Removed before it is unlocked: who waits sees that it is gone."""
    if _is_at(part, path):
        path.unlink()
    os.close(part)


def _removed(path: Path) -> bool:
    """Remove a file of the cache, unless somebody is fetching it; whether it is gone."""
    try:
        if path.suffix != PART:
            path.unlink(missing_ok=True)
            return True
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """One process or thread at a time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
