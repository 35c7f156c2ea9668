"""The frozen encoder: real weights or an error, exactly its window, the same frames alone and in a batch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_bases as tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from graft.data.audio import load_audio
from graft.lengths import Window, WindowExceeded
from graft.model import encoder as encoder_module
from graft.model.attention import ALL_IN_BLOCKS
from graft.model.encoder import SpeechEncoder, load_encoder, load_feature_extractor
from graft.model.mels import LogMels, mel_settings

FP32 = torch.float32
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.whisper_folder(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def encoder(base: Path) -> SpeechEncoder:
    return SpeechEncoder(str(base), FP32)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


def renamed(base: Path, folder: Path, pattern: str, replacement: str) -> Path:
    """A copy of ``base`` whose weights carry other names."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = {re.sub(pattern, replacement, name): t for name, t in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["model.encoder.", "encoder.", ""])
def test_weights_are_those_of_the_file(base: Path, tmp_path: Path, prefix: str) -> None:
    """A full Whisper, a WhisperModel and an encoder alone: all are found, bit for bit."""
    folder = renamed(base, tmp_path / "base", r"^model\.encoder\.", prefix)
    stored = load_file(base / "model.safetensors")
    loaded = load_encoder(str(folder), FP32).state_dict()
    assert len(loaded) > 30
    for name, weight in loaded.items():
        assert torch.equal(weight, stored[f"model.encoder.{name}"]), name


def test_missing_weights_are_an_error_that_names_them(base: Path, tmp_path: Path) -> None:
    folder = renamed(base, tmp_path / "base", r"layers\.1\.fc1\.weight", "layers.1.fc9.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights: layers\.1\.fc1\.weight"):
        load_encoder(str(folder), FP32)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.qwen2_vl_folder(tmp_path / "qwen")
    with pytest.raises(ValueError, match="holds a 'qwen2_vl', a 'whisper' was expected"):
        load_encoder(str(folder), FP32)


def test_mel_bins_must_fit(base: Path, tmp_path: Path) -> None:
    folder = renamed(base, tmp_path / "base", "^", "")
    WhisperFeatureExtractor(feature_size=17, chunk_length=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="mel feature_size is 17, expected 16"):
        SpeechEncoder(str(folder), FP32)


def test_frames_are_those_of_stock_whisper(base: Path, encoder: SpeechEncoder) -> None:
    waveform = noise(7_777)
    stock = WhisperForConditionalGeneration.from_pretrained(base, dtype=FP32).eval()
    mel = WhisperFeatureExtractor.from_pretrained(base)(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = stock.model.encoder(mel["input_features"]).last_hidden_state[0]
    (frames,) = encoder.encode([waveform])
    assert frames.shape == (25, 24) and frames.dtype == torch.bfloat16 and frames.device.type == "cpu"
    assert torch.equal(frames, expected[:25].bfloat16())


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 1), (320, 1), (321, 2), (15_999, 50), (16_000, 50)])
def test_frames_reach_to_the_true_length(encoder: SpeechEncoder, num_samples: int, num_frames: int) -> None:
    assert encoder.encode([noise(num_samples)])[0].shape == (num_frames, encoder.frame_size)


def test_frames_are_the_same_alone_and_in_a_batch(encoder: SpeechEncoder) -> None:
    """Mels to the bit. Frames but for the last digit of fp32, in which products of more rows may be rounded otherwise
    (they are with AVX-512): where that falls between two numbers of bf16, one step of bf16."""
    waveforms = [noise(n, seed) for seed, n in enumerate([16_000, 333, 9_001, 4_801, 12_345])]
    mels = encoder.log_mels(waveforms)
    for waveform, mel, frames in zip(waveforms, mels, encoder.encode(waveforms), strict=True):
        assert torch.equal(encoder.log_mels([waveform])[0], mel)
        alone = encoder.encode([waveform])[0]
        torch.testing.assert_close(alone, frames, rtol=2**-7, atol=1e-6)
        assert (alone != frames).float().mean() < 0.01


def test_in_bf16_frames_are_as_near_to_fp32_as_stock_whispers() -> None:
    """Of the trained tiny Whisper, cut behind the last layer's keys, with attention in blocks."""
    base = str(ROOT / "examples" / "tiny" / "whisper")
    sounds = sorted((ROOT / "examples" / "tiny" / "corpus" / "audio" / "test").glob("*.ogg"))[:7]
    waveforms = [load_audio(sound)[:60_000] for sound in sounds]
    fp32, bf16 = SpeechEncoder(base, FP32), SpeechEncoder(base, torch.bfloat16)
    assert bf16.model.config._attn_implementation == ALL_IN_BLOCKS
    stock = load_encoder(base, torch.bfloat16)
    with torch.no_grad():
        theirs = stock(bf16.log_mels(waveforms).bfloat16()).last_hidden_state
    ours, true = bf16.encode(waveforms), fp32.encode(waveforms)
    theirs = [row[: len(frames)] for row, frames in zip(theirs, true, strict=True)]
    assert [frames.shape for frames in ours] == [frames.shape for frames in true]
    off, stocks = ((torch.cat(each).float() - torch.cat(true).float()).norm() for each in (ours, theirs))
    assert 0 < off <= 1.1 * stocks < 0.01 * torch.cat(true).float().norm()


