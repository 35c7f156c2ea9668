"""A shard cannot lie: what is read is what was written, or an error that names the shard."""

from __future__ import annotations

import json
import shutil
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.manifest import Manifest, Reject, Utterance
from graft.data.shard_format import DamagedShard, FeatureSet, Folder, SampleEntry, decode, encode, read_index
from graft.data.shard_writer import (
    SetDescription,
    ShardWriter,
    check_existing,
    finished_part,
    merge_parts,
    part_path,
    plan_shards,
)
from shards.verify import find_sets, verify_set

D = 6
LENGTHS = [3, 1, 7, 2, 5]  # frames
DESCRIPTION = SetDescription(
    name="odd",
    manifest_sha256="m" * 64,
    samples_per_shard=2,
    long_audio="reject",
    dtype="bfloat16",
    fingerprint="f" * 64,
    source="a base",
    precision="fp32",
    mel={"feature_size": 16},
    window_frames=50,
    frame_size=D,
    encode_batch_size=4,
)


def utterance(number: int) -> Utterance:
    return Utterance(f"u{number}.x", Path("none.wav"), None, f"text {number} é", speaker="s7", instruction="Write.")


def features(number: int) -> torch.Tensor:
    return torch.randn(LENGTHS[number], D, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


def write_set(folder: Path, description: SetDescription = DESCRIPTION) -> Path:
    """Five utterances in three shards, and one reject."""
    lines = list(range(1, len(LENGTHS) + 1))
    manifest = Manifest(Path("m.jsonl"), [utterance(n) for n in range(len(LENGTHS))], [], lines)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in plan_shards(manifest, description.samples_per_shard):
        with ShardWriter(folder, description, shard.number) as writer:
            for line, one in zip(shard.lines, shard.utterances, strict=True):
                writer.add(one, features(line - 1), LENGTHS[line - 1] * 320 - 7)
    parts = [finished_part(folder, description, number) for number in range(3)]
    merge_parts(folder, description, [part for part in parts if part], [Reject(9, "gone", "no such file")])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("whole") / "odd")


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "odd"))


def test_what_was_written_is_read(whole: Path) -> None:
    opened = FeatureSet.open(whole, "f" * 64)
    assert len(opened) == 5 and opened.frame_size == D and opened.window_frames == 50
    for number, entry in enumerate(opened.entries):
        read = opened.read(number)
        assert read.dtype == torch.bfloat16 and torch.equal(read, features(number))
        assert (entry.id, entry.key, entry.text) == (f"u{number}.x", f"u{number}%2Ex", f"text {number} é")
        assert (entry.num_frames, entry.instruction, entry.speaker) == (LENGTHS[number], "Write.", "s7")
        assert entry.duration == (LENGTHS[number] * 320 - 7) / 16000 and entry.language is None
    assert [entry.shard for entry in opened.entries] == [f"odd-00000{n}.tar" for n in (0, 0, 1, 1, 2)]


def test_the_index_says_what_there_is(whole: Path) -> None:
    index = read_index(Folder(whole))
    assert (index["num_samples"], index["num_rejects"], index["dtype"]) == (5, 1, "bfloat16")
    assert index["encoder"] == {"fingerprint": "f" * 64, "source": "a base"}
    assert [shard["num_samples"] for shard in index["shards"]] == [2, 2, 1]
    assert index["audio_seconds"] == pytest.approx((18 * 320 - 35) / 16000)
    assert json.loads((whole / "rejects.jsonl").read_text()) == {"line": 9, "id": "gone", "reason": "no such file"}


