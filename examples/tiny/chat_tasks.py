"""What the tiny Qwen2-VL learns before it ever hears speech: to write down a text that is murmured to it.

Where speech will stand later, a *murmur* of the text stands now: its words or its letters laid on a time line, each
long or short, with pauses between, letters sometimes wrong or missing, and cut into slots of equal length, so that a
slot holds a mixture of what falls into it. A projector that says roughly which words or letters it hears is understood
from the start. As in CTC, two equal words in a row have a pause between them: without one nobody could count them.

Rows of digits and of random words stand among the sentences. No grammar helps there: every word must be listened to.

It is learned in three lessons. To repeat a row that is written out comes first: what a model finds there, looking up
the word behind the last one it has said, it needs for all that follows, and finds late or never among murmurs. Then
murmurs, and then murmurs inside of chats. Without the first lesson 2,400 steps led no further than 125 steps with it.
A second course is mostly of letters: a projector learns thirty of them sooner than two hundred words.

Shapes: B sequences, L positions, S slots, V rows of the embedding matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from grammar import DIGITS, sentence, vocabulary
from qwen2vl_base import SYSTEM

IGNORED = -100
PAUSE = "Ġ"  # the piece that a space is
TRANSCRIBE = "Transcribe the speech."
INSTRUCTIONS = [
    TRANSCRIBE,
    "Transcribe the audio.",
    "Write down what is said.",
    "What does the speaker say?",
    "Repeat the words.",
]
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
MARKED_SHARE = 0.6  # murmurs that stand between the vision markers, as speech will between its own
WORD_SLOTS = (0.8, 4.0)  # mean length of a murmured word, drawn for each murmur
PAUSE_SLOTS = (0.7, 3.0)  # mean length of a pause, likewise
PAUSE_PROBABILITY = (0.3, 1.0)  # of a pause between two words, likewise
LETTER_SLOTS = (0.5, 1.4)
PLAIN_SHARE = 0.05  # sequences that are sentences and nothing else


@dataclass(frozen=True)
class Lesson:
    """What is practised until ``until``, a share of all steps."""

    until: float
    murmurs: bool  # else the text is written out where a murmur would stand
    chats: bool  # else nothing stands around the murmur and the answer
    row_shares: dict[str, float]  # of the texts; the others are sentences
    row_lengths: tuple[int, int]
    words_share: float = 0.85  # murmurs of whole words in place of letters


LESSONS = (
    Lesson(0.25, murmurs=False, chats=False, row_shares={"digits": 0.4, "words": 0.6}, row_lengths=(2, 16)),
    Lesson(0.6, murmurs=True, chats=False, row_shares={"digits": 0.3, "words": 0.4}, row_lengths=(2, 9)),
    Lesson(1.0, murmurs=True, chats=True, row_shares={"digits": 0.25, "words": 0.2}, row_lengths=(2, 7)),
)
SPELLING = (
    Lesson(1.0, True, True, row_shares={"digits": 0.2, "words": 0.2}, row_lengths=(2, 7), words_share=0.35),
)  # fmt: skip

Stretch = tuple[int, float]
"""A piece of a murmur: token id, mean length in slots."""


@dataclass
class Sequence:
    """``mixture`` (L, V), each position a weighted mixture of embedding rows; ``labels`` (L,); ``noisy`` (L,) bool."""

    mixture: torch.Tensor
    labels: torch.Tensor
    noisy: torch.Tensor


class TaskMaker:
    """Draws training sequences; its sentences are never in ``excluded``."""

    def __init__(self, tokenizer: Qwen2Tokenizer, num_rows: int, excluded: Collection[str]) -> None:
        self.tokenizer = tokenizer
        self.num_rows = num_rows
        self.excluded = frozenset(excluded)
        self.pause = tokenizer.convert_tokens_to_ids(PAUSE)

    def draw(self, rng: Random, lesson: Lesson = LESSONS[-1]) -> Sequence:
        """A text and, as the answer, the same again: written out or murmured, by itself or in a chat.

        In a lesson of chats some sequences are sentences and nothing else.
        """
        text = draw_text(rng, self.excluded, lesson)
        if not lesson.murmurs:
            return self.answered(one_hot(self.encode(f" {text}"), self.num_rows), text)
        if not lesson.chats:
            return self.answered(self.murmur(text, rng, lesson.words_share), text)
        if rng.random() < PLAIN_SHARE:
            ids = self.encode(draw_sentence(rng, self.excluded) + "<|endoftext|>")
            return self.sequence(one_hot(ids, self.num_rows), ids, 0)
        speech = self.murmur(text, rng, lesson.words_share)
        return self.transcription(speech, text, draw_instruction(rng), rng.random() < MARKED_SHARE)

    def answered(self, speech: torch.Tensor, text: str) -> Sequence:
        """``speech`` (S, V) and ``text`` as the answer, without the chat around them."""
        return self.framed([], speech, self.encode(TAIL), self.encode(text + "<|im_end|>\n"))

    def transcription(self, speech: torch.Tensor, text: str, instruction: str, marked: bool) -> Sequence:
        """The chat in which ``speech`` (S, V) stands in the user's turn and ``text`` is the answer."""
        before, after = ("<|vision_start|>", "<|vision_end|>") if marked else ("", "")
        head, tail = self.encode(HEAD + before), self.encode(after + instruction + TAIL)
        return self.framed(head, speech, tail, self.encode(text + "<|im_end|>\n"))

    def framed(self, head: list[int], speech: torch.Tensor, tail: list[int], answer: list[int]) -> Sequence:
        """``speech`` (S, V) between two frames, and the answer, which alone is learnt."""
        mixture = torch.cat([one_hot(head, self.num_rows), speech, one_hot(tail + answer, self.num_rows)])
        sequence = self.sequence(mixture, answer, len(answer))
        sequence.noisy[len(head) : len(head) + len(speech)] = True
        sequence.labels[-1] = IGNORED  # the line break behind the turn
        return sequence

    def sequence(self, mixture: torch.Tensor, answer: list[int], num_labels: int) -> Sequence:
        """Labels on the last ``num_labels`` positions, on all for 0."""
        labels = torch.full((len(mixture),), IGNORED)
        labels[-num_labels:] = torch.tensor(answer)
        return Sequence(mixture, labels, torch.zeros(len(mixture), dtype=torch.bool))

    def murmur(self, text: str, rng: Random, words_share: float = LESSONS[-1].words_share) -> torch.Tensor:
        """``text`` as slots (S, V), each a mixture of words or of letters."""
        return self.slots(self.speak(text, rng) if rng.random() < words_share else self.spell(text, rng), rng)

    def speak(self, text: str, rng: Random) -> list[Stretch]:
        """The words of ``text``, each as it is inside a sentence, with pauses between some and between equal ones."""
        word_slots, pause_slots = rng.uniform(*WORD_SLOTS), rng.uniform(*PAUSE_SLOTS)
        pause_probability = rng.uniform(*PAUSE_PROBABILITY)
        stretches: list[Stretch] = []
        for word in self.encode(f" {text}"):
            is_repeated = bool(stretches) and stretches[-1][0] == word
            if is_repeated or rng.random() < pause_probability:
                stretches.append((self.pause, pause_slots))
            stretches.append((word, word_slots))
        return stretches

    def spell(self, text: str, rng: Random) -> list[Stretch]:
        """The letters of ``text``; some wrong, some missing, word gaps often missing."""
        letters = []
        for letter in text:
            chance = rng.random()
            if chance < (0.3 if letter == " " else 0.04):
                continue
            if chance > 0.95 and letter != " ":
                letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
            letters.append(PAUSE if letter == " " else letter)
        letter_slots = rng.uniform(*LETTER_SLOTS)
        return [(letter, letter_slots) for letter in self.tokenizer.convert_tokens_to_ids(letters)]

    def slots(self, stretches: list[Stretch], rng: Random) -> torch.Tensor:
        """Lay ``stretches`` on a time line, each about as long as it says, and cut the line into slots (S, V)."""
        stretches = [(self.pause, 1.0), *stretches, (self.pause, 1.0)]
        ends = np.cumsum([mean_slots * rng.lognormvariate(0, 0.4) for _, mean_slots in stretches])
        starts = np.concatenate([[0], ends[:-1]])
        edges = np.arange(int(np.ceil(ends[-1])))[:, None]
        overlap = np.clip(np.minimum(ends, edges + 1) - np.maximum(starts, edges), 0, None)
        weights = torch.tensor(overlap / overlap.sum(1, keepdims=True), dtype=torch.float32)
        return weights @ one_hot([token for token, _ in stretches], self.num_rows)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids


