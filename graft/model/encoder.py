"""The frozen Whisper encoder: waveforms in, frames out, always over its full window.

S: samples at 16 kHz    F: encoder frames of 20 ms, ceil(S / 320)    D: size of a frame
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from graft import lengths
from graft.lengths import Window
from graft.model.bases import load_config, reading, refuse_missing
from graft.model.config import FEATURE_DTYPE

KEY = "bases.whisper"  # of the recipe
MEL_FLOOR_LOG10, MEL_RANGE_LOG10 = -10.0, 8.0  # of Whisper's log-mels (arXiv 2212.04356): powers of ten
FEWEST_MEL_FRAMES = 64  # at a time: matrix products of very few columns are rounded otherwise than those of many
# Of a full Whisper: model.encoder.* (WhisperForConditionalGeneration) or encoder.* (WhisperModel). Without this,
# WhisperEncoder.from_pretrained finds none of its names and returns random weights with a mere warning.
_KEY_MAPPING = {r"^model\.encoder\.": "", r"^encoder\.": ""}


class EncoderOnly(WhisperEncoder):
    """Whisper's encoder, loaded from a full Whisper without a report on the decoder it leaves out."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"proj_out\."]


def load_audio_config(base: str) -> WhisperConfig:
    """The config of a Whisper folder or hub name.

    Raises:
        ValueError: if it is something else.
    """
    return load_config(KEY, base, WhisperConfig)


def load_feature_extractor(base: str) -> WhisperFeatureExtractor:
    """Whisper's own mel extractor, checked against the encoder beside it.

    Raises:
        ValueError: if rate, hop or number of mel bins are not those the encoder takes.
    """
    with reading(KEY, base):
        extractor = WhisperFeatureExtractor.from_pretrained(base)
    expected = {
        "sampling_rate": lengths.SAMPLE_RATE,
        "hop_length": lengths.SAMPLES_PER_MEL_FRAME,
        "feature_size": load_audio_config(base).num_mel_bins,
        "dither": 0.0,
        "padding_value": 0.0,
    }
    for name, value in expected.items():
        if getattr(extractor, name) != value:
            raise ValueError(f"{KEY}: {base}: mel {name} is {getattr(extractor, name)}, expected {value}")
    return extractor


def load_encoder(base: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> WhisperEncoder:
    """The encoder of a Whisper folder or hub name, frozen, in ``dtype``.

    Raises:
        ValueError: if ``base`` lacks any of its weights.
    """
    load_audio_config(base)
    with reading(KEY, base):
        encoder, info = EncoderOnly.from_pretrained(
            base, dtype=dtype, key_mapping=_KEY_MAPPING, output_loading_info=True, device_map={"": device}
        )
    refuse_missing(KEY, base, info["missing_keys"])
    return encoder.eval().requires_grad_(False)


class SpeechEncoder:
    """A frozen encoder with its mel extractor: what makes feature shards, and the same frames on the fly."""

    def __init__(self, base: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"):
        self.base = base
        self.extractor = load_feature_extractor(base)
        self.model = load_encoder(base, dtype, device)
        self.dtype = dtype
        self.device = torch.device(device)
        self.window = Window(self.model.config.max_source_positions)
        self.frame_size: int = self.model.config.d_model
        self.mel_settings = mel_settings(self.extractor, self.window)
        self.fingerprint = fingerprint(self.model, self.mel_settings)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Waveforms (S_i,) float32, 16 kHz -> frames (F_i, D), bf16 on the CPU, one forward for all.

        Every waveform is padded to the full window before its mel is made, as Whisper was trained, and the frames
        are cut to the true length afterwards.

        Raises:
            WindowExceeded: if one is longer than the window; it names both lengths.
            ValueError: if one is empty or not one-dimensional.
        """
        for index, waveform in enumerate(waveforms):
            _check_waveform(waveform, f"waveform {index} of {len(waveforms)}", self.window)
        mels = log_mels(self.extractor, waveforms, self.window, self.device).to(self.device, self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            frames = self.model(mels).last_hidden_state.to(FEATURE_DTYPE).cpu()
        counts = [lengths.encoder_frames(len(waveform)) for waveform in waveforms]
        return [row[:count].clone() for row, count in zip(frames, counts, strict=True)]


def log_mels(
    extractor: WhisperFeatureExtractor,
    waveforms: Sequence[np.ndarray],
    window: Window,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Waveforms (S_i,), none longer than the window -> log-mels (W, n_mels, 2F) of the full window, fp32.

    What Whisper's own extractor makes of the padded window, but the spectrum is taken of the samples that are there:
    behind them is silence, whose log-mel is the floor.
    """
    filters = torch.from_numpy(extractor.mel_filters).to(device, torch.float32)  # (n_fft / 2 + 1, n_mels)
    hann = torch.hann_window(extractor.n_fft, device=device)
    hop, num_frames = extractor.hop_length, window.num_samples // extractor.hop_length
    mels = torch.empty((len(waveforms), filters.shape[1], num_frames), device=device)
    for mel, waveform in zip(mels, waveforms, strict=True):
        # The last frame that hears a sample, and a mirror at the end that sees silence alone, need n_fft zeros.
        frames = min(max(-(-(len(waveform) + extractor.n_fft) // hop), FEWEST_MEL_FRAMES), num_frames)
        samples = torch.zeros(frames * hop, device=device)
        samples[: len(waveform)] = torch.as_tensor(waveform, dtype=torch.float32)
        spectrum = torch.stft(samples, extractor.n_fft, hop, window=hann, return_complex=True)[:, :-1]
        log_mel = (filters.T @ spectrum.abs() ** 2).clamp_(min=10**MEL_FLOOR_LOG10).log10_()
        quietest = log_mel.max() - MEL_RANGE_LOG10
        mel[:, :frames] = (torch.maximum(log_mel, quietest) + 4.0) / 4.0
        mel[:, frames:] = (quietest.clamp(min=MEL_FLOOR_LOG10) + 4.0) / 4.0
    return mels


def mel_settings(extractor: WhisperFeatureExtractor, window: Window) -> dict[str, int | float]:
    """What a mel depends on besides the waveform."""
    names = ("sampling_rate", "feature_size", "n_fft", "hop_length", "padding_value", "dither")
    return {**{name: getattr(extractor, name) for name in names}, "num_samples": window.num_samples}


def fingerprint(encoder: WhisperEncoder, mel: dict[str, int | float]) -> str:
    """SHA-256 over the mel settings and the weights, ordered by name, as bf16 bits.

    bf16 whatever the precision they are held in, so that an encoder loaded in bf16 and in fp32 is the same encoder.
    """
    digest = hashlib.sha256(json.dumps(mel, sort_keys=True).encode())
    for name, weight in sorted(encoder.state_dict().items()):
        bits = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(bits.numpy().data)
    return digest.hexdigest()


def _check_waveform(waveform: np.ndarray, who: str, window: Window) -> None:
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"{who} has shape {waveform.shape}: a mono waveform (S,) with at least one sample is expected")
    window.check(len(waveform), who)
