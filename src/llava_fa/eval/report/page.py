"""The report as one HTML file that needs nothing else: no script, no request, both colour schemes."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from llava_fa.errors import FourierError
from llava_fa.eval.report import answers, charts, models
from llava_fa.eval.report.collect import Findings, Run
from llava_fa.eval.report.markup import Html, table, tag
from llava_fa.hub.provenance import versions

LARGEST = 5_000_000
"""Bytes of a report at most: it is sent by mail and opened on phones."""


def page(findings: Findings, commands: Sequence[str], today: datetime.date) -> str:
    """The whole document.

    Args:
        findings: what was measured.
        commands: how the report was made, one line of shell each.
        today: the date it carries.

    Raises:
        FourierError: it would be larger than `LARGEST`.
    """
    sections = (
        ("summary", "At a glance", answers.summary(findings)),
        ("size", "Size: what the bytes are spent on", models.sizes(findings)),
        ("accuracy", "Accuracy", answers.scores(findings)),
        ("divergence", "Divergence by position", answers.divergence(findings)),
        ("layers", "Error and bits of every layer", models.layers(findings)),
        ("allocation", "Why each layer has its bits", models.allocation(findings)),
        ("inside", "Before and after the transform", models.inside(findings)),
        ("questions", "Where the models differ most", answers.questions(findings)),
        ("made", "How this was made", made(findings, commands)),
    )
    title = "Compression report: " + ", ".join(run.name for run in findings.runs if run is not findings.original)
    style = files("llava_fa.eval.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style)),
    )
    menu = tag(
        "nav",
        tag("ul", [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections]),
        aria_label="Sections",
    )
    body = [
        tag("section", tag("h2", name, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        for key, name, content in sections
    ]
    top = tag("header", tag("h1", title), tag("p", f"LLaVA-FA, {today.isoformat()}", class_="small"))
    skip = tag("a", "Skip to the content", href="#summary", class_="skip")
    document = tag("html", head, tag("body", skip, charts.hatchings(), top, menu, tag("main", body)), lang="en")
    text = f"<!doctype html>\n{document}\n"
    if (count := len(text.encode())) > LARGEST:
        raise FourierError(
            f"the report would take {count / 1e6:.1f} MB, more than {LARGEST / 1e6:g}",
            remedy="Report on fewer models at a time, or choose fewer layers",
        )
    return text


def made(findings: Findings, commands: Sequence[str]) -> list[Html]:
    """Versions and the exact commands."""
    rows = [[run.name, tag("code", command_of(run)), _versions(run)] for run in findings.runs if run.compressed]
    shown = [tag("h3", "This report"), tag("pre", "\n".join(commands))]
    if rows:
        shown += [
            tag("h3", "The models"),
            table(["model", "made by", "with"], rows, "Commands of the models", numbers=9),
        ]
    for run in findings.runs:
        if training := run.report and run.report.training:
            text = f"{run.name} was trained: {training['steps']} steps, {training['trainable']:,} parameters."
            shown.append(tag("p", text))
    settings = findings.settings
    measured = [f"{name}: {dtype}" for name, dtype in findings.dtypes.items()]
    text = f"Questions of the world: seed {settings.seed}, about {settings.limit}"
    shown.append(tag("p", "; ".join([text, *measured]) + "."))
    return [
        *shown,
        tag("h3", "Versions"),
        table(["package", "version"], list(versions().items()), "Versions", numbers=9),
    ]


def command_of(run: Run) -> str:
    """What made a compressed folder."""
    command = _provenance(run).get("command")
    return command.replace(" OUT", f" {run.model}", 1) if command else "not recorded: through the Python API"


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {number}" for name, number in _provenance(run).get("versions", {}).items()) or "–"


def _provenance(run: Run) -> dict[str, Any]:
    return (run.report and run.report.provenance) or {}
