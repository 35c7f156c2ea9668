"""LoRA on the language model and on nothing else: checked before anything is wrapped.

Adapters are injected in place, so the model keeps its class, its ``generate()`` and its module names; files are in
PEFT's format and load into stock Qwen2-VL.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from graft.differences import there_and_here

DEFAULT_TARGETS = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
ADAPTER = "default"  # PEFT's name for the only adapter; it stands in parameter names
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_LANGUAGE_MODEL = re.compile(r"model\.(language_model\.)?layers\.\d+\..+")  # transformers 5 and 4


class FusedLinear(Linear):
    """PEFT's adapted layer; in training without dropout, with nothing between the matrix products."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        base, a, b = self.get_base_layer(), self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else a.dtype
        drops = self.training and not isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        trains = torch.is_grad_enabled() and not (drops or self.disable_adapters or self.merged)
        if not trains or not (autocast or x.dtype == dtype):
            return super().forward(x, *args, **kwargs)
        bias = None if base.bias is None else base.bias.to(dtype)
        x, weight, a, b = (tensor.to(dtype) for tensor in (x, base.weight, a, b))
        return _Adapted.apply(x, weight, bias, a, b, self.scaling[ADAPTER])


class _Adapted(torch.autograd.Function):
    """W x + bias + scaling B A x of a frozen W: B A x is added within the product that makes it, its gradient likewise.

    Products with r rows, not r columns: on a CPU they take a half to a quarter of the time.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = (a @ x.flatten(0, -2).t()).mul_(scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        y = F.linear(x, weight, bias)
        y.flatten(0, -2).addmm_(low.t(), b.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_low = (b.t() @ grad.t()).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(grad_low.t(), a).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low @ x.flatten(0, -2), (low @ grad).t(), None


class LoraSettings(Protocol):
    """What :class:`graft.recipe.Lora` offers."""

    r: int
    alpha: int
    dropout: float
    target_modules: str


def check_targets(model: nn.Module, target_modules: str) -> list[str]:
    """Names of the linear layers that ``target_modules`` matches in full; every one is the language model's.

    Raises:
        ValueError: if it is not one valid regular expression, if nothing matches, or if anything outside the
            language model's layers does: those names, and the hits of each tower.
    """
    matches = _matches(model, _compiled(target_modules))
    if not matches:
        raise ValueError(
            f"lora.target_modules {target_modules!r} matches no module. It must match a name in full, such as "
            f"'{_example(model)}'; the default is {DEFAULT_TARGETS!r}"
        )
    modules = dict(model.named_modules())
    outside = [name for name in matches if not _LANGUAGE_MODEL.fullmatch(name)]
    if outside:
        raise ValueError(
            f"lora.target_modules {target_modules!r} matches {len(outside)} modules outside the language model "
            f"({hits_per_tower(matches)}): {', '.join(outside[:4])}{', ...' if len(outside) > 4 else ''}. The encoder "
            f"and the vision tower must stay as they are; the default is {DEFAULT_TARGETS!r}"
        )
    not_linear = [name for name in matches if not isinstance(modules[name], nn.Linear)]
    if not_linear:
        raise ValueError(f"lora.target_modules matches modules that are not linear layers: {', '.join(not_linear[:4])}")
    return matches


def hits_per_tower(names: list[str]) -> str:
    """``language model 196, audio tower 96``: how many of the module names belong to each part of the graft."""
    return ", ".join(f"{tower} {count}" for tower, count in Counter(map(_tower, names)).items())


def add_lora(model: nn.Module, settings: LoraSettings, seed: int = 0) -> list[str]:
    """Inject fresh fp32 adapters into the language model, in place; the names of the adapted layers.

    ``seed`` alone decides their values, so that every rank makes the same ones; at first they add nothing (B is 0).

    Raises:
        ValueError: as :func:`check_targets`.
    """
    names = check_targets(model, settings.target_modules)
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=settings.target_modules
    )
    _inject(model, config)
    _initialise(model, seed)
    return names


def has_lora(model: nn.Module) -> bool:
    """Whether the model carries adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def check_settings(model: nn.Module, settings: LoraSettings, source: str) -> None:
    """Refuse adapters, read from ``source``, that are not as ``settings`` has them: what is written would not be run.

    Raises:
        ValueError: with what differs.
    """
    config = model.peft_config[ADAPTER]
    there = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    there["target_modules"] = config.target_modules
    here = {name: getattr(settings, name) for name in there}
    told = there_and_here({"lora": there}, {"lora": here})
    if told:
        raise ValueError(f"{source} has adapters that are not the recipe's: {'; '.join(told)}")


