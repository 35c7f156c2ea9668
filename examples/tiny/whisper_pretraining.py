"""Pretraining of a tiny Whisper: its own decoder and a throw-away CTC head on the encoder, trained together.

The CTC head makes the encoder itself carry the words, which is what a graft reads from it; the decoder tells how well a
listener of Whisper's own kind understands them.

Shapes: B utterances, M mel bins, T mel frames, F encoder frames, C characters (0 is the CTC blank), L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import nn
from torch.nn.functional import ctc_loss, log_softmax
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from augmentation import SAMPLE_RATE, Augmentation, mask_mel
from speech_set import Draw, SpeechSet, joined
from training_run import Losses, TrainingRun
from whisper_base import WINDOW_S, make_extractor, save_base

CHARACTERS = "_ abcdefghijklmnopqrstuvwxyz"
MAX_SAMPLES = int(WINDOW_S * SAMPLE_RATE)
SAMPLES_A_FRAME = 320
IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. ``evaluate_every`` is in steps."""

    steps: int
    batch_size: int = 32
    peak_lr: float = 1.5e-3
    warmup_steps: int = 150
    join_probability: float = 0.5
    ctc_weight: float = 0.5
    evaluate_every: int = 250
    seed: int = 1


@dataclass
class Batch:
    """``mel`` (B, M, T); ``tokens`` (B, L) padded with IGNORED; ``characters`` flat, with both lengths of CTC (B,)."""

    mel: torch.Tensor
    tokens: torch.Tensor
    characters: torch.Tensor
    num_characters: torch.Tensor
    num_frames: torch.Tensor


