"""One budget for a model: every layer's options, what each is predicted to cost, and the plan that comes of it.

The outcome is kept in the work folder before the first layer is compressed (`allocation.json`), so that a killed run
goes on with the very same plan whatever the arithmetic of another machine or thread count would have made of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from llava_fa.config import MIN_BITS, Budget, Codes, FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub import sensitivity as measured
from llava_fa.hub.parts import WorkFolder, disk_errors, gigabytes
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.shards import write_text
from llava_fa.hub.streaming import SHARD_BYTES, norm_moment
from llava_fa.kernels.layout import Layout
from llava_fa.nn.codebooks import codebook_key
from llava_fa.solver.budget import Option, allocate, smallest
from llava_fa.solver.sensitivity import blind_sensitivity, distortion, error_power, sensitivity

FILE = "allocation.json"
_FILE_BYTES, _TENSOR_BYTES = 200, 85
"""Bytes of a weight file's header, at most: for the file, and for each tensor beyond its name."""

NATS, BLIND = "nats of KL divergence per answer token", "relative, without data"
"""Units of a predicted loss."""

Sensitivities = Mapping[str, Sequence[float]]
"""Layer → predicted loss per unit of distortion, for every rank of `ranks`."""


def check(config: FourierConfig) -> None:
    """Raise `FourierError` where a configuration cannot be given a budget."""
    if config.method != "best":
        raise FourierError(
            f"a budget is for method 'best', not {config.method!r}",
            remedy="Leave the budget out and give bits",
        )


def ranks(config: FourierConfig) -> tuple[int, ...]:
    """Ranks a layer may be given: none, and the configured one."""
    return (0, config.rank) if config.rank else (0,)


def widths(config: FourierConfig) -> tuple[float, ...]:
    """Bits a layer may be given: half steps up to the configured bits."""
    return tuple(half / 2 for half in range(round(2 * MIN_BITS), config.code_bits + 1))


def kinds(config: FourierConfig, inputs: int) -> tuple[Codes, ...]:
    """Codes a layer may be given: the configured ones; ``auto`` offers both where a trellis can pay."""
    best = config.codes_for(inputs)
    return ("rings", best) if config.codes == "auto" and best != "rings" else (best,)


def options(
    layer: PlannedLayer, config: FourierConfig, sensitivities: Sequence[float], *, feedback: bool
) -> list[Option]:
    """What the layer may become; ``sensitivities`` has one entry for each of `ranks`."""
    found = []
    for (rank, loss), bits, codes in itertools.product(
        zip(ranks(config), sensitivities, strict=True), widths(config), kinds(config, layer.shape[1])
    ):
        option = config.replace(bits=bits, rank=rank, codes=codes)
        layout = Layout.from_config(option, *layer.shape)
        sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.tensors().items()}
        shared = sizes.pop("codebook")
        predicted = loss * distortion(option.code_bits, codes, feedback=feedback)
        found.append(Option(option, sum(sizes.values()), predicted, layout.codebook, shared))
    return found


def measure(
    plan: Plan,
    config: FourierConfig,
    model: nn.Module,
    inputs: Sequence[Mapping[str, Any]],
    answers: Sequence[int],
    tell: Callable[[str], None],
) -> dict[str, list[float]]:
    """Sensitivities from samples, in nats of KL divergence per answer token; 0 where the answers never depend on it."""
    names = [layer.name for layer in plan.layers]
    tell("")
    minds = measured.fisher(model, names, inputs, answers)
    configs = {name: [config.replace(bits=MIN_BITS, rank=rank) for rank in ranks(config)] for name in names}
    powers = measured.output_powers(model, plan.layers, configs, inputs, tell)
    found = {name: [0.0] * len(ranks(config)) for name in names}
    for name in minds.keys() & powers.keys():
        found[name] = [sensitivity(power, minds[name]) for power in powers[name]]
    return found


