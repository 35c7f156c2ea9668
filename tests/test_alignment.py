"""Aligning audio with the words that are said: CTC against every path by hand, and the language model at rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_bases as tiny
import torch

from graft.data.collate import Batch, collate_training
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.model.alignment import AUDIBLE, SHARPNESS, alignment_loss
from graft.model.assemble import Assembled, assemble
from graft.recipe import Stage, load_recipe
from graft.train.feed import _check_can_align
from tests.test_feed import STAGE, a_set, feed

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))  # pause, and three words


def collapsed(path: Sequence[int]) -> list[int]:
    """What a path says: equal neighbours are one, pauses are nothing."""
    return [word for word, before in zip(path, [0, *path], strict=False) if word and word != before]


def by_hand(embeds: torch.Tensor, said: list[int]) -> float:
    """-log of the probability of all paths (A,) that say it, and the distance from the mixtures; embeds (A, H)."""
    unit = [row / row.norm() for row in ROWS]
    shares, apart = [], 0.0
    for embed in embeds:
        scores = torch.stack([SHARPNESS * (embed / embed.norm() @ row) for row in unit])
        shares.append(scores.softmax(0))
        behind = [math.log(shares[-1].max() / share) for share in shares[-1]]
        parts = torch.tensor([max(0.0, 1 - nats / AUDIBLE) for nats in behind])
        apart += float(((embed - parts / parts.sum() @ ROWS) ** 2).mean() / ROWS.var()) / len(embeds)
    total = sum(
        math.prod(float(shares[place][word]) for place, word in enumerate(path))
        for path in itertools.product(range(len(ROWS)), repeat=len(embeds))
        if collapsed(path) == said
    )
    return (-math.log(total) if total else 0.0) + len(said) * apart


@pytest.mark.parametrize("said", [[1], [2, 3], [2, 2], [3, 1, 3]])
def test_all_ways_to_say_it(said: list[int]) -> None:
    """Beside an utterance that is longer, in every respect, and counts for itself alone."""
    chance = torch.Generator().manual_seed(len(said))
    embeds = torch.randn(2, 5, 6, generator=chance)
    spoken, num_spoken = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([len(said), 4])
    spoken[0, : len(said)], spoken[1] = torch.tensor(said, dtype=torch.int64), torch.tensor([1, 2, 1, 3])
    loss = alignment_loss(embeds, torch.tensor([4, 5]), ROWS, spoken, num_spoken)
    assert loss[0].item() == pytest.approx(by_hand(embeds[0, :4], said), rel=1e-4)
    assert loss[1].item() == pytest.approx(by_hand(embeds[1], [1, 2, 1, 3]), rel=1e-4)


def test_more_words_than_audio_tokens() -> None:
    """Two equal words need three tokens: what cannot be gives no infinite loss."""
    embeds = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = alignment_loss(embeds, torch.tensor([2]), ROWS, torch.tensor([[2, 2]]), torch.tensor([2]))
    loss.sum().backward()
    assert loss.isfinite().all() and embeds.grad.isfinite().all()


@pytest.mark.parametrize("others", [[[1, 2]], []])
def test_where_nobody_knows_what_is_said_nothing_is_learnt(others: list[list[int]]) -> None:
    """Beside an utterance that is known, and in a micro-batch of unknown ones alone."""
    said = [*others, []]
    embeds = torch.randn(len(said), 5, 6, generator=torch.Generator().manual_seed(7)).requires_grad_()
    spoken = torch.tensor([each + [0] * (len(said[0]) - len(each)) for each in said], dtype=torch.int64)
    loss = alignment_loss(embeds, torch.tensor([5] * len(said)), ROWS, spoken, torch.tensor([*map(len, said)]))
    loss.sum().backward()
    assert loss[-1] == 0 and not embeds.grad[-1].any()
    assert all(embeds.grad[i].abs().sum() > 0 for i in range(len(others)))


def test_an_embedding_of_no_size_has_a_gradient_within_measure() -> None:
    """It says no word more than another, and is drawn towards them no harder than one of a tenth of their size."""
    embeds = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(5))
    embeds[0, 2] = 0
    embeds.requires_grad_()
    alignment_loss(embeds, torch.tensor([4]), ROWS, torch.tensor([[1, 3]]), torch.tensor([2])).sum().backward()
    sizes = embeds.grad[0].norm(dim=-1)
    assert 0 < sizes[2] < 20 * sizes[[0, 1, 3]].max()


def test_the_rows_themselves_are_best() -> None:
    """In the words' order and of their size: turned, swapped or made larger, the loss is higher."""
    said = {"spoken": torch.tensor([[1, 3]]), "num_spoken": torch.tensor([2])}

    def loss(*rows: torch.Tensor) -> float:
        return alignment_loss(torch.stack(rows)[None], torch.tensor([len(rows)]), ROWS, **said).item()

    pause, first, _, last = ROWS
    best = loss(first, pause, last)
    assert best < 0.1
    for worse in [(last, pause, first), (2 * first, pause, 2 * last), (first, pause, pause), (first, -pause, last)]:
        assert loss(*worse) > best + 0.1