def draw_sentence(rng: Random, excluded: Collection[str]) -> str:
    """A sentence of the grammar that is not in ``excluded``."""
    while (text := sentence(rng)) in excluded:
        pass
    return text


def lesson_at(lessons: Iterable[Lesson], step: int, steps: int) -> Lesson:
    """The one of ``lessons`` that ``step`` of ``steps`` belongs to."""
    return next(lesson for lesson in lessons if step < lesson.until * steps)


def draw_text(rng: Random, excluded: Collection[str], lesson: Lesson) -> str:
    """A sentence, a row of digits or a row of random words, none of them in ``excluded``."""
    chance, shares = rng.random(), lesson.row_shares
    if chance < shares["digits"]:
        return draw_row(DIGITS, lesson.row_lengths, rng, excluded)
    if chance < shares["digits"] + shares["words"]:
        return draw_row(vocabulary(), lesson.row_lengths, rng, excluded)
    return draw_sentence(rng, excluded)


def draw_row(words: list[str], lengths: tuple[int, int], rng: Random, excluded: Collection[str]) -> str:
    """Random words in a row that is not in ``excluded``."""
    while (row := " ".join(rng.choices(words, k=rng.randint(*lengths)))) in excluded:
        pass
    return row


def draw_instruction(rng: Random) -> str:
    """The usual instruction half of the time, else one of its variations."""
    return TRANSCRIBE if rng.random() < 0.5 else rng.choice(INSTRUCTIONS)


