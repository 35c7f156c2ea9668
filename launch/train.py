"""Train one stage of a recipe: stage 1 the projector, stage 2 the projector and LoRA.

    deepspeed launch/train.py recipes/tiny.yaml --stage 1
    deepspeed --num_gpus 8 launch/train.py recipes/whisper-turbo_qwen2-vl-7b.yaml --stage 2 run.dir=runs/7b
    deepspeed --hostfile hosts launch/train.py my.yaml --stage 1 stage1.learning_rate=5e-4 --profile

Run the same command again and it goes on where it stopped, on any number of ranks. Exit code 75: stopped on request,
all that was trained is saved.
"""

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: the launcher puts this folder first, where evaluate.py would hide a package

from graft import command
from graft.data.audio import AudioError
from graft.data.manifest import read_manifest
from graft.data.prompt import PromptTemplate
from graft.data.views import load_utterance
from graft.evaluation.evaluate import can_be_swapped, evaluate
from graft.evaluation.transcribe import Interrupted
from graft.lengths import SAMPLE_RATE
from graft.model.assemble import ADAPTER_FOLDER, Assembled, assemble
from graft.model.lean import save_less
from graft.model.trainable import describe, select_trainable
from graft.ranks import Ranks, stop
from graft.recipe import Recipe, load_recipe
from graft.run_dir import FILES_FILE, check_encoder, digest, verify_checkpoint
from graft.sources import Sources
from graft.tracker import NullTracker, tracker_for
from graft.train.checkpoint import Checkpoints, Position, resume_optimizer
from graft.train.claim import (
    beginning,
    check_is_ours,
    check_same_inputs,
    claim,
    dress,
    is_over,
    keep_others_out,
    settings_that_matter,
    versions,
)
from graft.train.engine import Engine, resolve_ds_config, start_process_group
from graft.train.feed import Feed
from graft.train.guard import check_alike, inputs_of
from graft.train.heartbeat import Heartbeat
from graft.train.loop import Evaluate, Loop
from graft.train.meter import StepMeter
from graft.train.profile import Profile, StepProfile
from graft.train.stopping import StopRequest
from graft.train.utilisation import model_flops, peak_of

LOG = logging.getLogger("graft.train")
NUM_CLIPS = 3  # to listen to in TensorBoard


def main(arguments: argparse.Namespace) -> int:
    """Train one stage; returns the exit code."""
    stop_request = StopRequest(exit_code=command.STOPPED)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    ranks = start_process_group(recipe.run.timeout_s, recipe.run.start_timeout_s)
    with Heartbeat(ranks, stop_request, recipe.run.patience_s, recipe.run.timeout_s) as heartbeat:
        code = train(recipe, arguments.stage, arguments.start_from, heartbeat, arguments.profile)
    # Not on the way of an error: NCCL would first wait for ranks that are in a collective which this one never joins
    stop()
    return code


def train(recipe: Recipe, number: int, start_from: Path | None, heartbeat: Heartbeat, profiled: bool = False) -> int:
    """From a recipe to a trained stage."""
    run_dir, stage, ranks = Path(recipe.run.dir), recipe.stage(number), heartbeat.ranks
    ds_path = recipe.run.ds_config or ROOT / "ds_configs" / "zero2.json"
    ds_config = resolve_ds_config(ds_path, stage, recipe.run.precision)
    begun = begin(recipe, number, start_from, ds_config, ranks)
    if begun is None:
        return command.DONE
    position, checkpoint, resumed = begun
    graft, rates = build(recipe, number, checkpoint, heartbeat)
    heartbeat.heart.works("reading what is to be trained on")
    sources = Sources(recipe, ranks, ranks.device())
    template = PromptTemplate.from_processor(graft.processor, recipe.prompt.system, recipe.prompt.instruction)
    source = sources.open_mixed(recipe.data.train_split)
    feed = Feed(source, template, stage, recipe.data, ranks, recipe.run.seed + number)
    about = agree(recipe, number, graft, sources, feed, ranks)
    if checkpoint:
        check_fits(checkpoint, about, resumed)
    heartbeat.heart.works("starting the engine")
    engine = Engine(graft.model, rates, stage, ds_config, ranks)
    if resumed:
        resume_optimizer(engine, checkpoint, position)
    heartbeat.heart.works("opening what is written")
    tracker = tracker_for(ranks, run_dir, resume_step=position.step + 1 if position.step else None)
    introduce(tracker, recipe, template, feed)
    ranks.by_first(lambda: play(tracker, recipe))
    still_to_align = max(0, stage.alignment_steps - position.stage_step)
    loop = Loop(
        engine,
        feed,
        Checkpoints(run_dir, ranks, recipe.run.keep_checkpoints, about),
        evaluation(recipe, graft, sources, template, tracker, heartbeat),
        tracker,
        recipe,
        stage,
        meter(engine, graft, recipe, ranks),
        heartbeat,
        StepProfile(run_dir, ranks, engine.device, still_to_align) if profiled else Profile(),
    )
    complete = loop.run(position)
    tracker.close()
    return command.DONE if complete else command.STOPPED


