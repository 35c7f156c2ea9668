"""The embedded default is what it says: unheard voices and sentences, small; and the arithmetic of its scripts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT

TINY = ROOT / "examples" / "tiny"
SPLITS = ("train", "valid", "test")
MOST_BYTES = 25_000_000


@pytest.fixture(autouse=True, scope="module")
def scripts_are_importable() -> Iterator[None]:
    """The scripts import each other by name, as they do when they are run."""
    sys.path.insert(0, str(TINY))
    yield
    sys.path.remove(str(TINY))


def lines(split: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / "corpus" / f"{split}.jsonl").read_text().splitlines()]


def test_no_voice_and_no_sentence_is_in_two_splits() -> None:
    voices = {split: {line["speaker"].split("+")[1] for line in lines(split)} for split in SPLITS}
    texts = {split: {line["text"] for line in lines(split)} for split in SPLITS}
    for kind in (voices, texts):
        assert all(kind[split] for split in SPLITS)
        assert (
            not kind["test"] & kind["train"] and not kind["test"] & kind["valid"] and not kind["valid"] & kind["train"]
        )


def test_manifests_are_true_and_all_is_small() -> None:
    for split in SPLITS:
        ends: dict[str, int] = {}  # in samples
        for line in lines(split):
            start, length = (round(line.get(key, 0) * 16_000) for key in ("offset", "duration"))
            assert start == ends.get(line["audio_filepath"], 0), "one utterance follows the other"
            ends[line["audio_filepath"]] = start + length
        there = {path.relative_to(TINY / "corpus").as_posix() for path in (TINY / "corpus/audio" / split).iterdir()}
        assert set(ends) == there
        for name in Random(split).sample(sorted(ends), 20):
            info = soundfile.info(TINY / "corpus" / name)
            assert info.samplerate == 16_000 and info.channels == 1
            assert info.frames == ends[name]
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < MOST_BYTES


def test_pretraining_hears_nothing_of_the_corpus() -> None:
    from make_corpus import NUM_PRETRAINING, plan_pretraining
    from voices import draw_voice

    plans = plan_pretraining(NUM_PRETRAINING, seed=1)
    assert not {plan.text for plan in plans} & {line["text"] for split in SPLITS for line in lines(split)}
    heard = {draw_voice(plan.voices, Random(plan.seed)).variant for plan in plans}
    assert not heard & {line["speaker"].split("+")[1] for split in SPLITS for line in lines(split)}


def test_the_corpus_is_what_its_script_plans() -> None:
    from make_corpus import plan_corpus
    from voices import draw_voice

    for split, plans in plan_corpus(seed=1).items():
        assert [(line["id"], line["text"]) for line in lines(split)] == [(plan.id, plan.text) for plan in plans]
        speakers = [draw_voice(plan.voices, Random(plan.seed)).speaker for plan in plans]
        assert [line["speaker"] for line in lines(split)] == speakers


def test_a_piece_of_a_file_is_the_utterance_it_is_said_to_be() -> None:
    """Read by its offset, an utterance is what espeak-ng spoke and Opus kept, and not its neighbour."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    from make_corpus import plan_corpus
    from speech_set import read_manifest
    from voices import draw_voice, synthesise

    heard = read_manifest(TINY / "corpus" / "train.jsonl")
    plans = plan_corpus(seed=1)["train"]
    for number in (0, 57, 1_299, 3_299):
        waveform, text = heard.utterance(number)
        spoken = synthesise(plans[number].text, draw_voice("train", Random(plans[number].seed)))
        assert text == plans[number].text and len(waveform) == len(spoken)
        assert np.corrcoef(waveform, spoken)[0, 1] > 0.8


def test_an_invented_voice_is_the_same_everywhere() -> None:
    from invented_voices import describe, invented

    first = describe(invented(7))
    assert first == describe(invented(7)) != describe(invented(8))
    assert first.startswith("language variant\nname invented7\n")
    assert sum(line.startswith("formant ") for line in first.splitlines()) == 9


def test_orthogonal() -> None:
    """Newton-Schulz brings singular values near 1 and keeps the singular vectors, of wide and of tall matrices."""
    from muon import orthogonal

    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 32, 128), (2, 128, 32)):
        matrices = torch.randn(shape, generator=generator)
        result = orthogonal(matrices)
        values = torch.linalg.svdvals(result)
        assert result.shape == matrices.shape and 0.5 < values.min() and values.max() < 1.3
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((left @ right).flatten(), result.flatten(), dim=0) > 0.95


