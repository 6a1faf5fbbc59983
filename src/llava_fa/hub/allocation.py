"""One budget for a model: every layer's options, what each is predicted to cost, and the plan that comes of it.

The outcome is kept in the work folder before the first layer is compressed (`allocation.json`), so that a killed run
goes on with the very same plan whatever the arithmetic of another machine or thread count would have made of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from llava_fa.config import MIN_BITS, Budget, Casp, Codes, FourierConfig, format_size
from llava_fa.errors import FourierError, located
from llava_fa.hub import model_sensitivity
from llava_fa.hub.checkpoint import is_codebook
from llava_fa.hub.families import is_query_or_key, is_vision
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.streaming import SHARD_BYTES, norm_moment
from llava_fa.hub.work_folder import WorkFolder
from llava_fa.kernels.layout import layout_of
from llava_fa.nn.codebooks import codebook_key
from llava_fa.solver.attention import inner_rank
from llava_fa.solver.budget import Option, allocate, smallest
from llava_fa.solver.sensitivity import blind_sensitivity, distortion, error_powers, sensitivity

FILE = "allocation.json"
_FILE_BYTES, _TENSOR_BYTES = 200, 85
"""Bytes of a weight file's header, at most: for the file, and for each tensor beyond its name."""

NATS, BLIND = "nats of KL divergence per answer token, softened", "relative, without data"
"""Units of a predicted loss."""


class Prediction(NamedTuple):
    """Of a layer's loss as one of its `variants`: what no codes can mend, and what a unit of their distortion adds."""

    variant: FourierConfig
    fixed: float
    slope: float

    def loss(self, distortion: float) -> float:
        """With codes of this distortion: what second order says, and beyond `KNEE` what models do."""
        return self.fixed + self.slope * distortion * max(1.0, math.sqrt(distortion / KNEE))


KNEE = 0.02
"""Distortion (about that of 3 bits) above which losses grow as its power of 1.5: so the embedded model's measured
KL is met within a fifth at every width from 1.5 to 4 bits and with either kind of codes (docs/results.md)."""

MARGIN = 0.25
"""What a predicted loss must save to be believed: two allocations that are predicted alike differ by a fifth in KL
when they are measured, and trellis codes at 3 bits, predicted to gain 24 %, lost as much (docs/results.md)."""


def check_casp(plan: Plan) -> None:
    """Raise `FourierError` where there is nothing that CASP could factor."""
    if not any(is_query_or_key(layer.name) for layer in plan.layers):
        raise FourierError(
            "none of the layers to compress is a query or key projection (q_proj, k_proj)",
            remedy="Leave casp out, or skip fewer layers",
        )


def same_bytes(plan: Plan) -> Budget:
    """The budget that spends what the layers would take as planned: CASP against no CASP at equal stored bits."""
    parts = [part for layer in plan.layers for part in layer.layout.parts().values()]
    books = {part.codebook: 4 * part.points for part in parts}
    own = sum(layer.packed_bytes for layer in plan.layers) - sum(4 * part.points for part in parts)
    # half a byte more: bits are turned back into whole bytes
    return Budget(bits=8 * (own + sum(books.values()) + 0.5) / sum(layer.numel for layer in plan.layers))


def variants(layer: PlannedLayer, config: FourierConfig, casp: Casp | None) -> list[FourierConfig]:
    """What a layer may become but for bits and codes: with low rank and without, or as two factors."""
    if casp is not None and is_query_or_key(layer.name) and not is_vision(layer.name):
        return [config.replace(bits=MIN_BITS, rank=0, inner_rank=inner_rank(layer.shape, casp.keep))]
    return [config.replace(bits=MIN_BITS, rank=rank) for rank in ((0, config.rank) if config.rank else (0,))]


def widths(config: FourierConfig) -> tuple[float, ...]:
    """Bits a layer may be given: half steps up to the configured bits."""
    return tuple(half / 2 for half in range(round(2 * MIN_BITS), config.code_bits + 1))


def kinds(config: FourierConfig, inputs: int) -> tuple[Codes, ...]:
    """Codes a layer may be given: the configured ones; ``auto`` offers both where a trellis can pay."""
    best = config.codes_for(inputs)
    return ("rings", best) if config.codes == "auto" and best != "rings" else (best,)


