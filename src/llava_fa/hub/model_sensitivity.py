"""How sensitive a model is to the errors of each of its layers, measured on a few calibration samples.

Two passes over the samples, both with the original weights. In the first, block by block as in `calibrated`, second
moments say how large the error per unit of the codes' distortion will be, and which way it will lie. In the second,
gradients say how much the answers' distribution minds such an error in every layer's every output.

Memory: the model, or of one that is streamed a part; what every part was called with by every sample, which waits on
the disk where there is no room for it; the activations of one part and sample (of weights' gradients a sketch of
`SKETCH` columns); and what one block of calibrated compression takes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError, located
from llava_fa.hub import blocks
from llava_fa.hub.calibrated import gather
from llava_fa.hub.course import Journey, survey
from llava_fa.hub.lockstep import Arrival, Walk, current
from llava_fa.hub.plan import PlannedLayer
from llava_fa.hub.recompute import run_part
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
    weights = Weights.of(model, list(directions))
    sums = _Sums(weights, directions)
    generator = torch.Generator().manual_seed(seed)

    def travel(index: int) -> int:
        traveller = current()
        assert traveller is not None
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):  # backwards in this thread, too
            logits = blocks.answer_logits(model, inputs, answers, index).float() / TEMPERATURE
            p = logits.detach().softmax(-1)
            states = []
            for _ in range(_PROBES):  # drawn in the order of samples, and again when it is their turn
                states.append(generator.get_state())
                torch.randn(p.shape, generator=generator)
            for probe, state in enumerate(states):
                traveller.phase = probe + 1
                noise = torch.randn(p.shape, generator=torch.Generator().set_state(state)).to(p.device) * p.sqrt()
                direction = noise - p * noise.sum(-1, keepdim=True)
                (logits * direction).sum().backward(retain_graph=probe < _PROBES - 1)
                sums.close(index, traveller.phase, directions)
        return len(p)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        stack.enter_context(weights.gated())
        stack.enter_context(weights.watching(sums.inside))
        stack.enter_context(blocks.hooked({name: model.get_submodule(name) for name in directions}, sums.see))
        walk = stack.enter_context(Walk(weights.rank, weights.shelf))
        travellers = [walk.start(index, functools.partial(travel, index)) for index in range(len(inputs))]
        while (front := walk.front()) is not None:
            path, arrivals = front
            with weights.entered(path):
                for arrival in arrivals:
                    sums.at = arrival.label
                    walk.answer(arrival, functools.partial(run_part, arrival, weights.forward(path)))
                    if arrival.back is not None:
                        sums.take(arrival)
        tokens = sum(traveller.result for traveller in travellers)
    return sums.information(tokens)


class _Sums:
    """m Pᵀ [m, sketch] of every layer, sample and probe while a part is run backwards; of finished ones the squares.

    Args:
        weights: of the model.
        directions: P of every layer.
    """

    def __init__(self, weights: Weights, directions: Mapping[str, Tensor]) -> None:
        self.directions, self.at = directions, 0
        self.inside = {
            path: [name for name in directions if f"{name}.".startswith(f"{path}.")] for path in weights.parts
        }
        self._open: dict[tuple[int, str], Tensor] = {}
        self._done: list[dict[str, Tensor]] = [{} for _ in range(_PROBES)]
        self._times: Counter[tuple[int, int, str]] = Counter()

    def see(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """The hook behind a layer: its inputs now, the gradient of its output when that comes."""
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # a copy of the leaf: the model may work in place
            output = output.detach().requires_grad_().clone()
        x = inputs_of(module, args[0].detach()).flatten(0, -2)
        projected = x.float() @ self.directions[name].to(x.device)

        def add(gradient: Tensor) -> None:
            traveller = current()  # itself where the part ran in its own thread
            key = (self.at if traveller is None else traveller.label, name)
            part = outputs_of(module, gradient.float()).flatten(0, -2).T @ projected
            self._open[key] = self._open[key] + part if key in self._open else part

        output.register_hook(add)
        return output

    def take(self, arrival: Arrival) -> None:
        """Square what a sample has added up, when it has come back to a part as often as it has run it."""
        key = (arrival.label, arrival.phase, arrival.path)
        self._times[key] += 1
        if self._times[key] < arrival.traveller.visits.count(arrival.path):
            return
        self.close(arrival.label, arrival.phase, self.inside[arrival.path])

    def close(self, label: int, phase: int, names: Collection[str]) -> None:
        """Square what a sample has added up for these layers on its way back."""
        done = self._done[phase - 1]
        for name in names:
            gradient = self._open.pop((label, name), None)
            if gradient is not None:
                power = gradient.square().sum(1, dtype=torch.float64).cpu()
                done[name] = done[name] + power if name in done else power

    def information(self, tokens: int) -> dict[str, Tensor]:
        """G of every layer, of so many tokens.

        Raises:
            FourierError: a gradient is not finite.
        """
        total = {name: sum((done[name] for done in self._done[1:]), power) for name, power in self._done[0].items()}
        for name, power in total.items():
            if not bool(power.isfinite().all()):
                raise FourierError("the gradient at its output is not finite", remedy="Check the samples", where=name)
        return {name: power / (_PROBES * tokens) for name, power in total.items()}


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
                            of, moment = configs[layer.name], statistics.moment
                            weight = layer.read().to(moment.device)
                            if layer is group[0]:  # the others of the group have the same inputs
                                sketch = error_directions(weight, of[0], moment, SKETCH)
                            directions[layer.name] = sketch
                            powers[layer.name] = [error_powers(weight, config, moment) for config in of]
    return powers, directions
