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

The third is of what a projector gives that was aligned by CTC: a word is a spike of a slot or two, wherever in its time
it is surest, with pauses around it; now and then it is as much a pause, or another word. Rows are long, and of few
different words: "nine nine three nine" can be followed by counting alone, not by looking up what was said last.

The fourth is of doubt that is meant: what may have been said instead stands fainter beside the likeliest, the fainter
the less likely it is, and is true as often as that says. In a row the likeliest is then the best guess; in a sentence
it is what both the sound and the grammar allow. The fifth has long rows again, and more of them. The sixth has what CTC
gives and the others had not: every word has a slot in which it is the likeliest, and so has a pause between equal ones.

Shapes: B sequences, L positions, S slots, V rows of the embedding matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import exp
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
LETTER_SLOTS = (0.5, 1.4)  # mean length of a murmured letter, drawn for each murmur
PLAIN_SHARE = 0.05  # sequences that are sentences and nothing else


@dataclass(frozen=True)
class Manner:
    """How words are murmured; each range is one that every murmur draws from."""

    word_slots: tuple[float, float]  # mean length of a word
    pause_slots: tuple[float, float]  # mean length of a pause
    pause_probability: tuple[float, float]  # of a pause between two words
    end_slots: tuple[float, float] = (1.0, 1.0)  # mean length of the pauses before and behind all of them
    doubt: float = 0.0  # share of the words (with ``fade``: and pauses) that may be a pause or another word
    loudness: float = 0.0  # spread of the slots' loudness, as a standard deviation of its logarithm
    fade: float = 0.0  # nats between the likeliest and what is not heard any more; 0: doubt is not meant
    smear: float = 0.0  # most that a slot has of the one beside it; lengths are whole slots then, else of any size


STRETCHED = Manner(word_slots=(0.8, 4.0), pause_slots=(0.7, 3.0), pause_probability=(0.3, 1.0))
SPIKES = Manner(
    word_slots=(0.7, 2.0), pause_slots=(0.8, 4.0), pause_probability=(0.75, 1.0), end_slots=(1.0, 6.0),
    doubt=0.06, loudness=0.2,
)  # fmt: skip
DOUBTS = replace(SPIKES, doubt=0.25, fade=8.0)
IN_SLOTS = replace(DOUBTS, doubt=0.12, smear=0.45, pause_probability=(0.5, 1.0), end_slots=(0.3, 6.0), loudness=0.3)


@dataclass(frozen=True)
class Lesson:
    """What is practised until ``until``, a share of all steps."""

    until: float
    murmurs: bool  # else the text is written out where a murmur would stand
    chats: bool  # else nothing stands around the murmur and the answer
    row_shares: dict[str, float]  # of the texts; the others are sentences
    row_lengths: tuple[int, int]
    words_share: float = 0.85  # murmurs of whole words in place of letters
    manner: Manner = STRETCHED
    few_share: float = 0.0  # of the rows: these have two or three different words


LESSONS = (
    Lesson(0.25, murmurs=False, chats=False, row_shares={"digits": 0.4, "words": 0.6}, row_lengths=(2, 16)),
    Lesson(0.6, murmurs=True, chats=False, row_shares={"digits": 0.3, "words": 0.4}, row_lengths=(2, 9)),
    Lesson(1.0, murmurs=True, chats=True, row_shares={"digits": 0.25, "words": 0.2}, row_lengths=(2, 7)),
)
SPELLING = (
    Lesson(1.0, True, True, row_shares={"digits": 0.2, "words": 0.2}, row_lengths=(2, 7), words_share=0.35),
)  # fmt: skip
LISTENING = tuple(
    Lesson(
        until, True, chats, row_shares={"digits": 0.3, "words": 0.2}, row_lengths=(2, 8),
        words_share=0.9, manner=SPIKES, few_share=0.4,
    )
    for until, chats in ((0.4, False), (1.0, True))
)  # fmt: skip
DOUBTING = (replace(LISTENING[-1], manner=DOUBTS, row_shares={"digits": 0.25, "words": 0.1}, words_share=0.95),)
COUNTING = (
    replace(
        DOUBTING[-1], manner=replace(DOUBTS, doubt=0.08), row_shares={"digits": 0.5, "words": 0.15},
        row_lengths=(2, 10), words_share=1.0, few_share=0.5,
    ),
)  # fmt: skip
SPOTTING = (
    replace(
        DOUBTING[-1], manner=IN_SLOTS, row_shares={"digits": 0.3, "words": 0.15}, row_lengths=(2, 9),
        words_share=1.0, few_share=0.5,
    ),
)  # fmt: skip

