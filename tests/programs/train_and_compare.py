"""Train both stages in this process, then compare every frozen tensor with its file: RECIPE REPORT.pt OVERRIDES."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from graft.data.prompt import PromptTemplate
from graft.model.assemble import assemble
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.ranks import stop
from graft.recipe import load_recipe
from graft.sources import Sources
from graft.train.engine import Engine, resolve_ds_config, start_process_group
from graft.train.feed import Feed
from graft.train.step import train_step

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["stage1.global_batch_size=5", "stage2.global_batch_size=5", "data.features=online"]

recipe = load_recipe(sys.argv[1], [*sys.argv[3:], *QUICK])
ranks = start_process_group(60, 60)
graft = assemble(recipe, with_encoder=True)
sources = Sources(recipe, ranks, "cpu")
template = PromptTemplate.from_processor(graft.processor, recipe.prompt.system, recipe.prompt.instruction)
source = sources.open("train")
moved = {}
for number in (1, 2):
    if number == 2:
        add_lora(graft.model, recipe.lora)
    trained = select_trainable(graft.model, number)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    stage = recipe.stage(number)
    config = resolve_ds_config(ROOT / "ds_configs" / "zero2.json", stage, recipe.run.precision)
    engine = Engine(graft.model, dict.fromkeys(trained, 0.01), stage, config, ranks)
    feed = Feed(source, template, stage, recipe.data, ranks, seed=number)
    for inputs in feed.steps(0, 3):
        train_step(engine, inputs.micro_batches, inputs.numbers, inputs.num_label_tokens, 1.0)
    engine.close()
    part = "projector" if number == 1 else "lora"
    moved[part] = any(not torch.equal(before[n], p) for n, p in trained.items() if part in n)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The file's bf16 numbers, held in whichever precision."""
    return torch.equal(ours.float(), theirs.float())


whisper = load_file(Path(recipe.bases.whisper) / "model.safetensors")
qwen = load_file(Path(recipe.bases.qwen2_vl) / "model.safetensors")
state = {name.replace(".base_layer.", "."): tensor for name, tensor in graft.model.state_dict().items()}
replica = sources.encoder.model.state_dict()
compared, differing, rows = {"audio_tower": 0, "visual": 0, "language_model": 0}, [], []
for name, tensor in whisper.items():
    if name.startswith("model.encoder."):
        inner = name.removeprefix("model.encoder.")
        compared["audio_tower"] += 1
        if not (same_bits(state[f"model.audio_tower.{inner}"], tensor) and same_bits(replica[inner], tensor)):
            differing.append(name)
for name, tensor in qwen.items():
    part = "visual" if "visual" in name else "language_model"
    inner = name.replace("model.language_model.", "").removeprefix("model.").removeprefix("visual.")
    ours = state[f"model.{part}.{inner}"]
    compared[part] += 1
    if "embed_tokens" in name:
        rows = (ours.float() != tensor.float()).any(dim=1).nonzero().flatten().tolist()
    elif not same_bits(ours, tensor):
        differing.append(name)
markers = sorted([graft.config.audio_start_token_id, graft.config.audio_end_token_id])
torch.save(
    {
        "trained_moved": moved,
        "compared": compared,
        "differing": differing,
        "differing_rows": rows,
        "marker_rows": markers,
    },
    sys.argv[2],
)
stop()