class Pretrainer(nn.Module):
    """A Whisper with a CTC head on its encoder."""

    def __init__(self, whisper: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.whisper = whisper
        self.ctc_head = nn.Linear(whisper.config.d_model, len(CHARACTERS))

    def forward(self, batch: Batch) -> Losses:
        """Mean cross entropy of the decoder, and mean CTC loss a character."""
        encoded = self.whisper.model.encoder(batch.mel)
        inputs = batch.tokens[:, :-1].masked_fill(batch.tokens[:, :-1] == IGNORED, self.whisper.config.pad_token_id)
        logits = self.whisper(decoder_input_ids=inputs, encoder_outputs=encoded).logits
        targets = batch.tokens[:, 1:].masked_fill(batch.tokens[:, 1:] == self.prompt_id, IGNORED)
        decoder_loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return {"decoder": decoder_loss, "ctc": self.ctc(encoded.last_hidden_state, batch)}

    @property
    def prompt_id(self) -> int:
        """The token behind the start token: it is given, not predicted."""
        return self.whisper.generation_config.no_timestamps_token_id

    def ctc(self, encoded: torch.Tensor, batch: Batch) -> torch.Tensor:
        """CTC loss a character of encoder frames (B, F, D), over the frames of the speech alone."""
        scores = log_softmax(self.ctc_head(encoded), dim=-1).transpose(0, 1)
        lengths = batch.num_frames, batch.num_characters
        return ctc_loss(scores, batch.characters, *lengths, zero_infinity=True)


def draw_from(speech: SpeechSet) -> Draw:
    """A source of clean utterances, drawn with replacement."""
    return lambda rng: speech.utterance(int(rng.integers(len(speech))))


def draw_mixture(sources: list[tuple[float, Draw]]) -> Draw:
    """A source that takes each utterance from one of ``sources`` by its share; shares sum to 1."""
    shares = [share for share, _ in sources]
    return lambda rng: sources[rng.choice(len(sources), p=shares)][1](rng)


def extract_mel(waveforms: list[np.ndarray], extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """Log-mel of float32 waveforms, padded to the window: (B, M, T)."""
    return extractor(waveforms, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features


def make_batch(
    draw: Draw,
    how: Augmentation,
    schedule: Schedule,
    extractor: WhisperFeatureExtractor,
    tokenizer: WhisperTokenizer,
    rng: np.random.Generator,
) -> Batch:
    """Draw, disturb and collate one batch."""
    pairs = [joined(draw, how, MAX_SAMPLES, schedule.join_probability, rng) for _ in range(schedule.batch_size)]
    waveforms, texts = map(list, zip(*pairs, strict=True))
    mel = extract_mel(waveforms, extractor)
    mask_mel(mel.numpy(), how, rng)
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    spelled = [torch.tensor([CHARACTERS.index(letter) for letter in text]) for text in texts]
    return Batch(
        mel,
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED),
        torch.cat(spelled),
        torch.tensor([len(row) for row in spelled]),
        torch.tensor([-(-len(waveform) // SAMPLES_A_FRAME) for waveform in waveforms]),
    )


@torch.inference_mode()
def transcribe(
    whisper: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, speech: SpeechSet, batch_size: int = 50
) -> list[str]:
    """What Whisper's own decoder hears in each utterance, greedily."""
    extractor, texts = make_extractor(), []
    for start in range(0, len(speech), batch_size):
        indices = range(start, min(start + batch_size, len(speech)))
        mel = extract_mel([speech.utterance(index)[0] for index in indices], extractor)
        texts += tokenizer.batch_decode(whisper.generate(mel.to(whisper.dtype)), skip_special_tokens=True)
    return [text.strip() for text in texts]


def word_error_rate(whisper: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, speech: SpeechSet) -> float:
    """Corpus-level WER of Whisper's own decoder."""
    return jiwer.wer(speech.texts, transcribe(whisper, tokenizer, speech))


@torch.inference_mode()
def ctc_character_error_rate(pretrainer: Pretrainer, speech: SpeechSet, batch_size: int = 50) -> float:
    """Corpus-level CER of the CTC head's best path: how much the encoder alone knows."""
    extractor, texts = make_extractor(), []
    for start in range(0, len(speech), batch_size):
        waveforms = [speech.utterance(i)[0] for i in range(start, min(start + batch_size, len(speech)))]
        encoded = pretrainer.whisper.model.encoder(extract_mel(waveforms, extractor)).last_hidden_state
        best = pretrainer.ctc_head(encoded).argmax(-1)
        texts += [spell(row[: -(-len(wave) // SAMPLES_A_FRAME)]) for row, wave in zip(best, waveforms, strict=True)]
    return jiwer.cer(speech.texts, texts)


def spell(path: torch.Tensor) -> str:
    """The text of a CTC path (F,): repeats merged, blanks dropped."""
    return "".join(CHARACTERS[index] for index in torch.unique_consecutive(path).tolist() if index)


@dataclass
class Training:
    """A pretraining: the model, what it hears and how disturbed at each step, what scores it, where it is written."""

    pretrainer: Pretrainer
    tokenizer: WhisperTokenizer
    draw: Draw
    how: Callable[[int], Augmentation]
    valid: SpeechSet
    checkpoint: Path
    output: Path


def pretrain(training: Training, schedule: Schedule, report: Callable[[str], None]) -> None:
    """Train until the schedule ends, from the checkpoint where there is one. ``report`` gets a line now and then.

    The stock folder is written with every evaluation, so it can be looked at while training goes on.
    """
    extractor, model = make_extractor(), training.pretrainer
    weights = {"decoder": 1 - schedule.ctc_weight, "ctc": schedule.ctc_weight}

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng([schedule.seed, step])
        losses = model(make_batch(training.draw, training.how(step), schedule, extractor, training.tokenizer, rng))
        return {name: weights[name] * loss for name, loss in losses.items()}

    def after(done: int) -> None:
        if done % schedule.evaluate_every == 0 or done == schedule.steps:
            report(f"step {done}/{schedule.steps}  {describe_errors(training)}")
            save_base(model.whisper, training.tokenizer, training.output)

    run = TrainingRun(model, training.checkpoint, schedule.steps, schedule.peak_lr, schedule.warmup_steps, report)
    run.train(losses_of, after)


def describe_errors(training: Training) -> str:
    """Errors on the validation set, in words."""
    training.pretrainer.eval()
    wer = word_error_rate(training.pretrainer.whisper, training.tokenizer, training.valid)
    cer = ctc_character_error_rate(training.pretrainer, training.valid)
    training.pretrainer.train()
    return f"WER of the decoder {wer:.2%}, CER of the encoder's CTC head {cer:.2%}"
