"""The training loop. It turns once more than there are steps, so the last evaluation and save are written once.

A step is saved before it is evaluated: whatever happens in the long evaluation, nothing is lost, and a run that was
stopped in the middle of one begins with it again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from graft.data.chance import Chance
from graft.recipe import Recipe, Stage
from graft.tracker import NullTracker
from graft.train.checkpoint import Checkpoints, Position
from graft.train.engine import Engine
from graft.train.feed import Feed, StepInput
from graft.train.heartbeat import Heartbeat
from graft.train.meter import Clock, StepMeter, console_line
from graft.train.phases import AGREE, EVALUATE, PROFILE, READ, SAVE, WRITE
from graft.train.profile import Profile
from graft.train.schedule import scheduled_share
from graft.train.step import StepResult, train_step

LOG = logging.getLogger(__name__)
MAX_SKIPPED = 5  # steps in a row without a finite gradient
DEAF = (
    "the model does not listen: WER is %.1f %% with the right audio and %.1f %% with another utterance's. It writes "
    "from the text alone: train longer, raise the learning rate or check the data"
)

Evaluate = Callable[[int], dict[str, float] | None]
"""Step -> tags, or None where a request to stop cut it short. Every rank calls it, and gets the same."""


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
    meter: StepMeter
    heartbeat: Heartbeat
    profile: Profile = field(default_factory=Profile)

    def run(self, position: Position) -> bool:
        """Train; returns whether the stage is complete (else it was stopped, with a checkpoint saved)."""
        last_step = position.first_step + self.stage.max_steps
        start, self._skipped = position.step, 0
        self._clock = Clock(start, last_step)
        self.checkpoints.forget_evaluations_after(position)
        self.heartbeat.stop.gently()
        if position.stage_step < self.stage.alignment_steps:
            LOG.info(
                "the first %d steps align audio with words, without the language model", self.stage.alignment_steps
            )
        steps = self.feed.steps(position.stage_step, self.stage.max_steps)
        with contextlib.closing(steps), self.profile:
            while True:
                stopped = self._save_and_evaluate(position, start, last_step)
                if stopped or position.step == last_step:
                    LOG.info("%s", self.meter.verdict())
                    return not stopped
                inputs, num_label_tokens, waited_s = self._read(steps, position)
                result = self._step(inputs, num_label_tokens, position)
                self.meter.add(result, inputs.micro_batches, waited_s)
                if self._is_logged(position, start, last_step):
                    with self.meter.phases(WRITE):
                        self._log(position, inputs, result, last_step)
                with self.meter.pause():
                    self.profile.step(position.step)
                    self.meter.phases.mark(PROFILE)

    def _read(self, steps: Iterator[StepInput], position: Position) -> tuple[StepInput, int, float]:
        """This rank's input of the next step, the label tokens of all ranks, and how long the input was waited for."""
        with self.meter.phases(READ):
            self.heartbeat.heart.works(f"reading step {position.step + 1}")
            waiting = time.perf_counter()
            inputs = next(steps)
            waited_s = time.perf_counter() - waiting
            self.heartbeat.heart.waits(f"step {position.step + 1} read")
            (num_label_tokens,) = self.heartbeat.ranks.sum([inputs.num_label_tokens])
        return inputs, int(num_label_tokens), waited_s

    def _step(self, inputs: StepInput, num_label_tokens: int, position: Position) -> StepResult:
        self.heartbeat.heart.works(f"computing step {position.step + 1}")
        share = self._share_of_peak(position.stage_step)
        key = "dropout", self.recipe.run.seed, position.step
        seeds = [Chance(*key, number).below(1 << 63) for number in inputs.numbers]  # on whatever rank it is
        told = self.heartbeat.heart, self.meter.phases
        result = train_step(self.engine, inputs.micro_batches, seeds, num_label_tokens, share, *told)
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

    def _save_and_evaluate(self, position: Position, start: int, last_step: int) -> bool:
        """What is due between two steps; returns whether the run stops here."""
        ended, every = position.step == last_step, self.recipe.evaluation.every
        is_due = position.stage_step > 0 and (position.stage_step % every == 0 or ended)
        is_due = is_due and not self.checkpoints.is_evaluated(position)
        stopping = self._stops(position, start) and (is_due or not ended)
        saves = is_due or ended or stopping or position.stage_step % self.recipe.run.checkpoint_every == 0
        if saves and position.step > start:
            with self.meter.pause(), self.meter.phases(SAVE):
                self._save(position)
        if is_due and not stopping:
            with self.meter.pause(), self.meter.phases(EVALUATE):
                stopping = not self._evaluate(position)
        return stopping

    def _save(self, position: Position) -> None:
        heart = self.heartbeat.heart  # rank 0 writes, the others wait for it
        (heart.works if self.heartbeat.ranks.is_first else heart.waits)(f"saving step {position.step}")
        LOG.info("saved %s", self.checkpoints.save(self.engine, position))

    def _evaluate(self, position: Position) -> bool:
        """Evaluate and write it down; returns False where a request to stop cut it short."""
        scalars = self.evaluate(position.step)
        if scalars is None:
            return False
        self.tracker.scalars(position.step, scalars)
        told = "  ".join(f"{tag.removeprefix('eval/')} {value:.4f}" for tag, value in scalars.items())
        LOG.info("evaluation at step %d: %s", position.step, told)
        wer, swapped = scalars["eval/wer"], scalars.get("eval/wer_swapped")
        if swapped is not None and swapped - wer < self.recipe.evaluation.listening_gap:
            LOG.warning(DEAF, 100 * wer, 100 * swapped)
        self.checkpoints.note_evaluation(position, wer)
        return True

    def _is_logged(self, position: Position, start: int, last_step: int) -> bool:
        is_due = position.stage_step % self.recipe.run.log_every == 0
        return is_due or position.step in (start + 1, last_step) or position.stage_step == self.stage.alignment_steps

    def _log(self, position: Position, inputs: StepInput, result: StepResult, last_step: int) -> None:
        rate = self.stage.learning_rate * self._share_of_peak(position.stage_step - 1)
        scalars = self.meter.scalars(result, rate)
        if position.stage_step <= self.stage.alignment_steps:
            scalars["train/alignment_loss"] = scalars["train/loss"]  # by this name one sees where it ends
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

    def _stops(self, position: Position, start: int) -> bool:
        """Whether any rank was asked to stop; all ranks answer alike."""
        with self.meter.phases(AGREE):
            self.heartbeat.heart.waits(f"step {position.step} done")
            (asked,) = self.heartbeat.ranks.sum([self.heartbeat.stop.asked])
        return asked > 0 or position.step - start == self.recipe.run.stop_after