def begin(
    recipe: Recipe, number: int, start_from: Path | None, ds_config: dict, ranks: Ranks
) -> tuple[Position, Path | None, bool] | None:
    """Claim the run directory; the position, the checkpoint to begin with, and whether this goes on from it.

    None where nothing is left to do: then, and where the run is refused, the folder stays as it is, but for a lock.

    Raises:
        ValueError: on every rank: another run's folder, one in use, or a checkpoint that a rank does not have.
    """
    run_dir = Path(recipe.run.dir)
    if recipe.run.ranks not in (None, ranks.world_size):
        raise ValueError(
            f"the recipe asks for {recipe.run.ranks} ranks (run.ranks) and {ranks.world_size} were started: "
            "a hostfile that is not found makes deepspeed start on this machine alone"
        )
    position, checkpoint, nothing_left = ranks.gather(ranks.by_first(lambda: where(recipe, number, start_from)))[0]
    if nothing_left:
        LOG.info("stage %d is at its end in %s: nothing is left to do", number, checkpoint)
        return None
    if checkpoint:
        ranks.together(lambda: None if ranks.is_first else verify_checkpoint(checkpoint))
        check_alike({"checkpoint": digest(checkpoint / FILES_FILE)}, ranks)
    ranks.by_first(lambda: claim(run_dir, recipe, number, ds_config))
    resumed = checkpoint is not None and position.stage_step > 0
    LOG.info(
        "stage %d, %s, %d rank%s",
        number,
        f"resumed at step {position.step} from {checkpoint}" if resumed else _start(checkpoint),
        ranks.world_size,
        "" if ranks.world_size == 1 else "s",
    )
    return position, checkpoint, resumed


def where(recipe: Recipe, number: int, start_from: Path | None) -> tuple[Position, Path | None, bool]:
    """The position, the checkpoint to begin with, and whether nothing is left to do.

    Rank 0 alone looks: another might see the folder as it was a moment ago, and train something else.
    """
    run_dir = Path(recipe.run.dir)
    check_is_ours(run_dir, recipe, number)
    keep_others_out(run_dir)
    position, checkpoint = beginning(run_dir, number, start_from)
    return position, checkpoint, is_over(run_dir, position, recipe.stage(number).max_steps)


def build(
    recipe: Recipe, number: int, checkpoint: Path | None, heartbeat: Heartbeat
) -> tuple[Assembled, dict[str, float]]:
    """The model with the tensors it begins with, and the peak learning rate of everything that trains."""
    graft = heartbeat.ranks.together(lambda: assembled(recipe, number, checkpoint, heartbeat))
    stage, trained = recipe.stage(number), select_trainable(graft.model, number)
    if recipe.run.gradient_checkpointing:
        graft.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.run.compile:
        for layer in graft.model.model.language_model.layers:
            layer.compile(dynamic=True)  # layer by layer: one graph serves them all, and lengths differ
    elif not recipe.run.gradient_checkpointing:  # these two choose by themselves what is kept
        save_less(graft.model.model.language_model)
    graft.model.train()  # for LoRA's dropout and for gradient checkpointing; frozen towers have neither
    LOG.info("%s", describe(graft.model))
    return graft, {name: stage.lora_learning_rate if ".lora_" in name else stage.learning_rate for name in trained}


def assembled(recipe: Recipe, number: int, checkpoint: Path | None, heartbeat: Heartbeat) -> Assembled:
    """The graft of the recipe, with the adapters of its stage and the tensors of ``checkpoint``."""
    heartbeat.heart.works("reading the model")
    graft = assemble(recipe, device=heartbeat.ranks.device())
    dress(graft.model, recipe, number, checkpoint)
    return graft


