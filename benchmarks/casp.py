"""CASP on X against X, at equal stored bits: X = GPTQ g128, our ring codes, our trellis codes (arXiv 2503.05936).

    .venv/bin/python benchmarks/casp.py [--model tiny] [--out runs/casp] [--bits 2] [--limit 900] [--questions 90]
    .venv/bin/python benchmarks/casp.py --layers     # one attention module at a time: density against divergence
    .venv/bin/python benchmarks/casp.py --factors    # what the factors' codes cost, in and out of the frequency domain

Rows: X with the same bits everywhere; X under one budget of the same bytes; CASP on X in the same bytes: all query and
key projections of the language model as two factors with a share ``keep`` of the numbers, what that saves spent on all
layers by the same budget (so that the second and the third row differ by CASP alone). KL: nats per answer token against
the original on held-out questions; accuracy: the world suite (``--limit 0`` leaves it out). Rows already in
OUT/rows.jsonl are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, compressed, nearness, percent
from peers import gptq, stored_bits
from real_layers import collect
from stagewise import units

from llava_fa import Budget, Casp, FourierConfig, approximate
from llava_fa.eval.divergence import Divergence
from llava_fa.hub import allocation, attention_density, blocks, model_sensitivity
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.calibrated import gather
from llava_fa.hub.calibration_data import answer_start, prepare
from llava_fa.hub.families import is_query_or_key, is_vision
from llava_fa.hub.loading import load
from llava_fa.hub.plan import make_plan
from llava_fa.hub.source import open_source, resolve_model
from llava_fa.maths import dft
from llava_fa.nn.surgery import classify
from llava_fa.solver.attention import inner_product, inner_rank, refit_left, whitened_factors
from llava_fa.solver.budget import Option, allocate
from llava_fa.solver.feedback import damped_root
from llava_fa.world.samples import calibration_samples

GPTQ_BITS = {2: 0.1436, 3: 0.0388, 4: 0.0102}
"""Bits of scalar codes → their relative squared error (round-to-nearest g128, best clipping, docs/results.md)."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/casp"))
    parser.add_argument("--limit", type=int, default=900, help="questions answered; 0 measures the KL alone")
    parser.add_argument("--questions", type=int, default=90, help="questions of the KL")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--layers", action="store_true", help="one attention module at a time")
    parser.add_argument("--factors", action="store_true", help="errors of the factors' codes")
    args = parser.parse_args()
    if args.factors:
        return factors(args)
    (layers if args.layers else models)(args)


def models(args: argparse.Namespace) -> None:
    rows = Rows(args.out / "rows.jsonl")
    samples = calibration_samples(args.samples)
    divergence: Divergence | None = None

    def row(name: str, make: Callable[[], tuple[Any, Any, float]]) -> dict[str, Any] | None:
        nonlocal divergence
        made = rows.find(name=name)
        if made is None:
            if args.only and not any(part in name for part in args.only):
                return None
            divergence = divergence or Divergence(args.model, args.questions)
            model, processor, bits = make()
            made = rows.add({"name": name, "bits": bits, **nearness(model, processor, divergence, args.limit)})
        print(f"| {name} | {made['bits']:.3f} | {made['kl']:.5f} | {percent(made)} |", flush=True)
        return made

    def ours(config: FourierConfig, budget: Budget | None = None, casp: Casp | None = None) -> tuple[Any, Any, float]:
        folder = args.out / f"model-{'-'.join(args.only or [])}"
        model, processor, report = compressed(args.model, folder, config, samples, budget=budget, casp=casp)
        return model, processor, report.bits_per_weight

    print("| model | bits/weight | KL | accuracy |\n|---|---|---|---|")
    for bits in args.bits:
        for codes in ("rings", "trellis"):
            config = FourierConfig(bits=bits, codes=codes)
            most = config.replace(bits=4.0)
            uniform = row(f"{codes}, {bits:g} everywhere", lambda c=config: ours(c))
            if uniform is None:
                continue
            same = Budget(bits=uniform["bits"] + 1e-6)
            row(f"{codes}, budget of {bits:g}", lambda c=most, b=same: ours(c, b))
            for keep in args.keep:
                row(f"CASP {keep:g} on {codes}, {bits:g}", lambda c=most, b=same, k=keep: ours(c, b, Casp(keep=k)))
        if bits in GPTQ_BITS:
            row(f"GPTQ, {bits:g} everywhere", lambda b=bits: scalar(args, samples, b, None))
            for keep in args.keep:
                row(f"CASP {keep:g} on GPTQ, {bits:g}", lambda b=bits, k=keep: scalar(args, samples, b, Casp(keep=k)))


