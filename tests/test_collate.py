"""Micro-batches against tensors typed out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graft.data.collate import Batch, collate_generation, collate_training
from graft.data.loader import FeatureSample
from graft.data.prompt import IGNORE_INDEX, PromptTemplate

PAD, AUDIO, END = -8, -9, 77


class Tokenizer:
    """Each letter is its place in the alphabet."""

    pad_token_id, all_special_ids, added_tokens_decoder = PAD, [PAD, END], {}

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"@": AUDIO}[token]

    def __call__(self, texts, add_special_tokens: bool, split_special_tokens: bool = False):
        if isinstance(texts, list):
            return {"input_ids": [self._ids(text) for text in texts]}
        return {"input_ids": self._ids(texts)}

    def _ids(self, text: str) -> list[int]:
        return [END if letter == "." else ord(letter) - ord("a") + 1 for letter in text]


class Processor:
    """``<instruction> @ z <reply> .``"""

    tokenizer, audio_token, stack_factor = Tokenizer(), "@", 2

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        instruction = messages[1]["content"][1]["text"]
        reply = "" if add_generation_prompt else f"{messages[2]['content'][0]['text']}.y"
        return f"{instruction}@z{reply}"


@pytest.fixture
def template() -> PromptTemplate:
    return PromptTemplate.from_processor(Processor(), "", "ab")


def sample(name: str, num_frames: int, text: str, instruction: str | None = None) -> FeatureSample:
    features = torch.full((num_frames, 2), float(num_frames), dtype=torch.bfloat16)
    return FeatureSample(name, text, features, instruction)


def test_training_is_padded_on_the_right(template: PromptTemplate) -> None:
    batch = collate_training([sample("long", 5, "cde"), sample("short", 1, "f", "g")], template)
    assert batch.ids == ("long", "short")
    assert batch.input_ids.tolist() == [
        [1, 2, AUDIO, AUDIO, AUDIO, 26, 3, 4, 5, END],
        [7, AUDIO, 26, 6, END, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.attention_mask.tolist() == [[1] * 10, [1] * 5 + [0] * 5]
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [
        [ignored] * 6 + [3, 4, 5, END],
        [ignored] * 3 + [6, END] + [ignored] * 5,
    ]
    assert batch.audio_features.dtype == torch.bfloat16
    assert batch.audio_features[:, :, 0].tolist() == [[5.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]]
    assert batch.audio_feature_lengths.tolist() == [5, 1]
    assert batch.audio_places.tolist() == [2, 3, 4, 11]  # of 2 x 10 positions
    assert batch.audio_tokens.tolist() == [0, 1, 2, 3]  # of 2 x 3 audio tokens, the last two padding
    assert batch.label_positions.tolist() == [5, 6, 7, 8, 12, 13]  # each predicts the next one's label
    assert batch.line_positions.tolist() == [*range(10), *range(10, 15)]  # no padding
    assert (batch.num_label_tokens, batch.num_padding, batch.num_positions, batch.num_frames) == (6, 5, 20, 6)


def test_generation_is_padded_on_the_left(template: PromptTemplate) -> None:
    batch = collate_generation([sample("a", 3, "ignored"), sample("b", 6, "")], template)
    assert batch.labels is None and batch.num_label_tokens == 0
    assert batch.input_ids.tolist() == [[PAD, 1, 2, AUDIO, AUDIO, 26], [1, 2, AUDIO, AUDIO, AUDIO, 26]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6]
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "audio_features", "audio_feature_lengths"}


def test_model_inputs_of_training(template: PromptTemplate) -> None:
    batch = collate_training([sample("a", 3, "c")], template)
    assert set(batch.model_inputs()) == {
        "input_ids", "labels", "audio_features", "audio_feature_lengths",
        "audio_places", "audio_tokens", "label_positions", "line_positions", "num_shared",
    }  # fmt: skip
    assert batch.model_inputs()["labels"] is batch.labels


@pytest.mark.parametrize(("instructions", "num_shared"), [(["ab", "ab"], 2), (["abc", "abd"], 2), (["ab", "g"], 0)])
def test_rows_share_what_stands_before_the_audio(
    template: PromptTemplate, instructions: list[str], num_shared: int
) -> None:
    samples = [sample(name, 3, "c", name) for name in instructions]
    batch = collate_training(samples, template)
    width, end = batch.input_ids.shape[1], batch.num_positions - batch.num_padding  # the second row is the shorter one
    assert batch.num_shared == num_shared
    assert batch.line_positions.tolist() == [*range(width), *range(width + num_shared, end)]


def test_a_wrong_shared_beginning(batch: Batch) -> None:
    """input_ids: 1 2 audio audio 26 3 4 end, 1 2 audio 26 5 end padding padding."""
    with pytest.raises(AssertionError, match="rows differ in their first 4 ids"):
        replace(batch, num_shared=4)
    with pytest.raises(AssertionError, match="beginning would predict"):
        replace(batch, input_ids=change(batch.input_ids, 0, 2, 9), labels=change(batch.labels, 0, 2, 9))


def test_moving_keeps_everything(template: PromptTemplate) -> None:
    batch = collate_training([sample("a", 3, "c")], template)
    moved = batch.to("cpu")
    assert isinstance(moved, Batch) and moved.ids == ("a",)
    inputs, again = batch.model_inputs(), moved.model_inputs()
    assert inputs.pop("num_shared") == again.pop("num_shared") == 2
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())
    assert batch.to("meta").input_ids.device.type == "meta"
    assert collate_generation([sample("a", 3, "")], template).to("cpu").labels is None


def test_an_utterance_without_text_is_named(template: PromptTemplate) -> None:
    with pytest.raises(ValueError, match="'silent' has no text"):
        collate_training([sample("a", 3, "c"), sample("silent", 3, " ")], template)


@pytest.fixture
def batch(template: PromptTemplate) -> Batch:
    return collate_training([sample("a", 3, "cd"), sample("b", 1, "e")], template)


def test_a_row_without_labels(batch: Batch) -> None:
    labels = batch.labels.clone()
    labels[1] = IGNORE_INDEX
    with pytest.raises(ValueError, match="nothing to learn in b"):
        replace(batch, labels=labels)


def change(tensor: torch.Tensor, row: int, column: int, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[row, column] = value
    return changed


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda b: {"ids": ("a",)}, "for 1 ids"),
        (lambda b: {"input_ids": b.input_ids[0]}, "input_ids"),
        (lambda b: {"input_ids": b.input_ids.int()}, "input_ids is torch.int32"),
        (lambda b: {"attention_mask": b.attention_mask[:, 1:]}, "attention_mask"),
        (lambda b: {"attention_mask": change(b.attention_mask, 1, slice(None), 0)}, "padding only"),
        (lambda b: {"attention_mask": change(b.attention_mask, 1, 0, 0)}, "padding where rows share"),
        (lambda b: {"attention_mask": change(b.attention_mask, 1, 0, 0), "num_shared": 0}, "padding in front"),
        (lambda b: {"audio_tokens": None}, "go together"),
        (lambda b: {"labels": b.labels[:, :-1]}, "labels"),
        (lambda b: {"labels": change(b.labels, 1, -1, PAD)}, "a label on padding"),
        (lambda b: {"labels": change(b.labels, 0, -1, 5)}, "not the token it stands on"),
        (lambda b: {"audio_features": b.audio_features[0]}, "audio_features"),
        (lambda b: {"audio_features": b.audio_features.int()}, "audio_features is torch.int32"),
        (lambda b: {"audio_feature_lengths": torch.tensor([3])}, "audio_feature_lengths"),
        (lambda b: {"audio_feature_lengths": torch.tensor([3, 0])}, "lengths"),
        (lambda b: {"audio_feature_lengths": torch.tensor([2, 1])}, "lengths"),
        (lambda b: {"audio_feature_lengths": torch.tensor([4, 1])}, "lengths"),
    ],
)
def test_a_batch_checks_itself(batch: Batch, breaks, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        replace(batch, **breaks(batch))