def test_on_a_cpu_as_many_frames_go_in_at_a_time_as_the_cache_holds(
    encoder: SpeechEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows, two and one: the same utterances in the same order."""
    waveforms = [noise(3200 + 640 * number, number) for number in range(5)]
    whole, windows = encoder.encode(waveforms), []
    monkeypatch.setattr(encoder_module, "CACHED_FRAMES", 2 * encoder.window.num_frames)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    hook = encoder.model.conv1.register_forward_pre_hook(lambda _, inputs: windows.append(len(inputs[0])))
    parts = encoder.encode(waveforms)
    hook.remove()
    assert windows == [2, 2, 1]
    for part, frames in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, frames, rtol=2e-2, atol=2e-2)  # a step of bf16


def test_the_seed_cut_long_audio_in_silence_and_we_do_not(base: Path, encoder: SpeechEncoder) -> None:
    """Row 6. The seed gave any waveform to the extractor, which cuts at the window and says nothing."""
    long, kept = noise(19_999), noise(19_999)[:16_000]
    extractor = WhisperFeatureExtractor.from_pretrained(base)
    cut, whole = (extractor(w, sampling_rate=16_000, return_tensors="np")["input_features"] for w in (long, kept))
    assert np.array_equal(cut, whole), "the extractor no longer cuts: this experiment has lost its meaning"
    with pytest.raises(WindowExceeded, match=r"19999 samples \(1\.25 s\).*16000 \(1\.00 s, 50 frames\)"):
        encoder.encode([noise(100), long])


@pytest.mark.parametrize("waveform", [np.zeros(0, np.float32), np.zeros((2, 500), np.float32)])
def test_what_is_not_a_waveform_is_refused(encoder: SpeechEncoder, waveform: np.ndarray) -> None:
    with pytest.raises(ValueError, match="waveform 1 of 2 has shape"):
        encoder.encode([noise(100), waveform])


def test_the_window_comes_from_the_config(tmp_path: Path) -> None:
    folder = tiny.whisper_folder(tmp_path / "wide", max_source_positions=150)
    encoder = SpeechEncoder(str(folder), FP32)
    assert encoder.window == Window(150) and encoder.window.seconds == 3
    assert encoder.encode([noise(40_000)])[0].shape == (125, 24)


def test_it_is_frozen(encoder: SpeechEncoder) -> None:
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.encode([noise(500)])[0].requires_grad


def test_fingerprint_is_of_the_encoder_not_of_the_precision(tmp_path: Path) -> None:
    folder = str(tiny.whisper_folder(tmp_path / "bf16", dtype=torch.bfloat16))
    fp32, bf16 = SpeechEncoder(folder, FP32), SpeechEncoder(folder, torch.bfloat16)
    assert fp32.fingerprint == bf16.fingerprint and re.fullmatch("[0-9a-f]{64}", fp32.fingerprint)


def test_fingerprint_changes_with_one_bit_or_the_mel(base: Path, encoder: SpeechEncoder, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    folder = renamed(base, tmp_path / "base", "^", "")
    name = "model.encoder.layers.1.fc2.bias"
    bits = weights[name].bfloat16().view(torch.int16)
    bits[3] ^= 1
    save_file({**weights, name: bits.view(torch.bfloat16).float()}, folder / "model.safetensors", {"format": "pt"})
    assert SpeechEncoder(str(folder), FP32).fingerprint != encoder.fingerprint

    folder = renamed(base, tmp_path / "other_mel", "^", "")
    WhisperFeatureExtractor(feature_size=16, chunk_length=1, n_fft=512).save_pretrained(folder)
    changed = SpeechEncoder(str(folder), FP32)
    assert changed.fingerprint != encoder.fingerprint
    assert changed.mel_settings == {**mel_settings(encoder.extractor, encoder.window), "n_fft": 512}


@pytest.mark.parametrize("num_bins", [80, 128])
def test_mels_are_the_stock_extractors(num_bins: int) -> None:
    """To the last digits of fp32, of lengths around the hop, the transform and the window, in one batch."""
    window, extractor = Window(200), WhisperFeatureExtractor(feature_size=num_bins)
    chance = np.random.default_rng(1)
    ends = [window.num_samples - less for less in (0, 1, 160, 200, 399, 400, 401)]
    waveforms = [chance.standard_normal(n).astype(np.float32) for n in (1, 5, 159, 160, 161, 400, 9_999, 20_000, *ends)]
    waveforms.append(np.zeros(8_000, dtype=np.float32))
    stock = extractor(
        waveforms, sampling_rate=16_000, padding="max_length", max_length=window.num_samples, return_tensors="pt"
    )
    torch.testing.assert_close(LogMels(extractor, window)(waveforms), stock["input_features"], rtol=0, atol=5e-7)


def test_an_extractor_with_dither_is_refused(base: Path, tmp_path: Path) -> None:
    """It draws noise: two encodings of an utterance would differ."""
    WhisperFeatureExtractor.from_pretrained(base, dither=0.1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"mel dither is 0\.1, expected 0\.0"):
        load_feature_extractor(str(tmp_path))