def scalar(args: argparse.Namespace, samples: Any, bits: float, casp: Casp | None) -> tuple[Any, Any, float]:
    """GPTQ g128 stage by stage, on the inputs that the rounded layers before produce; query and key projections of the
    language model factored first under CASP, bits of every matrix then chosen within the bytes of ``bits`` everywhere.
    """
    model, processor = load(args.model, dtype=torch.float32)
    names = classify(model).layers
    inputs = list(prepare(samples, processor))
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    sizes = {name: _bytes(shapes[name], 0, int(bits)) for name in names}
    chosen = dict.fromkeys(names, (0, int(bits)))
    if casp is not None:
        chosen = _scalar_bits(args, model, processor, samples, inputs, casp, sum(sizes.values()))
    stored = sum(_bytes(shapes[name], *chosen[name]) for name in names)
    _round_all(model, names, inputs, chosen)
    return model, processor, 8 * stored / sum(m * n for m, n in shapes.values())


@torch.no_grad()
def _round_all(model: Any, names: Any, inputs: Any, chosen: dict[str, tuple[int, int]]) -> None:
    for unit, calls, hidden, _ in units(model, list(names), inputs):
        for stage in blocks.stages(unit, calls, hidden):
            for group, known in zip(stage, gather(unit, stage, calls, hidden), strict=True):
                assert known is not None
                for layer in group:
                    weight = model.get_submodule(layer.name).weight
                    weight.data = _round(weight.data, known.moment, *chosen[layer.name])


def _round(weight: torch.Tensor, moment: torch.Tensor, width: int, code: int) -> torch.Tensor:
    """A matrix through GPTQ, or through two factors of this inner width, each in turn through GPTQ."""
    if not width:
        return gptq(weight, moment, code)
    right = gptq(mixed(weight, width, moment), moment, code)  # mixed, which scalar codes need (--factors)
    left = refit_left(weight, right, moment)
    return gptq(left, inner_product(right, moment), code) @ right


def unmixed(weight: torch.Tensor, width: int, moment: torch.Tensor) -> torch.Tensor:
    """R of the two factors, a row for every singular direction."""
    return whitened_factors(weight, width, moment)[1]


def mixed(weight: torch.Tensor, width: int, moment: torch.Tensor) -> torch.Tensor:
    """R with its rows mixed evenly by an orthogonal matrix, the packed DFT after random signs."""
    right = unmixed(weight, width, moment)
    return dft.packed_dft(right.T, dft.random_signs(width, 1)).T.contiguous()


def _bytes(shape: tuple[int, int], width: int, bits: int) -> int:
    m, n = shape
    parts = [(m, width), (width, n)] if width else [shape]
    return round(sum(a * b * stored_bits((a, b), bits) / 8 for a, b in parts))


