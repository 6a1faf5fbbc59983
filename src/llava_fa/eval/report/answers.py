"""The report's sections on what the models answer: scores, divergence, the questions they differ on."""

from __future__ import annotations

import base64
import io
import math

from PIL import Image

from llava_fa.config import format_size
from llava_fa.eval.intervals import NORMAL
from llava_fa.eval.report import charts
from llava_fa.eval.report.collect import Difference, Findings, Run
from llava_fa.eval.report.markup import Html, number, percent, scroll, table, tag

SHOWN = 192
"""Pixels of a picture's longer side at most."""
GOOD = 0.95
"""The share of the original's accuracy from which on a model is worth the first sentence."""
_POSITIONS = 24


def summary(findings: Findings) -> list[Html]:
    """One row a model."""
    rows = []
    for run in findings.runs:
        report, world = run.report, run.scores.get("world")
        rows.append(
            [
                run.name,
                number(report and report.bits_per_weight, 3),
                "–" if report is None else format_size(report.compressed_bytes),
                "–" if report is None else f"{report.compression_ratio:.2f}×",
                percent(world and world["accuracy"]),
                percent(retention(findings, run)),
                number(mean_divergence(run), 3),
            ]
        )
    headings = [
        "model",
        "bits per weight",
        "size",
        "smaller",
        "accuracy (world)",
        "of the original's",
        "KL, nats a token",
    ]
    return [headline(findings), table(headings, rows, "The models at a glance")]


def retention(findings: Findings, run: Run) -> float | None:
    """The share of the original's accuracy in the world, where both were asked."""
    base, world = findings.original and findings.original.scores.get("world"), run.scores.get("world")
    return world["accuracy"] / base["accuracy"] if world and base and base["accuracy"] else None


def headline(findings: Findings) -> Html:
    """The one sentence that a reader takes along: on the smallest model that is still good, if any is."""
    runs = [run for run in findings.runs if run.compressed and run.report is not None]
    if not runs:
        return tag("p", f"{len(findings.runs)} models.", class_="lead")
    good = [run for run in runs if (retention(findings, run) or 0) >= GOOD]
    run = min(good or runs, key=lambda r: r.report.compressed_bytes if r.report else math.inf)
    assert run.report is not None
    which = f"The smallest that keeps {100 * GOOD:.0f} %" if good and len(good) < len(runs) else "The smallest"
    text = f"{which}, {run.name}, takes {format_size(run.report.compressed_bytes)} in the place of "
    text += f"{format_size(run.report.original_bytes)}, {run.report.bits_per_weight:.2f} bits per weight"
    if (share := retention(findings, run)) is not None:
        text += f", and keeps {percent(share)} of the original's accuracy"
    return tag("p", text + ".", class_="lead")


def scores(findings: Findings) -> list[Html]:
    """Accuracy per task with intervals."""
    suites = list(dict.fromkeys(suite for run in findings.runs for suite in run.scores))
    if not suites:
        return [tag("p", "Not measured: --limit was 0, and no result of eval was given.", class_="note")]
    shown: list[Html] = []
    for suite in suites:
        shown += [tag("h3", f"suite {suite}")] if len(suites) > 1 else []
        shown += _suite(findings, suite)
    return shown


def _suite(findings: Findings, suite: str) -> list[Html]:
    runs = [(i, run, run.scores[suite]) for i, run in enumerate(findings.runs) if suite in run.scores]
    tasks = list(dict.fromkeys(task for _, _, result in runs for task in result["tasks"]))
    figures, rows = [], []
    whole = [(i, run, result["accuracy"], result) for i, run, result in runs if result["accuracy"] is not None]
    blocks = [("all", whole)] if whole else []
    for task in tasks:
        own = [(i, run, r["tasks"][task]["score"], r["tasks"][task]) for i, run, r in runs if task in r["tasks"]]
        blocks.append((task, own))
    for name, own in blocks:
        marks = [(i, run.name, score, part.get("interval")) for i, run, score, part in own]
        ends = [score if interval is None else interval[0] for _, _, score, interval in marks]
        low = max(start for start in (0.0, 0.2, 0.4, 0.6, 0.8) if start <= min(ends))
        metric = own[0][3].get("metric", "")
        caption = [tag("b", name), f" {metric}" if metric else "", f", {own[0][3]['questions']} questions"]
        figures.append(tag("figure", tag("figcaption", caption), charts.intervals(marks, f"Scores of {name}", low)))
        by_run = {i: _scored(score, part.get("interval")) for i, _, score, part in own}
        rows.append([name, metric or "–", *(by_run.get(i, "–") for i, _, _ in runs)])
    note = tag("p", "Scores in %, with 95 % intervals: two models whose intervals overlap may still differ, since they "
               "answered the same questions; the questions they differ on are below.", class_="small")  # fmt: skip
    headings = ["task", "metric", *(run.name for _, run, _ in runs)]
    return [note, tag("div", figures, class_="cards"), table(headings, rows, f"Scores of suite {suite}", numbers=2)]


