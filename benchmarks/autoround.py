"""AutoRound (Cheng et al. 2023, arXiv 2309.05516) with its library's own wrapped layers and sign-gradient optimiser.

The library's driver takes language models with text from a hub; here its ``quantize_block`` is followed by hand for
every block of the vision tower, the projector and the language model: the block on the inputs of the rounded blocks
before it against the original's outputs on the original's inputs, batches of 8 samples, 200 steps, rate 1 / steps
falling to 0, the best step kept. Asymmetric, groups of 128, scales in float16, zeros in as many bits as the codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from libraries import library
from stagewise import Rounded, bits_per_weight, units
from torch import Tensor, nn

STEPS, BATCH, GROUP = 200, 8, 128


def autoround(model: nn.Module, names: list[str], inputs: list[Any], bits: int) -> float:
    """Round the model in place; bits per weight stored."""
    wrapper = library("auto_round.wrapper")
    optimiser = library("auto_round.algorithms.quantization.sign_round.sign_sgd")
    found: dict[str, Rounded] = {}
    for unit, calls, hidden, original in units(model, names, inputs):
        with torch.no_grad():
            runs = zip(calls, original.hidden, strict=True)
            targets = [call.run(original.unit.module, x) for call, x in runs]
        inside = [layer.name.removeprefix(unit.path).lstrip(".") for layer in unit.layers]
        with torch.enable_grad():
            wrapped = {name: wrap(unit.module.get_submodule(name), bits, wrapper) for name in inside if name}
            for name, layer in wrapped.items():
                put(unit.module, name, layer)
            best = tune(unit.module, wrapped, calls, hidden, targets, optimiser.SignSGD)
        for name, layer in wrapped.items():
            put(unit.module, name, layer.unwrapper(best[name]))
        for layer in unit.layers:
            weight = model.get_submodule(layer.name).weight
            groups = weight.shape[0] * math.ceil(weight.shape[1] / GROUP)
            found[layer.name] = Rounded(weight, bits * weight.numel() + (16 + bits) * groups)
    return bits_per_weight(model, found)


def wrap(linear: nn.Module, bits: int, wrapper: Any) -> nn.Module:
    settings = {"bits": bits, "group_size": GROUP, "sym": False, "data_type": "int", "scale_dtype": torch.float16}
    for key, value in {**settings, "act_bits": 16, "act_data_type": "float", "act_dynamic": True}.items():
        setattr(linear, key, value)
    return wrapper.WrapperLinear(linear, enable_torch_compile=False, device="cpu")


def put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def tune(
    block: nn.Module, wrapped: dict[str, Any], calls: list, hidden: list[Tensor], targets: list[Tensor], sign_sgd: Any
) -> dict[str, dict[str, Tensor]]:
    """`SignRoundQuantizer.quantize_block` of auto-round 0.16 with its defaults."""
    parameters = [p for layer in wrapped.values() for p in layer.params.values()]
    rate = torch.tensor(1 / STEPS)
    optimiser = sign_sgd([{"params": parameters, "lr": rate}], lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=1.0, end_factor=0.0, total_iters=STEPS)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    least, best = math.inf, {}
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = torch.randperm(len(calls), generator=generator).tolist()
        batch, order = order[:BATCH], order[BATCH:]
        loss = distance(block, [calls[i] for i in batch], [hidden[i] for i in batch], [targets[i] for i in batch])
        if loss.item() < least:
            least = loss.item()
            best = {n: {k: p.detach().clone() for k, p in layer.params.items()} for n, layer in wrapped.items()}
        (1000 * loss).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return best


def distance(block: nn.Module, calls: list, hidden: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean squared error of the block's outputs on samples run as one batch, in the call of the longest.

    Shorter samples are padded at their ends, which is what causal attention does not look at; towers without causal
    attention are given samples of one length.
    """
    lengths = [x.shape[-2] for x in hidden]
    longest = lengths.index(max(lengths))
    padded = [nn.functional.pad(x, (0, 0, 0, max(lengths) - x.shape[-2])) for x in hidden]
    outputs = calls[longest].run(block, torch.cat(padded))
    errors = [(y[:n] - t[0]).square().sum() for y, n, t in zip(outputs, lengths, targets, strict=True)]
    return sum(errors, start=torch.zeros(())) / sum(t.numel() for t in targets)
