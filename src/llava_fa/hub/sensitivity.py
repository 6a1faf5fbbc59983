"""How sensitive a model is to the errors of each of its layers, measured on a few calibration samples.

Two passes over the samples, both with the original weights. In the first, block by block as in `calibrated`, second
moments say how large the error per unit of the codes' distortion will be, and which way it will lie. In the second,
gradients say how much the answers' distribution minds such an error in every layer's every output.

Memory: the model, the activations of one sample for its backward pass (of weights' gradients a sketch of `SKETCH`
columns), and what one block of calibrated compression takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub import blocks
from llava_fa.hub.calibrated import gather
from llava_fa.hub.families import is_query_or_key
from llava_fa.hub.plan import PlannedLayer
from llava_fa.solver.attention import whitened_factors
from llava_fa.solver.sensitivity import error_directions, error_powers

SAMPLES = 32
"""Calibration samples used, evenly spaced among all."""
_CHECKED = 6
"""Samples on which factors are tried out."""
TEMPERATURE = 3.0
"""By which logits are divided before anything is asked of them. A sure answer has next to no gradient and divergence up
to the error that turns it over; the softened one says how near that is (docs/results.md)."""
SKETCH = 32
"""Columns of the sketch of an error's covariance: a row's information is sure to a quarter, a layer's to a few
percent."""
_PROBES = 2
"""Random directions a sample in which the Fisher information is looked at."""

Tell = Callable[[str], None]


def chosen(count: int) -> list[int]:
    """Indices of the samples used."""
    used = min(count, SAMPLES)
    return [index * count // used for index in range(used)]


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
    found: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}  # m Pᵀ [m, sketch] of one sample and probe
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        for parameter in wanted:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for name, sketch in directions.items():

            def see(_: nn.Module, given: Any, output: Tensor, name: str = name, sketch: Tensor = sketch) -> Tensor:
                if not output.requires_grad:  # a copy of the leaf: the model may work in place
                    output = output.detach().requires_grad_().clone()
                x = given[0].detach().reshape(-1, given[0].shape[-1])
                projected = x.float() @ sketch.to(x.device)

                def add(gradient: Tensor) -> None:
                    part = gradient.float().reshape(-1, gradient.shape[-1]).T @ projected
                    sums[name] = sums[name] + part if name in sums else part

                output.register_hook(add)
                return output

            stack.callback(model.get_submodule(name).register_forward_hook(see).remove)
        for index, (sample, start) in enumerate(zip(inputs, answers, strict=True)):
            logits = blocks.forward(model, sample, index).logits[0, start - 1 : -1].float() / TEMPERATURE
            p = logits.detach().softmax(-1)
            for probe in range(_PROBES):
                noise = torch.randn(p.shape, generator=generator).to(p.device) * p.sqrt()
                direction = noise - p * noise.sum(-1, keepdim=True)
                (logits * direction).sum().backward(retain_graph=probe < _PROBES - 1)
                for name, gradient in sums.items():
                    power = gradient.square().sum(1, dtype=torch.float64).cpu()
                    found[name] = found[name] + power if name in found else power
                sums.clear()
            tokens += len(p)
    for name, power in found.items():
        if not bool(power.isfinite().all()):
            raise FourierError("the gradient at its output is not finite", remedy="Check the samples", where=name)
    return {name: power / (_PROBES * tokens) for name, power in found.items()}


@dataclasses.dataclass(frozen=True)
class Powers:
    """What one configuration of a layer is expected to do.

    Attributes:
        outside, slope: `error_powers`, float64 [m] each.
        directions: which way its errors lie, [n, `SKETCH`] (`error_directions`).
        truncated: of two factors, the divergence that was measured with them, not quantised, in the layer's place: a
            projection's share of what query and key projection of one attention did together.
    """

    outside: Tensor
    slope: Tensor
    directions: Tensor
    truncated: float | None = None


class Reference:
    """The answers' distributions of a model as it is, from which those of an altered one diverge.

    Args:
        model, inputs, answers: as for `fisher`; at most `_CHECKED` samples are used.
    """

    def __init__(self, model: nn.Module, inputs: blocks.Inputs, answers: Sequence[int]) -> None:
        used = min(len(inputs), _CHECKED)
        self.model = model
        self.samples = [(inputs[i], answers[i], i) for i in (k * len(inputs) // used for k in range(used))]
        self.original = self._logs()

    @torch.no_grad()
    def _logs(self) -> list[Tensor]:
        found = []
        for sample, start, index in self.samples:
            logits = blocks.forward(self.model, sample, index).logits[0, start - 1 : -1]
            found.append((logits.float() / TEMPERATURE).log_softmax(-1))
        return found

    def divergence(self) -> float:
        """KL(as it was ‖ as it is now) in nats per answer token; infinite where that is no number."""
        pairs = list(zip(self.original, self._logs(), strict=True))
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / sum(len(p) for p, _ in pairs)
        return total if math.isfinite(total) else math.inf

    @torch.no_grad()
    def divergence_with(self, weights: Mapping[str, Tensor]) -> float:
        """The same with other weights in some layers."""
        places = {name: self.model.get_submodule(name).weight for name in weights}
        before = {name: place.detach().clone() for name, place in places.items()}
        try:
            for name, place in places.items():
                place.copy_(weights[name])
            return self.divergence()
        finally:
            for name, place in places.items():
                place.copy_(before[name])


@torch.no_grad()
def output_powers(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    configs: Mapping[str, Sequence[FourierConfig]],
    inputs: blocks.Inputs,
    tell: Tell,
    reference: Reference | None = None,
) -> dict[str, list[Powers]]:
    """`Powers` of every layer under each of its configurations; a layer that no input reaches is left out.

    With a ``reference`` factors of query and key projections are tried out in the model, too: an attention whose
    softmax has saturated minds no small error, so that its sensitivity is next to nothing, and breaks on a cut
    (docs/results.md). Query and key are tried out together, since either alone may break nothing.
    """
    powers: dict[str, list[Powers]] = {}
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
                            of, moment = configs[layer.name], statistics.moment
                            if layer is group[0]:  # the others of the group have the same inputs
                                sketch = error_directions(weight, of[0], moment, SKETCH)
                            powers[layer.name] = [Powers(*error_powers(weight, c, moment), sketch) for c in of]
                        except FourierError as error:
                            raise error.at(layer.name) from error
                    if reference is not None and statistics is not None and bool(statistics.moment.any()):
                        powers |= _tried_out(group, configs, statistics.moment, reference, powers)
            if index < len(segment) - 1:
                blocks.advance(unit, calls[index], hidden)
            calls[index] = []
    return powers


def _tried_out(
    group: Sequence[PlannedLayer],
    configs: Mapping[str, Sequence[FourierConfig]],
    moment: Tensor,
    reference: Reference,
    powers: Mapping[str, list[Powers]],
) -> dict[str, list[Powers]]:
    """The powers of query and key projections, with what their factors did to the answers."""
    found = {layer.name: list(powers[layer.name]) for layer in group if is_query_or_key(layer.name)}
    attentions: dict[str, list[PlannedLayer]] = {}
    for layer in group:
        if is_query_or_key(layer.name):
            attentions.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    for pair in attentions.values():
        weights = {layer.name: layer.weight.read().to(torch.float32) for layer in pair}
        for index in range(max(len(configs[name]) for name in weights)):
            of = {name: configs[name][min(index, len(configs[name]) - 1)] for name in weights}
            if not of[pair[0].name].inner_rank:
                continue
            cut = {name: _cut(weight, of[name], moment) for name, weight in weights.items()}
            truncated = reference.divergence_with(cut) / len(cut)
            for name in weights:
                if index < len(configs[name]):
                    found[name][index] = dataclasses.replace(found[name][index], truncated=truncated)
    return found


def _cut(weight: Tensor, config: FourierConfig, moment: Tensor) -> Tensor:
    left, right = whitened_factors(weight, config.inner_rank, moment, damping=config.damping, seed=config.seed)
    return left @ right