def test_stock_webdataset_reads_the_tars(whole: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    from safetensors.torch import load

    urls = [str(path) for path in sorted(whole.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"u{n}%2Ex" for n in range(5)]
    for number, sample in enumerate(samples):
        assert torch.equal(load(sample["safetensors"])["audio_features"], features(number))
        about = json.loads(sample["json"])
        assert (about["id"], about["text"], about["num_frames"]) == (
            f"u{number}.x",
            f"text {number} é",
            LENGTHS[number],
        )
        assert about["xxh3"] == xxhash.xxh3_64(sample["safetensors"]).hexdigest()


def test_the_same_set_has_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    again = write_set(tmp_path / "odd")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (again / file).read_bytes() for file in files)
    with tarfile.open(whole / "odd-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_many_threads_read_at_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "most_open", 1)  # every second read closes what another thread may use
    opened = FeatureSet.open(whole)
    wrong: list[int] = []

    def read() -> None:
        for turn in range(200):
            if not torch.equal(opened.read(turn % 5), features(turn % 5)):
                wrong.append(turn)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def faults(folder: Path) -> list[str]:
    return verify_set(folder).faults


def read_all(folder: Path) -> None:
    opened = FeatureSet.open(folder)
    for number in range(len(opened)):
        opened.read(number)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def test_every_byte_of_the_features_is_guarded(copied: Path) -> None:
    opened = FeatureSet.open(copied)
    for number, entry in enumerate(opened.entries):
        path = copied / entry.shard
        before = path.read_bytes()
        for position in range(entry.offset, entry.offset + entry.size):
            flipped = bytearray(before)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedShard, match=f"{entry.shard}: the features of '{entry.id}'"):
                opened.read(number)
        path.write_bytes(before)
        assert torch.equal(opened.read(number), features(number))


def test_a_cut_while_the_set_is_open(copied: Path) -> None:
    opened = FeatureSet.open(copied)
    path = copied / "odd-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DamagedShard, match="odd-000001.tar"):
        opened.read(2)


def test_an_index_of_another_build(copied: Path) -> None:
    samples = copied / "samples.jsonl"
    lines = samples.read_text().splitlines()
    samples.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(DamagedShard, match="samples.jsonl: its sha256 is not the index's"):
        FeatureSet.open(copied)


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text()) | changes
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 1}, "format 1, this version reads 2"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"num_samples": 4}, "do not add up"),
        ({"frame_size": -6}, "frame_size is -6"),
        ({"frame_size": True}, "frame_size is True"),
        ({"shards": [{"file": "../secret.tar", "size": 1, "num_samples": 5}]}, "'../secret.tar' is not a plain name"),
        ({"shards": None}, "TypeError"),
        ({"samples": {"file": "/etc/passwd", "sha256": ""}}, "not a plain name"),
        ({"encoder": {}}, "KeyError"),
    ],
)
def test_a_hostile_index(copied: Path, changes: dict[str, object], says: str) -> None:
    edit_index(copied, **changes)
    with pytest.raises(DamagedShard, match=says):
        FeatureSet.open(copied)


def test_an_index_that_is_cut(copied: Path) -> None:
    path = copied / "index.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedShard, match="index.json is damaged"):
        FeatureSet.open(copied)


def edit_samples(folder: Path, number: int, **changes: object) -> None:
    """Forge a line of samples.jsonl together with its digest, as an attacker would."""
    from hashlib import sha256

    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines[number] |= changes
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text)
    edit_index(folder, samples={"file": "samples.jsonl", "sha256": sha256(text.encode()).hexdigest()})


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 2**40},
        {"size": 8},
        {"offset": 2**50},
        {"offset": -5},
        {"num_frames": 10**9},
        {"num_frames": 0},
        {"num_frames": "3"},
        {"shard": "other.tar"},
        {"xxh3": None},
        {"surprise": 1},
        {"text": 7},
    ],
)
def test_hostile_samples(copied: Path, changes: dict[str, object]) -> None:
    edit_samples(copied, 1, **changes)
    with pytest.raises(DamagedShard):
        FeatureSet.open(copied)


def entry(num_frames: int = 3) -> SampleEntry:
    return SampleEntry("a", "a", "t", num_frames, 1.0, "odd-000000.tar", 0, 0, 0)


def forged(header: object, data: bytes = bytes(36)) -> bytearray:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return bytearray(struct.pack("<Q", len(text)) + text + data)


def tensor(dtype: str = "BF16", shape: object = (3, D), offsets: object = (0, 36)) -> dict[str, object]:
    return {"audio_features": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "data",
    [
        bytearray(b""),
        bytearray(struct.pack("<Q", 2**60) + b"{}"),
        forged(b"not json"),
        forged([1, 2]),
        forged({"audio_features": 7}),
        forged({}),
        forged(tensor("F32")),
        forged(tensor(shape=[3, D + 1])),
        forged(tensor(shape=[2**40, 2**40])),
        forged(tensor(offsets=[0, 2**40])),
        forged(tensor(offsets=[-36, 0])),
        forged(tensor(offsets=[0, 34])),
        forged(tensor(offsets=[0])),
        forged(tensor(offsets=None)),
        forged(tensor(offsets=["0", "36"])),
        forged(tensor() | {"second": tensor()["audio_features"]}),
        forged(tensor(), bytes(30)),
    ],
)
def test_hostile_tensors(data: bytearray) -> None:
    with pytest.raises(DamagedShard, match="odd-000000.tar"):
        decode(data, entry(), "bfloat16", D)


