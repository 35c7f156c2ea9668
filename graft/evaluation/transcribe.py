"""Greedy transcripts of a split: each utterance on exactly one rank, in batches of about equal length.

Generation has no collective under ZeRO-1 and -2, where every rank holds the whole model, so ranks may have different
numbers of batches and none waits for another before the results are put together.

B: utterances of a batch    T: positions    F: encoder frames    D: numbers per frame
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig

from graft.data.collate import collate_generation, collate_training
from graft.data.loader import Entry, FeatureSample, FeatureSource, Prefetcher, read_samples
from graft.data.plan import evaluation_share
from graft.data.progress import Meter
from graft.data.prompt import PromptTemplate
from graft.evaluation.joint import Evidence, JointDecoding, all_ways
from graft.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What was heard in utterance ``index`` of a source; ``finished`` is False where the token limit cut it off."""

    index: int
    text: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Answers:
    """A batch's transcripts; ``loss`` is the references' cross entropy, summed over ``num_label_tokens`` tokens."""

    texts: Sequence[str]
    finished: Sequence[bool]
    loss: float = 0.0
    num_label_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a split, transcribed."""

    hypotheses: list[Hypothesis]
    loss: float
    num_label_tokens: int
    is_whole: bool = True


class Interrupted(Exception):
    """Some rank was asked to leave before its share was done; raised on every rank."""


class Transcriber(Protocol):
    """Anything that writes down the utterances of ``entries``: the graft, or the base Whisper for comparison."""

    entries: Sequence[Entry]

    def read(self, indices: Sequence[int]) -> Any:
        """What :meth:`answer` needs of these utterances; called ahead, in a background thread."""
        ...

    def answer(self, batch: Any) -> Answers:
        """Transcripts of what :meth:`read` gave, in its order."""
        ...


class GraftTranscriber:
    """The graft on features of a source; with ``with_loss`` the references are scored too, with the same features."""

    def __init__(
        self,
        model: nn.Module,
        source: FeatureSource,
        template: PromptTemplate,
        *,
        max_new_tokens: int,
        device: torch.device | str,
        precision: str,
        alignment_weight: float = 0.0,
        with_loss: bool = True,
    ) -> None:
        self.entries = source.entries
        self._model, self._source, self._template = model, source, template
        self._max_new_tokens, self._device, self._precision = max_new_tokens, torch.device(device), precision
        self._alignment_weight, self._with_loss = alignment_weight, with_loss

    def read(self, indices: Sequence[int]) -> list[FeatureSample]:
        """The samples at ``indices``."""
        return read_samples(self._source, indices)

    def answer(self, batch: Sequence[FeatureSample]) -> Answers:
        """Transcripts of the samples, and the loss of their references."""
        with inferring(self._model, self._device, self._precision):
            loss, num_label_tokens = self._loss(batch) if self._with_loss else (0.0, 0)
            texts, finished = generate(
                self._model, batch, self._template, self._max_new_tokens, self._device, self._alignment_weight
            )
        return Answers(texts, finished, loss, num_label_tokens)

    def _loss(self, samples: Sequence[FeatureSample]) -> tuple[float, int]:
        batch = collate_training(samples, self._template)
        inputs = batch.to(self._device).model_inputs()
        summed = self._model(**inputs, num_items_in_batch=1, use_cache=False).loss
        return float(summed), batch.num_label_tokens


def transcribe(
    transcriber: Transcriber, ranks: Ranks, *, batch_size: int, label: str, go_on: Callable[[], bool] = lambda: True
) -> Share:
    """Transcribe this rank's share of ``transcriber.entries``, longest utterances first.

    Whoever calls puts the shares together; ``label`` names the progress line. ``go_on`` is asked before each batch;
    where it says no, the share is what was done until then.
    """
    lengths = [entry.num_frames for entry in transcriber.entries]
    mine = rank_share(lengths, ranks)
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    hypotheses: list[Hypothesis] = []
    loss, num_label_tokens = 0.0, 0
    with (
        Meter(label, len(lengths), "utterances", quiet=not ranks.is_first) as meter,
        Prefetcher(transcriber.read, batches) as ready,
    ):
        for indices, batch in zip(batches, ready, strict=True):
            if not go_on():
                return Share(hypotheses, loss, num_label_tokens, is_whole=False)
            answers = transcriber.answer(batch)
            hypotheses += map(Hypothesis, indices, answers.texts, answers.finished)
            loss += answers.loss
            num_label_tokens += answers.num_label_tokens
            meter.set(len(hypotheses) * len(lengths) / len(mine))  # the others are about as far
    return Share(hypotheses, loss, num_label_tokens)


def rank_share(lengths: Sequence[int], ranks: Ranks) -> list[int]:
    """This rank's utterances, longest first: shares of near-equal length, together every utterance once."""
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [longest_first[position] for position in evaluation_share(len(lengths), ranks)]


def generate(
    model: nn.Module,
    samples: Sequence[FeatureSample],
    template: PromptTemplate,
    max_new_tokens: int,
    device: torch.device | str,
    alignment_weight: float = 0.0,
) -> tuple[list[str], list[bool]]:
    """Greedy replies to the samples' prompts, without special tokens, and whether each came to its end.

    With ``alignment_weight`` by joint decoding, where a sample's instruction is the recipe's, to transcribe: what other
    instructions ask for need not be what is said. Call it inside :func:`inferring`.
    """
    ways = template.stack_factor if alignment_weight else 1
    batch = collate_generation(all_ways(samples, ways), template).to(device)
    settings, prompt_length = greedy(model, template, max_new_tokens), batch.input_ids.shape[1]
    processors = []
    if alignment_weight:
        weights = [alignment_weight * template.asks_what_is_said(s.instruction) for s in samples]
        evidence = Evidence.of(model, batch, template.pause_id, ways)
        processors = [JointDecoding(evidence, template, prompt_length, settings.eos_token_id, weights)]
    inputs = _without_labels(batch.model_inputs())
    tokens = model.generate(**inputs, generation_config=settings, logits_processor=processors)
    replies = tokens[: len(samples), prompt_length:]  # what came behind the prompt, in the first of all ways
    texts = template.processor.tokenizer.batch_decode(replies, skip_special_tokens=True)
    ends = torch.isin(replies, torch.tensor(settings.eos_token_id, device=replies.device))
    return [text.strip() for text in texts], ends.any(dim=1).tolist()


def greedy(model: nn.Module, template: PromptTemplate, max_new_tokens: int) -> GenerationConfig:
    """The likeliest token each time, whatever sampling and penalties the base's own generation settings ask for."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, template.end_ids[-1]}),
        pad_token_id=template.pad_token_id,
        use_cache=True,
    )


@contextlib.contextmanager
def inferring(model: nn.Module, device: torch.device | str, precision: str) -> Iterator[None]:
    """``model`` in evaluation mode, without gradients, under autocast for bf16; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def _without_labels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}