def _scalar_bits(
    args: argparse.Namespace, model: Any, processor: Any, samples: Any, inputs: Any, casp: Casp, budget: int
) -> dict[str, tuple[int, int]]:
    """Layer → (width of its factors or 0, bits), by the sensitivities and the optimiser that our own codes use."""
    source = open_source(resolve_model(args.model))
    config = FourierConfig()
    plan = make_plan(empty_model(source.folder, len(source.entries)), source, config)
    used = blocks.evenly(len(inputs), model_sensitivity.SAMPLES)
    starts = [answer_start(samples[i], inputs[i], processor) for i in used]
    errors = allocation.measure(plan, config, model, [inputs[i] for i in used], starts, lambda _: None, casp)
    options = [
        [
            Option(of.variant.replace(bits=bits), _bytes(layer.shape, of.variant.inner_rank, bits), of.loss(error))
            for of in errors[layer.name]
            for bits, error in GPTQ_BITS.items()
        ]
        for layer in plan.layers
    ]
    picked = [row[k].config for row, k in zip(options, allocate(options, budget).choice, strict=True)]
    return {
        layer.name: (config.inner_rank, int(config.bits)) for layer, config in zip(plan.layers, picked, strict=True)
    }


def layers(args: argparse.Namespace) -> None:
    """KL with queries and keys of one attention module cut to a quarter of their numbers, not quantised: in the norm
    of their inputs alone, and weighed by the other side too; beside that, all of their numbers at 1 bit.
    """
    divergence = Divergence(args.model, args.questions)
    model = divergence.original
    _, processor = load(args.model)
    inputs = list(prepare(calibration_samples(args.samples), processor))
    names = [name for name in classify(model).layers if is_query_or_key(name)]
    moments = second_moments(model, names, inputs)
    with attention_density.watched(model, len(inputs)) as maps, torch.no_grad():
        for index, sample in enumerate(inputs):
            with maps.of(index):
                model(**sample)
    densities = maps.densities()
    seen = other_side(model, names, inputs[:32])
    print("| attention | density | cut | cut, weighed by the other side | at 1 bit |\n|---|---|---|---|---|")
    for module, heads in densities.items():
        divergences = []
        for make in (_cut, _cut_weighed, _one_bit):
            mine = [name for name in names if name.startswith(f"{module}.")]
            before = {name: model.get_submodule(name).weight.data for name in mine}
            for name in mine:
                model.get_submodule(name).weight.data = make(before[name], moments[name], seen[name])
            divergences.append(divergence(model))
            for name in mine:
                model.get_submodule(name).weight.data = before[name]
        cells = " | ".join(f"{value:.2e}" for value in divergences)
        print(f"| {module.removeprefix('model.')} | {sum(heads) / len(heads):.3f} | {cells} |", flush=True)


def second_moments(model: Any, names: list[str], inputs: Any) -> dict[str, torch.Tensor]:
    """Of the inputs of these layers, over all samples."""
    return collect({name: model.get_submodule(name) for name in names}, lambda: [model(**x) for x in inputs])