def one_hot(ids: list[int], num_rows: int) -> torch.Tensor:
    """(L,) ids as mixtures of one (L, V)."""
    return torch.nn.functional.one_hot(torch.tensor(ids, dtype=torch.long), num_rows).float()


@dataclass
class TextBatch:
    """``mixture`` (B, L, V), ``labels``, ``noisy`` and ``attention_mask`` (B, L), padded on the right."""

    mixture: torch.Tensor
    labels: torch.Tensor
    noisy: torch.Tensor
    attention_mask: torch.Tensor


def collate(sequences: list[Sequence]) -> TextBatch:
    """Pad sequences on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    return TextBatch(
        pad([sequence.mixture for sequence in sequences], batch_first=True),
        pad([sequence.labels for sequence in sequences], batch_first=True, padding_value=IGNORED),
        pad([sequence.noisy for sequence in sequences], batch_first=True),
        pad([torch.ones(len(sequence.labels), dtype=torch.long) for sequence in sequences], batch_first=True),
    )


def embed(batch: TextBatch, embedding: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Input embeddings (B, L, D) of a batch; murmurs louder or fainter, and noisy, as a young projector's output is."""
    embeds = batch.mixture @ embedding
    loudness = torch.empty(len(embeds), 1, 1).uniform_(0.6, 1.6, generator=generator)
    noise = torch.randn(embeds.shape, generator=generator) * embedding.detach().std() * 0.3
    return torch.where(batch.noisy.unsqueeze(-1), embeds * loudness + noise, embeds)
