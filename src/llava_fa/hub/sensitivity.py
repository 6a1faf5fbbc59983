"""How sensitive a model is to the errors of each of its layers, measured on a few calibration samples.

Two passes over the samples, both with the original weights. In the first, gradients say how much the answers'
distribution minds an error of every layer's every output (the diagonal of its Fisher information). In the second,
block by block as in `calibrated`, second moments say how large the error per unit of the codes' distortion will be.

Memory: the model, the activations of one sample for its backward pass (no gradients of weights), and what one block of
calibrated compression takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub import blocks
from llava_fa.hub.calibrated import gather
from llava_fa.hub.plan import PlannedLayer
from llava_fa.solver.sensitivity import error_powers

SAMPLES = 32
"""Calibration samples used, evenly spaced among all."""
_PROBES = 2
"""Random directions a sample in which the Fisher information is looked at."""

Tell = Callable[[str], None]


def chosen(count: int) -> list[int]:
    """Indices of the samples used."""
    used = min(count, SAMPLES)
    return [index * count // used for index in range(used)]


def fisher(
    model: nn.Module, names: Sequence[str], inputs: blocks.Inputs, answers: Sequence[int], seed: int = 0
) -> dict[str, Tensor]:
    """G of every layer: E[Σ_tokens (∂ log p / ∂ y_i)²] per answer token, float64 [m].

    With logits z and p = softmax(z), the expectation over answers that the model itself would give is the mean square
    of the gradient of vᵀz, where v = √p ⊙ ε - p (√p · ε), ε ~ N(0, 1), since E[v vᵀ] = diag(p) - p pᵀ. That is the
    Fisher information without drawing an answer, and less noisy.

    Args:
        model: loaded, in evaluation mode.
        names: layers; one that a gradient never reaches is left out of the result.
        inputs: prepared samples, each a batch of one.
        answers: of every sample the position of its answer's first token.

    Raises:
        FourierError: the model fails on a sample, or its gradient is not finite.
    """
    found: dict[str, Tensor] = {}
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        for parameter in wanted:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for name in names:

            def see(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
                if not output.requires_grad:  # a copy of the leaf: the model may work in place
                    output = output.detach().requires_grad_().clone()

                def add(gradient: Tensor) -> None:
                    power = gradient.float().reshape(-1, gradient.shape[-1]).square().sum(0, dtype=torch.float64)
                    found[name] = found.get(name, torch.zeros_like(power, device="cpu")) + power.cpu()

                output.register_hook(add)
                return output

            stack.callback(model.get_submodule(name).register_forward_hook(see).remove)
        for index, (sample, start) in enumerate(zip(inputs, answers, strict=True)):
            logits = blocks.forward(model, sample, index).logits[0, start - 1 : -1].float()
            p = logits.detach().softmax(-1)
            for probe in range(_PROBES):
                noise = torch.randn(p.shape, generator=generator).to(p.device) * p.sqrt()
                direction = noise - p * noise.sum(-1, keepdim=True)
                (logits * direction).sum().backward(retain_graph=probe < _PROBES - 1)
            tokens += len(p)
    for name, power in found.items():
        if not bool(power.isfinite().all()):
            raise FourierError("the gradient at its output is not finite", remedy="Check the samples", where=name)
    return {name: power / (_PROBES * tokens) for name, power in found.items()}


@torch.no_grad()
def output_powers(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    configs: Mapping[str, Sequence[FourierConfig]],
    inputs: blocks.Inputs,
    tell: Tell,
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """`error_powers` of every layer under each of its configurations; a layer that no input reaches is left out."""
    powers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    chains, _ = blocks.segments(model, blocks.find_units(model, layers), inputs)
    for segment in chains:
        calls, hidden = blocks.capture(segment, model, inputs)
        for index, unit in enumerate(segment):
            for stage in blocks.stages(unit, calls[index], hidden):
                found = gather(unit, stage, calls[index], hidden)
                for group, statistics in zip(stage, found, strict=True):
                    for layer in group if statistics is not None else ():
                        tell(layer.name)
                        try:
                            weight = layer.weight.read()
                            powers[layer.name] = [
                                error_powers(weight, c, statistics.moment) for c in configs[layer.name]
                            ]
                        except FourierError as error:
                            raise error.at(layer.name) from error
            if index < len(segment) - 1:
                blocks.advance(unit, calls[index], hidden)
            calls[index] = []
    return powers