def agree(recipe: Recipe, number: int, graft: Assembled, sources: Sources, feed: Feed, ranks: Ranks) -> dict[str, Any]:
    """What every checkpoint tells of itself, when all ranks have the same, and the same to train on."""
    about = {
        "max_steps": recipe.stage(number).max_steps,
        "settings": settings_that_matter(recipe, number),
        "encoder_fingerprint": sources.fingerprint,
        "versions": versions(),
        "inputs": inputs_of(feed),
    }
    shapes = {name: list(weight.shape) for name, weight in select_trainable(graft.model, number).items()}
    check_alike(about | {"trained": shapes}, ranks)
    return about


def check_fits(checkpoint: Path, about: dict[str, Any], resumed: bool) -> None:
    """Refuse tensors that were trained on another encoder's features, and to go on with other utterances.

    Raises:
        ValueError: on every rank.
    """
    check_encoder(checkpoint, about["encoder_fingerprint"])
    if resumed:
        check_same_inputs(checkpoint, about["inputs"])


def meter(engine: Engine, graft: Assembled, recipe: Recipe, ranks: Ranks) -> StepMeter:
    """What measures the steps; says of what the model FLOP utilisation (MFU) is a share."""
    peak = peak_of(engine.device, recipe.run.precision)
    LOG.info("MFU is a share of %.3g TFLOP/s a rank: %s", peak.flops / 1e12, peak.source)
    return StepMeter(ranks, engine.device, model_flops(graft.model), peak)


def introduce(tracker: NullTracker, recipe: Recipe, template: PromptTemplate, feed: Feed) -> None:
    """Put into TensorBoard what a person looks at first: settings and one training sequence."""
    tracker.hparams(recipe.model_dump(mode="json"), ["eval/wer", "eval/loss"])
    entry = feed.source.entries[0]
    tokens = template.num_audio_tokens(entry.num_frames)
    before, after = (template.processor.tokenizer.decode(ids) for ids in (template.before_ids, template.after_ids))
    learnt = template.processor.tokenizer.decode([*template.text_ids(entry.text), *template.end_ids])
    tracker.text(0, "data/first_utterance", f"    {before!r} [audio x {tokens}] {after!r}\n\nlearnt: `{learnt!r}`")


def play(tracker: NullTracker, recipe: Recipe) -> None:
    """Put a few sounds of the evaluation's split beside that. One that cannot be heard is in the set's rejects."""
    manifest = Path(recipe.data.manifests.get(recipe.evaluation.split, ""))
    for utterance in read_manifest(manifest).utterances[:NUM_CLIPS] if manifest.is_file() else []:
        with contextlib.suppress(AudioError):
            tracker.audio(0, f"{recipe.evaluation.split}/{utterance.id}", load_utterance(utterance), SAMPLE_RATE)


def evaluation(
    recipe: Recipe,
    graft: Assembled,
    sources: Sources,
    template: PromptTemplate,
    tracker: NullTracker,
    heartbeat: Heartbeat,
) -> Evaluate:
    """What the loop calls to know how well the model transcribes."""
    source, ranks, most = sources.open(recipe.evaluation.split), heartbeat.ranks, recipe.evaluation.max_utterances
    if not source.entries:
        raise ValueError(f"split '{recipe.evaluation.split}', which scores the training, holds no utterance to be used")
    swapped = can_be_swapped(source, recipe.evaluation, most)
    if not swapped:
        LOG.warning(
            "split '%s' is evaluated without swapped audio: all its texts are the same", recipe.evaluation.split
        )

    def go_on() -> bool:
        heartbeat.heart.works("evaluating")
        return not heartbeat.stop.asked

    def run(step: int) -> dict[str, float] | None:
        try:
            scored = evaluate(
                graft.model,
                source,
                template,
                ranks,
                settings=recipe.evaluation,
                device=ranks.device(),
                precision=recipe.run.precision,
                max_utterances=most,
                swapped=swapped,
                go_on=go_on,
            )
        except Interrupted:
            return None
        tracker.table(step, "eval/transcripts", scored.rows(most=10))
        return scored.tags()

    return run


def _start(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "starting fresh"
    adapters = " and adapters" if (checkpoint / ADAPTER_FOLDER).is_dir() else ""
    return f"starting from the projector{adapters} of {checkpoint}"


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--profile", action="store_true", help="trace a few steps into <run.dir>/profile")
    parser.add_argument("--from", dest="start_from", type=Path, metavar="RUN_DIR_OR_CHECKPOINT")
    command.run(main, parser)
