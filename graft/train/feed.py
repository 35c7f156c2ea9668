"""From a step's number to this rank's micro-batches of it, read ahead in the background."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from graft.data.collate import Batch, collate_training
from graft.data.loader import FeatureSample, FeatureSource, Prefetcher, read_samples
from graft.data.masking import mask_frames
from graft.data.plan import Plan, cut_step, rank_share
from graft.data.prompt import PromptTemplate
from graft.ranks import Ranks
from graft.recipe import Data, Stage


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
        self.costs = template.costs(source.entries)
        self.plan = Plan(
            self.costs,
            seed=seed,
            global_batch_size=stage.global_batch_size,
            shuffle_pool=data.shuffle_pool,
            micro_batch_tokens=stage.micro_batch_tokens,
            names=[entry.id for entry in source.entries],
        )

    def read(self, step: int) -> StepInput:
        """This rank's input of ``step``."""
        epoch, indices = self.plan.step(step)
        groups = cut_step(indices, self.costs, self.stage.micro_batches, self.stage.micro_batch_tokens)
        numbers = rank_share(groups, self.costs, self.ranks)
        batches = tuple(collate_training(self._samples(groups[number], step), self.template) for number in numbers)
        if self.pins_memory:
            batches = tuple(batch.pin_memory() for batch in batches)
        ids = tuple(self.source.entries[i].id for i in indices)
        return StepInput(epoch, ids, tuple(numbers), batches)

    def _samples(self, indices: Sequence[int], step: int) -> list[FeatureSample]:
        samples = read_samples(self.source, indices)
        if not self.stage.time_masks:
            return samples
        num_masks, longest = self.stage.time_masks, self.stage.time_mask_frames
        return [
            replace(s, audio_features=mask_frames(s.audio_features, num_masks, longest, (self.seed, step, i)))
            for i, s in zip(indices, samples, strict=True)
        ]

    @property
    def pins_memory(self) -> bool:
        """Whether batches go to a GPU."""
        return self.ranks.device().type == "cuda"

    def steps(self, first: int, last: int) -> Iterator[StepInput]:
        """Steps ``first`` .. ``last - 1``; close the iterator to stop reading ahead."""
        with Prefetcher(self.read, range(first, last), depth=self.depth) as ready:
            yield from ready
