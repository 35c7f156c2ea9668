"""Shards of features: the same bytes from any number of ranks, killed or not; nothing lost in silence."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from corpus import RECIPE
from graft.data.shard_format import FeatureSet
from graft.lengths import SAMPLES_PER_ENCODER_FRAME, Window, encoder_frames
from graft.model.encoder import SpeechEncoder
from graft.ranks import AgreedValueError, Ranks
from graft.recipe import Recipe, load_recipe
from shards.precompute import Job, Worker, locked, main, precompute, readable
from shards.verify import verify_set

RATE = 16_000
WINDOW = Window(50)  # one second
D = 4


class StubEncoder:
    """Frames that show which samples they came from, and, as rounding would, how many were encoded together."""

    window, frame_size, mel_settings = WINDOW, D, {"feature_size": 7}

    def __init__(self, fingerprint: str = "e" * 64, wait_s: float = 0.0) -> None:
        self.fingerprint, self.wait_s, self.batches = fingerprint, wait_s, []

    def window_of(self, num_samples: int) -> Window:
        return WINDOW

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        time.sleep(self.wait_s)
        self.batches.append(len(waveforms))
        return [self._frames(waveform, len(waveforms)) for waveform in waveforms]

    def _frames(self, waveform: np.ndarray, batch: int) -> torch.Tensor:
        WINDOW.check(len(waveform), "a waveform")
        padded = np.pad(waveform, (0, -len(waveform) % SAMPLES_PER_ENCODER_FRAME))
        means = padded.reshape(-1, SAMPLES_PER_ENCODER_FRAME).mean(axis=1)
        return torch.from_numpy(np.stack([means, means * 2, means * 0 + batch, np.arange(len(means))], 1)).bfloat16()


def corpus(folder: Path, count: int = 23, seconds: Callable[[int], float] = lambda n: 0.1 + 0.037 * n) -> Path:
    """A manifest of ``count`` utterances of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(11)
    lines = []
    for number in range(count):
        samples = chance.uniform(-0.5, 0.5, round(seconds(number) * RATE))
        soundfile.write(folder / f"{number}.wav", samples, RATE)
        line = {
            "id": f"u.{number}",
            "audio_filepath": f"{number}.wav",
            "duration": len(samples) / RATE,
            "text": f"t {number}",
        }
        lines.append(line | ({"speaker": "s"} if number % 3 == 0 else {}))
    return write_lines(folder, lines)


