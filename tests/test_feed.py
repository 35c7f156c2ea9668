"""From a step's number to micro-batches: the same for any number of ranks, and masks that belong to the utterance."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from graft.data.loader import FeatureSource, MixedSource, ShardSource
from graft.data.manifest import Utterance
from graft.data.prompt import PromptTemplate
from graft.data.shard_format import FeatureSet
from graft.data.shard_writer import ShardWriter, merge_parts
from graft.ranks import Ranks
from graft.recipe import Data, Stage
from graft.train.feed import Feed, StepInput
from graft.train.guard import inputs_of
from tests import tiny_bases
from tests.test_prompt import INSTRUCTION, SYSTEM, make_processor
from tests.test_shard_format import DESCRIPTION, D

NUM_FRAMES = [61, 40, 83, 50, 77, 96, 45]
STAGE = Stage(
    global_batch_size=4, micro_batches=3, micro_batch_tokens=400, time_masks=2, time_mask_frames=20, max_steps=100
)
Masks = dict[tuple[int, str], list[tuple[int, ...]]]  # (epoch, utterance id) -> masked frames of each pass, sorted


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    return PromptTemplate.from_processor(make_processor(tiny_bases.tokenizer()), SYSTEM, INSTRUCTION)


def a_set(folder: Path, sizes: list[int], step: int = 0) -> ShardSource:
    """Utterances u0, u1, ... of these many frames, all of them ones; with ``step``, each so much above the last."""
    description = replace(DESCRIPTION, samples_per_shard=len(sizes))
    (folder / "parts").mkdir(parents=True)
    with ShardWriter(folder, description, 0) as writer:
        for number, size in enumerate(sizes):
            frames = torch.full((size, D), 1.0 + step * number)
            writer.add(Utterance(f"u{number}", Path("none.wav"), None, "x" * number + "y"), frames, 320)
    merge_parts(folder, description, [writer.part], [])
    return ShardSource(FeatureSet.open(folder))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    return a_set(tmp_path_factory.mktemp("clean") / "set", NUM_FRAMES)


@pytest.fixture(scope="module")
def mixed(clean: ShardSource, tmp_path_factory: pytest.TempPathFactory) -> MixedSource:
    return MixedSource({"clean": clean, "noisy": a_set(tmp_path_factory.mktemp("noisy") / "set", NUM_FRAMES[:5])})


def feed(
    source: FeatureSource, template: PromptTemplate, stage: Stage = STAGE, ranks: Ranks | None = None, **data: object
) -> Feed:
    return Feed(source, template, stage, Data(**data), ranks or Ranks(), seed=11)


def steps_of_all_ranks(
    world_size: int, source: FeatureSource, template: PromptTemplate, first: int, last: int, **settings: object
) -> list[list[StepInput]]:
    """For each step, the input of each rank."""
    everyone = [Ranks(rank=rank, world_size=world_size, local_rank=0) for rank in range(world_size)]
    streams = [feed(source, template, ranks=ranks, **settings).steps(first, last) for ranks in everyone]
    return [list(inputs) for inputs in zip(*streams, strict=True)]


def masks_of(inputs: list[StepInput]) -> Masks:
    found: Masks = defaultdict(list)
    for one in inputs:
        for batch in one.micro_batches:
            for name, rows, length in zip(batch.ids, batch.audio_features, batch.audio_feature_lengths, strict=True):
                masked = (rows[:length] == 0).all(dim=1).nonzero().flatten().tolist()
                found[one.epoch, name].append(tuple(masked))
    return {key: sorted(masks) for key, masks in found.items()}


WEIGHTS = {"clean": 1, "noisy": 2}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_together_read_the_step(world_size: int, mixed: MixedSource, template: PromptTemplate) -> None:
    """Each micro-batch on one rank, the same whatever the number of ranks, also when begun in the middle."""
    whole = [one for (one,) in steps_of_all_ranks(1, mixed, template, 0, 9, train_split=WEIGHTS)]
    for number, inputs in enumerate(steps_of_all_ranks(world_size, mixed, template, 4, 9, train_split=WEIGHTS), 4):
        alone = whole[number]
        assert {one.ids for one in inputs} == {alone.ids} and {one.epoch for one in inputs} == {alone.epoch}
        assert sorted(chain.from_iterable(one.numbers for one in inputs)) == list(alone.numbers)
        expected = dict(zip(alone.numbers, alone.micro_batches, strict=True))
        for one in inputs:
            for batch_number, batch in zip(one.numbers, one.micro_batches, strict=True):
                assert batch.ids == expected[batch_number].ids
                assert torch.equal(batch.input_ids, expected[batch_number].input_ids)
                assert torch.equal(batch.audio_features, expected[batch_number].audio_features)


def test_an_epoch_of_a_mixture(mixed: MixedSource, template: PromptTemplate) -> None:
    """7 utterances once and 5 twice, in steps of at most 4."""
    one_rank = feed(mixed, template, train_split=WEIGHTS)
    ids = [name for step in range(5) for name in one_rank.read(step).ids]
    assert sorted(ids) == [f"clean/u{n}" for n in range(7)] + [f"noisy/u{n // 2}" for n in range(10)]


def test_masks_are_the_utterances_own(clean: ShardSource, template: PromptTemplate) -> None:
    """Steps, micro-batches and pools of other sizes: in an epoch an utterance is masked as before."""
    other = STAGE.model_copy(update={"global_batch_size": 3, "micro_batches": 1})
    masks = masks_of([feed(clean, template).read(step) for step in range(4)])  # two epochs of two steps
    again = masks_of([feed(clean, template, other, shuffle_pool=1).read(step) for step in range(6)])
    assert len(masks) == 2 * len(NUM_FRAMES) and masks == again


def test_masks_differ_between_epochs_utterances_and_passes(mixed: MixedSource, template: PromptTemplate) -> None:
    """Equal lengths of clean/u0 and noisy/u0 do not make them alike; nor do both passes over noisy/u0."""
    one_rank = feed(mixed, template, train_split=WEIGHTS)
    masks = masks_of([one_rank.read(step) for step in range(40)])  # eight epochs
    assert len(masks) == 8 * 12 and all(len(of) == 1 + name.startswith("noisy") for (_, name), of in masks.items())
    drawn = list(chain.from_iterable(masks.values()))
    assert len(set(drawn)) > 0.95 * len(drawn), "the same masks again and again"
    first, second = masks[0, "noisy/u4"]
    assert first != second


def test_what_an_id_gets_does_not_hang_on_its_place(
    clean: ShardSource, template: PromptTemplate, tmp_path: Path
) -> None:
    """Another set in which u2 has the same length and another number of neighbours."""
    shorter = a_set(tmp_path / "shorter", [31, 42, NUM_FRAMES[2]])
    ours = masks_of([feed(clean, template).read(step) for step in range(2)])
    theirs = masks_of([feed(shorter, template).read(0)])
    assert theirs[0, "u2"] == ours[0, "u2"] and theirs[0, "u0"] != ours[0, "u0"]


def test_shifts_leave_budgets_and_placeholders_as_they_are(clean: ShardSource, template: PromptTemplate) -> None:
    """Frames of zeros behind, at most three of them and not always as many; nothing else differs."""
    plain = STAGE.model_copy(update={"time_masks": 0})
    shifted = plain.model_copy(update={"time_shift_frames": 3})
    zeros = masks_of([feed(clean, template, shifted).read(step) for step in range(8)])
    shifts = []
    for (_, name), passes in zeros.items():
        (frames,), length = passes, NUM_FRAMES[int(name[1:])]
        assert frames == tuple(range(length - len(frames), length)), "not the last frames"
        shifts.append(len(frames))
    assert set(shifts) == {0, 1, 2, 3}
    before, after = feed(clean, template, plain).read(5), feed(clean, template, shifted).read(5)
    for ours, theirs in zip(before.micro_batches, after.micro_batches, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.audio_feature_lengths, theirs.audio_feature_lengths)


def test_voices_are_the_same_on_any_number_of_ranks(template: PromptTemplate, tmp_path: Path) -> None:
    """They come from the step, which is the same wherever it is read; nothing but frames differs."""
    source = a_set(tmp_path / "set", NUM_FRAMES, step=1)
    plain = STAGE.model_copy(update={"time_masks": 0, "global_batch_size": 7})
    stage = plain.model_copy(update={"voice_mixing": 1.0})
    changed: dict[int, list[bool]] = defaultdict(list)  # by the number of utterances in the micro-batch
    for step in range(8):
        shared = [feed(source, template, stage, ranks=Ranks(rank, 3, rank)).read(step) for rank in range(3)]
        there = {
            number: batch for each in shared for number, batch in zip(each.numbers, each.micro_batches, strict=True)
        }
        alone, as_they_are = (feed(source, template, each).read(step) for each in (stage, plain))
        for number, ours, unmixed in zip(alone.numbers, alone.micro_batches, as_they_are.micro_batches, strict=True):
            assert torch.equal(ours.audio_features, there[number].audio_features)
            assert torch.equal(ours.audio_feature_lengths, unmixed.audio_feature_lengths)
            assert torch.equal(ours.input_ids, unmixed.input_ids)
            changed[len(ours.ids)].append(not torch.equal(ours.audio_features, unmixed.audio_features))
    assert set(changed) == {2, 3} and all(map(any, changed.values()))


def test_voices_do_not_hang_on_how_a_step_is_cut(template: PromptTemplate, tmp_path: Path) -> None:
    """Alone in its micro-batch an utterance is lent the same voice."""
    source = a_set(tmp_path / "set", NUM_FRAMES, step=1)
    cuts, frames = [], []
    for count in (1, 7):
        update = {"time_masks": 0, "voice_mixing": 1.0, "global_batch_size": 7, "micro_batches": count}
        batches = feed(source, template, STAGE.model_copy(update=update)).read(0).micro_batches
        cuts.append(len(batches))
        ready = (zip(b.ids, b.audio_features, b.audio_feature_lengths, strict=True) for b in batches)
        frames.append({name: each[:length] for name, each, length in chain.from_iterable(ready)})
    assert cuts[0] < cuts[1] == 7 and frames[0].keys() == frames[1].keys() and len(frames[0]) == 7
    assert all(torch.equal(frames[0][name], frames[1][name]) for name in frames[0])


def test_no_masks(clean: ShardSource, template: PromptTemplate) -> None:
    plain = STAGE.model_copy(update={"time_masks": 0})
    masks = masks_of([feed(clean, template, plain).read(0)])
    assert set(chain.from_iterable(masks.values())) == {()}


def test_ranks_know_of_another_mixture(mixed: MixedSource, clean: ShardSource, template: PromptTemplate) -> None:
    """What the guard compares between ranks."""
    seen = [inputs_of(feed(mixed, template, train_split={"clean": 1, "noisy": weight})) for weight in (2, 0.5)]
    assert [inputs["utterances"] for inputs in seen] == [["7 of 7", "10 of 5"], ["7 of 7", "3 of 5"]]
    alone = inputs_of(feed(clean, template))
    assert alone["utterances"] == ["7 of 7"] and alone["utterances_digest"] != seen[0]["utterances_digest"]


def test_fewer_micro_batches_than_ranks(clean: ShardSource, template: PromptTemplate) -> None:
    with pytest.raises(ValueError, match="3 micro-batches and there are 4 ranks"):
        feed(clean, template, ranks=Ranks(rank=0, world_size=4, local_rank=0))
