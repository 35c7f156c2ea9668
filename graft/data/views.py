"""Other ways to hear an utterance: faster or slower, louder or softer, in noise. A frozen encoder hears each once.

A view is made of the waveform, so it has its own features and, in shards, its own sample. What is random in it follows
from the utterance's id: any number of ranks, on any day, make the same bytes.

S: samples at 16 kHz
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from graft.data.audio import change_speed, load_audio
from graft.data.manifest import Manifest, Utterance, read_manifest
from graft.recipe import Recipe, View

SMOOTHED_BINS = 65  # of the spectrum that noise takes over: its shape, not the pitch


def read_split(recipe: Recipe, split: str, *, check_files: bool = True) -> Manifest:
    """What a recipe means by a split: its manifest, with the views that ``data.views`` has of it.

    Raises:
        ValueError: see :func:`read_manifest` and :func:`with_views`.
    """
    return with_views(read_manifest(recipe.manifest(split), check_files=check_files), recipe.data.views.get(split, []))


def with_views(manifest: Manifest, views: Sequence[View]) -> Manifest:
    """``manifest`` with every line's views behind it, as utterances (or rejects) of their own: ``ID@speed=0.9``.

    Raises:
        ValueError: a line's id is that of another line's view.
    """
    if not views:
        return manifest
    utterances, lines = [], []
    for line, utterance in zip(manifest.lines, manifest.utterances, strict=True):
        seen = [utterance, *(replace(utterance, id=_name(utterance.id, view), view=view) for view in views)]
        utterances += seen
        lines += [line] * len(seen)
    rejects = [replace(r, id=name) for r in manifest.rejects for name in _names(r.id, views)]
    made = {u.id for u in utterances if u.view}
    clash = next((u.id for u in utterances if not u.view and u.id in made), None)
    if clash is not None:
        raise ValueError(f"manifest {manifest.path}: '{clash}' is also the name of another line's view; rename one")
    told = json.dumps([manifest.sha256, [view.model_dump() for view in views]])
    return Manifest(manifest.path, utterances, rejects, lines, sha256(told.encode()).hexdigest())


def check_has_views(ids: Iterable[str], views: Sequence[View], where: str) -> None:
    """Refuse a set that was made before its recipe asked for ``views``; one utterance of each is enough.

    Raises:
        ValueError: names the view that is not there.
    """
    missing = {view.name for view in views}
    for utterance_id in ids:
        if not missing:
            return
        missing.discard(utterance_id.rpartition("@")[2])
    if missing:
        raise ValueError(
            f"{where} holds no utterance as {' or '.join(sorted(missing))}, which data.views asks for: make the set "
            "anew with shards/precompute.py, in another data.shards"
        )


def load_utterance(utterance: Utterance) -> np.ndarray:
    """The waveform (S,) of an utterance as its view has it.

    Raises:
        AudioError: see :func:`load_audio`.
    """
    waveform, view = load_audio(utterance.audio_filepath, utterance.offset, utterance.duration), utterance.view
    if view is None:
        return waveform
    if view.speed != 1:
        waveform = change_speed(waveform, view.speed)
    if view.snr_db is not None:
        waveform = waveform + _noise(waveform, view.snr_db, utterance.id)
    if view.gain_db:
        waveform = waveform * np.float32(_amplitude(view.gain_db))
    return waveform


def _noise(waveform: np.ndarray, snr_db: float, key: str) -> np.ndarray:
    """Noise (S,) with the long-term spectrum of ``waveform``, ``snr_db`` below it: it hides all of speech alike."""
    chance = np.random.Generator(np.random.Philox(key=int.from_bytes(sha256(key.encode()).digest()[:8], "big")))
    size = 1 << (len(waveform) - 1).bit_length()  # a power of two is fast to transform
    power = np.abs(np.fft.rfft(waveform, size)) ** 2
    shape = np.sqrt(np.convolve(power, np.ones(SMOOTHED_BINS) / SMOOTHED_BINS, mode="same")[: len(power)])
    noise = np.fft.irfft(shape * np.exp(2j * np.pi * chance.random(len(shape))), size)[: len(waveform)]
    loudness = np.sqrt(np.mean(waveform**2) / max(np.mean(noise**2), np.finfo(np.float64).tiny))
    return (noise * loudness / _amplitude(snr_db)).astype(np.float32)


def _amplitude(level_db: float) -> float:
    return 10.0 ** (level_db / 20)


def _names(utterance_id: str, views: Sequence[View]) -> Iterator[str]:
    yield utterance_id
    yield from (_name(utterance_id, view) for view in views)


def _name(utterance_id: str, view: View) -> str:
    return f"{utterance_id}@{view.name}"
