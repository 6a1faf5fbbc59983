"""How sensitive a model is to the errors of each of its layers, measured on a few calibration samples.

Two passes over the samples, both with the original weights. In the first, block by block as in `calibrated`, second
moments say how large the error per unit of the codes' distortion will be, and which way it will lie. In the second,
gradients say how much the answers' distribution minds such an error in every layer's every output.

Memory: the model, the activations of one sample for its backward pass (of weights' gradients a sketch of `SKETCH`
columns), and what one block of calibrated compression takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError, located
from llava_fa.hub import blocks
from llava_fa.hub.calibrated import gather
from llava_fa.hub.course import Journey, survey
from llava_fa.hub.plan import PlannedLayer
from llava_fa.hub.weights import Weights
from llava_fa.nn.patches import inputs_of, outputs_of
from llava_fa.solver.sensitivity import error_directions, error_powers

SAMPLES = 32
"""Calibration samples used, evenly spaced among all."""
TEMPERATURE = 3.0
"""By which logits are divided before anything is asked of them. A sure answer has next to no gradient and divergence up
to the error that turns it over; the softened one says how near that is (docs/results.md)."""
SKETCH = 32
"""Columns of the sketch of an error's covariance: a row's information is sure to a quarter, a layer's to a few
percent."""
_PROBES = 2
"""Random directions a sample in which the Fisher information is looked at."""


def fisher(
    model: nn.Module, directions: Mapping[str, Tensor], inputs: blocks.Inputs, answers: Sequence[int], seed: int = 0
) -> dict[str, Tensor]:
    """G of every layer: E[|Pᵀ m_i|²] per answer token, float64 [m], with m_i = Σ_tokens (∂ log p / ∂ y_i) x.

    With logits z and p = softmax(z / `TEMPERATURE`), the expectation over answers that the model itself would give is
    the mean square of the gradient of vᵀz / `TEMPERATURE`, where v = √p ⊙ ε - p (√p · ε), ε ~ N(0, 1), since
    E[v vᵀ] = diag(p) - p pᵀ. That is the Fisher information without drawing an answer, and less noisy.

    Args:
        model: loaded, in evaluation mode.
        directions: P [n, sketch] of every layer (`solver.sensitivity.error_directions`); a layer that a gradient never
            reaches is left out of the result.
        inputs: prepared samples, each a batch of one.
        answers: of every sample the position of its answer's first token.

    Raises:
        FourierError: the model fails on a sample, or its gradient is not finite.
    """
    information: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}  # m Pᵀ [m, sketch] of one sample and probe
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def see(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:  # a copy of the leaf: the model may work in place
            output = output.detach().requires_grad_().clone()
        x = inputs_of(module, args[0].detach()).flatten(0, -2)
        projected = x.float() @ directions[name].to(x.device)

        def add(gradient: Tensor) -> None:
            part = outputs_of(module, gradient.float()).flatten(0, -2).T @ projected
            sums[name] = sums[name] + part if name in sums else part

        output.register_hook(add)
        return output

    with ExitStack() as stack, torch.enable_grad():
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        stack.enter_context(blocks.hooked({name: model.get_submodule(name) for name in directions}, see))
        for index, (sample, start) in enumerate(zip(inputs, answers, strict=True)):
            logits = blocks.forward(model, sample, index).logits[0, start - 1 : -1].float() / TEMPERATURE
            p = logits.detach().softmax(-1)
            for probe in range(_PROBES):
                noise = torch.randn(p.shape, generator=generator).to(p.device) * p.sqrt()
                direction = noise - p * noise.sum(-1, keepdim=True)
                (logits * direction).sum().backward(retain_graph=probe < _PROBES - 1)
                for name, gradient in sums.items():
                    power = gradient.square().sum(1, dtype=torch.float64).cpu()
                    information[name] = information[name] + power if name in information else power
                sums.clear()
            tokens += len(p)
    for name, power in information.items():
        if not bool(power.isfinite().all()):
            raise FourierError("the gradient at its output is not finite", remedy="Check the samples", where=name)
    return {name: power / (_PROBES * tokens) for name, power in information.items()}


@torch.no_grad()
def output_powers(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    configs: Mapping[str, Sequence[FourierConfig]],
    inputs: blocks.Inputs,
    tell: Callable[[str], None],
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], dict[str, Tensor]]:
    """Which errors the outputs of layers will have; a layer that no input reaches is left out.

    Returns:
        Layer → `error_powers` (outside, slope; float64 [m] each) under each of its configurations;
        layer → which way its errors lie, [n, `SKETCH`] (`error_directions` of its first configuration).
    """
    powers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    directions: dict[str, Tensor] = {}
    units = blocks.find_units(model, layers)
    weights = Weights.of(model, [unit.path for unit in units])
    with ExitStack() as stack:
        stack.enter_context(weights.gated())
        course = survey(model, units, inputs)
        journey = Journey(weights, course, inputs, course.groups, originals=False)
        for visit in stack.enter_context(closing(journey.visits())):
            for stage in blocks.stages(visit.unit, visit.calls, visit.hidden):
                groups = gather(visit.unit, stage, visit.calls, visit.hidden)
                for group, statistics in zip(stage, groups, strict=True):
                    for layer in group if statistics is not None else ():
                        tell(layer.name)
                        with located(layer.name):
                            weight = layer.read()
                            of, moment = configs[layer.name], statistics.moment
                            if layer is group[0]:  # the others of the group have the same inputs
                                sketch = error_directions(weight, of[0], moment, SKETCH)
                            directions[layer.name] = sketch
                            powers[layer.name] = [error_powers(weight, config, moment) for config in of]
    return powers, directions
