"""How well a model transcribes a split, and whether it listens: the same numbers on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graft.data.loader import Entry, FeatureSource
from graft.data.prompt import PromptTemplate
from graft.data.text import normalize
from graft.evaluation.listening import SwappedSource, swapped_partners
from graft.evaluation.transcribe import GraftTranscriber, Hypothesis, Interrupted, Share, Transcriber, transcribe
from graft.evaluation.wer import ErrorCounts, confidence_interval, score, score_each
from graft.ranks import Ranks
from graft.recipe import Evaluation as Settings

SEED = 1  # of pairs and intervals: two evaluations of one split are comparable, so this is no setting
RATES = ("wer", "cer", "loss")
TAGS = ("loss", "wer", "cer", "loss_swapped", "wer_swapped")  # of the summary, as ``eval/<name>``


@dataclass(frozen=True)
class Evaluation:
    """``summary`` is what ``summary.json`` holds; ``lines`` are the utterances in the source's order, NeMo-style."""

    summary: dict[str, Any]
    lines: list[dict[str, Any]]

    def tags(self) -> dict[str, float]:
        """The curves of a training run."""
        return {f"eval/{name}": self.summary[name] for name in TAGS if self.summary.get(name) is not None}

    def rows(self, most: int) -> list[dict[str, object]]:
        """Reference and hypothesis of at most ``most`` utterances, evenly chosen, for the tracker's table."""
        shown = [self.lines[i] for i in spread(len(self.lines), most)]
        return [{"id": u["id"], "reference": u["text"], "hypothesis": u["pred_text"], "wer": u["wer"]} for u in shown]


def beside(evaluation: Evaluation, other: Evaluation, suffix: str) -> Evaluation:
    """``evaluation`` with ``other`` of the same utterances in it: its rates and texts under names with ``_<suffix>``.

    Utterances are matched by id; one that ``other`` has not, or has more, does not matter.
    """
    rates = {f"{name}_{suffix}": other.summary[name] for name in RATES if other.summary[name] is not None}
    texts = {line["id"]: {f"pred_text_{suffix}": line["pred_text"]} for line in other.lines}
    lines = [line | texts.get(line["id"], {}) for line in evaluation.lines]
    return Evaluation(evaluation.summary | rates, lines)


