"""Muon for the hidden matrices of a small model: momentum, made orthogonal by Newton-Schulz steps.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. ``torch.optim.Muon`` multiplies in
bf16, which is eighty times slower than fp32 on a processor without bf16 instructions; this one multiplies in fp32 and
takes all matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

# Newton-Schulz: X -> aX + (bA + cA^2)X with A = XX^T; the coefficients of the paper, steep at zero.
A, B, C = 3.4445, -4.7750, 2.0315
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters. ``lr`` is the spectral norm of an update of a square matrix."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                directions = torch.stack([self.direction(parameter, group["momentum"]) for parameter in parameters])
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonal(directions), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def direction(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov momentum of the gradient."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices of (N, R, C), roughly: singular values end between 0.7 and 1.2."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        a = x @ x.mT
        x = torch.baddbmm(A * x, torch.baddbmm(B * a, a, a, beta=1, alpha=C), x)
    return x.mT if is_tall else x
