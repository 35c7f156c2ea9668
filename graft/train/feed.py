"""From a step's number to this rank's micro-batches of it, read ahead in the background."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from graft.data.augment import draw_lender, mask_frames, mix_voice, shift_frames
from graft.data.collate import Batch, collate_training
from graft.data.loader import FeatureSample, FeatureSource, MixedSource, Prefetcher, read_samples
from graft.data.plan import Part, Plan, cut_step, rank_share
from graft.data.prompt import PromptTemplate
from graft.ranks import Ranks
from graft.recipe import Data, Stage

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepInput:
    """What one rank feeds into one optimiser step; ``ids`` are the whole step's, over all ranks.

    ``numbers`` tell which of the step's micro-batches these are, whatever the number of ranks.
    """

    epoch: int
    ids: tuple[str, ...]
    numbers: tuple[int, ...]
    micro_batches: tuple[Batch, ...]

    @property
    def num_label_tokens(self) -> int:
        """Label positions of this rank's share."""
        return sum(batch.num_label_tokens for batch in self.micro_batches)

    @property
    def digest(self) -> str:
        """Eight characters that change when the step's utterances do, whatever their order."""
        return hashlib.blake2b("\n".join(sorted(self.ids)).encode(), digest_size=4).hexdigest()


class Feed:
    """The steps of a stage for one rank: ``steps(n)`` begins at step n, at once."""

    def __init__(
        self, source: FeatureSource, template: PromptTemplate, stage: Stage, data: Data, ranks: Ranks, seed: int
    ) -> None:
        """Raises ValueError for fewer micro-batches than ranks, an utterance above the budget, or no utterance."""
        if stage.micro_batches < ranks.world_size:
            raise ValueError(
                f"a step has {stage.micro_batches} micro-batches and there are {ranks.world_size} ranks: raise "
                f"micro_batches of the stage to a multiple of {ranks.world_size}, or use fewer ranks"
            )
        self.source, self.template, self.stage, self.ranks = source, template, stage, ranks
        self.depth, self.seed = data.prefetch, seed
        # One beside a step on the CPU; an encoder takes them all, and so does what feeds a GPU
        self.torch_threads = None if data.features == "online" or self.pins_memory else 1
        self.costs = template.costs(source.entries, quiet=not ranks.is_first)
        if stage.alignment_steps:
            _check_can_align(source, template)
        self.plan = Plan(
            self.costs,
            seed=seed,
            global_batch_size=stage.global_batch_size,
            shuffle_pool=data.shuffle_pool,
            micro_batch_tokens=stage.micro_batch_tokens,
            names=[entry.id for entry in source.entries],
            parts=_parts(source, data),
        )

    def read(self, step: int) -> StepInput:
        """This rank's input of ``step``."""
        epoch, uses = self.plan.uses(step)
        uses.sort()  # utterances of equal cost go into micro-batches in this order
        costs = self.costs[[utterance for utterance, _ in uses]].tolist()
        groups = cut_step(range(len(uses)), costs, self.stage.micro_batches, self.stage.micro_batch_tokens)
        align = step < self.stage.alignment_steps
        numbers = rank_share(groups, costs, self.ranks)
        batches = tuple(
            collate_training(self._samples(uses, groups[number], epoch), self.template, align) for number in numbers
        )
        if self.pins_memory:
            batches = tuple(batch.pin_memory() for batch in batches)
        ids = tuple(self.source.entries[utterance].id for utterance, _ in uses)
        return StepInput(epoch, ids, tuple(numbers), batches)

    def _samples(self, uses: Sequence[tuple[int, int]], group: Sequence[int], epoch: int) -> list[FeatureSample]:
        """The samples at the places ``group`` of ``uses``, which are the whole step's."""
        keys = [(self.seed, epoch, self.source.entries[uses[i][0]].id, uses[i][1]) for i in group]
        # Of the whole step: so it does not matter how that is cut
        lenders = [draw_lender(len(uses), key) for key in keys] if self.stage.voice_mixing else group
        wanted = sorted({*group, *lenders})
        samples = dict(zip(wanted, read_samples(self.source, [uses[i][0] for i in wanted]), strict=True))
        return [
            self._augmented(samples[i], samples[lender].audio_features, key)
            for i, lender, key in zip(group, lenders, keys, strict=True)
        ]

    def _augmented(self, sample: FeatureSample, lender: torch.Tensor, key: tuple[int | str, ...]) -> FeatureSample:
        features, stage = sample.audio_features, self.stage
        if stage.voice_mixing:
            features = mix_voice(features, lender, stage.voice_mixing, key)
        if stage.time_shift_frames:
            features = shift_frames(features, stage.time_shift_frames, key)
        if stage.time_masks:
            features = mask_frames(features, stage.time_masks, stage.time_mask_frames, key)
        return replace(sample, audio_features=features)

    @property
    def pins_memory(self) -> bool:
        """Whether batches go to a GPU."""
        return self.ranks.device().type == "cuda"

    def steps(self, first: int, last: int) -> Iterator[StepInput]:
        """Steps ``first`` .. ``last - 1``; close the iterator to stop reading ahead."""
        with Prefetcher(self.read, range(first, last), self.depth, torch_threads=self.torch_threads) as ready:
            yield from ready


def _check_can_align(source: FeatureSource, template: PromptTemplate) -> None:
    """Say how many utterances have no part in alignment.

    Raises:
        ValueError: none has one.
    """
    known = sum(template.asks_what_is_said(entry.instruction) for entry in source.entries)
    if not known:
        raise ValueError(
            "stage1.alignment_steps lays transcripts along their audio, and every utterance has an instruction of its "
            "own, whose answer need not be what is said: leave the instruction away where it is, or set 0 steps"
        )
    if known < len(source.entries):
        LOG.info(
            "%d of %d utterances have an instruction of their own and no part in alignment: what is said in them is "
            "not known",
            len(source.entries) - known,
            len(source.entries),
        )


def _parts(source: FeatureSource, data: Data) -> list[Part]:
    """The sets of a source with their weights, in the one order that splits have."""
    sizes = source.sizes if isinstance(source, MixedSource) else [len(source.entries)]
    parts = {split: Part(size, w) for size, (split, w) in zip(sizes, data.train_split.items(), strict=True)}
    if list(data.train_split.values()) != [1.0]:
        told = (f"{part.num_uses:,} of {split}, which has {part.size:,}" for split, part in parts.items())
        LOG.info("utterances in an epoch: %s", "; ".join(told))
    return list(parts.values())