class Subset:
    """Some utterances of a source, as a source."""

    def __init__(self, source: FeatureSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices
        self.entries = [source.entries[i] for i in indices]

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features (F_i, D) of the subset's utterances."""
        return self._source.read_many([self._indices[i] for i in indices])


def evaluate(
    model: nn.Module,
    source: FeatureSource,
    template: PromptTemplate,
    ranks: Ranks,
    *,
    settings: Settings,
    device: torch.device | str,
    precision: str,
    swapped: bool = True,
    max_utterances: int | None = None,
    label: str = "evaluation",
    go_on: Callable[[], bool] = lambda: True,
) -> Evaluation:
    """Loss, WER and CER of ``model`` on ``source``, and both once more with swapped audio. Every rank must call.

    Args:
        max_utterances: score this many, evenly chosen and always the same; None: all.
        label: names the progress line.
        go_on: asked before each batch, on each rank by itself.

    Raises:
        ValueError: on every rank, if there is nothing to score, or if ``swapped`` and all texts are the same.
        Interrupted: on every rank, if ``go_on`` said no on any.
    """
    source = at_most(source, max_utterances)
    sources = [source]
    if swapped:  # found now, before the long part
        texts = [normalize(entry.text, settings.normalizer) for entry in source.entries]
        sources.append(SwappedSource(source, swapped_partners(source.entries, texts, SEED)))
    listeners = [
        GraftTranscriber(
            model,
            each,
            template,
            max_new_tokens=settings.max_new_tokens,
            device=device,
            precision=precision,
            alignment_weight=settings.alignment_weight,
        )
        for each in sources
    ]
    evaluation = score_transcriber(listeners[0], ranks, settings, label=label, go_on=go_on)
    evaluation.summary["alignment_weight"] = settings.alignment_weight
    for listener in listeners[1:]:
        with_others = score_transcriber(listener, ranks, settings, label=f"{label}, swapped audio", go_on=go_on)
        evaluation = beside(evaluation, with_others, "swapped")
        gap = evaluation.summary["wer_swapped"] - evaluation.summary["wer"]
        evaluation.summary["listens"] = gap >= settings.listening_gap
    return evaluation


def score_transcriber(
    transcriber: Transcriber,
    ranks: Ranks,
    settings: Settings,
    *,
    label: str,
    go_on: Callable[[], bool] = lambda: True,
) -> Evaluation:
    """Transcribe on all ranks and score. Every rank must call; an error on one is raised on all.

    Raises:
        ValueError: if there is nothing to score.
        Interrupted: as :func:`evaluate`.
    """
    if not transcriber.entries:
        raise ValueError(f"{label}: there are no utterances to score")
    started = time.perf_counter()
    batch_size = settings.batch_size
    share = ranks.together(lambda: transcribe(transcriber, ranks, batch_size=batch_size, label=label, go_on=go_on))
    if not all(ranks.gather(share.is_whole)):
        raise Interrupted(f"{label}: asked to leave")
    hypotheses = gathered(share.hypotheses, len(transcriber.entries), ranks)
    loss, num_label_tokens = ranks.sum([share.loss, share.num_label_tokens])
    seconds = max(ranks.gather(time.perf_counter() - started))
    whole = Share(hypotheses, loss, int(num_label_tokens))
    return _scored(transcriber.entries, whole, settings, seconds, ranks.world_size)


def at_most(source: FeatureSource, most: int | None) -> FeatureSource:
    """``source``, or ``most`` of its utterances, evenly chosen and always the same."""
    if most is None or most >= len(source.entries):
        return source
    return Subset(source, spread(len(source.entries), most))


def can_be_swapped(source: FeatureSource, settings: Settings, max_utterances: int | None) -> bool:
    """Whether swapped audio proves anything: two texts at least, as they count when scored."""
    entries = at_most(source, max_utterances).entries
    return len({normalize(entry.text, settings.normalizer) for entry in entries}) > 1


def gathered(mine: Sequence[Hypothesis], num_utterances: int, ranks: Ranks) -> list[Hypothesis]:
    """The hypotheses of all ranks in the source's order, on every rank: each utterance exactly once."""
    everyone = [hypothesis for share in ranks.gather(list(mine)) for hypothesis in share]
    everyone.sort(key=lambda hypothesis: hypothesis.index)
    found = [hypothesis.index for hypothesis in everyone]
    assert found == list(range(num_utterances)), (
        f"{num_utterances} utterances, {len(found)} hypotheses of {len(set(found))} different ones"
    )
    return everyone


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, evenly spaced: the same every time, and not only the first ones."""
    chosen = min(count, most)
    return [position * count // chosen for position in range(chosen)]


def _scored(entries: Sequence[Entry], share: Share, settings: Settings, seconds: float, num_ranks: int) -> Evaluation:
    references = [entry.text for entry in entries]
    texts = [hypothesis.text for hypothesis in share.hypotheses]
    counts = score_each(references, texts, settings.normalizer)
    audio_seconds = sum(entry.duration for entry in entries)
    summary = {
        **_rates(counts, references, texts, settings.normalizer),
        "loss": share.loss / share.num_label_tokens if share.num_label_tokens else None,
        "num_label_tokens": share.num_label_tokens,
        "num_utterances": len(entries),
        "empty_hypotheses": sum(not text for text in texts),
        "unfinished_hypotheses": sum(not hypothesis.finished for hypothesis in share.hypotheses),
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "num_ranks": num_ranks,
        "seconds": round(seconds, 3),
        "audio_seconds": round(audio_seconds, 3),
        "audio_seconds_per_second": round(audio_seconds / max(seconds, 1e-9), 3),
    }
    return Evaluation(summary, list(map(_line, entries, texts, counts)))


def _rates(
    counts: Sequence[ErrorCounts], references: Sequence[str], texts: Sequence[str], normalizer: str
) -> dict[str, Any]:
    total = sum(counts, start=ErrorCounts())
    return {
        "wer": total.wer,
        "wer_interval_95": list(confidence_interval(counts, seed=SEED)),
        "cer": total.cer,
        "normalizer": normalizer,
        "wer_not_normalized": score(references, texts, "none").wer,
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "hits": total.hits,
        "num_words": total.num_words,
        "num_characters": total.num_characters,
    }


def _line(entry: Entry, text: str, counts: ErrorCounts) -> dict[str, Any]:
    return {
        "id": entry.id,
        "duration": entry.duration,
        "text": entry.text,
        "pred_text": text,
        "wer": round(counts.wer, 4),
        "cer": round(counts.cer, 4),
    }