def options(
    layer: PlannedLayer, config: FourierConfig, predictions: Sequence[Prediction], *, feedback: bool
) -> list[Option]:
    """What the layer may become: its variants, each with all bits and codes."""
    choices = []
    for prediction, bits in itertools.product(predictions, widths(config)):
        inputs = prediction.variant.inner_rank or layer.shape[1]  # both factors have the same codebook
        for codes in kinds(config, inputs):
            option = prediction.variant.replace(bits=bits, codes=codes)
            layout = layout_of(option, *layer.shape)
            sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.tensors().items()}
            books = [size for name, size in sizes.items() if is_codebook(name)]
            loss = prediction.loss(distortion(option.code_bits, codes, feedback=feedback))
            shared = next(iter(layout.parts().values())).codebook
            choices.append(Option(option, sum(sizes.values()) - sum(books), loss, shared, books[0]))
    return choices


def measure(
    plan: Plan,
    config: FourierConfig,
    model: nn.Module,
    inputs: Sequence[Mapping[str, Any]],
    answers: Sequence[int],
    tell: Callable[[str], None],
    casp: Casp | None = None,
) -> dict[str, list[Prediction]]:
    """Sensitivities from samples, in nats of KL divergence per softened answer token; 0 where none depends on it."""
    tell("")
    configs = {layer.name: variants(layer, config, casp) for layer in plan.layers}
    powers, directions = model_sensitivity.output_powers(model, plan.layers, configs, inputs, tell)
    tell("")
    information = model_sensitivity.fisher(model, directions, inputs, answers)
    predictions = {name: [Prediction(variant, 0.0, 0.0) for variant in of] for name, of in configs.items()}
    for name, g in information.items():
        predictions[name] = [
            Prediction(variant, *(sensitivity(power, g) for power in of))
            for variant, of in zip(configs[name], powers[name], strict=True)
        ]
    return predictions


def estimate(
    plan: Plan, config: FourierConfig, tell: Callable[[str], None], casp: Casp | None = None
) -> dict[str, list[Prediction]]:
    """Sensitivities without data (`blind_sensitivity`), times the share of tokens that come to a layer; reads every
    weight once."""
    predictions: dict[str, list[Prediction]] = {layer.name: [] for layer in plan.layers}
    for layer in plan.layers:
        tell(layer.name)
        with located(layer.name):
            moment = None if config.calibration == "none" else norm_moment(layer, plan)
            weight = layer.read()
            for variant in variants(layer, config, casp):
                powers = error_powers(weight, variant, moment)
                losses = [layer.share * blind_sensitivity(weight, power, moment) for power in powers]
                predictions[layer.name].append(Prediction(variant, *losses))
    return predictions


def spend(
    plan: Plan,
    config: FourierConfig,
    budget: Budget,
    predictions: Mapping[str, Sequence[Prediction]],
    unit: str,
    casp: Casp | None = None,
) -> Plan:
    """The plan of least predicted loss within the budget.

    Args:
        predictions: layer → prediction for each of `variants`.
        unit: of the predicted loss: `NATS` where sensitivities are from data, else `BLIND`.

    Raises:
        FourierError: the budget is less than the model takes with the fewest bits everywhere.
    """
    feedback = unit == NATS and config.calibration in ("auto", "feedback")
    layers = [options(layer, config, predictions[layer.name], feedback=feedback) for layer in plan.layers]
    allowed = layer_bytes(plan, budget, casp)
    least = smallest(layers)
    if least > allowed:
        raise FourierError(_too_small(plan, budget, casp, least), remedy="Give more, or skip fewer layers")
    margin = MARGIN if casp is None else 0.0
    allocation = allocate(layers, allowed, margin=margin)
    steady = layers
    if unit == NATS:
        bits = 8 * allowed / sum(layer.numel for layer in plan.layers)
        steady = [_steady(layer, row, bits) for layer, row in zip(plan.layers, layers, strict=True)]
    if smallest(steady) <= allowed and (safer := allocate(steady, allowed, margin=margin)).loss <= allocation.uniform:
        allocation = dataclasses.replace(safer, uniform=allocation.uniform)
        layers = steady
    assigned = []
    for layer, row, k in zip(plan.layers, layers, allocation.choice, strict=True):
        best, of = row[k].config, predictions[layer.name]
        slopes = {(one.variant.rank, one.variant.inner_rank): one.slope for one in of}
        assigned.append(_with(layer, best, slopes[best.rank, best.inner_rank], row[k].loss))
    uniform = None if math.isinf(allocation.uniform) else allocation.uniform
    summary = {**budget.to_dict(), "unit": unit, "predicted_loss": allocation.loss, "uniform_loss": uniform}
    if casp is not None:
        summary["casp"] = casp.to_dict()
    return dataclasses.replace(plan, layers=tuple(assigned), budget=summary)