def write_lines(folder: Path, lines: list[dict]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(manifest: Path, shards: Path, **audio: object) -> Recipe:
    return Recipe(
        bases={"whisper": "stub", "qwen2_vl": "stub"},
        audio={"encode_batch_size": 3, "max_rejects": 0.1} | audio,
        data={"manifests": {"train": str(manifest)}, "shards": str(shards), "samples_per_shard": 4},
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a set with its bytes; what only serves the making is left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".lock", ".rank", ".failed"))
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set as one undisturbed rank makes it."""
    shards = tmp_path_factory.mktemp("expected")
    precompute(recipe(manifest, shards), "train", StubEncoder(), Ranks())
    return files(shards / "train")


def test_every_utterance_is_there(manifest: Path, tmp_path: Path) -> None:
    encoder = StubEncoder()
    precompute(recipe(manifest, tmp_path), "train", encoder, Ranks())
    made = FeatureSet.open(tmp_path / "train", encoder.fingerprint)
    lines = read_lines(manifest)
    assert [e.id for e in made.entries] == [line["id"] for line in lines]
    for number, (entry, line) in enumerate(zip(made.entries, lines, strict=True)):
        waveform, _ = soundfile.read(manifest.parent / line["audio_filepath"], dtype="float32")
        assert entry.num_frames == encoder_frames(len(waveform)) and entry.duration == len(waveform) / RATE
        assert (entry.text, entry.speaker) == (line["text"], line.get("speaker"))
        together = 3 if number < 20 and number % 4 < 3 else {20: 3, 21: 3, 22: 3}.get(number, 1)
        assert torch.equal(made.read(number), encoder._frames(waveform, together)), number
    assert verify_set(tmp_path / "train").faults == []
    assert len(made.index["shards"]) == 6 and made.index["num_rejects"] == 0
    assert made.audio_seconds == pytest.approx(sum(line["duration"] for line in lines))


def play(recipe: Recipe, world_size: int, encoder: StubEncoder) -> Path:
    """What ``world_size`` ranks do, one after the other."""
    job = Job.prepare(recipe, "train", encoder)
    (job.folder / "parts").mkdir(parents=True, exist_ok=True)
    todo = job.unfinished()
    job.begin(todo)
    for rank in reversed(range(world_size)):
        Worker(job, encoder, Ranks(rank, world_size), todo).run()
    job.merge()
    return job.folder


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_the_same_bytes_from_any_number_of_ranks(
    manifest: Path, tmp_path: Path, expected: dict[str, bytes], world_size: int
) -> None:
    assert files(play(recipe(manifest, tmp_path), world_size, StubEncoder())) == expected


def test_a_finished_set_is_left_alone(manifest: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    for _ in range(2):
        encoder = StubEncoder()
        precompute(recipe(manifest, tmp_path), "train", encoder, Ranks())
    assert encoder.batches == [] and files(tmp_path / "train") == expected


def test_only_what_is_missing_is_made_again(manifest: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    precompute(recipe(manifest, tmp_path), "train", StubEncoder(), Ranks())
    (tmp_path / "train" / "train-000002.tar").unlink()
    (tmp_path / "train" / "train-000004.tar").write_bytes(b"cut")
    encoder = StubEncoder()
    precompute(recipe(manifest, tmp_path), "train", encoder, Ranks())
    assert encoder.batches == [3, 1, 3, 1] and files(tmp_path / "train") == expected


@pytest.mark.parametrize("lost", ["index.json", "samples.jsonl"])
def test_a_set_without_its_lists_is_merged_again(
    manifest: Path, tmp_path: Path, expected: dict[str, bytes], lost: str
) -> None:
    precompute(recipe(manifest, tmp_path), "train", StubEncoder(), Ranks())
    (tmp_path / "train" / lost).unlink()
    encoder = StubEncoder()
    precompute(recipe(manifest, tmp_path), "train", encoder, Ranks())
    assert encoder.batches == [] and files(tmp_path / "train") == expected


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def kill_at_operation(number: int) -> None:
    """Make this process kill itself (-9) at the ``number``-th forcing to disk, renaming or deleting of a file."""
    left = [number]

    def counted(operation: Callable) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return run

    os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)


@pytest.mark.faults
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(
    manifest: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """At boundaries from the first to the renaming of the index; tests/test_machine_faults.py takes all, of less."""
    for number in range(1, 47, 3):
        settings = recipe(manifest, tmp_path / str(number))

        def work(settings: Recipe = settings, number: int = number) -> None:
            kill_at_operation(number)
            precompute(settings, "train", StubEncoder(), Ranks())

        _, status = os.waitpid(in_child(work), 0)
        assert os.WIFSIGNALED(status), f"operation {number} was not reached"
        with pytest.raises(ValueError):
            FeatureSet.open(settings.set_folder("train"))  # what is not finished cannot be taken for a set
        precompute(settings, "train", StubEncoder(), Ranks())
        assert files(settings.set_folder("train")) == expected, number


@pytest.mark.faults
def test_killed_again_and_again(manifest: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Killed at random moments until it comes through, each time with another number of ranks."""
    settings, chance, kills = recipe(manifest, tmp_path), random.Random(5), 0
    for attempt in range(60):
        pid = in_child(lambda attempt=attempt: play(settings, 1 + attempt % 3, StubEncoder(wait_s=0.05)))
        time.sleep(chance.uniform(0.02, 0.1) * (1 + attempt / 5))
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    assert kills > 2
    assert files(settings.set_folder("train")) == expected


