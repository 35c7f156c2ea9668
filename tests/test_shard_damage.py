"""Every class of bytes of a shard, damaged in every way: refused, and the shard named.

A shard is cut into the classes of bytes that it is made of, and each of them is damaged in each way. Then

- shards/verify.py must refuse the set, always;
- training must get each sample exactly as it was written, or an error. It must be the error wherever a sample's
  features, text or identity would be another, and wherever a shard has another size.

What training never reads may be left to verify: the tar's headers, the JSON members and the padding. They are there for
stock WebDataset; training knows places, texts and ids from samples.jsonl, which the index's SHA-256 guards.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.manifest import Manifest
from graft.data.shard_format import DamagedShard, FeatureSet
from graft.data.shard_writer import SetDescription, ShardWriter, finished_part, merge_parts, plan_shards
from shards.verify import verify_set
from tests.test_shard_format import DESCRIPTION, LENGTHS, features, utterance

BLOCK = 512
CLASSES = (
    "tar header of the JSON",
    "JSON",
    "padding of the JSON",
    "tar header of the tensors",
    "safetensors header",
    "tensor data",
    "padding of the tensors",
    "end of the archive",
)
READ_BY_TRAINING = ("safetensors header", "tensor data")
SHARDS = [f"odd-{number:06d}.tar" for number in range(3)]
WRITTEN = {f"u{n}.x": (f"text {n} é", features(n)) for n in range(len(LENGTHS))}


def build(
    folder: Path,
    description: SetDescription = DESCRIPTION,
    text: str = "text",
    feature: Callable[[int], torch.Tensor] = features,
) -> Path:
    """Five utterances in three shards by the project's own writer; ``text`` and ``feature`` make another build."""
    utterances = [replace(utterance(n), text=f"{text} {n} é") for n in range(len(LENGTHS))]
    manifest = Manifest(Path("m.jsonl"), utterances, [], list(range(len(LENGTHS))))
    folder.mkdir(parents=True)
    for shard in plan_shards(manifest, description.samples_per_shard):
        with ShardWriter(folder, description, shard.number) as writer:
            for number, one in zip(shard.lines, shard.utterances, strict=True):
                writer.add(one, feature(number), LENGTHS[number] * 320 - 7)
    parts = [finished_part(folder, description, number) for number in range(3)]
    merge_parts(folder, description, [part for part in parts if part], [])
    return folder


@dataclass(frozen=True)
class Region:
    """Bytes ``start`` .. ``end - 1`` of ``shard``, all of one class."""

    shard: str
    kind: str
    start: int
    end: int