def _cut(weight: torch.Tensor, moment: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    left, right = whitened_factors(weight, inner_rank(tuple(weight.shape), 0.25), moment)
    return left @ right


def _out(model: Any, name: str, make: Callable[..., torch.Tensor], moment: torch.Tensor) -> float:
    weight = model.get_submodule(name).weight.data
    rest = weight - make(weight, moment, moment)
    return float(((rest @ moment) * rest).sum() / ((weight @ moment) * weight).sum()) ** 0.5


def _cut_weighed(weight: torch.Tensor, moment: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    root, _ = damped_root(seen, 0.1)
    left, right = whitened_factors(root.T @ weight, inner_rank(tuple(weight.shape), 0.25), moment)
    return torch.linalg.solve_triangular(root.T, left, upper=False) @ right


def _one_bit(weight: torch.Tensor, moment: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return approximate(weight, FourierConfig(bits=1), moment).dequantize()


def other_side(model: Any, names: list[str], inputs: Any) -> dict[str, torch.Tensor]:
    """How much its attention minds an error of each projection's outputs, [m, m], one block a head: the Fisher
    information of the attention's rows, whose logits see a query's error through the keys, and a key's through the
    queries. With ε ~ N(0, 1) it is E[g gᵀ] of the gradient of Σ ε s / √s̄, s̄ being s held fixed; rotary embedding and
    grouped queries are part of what is differentiated.
    """
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(()) for name in names}
    given: dict[str, torch.Tensor] = {}
    handles = []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:

        def keep(_: Any, __: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
            given[name] = output.detach().requires_grad_()
            return given[name]

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    for module in dict.fromkeys(name.rpartition(".")[0] for name in names):
        mine = [name for name in names if name.startswith(f"{module}.")]

        def see(_: Any, __: Any, output: Any, mine: list[str] = mine) -> Any:
            maps = output[1]
            scale = maps.detach().clamp(min=1e-12).rsqrt() * (maps.detach() > 1e-12)
            noise = torch.randn(maps.shape, generator=generator) * scale
            gradients = torch.autograd.grad((noise * maps).sum(), [given[name] for name in mine])
            width = max(given[name].shape[-1] for name in mine) // maps.shape[1]  # queries have all heads
            for name, gradient in zip(mine, gradients, strict=True):
                heads = gradient[0].unflatten(-1, (-1, width))
                sums[name] = sums[name] + torch.block_diag(*torch.einsum("tha,thb->hab", heads, heads))
            return (output[0].detach(), *output[1:])

        handles.append(model.get_submodule(module).register_forward_hook(see))
    with torch.enable_grad(), attention_density.eager(model):
        for sample in inputs:
            model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def factors(args: argparse.Namespace) -> None:
    """Output errors of query and key projections as two factors (keep 0.5): mean over layers, by what codes them."""
    model, processor = load(args.model, dtype=torch.float32)
    inputs = list(prepare(calibration_samples(args.samples), processor))
    names = [name for name in classify(model).layers if is_query_or_key(name)]
    moments = second_moments(model, names, inputs)

    def ours(part: torch.Tensor, moment: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
        result = approximate(part, FourierConfig(bits=bits), moment)
        return result.dequantize(), result.bits_per_weight * part.numel()

    def plain(part: torch.Tensor, moment: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
        return gptq(part, moment, bits), part.numel() * stored_bits(tuple(part.shape), bits)

    ways = {
        "factors not coded": (unmixed, None),
        "frequency domain, inner side mixed": (mixed, ours),
        "frequency domain, singular vectors as they are (ours)": (unmixed, ours),
        "spatial domain (GPTQ g128), inner side mixed": (mixed, plain),
        "spatial domain (GPTQ g128), singular vectors as they are": (unmixed, plain),
    }
    for part in ("language", "vision"):
        print(f"\n| {part}: factors' codes | 2: bits | out | 3: bits | out | 4: bits | out |\n|{'---|' * 7}")
        chosen = [name for name in names if is_vision(name) == (part == "vision")]
        for title, make in {"cut to a quarter, not coded": _cut, "one matrix at 1 bit": _one_bit}.items():
            errors = [_out(model, name, make, moments[name]) for name in chosen]
            print(f"| {title}: {min(errors):.3f} to {max(errors):.3f} |{' |' * 6}", flush=True)
        for title, (split, code) in ways.items():
            cells = []
            for bits in (2, 3, 4):
                errors, stored, numbers = [], 0.0, 0
                for name in chosen:
                    weight, moment = model.get_submodule(name).weight.data, moments[name]
                    right = split(weight, inner_rank(tuple(weight.shape), 0.5), moment)
                    if code is not None:
                        right, count = code(right, moment, bits)
                        stored += count
                    left = refit_left(weight, right, moment)
                    if code is not None:
                        left, count = code(left, inner_product(right, moment), bits)
                        stored += count
                    rest = weight - left @ right
                    errors.append(float(((rest @ moment) * rest).sum() / ((weight @ moment) * weight).sum()) ** 0.5)
                    numbers += weight.numel()
                cells.append(f"{stored / numbers:.2f} | {sum(errors) / len(errors):.4f}")
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
