"""Plans and reports of compressed models for people: lines and tables."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from llava_fa.cli import output
from llava_fa.config import format_size

if TYPE_CHECKING:
    from llava_fa.hub.plan import Plan
    from llava_fa.hub.preview import Preview
    from llava_fa.hub.report import Report

_NOTABLE = 0.2
"""Share of the result from which embeddings that stay as they are are worth a line."""

_SHOWN = 12
"""Names listed before a list is cut short; --json has them all."""


def show_plan(plan: Plan) -> None:
    """Say on stderr what the patterns came to, before any work."""
    console, config = output.stderr(), plan.layers[0].config  # all have the patterns of the request
    if plan.budget is not None:  # told before; now it is settled who gets what
        counts = Counter(layer.config.bits for layer in plan.layers)
        shares = ", ".join(f"{count} layers {bits:g}" for bits, count in sorted(counts.items()))
        console.print(f"bits: {shares}; {_prediction(plan.budget)}")
        return
    if plan.memory:
        console.print(plan.memory)
        return
    weights = sum(layer.numel for layer in plan.layers)
    console.print(f"compressing {len(plan.layers)} layers, {weights / 1e6:.1f} M weights")
    if plan.embeddings:
        text = ", ".join(f"{layer.name} at {layer.config.bits:g} bits" for layer in plan.embeddings)
        console.print(f"embeddings: {text}", markup=False)
    elif (share := _words(plan) / max(1, plan.output_bytes)) > _NOTABLE:
        text = f"the word embeddings stay as they are, {share:.0%} of the result: --embeddings compresses them"
        console.print(text)
    if plan.unseen:
        text = f"{len(plan.unseen)} layers could not be seen at work: without samples nothing is known of their inputs"
        console.print(f"{text} ({plan.unseen[0]}, …)", markup=False)
    for line in plan.ledger.summary():
        if line.fate == "dropped":
            console.print(f"left out: {line} ({line.why})", markup=False)
    if unused := [entry for key, entry in plan.arrangement.unused.items() if key not in plan.left_out]:
        size = sum(entry.nbytes for entry in unused)
        text = f"{len(unused)} tensors that no module has, {format_size(size)}, are copied as they are"
        console.print(f"{text} ({unused[0].name}, …); --drop-unused leaves them out", markup=False)
    if config.only:
        _list(console, "only", [layer.name for layer in plan.layers])
    if config.skip:
        _list(console, "skipped", [s.name for s in plan.not_compressed if s.reason.startswith("skipped")])


def _words(plan: Plan) -> int:
    """Bytes of the input and output embeddings that stay as they are."""
    from llava_fa.hub.families import is_vision

    reasons = ("embedding", "output embedding")
    modules = [skipped.name for skipped in plan.not_compressed if skipped.reason in reasons]
    weights = [f"{name}.weight" for name in modules if not is_vision(name)]
    return sum(plan.kept[name].nbytes for name in weights if name in plan.kept)


def _list(console: Any, title: str, names: list[str]) -> None:
    for name in names[:_SHOWN]:
        console.print(f"  {title}: {name}", markup=False)
    if len(names) > _SHOWN:
        console.print(f"  {title}: … and {len(names) - _SHOWN} more")


def show_report(report: Report, *, all_layers: bool = False) -> None:
    """The report as tables on stdout."""
    from llava_fa.hub.adapter import WEIGHTS as ADAPTER

    console = output.stdout()
    console.print(f"[bold]{escape(report.path)}[/]", soft_wrap=True)
    console.print(
        f"{report.bits_per_weight:.3f} bits per weight in {len(report.layers)} layers; "
        f"{format_size(report.compressed_bytes)}, was {format_size(report.original_bytes)}: "
        f"{report.compression_ratio:.2f}x smaller "
        f"({output.duration(report.seconds)}, peak memory {format_size(report.peak_rss_bytes)})",
        soft_wrap=True,
    )
    if report.budget is not None:
        console.print(f"{_given(report.budget)}; {_prediction(report.budget)}", soft_wrap=True)
    if report.training is not None:
        console.print(_training(report.training), soft_wrap=True)
    if report.layers:
        console.print(_layers(report, all_layers))
    if report.attention_density:
        console.print(_densities(report.attention_density, all_layers))
    for line in (*_tokens(report), *_notes(report, all_layers)):
        console.print(line, markup=False, soft_wrap=True)
    if report.ledger is not None:
        for line in report.ledger.summary():
            if line.why:
                console.print(f"{line.fate}: {line} ({line.why})", markup=False, soft_wrap=True)
        for name, size in report.ledger.unread.items():
            what = "an adapter: it takes part in answers" if name == ADAPTER else "no part of the checkpoint, not read"
            console.print(f"beside the weights: {name}, {format_size(size)} ({what})", markup=False, soft_wrap=True)
    if report.source_ledger is not None:
        for line in report.source_ledger.summary():
            if line.fate == "dropped":
                console.print(f"dropped: {line} ({line.why})", markup=False, soft_wrap=True)
    if report.rows_left_out:
        console.print(f"left out: {', '.join(report.rows_left_out)}", markup=False, soft_wrap=True)


def _tokens(report: Report) -> list[str]:
    """How much data the layers were fitted to: one line, where any were fitted to data."""
    seen = [layer.tokens for layer in report.layers if layer.tokens is not None]
    if not seen:
        return []
    return [f"calibration: {min(seen):,} to {max(seen):,} tokens a layer, {round(median(seen)):,} in the middle"]


def _notes(report: Report, all_layers: bool) -> list[str]:
    """A line for each note, with the layers that it is of."""
    of: dict[str, list[str]] = {}
    for layer in report.layers:
        for note in layer.notes:
            of.setdefault(note, []).append(layer.name)
    lines = []
    for note, names in of.items():
        shown = names if all_layers else names[:_SHOWN]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        lines.append(f"note: {', '.join(shown)}{more}: {note}")
    return lines


def show_preview(preview: Preview) -> None:
    """What compressing would come to, on stdout, and how far each number can be trusted."""
    console = output.stdout()
    words = f", embeddings at {preview.embeddings:g}" if preview.embeddings is not None else ""
    size, before = format_size(preview.compressed_bytes), format_size(preview.original_bytes)
    for line in (
        f"{preview.path}: {preview.model}, {preview.parameters / 1e6:,.1f} M parameters",
        f"at {preview.bits:g} bits{words}: {size}, now {before}: {preview.compression_ratio:.2f}x smaller",
        f"packed: {preview.share:.1%} of all parameters, "
        f"{preview.packed_linear / max(1, preview.linear):.1%} of those in linear layers and experts",
        f"memory: about {format_size(preview.memory_bytes)} to compress without data (its largest layer at work); to "
        f"answer, {size} and what the conversation takes",
        f"time: about {output.duration(preview.seconds)} to compress without data on two cores, at the rate of "
        "docs/results.md (Speed of compression); with calibration several times as long",
    ):
        console.print(line, markup=False, soft_wrap=True)
    for one in preview.staying:
        more = f" and {one.count - 1} more" if one.count > 1 else ""
        text = f"kept: {one.first}{more}, {format_size(one.bytes)} ({one.reason})"
        console.print(text, markup=False, soft_wrap=True)
    text = "from config.json alone: tensors that this class does not have (such as mtp.*) are not counted"
    console.print(text, markup=False, soft_wrap=True)


def _training(training: dict[str, Any]) -> str:
    shares = f"{100 * training['share']:.1f} % of the original's parameters"
    return f"trained: {training['steps']} steps, {training['trainable']:,} parameters ({shares})"


def _given(budget: dict[str, Any]) -> str:
    if budget.get("bits") is not None:
        return f"budget {budget['bits']:g} bits per weight"
    return f"budget {format_size(budget['size'])}"


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
    told = ("tokens",) if any(layer.tokens is not None for layer in report.layers) else ()
    for heading in ("shape", "codes", "bits", "rank", *told, "weight error", "output error", *why):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in shown:
        reasons = (f"{x:.2g}" if x is not None else "-" for x in (layer.sensitivity, layer.predicted_loss)[: len(why)])
        table.add_row(
            escape(layer.name.removeprefix("model.")),
            "×".join(map(str, layer.shape)),
            layer.codes or "-",
            f"{layer.bits_per_weight:.3f}",
            f"{layer.inner_rank} L R" if layer.inner_rank else str(layer.rank),
            *(["-" if layer.tokens is None else str(layer.tokens)] * len(told)),
            _number(layer.weight_error),
            _number(layer.output_error),
            *reasons,
        )
    return table


def _densities(densities: dict[str, list[float]], all_layers: bool) -> Table | str:
    """How sparse the original's attention is: every module and head, or one line."""
    every = [density for heads in densities.values() for density in heads]
    if not all_layers:
        return f"attention density {min(every):.3f} to {max(every):.3f}, {_share(every)} on average (--layers: by head)"
    table = Table(title="attention density of the original", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("attention", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("heads", overflow="fold")
    for name, heads in densities.items():
        table.add_row(escape(name.removeprefix("model.")), _share(heads), " ".join(f"{x:.3f}" for x in heads))
    return table


def _share(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
