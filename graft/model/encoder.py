"""The frozen Whisper encoder: waveforms in, frames out, over its full window or over as much of it as is needed.

S: samples at 16 kHz    F: encoder frames of 20 ms, ceil(S / 320)    C: those of them that are asked for
D: size of a frame    W: windows
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from graft import lengths
from graft.lengths import Window
from graft.model.attention import ALL_IN_BLOCKS
from graft.model.bases import load_config, reading, refuse_missing
from graft.model.config import FEATURE_DTYPE
from graft.model.mels import LogMels, mel_settings
from graft.run_dir import TRIMMED

AudioWindow = Literal["full", "trimmed"]

KEY = "bases.whisper"  # of the recipe
CACHED_FRAMES = 1_600  # at a time, of each thread of a CPU: what passes from layer to layer stays in its cache
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
    """A frozen encoder with its mel extractor: what makes feature shards, and the same frames on the fly.

    With ``audio_window="full"`` it always runs over its whole window, as Whisper was trained: its frames are exact.
    With ``"trimmed"`` it runs over the half seconds that hold the utterance: less work, somewhat other frames.

    In fp32 full windows give stock Whisper's frames bit by bit. In bf16 they are rounded in other places, and as near
    to those of fp32: behind its keys and values the last layer works on the utterances' own positions alone, and on a
    CPU attention is :func:`graft.model.attention.attend_all`.
    """

    def __init__(
        self,
        base: str,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        audio_window: AudioWindow = "full",
    ):
        self.base, self.audio_window = base, audio_window
        self.extractor = load_feature_extractor(base)
        self.model = load_encoder(base, dtype, device)
        self.dtype, self.is_stock = dtype, dtype == torch.float32
        self.device = torch.device(device)
        if dtype == torch.bfloat16 and self.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.model.set_attn_implementation(ALL_IN_BLOCKS)
        self.window = Window(self.model.config.max_source_positions)
        self.frame_size: int = self.model.config.d_model
        self.log_mels = LogMels(self.extractor, self.window, self.device)
        self.mel_settings = mel_settings(self.extractor, self.window)
        self.fingerprint = fingerprint(self.model, self.mel_settings)
        if audio_window == "trimmed":
            self.fingerprint += f"{TRIMMED}{lengths.TRIMMED_MARGIN}+{lengths.TRIMMED_STEP}"

    def window_of(self, num_samples: int) -> Window:
        """The window over which ``num_samples`` samples are encoded."""
        return self.window.trimmed(num_samples) if self.audio_window == "trimmed" else self.window

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Waveforms (S_i,) float32, 16 kHz -> frames (F_i, D), bf16 on the CPU, one forward for all of one window.

        Every waveform is padded to the full window before its mel is made, as Whisper was trained, and the frames
        are cut to the true length afterwards. Of a trimmed window the mel is cut before the encoder hears it. No
        forward holds waveforms of different windows, so none is padded for another's sake.

        Raises:
            WindowExceeded: if one is longer than the window; it names both lengths.
            ValueError: if one is empty or not one-dimensional.
        """
        for index, waveform in enumerate(waveforms):
            _check_waveform(waveform, f"waveform {index} of {len(waveforms)}", self.window)
        together: dict[Window, list[int]] = {}
        order = range(len(waveforms))  # where lengths matter, like ones together
        for index in order if self.is_stock else sorted(order, key=lambda index: len(waveforms[index])):
            together.setdefault(self.window_of(len(waveforms[index])), []).append(index)
        made: dict[int, torch.Tensor] = {}
        for window, indices in together.items():
            made.update(zip(indices, self._forward([waveforms[i] for i in indices], window), strict=True))
        return [made[index] for index in range(len(waveforms))]

    def _forward(self, waveforms: Sequence[np.ndarray], window: Window) -> list[torch.Tensor]:
        """Frames (F_i, D) of waveforms that share a window."""
        mels = self.log_mels(waveforms, kept=window)
        on_cpu = self.device.type == "cpu"
        together = max(1, CACHED_FRAMES * torch.get_num_threads() // window.num_frames) if on_cpu else len(mels)
        counts = [lengths.encoder_frames(len(waveform)) for waveform in waveforms]
        rows: list[torch.Tensor] = []
        with torch.autocast(self.device.type, enabled=False):
            for part in mels.split(together):
                wanted = counts[len(rows) : len(rows) + len(part)]
                most = window.num_frames if self.is_stock else max(wanted)
                frames = encode_mels(self.model, part.to(self.device, self.dtype), most)
                rows += (row[:count] for row, count in zip(frames, wanted, strict=True))
        return _on_the_host(rows)


def _on_the_host(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Frames (F_i, D) in bf16; from a GPU in one copy, into page-locked memory: several times as fast as into other."""
    device = rows[0].device
    if device.type == "cpu":
        return [row.to(FEATURE_DTYPE, copy=True) for row in rows]  # what stands behind them is let go
    together = torch.cat(list(rows)).to(FEATURE_DTYPE).to("cpu", non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return list(together.split([len(row) for row in rows]))


def encode_mels(encoder: WhisperEncoder, mels: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Log-mels (W, n_mels, 2F) -> the first ``num_frames`` frames (W, C, D), for F up to the encoder's window.

    This is ``WhisperEncoder.forward`` (transformers 5, models/whisper/modeling_whisper.py) without its insistence on
    the full length, with the first F positions. All of them are heard, but behind the last layer's keys and values
    those alone are computed that are asked for.
    """
    hidden = F.gelu(encoder.conv1(mels))
    hidden = F.gelu(encoder.conv2(hidden)).permute(0, 2, 1)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    *layers, last = encoder.layers
    for layer in layers:
        hidden = layer(hidden, None)
    heard = last.self_attn_layer_norm(hidden)
    attended, _ = last.self_attn(heard[:, :num_frames], key_value_states=heard)
    hidden = hidden[:, :num_frames] + attended
    hidden = hidden + last.fc2(last.activation_fn(last.fc1(last.final_layer_norm(hidden))))
    return encoder.layer_norm(hidden)


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
