"""Muon, batched over equal shapes and in float32: torch.optim.Muon works in bfloat16, 3× slower on CPUs without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration p(s) = a s + b s³ + c s⁵, which drives singular values towards 1."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W ← (1 - lr·decay) W - lr · sqrt(max(1, m/n)) · orth(momentum).

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).

    Args:
        params: matrices or stacks [..., m, n] of them only, or groups of such.
        lr: learning rate of the orthogonalised update.
        momentum: of the Nesterov momentum.
        weight_decay: decoupled.
        steps: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        del closure
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (*_, rows, columns), parameters in by_shape.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                updates = orthogonalise(updates, group["steps"])
                scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=scale)

    def _nesterov(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values end in about 0.7 to 1.2.

    Args:
        matrices: float32 [..., m, n].
        steps: Newton-Schulz iterations.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
