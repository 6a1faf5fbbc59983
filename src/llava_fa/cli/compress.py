"""`llava-fa compress`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from llava_fa.cli import output
from llava_fa.config import MAX_BITS, MIN_BITS, Budget, Casp, FourierConfig
from llava_fa.errors import FourierError

if TYPE_CHECKING:
    from llava_fa.hub.plan import Plan
    from llava_fa.hub.report import Report

_NOTABLE = 0.2
"""Share of the result from which embeddings that stay as they are are worth a line."""

_SHOWN = 12
"""Names listed before a list is cut short; --json has them all."""


def compress(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="`tiny` (the embedded model), a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the compressed model.")],
    method: Annotated[str, typer.Option(help="`best`, or `paper` (LLaVA-FA literally).")] = "best",
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per weight: 1 to 4 by halves gives every layer's codes just that; anything between, such as "
            "2.25, is a budget for all stored bytes, spent where it counts most. [default: 4]"
        ),
    ] = None,
    codes: Annotated[
        str,
        typer.Option(
            help="`rings`: a code for each coefficient; `trellis`: codes that overlap, a tenth less error at the same "
            "size, slower to find and, but for CPUs with AVX-512 VNNI, much slower to decode; `auto`: trellis for "
            "layers of 64 inputs or more."
        ),
    ] = "rings",
    size: Annotated[
        str | None, typer.Option(help="Budget for the size of the whole model, such as `1.1GB`; instead of --bits.")
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Take --bits as a budget also where it is a half step.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank part; 0 leaves it out.")] = 0,
    casp: Annotated[
        bool,
        typer.Option(
            "--casp",
            help="Store query and key projections of the language model as two narrow factors, and spend what that "
            "saves on all layers: the same bytes as without.",
        ),
    ] = False,
    casp_keep: Annotated[
        float | None,
        typer.Option(help="With --casp: share of a projection's numbers that its factors have. [default: 0.25]"),
    ] = None,
    amplitude_bits: Annotated[int | None, typer.Option(help="`paper`: bits of each |coefficient|.")] = None,
    phase_bits: Annotated[int | None, typer.Option(help="`paper`: bits of each angle.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="`world` (generated samples), a LLaVA-format JSON file, or a Hugging Face dataset. "
            "Without it the weights alone are used, and the model is streamed.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Image folder of the LLaVA JSON. [default: the JSON's own folder]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples to draw.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the draw and of the random signs.")] = 0,
    skip: Annotated[
        list[str] | None, typer.Option(help="Layers to leave as they are (name or pattern; repeatable).")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Compress only these layers (name or pattern; repeatable).")
    ] = None,
    embeddings: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Compress the word embedding and the output embedding too, to 1 to 4 bits: kept as they are, they can "
            "be half of a small model at 2 bits. Not part of a budget in --bits.",
        ),
    ] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens per picture that the new model starts with: trained sets, or plain pooling."),
    ] = None,
    recover: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Then train it back towards the original, so many steps on the calibration source, for all numbers of "
            "visual tokens if it has them (`llava-fa train` has the settings). Without --rank, factors get a rank of "
            "a 64th of the model's width.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs on calibration samples.")] = "cpu",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw an interrupted run's work away, do not resume.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Compress a LLaVA-type model. Killed at any moment, the same command resumes."""
    if bits is not None and amplitude_bits is not None:
        raise typer.BadParameter("--bits and --amplitude-bits exclude each other: the sum of the two decides")
    if casp_keep is not None and not casp:
        raise typer.BadParameter("--casp-keep goes with --casp")
    try:
        share = Casp.keep if casp_keep is None else casp_keep
        factored = Casp(keep=share) if casp else None
        budget = _budget(method, bits, size, mixed)
        if embeddings is not None:
            FourierConfig(bits=embeddings)  # checks it
        config = FourierConfig(
            method=method,  # type: ignore[arg-type]  # FourierConfig checks it
            bits=MAX_BITS if bits is None or budget is not None else bits,
            codes=codes,  # type: ignore[arg-type]  # likewise
            rank=rank,
            amplitude_bits=amplitude_bits,
            phase_bits=phase_bits,
            seed=seed,
            skip=tuple(skip or ()),
            only=tuple(only or ()),
        )
    except FourierError as error:
        raise output.usage_error(error) from None
    if images is not None and calibration is None:
        raise typer.BadParameter("--images goes with --calibration FILE.json")
    if recover is not None and calibration is None:
        raise typer.BadParameter("--recover goes with --calibration, which it trains on")

    from llava_fa.hub.compress import compress as run
    from llava_fa.hub.provenance import record
    from llava_fa.hub.work_folder import refuse_existing

    refuse_existing(out.expanduser())
    target = out
    if recover is not None:
        from llava_fa.cli.train import before_recovery, recover_from

        asked = (model, config, budget, factored, calibration, images, samples, seed, embeddings, visual_tokens)
        target = before_recovery(out, asked, fresh)
    report = None
    if target == out or not target.exists():
        data = None if calibration is None else _samples(calibration, images, samples, seed)
        with output.layer_progress() as progress:
            report = run(
                model,
                target,
                config,
                data,
                budget=budget,
                casp=factored,
                embeddings=embeddings,
                visual_tokens=visual_tokens,
                device=device,
                fresh=fresh,
                progress=progress,
                on_plan=lambda plan: show_plan(plan, config),
            )
    if recover is not None:
        assert calibration is not None
        report = recover_from(model, target, out, calibration, images, recover, rank, visual_tokens, device, fresh)
    assert report is not None
    told = record(out.expanduser(), output.given_command(context, out="OUT"))
    report = dataclasses.replace(report, provenance=told)
    if json_output:
        output.print_json(report.to_dict())
    else:
        show_report(report)