Stretch = tuple[dict[int, float], float]
"""A piece of a murmur: the shares of the tokens in it, which add up to 1, and its mean length in slots."""


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
        self.words = [self.encode(f" {word}")[0] for word in vocabulary()]

    def draw(self, rng: Random, lesson: Lesson = LESSONS[-1]) -> Sequence:
        """A text and, as the answer, the same again: written out or murmured, by itself or in a chat.

        In a lesson of chats some sequences are sentences and nothing else.
        """
        text = draw_text(rng, self.excluded, lesson)
        if not lesson.murmurs:
            return self.answered(one_hot(self.encode(f" {text}"), self.num_rows), text)
        if not lesson.chats:
            return self.answered(self.murmur(text, rng, lesson), text)
        if rng.random() < PLAIN_SHARE:
            ids = self.encode(draw_sentence(rng, self.excluded) + "<|endoftext|>")
            return self.sequence(one_hot(ids, self.num_rows), ids, 0)
        speech = self.murmur(text, rng, lesson)
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

    def murmur(self, text: str, rng: Random, lesson: Lesson = LESSONS[-1]) -> torch.Tensor:
        """``text`` as slots (S, V), each a mixture of words or of letters."""
        in_words = rng.random() < lesson.words_share
        stretches = self.speak(text, rng, lesson.manner) if in_words else self.spell(text, rng)
        return self.slots(stretches, rng, lesson.manner)

    def speak(self, text: str, rng: Random, manner: Manner = STRETCHED) -> list[Stretch]:
        """The words of ``text``, each as it is inside a sentence, with pauses between some and between equal ones."""
        word_slots, pause_slots = rng.uniform(*manner.word_slots), rng.uniform(*manner.pause_slots)
        pause_probability = rng.uniform(*manner.pause_probability)
        stretches: list[Stretch] = []
        previous = None
        for word in self.encode(f" {text}"):
            if word == previous or rng.random() < pause_probability:
                stretches.append((self.weights_of(self.pause, manner, rng), pause_slots))
            stretches.append((self.weights_of(word, manner, rng), word_slots))
            previous = word
        return stretches

    def weights_of(self, token: int, manner: Manner, rng: Random) -> dict[int, float]:
        """What is heard where ``token`` is murmured: mostly it alone, a word or a pause."""
        if manner.fade:
            return self.weighed(token, manner.fade, rng) if rng.random() < manner.doubt else {token: 1.0}
        is_doubted = token != self.pause and manner.doubt and rng.random() < manner.doubt
        return self.doubted(token, rng) if is_doubted else {token: 1.0}

    def doubted(self, word: int, rng: Random) -> dict[int, float]:
        """The shares of ``word`` and of a pause or another word, which may be somewhat the likelier."""
        share, other = rng.uniform(0.4, 0.8), self.pause if rng.random() < 0.6 else rng.choice(self.words)
        return {word: 1.0} if other == word else {word: share, other: 1 - share}

    def weighed(self, token: int, fade: float, rng: Random) -> dict[int, float]:
        """The shares of ``token`` and of others that it is taken for, in proportion to their weights.

        The likeliest weighs 1; a weight falls by 1 over ``fade`` nats. ``token`` is each of them as often as its
        weight says.
        """
        weights = [1.0, *(rng.random() for _ in range(rng.randint(1, 4)))]
        place = rng.choices(range(len(weights)), [exp(fade * weight) for weight in weights])[0]
        drawn = rng.choices(self.words, k=len(weights))
        drawn = drawn if rng.random() < 0.3 else [self.pause, *drawn]
        others = [other for other in dict.fromkeys(drawn) if other != token]
        rng.shuffle(others)
        heard = dict(zip([*others[:place], token, *others[place:]], weights, strict=False))
        return {each: weight / sum(heard.values()) for each, weight in heard.items()}

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
        return [({letter: 1.0}, letter_slots) for letter in self.tokenizer.convert_tokens_to_ids(letters)]

    def slots(self, stretches: list[Stretch], rng: Random, manner: Manner = STRETCHED) -> torch.Tensor:
        """Lay ``stretches`` on a time line, each about as long as it says, and cut the line into slots (S, V)."""
        before, behind = (({self.pause: 1.0}, draw_between(manner.end_slots, rng)) for _ in range(2))
        stretches = [before, *stretches, behind]
        shares = torch.zeros(len(stretches), self.num_rows)
        for row, (tokens, _) in zip(shares, stretches, strict=True):
            row[list(tokens)] = torch.tensor(list(tokens.values()))
        if manner.smear:
            return self.whole_slots(shares, [mean_slots for _, mean_slots in stretches], rng, manner)
        ends = np.cumsum([mean_slots * rng.lognormvariate(0, 0.4) for _, mean_slots in stretches])
        starts = np.concatenate([[0], ends[:-1]])
        edges = np.arange(int(np.ceil(ends[-1])))[:, None]
        overlap = np.clip(np.minimum(ends, edges + 1) - np.maximum(starts, edges), 0, None)
        weights = torch.tensor(overlap / overlap.sum(1, keepdims=True), dtype=torch.float32)
        if manner.loudness:
            weights *= torch.tensor([[rng.lognormvariate(0, manner.loudness)] for _ in range(len(weights))])
        return weights @ shares

    def whole_slots(self, shares: torch.Tensor, means: list[float], rng: Random, manner: Manner) -> torch.Tensor:
        """Each stretch (V,) takes a slot or more, those at the ends perhaps none; each slot has some of a neighbour."""
        lengths = [max(1, round(mean * rng.lognormvariate(0, 0.4))) for mean in means]
        for end in (0, -1):
            lengths[end] = round(means[end] * rng.lognormvariate(0, 0.4))
        slots = shares.repeat_interleave(torch.tensor(lengths), dim=0)
        beside = [min(max(place + rng.choice((-1, 1)), 0), len(slots) - 1) for place in range(len(slots))]
        parts = torch.tensor([[manner.smear * rng.random() ** 2] for _ in slots])
        loudness = torch.tensor([[rng.lognormvariate(0, manner.loudness)] for _ in slots])
        return loudness * ((1 - parts) * slots + parts * slots[beside])

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
    if chance >= shares["digits"] + shares["words"]:
        return draw_sentence(rng, excluded)
    words = DIGITS if chance < shares["digits"] else vocabulary()
    if lesson.few_share and rng.random() < lesson.few_share:
        words = rng.sample(words, rng.randint(2, 3))
    return draw_row(words, lesson.row_lengths, rng, excluded)


def draw_between(ends: tuple[float, float], rng: Random) -> float:
    """A number between two; without a draw where both are one, so that earlier courses stay what they were."""
    return ends[0] if ends[0] == ends[1] else rng.uniform(*ends)


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


def embed(batch: TextBatch, embedding: torch.Tensor, generator: torch.Generator, offset: float = 0.0) -> torch.Tensor:
    """Input embeddings (B, L, D) of a batch; murmurs louder or fainter, and noisy, as a young projector's output is.

    ``offset``: the size of what is added to all slots of a murmur alike, in rows.
    """
    embeds, row = batch.mixture @ embedding, embedding.detach().std()
    loudness = torch.empty(len(embeds), 1, 1).uniform_(0.6, 1.6, generator=generator)
    noise = torch.randn(embeds.shape, generator=generator) * row * 0.3
    if offset:
        noise += torch.randn(len(embeds), 1, embeds.shape[2], generator=generator) * row * offset
    return torch.where(batch.noisy.unsqueeze(-1), embeds * loudness + noise, embeds)
