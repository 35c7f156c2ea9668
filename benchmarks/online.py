"""Features encoded on the fly beside features from shards, on a CPU: when does precomputing pay?

Passes of stage 1 over clips of :mod:`benchmarks.e2e`, on the library's feed and engine, with ``data.features:
online`` and from shards; and what making the shards takes. Several at a time, since the feed encodes ahead, beside
training. Encoder of whisper-tiny's shape, full windows, the miniature of the 7B.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import harness, mini
from benchmarks.e2e import SETTINGS, SHAPE, STACK_FACTOR, precomputed, record
from benchmarks.harness import Figure, Round
from benchmarks.ours import Ours
from benchmarks.shapes import WHISPER_TINY
from benchmarks.whisper import random_whisper
from benchmarks.words import template
from graft.data.loader import FeatureSource, OnlineSource, ShardSource
from graft.data.manifest import Manifest
from graft.model.encoder import SpeechEncoder
from graft.ranks import Ranks
from graft.recipe import Data
from graft.train.feed import Feed

NUM_CLIPS, PASSES = 8, 2


def report() -> Iterator[Figure]:
    """How much longer a pass takes online, and after how many passes the shards have paid."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_whisper(folder / "whisper", WHISPER_TINY)
        utterances = record(folder / "audio")[:NUM_CLIPS]
        encoder = SpeechEncoder(str(folder / "whisper"), harness.fast_dtype())
        manifest = Manifest(folder / "audio", utterances, [], lines=[*range(1, len(utterances) + 1)])
        online = OnlineSource(manifest, encoder.encode, window=encoder.window)
        shards = ShardSource(precomputed(folder / "whisper", folder / "set", utterances))
        side = Ours(mini.graft(STACK_FACTOR, harness.fast_dtype(), SHAPE), 1, [])

        def make_shards() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                precomputed(folder / "whisper", Path(made) / "set", utterances)

        sides = {
            "online": lambda: train(side, online, Data(features="online")),
            "shards": lambda: train(side, shards, Data()),
            "making shards": make_shards,
        }
        taken = harness.rounds(sides, harness.gemm_probe(SHAPE.layer_shapes, harness.fast_dtype()))
    value, agrees, clocks = harness.ratio(taken, "online", "shards")
    what = f"a pass of stage 1 over {len(utterances)} clips, encoded on the fly / from shards"
    yield Figure("online.pass", value, "x", what, published=agrees, facts=clocks)
    yield pays(taken)


def pays(taken: Sequence[Round]) -> Figure:
    """After how many passes over the data making shards has paid, by both clocks; the seconds behind it."""
    seconds = {
        clock: {side: min(getattr(r.spent[side], clock) for r in taken) for side in taken[0].spent}
        for clock in ("wall", "cpu")
    }
    wall, cpu = (
        after_passes(spent["making shards"], spent["online"] / PASSES, spent["shards"] / PASSES)
        for spent in seconds.values()
    )
    agrees = harness.publishable(wall, cpu, len(taken))
    facts = {"wall": wall, "cpu": cpu, "rounds": len(taken)}
    facts |= {f"{side}, seconds by {clock}": spent[side] for clock, spent in seconds.items() for side in spent}
    return Figure("online.pays", wall, "passes", "after which making shards has paid", published=agrees, facts=facts)


def after_passes(making: float, online: float, shards: float) -> float:
    """Passes over the data after which ``making`` shards and reading them took no longer than encoding in each."""
    return making / (online - shards) if online > shards else float("inf")


def train(side: Ours, source: FeatureSource, data: Data) -> None:
    """PASSES passes."""
    feed = Feed(source, template(SHAPE, STACK_FACTOR), SETTINGS, data, Ranks(), seed=1)
    for inputs in feed.steps(0, PASSES * feed.plan.steps_per_epoch):
        side.step_on(inputs.micro_batches, inputs.num_label_tokens)