def _budget(method: str, bits: float | None, size: str | None, mixed: bool) -> Budget | None:
    if size is not None:
        if bits is not None:
            raise typer.BadParameter("--bits and --size exclude each other: each is a budget")
        budget = Budget(size=size)  # type: ignore[arg-type]  # text becomes bytes
    elif mixed and bits is None:
        raise typer.BadParameter("--mixed goes with --bits")
    elif bits is not None and (mixed or (2 * bits != round(2 * bits) and MIN_BITS < bits < MAX_BITS)):
        budget = Budget(bits=bits)
    else:
        return None
    if method != "best":
        raise typer.BadParameter(
            f"a budget (--size, --mixed or --bits between half steps) is not for method {method!r}"
        )
    return budget


def _samples(source: str, images: Path | None, count: int, seed: int) -> list[Any]:
    if source == "world":
        if images is not None:
            raise typer.BadParameter("--images goes with a LLaVA JSON file, not with `world`")
        from llava_fa.world import calibration_samples

        return list(calibration_samples(count, seed))
    from llava_fa.hub.calibration_data import read_samples

    return read_samples(source, images=images, count=count, seed=seed)


def show_plan(plan: Plan, config: FourierConfig) -> None:
    """Say on stderr what the patterns came to, before any work."""
    console = output.stderr()
    if plan.budget is not None:  # told before; now it is settled who gets what
        counts = Counter(layer.config.bits for layer in plan.layers)
        shares = ", ".join(f"{count} layers {bits:g}" for bits, count in sorted(counts.items()))
        console.print(f"bits: {shares}; {_prediction(plan.budget)}", highlight=False)
        return
    weights = sum(layer.numel for layer in plan.layers)
    console.print(f"compressing {len(plan.layers)} layers, {weights / 1e6:.1f} M weights", highlight=False)
    if plan.embeddings:
        told = ", ".join(f"{layer.name} at {layer.config.bits:g} bits" for layer in plan.embeddings)
        console.print(f"embeddings: {told}", markup=False, highlight=False)
    elif (share := _words(plan) / max(1, plan.output_bytes)) > _NOTABLE:
        told = f"the word embeddings stay as they are, {share:.0%} of the result: --embeddings compresses them"
        console.print(told, highlight=False)
    if config.only:
        _list(console, "only", [layer.name for layer in plan.layers])
    if config.skip:
        _list(console, "skipped", [s.name for s in plan.not_compressed if s.reason.startswith("skipped")])


def _words(plan: Plan) -> int:
    """Bytes of the input and output embeddings that stay as they are."""
    from llava_fa.hub.families import is_vision

    reasons = ("embedding", "output embedding")
    wordy = [kept.name for kept in plan.not_compressed if kept.reason in reasons and not is_vision(kept.name)]
    kept = [f"{name}.weight" for name in wordy]
    return sum(plan.source.entries[plan.names[name]].nbytes for name in kept if name in plan.names)