def test_what_was_perhaps_said_stays_to_be_seen() -> None:
    """Of two rows that an embedding is like, the fainter's part in the mixture is by the logarithm of its share."""
    words = torch.eye(3)
    said = {"spoken": torch.tensor([[1]]), "num_spoken": torch.tensor([1])}

    def pull(part: float) -> torch.Tensor:
        """What the mean distance alone does to an embedding of so much of word 2 beside word 1."""
        embed = torch.tensor([[[0.0, 1 - part, part]]]).requires_grad_()
        whole = alignment_loss(embed, torch.tensor([1]), words, **said).sum()
        order = -(SHARPNESS * torch.nn.functional.normalize(embed[0, 0], dim=0)).log_softmax(0)[1]
        return torch.autograd.grad(whole - order, embed)[0][0, 0, 2]

    # by hand: 0.4 beside 0.6 is 16 * 0.2 / 0.7211 = 4.44 nats behind, a part of 1 - 4.44 / 8 = 0.445 to 1: 0.308
    assert pull(0.4).item() == pytest.approx(2 * (0.4 - 0.308) / 3 / words.var().item(), abs=2e-3)
    # 0.3 beside 0.7 is 8.4 nats behind: nothing is left of it
    assert pull(0.3).item() == pytest.approx(2 * 0.3 / 3 / words.var().item(), abs=2e-3)


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    folder = tmp_path_factory.mktemp("bases")
    return assemble(tiny.recipe(tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q")))


@pytest.fixture(scope="module")
def template(graft: Assembled) -> PromptTemplate:
    return PromptTemplate.from_processor(graft.processor, "System.", "Write.")


def aligned(graft: Assembled, template: PromptTemplate) -> Batch:
    size = graft.config.audio_config.d_model
    chance = torch.Generator().manual_seed(3)
    texts, frames = ["one apple", "two one two"], [31, 44]
    features = [torch.randn(count, size, generator=chance).bfloat16() for count in frames]
    samples = [FeatureSample(f"u{i}", text, features[i]) for i, text in enumerate(texts)]
    return collate_training(samples, template, align=True)


def test_what_is_said_is_numbered(graft: Assembled, template: PromptTemplate) -> None:
    batch = aligned(graft, template)
    words = batch.words.tolist()
    assert words[0] == template.pause_id and len(set(words)) == len(words)
    for row, count, text in zip(batch.spoken, batch.num_spoken, ["one apple", "two one two"], strict=True):
        ids = [words[number] for number in row[:count]]
        assert ids == template.spoken_ids(text)
        assert template.processor.tokenizer.decode(ids) == text.replace(" ", "")  # each byte is a token here
        assert not row[count:].any()


def test_an_answer_is_not_what_is_said(graft: Assembled, template: PromptTemplate) -> None:
    """With an instruction of its own an utterance has no words; with the recipe's, spelled out, it has."""
    size, texts = graft.config.audio_config.d_model, {"Was that a question?": "yes", "Write.": "two", None: "one"}
    samples = [FeatureSample(text, text, torch.ones(20, size).bfloat16(), asked) for asked, text in texts.items()]
    batch = collate_training(samples, template, align=True)
    assert batch.num_spoken.tolist() == [0, 3, 3]  # each byte is a token here
    assert set(batch.words.tolist()) == {template.pause_id, *template.spoken_ids("two one")}
    answers = collate_training(samples[:1], template, align=True)
    assert graft.model(**answers.model_inputs(), num_items_in_batch=1, use_cache=False).loss == 0


def test_only_the_projector_works(graft: Assembled, template: PromptTemplate) -> None:
    """What the language model would do is never done; padding and company change no utterance's loss."""
    model = graft.model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    batch = aligned(graft, template)

    def refuse(*_: object) -> None:
        raise AssertionError("the language model runs")

    hook = model.model.language_model.register_forward_pre_hook(refuse)
    try:
        loss = model(**batch.model_inputs(), num_items_in_batch=10, use_cache=False).loss
        loss.backward()
        twice = model(**batch.model_inputs(), num_items_in_batch=5, use_cache=False).loss
    finally:
        hook.remove()
    assert loss.dtype == torch.float32 and twice.item() == pytest.approx(2 * loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
    projector.zero_grad(set_to_none=True)
    projector.requires_grad_(False)
    rows = model.get_input_embeddings()(batch.words)
    alone = 0.0
    for i, (frames, count) in enumerate(zip(batch.audio_features, batch.audio_feature_lengths, strict=True)):
        embeds = model.model.project(frames[None, :count], count[None])
        tokens = torch.tensor([embeds.shape[1]])
        said, length = batch.spoken[i : i + 1, : batch.num_spoken[i]], batch.num_spoken[i : i + 1]
        alone += alignment_loss(embeds, tokens, rows, said, length).item()
    assert loss.item() * 10 == pytest.approx(alone, rel=1e-4)


def test_the_first_steps_align(tmp_path: Path, template: PromptTemplate) -> None:
    stage = STAGE.model_copy(update={"alignment_steps": 2})
    steps = feed(a_set(tmp_path / "set", [61, 40, 83, 50]), template, stage).steps(0, 4)
    assert [all(b.words is not None for b in step.micro_batches) for step in steps] == [True, True, False, False]


def test_a_set_of_answers_alone_cannot_align(
    tmp_path: Path, template: PromptTemplate, caplog: pytest.LogCaptureFixture
) -> None:
    stage, folder = STAGE.model_copy(update={"alignment_steps": 2}), a_set(tmp_path / "set", [61, 40, 83, 50])

    def asked(*instructions: str | None) -> None:
        open_source = feed(folder, template, STAGE).source
        entries = [replace(e, instruction=i) for e, i in zip(open_source.entries, instructions, strict=True)]
        _check_can_align(SimpleNamespace(entries=entries), template)

    with caplog.at_level("INFO"):
        asked(None, "Write.", None, None)
        assert not caplog.text
        asked(None, "Who is it?", None, "Translate.")
    assert "2 of 4 utterances have an instruction of their own" in caplog.text
    with pytest.raises(ValueError, match="leave the instruction away"):
        asked(*["Who is it?"] * 4)
    feed(folder, template, stage)


def test_stage_2_has_none() -> None:
    with pytest.raises(ValueError, match="stage2.alignment_steps must stay 0"):
        load_recipe(TINY, ["stage2.alignment_steps=5"])


def test_a_tokenizer_without_a_space(template: PromptTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptTemplate, "text_ids", lambda self, text: [1, 2])
    with pytest.raises(ValueError, match="needs a tokenizer with one token for a space; this one gives"):
        _ = template.pause_id


def test_a_stage_has_none_unless_asked() -> None:
    assert Stage().alignment_steps == 0