def refuse(settings: Recipe, encoder: StubEncoder, says: str) -> None:
    before = files(settings.set_folder("train"))
    with pytest.raises(ValueError, match=says):
        precompute(settings, "train", encoder, Ranks())
    assert files(settings.set_folder("train")) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_encoder_or_manifest_is_refused(manifest: Path, tmp_path: Path, finished: bool) -> None:
    settings = recipe(manifest, tmp_path)
    precompute(settings, "train", StubEncoder(), Ranks())
    if not finished:
        (tmp_path / "train" / "index.json").unlink()
    says = (
        "encoder was eeeeeeeeeeee, is now 333333333333" if finished else "made by another encoder, manifest or settings"
    )
    refuse(
        settings, StubEncoder("3" * 64), f"already holds another feature set: .*{says}.*Give data.shards another folder"
    )
    other = shutil.copytree(manifest.parent, tmp_path / "corpus")
    write_lines(other, read_lines(manifest)[:-1])
    says = "manifest or data.views was" if finished else "another encoder, manifest"
    refuse(recipe(other / "train.jsonl", tmp_path), StubEncoder(), says)
    refuse(
        recipe(manifest, tmp_path, long_audio="join"),
        StubEncoder(),
        "audio.long_audio was reject, is now join" if finished else "settings",
    )


def faulty(folder: Path, count: int = 30) -> Path:
    """A corpus where four utterances cannot be used, and one line has no text."""
    path = corpus(folder, count, lambda n: 0.1 + 0.01 * n)
    lines = read_lines(path)
    (folder / "3.wav").unlink()
    (folder / "4.wav").write_bytes(b"")
    soundfile.write(folder / "9.wav", np.full(3040, np.nan), RATE, subtype="FLOAT")
    soundfile.write(folder / "10.wav", np.zeros(3200), RATE)
    lines[20]["text"] = " \\n"
    return write_lines(folder, lines)


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path: Path) -> None:
    path = faulty(tmp_path / "corpus")
    play(recipe(path, tmp_path / "two", max_rejects=0.2), 2, StubEncoder())
    precompute(recipe(path, tmp_path / "one", max_rejects=0.2), "train", StubEncoder(), Ranks())
    folder = tmp_path / "one" / "train"
    assert files(folder) == files(tmp_path / "two" / "train")
    made, rejects = FeatureSet.open(folder), read_lines(folder / "rejects.jsonl")
    assert [(r["line"], r["id"]) for r in rejects] == [(n + 1, f"u.{n}") for n in (3, 4, 9, 10, 20)]
    for reject, says in zip(rejects, ["no such file", "empty file", "NaN", "silence", "empty text"], strict=True):
        assert says in reject["reason"]
    assert sorted([e.id for e in made.entries] + [r["id"] for r in rejects]) == sorted(f"u.{n}" for n in range(30))
    assert made.index["num_rejects"] == 5 and verify_set(folder).faults == []


def test_too_many_rejects_stop_it_and_mended_files_are_tried_again(tmp_path: Path) -> None:
    path = faulty(tmp_path / "corpus")
    settings = recipe(path, tmp_path / "shards", max_rejects=0.1)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"5 of 30 utterances cannot be used, audio.max_rejects allows 10%: 1 x"
        ) as error:
            play(settings, 2, StubEncoder())
        assert "Mend them and start again, or raise audio.max_rejects" in str(error.value)
        with pytest.raises(ValueError, match="no finished feature set"):
            FeatureSet.open(tmp_path / "shards" / "train")
    for number in (3, 4, 9):
        shutil.copy(tmp_path / "corpus" / "5.wav", tmp_path / "corpus" / f"{number}.wav")
    lines = read_lines(path)
    assert lines[3]["duration"] < 0.2
    encoder = StubEncoder()
    precompute(settings, "train", encoder, Ranks())
    assert len(FeatureSet.open(tmp_path / "shards" / "train")) == 28
    assert sum(encoder.batches) < 20, "shards without rejects were made again"


def test_it_stops_early_when_the_end_is_certain(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus", 40)
    for file in (tmp_path / "corpus").glob("*.wav"):
        file.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="5 of 40 utterances cannot be used"):
        precompute(recipe(path, tmp_path / "shards"), "train", StubEncoder(), Ranks())


