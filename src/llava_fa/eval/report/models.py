"""The report's sections on the models themselves: bytes, layers, bits and their reasons, spectra."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llava_fa.config import format_size
from llava_fa.eval.report import charts
from llava_fa.eval.report.collect import PARTS, Findings, Run, layer_error, part_of
from llava_fa.eval.report.markup import Html, join, number, percent, scroll, table, tag
from llava_fa.eval.spectra import REACH, Spectra
from llava_fa.hub.report import LayerReport

MEANS = {
    "codes": "codes of the Fourier coefficients",
    "low rank": "low-rank factors",
    "scales": "scales of rows and inputs",
    "signs": "random signs",
    "codebooks": "codebooks, shared by layers",
    "dense layers": "linear layers that are not compressed",
    "embeddings": "input and output embeddings",
    "other": "norms, biases, positions",
    "unused": "tensors that no module of the model has",
}
"""Kinds of bytes in the order of their hatchings."""
ABOUT = (
    "The transform is orthogonal: by itself it leaves singular values as they are, and what differs below comes of the "
    "scales in front of it (and, for method paper, of the half of the spectrum that is left out). What it does change "
    "is how the numbers are spread: outliers of single weights are shared by all coefficients, which come out nearly "
    "Gaussian (kurtosis 3), and that is what the codebooks are made for."
)
ROWS = 400
"""Rows of a table at most; the worst are kept."""


def sizes(findings: Findings) -> list[Html]:
    """What the bytes are spent on."""
    runs = [run for run in findings.runs if run.spent]
    if not runs:
        return [tag("p", "Only results were given, no model folders.", class_="note")]
    totals = [sum(run.spent.values()) for run in runs]
    kinds = [kind for kind in MEANS if any(run.spent.get(kind) for run in runs)]
    rows = [
        (run.name, [float(run.spent.get(kind, 0)) for kind in kinds], format_size(total))
        for run, total in zip(runs, totals, strict=True)
    ]
    chart = scroll(charts.bars(rows, "Bytes of each model by what they are spent on"), "bytes by purpose")
    cells = []
    for kind in kinds:
        pairs = [(run.spent.get(kind, 0), total) for run, total in zip(runs, totals, strict=True)]
        cells.append([MEANS[kind], *(f"{format_size(n)} ({percent(n / total)})" if n else "–" for n, total in pairs)])
    cells.append(["all tensors", *map(format_size, totals)])
    return [
        tag("figure", charts.legend(kinds, filled=True), chart),
        table(["bytes of", *(run.name for run in runs)], cells, "What the bytes are spent on"),
    ]


def layers(findings: Findings) -> list[Html]:
    """Error and bits of every layer over depth and module."""
    runs = [run for run in findings.runs if run.compressed]
    if not runs:
        return [tag("p", "No compressed model folder was given.", class_="note")]
    return [_layers_of(run, opened=run is runs[-1]) for run in runs]


def _layers_of(run: Run, *, opened: bool) -> Html:
    assert run.report is not None
    rows = run.report.layers
    measured = any(layer.output_error is not None for layer in rows)
    which = "output error" if measured else "weight error"
    shown: list[Html] = []
    for part in PARTS:
        own = [layer for layer in rows if part_of(layer.name) == part]
        if own:
            shown.append(tag("h4", part))
            errors = [(layer, layer_error(layer)) for layer in own]
            shown.append(_heat(errors, f"{which} in {part}", "of the original's size"))
            shown.append(_heat([(layer, layer.bits_per_weight) for layer in own], f"bits in {part}", "bits per weight"))
    worst = sorted(rows, key=lambda layer: layer_error(layer) or 0.0, reverse=True)
    cells = [
        [
            layer.name.removeprefix("model."),
            "×".join(map(str, layer.shape)),
            layer.codes,
            number(layer.bits_per_weight, 3),
            f"{layer.inner_rank} L R" if layer.inner_rank else layer.rank,
            number(layer.weight_error, 3),
            number(layer.output_error, 3),
        ]
        for layer in worst[:ROWS]
    ]
    headings = ["layer", "shape", "codes", "bits", "rank", "weight error", "output error"]
    listed = (
        f"the {ROWS} worst of {len(rows)} layers" if len(rows) > ROWS else f"all {len(rows)} layers, the worst first"
    )
    every = tag("details", tag("summary", listed), table(headings, cells, f"Layers of {run.name}"))
    kinds: dict[str, list[str]] = defaultdict(list)
    for skipped in run.report.not_compressed:
        kinds[skipped.reason].append(skipped.name)
    rest = tag("ul", [tag("li", tag("b", reason), ": ", ", ".join(names[:6]), " …" if len(names) > 6 else None)
                      for reason, names in kinds.items()])  # fmt: skip
    first = run.report.worst or worst[0]
    head = f"{run.name}: worst layer {first.name.removeprefix('model.')}, {which} {number(layer_error(first), 3)}"
    left = tag("details", tag("summary", f"{len(run.report.not_compressed)} modules are not compressed"), rest)
    return tag("details", tag("summary", head), shown, every, left, open=opened)


def _heat(values: Sequence[tuple[LayerReport, float | None]], title: str, unit: str) -> Html:
    """Rows are modules, columns depths; several layers in one cell (experts) are shown by their mean."""
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for layer, value in values:
        if value is not None:
            cells[place(layer.name)].append(value)
    if not cells:
        return tag("p", f"{title}: not measured", class_="note")
    modules = list(dict.fromkeys(module for module, _ in cells))
    depths = sorted({depth for _, depth in cells})
    grid = {(modules.index(m), depths.index(d)): sum(v) / len(v) for (m, d), v in cells.items()}
    columns = ["" if depth < 0 else str(depth) for depth in depths]
    caption = tag("figcaption", f"{title} ({unit})" + ("; columns are depths" if max(depths) >= 0 else ""))
    drawn = charts.heatmap(columns, modules, grid, title, unit)
    return tag("figure", caption, scroll(drawn, title))


def place(layer: str) -> tuple[str, int]:
    """(module, depth) of a layer's name; depth -1 outside of blocks. Numbers further in (experts) become ``*``."""
    depth = re.search(r"\.(\d+)\.", layer)
    if depth is None:
        return layer.rpartition(".")[2], -1
    return re.sub(r"\b\d+\b", "*", layer[depth.end() :]), int(depth.group(1))


