"""Pretraining of a tiny Whisper: its own decoder and a throw-away CTC head on the encoder, trained together.

The CTC head, over the decoder's own tokens, makes the encoder itself carry the words, which is what a graft reads from
it; the decoder tells how well a listener of Whisper's own kind understands them.

Shapes: B utterances, M mel bins, T mel frames, F encoder frames, L tokens.
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
from whisper_base import WINDOW_S, make_extractor, save_base, spoken

BLANK = "<|nospeech|>"  # CTC's blank: a token that the decoder never writes
MAX_SAMPLES = int(WINDOW_S * SAMPLE_RATE)
SAMPLES_A_FRAME = 320
IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. ``evaluate_every`` is in steps."""

    steps: int
    batch_size: int = 32
    peak_lr: float = 2e-3
    warmup_steps: int = 50
    join_probability: float = 0.7
    join_ramp: int = 600  # steps until utterances are joined as often as that; short ones are easier to begin with
    ctc_weight: float = 0.5
    evaluate_every: int = 250
    seed: int = 1


@dataclass
class Batch:
    """``mel`` (B, M, T); ``tokens`` (B, L) padded with IGNORED; ``words`` flat: the tokens that CTC hears, with both of
    its lengths (B,)."""

    mel: torch.Tensor
    tokens: torch.Tensor
    words: torch.Tensor
    num_words: torch.Tensor
    num_frames: torch.Tensor


class Pretrainer(nn.Module):
    """A Whisper with a CTC head on its encoder."""

    def __init__(self, whisper: WhisperForConditionalGeneration, blank_id: int) -> None:
        super().__init__()
        self.whisper = whisper
        self.blank_id = blank_id
        self.ctc_head = nn.Linear(whisper.config.d_model, whisper.config.vocab_size)

    def forward(self, batch: Batch) -> Losses:
        """Mean cross entropy of the decoder, and mean CTC loss a token."""
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
        """CTC loss a token of encoder frames (B, F, D), over the frames of the speech alone."""
        scores = log_softmax(self.ctc_head(encoded), dim=-1).transpose(0, 1)
        lengths = batch.num_frames, batch.num_words
        return ctc_loss(scores, batch.words, *lengths, blank=self.blank_id, zero_infinity=True)


def blank_id(tokenizer: WhisperTokenizer) -> int:
    """The id of CTC's blank."""
    return tokenizer.convert_tokens_to_ids(BLANK)


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


def make_batch(training: Training, schedule: Schedule, step: int) -> Batch:
    """Draw, disturb and collate the batch of one step."""
    tokenizer, rng = training.tokenizer, np.random.default_rng([schedule.seed, step])
    join_probability = schedule.join_probability * min(1, step / schedule.join_ramp)
    pairs = [
        joined(training.draw, training.how, MAX_SAMPLES, join_probability, rng) for _ in range(schedule.batch_size)
    ]
    waveforms, texts = map(list, zip(*pairs, strict=True))
    mel = extract_mel(waveforms, make_extractor())
    mask_mel(mel.numpy(), training.how, rng)
    rows = [torch.tensor(tokenizer(spoken(text)).input_ids) for text in texts]
    words = [torch.tensor(tokenizer(spoken(text), add_special_tokens=False).input_ids) for text in texts]
    return Batch(
        mel,
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED),
        torch.cat(words),
        torch.tensor([len(row) for row in words]),
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
def ctc_error_rate(
    pretrainer: Pretrainer, tokenizer: WhisperTokenizer, speech: SpeechSet, batch_size: int = 50
) -> float:
    """WER of the CTC head's best path: how much the encoder alone knows."""
    extractor, texts = make_extractor(), []
    for start in range(0, len(speech), batch_size):
        waveforms = [speech.utterance(i)[0] for i in range(start, min(start + batch_size, len(speech)))]
        encoded = pretrainer.whisper.model.encoder(extract_mel(waveforms, extractor)).last_hidden_state
        best = pretrainer.ctc_head(encoded).argmax(-1)
        for path, waveform in zip(best, waveforms, strict=True):
            heard = torch.unique_consecutive(path[: -(-len(waveform) // SAMPLES_A_FRAME)])
            texts.append(tokenizer.decode(heard[heard != pretrainer.blank_id]).strip())
    return jiwer.wer(speech.texts, texts)


@dataclass
class Training:
    """A pretraining: the model, what it hears and how disturbed, what scores it, where it is written."""

    pretrainer: Pretrainer
    tokenizer: WhisperTokenizer
    draw: Draw
    how: Augmentation
    valid: SpeechSet
    checkpoint: Path
    output: Path


def pretrain(training: Training, schedule: Schedule, report: Callable[[str], None]) -> None:
    """Train until the schedule ends, from the checkpoint where there is one. ``report`` gets a line now and then.

    The stock folder is written with every evaluation, so it can be looked at while training goes on.
    """
    model = training.pretrainer
    weights = {"decoder": 1 - schedule.ctc_weight, "ctc": schedule.ctc_weight}

    def losses_of(step: int) -> Losses:
        losses = model(make_batch(training, schedule, step))
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
    encoder_wer = ctc_error_rate(training.pretrainer, training.tokenizer, training.valid)
    training.pretrainer.train()
    return f"WER of the decoder {wer:.2%}, of the encoder's CTC head {encoder_wer:.2%}"