@pytest.mark.parametrize(("policy", "frames"), [("join", 117), ("truncate", 50), ("reject", None)])
def test_long_audio_by_policy(tmp_path: Path, policy: str, frames: int | None) -> None:
    path = corpus(tmp_path / "corpus", 3, lambda n: (0.5, 2.33, 0.25)[n])
    settings = recipe(path, tmp_path / "shards", long_audio=policy, max_rejects=0.5)
    precompute(settings, "train", StubEncoder(), Ranks())
    made = FeatureSet.open(tmp_path / "shards" / "train")
    kept = {entry.id: entry for entry in made.entries}
    assert (made.index["num_joined"], made.index["num_truncated"]) == (policy == "join", policy == "truncate")
    if frames is None:
        (reject,) = read_lines(tmp_path / "shards" / "train" / "rejects.jsonl")
        assert "37280 samples (2.33 s), the encoder's window holds 16000 (1.00 s" in reject["reason"]
        return
    assert kept["u.1"].num_frames == frames
    assert kept["u.1"].duration == (2.33 if policy == "join" else 1.0)
    joined = made.read(1)[:, 3]
    assert joined.tolist() == (list(range(50)) * 2 + list(range(17)) if policy == "join" else list(range(50)))


def test_an_encoder_that_gives_nan(manifest: Path, tmp_path: Path) -> None:
    class Broken(StubEncoder):
        def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
            return [frames.fill_(float("nan")) for frames in super().encode(waveforms)]

    with pytest.raises(ValueError, match="the encoder gave NaN"):
        precompute(recipe(manifest, tmp_path), "train", Broken(), Ranks())


