"""The trainable set: named, complete, in fp32, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from graft.model.lora import is_lora_name

STAGES = (1, 2)
_PROJECTOR = "model.multi_modal_projector."


def select_trainable(model: nn.Module, stage: int) -> dict[str, nn.Parameter]:
    """Make the parameters of ``stage`` trainable fp32 masters and everything else frozen.

    Stage 1 trains the projector, stage 2 the projector and the adapters.

    Returns:
        The trainable parameters by name, in the model's own order: projector and adapters as modules are registered.

    Raises:
        ValueError: if there is no such stage, or stage 2 finds no adapters.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage}: there are stages {STAGES[0]} (projector) and {STAGES[1]} (projector, LoRA)")
    chosen = {name: parameter for name, parameter in model.named_parameters() if _belongs(name, stage)}
    if stage == 2 and not any(map(is_lora_name, chosen)):
        raise ValueError("stage 2 trains LoRA adapters, but the model has none: add_lora() or load_trained() first")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    check_trainable(model, chosen)
    return chosen


def check_trainable(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    """Assert that exactly ``chosen`` trains, in fp32, and that it is projector and adapters only."""
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == set(chosen), f"trainable but not chosen, or the reverse: {sorted(training ^ set(chosen))[:5]}"
    foreign = [name for name in chosen if not _belongs(name, 2)]
    assert not foreign, f"frozen towers would train: {foreign[:5]}"
    halves = [name for name, parameter in chosen.items() if parameter.dtype != torch.float32]
    assert not halves, f"trained weights must be fp32: {halves[:5]}"


def describe(model: nn.Module) -> str:
    """A table: parameters of each part, how many of them train, and their precision."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(_part(name), []).append(parameter)
    rows = [("part", "parameters", "trainable", "tensors", "dtype")]
    rows += [_row(part, parameters) for part, parameters in parts.items()]
    rows.append(_row("total", model.parameters()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_aligned(row, widths) for row in rows)


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in all the tensors together."""
    return sum(parameter.numel() for parameter in parameters)


def _belongs(name: str, stage: int) -> bool:
    return name.startswith(_PROJECTOR) or (stage == 2 and is_lora_name(name))


def _part(name: str) -> str:
    if is_lora_name(name):
        return "LoRA adapters"
    parts = {
        "model.audio_tower.": "audio tower",
        "model.visual.": "vision tower",
        _PROJECTOR: "projector",
        "lm_head.": "LM head",
    }
    return next((part for prefix, part in parts.items() if name.startswith(prefix)), "language model")


def _row(part: str, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
    parameters = list(parameters)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return part, f"{count(parameters):,}", f"{count(trained):,}", str(len(trained)), " ".join(dtypes)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    first, *numbers, last = row
    cells = [first.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:-1], strict=True)), last]
    return "  ".join(cells).rstrip()