def test_muon_descends() -> None:
    from muon import Muon

    generator = torch.Generator().manual_seed(2)
    target = torch.randn(8, 12, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.05 * target.square().mean()


def test_a_murmur_is_the_sentence_in_slots() -> None:
    """Every slot is a mixture of weight 1; words come in their order, and as often as they are said."""
    from chat_tasks import TaskMaker
    from qwen2vl_base import load_base

    _, tokenizer = load_base(Path(TINY, "qwen2_vl"))
    tasks = TaskMaker(tokenizer, num_rows=1_200, excluded=())
    for text in ("emma sold nine cookies friday", "call seven seven seven one"):
        words = tasks.encode(f" {text}")
        slots = tasks.slots([(token, 2 * length) for token, length in tasks.speak(text, Random(1))], Random(2))
        assert torch.allclose(slots.sum(1), torch.ones(len(slots)), atol=1e-5)
        order = torch.unique_consecutive(slots.argmax(1)).tolist()
        assert [each for each in order if each in words] == words


def test_listening_is_of_doubtful_spikes_and_of_rows_of_few_words() -> None:
    """A doubted word keeps a share that can still be heard; a row of few words has two or three different ones."""
    from dataclasses import replace

    from chat_tasks import LISTENING, TaskMaker, draw_text
    from qwen2vl_base import load_base

    _, tokenizer = load_base(Path(TINY, "qwen2_vl"))
    tasks = TaskMaker(tokenizer, num_rows=1_200, excluded=())
    (word,) = tasks.encode(" nine")
    doubts = [tasks.doubted(word, Random(seed)) for seed in range(200)]
    assert all(sum(doubt.values()) == pytest.approx(1) and doubt[word] >= 0.4 for doubt in doubts)
    assert any(tasks.pause in doubt for doubt in doubts) and any(doubt[word] < 0.5 for doubt in doubts)
    few = replace(LISTENING[-1], row_shares={"digits": 1.0, "words": 0.0}, row_lengths=(8, 8), few_share=1.0)
    assert max(len(set(draw_text(Random(seed), (), few).split())) for seed in range(50)) == 3
    plain = [draw_text(Random(seed), (), replace(few, few_share=0.0)).split() for seed in range(50)]
    assert max(len(set(words)) for words in plain) > 5
    heard = [tasks.murmur("nine nine three", Random(seed), LISTENING[0]) for seed in range(20)]
    assert all(slots.sum(1).std() > 0.01 for slots in heard), "slots are of different loudness"


def test_what_is_doubted_is_true_as_often_as_its_weight_says() -> None:
    """Of the two likeliest, e to the ``fade`` times their distance is how much oftener the first is what was said."""
    from collections import Counter
    from math import exp

    from chat_tasks import TaskMaker
    from qwen2vl_base import load_base

    _, tokenizer = load_base(Path(TINY, "qwen2_vl"))
    tasks, rng, fade = TaskMaker(tokenizer, num_rows=1_200, excluded=()), Random(1), 4.0
    expected, found = Counter(), Counter()
    for _ in range(20_000):
        said = rng.choice(tasks.words)
        heard = tasks.weighed(said, fade, rng)
        assert said in heard and sum(heard.values()) == pytest.approx(1) and 1 <= len(heard) <= 5
        likeliest, *others = sorted(heard, key=heard.get, reverse=True)
        if len(others) == 1:
            odds = exp(fade * (1 - heard[others[0]] / heard[likeliest]))
            tenth = int(10 * heard[others[0]] / heard[likeliest])
            expected[tenth] += 1 / (1 + odds)
            found[tenth] += said != likeliest
    assert len(expected) >= 10
    assert all(abs(found[tenth] - expected[tenth]) < 4 * expected[tenth] ** 0.5 + 2 for tenth in expected)


def test_a_word_that_is_spotted_has_a_slot_of_its_own() -> None:
    """Without doubt, the likeliest of each slot, equal neighbours as one, say what is said: as with CTC."""
    from dataclasses import replace

    from chat_tasks import IN_SLOTS, TaskMaker
    from qwen2vl_base import load_base

    _, tokenizer = load_base(Path(TINY, "qwen2_vl"))
    tasks = TaskMaker(tokenizer, num_rows=1_200, excluded=())
    manner, text = replace(IN_SLOTS, doubt=0.0), "call seven seven two two two"
    for seed in range(50):
        slots = tasks.slots(tasks.speak(text, Random(seed), manner), Random(seed), manner)
        heard = [each for each in torch.unique_consecutive(slots.argmax(1)).tolist() if each != tasks.pause]
        assert heard == tasks.encode(f" {text}")


def test_lessons_go_from_repeating_to_murmurs_to_chats() -> None:
    """Whatever the lesson, the answer alone is learnt: the text that was written out or murmured, and its end."""
    from chat_tasks import IGNORED, LESSONS, TAIL, TaskMaker, lesson_at
    from qwen2vl_base import load_base

    model, tokenizer = load_base(Path(TINY, "qwen2_vl"))
    tasks = TaskMaker(tokenizer, model.config.text_config.vocab_size, excluded=())
    assert [LESSONS.index(lesson_at(LESSONS, step, 100)) for step in (0, 24, 25, 59, 60, 99)] == [0, 0, 1, 1, 2, 2]
    for seed in range(20):
        written, murmured = (tasks.draw(Random(seed), lesson) for lesson in LESSONS[:2])
        for sequence in (written, murmured):
            answer = tokenizer.decode(sequence.labels[sequence.labels != IGNORED])
            assert sequence.labels[-1] == IGNORED and answer.endswith("<|im_end|>")
            said = tokenizer.decode(sequence.mixture.argmax(1))
            assert said.endswith(TAIL + answer + "\n")
        answer = tokenizer.decode(written.labels[written.labels != IGNORED])
        assert (
            tokenizer.decode(written.mixture.argmax(1))
            == " " + answer.removesuffix("<|im_end|>") + TAIL + answer + "\n"
        )
        assert murmured.noisy.any() and not (murmured.noisy & (murmured.labels != IGNORED)).any()


def test_joined_utterances_fit_the_window() -> None:
    from augmentation import Augmentation
    from speech_set import SpeechSet, joined
    from whisper_pretraining import draw_from

    speech = SpeechSet()
    for seconds, text in ((1.0, "one"), (1.6, "two"), (2.2, "three")):
        speech.append(np.full(int(seconds * 16_000), 0.1), text)
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(60):
        waveform, text = joined(draw_from(speech), Augmentation(), 64_000, 0.9, rng)
        assert 0 < len(waveform) <= 64_000 and set(text.split()) <= {"one", "two", "three"}
        seen.add(len(text.split()))
    assert {1, 2} <= seen