def test_an_honest_tensor() -> None:
    assert decode(forged(tensor()), entry(), "bfloat16", D).tolist() == [[0.0] * D] * 3


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.integers(0, 999), st.floats(1e-6, 1e6))
def test_int8_errs_by_less_than_a_step(frames: int, size: int, seed: int, spread: float) -> None:
    given_ = torch.randn(frames, size, generator=torch.Generator().manual_seed(seed)) * spread
    given_[0, 0] = 0.0
    read = decode(bytearray(encode(given_, "int8")), replace(entry(), num_frames=frames), "int8", size).float()
    step = given_.abs().amax(dim=1, keepdim=True) / 127
    assert ((read - given_).abs() <= step / 2 + read.abs() * 2**-8 + 1e-30).all()


def test_int8_of_silence() -> None:
    read = decode(bytearray(encode(torch.zeros(3, D), "int8")), entry(), "int8", D)
    assert torch.equal(read, torch.zeros(3, D, dtype=torch.bfloat16))


def test_a_set_in_int8(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "odd", replace(DESCRIPTION, dtype="int8"))
    opened = FeatureSet.open(folder)
    assert faults(folder) == []
    assert torch.allclose(opened.read(2).float(), features(2).float(), atol=0.02)
    assert opened.entries[2].size < 7 * (D + 4) + 300


def test_another_encoder_is_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match="made by another encoder.*ffffffffffff.*a base.*gggggggggggg") as error:
        FeatureSet.open(whole, "g" * 64)
    assert "data.shards" in str(error.value) and "bases.whisper" in str(error.value)


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished feature set"):
        FeatureSet.open(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="it was begun: run shards/precompute.py again"):
        FeatureSet.open(tmp_path)


def test_an_existing_set_is_not_written_over(whole: Path) -> None:
    check_existing(whole, DESCRIPTION)
    check_existing(whole, replace(DESCRIPTION, source="the same weights elsewhere"))
    other = replace(DESCRIPTION, fingerprint="9" * 64, samples_per_shard=3)
    with pytest.raises(ValueError, match="encoder was ffffffffffff, is now 999999999999; data.samples_per_shard was 2"):
        check_existing(whole, other)
    with pytest.raises(ValueError, match="manifest or data.views was mmmmmmmmmmmm, is now nnnnnnnnnnnn"):
        check_existing(whole, replace(DESCRIPTION, manifest_sha256="n" * 64))
    with pytest.raises(ValueError, match="Give data.shards another folder, or delete this one"):
        finished_part(whole, other, 0)


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, DESCRIPTION, 0) as writer:
        writer.add(utterance(0), features(0), 900)
        raise RuntimeError("in the middle")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert finished_part(tmp_path, DESCRIPTION, 0) is None


def test_a_part_without_its_shard_is_not_finished(copied: Path) -> None:
    assert finished_part(copied, DESCRIPTION, 1) is not None
    (copied / "odd-000001.tar").write_bytes(b"short")
    assert finished_part(copied, DESCRIPTION, 1) is None
    part_path(copied, "odd-000002.tar").write_text('{"digest"')
    assert finished_part(copied, DESCRIPTION, 2) is None


def test_long_ids_and_strange_ones(tmp_path: Path) -> None:
    names = ["x" * 300, "a/b/../c.d", "é漢字" * 20, "__meta__", " ", "a\nb"]
    with ShardWriter(tmp_path, DESCRIPTION, 0) as writer:
        for name in names:
            writer.add(replace(utterance(0), id=name), features(0), 900)
    merge_parts(tmp_path, DESCRIPTION, [writer.part], [])
    assert [entry.id for entry in FeatureSet.open(tmp_path).entries] == names
    assert faults(tmp_path) == []


def test_a_shard_of_rejects_only(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, DESCRIPTION, 0) as writer:
        writer.reject(7, utterance(0), "no such file")
    with ShardWriter(tmp_path, DESCRIPTION, 1) as second:
        second.add(utterance(1), features(1), 300)
    merge_parts(tmp_path, DESCRIPTION, [writer.part, second.part], [])
    assert len(FeatureSet.open(tmp_path)) == 1 and faults(tmp_path) == []
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in shards(tmp_path)]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))) == 1


def test_find_sets(whole: Path, tmp_path: Path) -> None:
    assert find_sets(whole) == [whole]
    assert find_sets(whole.parent) == [whole]
    with pytest.raises(ValueError, match="no feature set"):
        find_sets(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        find_sets(tmp_path / "none")
