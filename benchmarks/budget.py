"""What one budget for the whole model is worth: bits chosen layer by layer against the same bits everywhere.

    .venv/bin/python benchmarks/budget.py [--model tiny] [--out runs/budget] [--limit 900] [--questions 180]
    .venv/bin/python benchmarks/budget.py --layers      # how well the predicted loss of a single layer is met
    .venv/bin/python benchmarks/budget.py --curve       # distortion of either kind of codes at every width
    .venv/bin/python benchmarks/budget.py --modalities  # errors on vision tokens against errors on text tokens

Every uniform model is followed by one compressed to a budget of exactly its bytes. KL: nats per answer token, of the
next-token distribution against the original's, on held-out questions with their true answers; accuracy: the world suite
(`--limit 0` leaves it out). Rows already in OUT/rows.jsonl are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, compressed, nearness, percent
from real_layers import collect

import llava_fa
import llava_fa.hub.inspect
from llava_fa import Budget, FourierConfig, FourierLinear, approximate
from llava_fa.eval.divergence import Divergence
from llava_fa.hub.calibration_data import answer_start, prepare
from llava_fa.hub.loading import load
from llava_fa.nn.surgery import classify
from llava_fa.solver.sensitivity import distortion, error_powers
from llava_fa.world.samples import calibration_samples

SAMPLES = 128


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"))
    parser.add_argument("--limit", type=int, default=900, help="questions answered; 0 measures the KL alone")
    parser.add_argument("--questions", type=int, default=180, help="questions of the KL")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0, 1.5, 3.0, 2.5])
    parser.add_argument("--codes", choices=("rings", "trellis", "auto"), default="rings")
    parser.add_argument("--data-free", action="store_true", help="without data instead of calibrated")
    parser.add_argument("--layers", action="store_true", help="one layer at a time")
    parser.add_argument("--curve", action="store_true", help="distortion of codes on every seventh layer")
    parser.add_argument("--modalities", action="store_true", help="sensitivity to errors on vision and text tokens")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.curve:
        return curve(args)
    if args.modalities:
        return modalities(args)
    (layers if args.layers else models)(args, Divergence(args.model, args.questions))


def models(args: argparse.Namespace, divergence: Divergence) -> None:
    rows = Rows(args.out / "rows.jsonl")
    samples = None if args.data_free else calibration_samples(SAMPLES)
    kind = f"{'data-free' if args.data_free else 'calibrated'} {args.codes}"
    codes = FourierConfig(codes=args.codes)

    def row(name: str, config: FourierConfig, budget: Budget | None) -> dict[str, Any]:
        if (made := rows.find(name=name)) is None:
            model, processor, report = compressed(args.model, args.out / "model", config, samples, budget=budget)
            figures = nearness(model, processor, divergence, args.limit)
            made = rows.add({"name": name, "bits": report.bits_per_weight, **figures, "budget": report.budget})
        print(f"| {name} | {made['bits']:.3f} | {made['kl']:.5f} | {percent(made)} |", flush=True)
        return made

    print("| model | bits/weight | KL | accuracy |\n|---|---|---|---|")
    for bits in args.bits:
        uniform = row(f"{kind}, {bits:g} everywhere", codes.replace(bits=bits), None)
        row(f"{kind}, budget of {bits:g}", codes, Budget(bits=uniform["bits"]))


def curve(args: argparse.Namespace) -> None:
    """What `solver.sensitivity.distortion` is told: output error over what is expected of codes of distortion 1."""
    model, processor = load(args.model, dtype=torch.float32)
    chosen = {name: model.get_submodule(name) for name in list(classify(model).layers)[::7]}
    inputs = list(prepare(calibration_samples(SAMPLES), processor))
    moments = collect(chosen, lambda: [model(**x) for x in inputs])
    print("| bits | codes | feedback | measured | spread | in use |\n|---|---|---|---|---|---|")
    kinds = itertools.product((True, False), [half / 2 for half in range(2, 9)], ("rings", "trellis"))
    for feedback, bits, codes in kinds:
        config = FourierConfig(bits=bits, codes=codes)  # type: ignore[arg-type]
        logs = []
        for name, linear in chosen.items():
            moment = moments[name] if feedback else moments[name].diagonal().contiguous()
            result = approximate(linear.weight, config, moment)
            error = result.dequantize() - linear.weight
            real = (error @ moment * error).sum() if feedback else (error.square() * moment).sum()
            logs.append((real / error_powers(linear.weight, config, moment)[1].sum()).log())
        ratios = torch.stack(logs)
        used = distortion(config.code_bits, config.codes_for(1 << 20), feedback=feedback)
        figures = f"{float(ratios.mean().exp()):.5f} | {float(ratios.std()):.2f} | {used:.5f}"
        print(f"| {bits:g} | {codes} | {'yes' if feedback else 'no'} | {figures} |", flush=True)


def layers(args: argparse.Namespace, divergence: Divergence) -> None:
    """Each layer of a budgeted model put into the original by itself: its KL against its predicted loss."""
    folder = args.out / "one-by-one"
    if not folder.exists():
        samples = calibration_samples(SAMPLES)
        llava_fa.compress(args.model, folder, FourierConfig(bits=2), samples, budget=Budget(bits=2.5))
    budgeted, _ = load(folder, dtype=torch.float32)
    predicted = {layer.name: layer.predicted_loss for layer in llava_fa.hub.inspect.inspect_model(folder).layers}
    pairs = []
    for name, layer in budgeted.named_modules():
        if not isinstance(layer, FourierLinear):
            continue
        linear = divergence.original.get_submodule(name)
        weight = linear.weight.data
        linear.weight.data = layer.dequantize()
        pairs.append((name, layer.layout.code_bits / 2, predicted[name], divergence(divergence.original)))
        linear.weight.data = weight
        print(f"| {name} | {pairs[-1][1]:g} | {pairs[-1][2]:.2e} | {pairs[-1][3]:.2e} |", flush=True)
    (args.out / "layers.json").write_text(json.dumps({name: [predicted, real] for name, _, predicted, real in pairs}))
    logs = torch.tensor([[math.log(x), math.log(y)] for _, _, x, y in pairs if x and x > 0 and y > 0])
    print(f"correlation of logarithms {float(torch.corrcoef(logs.T)[0, 1]):.3f}")
    print(f"measured / predicted: median {float((logs[:, 1] - logs[:, 0]).median().exp()):.2f}")


def modalities(args: argparse.Namespace) -> None:
    """Of every language layer: the Fisher information per vision token over that per text token, and the same ratio of
    output powers; then, given the figures of --layers, whether a loss predicted by modality (information times output
    power, vision and text tokens apart) correlates better with the measured one than a loss predicted over all tokens.
    """
    model, processor = load(args.model, dtype=torch.float32)
    samples = calibration_samples(36)
    inputs = list(prepare(samples, processor))
    names = [name for name in classify(model).layers if "language_model" in name]
    sums = {name: torch.zeros(2, 3, dtype=torch.float64) for name in names}  # (vision, text) × (g², y², tokens)
    vision = torch.zeros(0, dtype=torch.bool)

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            here, both = sums[name], (vision, ~vision)
            power = output.detach()[0].square().sum(1)
            for i, mask in enumerate(both):
                here[i, 1:] += torch.stack([power[mask].sum(), mask.sum()]).double()

            def add(gradient: torch.Tensor) -> None:
                for i, mask in enumerate(both):
                    here[i, 0] += gradient[0][mask].square().sum().double()

            output.register_hook(add)
            return output

        return hook

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(0)
    for sample, x in zip(samples, inputs, strict=True):
        vision = x["input_ids"][0] == processor.image_token_id
        logits = model(**x, use_cache=False).logits[0, answer_start(sample, x, processor) - 1 : -1]
        p = logits.detach().softmax(-1)
        noise = torch.randn(p.shape, generator=generator) * p.sqrt()
        (logits * (noise - p * noise.sum(-1, keepdim=True))).sum().backward()
    print("| layer | g² vision / text | y² vision / text |\n|---|---|---|")
    for name, s in sums.items():
        g, y = (s[0, k] / s[0, 2] / (s[1, k] / s[1, 2]) for k in (0, 1))
        print(f"| {name.removeprefix('model.language_model.')} | {g:.3f} | {y:.2f} |")
    file = args.out / "layers.json"
    if file.exists():
        measured = json.loads(file.read_text())
        known = [name for name in names if name in measured and min(measured[name]) > 0]
        apart = {name: float((s[:, 0] * s[:, 1] / s[:, 2]).sum()) for name, s in sums.items()}
        together = {name: float(s[:, 0].sum() * s[:, 1].sum() / s[:, 2].sum()) for name, s in sums.items()}
        for title, ratio in (("all tokens together", dict.fromkeys(names, 1.0)), ("modalities apart", None)):
            factor = ratio or {name: apart[name] / together[name] for name in names}
            pairs = [[math.log(measured[name][0] * factor[name]), math.log(measured[name][1])] for name in known]
            print(f"{title}: correlation {float(torch.corrcoef(torch.tensor(pairs).T)[0, 1]):.3f}")


if __name__ == "__main__":
    main()
