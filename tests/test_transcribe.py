"""Each utterance is transcribed once, alone as in a batch, greedily, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import qwen2_vl_folder, recipe, tokenizer, whisper_folder
from torch import nn

from graft.data.collate import collate_training
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.evaluation.transcribe import (
    Answers,
    GraftTranscriber,
    Hypothesis,
    generate,
    inferring,
    rank_share,
    transcribe,
)
from graft.model.assemble import Assembled, assemble
from graft.ranks import Ranks

FRAME_SIZE = 24  # of the tiny Whisper


@dataclass(frozen=True)
class Entry:
    id: str
    text: str
    num_frames: int
    duration: float = 1.0
    instruction: str | None = None


class Source:
    """Random features of odd lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.entries = [Entry(f"u{i}", f"words of {i}", n) for i, n in enumerate(lengths)]
        self.features = [torch.randn(n, FRAME_SIZE, generator=generator).bfloat16() for n in lengths]

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [self.features[i] for i in indices]


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    folder = tmp_path_factory.mktemp("bases")
    graft = assemble(recipe(whisper_folder(folder / "whisper"), qwen2_vl_folder(folder / "qwen2_vl")))
    with torch.no_grad():  # audio loud enough to change what a random language model says
        for parameter in graft.model.model.multi_modal_projector.parameters():
            parameter.mul_(30)
    return graft


@pytest.fixture(scope="module")
def template(graft: Assembled) -> PromptTemplate:
    return PromptTemplate.from_processor(graft.processor, "Be brief.", "Transcribe the speech.")


def transcriber(graft: Assembled, template: PromptTemplate, source: Source, **options: object) -> GraftTranscriber:
    settings = {"max_new_tokens": 9, "device": "cpu", "precision": "fp32", **options}
    return GraftTranscriber(graft.model, source, template, **settings)


def texts_of(hypotheses: Sequence[Hypothesis]) -> dict[int, str]:
    return {hypothesis.index: hypothesis.text for hypothesis in hypotheses}


LENGTHS = [3, 41, 8, 1, 17, 50, 5]


def test_a_transcript_is_the_same_alone_and_in_a_batch(graft: Assembled, template: PromptTemplate) -> None:
    source = Source(LENGTHS)
    scribe = transcriber(graft, template, source)
    alone = transcribe(scribe, Ranks(), batch_size=1, label="alone")
    together = transcribe(scribe, Ranks(), batch_size=len(LENGTHS), label="together")
    assert texts_of(alone.hypotheses) == texts_of(together.hypotheses)
    assert len(set(texts_of(alone.hypotheses).values())) > 3, "the model hears no difference, so this proves nothing"
    assert together.loss == pytest.approx(alone.loss, rel=1e-5)
    assert together.num_label_tokens == alone.num_label_tokens


def test_the_loss_is_the_references_cross_entropy(graft: Assembled, template: PromptTemplate) -> None:
    source, total, count = Source([5, 12]), 0.0, 0
    for entry, features in zip(source.entries, source.features, strict=True):
        batch = collate_training([FeatureSample(entry.id, entry.text, features)], template)
        with torch.no_grad():
            total += float(graft.model(**batch.model_inputs()).loss) * batch.num_label_tokens
        count += batch.num_label_tokens
    share = transcribe(transcriber(graft, template, source), Ranks(), batch_size=2, label="loss")
    assert share.num_label_tokens == count == 2 * (len("words of 0") + 1)  # bytes and the end token
    assert share.loss == pytest.approx(total, rel=1e-5)


def test_the_loss_can_be_left_out(graft: Assembled, template: PromptTemplate) -> None:
    scribe = transcriber(graft, template, Source([5]), with_loss=False)
    share = transcribe(scribe, Ranks(), batch_size=2, label="no loss")
    assert (share.loss, share.num_label_tokens, len(share.hypotheses)) == (0, 0, 1)


def test_ranks_together_say_what_one_says(graft: Assembled, template: PromptTemplate) -> None:
    scribe = transcriber(graft, template, Source(LENGTHS), with_loss=False)
    alone = texts_of(transcribe(scribe, Ranks(), batch_size=3, label="one").hypotheses)
    shares = [transcribe(scribe, Ranks(rank, 3), batch_size=2, label="three").hypotheses for rank in range(3)]
    assert sum(map(len, shares)) == len(LENGTHS)
    assert {index: text for share in shares for index, text in texts_of(share).items()} == alone


def test_the_bases_own_generation_settings_do_not_count(graft: Assembled, template: PromptTemplate) -> None:
    """Qwen2-VL's ask for sampling; a score must not depend on luck or on a penalty."""
    scribe = transcriber(graft, template, Source([8, 30]), with_loss=False)
    plain = texts_of(transcribe(scribe, Ranks(), batch_size=2, label="plain").hypotheses)
    settings = graft.model.generation_config
    before = settings.to_dict()
    settings.update(do_sample=True, temperature=9.0, repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=3)
    try:
        assert texts_of(transcribe(scribe, Ranks(), batch_size=2, label="odd").hypotheses) == plain
    finally:
        settings.update(**before)


