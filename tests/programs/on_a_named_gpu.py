"""What training, transcribing and encoding give on a GPU in name, and where the host waits there: FOLDER -> JSON.

Each entry of the output: ``off``, how far the results are from the CPU's, relatively; ``waits``, where the host waited.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import numpy as np
import tiny_bases as tiny
import torch
from named_gpu import GPU, Machine, waits
from test_grafted import IMAGE, picture

from graft.data.collate import collate_training
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.evaluation.transcribe import GraftTranscriber, inferring
from graft.model import mels
from graft.model.assemble import DTYPES, assemble, save_trained
from graft.model.encoder import SpeechEncoder
from graft.model.lean import save_less
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.ranks import Ranks
from graft.recipe import Recipe
from graft.train.step import train_step

CPU = torch.device("cpu")
KINDS = ("linear", "mlp", "swiglu", "conv")  # of projectors
TEXTS = ("hello there", "hi", "good day to you")


class Plain:
    """An engine without DeepSpeed, which knows no such device: gradients add up, and nothing is updated."""

    def __init__(self, model: torch.nn.Module, device: torch.device, precision: str) -> None:
        self.model, self.device, self.ranks, self.casts = model, device, Ranks(), precision == "bf16"

    def __call__(self, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.casts):
            return self.model(**inputs)

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, share_of_peak: float) -> tuple[torch.Tensor, bool]:
        norms = [torch.linalg.vector_norm(p.grad) for p in self.model.parameters() if p.grad is not None]
        return torch.stack(norms).norm(), True


def drawn(count: int = 3) -> list[FeatureSample]:
    """Samples of different lengths."""
    chance = torch.Generator().manual_seed(1)
    frames = [torch.randn(20 + 13 * i, 24, generator=chance).bfloat16() for i in range(count)]
    return [FeatureSample(f"u{i}", TEXTS[i], features) for i, features in enumerate(frames)]


def noise(*counts: int) -> list[np.ndarray]:
    return [np.random.default_rng(n).standard_normal(n).astype(np.float32) * 0.1 for n in counts]


def graft_of(recipe: Recipe, device: torch.device, stage: int = 1) -> tuple[torch.nn.Module, PromptTemplate]:
    """As launch/train.py makes it."""
    graft = assemble(recipe, device=device)
    if stage == 2:
        add_lora(graft.model, recipe.lora)
        for name, weight in graft.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.02)  # zeros would leave lora_A without a gradient
    select_trainable(graft.model, stage)
    save_less(graft.model.model.language_model)
    return graft.model.train(), PromptTemplate.from_processor(graft.processor, "Be brief.", "Transcribe.")


def step(recipe: Recipe, device: torch.device, stage: int = 1, align: bool = False) -> list[torch.Tensor]:
    """Loss, norm and gradients of a step of two micro-batches."""
    model, template = graft_of(recipe, device, stage)
    batches = [collate_training(drawn()[part], template, align) for part in (slice(2), slice(2, 3))]
    batches = [batch.pin_memory() for batch in batches] if device == GPU else batches
    waits.clear()
    result = train_step(Plain(model, device, recipe.run.precision), batches, [1, 2], 9, 1.0)
    seen = list(waits)
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    made = [tensor.detach().cpu() for tensor in (result.loss_share, result.grad_norm, *grads)]
    waits[:] = seen
    return made


def transcripts(recipe: Recipe, device: torch.device, weight: float, num_tokens: int = 6) -> list[Any]:
    """Replies by greedy or by joint decoding, and the loss of their references."""
    model, template = graft_of(recipe, device)
    source = SimpleNamespace(entries=[])
    how = {"max_new_tokens": num_tokens, "precision": recipe.run.precision, "alignment_weight": weight}
    scribe = GraftTranscriber(model, source, template, device=device, **how)
    waits.clear()
    answers = scribe.answer(drawn())
    texts = list(answers.texts) if recipe.run.precision == "fp32" else len(answers.texts)  # in bf16 words are too near
    return [answers.loss, texts]


def frames(recipe: Recipe, device: torch.device, window: str) -> list[torch.Tensor]:
    """Frames of four waveforms, one of them of the whole window, by an encoder that has encoded before."""
    mels.MOST_AT_A_TIME = 3  # so these are two goes
    encoder = SpeechEncoder(recipe.bases.whisper, DTYPES[recipe.run.precision], device, window)
    encoder.encode(noise(777))
    waits.clear()
    return encoder.encode(noise(900, 16_000, 7_000, 7_001))


def logits_with_a_picture(recipe: Recipe, device: torch.device) -> list[torch.Tensor]:
    """Of a prompt with a picture and two audios, heard by the encoder in the model."""
    graft = assemble(recipe, with_encoder=True, device=device)
    prompt = f"{IMAGE} and <|audio_pad|> then <|audio_pad|>"
    inputs = graft.processor(text=prompt, images=[picture()], audio=noise(9_000, 5_000))
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    waits.clear()
    with inferring(graft.model, device, "fp32"):
        return [graft.model(**inputs).logits.cpu()]


def saved(recipe: Recipe, device: torch.device, folder: Path) -> list[bytes]:
    """The files of what was trained."""
    model, _ = graft_of(recipe, device, stage=2)
    save_trained(folder / device.type, model)
    return [path.read_bytes() for path in sorted((folder / device.type).rglob("*.safetensors"))]


def off(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The greatest relative difference of tensors and numbers; anything else must be equal."""
    assert len(ours) == len(theirs) > 0
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, torch.Tensor | float):
            a, b = torch.as_tensor(mine).double(), torch.as_tensor(other).double()
            worst = max(worst, ((a - b).norm() / b.norm()).item())
        else:
            assert mine == other, f"{mine} on the device, {other} on the CPU"
    return worst


