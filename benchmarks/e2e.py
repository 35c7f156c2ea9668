"""The whole way on a CPU, sound files to checkpoint, against the seed's way of doing it: seconds of both, start-up in.

The work is that of the seed's own training of 20,000 clips: every clip is heard PASSES times, 8 in stage 1 (its 160,000
samples) and once in stage 2. Random weights: an encoder of whisper-tiny's shape and the miniature of the 7B.

*Ours* encodes every clip once into shards and trains both stages from them with the library's feed, engine and
checkpoints. *The seed* (github.com/kulsoom-abdullah/Qwen2-VL-Audio-Adapter, in our own words on stock Hugging Face
code) reads, extracts and encodes the padded window again whenever a clip is heard, and trains in the form that
:mod:`benchmarks.peers` describes. Its micro-batches all cost the same, so one of each stage is timed and counted as
many times as there are. Both encoders have the same precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile
import torch
from transformers import WhisperModel

from benchmarks import harness, mini, peers
from benchmarks.harness import Figure, Round, Spent
from benchmarks.ours import Ours
from benchmarks.sets import describe
from benchmarks.shapes import MINI, WHISPER_TINY
from benchmarks.whisper import noise, random_whisper
from benchmarks.words import template
from graft.data.audio import load_audio
from graft.data.collate import Batch, collate_training
from graft.data.loader import FeatureSample, ShardSource
from graft.data.manifest import Utterance
from graft.data.shard_format import FeatureSet
from graft.data.shard_writer import ShardWriter, merge_parts
from graft.lengths import SAMPLE_RATE, SAMPLES_PER_ENCODER_FRAME, seconds
from graft.model.encoder import SpeechEncoder, load_feature_extractor
from graft.model.lora import add_lora
from graft.ranks import Ranks
from graft.recipe import Data, Lora, Stage
from graft.train.checkpoint import Checkpoints, Position
from graft.train.feed import Feed

NUM_CLIPS, STACK_FACTOR, ENCODED_TOGETHER = 16, 4, 16
PASSES = {1: 8, 2: 1}
SHAPE = replace(MINI, frame_size=WHISPER_TINY.width)
SETTINGS = Stage(global_batch_size=NUM_CLIPS, micro_batches=4, micro_batch_tokens=mini.MICRO_BATCH_TOKENS)


def report() -> Iterator[Figure]:
    """The ratio of whole times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_whisper(folder / "whisper", WHISPER_TINY)
        utterances = record(folder / "audio")
        seed = SeedsWay(folder, utterances)
        sides = {
            "ours": lambda: our_way(folder, utterances),
            "seed starts": seed.start,
            "seed stage 1": lambda: seed.micro_batch(1),
            "seed stage 2": lambda: seed.micro_batch(2),
            "seed saves": seed.save,
        }
        seed.start()
        taken = harness.rounds(sides, harness.gemm_probe(MINI.layer_shapes, harness.fast_dtype()))
    taken = [Round({"ours": r.spent["ours"], "seed": whole(r.spent, NUM_CLIPS)}, r.probe) for r in taken]
    value, agrees, clocks = harness.ratio(taken, "seed", "ours")
    facts = {
        **clocks,
        "clips": NUM_CLIPS,
        "our seconds": min(r.spent["ours"].wall for r in taken),
        "seed's seconds, scaled from one micro-batch of each stage": min(r.spent["seed"].wall for r in taken),
    }
    what = (
        "sound files to checkpoint, both stages, start-up counted: the seed's way on stock Hugging Face, with gradient "
        "checkpointing / ours"
    )
    yield Figure("e2e.cpu", value, "x", what, ">= 15", agrees, facts)


def whole(spent: Mapping[str, Spent], num_clips: int) -> Spent:
    """The seed's whole time: its start, every pass over every clip in micro-batches as large as its own, its saving."""
    times = {"seed starts": 1.0, "seed saves": float(len(PASSES))}
    times |= {f"seed stage {stage}": PASSES[stage] * num_clips / peers.SEED_BATCH[stage] for stage in PASSES}
    wall, cpu = (sum(n * getattr(spent[part], clock) for part, n in times.items()) for clock in ("wall", "cpu"))
    return Spent(wall, cpu)


