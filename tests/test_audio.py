"""Sound files in, waveforms or clear errors out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.audio import AudioError, check_length, header_duration, load_audio, read_pcm, windows, write_pcm
from graft.lengths import SAMPLE_RATE, Window, WindowExceeded, encoder_frames

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (real recordings) is not there")


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def test_samples_come_back_untouched(tmp_path: Path) -> None:
    written = np.array([0.5, -0.25, 0.0, 0.125, -1.0], np.float32)
    soundfile.write(tmp_path / "a.wav", written, SAMPLE_RATE, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav")
    assert loaded.dtype == np.float32 and loaded.shape == (5,)
    np.testing.assert_array_equal(loaded, written)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_every_format_and_rate_becomes_16_khz(tmp_path: Path, suffix: str, rate: int) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(0.7, rate), rate)
    waveform = load_audio(path)
    assert waveform.ndim == 1
    assert abs(len(waveform) - 0.7 * SAMPLE_RATE) < 0.1 * SAMPLE_RATE  # mp3 pads to whole frames
    spectrum = np.abs(np.fft.rfft(waveform))
    assert abs(spectrum.argmax() * SAMPLE_RATE / len(waveform) - 440) < 5
    assert abs(np.abs(waveform[2000:8000]).max() - 0.5) < 0.05


def test_channels_are_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([[0.5, 0.25], [-0.5, 0.0]]), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), [0.375, -0.25])


def test_a_piece_of_a_file(tmp_path: Path) -> None:
    ramp = np.arange(SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE
    soundfile.write(tmp_path / "a.wav", ramp, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", 0.25, 0.5), ramp[4000:12000])
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", 0.75), ramp[12000:])
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", duration=0.5), ramp[:8000])


def test_a_rounded_duration_cuts_nothing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.0049, SAMPLE_RATE), SAMPLE_RATE)
    assert len(load_audio(tmp_path / "a.wav", duration=1.0)) == 16078
    assert len(load_audio(tmp_path / "a.wav", duration=1.01)) == 16078


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def wav(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "none.wav", "no such file"),
        (lambda folder: write_bytes(folder / "a.wav", b""), "empty file"),
        (lambda folder: write_bytes(folder / "a.flac", b"this is not audio at all"), "not readable as audio"),
        (lambda folder: write_bytes(folder / "a.raw", b"0123456789"), "not readable as audio"),
        (lambda folder: wav(folder / "a.wav", np.zeros(0, np.float32)), "holds no samples"),
        (lambda folder: wav(folder / "a.wav", np.array([0.1, np.nan, 0.2], np.float32)), "NaN or infinite"),
        (lambda folder: wav(folder / "a.wav", np.array([0.1, np.inf, 0.2], np.float32)), "NaN or infinite"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, make, says: str) -> None:
    path = make(tmp_path)
    with pytest.raises(AudioError, match=says) as error:
        load_audio(path)
    assert str(path) in str(error.value)


def test_an_offset_beyond_the_end(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="holds no samples"):
        load_audio(wav(tmp_path / "a.wav", tone(0.5, SAMPLE_RATE)), offset=0.75)


def test_a_file_shorter_than_its_manifest_says(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", tone(1.0, SAMPLE_RATE))
    with pytest.raises(AudioError, match="1.000 s of audio, its manifest line says 1.3 s"):
        load_audio(path, duration=1.3)
    assert len(load_audio(path, duration=1.09)) == SAMPLE_RATE


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_flac_is_not_shortened_in_silence(tmp_path: Path, keep: float) -> None:
    whole = tmp_path / "whole.flac"
    noise = np.random.default_rng(7).uniform(-0.5, 0.5, 3 * SAMPLE_RATE)
    soundfile.write(whole, noise, SAMPLE_RATE)
    data = whole.read_bytes()
    cut = write_bytes(tmp_path / "cut.flac", data[: int(keep * len(data))])
    with pytest.raises(AudioError):
        load_audio(cut)


def test_header_duration(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(22050), 44100)
    assert header_duration(tmp_path / "a.wav") == 0.5
    with pytest.raises(AudioError, match="no such file"):
        header_duration(tmp_path / "b.wav")
    with pytest.raises(AudioError, match="no samples"):
        header_duration(wav(tmp_path / "c.wav", np.zeros(0, np.float32)))


def test_check_length() -> None:
    check_length(Path("a"), 10.0, 10.09)
    check_length(Path("a"), 99.1, 100.0)
    check_length(Path("a"), 1.0, None)
    with pytest.raises(AudioError, match="9.850 s of audio, its manifest line says 10 s"):
        check_length(Path("a"), 9.85, 10.0)
    with pytest.raises(AudioError, match="no samples"):
        check_length(Path("a"), 0.0, None)


def test_pcm_comes_back_bit_by_bit(tmp_path: Path) -> None:
    samples = np.array([0, 1, -1, 32767, -32768, 129], np.int16)
    write_pcm(tmp_path / "a.flac", samples, 8000)
    read, rate = read_pcm(tmp_path / "a.flac")
    assert rate == 8000
    np.testing.assert_array_equal(read, samples)
    soundfile.write(tmp_path / "two.wav", np.zeros((5, 2)), 8000)
    with pytest.raises(AudioError, match="2 channels"):
        read_pcm(tmp_path / "two.wav")


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 17))
def test_joined_windows_lose_no_sample_and_no_frame(length: int, num_frames: int) -> None:
    waveform, window = np.arange(length, dtype=np.float32), Window(num_frames)
    pieces = windows(waveform, window, "join")
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)
    assert all(0 < len(piece) <= window.num_samples for piece in pieces)
    assert sum(encoder_frames(len(piece)) for piece in pieces) == encoder_frames(length)


def test_the_window_is_a_wall() -> None:
    window = Window(7)  # 2,240 samples
    waveform = np.arange(2241, dtype=np.float32)
    assert len(windows(waveform[:2240], window, "reject")) == 1
    with pytest.raises(WindowExceeded, match=r"'x' is 2241 samples \(0.14 s\).*holds 2240 \(0.14 s, 7 frames\)"):
        windows(waveform, window, "reject", "'x'")
    assert [len(piece) for piece in windows(waveform, window, "join")] == [2240, 1]
    (kept,) = windows(waveform, window, "truncate")
    np.testing.assert_array_equal(kept, waveform[:2240])


@needs_real
def test_a_real_recording() -> None:
    waveform = load_audio(REAL / "jfk.flac")
    assert len(waveform) == 176_000 and 0.1 < np.abs(waveform).max() <= 1.0
    assert len(load_audio(REAL / "fsdd" / "7_lucas_3.flac")) == pytest.approx(
        header_duration(REAL / "fsdd" / "7_lucas_3.flac") * SAMPLE_RATE, abs=1
    )
