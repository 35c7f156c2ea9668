"""Word and character errors of a corpus: counted by jiwer, added up over utterances and ranks, divided once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import jiwer
import numpy as np

from graft.data.text import normalize

RESAMPLINGS = 1000
MOST_NUMBERS_AT_ONCE = 4_000_000  # of a bootstrap: bounds its memory


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Errors of any number of utterances; counts add up with ``+`` and ``sum``.

    ``hits + substitutions + deletions`` are the words of the reference, the ``char_`` ones its characters, spaces
    between words included.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    char_hits: int = 0
    char_substitutions: int = 0
    char_deletions: int = 0
    char_insertions: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(mine + theirs for mine, theirs in zip(self.as_list(), other.as_list(), strict=True)))

    def __radd__(self, zero: int) -> ErrorCounts:
        assert zero == 0, "counts add to counts only"
        return self

    def as_list(self) -> list[int]:
        """The counts in the order of their fields, for a sum over ranks."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def num_words(self) -> int:
        """Words of the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def num_characters(self) -> int:
        """Characters of the references."""
        return self.char_hits + self.char_substitutions + self.char_deletions

    @property
    def word_errors(self) -> int:
        """Substitutions, deletions and insertions of words."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Word error rate, a ratio that insertions can lift above 1.

        Without any reference word it is the number of insertions (jiwer's definition): 0 only for silence.
        """
        return self.word_errors / max(1, self.num_words)

    @property
    def cer(self) -> float:
        """Character error rate; without any reference character as :attr:`wer`."""
        errors = self.char_substitutions + self.char_deletions + self.char_insertions
        return errors / max(1, self.num_characters)


def score(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> ErrorCounts:
    """Errors of all pairs together. See :func:`score_each`."""
    return sum(score_each(references, hypotheses, normalizer), start=ErrorCounts())


def score_each(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[ErrorCounts]:
    """Errors of each pair, both texts normalised by the normaliser of that name.

    Raises:
        ValueError: if there is no such normaliser.
    """
    assert len(references) == len(hypotheses), f"{len(references)} references, {len(hypotheses)} hypotheses"
    if not references:
        return []
    references = [normalize(text, normalizer) for text in references]
    hypotheses = [normalize(text, normalizer) for text in hypotheses]
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    return [
        ErrorCounts(*_counted(of_words), *_counted(of_characters))
        for of_words, of_characters in zip(words.alignments, characters.alignments, strict=True)
    ]


def alignment(reference: str, hypothesis: str, normalizer: str) -> str:
    """The normalised texts one above the other, errors marked S, D and I; empty when they are equal."""
    output = jiwer.process_words([normalize(reference, normalizer)], [normalize(hypothesis, normalizer)])
    lines = jiwer.visualize_alignment(output, show_measures=False).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.startswith("==="))


def confidence_interval(
    counts: Sequence[ErrorCounts], *, seed: int = 1, level: float = 0.95, resamplings: int = RESAMPLINGS
) -> tuple[float, float]:
    """Bootstrap interval of the corpus WER over utterances (Bisani and Ney, ICASSP 2004).

    It tells what another draw of utterances from the same speakers would give, not of other speakers.
    """
    if not counts:
        return 0.0, 0.0
    errors = np.array([c.word_errors for c in counts], dtype=np.int64)
    words = np.array([c.num_words for c in counts], dtype=np.int64)
    generator = np.random.default_rng(seed)
    per_round = max(1, MOST_NUMBERS_AT_ONCE // len(counts))
    rates = []
    for done in range(0, resamplings, per_round):
        drawn = generator.integers(len(counts), size=(min(per_round, resamplings - done), len(counts)))
        rates.append(errors[drawn].sum(axis=1) / np.maximum(1, words[drawn].sum(axis=1)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(rates), [tail, 1 - tail])
    return float(low), float(high)


def _counted(chunks: Iterable[jiwer.AlignmentChunk]) -> tuple[int, int, int, int]:
    """Hits, substitutions, deletions, insertions of one alignment."""
    sizes = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
    for chunk in chunks:
        of_reference = chunk.ref_end_idx - chunk.ref_start_idx
        sizes[chunk.type] += of_reference or chunk.hyp_end_idx - chunk.hyp_start_idx
    return sizes["equal"], sizes["substitute"], sizes["delete"], sizes["insert"]