def enable_lora(model: nn.Module, enabled: bool) -> None:
    """Switch the adapters on or off; off, the language model is the base again, bit for bit."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters into the weights and remove them, in place: the model is a plain one afterwards."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters as ``adapter_config.json`` and ``adapter_model.safetensors``, PEFT's format."""
    assert has_lora(model), "save_adapter() on a model without adapters"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if is_lora_name(name)
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(folder)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read adapters written by :func:`save_adapter` or by PEFT; injects them if the model has none yet.

    Raises:
        ValueError: if the files do not fit the model, name by name.
    """
    config = LoraConfig.from_pretrained(str(folder))
    if not has_lora(model):
        check_targets(model, config.target_modules)
        _inject(model, config)
    parameters = {name: p for name, p in model.named_parameters() if is_lora_name(name)}
    tensors = {
        re.sub(r"\.(lora_[AB])\.", rf".\1.{ADAPTER}.", name.removeprefix(_PEFT_PREFIX)): tensor
        for name, tensor in load_file(Path(folder) / WEIGHTS_FILE).items()
    }
    copy_into(parameters, tensors, f"adapter {folder}")


def is_lora_name(name: str) -> bool:
    """Whether a parameter name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy ``tensors`` into ``parameters``; both must have the same names and shapes.

    Raises:
        ValueError: otherwise, with the first names or shapes that differ.
    """
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        raise ValueError(
            f"{source} does not fit the model: it lacks {len(missing)} tensors {missing[:3]} and has {len(extra)} "
            f"that the model has not {extra[:3]}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{source}: {name} is {tuple(tensors[name].shape)}, the model's is {tuple(parameter.shape)}: "
                "projector, lora.r or base differ from those it was trained with"
            )
        parameter.copy_(tensors[name])


def _inject(model: nn.Module, config: LoraConfig) -> None:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if is_lora_name(name):
            parameter.data = parameter.data.float()
        else:  # PEFT freezes everything it does not own; who trains is trainable.py's business
            parameter.requires_grad_(name in trainable)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._cast_input_dtype = _cast_unless_autocast
            module.__class__ = FusedLinear


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    """PEFT's own distributions, from our generator: its draws come from the global one, on whatever device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.zero_()
        elif ".lora_A." in name and not parameter.is_meta:
            uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(uniform / math.sqrt(parameter.shape[1]))


def _cast_unless_autocast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """PEFT casts a layer's input to the adapter's fp32, even where autocast undoes it at once.

    Each layer would then keep a copy of its own for the backward pass, though q, k and v share one input.
    """
    if x is None or x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def _compiled(target_modules: str) -> re.Pattern[str]:
    if not isinstance(target_modules, str):
        raise ValueError(
            f"lora.target_modules must be one regular expression, not {target_modules!r}: a list of layer names "
            f"matches those names in every tower, Whisper's too. The default is {DEFAULT_TARGETS!r}"
        )
    try:
        return re.compile(target_modules)
    except re.error as error:
        raise ValueError(f"lora.target_modules {target_modules!r} is not a regular expression: {error}") from error


def _matches(model: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    return [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]


def _tower(name: str) -> str:
    for part, tower in (("audio_tower", "audio tower"), ("visual", "vision tower"), ("projector", "projector")):
        if part in name:
            return tower
    return "language model" if _LANGUAGE_MODEL.fullmatch(name) else "rest"


def _example(model: nn.Module) -> str:
    names = (name for name, _ in model.named_modules())
    return next((name for name in names if re.search(r"layers\.0\..*q_proj$", name) and "audio" not in name), "?")
