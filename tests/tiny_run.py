"""A finished run directory over tiny random bases, with a spoken corpus of noise: for tests of what reads a run.

``tiny_run(folder)`` writes the bases, sound files, manifests and ``folder/run`` with a checkpoint at steps 3 and 6.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tiny_bases import qwen2_vl_folder, recipe, whisper_folder
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

from graft.data.manifest import Utterance, write_manifest
from graft.model.assemble import assemble, save_trained
from graft.model.encoder import SpeechEncoder
from graft.recipe import Recipe
from graft.run_dir import STATE_FILE, step_folder, whole_folder, write_whole

TEXTS = ["one apple", "two pears", "three", "four five six", "seven plums"]
SECONDS = [0.31, 0.9, 0.5, 0.72, 0.11]
BEST_STEP = 3


def tiny_run(folder: Path, **sections: Any) -> Path:
    """Write a run whose best checkpoint is not its newest, features online; returns the run directory."""
    manifest = str(tiny_corpus(folder / "corpus"))
    settings = {
        "data": {"manifests": {"test": manifest}, "shards": str(folder / "sets"), "features": "online"},
        "evaluation": {"batch_size": 2, "max_new_tokens": 6},
        **sections,
    }
    made = recipe(tiny_whisper(folder / "whisper"), qwen2_vl_folder(folder / "qwen2_vl"), **settings)
    run_dir = folder / "run"
    write_whole(run_dir / "recipe.yaml", made.as_yaml())
    for step in (BEST_STEP, 6):
        write_checkpoint(run_dir, made, step)
    write_whole(run_dir / "checkpoints" / "evaluations.json", json.dumps({"1": {str(BEST_STEP): 0.25}}))
    return run_dir


def tiny_corpus(folder: Path) -> Path:
    """Noise of odd lengths as FLAC at 16 kHz, one file per text; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    utterances = []
    for number, (text, seconds) in enumerate(zip(TEXTS, SECONDS, strict=True)):
        path = folder / f"u{number}.flac"
        soundfile.write(path, noise(seconds, 16_000, seed=number), 16_000)
        utterances.append(Utterance(f"u{number}", path, seconds, text))
    write_manifest(folder / "test.jsonl", utterances)
    return folder / "test.jsonl"


def noise(seconds: float, rate: int, seed: int = 1) -> np.ndarray:
    """Quiet noise (S,), different for every seed."""
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(round(seconds * rate))).astype(np.float32)


def tiny_whisper(folder: Path) -> Path:
    """A tiny random Whisper with a tokenizer, so that its own decoder can be heard."""
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder(folder))
    with torch.no_grad():  # a decoder that hears: fresh weights would say the same of everything
        for name, parameter in model.model.decoder.named_parameters():
            if "encoder_attn" in name:
                parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    letters = ["<pad>", "<|startoftranscript|>", "<|endoftext|>", *(string.ascii_letters + string.digits)[:61]]
    tokenizer = WhisperTokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.save_pretrained(folder)
    settings = {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "is_multilingual": False}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "max_length": 12}))
    return folder


def write_checkpoint(run_dir: Path, made: Recipe, step: int) -> Path:
    """A whole checkpoint of a random projector, loud enough to be heard."""
    model = assemble(made).model
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(10 * step)
    with whole_folder(step_folder(run_dir, step)) as temporary:
        save_trained(temporary, model)
        state = {"stage": 1, "step": step, "first_step": 0}
        fingerprint = SpeechEncoder(made.bases.whisper, audio_window=made.audio.window).fingerprint
        (temporary / STATE_FILE).write_text(json.dumps(state | {"encoder_fingerprint": fingerprint}))
    return step_folder(run_dir, step)