def allocation(findings: Findings) -> list[Html]:
    """Why each layer has its bits."""
    runs = [run for run in findings.runs if run.compressed]
    budgeted = [run for run in runs if run.report and run.report.budget]
    shown: list[Html] = []
    if same := [run.name for run in runs if run not in budgeted]:
        text = f"{', '.join(same)}: every layer was given the same bits; "
        text += "a budget (compress --bits 2.25 or --size) gives each layer what it needs."
        shown.append(tag("p", text, class_="note"))
    for run in budgeted:
        assert run.report is not None
        assert run.report.budget is not None
        shown.append(_allocation_of(run, run.report.budget))
    return shown or [tag("p", "No compressed model folder was given.", class_="note")]


def _allocation_of(run: Run, budget: dict[str, Any]) -> Html:
    assert run.report is not None
    rows = [layer for layer in run.report.layers if layer.sensitivity is not None]
    bits, uniform = budget.get("bits"), budget.get("uniform_loss")
    given = format_size(budget["size"]) if bits is None else f"{bits:g} bits per weight"
    beside = "no uniform bits fit" if uniform is None else f"{number(uniform, 3)} with the same bits everywhere"
    loss = number(budget["predicted_loss"], 3)
    note = tag("p", f"Budget {given}. Predicted loss {loss} {budget['unit']}; {beside}.")
    known = [(layer, layer.sensitivity) for layer in rows if layer.sensitivity]
    figure = None
    if known:
        plane = charts.Plane([x for _, x in known], [layer.bits_per_weight for layer, _ in known], logs=(True, False))
        marks = []
        for layer, x in known:
            spot = charts.mark(PARTS.index(part_of(layer.name)), *plane.at(x, layer.bits_per_weight))
            hint = f"{layer.name}: {layer.bits_per_weight:.3f} bits, sensitivity {x:.3g}"
            marks.append(tag("g", tag("title", hint), spot))
        title = f"Bits of each layer of {run.name} over its sensitivity"
        drawn = plane.chart(title, "sensitivity: predicted loss per unit of distortion", "bits per weight", marks)
        figure = tag("figure", tag("figcaption", title), charts.legend(PARTS), scroll(drawn, title))
    rows.sort(key=lambda layer: layer.predicted_loss or 0.0, reverse=True)
    cells = [
        [
            layer.name.removeprefix("model."),
            number(layer.bits_per_weight, 3),
            layer.codes,
            f"{layer.inner_rank} L R" if layer.inner_rank else layer.rank,
            f"{layer.sensitivity or 0.0:.3g}",
            f"{layer.predicted_loss or 0.0:.3g}",
        ]
        for layer in rows[:ROWS]
    ]
    headings = ["layer", "bits", "codes", "rank", "sensitivity", "predicted loss"]
    caption = f"What each layer of {run.name} was given, and why"
    every = tag(
        "details", tag("summary", "every layer, the largest predicted loss first"), table(headings, cells, caption)
    )
    return tag("section", tag("h3", run.name), note, figure, every)