def regions(folder: Path) -> list[Region]:
    """What the shards of a set are made of, found by the standard library, not by ours."""
    found = []
    for name in SHARDS:
        place = 0
        data = (folder / name).read_bytes()
        with tarfile.open(folder / name) as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar]
        for member, start, size in members:
            end, padded = start + size, start + -(-size // BLOCK) * BLOCK
            header = start + 8 + int.from_bytes(data[start : start + 8], "little")
            stops = (start, end, padded) if member.endswith(".json") else (start, header, end, padded)
            kinds = CLASSES[:3] if member.endswith(".json") else CLASSES[3:7]
            for kind, stop in zip(kinds, stops, strict=True):
                found.append(Region(name, kind, place, stop))
                place = stop
        found.append(Region(name, CLASSES[7], place, len(data)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set; tests damage it inside :func:`restored`."""
    return build(tmp_path_factory.mktemp("sets") / "odd")


@pytest.fixture(scope="module")
def all_regions(folder: Path) -> list[Region]:
    return regions(folder)


@contextmanager
def restored(folder: Path, *names: str) -> Iterator[None]:
    before = {name: (folder / name).read_bytes() for name in names}
    try:
        yield
    finally:
        for name, data in before.items():
            (folder / name).write_bytes(data)


def training(folder: Path, fingerprint: str | None = "f" * 64) -> list[str]:
    """What training is told of a set: errors. What it is given instead of an error must be what was written."""
    try:
        opened = FeatureSet.open(folder, fingerprint)
    except ValueError as error:
        return [str(error)]
    errors = []
    assert [entry.id for entry in opened.entries] == list(WRITTEN)
    for number, entry in enumerate(opened.entries):
        try:
            read = opened.read(number)
        except DamagedShard as error:
            errors.append(str(error))
            continue
        text, written = WRITTEN[entry.id]
        assert entry.text == text and torch.equal(read, written), f"'{entry.id}' is another one, and nobody noticed"
    return errors


def check_refused(folder: Path, shard: str, by_training: bool, what: str) -> None:
    """Verify refuses and names ``shard`` alone; training does if it must."""
    told = training(folder)
    assert all(shard in error for error in told) and (told or not by_training), f"{what}: training was told {told}"
    faults = verify_set(folder).faults
    assert faults and all(shard in fault for fault in faults), f"{what}: verify said {faults}"


def test_the_classes_are_all_there_and_cover_every_byte(folder: Path, all_regions: list[Region]) -> None:
    assert not training(folder) and not verify_set(folder).faults
    for name in SHARDS:
        mine = [region for region in all_regions if region.shard == name]
        assert [r.start for r in mine] == [0, *(r.end for r in mine[:-1])]
        assert mine[-1].end == (folder / name).stat().st_size
        assert {r.kind for r in mine if r.start < r.end} == set(CLASSES)


Damage = Callable[[bytes, int, int], bytes]


def overwritten(data: bytes, start: int, end: int) -> bytes:
    """Zeroed; what is zero already becomes something else."""
    other = bytes(end - start) if any(data[start:end]) else b"\xff" * (end - start)
    return data[:start] + other + data[end:]


def flipped(where: float) -> Damage:
    """One bit, at a share of the region."""

    def flip(data: bytes, start: int, end: int) -> bytes:
        place = start + int(where * (end - start - 1))
        return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]

    return flip


DAMAGES: dict[str, Damage] = {
    "first byte flipped": flipped(0),
    "middle byte flipped": flipped(0.5),
    "last byte flipped": flipped(1),
    "overwritten": overwritten,
    "cut at its start": lambda data, start, end: data[:start],
    "cut in its middle": lambda data, start, end: data[: (start + end) // 2],
    "cut out": lambda data, start, end: data[:start] + data[end:],
    "a byte inserted": lambda data, start, end: data[:start] + b"\x01" + data[start:],
    "a block inserted": lambda data, start, end: data[:start] + bytes(BLOCK) + data[start:],
    "moved on by a byte": lambda data, start, end: data[:start] + b"\x01" + data[start:-1],  # the size stays
    "moved on by a block": lambda data, start, end: data[:start] + b"\x01" * BLOCK + data[start:-BLOCK],
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_damaged_region(folder: Path, all_regions: list[Region], kind: str, how: str) -> None:
    for region in (r for r in all_regions if r.kind == kind and r.start < r.end):
        path = folder / region.shard
        data = path.read_bytes()
        damaged = DAMAGES[how](data, region.start, region.end)
        assert damaged != data
        with restored(folder, region.shard):
            path.write_bytes(damaged)
            entries = [r for r in all_regions if r.shard == region.shard and r.kind in READ_BY_TRAINING]
            hit = any(data[r.start : r.end] != damaged[r.start : r.end] for r in entries)
            check_refused(folder, region.shard, hit or len(damaged) != len(data), f"{how} of {region}")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other sets of the same name, ids and lengths."""
    root = tmp_path_factory.mktemp("builds")
    other = replace(DESCRIPTION, fingerprint="e" * 64)
    return {
        "other features": build(root / "features" / "odd", feature=lambda n: features(n) * 2),
        "other texts": build(root / "texts" / "odd", text="next"),
        "other encoder": build(root / "encoder" / "odd", other, feature=lambda n: -features(n)),
        "other dtype": build(root / "dtype" / "odd", replace(DESCRIPTION, dtype="int8")),
    }


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("how", ["missing", "empty", "a folder", "extra byte", "extra archive", "another's", "swapped"])
def test_a_shard_that_is_another_file(folder: Path, shard: str, how: str) -> None:
    path, other = folder / shard, folder / SHARDS[SHARDS.index(shard) - 1]
    assert path.stat().st_size == other.stat().st_size, "only then can sizes not tell"
    data, others = path.read_bytes(), other.read_bytes()
    with restored(folder, shard, other.name):
        if how in ("missing", "a folder"):
            path.unlink()
        if how == "a folder":
            path.mkdir()
        new = {"empty": b"", "extra byte": data + b"\0", "extra archive": data + others, "another's": others}
        if how in new:
            path.write_bytes(new[how])
        if how == "swapped":
            path.write_bytes(others)
            other.write_bytes(data)
        told, faults = training(folder), verify_set(folder).faults
        assert any(shard in error for error in told) and any(shard in fault for fault in faults)
        if how == "swapped" and shard != SHARDS[0]:
            assert any(other.name in error for error in told) and any(other.name in fault for fault in faults)
        if how == "a folder":
            path.rmdir()


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("build_name", ["other features", "other texts", "other encoder", "other dtype"])
def test_a_shard_of_another_build(folder: Path, builds: dict[str, Path], build_name: str, shard: str) -> None:
    with restored(folder, shard):
        shutil.copyfile(builds[build_name] / shard, folder / shard)
        check_refused(folder, shard, by_training=True, what=build_name)


@pytest.mark.parametrize("stale", [["index.json"], ["samples.jsonl"], ["index.json", "samples.jsonl"]])
@pytest.mark.parametrize("build_name", ["other features", "other texts", "other encoder", "other dtype"])
def test_a_stale_index(folder: Path, builds: dict[str, Path], build_name: str, stale: list[str]) -> None:
    """The files that prove a set are those of another build, one of them or both."""
    with restored(folder, *stale):
        for name in stale:
            shutil.copyfile(builds[build_name] / name, folder / name)
        told, faults = training(folder, None), verify_set(folder).faults
    assert told and faults
    if len(stale) == 1:
        assert all("samples.jsonl: its sha256 is not the index's" in text for text in (*told, *faults))
    else:
        assert len(told) == len(WRITTEN), "a sample of another build was believed"
        assert all(any(shard in fault for fault in faults) for shard in SHARDS)


def test_a_set_of_another_encoder(builds: dict[str, Path]) -> None:
    """It is whole, so verify, which knows no recipe, has nothing against it; whoever trains refuses it."""
    made = builds["other encoder"]
    assert not verify_set(made).faults
    (told,) = training(made)
    assert f"{made} was made by another encoder" in told and "eeeeeeeeeeee" in told and "ffffffffffff" in told


def test_a_duplicate_beside_the_shards(folder: Path) -> None:
    """Training does not look at it; whoever reads ``*.tar`` would read two samples twice."""
    duplicate = folder / "odd-000003.tar"
    shutil.copyfile(folder / SHARDS[0], duplicate)
    try:
        check_refused(folder, duplicate.name, by_training=False, what="duplicate")
        assert not training(folder)
    finally:
        duplicate.unlink()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_any_damage_anywhere(folder: Path, all_regions: list[Region], data: st.DataObject) -> None:
    """One byte or many, at any offset, in any of the ways."""
    shard = data.draw(st.sampled_from(SHARDS))
    before = (folder / shard).read_bytes()
    start = data.draw(st.integers(0, len(before) - 1))
    end = data.draw(st.integers(start + 1, min(len(before), start + data.draw(st.sampled_from([1, 40, 3000])))))
    how = data.draw(st.sampled_from(list(DAMAGES)))
    damaged = DAMAGES[how](before, start, end)
    read = [r for r in all_regions if r.shard == shard and r.kind in READ_BY_TRAINING]
    hit = len(damaged) != len(before) or any(before[r.start : r.end] != damaged[r.start : r.end] for r in read)
    with restored(folder, shard):
        (folder / shard).write_bytes(damaged)
        if damaged != before:
            check_refused(folder, shard, hit, f"{how}, bytes {start} to {end} of {shard}")