def mistakes() -> dict[str, str]:
    """What must be seen: without this, the rest of the output would prove nothing."""
    there, here, told = torch.ones(3, device=GPU), torch.ones(3), {}
    for name, mistake in {"two devices": lambda: there + here, "index": lambda: there[torch.tensor([1])]}.items():
        waits.clear()
        try:
            mistake()
            told[name] = " ".join(waits)
        except RuntimeError as error:
            told[name] = str(error)
    for name, wait in {
        "number": lambda: there.sum().item(),
        "mask": lambda: there[there > 0],
        "where": lambda: (there > 0).nonzero(),
        "to the host": lambda: there.cpu(),
        "from the host": lambda: here.to(GPU, non_blocking=True),  # not page-locked
        "made of a list": lambda: torch.tensor([1.0, 2.0], device=GPU),
        "nothing": lambda: torch.empty(3, pin_memory=True).to(GPU, non_blocking=True) + there,
    }.items():
        waits.clear()
        wait()
        told[name] = " ".join(waits)
    return told


def casts() -> list[str]:
    """Precisions of a product, a root, a sum and a mixture under autocast."""
    wide, narrow = torch.ones(2, 2, device=GPU), torch.ones(2, 2, device=GPU, dtype=torch.bfloat16)
    with torch.autocast(GPU.type, torch.bfloat16):
        made = wide @ narrow, narrow.rsqrt(), narrow.sum(), torch.cat([narrow, wide]), narrow * narrow
    return [str(tensor.dtype).removeprefix("torch.") for tensor in made]


def main(folder: Path) -> None:
    bases = tiny.whisper_folder(folder / "whisper"), tiny.qwen2_vl_folder(folder / "qwen2_vl")
    recipes = {kind: tiny.recipe(*bases, projector={"kind": kind, "hidden_size": 64}) for kind in KINDS}
    conv = recipes["conv"]
    bf16 = conv.model_copy(update={"run": conv.run.model_copy(update={"precision": "bf16"})})
    calls: dict[str, Callable[[torch.device], Sequence[Any]]] = {
        **{f"stage 1, {kind}": lambda device, kind=kind: step(recipes[kind], device) for kind in KINDS},
        "stage 1, aligning": lambda device: step(conv, device, align=True),
        "stage 2": lambda device: step(conv, device, stage=2),
        "stage 1, bf16": lambda device: step(bf16, device),
        "stage 1, aligning, bf16": lambda device: step(bf16, device, align=True),
        "stage 2, bf16": lambda device: step(bf16, device, stage=2),
        "joint, bf16": lambda device: transcripts(bf16, device, 1.0),
        "full windows, bf16": lambda device: frames(bf16, device, "full"),
        "greedy": lambda device: transcripts(conv, device, 0.0),
        "joint": lambda device: transcripts(conv, device, 1.0),
        "joint, longer": lambda device: transcripts(conv, device, 1.0, num_tokens=12),
        "full windows": lambda device: frames(conv, device, "full"),
        "trimmed windows": lambda device: frames(conv, device, "trimmed"),
        "picture": lambda device: logits_with_a_picture(conv, device),
        "saved": lambda device: saved(conv, device, folder),
    }
    with Machine():
        told: dict[str, Any] = {"mistakes": mistakes(), "casts": casts()}
        for name, call in calls.items():
            expected = call(CPU)
            waits.clear()
            told[name] = {"off": off(call(GPU), expected), "waits": list(waits)}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
