"""audio.window=trimmed: less work, frames of an utterance's own length, never taken for those of the full window."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_bases as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_precompute import RATE, corpus, files

from graft import lengths
from graft.data.shard_format import FeatureSet
from graft.data.shard_writer import check_existing, finished_part
from graft.lengths import TRIMMED_MARGIN, TRIMMED_STEP, Window, WindowExceeded
from graft.model.assemble import assemble
from graft.model.encoder import SpeechEncoder, encode_mels
from graft.ranks import Ranks
from graft.recipe import Recipe
from graft.run_dir import check_encoder, window_of
from graft.sources import Sources
from shards.precompute import Job, Worker, precompute
from shards.verify import verify_set
from tests.tiny_run import tiny_run  # by this name: importing shards.precompute takes this folder off the path

FP32 = torch.float32
WINDOW = Window(150)  # three seconds


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.whisper_folder(tmp_path_factory.mktemp("whisper"), max_source_positions=WINDOW.num_frames))


@pytest.fixture(scope="module")
def full(base: str) -> SpeechEncoder:
    return SpeechEncoder(base, FP32)


@pytest.fixture(scope="module")
def trimmed(base: str) -> SpeechEncoder:
    return SpeechEncoder(base, FP32, audio_window="trimmed")


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


@pytest.mark.parametrize(
    ("num_samples", "num_frames"),
    [(1, 25), (320 * 15, 25), (320 * 15 + 1, 50), (320 * 40, 50), (320 * 115, 125), (320 * 116, 150), (48_000, 150)],
)
def test_a_trimmed_window_is_whole_half_seconds_with_ten_frames_of_silence(num_samples: int, num_frames: int) -> None:
    assert WINDOW.trimmed(num_samples) == Window(num_frames)


@given(st.integers(1, 3 * 1500 * 320), st.integers(1, 1500))
def test_a_trimmed_window_holds_the_utterance_and_lies_in_the_window(num_samples: int, num_frames: int) -> None:
    window, needed = Window(num_frames), lengths.encoder_frames(num_samples)
    trimmed = window.trimmed(num_samples).num_frames
    assert trimmed == num_frames or needed + TRIMMED_MARGIN <= trimmed < needed + TRIMMED_MARGIN + TRIMMED_STEP
    assert trimmed <= num_frames and (trimmed == num_frames or trimmed % TRIMMED_STEP == 0)


@pytest.mark.parametrize("num_samples", [1, 200, 320, 321, 16_000, 36_801, 47_999, 48_000])
def test_a_trimmed_mel_is_the_stock_extractors_cut(full: SpeechEncoder, num_samples: int) -> None:
    """To the last digits of fp32; also the loudest frame, which sets the floor, may lie behind the cut."""
    stock = full.extractor(noise(num_samples), sampling_rate=RATE, return_tensors="pt")["input_features"]
    kept = WINDOW.trimmed(num_samples)
    ours = full.log_mels([noise(num_samples)], kept=kept)
    torch.testing.assert_close(ours, stock[:, :, : 2 * kept.num_frames], rtol=0, atol=5e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 48_000))
def test_every_length_keeps_its_frames(trimmed: SpeechEncoder, num_samples: int) -> None:
    (frames,) = trimmed.encode([noise(num_samples)])
    assert frames.shape == (lengths.encoder_frames(num_samples), trimmed.frame_size) and frames.isfinite().all()


@pytest.mark.parametrize("num_samples", [48_000, 47_681, 320 * 116])
def test_trimmed_at_full_length_is_full(full: SpeechEncoder, trimmed: SpeechEncoder, num_samples: int) -> None:
    waveforms = [noise(num_samples)]
    assert torch.equal(trimmed.encode(waveforms)[0], full.encode(waveforms)[0])


def test_shorter_than_the_window_is_stock_whisper_with_a_shorter_window(base: str, full: SpeechEncoder) -> None:
    """The same weights in a Whisper whose window is 75 frames: its frames are ours."""
    mels = full.log_mels([noise(20_000), noise(9_000, 1)], kept=Window(75))
    short = SpeechEncoder(base, FP32).model
    short.config.max_source_positions = 75
    short.embed_positions = torch.nn.Embedding.from_pretrained(full.model.embed_positions.weight[:75])
    with torch.inference_mode():
        assert torch.equal(encode_mels(full.model, mels, 75), short(mels).last_hidden_state)


def test_trimmed_frames_are_others_but_near(full: SpeechEncoder, trimmed: SpeechEncoder) -> None:
    waveform = noise(16_000)
    a, b = trimmed.encode([waveform])[0].float(), full.encode([waveform])[0].float()
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a, b).mean() > 0.8


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 48_000), min_size=1, max_size=6))
def test_neighbours_in_the_batch_change_nothing(trimmed: SpeechEncoder, sizes: list[int]) -> None:
    """Lengths that share a window and lengths that do not, in any order: in fp32, but for the products' rounding."""
    waveforms = [noise(size, seed) for seed, size in enumerate([*sizes, 9_000, 11_000, 9_001])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graft.model.encoder.FEATURE_DTYPE", FP32)
        for waveform, frames in zip(waveforms, trimmed.encode(waveforms), strict=True):
            torch.testing.assert_close(frames, trimmed.encode([waveform])[0], rtol=1e-5, atol=1e-5)


def test_no_forward_pads(trimmed: SpeechEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(
        "graft.model.encoder.encode_mels",
        lambda model, mels, count: shapes.append(mels.shape) or encode_mels(model, mels, count),
    )
    trimmed.encode([noise(size) for size in (9_000, 30_000, 9_500, 48_000)])
    assert shapes == [(2, 16, 100), (1, 16, 250), (1, 16, 300)]


def test_longer_than_the_window_is_still_an_error(trimmed: SpeechEncoder) -> None:
    with pytest.raises(WindowExceeded, match=r"48001 samples .*48000"):
        trimmed.encode([noise(48_001)])


def test_the_fingerprint_tells_the_window(full: SpeechEncoder, trimmed: SpeechEncoder) -> None:
    assert re.fullmatch("[0-9a-f]{64}", full.fingerprint)
    assert trimmed.fingerprint == f"{full.fingerprint}-trimmed{TRIMMED_MARGIN}+{TRIMMED_STEP}"
    assert (window_of(full.fingerprint), window_of(trimmed.fingerprint)) == ("full", "trimmed")


def test_a_projector_of_the_other_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"encoder_fingerprint": "a" * 64 + "-trimmed10+25"}))
    check_encoder(tmp_path, "a" * 64 + "-trimmed10+25")
    with pytest.raises(
        ValueError, match="trained on features of audio.window=trimmed, the recipe has audio.window=full"
    ):
        check_encoder(tmp_path, "a" * 64)