def test_an_encoder_that_fails_leaves_no_debris(manifest: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    class Failing(StubEncoder):
        def __init__(self, full_after: int) -> None:
            super().__init__()
            self.full_after = full_after

        def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
            if len(self.batches) == self.full_after:
                raise MemoryError("no room")
            return super().encode(waveforms)

    with pytest.raises(RuntimeError, match="MemoryError: no room"):
        precompute(recipe(manifest, tmp_path), "train", Failing(full_after=5), Ranks())
    assert not list((tmp_path / "train").glob(".*.tmp"))
    precompute(recipe(manifest, tmp_path), "train", StubEncoder(), Ranks())
    assert files(tmp_path / "train") == expected
    (tmp_path / "train" / "train-000005.tar").unlink()
    with pytest.raises(RuntimeError, match="no room"):
        precompute(recipe(manifest, tmp_path), "train", Failing(full_after=0), Ranks())
    with pytest.raises(ValueError, match="no finished feature set"):
        FeatureSet.open(tmp_path / "train")


def test_a_rank_stops_when_another_has_failed(manifest: Path, tmp_path: Path) -> None:
    job = Job.prepare(recipe(manifest, tmp_path), "train", StubEncoder())
    (job.folder / "parts").mkdir(parents=True)
    job.begin(job.unfinished())
    (job.folder / "parts" / ".failed").touch()
    encoder = StubEncoder()
    Worker(job, encoder, Ranks(0, 2), job.unfinished()).run()
    assert len(encoder.batches) < 5 and not list(job.folder.glob("*.tar*"))


def test_two_precomputations_of_one_set(manifest: Path, tmp_path: Path) -> None:
    settings = recipe(manifest, tmp_path)
    with locked(tmp_path / "train", Ranks()), pytest.raises(ValueError, match="another precomputation is writing"):
        precompute(settings, "train", StubEncoder(), Ranks())
    precompute(settings, "train", StubEncoder(), Ranks())


def test_the_disk_must_be_large_enough(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = recipe(manifest, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="needs .* kB, its disk has 1 kB free.*int8"):
        precompute(settings, "train", StubEncoder(), Ranks())


def test_the_forecast_is_near_and_not_below(manifest: Path, tmp_path: Path) -> None:
    job = Job.prepare(recipe(manifest, tmp_path), "train", StubEncoder())
    forecast = job.forecast(range(len(job.shards)))
    precompute(recipe(manifest, tmp_path), "train", StubEncoder(), Ranks())
    padding = 10_240 * len(job.shards)  # tar's own, at the end of each shard
    real = sum(path.stat().st_size for path in (tmp_path / "train").glob("*.tar"))
    assert real - padding <= forecast <= real * 1.1


def test_no_forecast_without_durations(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus", 2)
    write_lines(path.parent, [{k: v for k, v in line.items() if k != "duration"} for line in read_lines(path)])
    settings = recipe(path, tmp_path / "shards")
    assert Job.prepare(settings, "train", StubEncoder()).forecast([0]) is None
    precompute(settings, "train", StubEncoder(), Ranks())
    assert len(FeatureSet.open(tmp_path / "shards" / "train")) == 2


def test_int8(manifest: Path, tmp_path: Path) -> None:
    precompute(recipe(manifest, tmp_path, feature_dtype="int8"), "train", StubEncoder(), Ranks())
    made = FeatureSet.open(tmp_path / "train")
    assert made.dtype == "int8" and made.read(7).shape == (made.entries[7].num_frames, D)
    assert verify_set(tmp_path / "train").faults == []


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (67_600_000, "67.6 MB"), (4e15, "4e+03 TB")]
)
def test_readable(size: float, words: str) -> None:
    assert readable(size) == words


def test_a_split_without_a_manifest(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest for split 'test'"):
        precompute(recipe(manifest, tmp_path), "test", StubEncoder(), Ranks())


@pytest.fixture(scope="module")
def real_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over a random Whisper with a window of one second, and a manifest of sixteen utterances."""
    from tests import tiny_bases

    folder = tmp_path_factory.mktemp("real")
    whisper = tiny_bases.whisper_folder(folder / "whisper")
    made = recipe(corpus(folder / "corpus", 16, lambda n: 0.2 + 0.05 * n), folder / "shards")
    bases = {"whisper": str(whisper), "qwen2_vl": "none"}
    written = made.model_copy(
        update={"bases": made.bases.model_copy(update=bases), "run": made.run.model_copy(update={"precision": "fp32"})}
    )
    (folder / "recipe.yaml").write_text(written.as_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def by_two_ranks(real_recipe: Path, run_launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, what was said) of the command on two ranks."""
    shards = tmp_path_factory.mktemp("two")
    done = run_launcher("shards/precompute.py", real_recipe, f"data.shards={shards}", timeout_s=600)
    return shards, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_makes_what_one_rank_makes(
    real_recipe: Path, by_two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    settings = load_recipe(real_recipe, [f"data.shards={tmp_path}"])
    precompute(settings, "train", SpeechEncoder(settings.bases.whisper, torch.float32), Ranks())
    shards, said = by_two_ranks
    assert files(shards / "train") == files(tmp_path / "train")
    assert verify_set(shards / "train").faults == []
    assert said.count("train: 16 utterances, 0:09 of audio, in 4 shards, 4 of them to be made: about") == 1
    assert said.count(f"{shards}/train: 16 samples, 0:09 of audio") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_refusal_ends_all_ranks_and_is_told_once(
    real_recipe: Path, by_two_ranks: tuple[Path, str], run_launcher
) -> None:
    other = [f"data.shards={by_two_ranks[0]}", "data.samples_per_shard=3"]
    refused = run_launcher("shards/precompute.py", real_recipe, *other, expect=None, timeout_s=600)
    assert refused.returncode != 0
    assert refused.stderr.count("data.samples_per_shard was 4, is now 3") == 1, str(refused)


def test_shards_are_made_in_folders_only() -> None:
    words = SimpleNamespace(recipe=RECIPE, overrides=["data.shards=https://host/sets/tiny"], split=None)
    with pytest.raises(ValueError, match="https://host/sets/tiny.*made in a folder. Give data.shards=FOLDER"):
        main(words)


def test_errors_are_told_as_the_users(tmp_path: Path) -> None:
    with pytest.raises(AgreedValueError, match="does not exist; shards/make_manifest.py makes one"):
        precompute(recipe(tmp_path / "none.jsonl", tmp_path), "train", StubEncoder(), Ranks())