def _steady(layer: PlannedLayer, row: list[Option], bits: float) -> list[Option]:
    """Options of a layer without those that may break its attention, for a budget of ``bits`` a weight.

    A saturated softmax has next to no gradient, so that to second order its queries and keys mind nothing and would
    get the fewest bits there are; but it breaks when their errors reach the score of another token (docs/results.md:
    4e-5 nats predicted, 0.29 measured). They keep the bits that the budget would buy for all, to the half step below,
    unless no answer depends on them.
    """
    if not is_query_or_key(layer.name) or not any(option.loss for option in row):
        return row
    least = min(math.floor(2 * bits) / 2, max(option.config.bits for option in row))
    return [option for option in row if option.config.inner_rank or option.config.bits >= least]


def layer_bytes(plan: Plan, budget: Budget, casp: Casp | None = None) -> int:
    """Bytes that the budget leaves for the tensors of the compressed layers, codebooks included."""
    if budget.bits is not None:
        return int(budget.bits * sum(layer.numel for layer in plan.layers) / 8)
    return budget.size - _others(plan, casp)  # type: ignore[operator]  # one of the two is given


def _others(plan: Plan, casp: Casp | None) -> int:
    """Bytes of all that is not compressed, and of the headers of the weight files."""
    names = list(plan.kept)
    names += [f"{layer.name}.{key}" for layer in plan.all_layers for key in layer.layout.tensors() if key != "codebook"]
    if casp is not None:  # two factors have twice the tensors
        names += [f"{layer.name}.right.input_scale" for layer in plan.layers if is_query_or_key(layer.name)] * 8
    names += [codebook_key("trellis_8_12")] * 2 * len(widths(plan.layers[0].config))  # as many as there can be
    headers = sum(_TENSOR_BYTES + len(name) for name in names)
    files = 1 + plan.source.nbytes // (SHARD_BYTES // 2)
    return plan.kept_bytes + sum(layer.packed_bytes for layer in plan.embeddings) + headers + files * _FILE_BYTES


def _too_small(plan: Plan, budget: Budget, casp: Casp | None, least: int) -> str:
    if budget.bits is not None:
        need = 8 * least / sum(layer.numel for layer in plan.layers)
        return f"the budget is {budget.bits:g} bits per weight, and {need:.3f} is the least that these layers take"
    size = format_size(budget.size or 0)
    return f"the budget is {size}, and {format_size(least + _others(plan, casp))} is the least that this model takes"


def _with(layer: PlannedLayer, config: FourierConfig, sensitivity: float, loss: float) -> PlannedLayer:
    layout = layout_of(config, *layer.shape)
    return dataclasses.replace(layer, config=config, layout=layout, sensitivity=sensitivity, predicted_loss=loss)


def save(plan: Plan, work: WorkFolder) -> None:
    """Keep an allocation in the work folder."""
    layers = {layer.name: [layer.config.to_dict(), layer.sensitivity, layer.predicted_loss] for layer in plan.layers}
    work.write_json(FILE, {"budget": plan.budget, "layers": layers})


def load(plan: Plan, work: WorkFolder) -> Plan | None:
    """The plan with the allocation that the work folder holds; None where it has none yet."""
    allocation = work.read_json(FILE)
    return None if allocation is None else apply(plan, allocation)


def apply(plan: Plan, allocation: Mapping[str, Any]) -> Plan:
    """The plan with an allocation that `save` has kept."""
    layers = []
    for layer in plan.layers:
        values, sensitivity, loss = allocation["layers"][layer.name]
        layers.append(_with(layer, FourierConfig.from_dict(values), sensitivity, loss))
    return dataclasses.replace(plan, layers=tuple(layers), budget=allocation["budget"])