def _scored(score: float, interval: list[float] | None) -> str:
    return f"{100 * score:.1f}" + ("" if interval is None else f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})")


def mean_divergence(run: Run) -> float | None:
    """Nats per answer token, over the even sample of questions."""
    if not run.divergence:
        return None
    return sum(map(sum, run.divergence)) / sum(map(len, run.divergence))


def positions(run: Run) -> list[tuple[int, float, float, int]]:
    """(position from 1, mean KL, its standard error, questions) of every position that some answer reaches."""
    means = []
    rows = run.divergence or []
    for position in range(min(_POSITIONS, max(map(len, rows), default=0))):
        values = [row[position] for row in rows if len(row) > position]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
        means.append((position + 1, mean, spread, len(values)))
    return means


def divergence(findings: Findings) -> list[Html]:
    """KL divergence of the original over the position in the answer."""
    runs = [(i, run, positions(run)) for i, run in enumerate(findings.runs) if run.divergence]
    if not runs:
        return [tag("p", "Needs the original and its questions: give --original MODEL, and a --limit.", class_="note")]
    floor = 1e-6
    ys = [max(mean, floor) for _, _, rows in runs for _, mean, _, _ in rows]
    xs = [float(p) for _, _, rows in runs for p, _, _, _ in rows]
    plane = charts.Plane(xs, ys, logs=(False, True))
    drawn: list[Html] = []
    for i, _, rows in runs:
        x = [float(p) for p, _, _, _ in rows]
        factors = [math.exp(min(20.0, NORMAL * error / max(mean, floor))) for _, mean, error, _ in rows]
        low = [max(mean / factor, floor) for (_, mean, _, _), factor in zip(rows, factors, strict=True)]
        high = [max(mean * factor, floor) for (_, mean, _, _), factor in zip(rows, factors, strict=True)]
        y = [max(mean, floor) for _, mean, _, _ in rows]
        drawn += [plane.band(x, low, high, i), plane.line(x, y, i)]
        drawn += [charts.mark(i, *plane.at(a, b), 3.5) for a, b in zip(x, y, strict=True)]
    title = "KL divergence from the original over the position in the answer"
    figure = plane.chart(title, "token of the answer", "nats", drawn)
    rows = [
        [str(position), str(questions), *(f"{each[k][1]:.3g} ± {NORMAL * each[k][2]:.2g}" for _, _, each in runs)]
        for k, (position, _, _, questions) in enumerate(runs[0][2])
    ]
    asked = len(runs[0][1].divergence or [])
    means = ["all tokens", str(asked), *(number(mean_divergence(run), 4) for _, run, _ in runs)]
    headings = ["token", "answers", *(run.name for _, run, _ in runs)]
    text = "KL(original ‖ compressed) of the next token, given the picture, the question and the right answer so far, "
    text += f"on {asked} held-out questions; shaded: 95 % intervals of the means' logarithms; "
    text += "at later positions only the captions are left."
    note = tag("p", text, class_="small")
    marks = charts.legend([run.name for _, run, _ in runs], [i for i, _, _ in runs])
    every = tag("details", tag("summary", "the numbers"), table(headings, [*rows, means], title))
    return [note, tag("figure", marks, scroll(figure, title)), every]


def questions(findings: Findings) -> list[Html]:
    """The questions on which each model and the original differ most."""
    runs = [run for run in findings.runs if run.differences]
    if not runs:
        return [tag("p", "Needs the original: give --original MODEL, and a --limit.", class_="note")]
    shown = []
    for run in runs:
        asked = len(run.answers or [])
        head = f"{run.name}: answers {run.differing} of {asked} questions differently"
        cards = tag("ol", [_card(run, one) for one in run.differences], class_="questions")
        shown.append(tag("details", tag("summary", head), cards, open=run is runs[-1]))
    text = "Differing answers first, each group by the mean KL divergence over the right answer; of more than thirty "
    text += "differing answers thirty are measured, spread over the tasks."
    return [tag("p", text, class_="small"), *shown]


def _card(run: Run, one: Difference) -> Html:
    question = one.sample.question
    picture = tag("img", src=embedded(one.sample.image), alt=f"the picture of this question ({question.task})",
                  width=SHOWN, height=SHOWN, loading="lazy")  # fmt: skip
    rows = [("expected", question.answer), ("original", one.original), (run.name, one.compressed)]
    texts = tag("dl", [[tag("dt", who), tag("dd", what or "(nothing)")] for who, what in rows])
    note = tag("p", f"{question.task}, KL {number(one.kl, 3)} nats a token", class_="small")
    return tag("li", picture, tag("div", tag("p", question.text, class_="asked"), texts, note))


def embedded(picture: Image.Image) -> str:
    """A picture as a data URI, small enough to be one of many."""
    small = picture.convert("RGB")
    small.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