def test_a_model_that_holds_its_encoder_hears_full_windows(tmp_path: Path) -> None:
    folders = tiny.whisper_folder(tmp_path / "whisper"), tiny.qwen2_vl_folder(tmp_path / "qwen2_vl")
    assemble(made := tiny.recipe(*folders, audio={"window": "trimmed"}))
    with pytest.raises(ValueError, match="audio.window is 'trimmed', and a model that holds its encoder hears full"):
        assemble(made, with_encoder=True)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal, but for one bit of bf16: products of more rows are rounded otherwise."""
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)


def recipe(manifest: Path, shards: Path, base: str, window: str = "trimmed", **data: object) -> Recipe:
    return Recipe(
        bases={"whisper": base, "qwen2_vl": "none"},
        audio={"encode_batch_size": 2, "max_rejects": 0.1, "window": window},
        data={"manifests": {"train": str(manifest)}, "shards": str(shards), "samples_per_shard": 9} | data,
        run={"precision": "fp32"},
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), 20, lambda n: 0.2 + 0.137 * (n * 7 % 20))


@pytest.fixture(scope="module")
def made(manifest: Path, trimmed: SpeechEncoder, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = tmp_path_factory.mktemp("made")
    precompute(recipe(manifest, shards, base), "train", trimmed, Ranks())
    return shards


def test_shards_hold_each_utterances_frames_in_the_manifests_order(
    made: Path, manifest: Path, trimmed: SpeechEncoder
) -> None:
    """Brought together by their windows to be encoded, written where the manifest has them."""
    import soundfile

    opened = FeatureSet.open(made / "train", trimmed.fingerprint)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [entry.id for entry in opened.entries] == [line["id"] for line in lines]
    for number, line in enumerate(lines):
        waveform, _ = soundfile.read(manifest.parent / line["audio_filepath"], dtype="float32")
        assert_same(opened.read(number), trimmed.encode([waveform])[0])
    assert verify_set(made / "train").faults == []


def test_each_forward_is_of_one_window_and_full(
    manifest: Path, trimmed: SpeechEncoder, base: str, tmp_path: Path
) -> None:
    """Nine utterances of a shard in as few forwards of two as their windows allow, not in the manifest's pairs."""
    job = Job.prepare(recipe(manifest, tmp_path, base), "train", trimmed)
    pieces = [noise(size) for size in (9_000, 30_000, 9_500, 9_600, 30_001, 48_000)]
    assert Worker(job, trimmed, Ranks(), [])._together(pieces) == [[0, 2], [3], [1, 4], [5]]


