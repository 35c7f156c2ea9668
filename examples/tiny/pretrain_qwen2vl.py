"""Pretrain the tiny Qwen2-VL on text and pictures and save it, in stock Hugging Face format, to ``qwen2_vl/``.

    python examples/tiny/pretrain_qwen2vl.py                       # the course of following, from random weights
    python examples/tiny/pretrain_qwen2vl.py --course spelling     # and then this one, from what the first has saved
    python examples/tiny/pretrain_qwen2vl.py --course listening    # and then this one
    python examples/tiny/pretrain_qwen2vl.py --course doubting     # and so on: counting, spotting

It learns the grammar's language, to write a clean sentence for a murmured one (see chat_tasks.py), and to name a
coloured shape. It never sees a sentence of valid or test. Run the same command again after an interruption and it goes
on from its checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import jiwer
import torch
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from chat_tasks import (
    COUNTING,
    DOUBTING,
    IGNORED,
    INSTRUCTIONS,
    LESSONS,
    LISTENING,
    SPELLING,
    SPOTTING,
    TRANSCRIBE,
    Lesson,
    Sequence,
    TaskMaker,
    TextBatch,
    collate,
    draw_row,
    draw_sentence,
    embed,
    lesson_at,
)
from grammar import DIGITS, vocabulary
from make_corpus import HERE, plan_corpus
from pictures import COLOURS, QUESTIONS, SHAPES, picture_batch
from qwen2vl_base import SYSTEM, load_base, make_config, make_generation_config, make_tokenizer, save_base
from training_run import Losses, TrainingRun

WARMUP_STEPS = 100
BATCH_SIZE = 32
POOL = 8  # batches that are drawn together and sorted by length: there is less padding
NUM_TOKENIZER_SENTENCES = 10_000


@dataclass(frozen=True)
class Course:
    """Lessons, in how many steps and with which peak of the learning rate."""

    lessons: tuple[Lesson, ...]
    steps: int
    peak_lr: float
    picture_every: int  # steps
    pooled: bool = False  # batches of sequences of about one length
    offset: float = 0.0  # of murmurs, see embed()


COURSES = {
    "following": Course(LESSONS, 3_600, 2e-3, 2),
    "spelling": Course(SPELLING, 600, 1e-3, 1),
    "listening": Course(LISTENING, 2_600, 5e-4, 8, pooled=True),
    "doubting": Course(DOUBTING, 2_000, 1e-3, 8, pooled=True),
    "counting": Course(COUNTING, 2_800, 1e-3, 8, pooled=True, offset=0.3),
    "spotting": Course(SPOTTING, 1_700, 1e-3, 8, pooled=True, offset=0.3),
}


@dataclass
class Training:
    """What is trained, and what it learns from."""

    model: Qwen2VLForConditionalGeneration
    tokenizer: Qwen2Tokenizer
    tasks: TaskMaker
    processor: Qwen2VLImageProcessorPil
    seed: int
    course: Course
    pools: dict[int, list[list[Sequence]]] = field(default_factory=dict)  # the newest alone, by its number


def held_out_sentences(seed: int) -> list[str]:
    """The sentences of valid and test."""
    plans = plan_corpus(seed)
    return [plan.text for split in ("valid", "test") for plan in plans[split]]


def tokenizer_texts(excluded: Collection[str], seed: int) -> list[str]:
    """What the tokenizer learns its pieces from: sentences, and the fixed phrases of the chat."""
    rng = Random(f"{seed}/tokenizer")
    answers = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    words = [before + word for word in vocabulary() for before in ("", " ")]  # each one piece, wherever it stands
    phrases = [SYSTEM, "system\nuser\nassistant\n", *INSTRUCTIONS, *QUESTIONS, *answers, *words]
    return [draw_sentence(rng, excluded) for _ in range(NUM_TOKENIZER_SENTENCES)] + phrases * 200


def make_training(seed: int, course: Course, output: Path) -> Training:
    """A model, for the first course with random weights and then that of ``output``, and all it learns from."""
    torch.manual_seed(seed)
    excluded = frozenset(held_out_sentences(seed))
    if course == COURSES["following"]:
        tokenizer = make_tokenizer(tokenizer_texts(excluded, seed))
        model = Qwen2VLForConditionalGeneration(make_config(tokenizer))
        model.generation_config = make_generation_config(tokenizer)
    else:
        model, tokenizer = load_base(output)
        model.train()
    tasks = TaskMaker(tokenizer, model.config.text_config.vocab_size, excluded)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=224 * 224)
    return Training(model, tokenizer, tasks, processor, seed, course)


def losses_of(training: Training, step: int) -> Losses:
    """The losses of one step: text, and now and then pictures too."""
    course = training.course
    rng = Random(f"{training.seed}/step/{step}")
    if course.pooled:
        batch = pooled_batch(training, step)
    else:
        lesson = lesson_at(course.lessons, step, course.steps)
        batch = collate([training.tasks.draw(rng, lesson) for _ in range(BATCH_SIZE)])
    noise = torch.Generator().manual_seed(rng.getrandbits(32))
    losses = {"text": text_loss(training.model, batch, noise, course.offset)}
    if step % course.picture_every == 0:
        arguments, _ = picture_batch(BATCH_SIZE // 2, rng, training.tokenizer, training.processor)
        losses["pictures"] = training.model(**arguments).loss
    return losses


def pooled_batch(training: Training, step: int) -> TextBatch:
    """One of ``POOL`` batches that were drawn and sorted by length together; they come in random order."""
    number, place = divmod(step, POOL)
    batches = training.pools.get(number)
    if batches is None:
        rng, course = Random(f"{training.seed}/pool/{number}"), training.course
        lesson = lesson_at(course.lessons, step, course.steps)
        drawn = [training.tasks.draw(rng, lesson) for _ in range(POOL * BATCH_SIZE)]
        drawn.sort(key=lambda sequence: len(sequence.labels))
        batches = [drawn[start : start + BATCH_SIZE] for start in range(0, len(drawn), BATCH_SIZE)]
        rng.shuffle(batches)
        training.pools = {number: batches}
    return collate(batches[place])


def text_loss(
    model: Qwen2VLForConditionalGeneration, batch: TextBatch, generator: torch.Generator, offset: float = 0.0
) -> torch.Tensor:
    """Mean cross entropy over the labels of a text batch. Padding stands behind, where causal attention never looks."""
    embeds = embed(batch, model.get_input_embeddings().weight, generator, offset)
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    following = batch.labels[:, 1:]
    learnt = following != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][learnt]).float(), following[learnt])


@torch.inference_mode()
def murmur_error_rate(training: Training, sentences: list[str]) -> float:
    """WER of the model's answers to murmurs of ``sentences``."""
    rng, tasks, model = Random(f"{training.seed}/murmur"), training.tasks, training.model
    answers = []
    for text in sentences:
        sequence = tasks.transcription(tasks.murmur(text, rng), text, TRANSCRIBE, marked=True)
        prompt = collate([sequence]).mixture[:, : -len(tasks.encode(text + "<|im_end|>\n"))]
        ids = model.generate(
            inputs_embeds=prompt @ model.get_input_embeddings().weight, attention_mask=torch.ones(prompt.shape[:2])
        )
        answers.append(training.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    return jiwer.wer(sentences, answers)


@torch.inference_mode()
def language_loss(training: Training, sentences: list[str]) -> float:
    """Mean cross entropy, in nats a token, of unseen sentences as plain text."""
    rows = [training.tasks.encode(text + "<|endoftext|>") for text in sentences]
    losses = [training.model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
    return torch.stack(losses).mean().item()


@torch.inference_mode()
def picture_accuracy(training: Training, count: int = 100) -> float:
    """Share of unseen pictures that are named exactly."""
    rng = Random(f"{training.seed}/unseen pictures")
    arguments, answers = picture_batch(count, rng, training.tokenizer, training.processor, with_answers=False)
    del arguments["labels"]
    ids = training.model.generate(**arguments)[:, arguments["input_ids"].shape[1] :]
    heard = training.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(answer == said.strip() for answer, said in zip(answers, heard, strict=True)) / count


def report(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "qwen2_vl")
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / "runs" / "tiny-qwen2-vl")
    parser.add_argument("--course", choices=COURSES, default="following")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)

    course = COURSES[arguments.course]
    training = make_training(arguments.seed, course, arguments.output)
    checkpoint = arguments.cache / f"{arguments.course}.pt"
    run = TrainingRun(training.model, checkpoint, course.steps, course.peak_lr, WARMUP_STEPS, report)
    run.train(partial(losses_of, training))
    save_base(training.model, training.tokenizer, arguments.output)
    training.model.eval()
    unseen = held_out_sentences(arguments.seed)
    print(f"unseen sentences: {language_loss(training, unseen):.3f} nats a token as plain text")
    print(f"unseen sentences, murmured: WER {murmur_error_rate(training, unseen):.2%}")
    for name, words in (("digits", DIGITS), ("words", vocabulary())):
        rngs = [Random(f"{arguments.seed}/{name}/{i}") for i in range(100)]
        rows = [draw_row(words, LESSONS[-1].row_lengths, rng, unseen) for rng in rngs]
        print(f"rows of {name}, murmured: WER {murmur_error_rate(training, rows):.2%}")
    print(f"unseen pictures named exactly: {picture_accuracy(training):.0%}")


if __name__ == "__main__":
    main()