def test_training_goes_on_as_before(graft: Assembled, template: PromptTemplate) -> None:
    """Generation leaves offsets of its batch behind; a training step of another batch size must not meet them."""
    source = Source([5, 12, 9])
    batch = collate_training([FeatureSample("u", "five", source.features[1])], template).model_inputs()
    before = float(graft.model(**batch).loss.detach())
    transcribe(transcriber(graft, template, source), Ranks(), batch_size=3, label="between")
    graft.model.model.multi_modal_projector.requires_grad_(True)
    try:
        loss = graft.model(**batch).loss
        loss.backward()
        gradients = [parameter.grad for parameter in graft.model.model.multi_modal_projector.parameters()]
        assert float(loss.detach()) == before
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    finally:
        graft.model.zero_grad()
        graft.model.requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=40), st.integers(1, 7))
def test_shares_cover_all_exactly_once(lengths: list[int], world_size: int) -> None:
    shares = [rank_share(lengths, Ranks(rank, world_size)) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        assert [lengths[i] for i in share] == sorted((lengths[i] for i in share), reverse=True)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)  # nobody waits for more than one long utterance


class Scripted:
    """Says the id of what it is given, and remembers the batches."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.entries = Source(lengths).entries
        self.batches: list[list[int]] = []

    def read(self, indices: Sequence[int]) -> list[int]:
        return list(indices)

    def answer(self, batch: list[int]) -> Answers:
        self.batches.append(batch)
        return Answers([self.entries[i].id for i in batch], [True] * len(batch), loss=0.5, num_label_tokens=2)


def test_batches_are_of_like_length_longest_first() -> None:
    scribe = Scripted([3, 41, 8, 1, 17])
    share = transcribe(scribe, Ranks(), batch_size=2, label="batches")
    assert scribe.batches == [[1, 4], [2, 0], [3]]
    assert texts_of(share.hypotheses) == {i: f"u{i}" for i in range(5)}
    assert (share.loss, share.num_label_tokens) == (1.5, 6)


def test_a_rank_without_utterances_is_done_at_once() -> None:
    share = transcribe(Scripted([3, 5]), Ranks(2, 3), batch_size=2, label="none")
    assert share.hypotheses == []


class Speaker(nn.Module):
    """Says fixed tokens, whatever it hears; refuses to be called while training or with gradients."""

    def __init__(self, replies: list[list[int]]) -> None:
        super().__init__()
        self.replies, self.generation_config = replies, SimpleNamespace(eos_token_id=256)

    def generate(self, input_ids: torch.Tensor, generation_config: object, **inputs: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled() and "labels" not in inputs
        assert inputs["attention_mask"][:, -1].all(), "padding must be on the left"
        self.settings = generation_config
        return torch.cat([input_ids, torch.tensor(self.replies)], dim=1)


def test_only_the_reply_without_special_tokens(template: PromptTemplate) -> None:
    ids = tokenizer().convert_tokens_to_ids
    space, end, pad = ids("\u0120"), ids("<|im_end|>"), ids("<|endoftext|>")
    replies = [
        [space, ids("h"), ids("i"), end, pad],
        [ids("h"), ids("i"), ids("h"), ids("i"), ids("h")],  # cut off by the limit
        [end, pad, pad, pad, pad],
        [ids("<|vision_start|>"), ids("a"), space, ids("b"), pad],  # the base ends with its other end token
    ]
    speaker, source = Speaker(replies), Source([3, 9, 5, 1])
    samples = [FeatureSample(e.id, "", f) for e, f in zip(source.entries, source.features, strict=True)]
    with inferring(speaker, "cpu", "fp32"):
        texts, finished = generate(speaker, samples, template, 5, "cpu")
    assert texts == ["hi", "hihih", "", "a b"]
    assert finished == [True, False, True, True]
    assert speaker.settings.eos_token_id == [256, end] and speaker.settings.max_new_tokens == 5


def test_each_modules_mode_comes_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()), nn.Linear(2, 2))
    model.train()
    model[1].eval()  # a frozen part stays in evaluation mode while the rest trains
    before = [module.training for module in model.modules()]
    with inferring(model, "cpu", "fp32"):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), inferring(model, "cpu", "fp32"):
        raise KeyError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_bf16_runs_under_autocast(precision: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(3, 5)
    with inferring(linear, "cpu", precision):
        assert linear(torch.ones(1, 3)).dtype == dtype


def test_a_damaged_utterance_ends_the_transcription(graft: Assembled, template: PromptTemplate, tmp_path: Path) -> None:
    source = Source([3, 9, 5])

    def damaged(indices: Sequence[int]) -> list[torch.Tensor]:
        raise ValueError(f"shard {tmp_path}: not those that were written")

    source.read_many = damaged
    with pytest.raises(ValueError, match="not those that were written"):
        transcribe(transcriber(graft, template, source), Ranks(), batch_size=2, label="damaged")