def _list(console: Any, title: str, names: list[str]) -> None:
    for name in names[:_SHOWN]:
        console.print(f"  {title}: {name}", markup=False, highlight=False)
    if len(names) > _SHOWN:
        console.print(f"  {title}: … and {len(names) - _SHOWN} more", highlight=False)


def show_report(report: Report, *, all_layers: bool = False) -> None:
    """The report as tables on stdout."""
    console = output.stdout()
    console.print(f"[bold]{escape(report.path)}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"{report.bits_per_weight:.3f} bits per weight in {len(report.layers)} layers; "
        f"{output.size(report.compressed_bytes)}, was {output.size(report.original_bytes)}: "
        f"{report.compression_ratio:.2f}x smaller "
        f"({output.duration(report.seconds)}, peak memory {output.size(report.peak_rss_bytes)})",
        highlight=False,
        soft_wrap=True,
    )
    if report.budget is not None:
        console.print(f"{_given(report.budget)}; {_prediction(report.budget)}", highlight=False, soft_wrap=True)
    if report.training is not None:
        console.print(_training(report.training), highlight=False, soft_wrap=True)
    if report.layers:
        console.print(_layers(report, all_layers))
    if report.attention_density:
        console.print(_densities(report.attention_density, all_layers))
    for layer in report.layers:
        for note in layer.notes:
            console.print(f"note: {layer.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    reasons = Counter(skipped.reason for skipped in report.not_compressed)
    for reason, count in reasons.most_common():
        names = [skipped.name for skipped in report.not_compressed if skipped.reason == reason]
        more = f" and {count - 1} more" if count > 1 else ""
        console.print(f"not compressed: {names[0]}{more} ({reason})", markup=False, highlight=False, soft_wrap=True)


def _training(told: dict[str, Any]) -> str:
    shares = f"{100 * told['share']:.1f} % of the original's parameters"
    return f"trained: {told['steps']} steps, {told['trainable']:,} parameters ({shares})"


def _given(budget: dict[str, Any]) -> str:
    if budget.get("bits") is not None:
        return f"budget {budget['bits']:g} bits per weight"
    return f"budget {output.size(budget['size'])}"


def _prediction(budget: dict[str, Any]) -> str:
    uniform = budget["uniform_loss"]
    beside = "no uniform bits fit in" if uniform is None else f"{uniform:.3g} with the same bits everywhere"
    return f"predicted loss {budget['predicted_loss']:.3g} {budget['unit']} ({beside})"


def _layers(report: Report, all_layers: bool) -> Table:
    measured = any(layer.output_error is not None for layer in report.layers)

    def error(layer: Any) -> float:
        value = layer.output_error if measured else layer.weight_error
        return -1.0 if value is None else value

    worst_first = sorted(report.layers, key=error, reverse=True)
    shown = report.layers if all_layers else worst_first[:_SHOWN]
    title = "layers" if all_layers or len(shown) == len(report.layers) else f"the {_SHOWN} worst layers"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    why = ("sensitivity", "predicted loss") if report.budget is not None else ()
    for heading in ("shape", "codes", "bits", "rank", "weight error", "output error", *why):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in shown:
        reasons = (f"{x:.2g}" if x is not None else "-" for x in (layer.sensitivity, layer.predicted_loss)[: len(why)])
        table.add_row(
            escape(layer.name.removeprefix("model.")),
            "×".join(map(str, layer.shape)),
            layer.codes or "-",
            f"{layer.bits_per_weight:.3f}",
            f"{layer.inner_rank} L R" if layer.inner_rank else str(layer.rank),
            _number(layer.weight_error),
            _number(layer.output_error),
            *reasons,
        )
    return table


def _densities(found: dict[str, list[float]], all_layers: bool) -> Table | str:
    """How sparse the original's attention is: every module and head, or one line."""
    every = [density for heads in found.values() for density in heads]
    if not all_layers:
        return f"attention density {min(every):.3f} to {max(every):.3f}, {_share(every)} on average (--layers: by head)"
    table = Table(title="attention density of the original", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("attention", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("heads", overflow="fold")
    for name, heads in found.items():
        table.add_row(escape(name.removeprefix("model.")), _share(heads), " ".join(f"{x:.3f}" for x in heads))
    return table


def _share(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
