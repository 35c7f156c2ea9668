"""The base Whisper with its own decoder, scored like the graft: the bar that a graft on its encoder is held to.

W: encoder windows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from graft.data.audio import LongAudio, windows
from graft.data.loader import Entry, OnlineSource
from graft.data.manifest import Manifest
from graft.data.views import load_utterance
from graft.evaluation.transcribe import Answers, inferring
from graft.lengths import Window
from graft.model.encoder import load_feature_extractor
from graft.model.mels import LogMels

Pieces = list[list[np.ndarray]]  # of each utterance, its windows


def same_utterances(manifest: Manifest, entries: Sequence[Entry]) -> Manifest:
    """What ``manifest`` has of ``entries``, those that a graft is scored on: two rates of other words say nothing.

    Raises:
        ValueError: it has not all of them, or another text for one.
    """
    texts = {entry.id: entry.text for entry in entries}
    found = [(line, u) for line, u in zip(manifest.lines, manifest.utterances, strict=True) if u.id in texts]
    there = {utterance.id: utterance.text for _, utterance in found}
    changed = [name for name, text in texts.items() if there.get(name) != text]
    if changed:
        raise ValueError(
            f"manifest {manifest.path}: {len(changed)} of the {len(texts)} utterances whose features are scored are "
            f"not there, cannot be used, or have another text there, such as '{changed[0]}': make the features anew "
            "(shards/precompute.py), or score without --base-whisper"
        )
    return replace(manifest, utterances=[u for _, u in found], rejects=[], lines=[line for line, _ in found])


class WhisperTranscriber:
    """Whisper's transcripts of the utterances of a manifest; windows of long audio are joined as text.

    Args:
        base: a Whisper folder or hub name.
        language: such as "en"; None: an English-only model needs none, others find out for themselves.

    Raises:
        ValueError: if ``base`` lacks any of its weights.
    """

    def __init__(
        self,
        base: str,
        manifest: Manifest,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        long_audio: LongAudio = "reject",
        language: str | None = None,
    ) -> None:
        self._device, self._dtype, self._long_audio, self._language = device, dtype, long_audio, language
        self._model = _load(base, dtype).to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._window = Window(self._model.config.max_source_positions)
        self._log_mels = LogMels(load_feature_extractor(base), self._window, device)
        source = OnlineSource(manifest, _no_features, window=self._window, long_audio=long_audio)
        self.entries, self.rejects = source.entries, source.rejects

    def read(self, indices: Sequence[int]) -> Pieces:
        """Windows (S_i,) of the waveforms of these utterances."""
        utterances = [self.entries[i].utterance for i in indices]
        waveforms = [load_utterance(utterance) for utterance in utterances]
        return [
            windows(waveform, self._window, self._long_audio, f"'{utterance.id}'")
            for waveform, utterance in zip(waveforms, utterances, strict=True)
        ]

    def answer(self, batch: Pieces) -> Answers:
        """One transcript per utterance."""
        flat = [piece for pieces in batch for piece in pieces]
        texts = iter(self._transcripts(flat))
        joined = [" ".join(next(texts) for _ in pieces).strip() for pieces in batch]
        return Answers(joined, [True] * len(joined))

    def _transcripts(self, pieces: Sequence[np.ndarray]) -> list[str]:
        mels = self._log_mels(pieces).to(self._dtype)  # (W, n_mels, 2F)
        multilingual = {"task": "transcribe", "language": self._language} if self._is_multilingual else {}
        with inferring(self._model, self._device, "fp32"):  # weights and mels already have the precision
            tokens = self._model.generate(mels, do_sample=False, num_beams=1, **multilingual)
        return [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @property
    def _is_multilingual(self) -> bool:
        return bool(getattr(self._model.generation_config, "is_multilingual", False))


def _no_features(waveforms: list[np.ndarray]) -> list[torch.Tensor]:
    raise AssertionError(f"Whisper hears waveforms, {len(waveforms)} were to be encoded")


def _load(base: str, dtype: torch.dtype) -> WhisperForConditionalGeneration:
    model, info = WhisperForConditionalGeneration.from_pretrained(base, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"bases.whisper: {base} lacks {len(missing)} weights: {', '.join(missing[:5])}")
    return model
