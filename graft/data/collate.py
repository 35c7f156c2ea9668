"""Samples -> a padded micro-batch that checks itself.

Training sequences are padded on the right, prompts for generation on the left.

B: utterances    T: positions    F: encoder frames    D: numbers per frame    A: audio tokens of the longest
L: label positions    P: audio placeholders    N: positions that are neither padding nor worked on in another row
K: different words, the pause first    U: words of the longest transcript
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graft.data.loader import FeatureSample
from graft.data.prompt import IGNORE_INDEX, PromptTemplate

_TO_ALIGN = ("audio_features", "audio_feature_lengths", "words", "spoken", "num_spoken")


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes; ``labels`` is None for generation.

    ids: B utterance ids                 input_ids, attention_mask, labels: (B, T) int64
    audio_features: (B, F, D)            audio_feature_lengths: (B,) int64, frames of each that are real
    num_shared: the first positions that hold the same text in every row; audio and labels stand behind them

    What the model would else have to read from a GPU's memory, all int64:
    audio_places: (P,) into the B * T positions, where a placeholder stands; None: the model looks for them
    audio_tokens: (P,) into the B * A audio tokens, which of them stands there
    label_positions: (L,) into the B * T positions whose next label is learnt; follows from ``labels``
    line_positions: (N,) into the B * T positions that training computes; follows from mask and ``num_shared``

    For a step that aligns the audio with its words (:mod:`graft.model.alignment`), all int64, else None:
    words: (K,) token ids     spoken: (B, U) numbers of ``words``, 0 behind     num_spoken: (B,), how many are real
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None
    audio_features: torch.Tensor
    audio_feature_lengths: torch.Tensor
    audio_places: torch.Tensor | None = None
    audio_tokens: torch.Tensor | None = None
    num_shared: int = 0
    words: torch.Tensor | None = None
    spoken: torch.Tensor | None = None
    num_spoken: torch.Tensor | None = None
    label_positions: torch.Tensor | None = field(init=False, default=None)
    line_positions: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        assert len(shape) == 2 and shape[0] == len(self.ids) > 0, f"input_ids {tuple(shape)} for {len(self.ids)} ids"
        for name in ("attention_mask", "labels"):
            tensor = getattr(self, name)
            assert tensor is None or tensor.shape == shape, f"{name} {tuple(tensor.shape)}, input_ids {tuple(shape)}"
        for name in ("input_ids", "attention_mask", "labels", "audio_feature_lengths"):
            tensor = getattr(self, name)
            assert tensor is None or tensor.dtype == torch.int64, f"{name} is {tensor.dtype}, expected int64"
        features, lengths = self.audio_features, self.audio_feature_lengths
        assert features.ndim == 3 and len(features) == len(self.ids), f"audio_features {tuple(features.shape)}"
        assert features.is_floating_point(), f"audio_features is {features.dtype}"
        assert lengths.shape == (len(self.ids),), f"audio_feature_lengths {tuple(lengths.shape)}"
        assert (self.audio_places is None) == (self.audio_tokens is None), "audio_places and audio_tokens go together"
        said = [self.words, self.spoken, self.num_spoken]
        assert len({tensor is None for tensor in said}) == 1, "words, spoken and num_spoken go together"
        if self.words is not None:
            assert len(self.spoken) == len(self.num_spoken) == len(self.ids), f"spoken {tuple(self.spoken.shape)}"
            assert (self.spoken < len(self.words)).all(), f"word {int(self.spoken.max())} of {len(self.words)}"
        self._check_values()
        if self.labels is not None:
            learnt = torch.nn.functional.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1))  # nothing follows the last
            kept = self.attention_mask.bool()
            kept[1:, : self.num_shared] = False
            for name, where in {"label_positions": learnt, "line_positions": kept}.items():
                object.__setattr__(self, name, where.flatten().nonzero().flatten())

    def _check_values(self) -> None:
        lengths = self.audio_feature_lengths.tolist()
        assert min(lengths) >= 1 and max(lengths) == self.audio_features.shape[1], f"lengths {lengths}"
        mask = self.attention_mask.bool()
        assert mask.any(dim=1).all(), "a row is padding only"
        shared = self.input_ids[:, : self.num_shared]
        assert torch.equal(shared, shared[:1].expand_as(shared)), f"rows differ in their first {self.num_shared} ids"
        assert mask[:, : self.num_shared].all(), "padding where rows share their beginning"
        if self.labels is None:
            return
        assert not (mask[:, 1:] > mask[:, :-1]).any(), "padding in front of a token to learn from"
        learnt = self.labels != IGNORE_INDEX
        assert not (learnt & ~mask).any(), "a label on padding"
        assert not learnt[:, : self.num_shared + 1].any(), "a label that the rows' shared beginning would predict"
        assert torch.equal(self.labels[learnt], self.input_ids[learnt]), "a label is not the token it stands on"
        without = [self.ids[i] for i in (~learnt.any(dim=1)).nonzero().flatten().tolist()]
        if without:
            raise ValueError(f"nothing to learn in {', '.join(without)}: no label at all")

    @property
    def num_label_tokens(self) -> int:
        """Positions that give loss."""
        return 0 if self.labels is None else int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_padding(self) -> int:
        """Positions that hold padding."""
        return int((self.attention_mask == 0).sum())

    @property
    def num_positions(self) -> int:
        """All positions, B x T."""
        return self.input_ids.numel()

    @property
    def num_audio_tokens(self) -> int:
        """Placeholders of all utterances, where they are known."""
        return 0 if self.audio_places is None else len(self.audio_places)

    @property
    def num_attended_pairs(self) -> float:
        """Pairs of positions of which causal attention lets one see the other: half a square per utterance."""
        return float((self.attention_mask.sum(1) ** 2).sum()) / 2

    @property
    def num_frames(self) -> int:
        """Encoder frames of all utterances, without padding."""
        return int(self.audio_feature_lengths.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return _unchecked(self, moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run in the background."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return _unchecked(self, {name: value.pin_memory() for name, value in tensors.items()})

    def model_inputs(self) -> dict[str, Any]:
        """The model's ``forward`` arguments by their names.

        A training batch goes without its mask: padding stands behind, where causal attention never looks.
        """
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if self.labels is None:
            return tensors
        if self.words is not None:
            return {name: tensors[name] for name in _TO_ALIGN}
        del tensors["attention_mask"]
        return {**tensors, "num_shared": self.num_shared}


def collate_training(samples: Sequence[FeatureSample], template: PromptTemplate, align: bool = False) -> Batch:
    """A batch of training sequences, padded on the right; with ``align`` it trains alignment alone.

    An utterance with an instruction of its own has no part in alignment: its text may be an answer or a translation.

    Raises:
        ValueError: an utterance has no text.
    """
    rows = []
    for sample in samples:
        if not sample.text.strip():
            raise ValueError(f"utterance '{sample.id}' has no text to learn")
        tokens = template.num_audio_tokens(len(sample.audio_features))
        rows.append(template.training_ids(tokens, sample.text, sample.instruction))
    longest = max(len(ids) for ids, _ in rows)
    return _batch(
        samples,
        template,
        input_ids=[ids + [template.pad_token_id] * (longest - len(ids)) for ids, _ in rows],
        attention_mask=[[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows],
        labels=[labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows],
        num_shared=template.num_shared(sample.instruction for sample in samples),
        words=_words([_said(sample, template) for sample in samples], template.pause_id) if align else {},
    )


def collate_generation(samples: Sequence[FeatureSample], template: PromptTemplate) -> Batch:
    """A batch of prompts, padded on the left, so that each reply begins at the same position."""
    rows = [
        template.prompt_ids(template.num_audio_tokens(len(sample.audio_features)), sample.instruction)
        for sample in samples
    ]
    longest = max(len(ids) for ids in rows)
    return _batch(
        samples,
        template,
        input_ids=[[template.pad_token_id] * (longest - len(ids)) + ids for ids in rows],
        attention_mask=[[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows],
        labels=None,
    )


def _batch(
    samples: Sequence[FeatureSample],
    template: PromptTemplate,
    input_ids: list[list[int]],
    attention_mask: list[list[int]],
    labels: list[list[int]] | None,
    num_shared: int = 0,
    words: dict[str, torch.Tensor] | None = None,
) -> Batch:
    features = [sample.audio_features for sample in samples]
    rows = torch.tensor(input_ids)
    num_tokens = [template.num_audio_tokens(len(f)) for f in features]
    return Batch(
        ids=tuple(sample.id for sample in samples),
        input_ids=rows,
        attention_mask=torch.tensor(attention_mask),
        labels=None if labels is None else torch.tensor(labels),
        audio_features=torch.nn.utils.rnn.pad_sequence(features, batch_first=True),  # (B, F, D), zeros behind
        audio_feature_lengths=torch.tensor([len(f) for f in features]),
        num_shared=num_shared,
        **(words or {}),
        **(_audio_places(rows == template.audio_token_id, num_tokens) if labels is not None else {}),
    )


def _said(sample: FeatureSample, template: PromptTemplate) -> list[int]:
    """What is said in the audio; nothing is known of it where another instruction asks for something else."""
    return template.spoken_ids(sample.text) if template.asks_what_is_said(sample.instruction) else []


def _words(transcripts: list[list[int]], pause: int) -> dict[str, torch.Tensor]:
    """What is said, as numbers of the micro-batch's own words: (K,), (B, U) and (B,)."""
    words = [pause, *sorted({token for ids in transcripts for token in ids})]
    number = {token: i for i, token in enumerate(words)}
    spoken = [torch.tensor([number[token] for token in ids], dtype=torch.int64) for ids in transcripts]
    return {
        "words": torch.tensor(words),
        "spoken": torch.nn.utils.rnn.pad_sequence(spoken, batch_first=True),
        "num_spoken": torch.tensor([len(ids) for ids in transcripts]),
    }


def _audio_places(is_audio: torch.Tensor, num_tokens: list[int]) -> dict[str, torch.Tensor]:
    """Where the placeholders (B, T) stand and which audio token belongs there, one audio in each row.

    For training alone: ``generate`` looks for itself, once per prompt.
    """
    counts = is_audio.sum(1).tolist()
    assert counts == num_tokens, f"{counts} placeholders for {num_tokens} audio tokens, per row"
    tokens = torch.arange(max(num_tokens)) < torch.tensor(num_tokens).unsqueeze(1)  # (B, A): the others are padding
    places = {"audio_places": is_audio, "audio_tokens": tokens}
    return {name: where.flatten().nonzero().flatten() for name, where in places.items()}


def _unchecked(batch: Batch, tensors: dict[str, Any]) -> Batch:
    """A copy with other tensors of the same values: checking them again would wait for the device."""
    made = object.__new__(Batch)
    made.__dict__.update(vars(batch) | tensors)
    return made