@pytest.mark.faults
@pytest.mark.parametrize("lost", ["train-000000.tar", "train-000002.tar", "index.json"])
def test_trimmed_shards_resume_to_the_same_bytes(
    made: Path, manifest: Path, trimmed: SpeechEncoder, base: str, tmp_path: Path, lost: str
) -> None:
    """What is missing is made again, by other ranks than before."""
    job = Job.prepare(settings := recipe(manifest, tmp_path, base), "train", trimmed)
    precompute(settings, "train", trimmed, Ranks())
    (job.folder / lost).unlink()
    todo = job.unfinished()
    job.begin(todo)
    for rank in (1, 0):
        Worker(job, trimmed, Ranks(rank, 2), todo).run()
    job.merge()
    assert files(job.folder) == files(made / "train")


def test_the_other_window_is_refused_where_a_set_is_made(
    made: Path, manifest: Path, full: SpeechEncoder, base: str
) -> None:
    before = files(made / "train")
    with pytest.raises(
        ValueError, match=r"another feature set: audio.window was trimmed, is now full\. Give data.shards"
    ):
        precompute(recipe(manifest, made, base, "full"), "train", full, Ranks())
    assert files(made / "train") == before


def test_a_set_older_than_the_setting_is_one_of_full_windows(
    manifest: Path, full: SpeechEncoder, trimmed: SpeechEncoder, base: str, tmp_path: Path
) -> None:
    settings = recipe(manifest, tmp_path, base, "full")
    precompute(settings, "train", full, Ranks())
    index = tmp_path / "train" / "index.json"
    told = json.loads(index.read_text())
    del told["settings"]["window"]
    index.write_text(json.dumps(told))
    precompute(settings, "train", full, Ranks())
    job = Job.prepare(replace_window(settings), "train", trimmed)
    with pytest.raises(ValueError, match=r"set: audio.window was full, is now trimmed\."):
        check_existing(job.folder, job.description)
    with pytest.raises(ValueError, match="made by another encoder, manifest or settings"):
        finished_part(job.folder, replace(job.description), 0)


def replace_window(settings: Recipe) -> Recipe:
    return settings.model_copy(update={"audio": settings.audio.model_copy(update={"window": "trimmed"})})


def test_the_other_window_is_refused_where_a_set_is_read(made: Path, manifest: Path, base: str) -> None:
    assert len(Sources(recipe(manifest, made, base), Ranks(), "cpu").open("train").entries) == 20
    with pytest.raises(
        ValueError, match="made with audio.window=trimmed, the recipe has audio.window=full: set audio.w"
    ):
        Sources(recipe(manifest, made, base, "full"), Ranks(), "cpu").open("train")


def test_online_features_are_those_of_the_shards(made: Path, manifest: Path, base: str, tmp_path: Path) -> None:
    shards = Sources(recipe(manifest, made, base), Ranks(), "cpu").open("train")
    online = Sources(recipe(manifest, tmp_path, base, features="online"), Ranks(), "cpu").open("train")
    wanted = [13, 2, 7, 0]
    for ours, theirs in zip(online.read_many(wanted), shards.read_many(wanted), strict=True):
        assert_same(ours, theirs)


def test_transcribe_hears_as_the_run_was_trained(tmp_path: Path) -> None:
    """A run on trimmed windows is transcribed over trimmed windows; full ones are refused by name."""
    from graft.recipe import load_recipe
    from graft.run_dir import find_checkpoint
    from launch.transcribe import Scribe

    run_dir = tiny_run(tmp_path, audio={"window": "trimmed"})
    sound = str(tmp_path / "corpus" / "u0.flac")
    settings = load_recipe(run_dir / "recipe.yaml")
    scribe = Scribe(settings, find_checkpoint(run_dir), torch.device("cpu"), None)
    online = Sources(settings, Ranks(), "cpu").open("test")
    assert torch.equal(scribe.hear(sound).audio_features, online.read_many([0])[0])
    other = load_recipe(run_dir / "recipe.yaml", ["audio.window=full"])
    with pytest.raises(
        ValueError, match="trained on features of audio.window=trimmed, the recipe has audio.window=full"
    ):
        Scribe(other, find_checkpoint(run_dir), torch.device("cpu"), None)


def test_mels_share_memory_but_nothing_else(full: SpeechEncoder) -> None:
    """A long waveform before a short one leaves no trace in it, in either order."""
    clips = [noise(47_000, 1), noise(900, 2), np.zeros(5_000, np.float32), noise(21_000, 3)]
    alone = torch.cat([full.log_mels([clip]) for clip in clips])
    assert torch.equal(full.log_mels(clips), alone)
    assert torch.equal(full.log_mels(clips[::-1]), alone.flip(0))
