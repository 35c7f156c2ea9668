"""The training loop. It turns once more than there are steps, so the last evaluation and save are written once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from graft.ranks import Ranks
from graft.recipe import Recipe, Stage
from graft.tracker import NullTracker
from graft.train.checkpoint import Checkpoints, Position
from graft.train.engine import Engine
from graft.train.feed import Feed, StepInput
from graft.train.meter import Clock, StepMeter, console_line
from graft.train.schedule import scheduled_share
from graft.train.step import StepResult, train_step
from graft.train.stopping import StopRequest

LOG = logging.getLogger(__name__)
MAX_SKIPPED = 5  # steps in a row without a finite gradient

Evaluate = Callable[[int], dict[str, float]]  # step -> tags; every rank calls it


@dataclass
class Loop:
    """A stage's training from wherever it stands to its end, or to a request to stop."""

    engine: Engine
    feed: Feed
    checkpoints: Checkpoints
    evaluate: Evaluate
    tracker: NullTracker
    recipe: Recipe
    stage: Stage
    ranks: Ranks
    meter: StepMeter

    def run(self, position: Position) -> bool:
        """Train; returns whether the stage is complete (else it was stopped, with a checkpoint saved)."""
        last_step = position.first_step + self.stage.max_steps
        start, self._skipped = position.step, 0
        self._clock, stop = Clock(start, last_step), StopRequest()
        steps = self.feed.steps(position.stage_step, self.stage.max_steps)
        try:
            while True:
                stopping = self._stops(position, start, stop)
                if position.step > start:
                    with self.meter.pause():
                        self._evaluate_and_save(position, last_step, stopping)
                if position.step == last_step or stopping:
                    return position.step == last_step
                waiting = time.perf_counter()
                inputs = next(steps)
                waited_s = time.perf_counter() - waiting
                result = self._step(inputs, position)
                self.meter.add(result, inputs.micro_batches, waited_s)
                if position.stage_step % self.recipe.run.log_every == 0 or position.step in (start + 1, last_step):
                    self._log(position, inputs, result, last_step)
        finally:
            steps.close()

    def _step(self, inputs: StepInput, position: Position) -> StepResult:
        (num_label_tokens,) = self.ranks.sum([inputs.num_label_tokens])
        share = self._share_of_peak(position.stage_step)
        first_seed = (self.recipe.run.seed << 40) + (position.step << 16)
        seeds = [first_seed + number for number in inputs.numbers]  # of a micro-batch, on whatever rank it is
        precision = self.recipe.run.precision
        result = train_step(self.engine, inputs.micro_batches, seeds, int(num_label_tokens), share, precision)
        position.step += 1
        if self.recipe.run.log_utterances:
            self.tracker.utterances(position.step, inputs.ids)
        position.num_updates += result.applied
        self._skipped = 0 if result.applied else self._skipped + 1
        if self._skipped:
            LOG.warning("step %d skipped: its gradient is not finite on some rank", position.step)
        if self._skipped == MAX_SKIPPED:
            raise RuntimeError(f"{MAX_SKIPPED} steps in a row without a finite gradient; the last: {inputs.ids[:20]}")
        return result

    def _evaluate_and_save(self, position: Position, last_step: int, stopping: bool) -> None:
        ended, improved = position.step == last_step, False
        if position.stage_step % self.recipe.evaluation.every == 0 or ended:
            improved = self._evaluate(position)
        if improved or ended or stopping or position.stage_step % self.recipe.run.checkpoint_every == 0:
            folder = self.checkpoints.save(self.engine, position)
            LOG.info("saved %s", folder)
        if improved:
            self.checkpoints.mark_best(position)

    def _evaluate(self, position: Position) -> bool:
        scalars = self.evaluate(position.step)
        self.tracker.scalars(position.step, scalars)
        told = "  ".join(f"{tag.removeprefix('eval/')} {value:.4f}" for tag, value in scalars.items())
        LOG.info("evaluation at step %d: %s", position.step, told)
        wer, swapped = scalars["eval/wer"], scalars.get("eval/wer_swapped")
        if swapped is not None and swapped - wer < self.recipe.evaluation.listening_gap:
            LOG.warning(
                "the model does not listen: WER is %.1f %% with the right audio and %.1f %% with another "
                "utterance's. It writes from the text alone: train longer, raise the learning rate or check the data",
                100 * wer,
                100 * swapped,
            )
        improved = position.best_wer is None or wer < position.best_wer
        position.best_wer = wer if improved else position.best_wer
        return improved

    def _log(self, position: Position, inputs: StepInput, result: StepResult, last_step: int) -> None:
        rate = self.stage.learning_rate * self._share_of_peak(position.stage_step - 1)
        scalars = self.meter.scalars(result, rate)
        self.tracker.scalars(position.step, scalars | {"train/epoch": inputs.epoch})
        LOG.info(console_line(position.step, last_step, scalars, self._clock.left(position.step)))

    def _share_of_peak(self, stage_step: int) -> float:
        schedule = self.stage
        return scheduled_share(
            stage_step,
            warmup_steps=schedule.warmup_steps,
            max_steps=schedule.max_steps,
            min_lr_ratio=schedule.min_lr_ratio,
        )

    def _stops(self, position: Position, start: int, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; all ranks answer alike."""
        (asked,) = self.ranks.sum([stop.asked])
        return asked > 0 or position.step - start == self.recipe.run.stop_after