def inside(findings: Findings) -> list[Html]:
    """Singular values and histograms of the chosen layers."""
    runs = [run for run in findings.runs if run.spectra]
    if not runs:
        return [tag("p", "Needs the original's weights: give --original MODEL.", class_="note")]
    shown = [tag("p", ABOUT)]
    for run in runs:
        body = [_spectra_of(one) for one in run.spectra]
        shown.append(tag("details", tag("summary", f"{run.name}: {len(body)} layers"), body, open=run is runs[-1]))
    return shown


def _spectra_of(one: Spectra) -> Html:
    floor = 1e-4
    lines = [[max(value, floor) for value in one.singular[key]] for key in ("weight", "coded", "error")]
    plane = charts.Plane(one.indices, [v for line in lines for v in line], size=(440, 250), logs=(False, True))
    drawn = [plane.line(one.indices, line, i) for i, line in enumerate(lines)]
    title = f"Singular values of {one.name}"
    values = plane.chart(title, "number", "over the largest", drawn)
    bins = len(one.histogram["weight"])
    xs = [REACH * (2 * (i + 0.5) / bins - 1) for i in range(bins)]
    ys = [one.histogram[key] for key in ("weight", "coded")]
    other = charts.Plane([-REACH, REACH], [0.0, *ys[0], *ys[1]], size=(440, 250))
    curves = [other.line(xs, y, i) for i, y in enumerate(ys)]
    spread = other.chart(f"Histogram of {one.name}", "standard deviations", "share of entries", curves)
    kurtosis = tag(
        "p",
        f"Kurtosis {one.kurtosis['weight']:.2f} before, {one.kurtosis['coded']:.2f} after; beyond {REACH:g} standard "
        f"deviations {percent(one.beyond['weight'], 3)} before, {percent(one.beyond['coded'], 3)} after. "
        f"Weight error {one.weight_error:.4f}. After the transform: {one.coded}.",
        class_="small",
    )
    names = ("weight, before", "coefficients, after", "error, over the weight's largest")
    figures = [
        tag("figure", tag("figcaption", "singular values"), scroll(values, title)),
        tag("figure", tag("figcaption", "how the numbers are spread"), scroll(spread, f"Histogram of {one.name}")),
    ]
    return join(
        [tag("h4", one.name.removeprefix("model.")), charts.legend(names), tag("div", figures, class_="pair"), kurtosis]
    )
