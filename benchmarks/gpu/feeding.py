"""Training fed from real shards: how long a step waits for its clips, and how long the seed's training would take.

Shards are written by the library's own writer into a temporary folder, and read, checked, collated and read ahead by
its own feed: what is timed is the loop of ``launch/train.py`` without evaluations and checkpoints.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness, mini
from benchmarks.gpu.bench import Bench, free
from benchmarks.gpu.steps import BUDGET, FRAMES, POSITIONS, STACK_FACTOR, R, graft, lean, sizes
from benchmarks.harness import Figure
from benchmarks.ours import Ours
from benchmarks.sets import make_set
from benchmarks.shapes import Shape
from benchmarks.words import template
from graft.data.loader import ShardSource
from graft.data.shard_format import FeatureSet
from graft.model.lora import add_lora
from graft.ranks import Ranks
from graft.recipe import Data, Lora, Stage
from graft.train.feed import Feed

NUM_CLIPS, MICRO_BATCHES = 2_048, 2  # of the set, 2.6 GB; of a step
FEED_S, RECIPE_S, WARM_UP = 20.0, 60.0, 3  # seconds of each measurement, steps before it
TARGETS = {"7b": "<= 0.01", "2b": "<= 0.03"}
SEED_SAMPLES = {1: 160_000, 2: 20_000}  # 5,000 steps of 32 clips; one epoch of 20,000
SEED_MINUTES = "<= 25.3"


@dataclass(frozen=True)
class Sustained:
    """What a while of training came to."""

    clips: int
    seconds: float
    waited_s: float
    steps: int

    @property
    def rate(self) -> float:
        """Clips a second."""
        return self.clips / self.seconds


def waiting(bench: Bench) -> Iterator[Figure]:
    """The share of the time that the loop waits for clips, in stage 1 of the 7B and of the 2B."""
    for name, target in TARGETS.items():
        found, engine = sustained(bench, name, 1, FEED_S)
        free()
        facts = {"samples/s": found.rate, "steps": found.steps, "seconds": found.seconds, "engine": engine}
        what = f"share of the time that stage 1 of the {name.upper()} waits for clips from shards in the page cache"
        yield Figure(f"feed.{name}", found.waited_s / found.seconds, "", what, target, facts=facts)


def recipe(bench: Bench) -> Iterator[Figure]:
    """Minutes of the seed's whole training, from a minute of each stage."""
    found, engine = {}, ""
    for stage in (1, 2):
        found[stage], engine = sustained(bench, "7b", stage, RECIPE_S)
        free()
    facts = {f"stage {stage}: samples/s": one.rate for stage, one in found.items()}
    facts |= {f"stage {stage}: seconds": one.seconds for stage, one in found.items()}
    facts |= {f"stage {stage}: waited": one.waited_s / one.seconds for stage, one in found.items()}
    told = " and ".join(f"{count:,} clips in stage {stage}" for stage, count in SEED_SAMPLES.items())
    what = f"{told}, extrapolated from at least {RECIPE_S:g} s of each, 10 s clips from shards, 7B"
    minutes = extrapolated_minutes({stage: one.rate for stage, one in found.items()})
    yield Figure("recipe", minutes, "minutes", what, SEED_MINUTES, facts={**facts, "engine": engine})


def extrapolated_minutes(rates: dict[int, float]) -> float:
    """Minutes of the seed's training at these clips a second of each stage."""
    return sum(count / rates[stage] for stage, count in SEED_SAMPLES.items()) / 60


def sustained(bench: Bench, name: str, stage: int, seconds: float) -> tuple[Sustained, str]:
    """Train from shards for at least ``seconds``, and on what engine."""
    shape, num_clips = sizes(bench, name)
    model = graft(bench, shape)
    if stage == 2:
        add_lora(model, Lora(r=bench.size(R, 4)))
    side = Ours(lean(model), stage, [])
    with fed(bench, name, shape, num_clips) as feed:
        found = train(bench, side, feed, bench.size(seconds, 0.2))
    side.engine.close()
    return found, side.engine_name


@contextmanager
def fed(bench: Bench, name: str, shape: Shape, num_clips: int) -> Iterator[Feed]:
    """The library's feed on shards of its own, gone afterwards."""
    settings = Stage(
        global_batch_size=MICRO_BATCHES * num_clips,
        micro_batches=MICRO_BATCHES,
        micro_batch_tokens=bench.size(BUDGET[name], num_clips * POSITIONS),
        max_steps=1_000_000,
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = [mini.reply(clip, shape) for clip in range(bench.size(NUM_CLIPS, 24))]
        make_set(Path(folder), texts, FRAMES, shape.frame_size)
        source = ShardSource(FeatureSet.open(folder))
        yield Feed(source, template(shape, STACK_FACTOR), settings, Data(), Ranks(), seed=1)


def train(bench: Bench, side: Ours, feed: Feed, at_least_s: float) -> Sustained:
    """Steps as the training loop takes them; the first ones do not count."""
    steps = feed.steps(0, 1_000_000)
    try:
        for _ in range(WARM_UP):
            inputs = next(steps)
            side.step_on(inputs.micro_batches, inputs.num_label_tokens)
        harness.synchronise(bench.device)
        clips = taken = 0
        waited_s, started = 0.0, time.perf_counter()
        while time.perf_counter() - started < at_least_s:
            waiting = time.perf_counter()
            inputs = next(steps)
            waited_s += time.perf_counter() - waiting
            side.step_on(inputs.micro_batches, inputs.num_label_tokens)
            clips, taken = clips + len(inputs.ids), taken + 1
        harness.synchronise(bench.device)
        return Sustained(clips, time.perf_counter() - started, waited_s, taken)
    finally:
        steps.close()
