"""Whisper's log-mels, made on the device where its encoder is.

S: samples at 16 kHz    F: encoder frames of 20 ms, ceil(S / 320)    W: waveforms
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from graft.lengths import Window

MEL_FLOOR_LOG10, MEL_RANGE_LOG10 = -10.0, 8.0  # of Whisper's log-mels (arXiv 2212.04356): powers of ten
NUM_BANDS = 4  # of the mel filters
MOST_AT_A_TIME = 64  # waveforms, on a GPU: of 30 s each they take 1 GB
FEWEST_MEL_FRAMES = 64  # at a time: matrix products of very few columns are rounded otherwise than those of many


class LogMels:
    """What Whisper's own extractor makes of waveforms padded to the window, to the last digits of fp32.

    The spectrum is taken of the samples that are there: behind them is silence, whose log-mel is the floor. What does
    not depend on the waveforms is brought to the device once; they go to a GPU all together, and the host does not wait
    for it.
    """

    def __init__(self, extractor: WhisperFeatureExtractor, window: Window, device: str | torch.device = "cpu") -> None:
        self.extractor, self.window, self.device = extractor, window, torch.device(device)
        self._hann = torch.hann_window(extractor.n_fft).to(self.device)
        self._bands = _bands(torch.from_numpy(extractor.mel_filters).float(), self.device)

    def __call__(self, waveforms: Sequence[np.ndarray], kept: Window | None = None) -> torch.Tensor:
        """Waveforms (S_i,), none longer than the window -> log-mels (W, n_mels, 2F), fp32.

        They are of the full window. Only what lies in ``kept`` is given.
        """
        num_kept, hop = (kept or self.window).num_mel_frames, self.extractor.hop_length
        # The last frame that hears a sample, and a mirror at the end that sees silence alone, need n_fft zeros.
        counts = [-(-(len(waveform) + self.extractor.n_fft) // hop) for waveform in waveforms]
        counts = [min(max(count, FEWEST_MEL_FRAMES), self.window.num_mel_frames) for count in counts]
        together = 1 if self.device.type == "cpu" else MOST_AT_A_TIME
        spectra = _Spectra(self._hann, hop, min(together, len(waveforms)), max(counts, default=0))
        shape = len(waveforms), self.extractor.feature_size, max(num_kept, *counts, 0)
        mels, brought = torch.empty(shape, device=self.device), _brought(waveforms, self.device)
        for first in range(0, len(waveforms), together):
            rows = slice(first, first + together)
            self._fill(mels[rows], spectra.power(brought[rows], max(counts[rows])))
        return mels[:, :, :num_kept]

    def _fill(self, mels: torch.Tensor, power: torch.Tensor) -> None:
        """Mels (W, n_mels, 2F) of power spectra (W, frames, bins), behind which is silence."""
        heard = mels[:, :, : power.shape[1]]
        for mel, spectrum in zip(heard, power, strict=True):
            for rows, bins, weights in self._bands:
                torch.mm(weights, spectrum[:, bins].T, out=mel[rows])
        heard.clamp_(min=10**MEL_FLOOR_LOG10).log10_()
        quietest = heard.amax((1, 2), keepdim=True) - MEL_RANGE_LOG10
        torch.maximum(heard, quietest, out=heard).add_(4.0).div_(4.0)
        mels[:, :, power.shape[1] :] = (quietest.clamp(min=MEL_FLOOR_LOG10) + 4.0) / 4.0


def mel_settings(extractor: WhisperFeatureExtractor, window: Window) -> dict[str, int | float]:
    """What a mel depends on besides the waveform."""
    names = ("sampling_rate", "feature_size", "n_fft", "hop_length", "padding_value", "dither")
    return {**{name: getattr(extractor, name) for name in names}, "num_samples": window.num_samples}


def _brought(waveforms: Sequence[np.ndarray], device: torch.device) -> Sequence[torch.Tensor]:
    """Waveforms (S_i,) in fp32 on the device; to a GPU in one copy from page-locked memory, which runs beside the host.

    Copied each by itself from where they are, each would wait until the GPU has done with the one before.
    """
    there = [torch.as_tensor(waveform, dtype=torch.float32) for waveform in waveforms]
    if device.type == "cpu" or not there:
        return there
    counts = [len(waveform) for waveform in there]
    locked = torch.cat(there, out=torch.empty(sum(counts), pin_memory=True))
    return locked.to(device, non_blocking=True).split(counts)


def _bands(filters: torch.Tensor, device: torch.device) -> list[tuple[slice, slice, torch.Tensor]]:
    """Mel filters (bins, n_mels) as NUM_BANDS products over neighbours: which mels, which bins, weights (mels, bins).

    A filter is zero outside of a few neighbouring bins: a quarter of them together need a third of all bins.
    """
    bands = []
    for mels in torch.arange(filters.shape[1]).tensor_split(NUM_BANDS):
        rows = slice(int(mels[0]), int(mels[-1]) + 1)
        heard = filters[:, rows].any(1).nonzero()
        bins = slice(int(heard.min()), int(heard.max()) + 1)
        bands.append((rows, bins, filters[bins, rows].T.contiguous().to(device)))
    return bands


class _Spectra:
    """Power spectra of some waveforms after the others, in the same memory: fresh pages cost as much as the transform.

    On a CPU that is one at a time, so that its cache holds them; on a GPU a kernel for each would be too little work.
    """

    def __init__(self, hann: torch.Tensor, hop: int, together: int, most_frames: int) -> None:
        self.n_fft, self.hop, self.hann = len(hann), hop, hann
        bins, device = self.n_fft // 2 + 1, hann.device
        self.samples = torch.empty((together, most_frames * self.hop + self.n_fft), device=device)
        self.windowed = torch.empty((together, most_frames, self.n_fft), device=device)
        self.spectrum = torch.empty((together, most_frames, bins), dtype=torch.complex64, device=device)
        self.squares = torch.empty((together, most_frames, bins), device=device)

    def power(self, waveforms: Sequence[torch.Tensor], frames: int) -> torch.Tensor:
        """Waveforms (S_i,) -> (W, frames, n_fft / 2 + 1), ``torch.stft(...).abs() ** 2``; valid until the next."""
        half, size, count = self.n_fft // 2, frames * self.hop, len(waveforms)
        samples = self.samples[:count, : size + self.n_fft]
        middle = samples[:, half : half + size]
        for row, waveform in zip(middle, waveforms, strict=True):
            row[: len(waveform)] = waveform
            row[len(waveform) :] = 0
        samples[:, :half] = middle[:, 1 : half + 1].flip(1)  # mirrored at both ends, without the sample at the end
        samples[:, half + size :] = middle[:, -half - 1 : -1].flip(1)
        windowed, spectrum = self.windowed[:count, :frames], self.spectrum[:count, :frames]
        torch.mul(samples.unfold(1, self.n_fft, self.hop)[:, :frames], self.hann, out=windowed)
        torch.fft.rfft(windowed, out=spectrum)
        real, imaginary = torch.view_as_real(spectrum).unbind(-1)
        # |z| and then its square, as the extractor has it, would take a root and undo it.
        return torch.mul(real, real, out=self.squares[:count, :frames]).addcmul_(imaginary, imaginary)