def record(folder: Path) -> list[Utterance]:
    """Sound files of noise, as long as clips of the fixed list, with transcripts."""
    folder.mkdir()
    frames, utterances = mini.clip_frames()[:NUM_CLIPS], []
    for number, waveform in enumerate(noise([count * SAMPLES_PER_ENCODER_FRAME for count in frames])):
        path = folder / f"clip-{number}.wav"
        soundfile.write(path, waveform, SAMPLE_RATE)
        utterances.append(Utterance(f"clip {number}", path, seconds(len(waveform)), mini.reply(number, SHAPE)))
    return utterances


def our_way(folder: Path, utterances: Sequence[Utterance]) -> None:
    """Encode once, then train both stages from shards."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name)
        source = ShardSource(precomputed(folder / "whisper", out / "set", utterances))
        model = mini.graft(STACK_FACTOR, harness.fast_dtype(), SHAPE)
        checkpoints, position = Checkpoints(out / "run", Ranks(), keep=2, about={}), Position(1, 0, 0)
        for stage, passes in PASSES.items():
            if stage == 2:
                add_lora(model, Lora(r=mini.R, alpha=2 * mini.R))
            side = Ours(model, stage, [])
            feed = Feed(source, template(SHAPE, STACK_FACTOR), SETTINGS, Data(), Ranks(), seed=stage)
            for inputs in feed.steps(0, passes * feed.plan.steps_per_epoch):
                side.step_on(inputs.micro_batches, inputs.num_label_tokens)
                position.step += 1
            checkpoints.save(side.engine, replace(position, stage=stage))
            side.engine.close()


def precomputed(whisper: Path, folder: Path, utterances: Sequence[Utterance]) -> FeatureSet:
    """The feature set of the sound files."""
    encoder = SpeechEncoder(str(whisper), harness.fast_dtype())
    description = describe(encoder.frame_size, encoder.fingerprint)
    (folder / "parts").mkdir(parents=True)
    with ShardWriter(folder, description, 0) as writer:
        for first in range(0, len(utterances), ENCODED_TOGETHER):
            together = utterances[first : first + ENCODED_TOGETHER]
            waveforms = [load_audio(utterance.audio_filepath) for utterance in together]
            for utterance, waveform, frames in zip(together, waveforms, encoder.encode(waveforms), strict=True):
                writer.add(utterance, frames, len(waveform))
    merge_parts(folder, description, [writer.part], [])
    return FeatureSet.open(folder, encoder.fingerprint)


class SeedsWay:
    """The seed's training, in parts that can be timed."""

    def __init__(self, folder: Path, utterances: Sequence[Utterance]) -> None:
        self.folder, self.utterances = folder, utterances
        self.peers: dict[int, peers.Peer] = {}

    def start(self) -> None:
        """Load the encoder, make the model of each stage."""
        whisper = str(self.folder / "whisper")
        self.extractor = load_feature_extractor(whisper)
        self.encoder = WhisperModel.from_pretrained(whisper, dtype=harness.fast_dtype()).encoder.eval()
        model = mini.graft(1, harness.fast_dtype(), SHAPE)
        for stage in PASSES:
            lora: dict[str, Any] = {"r": mini.R, "lora_alpha": 2 * mini.R, "lora_dropout": peers.SEED_DROPOUT}
            self.peers[stage] = peers.Peer(peers.stock(model, True, **(lora if stage == 2 else {})), [])

    def micro_batch(self, stage: int) -> None:
        """Hear one micro-batch of clips and learn from it."""
        peer, batch = self.peers[stage], self.hear(self.utterances[: peers.SEED_BATCH[stage]])
        peer.batches, peer.num_labels = [batch], batch.num_label_tokens
        peer.step()

    def hear(self, utterances: Sequence[Utterance]) -> Batch:
        """Sound files to a micro-batch: every clip extracted by itself, all encoded over the padded window."""
        waveforms = [soundfile.read(utterance.audio_filepath, dtype="float32")[0] for utterance in utterances]
        extract = self.extractor
        mels = [extract(w, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features for w in waveforms]
        with torch.no_grad():
            frames = self.encoder(torch.cat(mels).to(self.encoder.dtype)).last_hidden_state
        samples = [FeatureSample(u.id, u.text, f.bfloat16()) for u, f in zip(utterances, frames, strict=True)]
        return collate_training(samples, template(SHAPE, 1))

    def save(self) -> None:
        """What was trained, and the optimiser."""
        peer = self.peers[2]
        trained = {name: p for name, p in peer.model.named_parameters() if p.requires_grad}
        torch.save({"model": trained, "optimizer": peer.adam.state_dict()}, self.folder / "checkpoint.pt")