def estimate(plan: Plan, config: FourierConfig, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """Sensitivities without data (`blind_sensitivity`); reads every weight once."""
    found = {}
    for layer in plan.layers:
        tell(layer.name)
        try:
            moment = None if config.calibration == "none" else norm_moment(layer, plan)
            weight = layer.weight.read()
            powers = [error_power(weight, config.replace(bits=MIN_BITS, rank=rank), moment) for rank in ranks(config)]
            found[layer.name] = [blind_sensitivity(weight, power, moment) for power in powers]
        except FourierError as error:
            raise error.at(layer.name) from error
    return found


def spend(plan: Plan, config: FourierConfig, budget: Budget, sensitivities: Sensitivities, unit: str) -> Plan:
    """The plan of least predicted loss within the budget.

    Args:
        unit: of the predicted loss: `NATS` where sensitivities are from data, else `BLIND`.

    Raises:
        FourierError: the budget is less than the model takes with the fewest bits everywhere.
    """
    feedback = unit == NATS and config.calibration in ("auto", "feedback")
    layers = [options(layer, config, sensitivities[layer.name], feedback=feedback) for layer in plan.layers]
    allowed = layer_bytes(plan, budget)
    least = smallest(layers)
    if least > allowed:
        raise FourierError(_too_small(plan, budget, least), remedy="Give more, or skip fewer layers")
    found = allocate(layers, allowed)
    chosen = {}
    for layer, row, k in zip(plan.layers, layers, found.choice, strict=True):
        of_rank = dict(zip(ranks(config), sensitivities[layer.name], strict=True))
        chosen[layer.name] = _with(layer, row[k].config, of_rank[row[k].config.rank], row[k].loss)
    uniform = None if math.isinf(found.uniform) else found.uniform
    summary = {**budget.to_dict(), "unit": unit, "predicted_loss": found.loss, "uniform_loss": uniform}
    return plan.assign(chosen, summary)


def layer_bytes(plan: Plan, budget: Budget) -> int:
    """Bytes that the budget leaves for the tensors of the compressed layers, codebooks included."""
    if budget.bits is not None:
        return int(budget.bits * sum(layer.numel for layer in plan.layers) / 8)
    return budget.size - _others(plan)  # type: ignore[operator]  # one of the two is given


def _others(plan: Plan) -> int:
    """Bytes of all that is not compressed, and of the headers of the weight files."""
    dense = {layer.weight.name for layer in plan.layers}
    modules = {key: name for name, key in plan.names.items()}
    names = [modules.get(key, key) for key in plan.source.entries if key not in dense]
    names += [f"{layer.name}.{key}" for layer in plan.layers for key in layer.layout.tensors() if key != "codebook"]
    names += [codebook_key("trellis_8_12")] * 2 * len(widths(plan.layers[0].config))  # as many as there can be
    headers = sum(_TENSOR_BYTES + len(name) for name in names)
    files = 1 + plan.source.nbytes // (SHARD_BYTES // 2)
    return plan.source.nbytes - sum(layer.weight.nbytes for layer in plan.layers) + headers + files * _FILE_BYTES


def _too_small(plan: Plan, budget: Budget, least: int) -> str:
    if budget.bits is not None:
        need = 8 * least / sum(layer.numel for layer in plan.layers)
        return f"the budget is {budget.bits:g} bits per weight, and {need:.3f} is the least that these layers take"
    size = gigabytes(budget.size or 0)
    return f"the budget is {size}, and {gigabytes(least + _others(plan))} is the least that this model takes"


def _with(layer: PlannedLayer, config: FourierConfig, sensitivity: float, loss: float) -> PlannedLayer:
    layout = Layout.from_config(config, *layer.shape)
    return dataclasses.replace(layer, config=config, layout=layout, sensitivity=sensitivity, predicted_loss=loss)


def save(plan: Plan, work: WorkFolder) -> None:
    """Keep an allocation in the work folder."""
    layers = {layer.name: [layer.config.to_dict(), layer.sensitivity, layer.predicted_loss] for layer in plan.layers}
    with disk_errors(work.path):
        write_text(work.path / FILE, json.dumps({"budget": plan.budget, "layers": layers}))


def load(plan: Plan, work: WorkFolder) -> Plan | None:
    """The plan with the allocation that the work folder holds; None where it has none yet."""
    path = work.path / FILE
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    layers = {}
    for layer in plan.layers:
        values, sensitivity, loss = kept["layers"][layer.name]
        layers[layer.name] = _with(layer, FourierConfig.from_dict(values), sensitivity, loss)
    return plan.assign(layers, kept["budget"])
