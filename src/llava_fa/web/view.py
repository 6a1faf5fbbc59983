"""What visitors are shown of an answer, as markup: text, figures, and a sentence on where things stand."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from llava_fa.config import format_size
from llava_fa.eval.report.markup import Html, number, tag
from llava_fa.web.desk import Ticket
from llava_fa.web.side import Answer, Side

TITLES = ("Original", "Compressed")
TIMING = (
    "They answer one after the other, the original first, each with the whole machine: the times are their own. "
    "Both take the likeliest token every time, so the same question gets the same answer again."
)


def introduction() -> Html:
    """What the page is, and how it measures."""
    return tag(
        "div",
        tag("h1", "Two models, one question"),
        tag("p", "Give a picture and a question: the original and the compressed model both answer. ", TIMING),
        class_="introduction",
    )


def heading(side: Side, index: int) -> Html:
    """Which model this is."""
    kind = f"{number(side.bits)} bits per weight" if side.bits else "not compressed"
    return tag("header", tag("h2", TITLES[index]), tag("p", tag("b", side.name), f" · {kind}"), class_="side")


def _times(ratio: float, index: int) -> str:
    if index == 0:
        return ""
    return f"{ratio:.1f}× smaller" if ratio >= 1 else f"{1 / ratio:.1f}× larger"


def answer_text(answer: Answer) -> Html:
    """The answer so far."""
    text = answer.text.strip()
    if text:
        ending = " [cut at the longest answer]" if answer.cut else None
        return tag("p", text, tag("i", ending) if ending else None, class_="answer")
    said = "…" if answer.began is not None and answer.ended is None else "(nothing)" if answer.ended else ""
    return tag("p", said, class_="answer empty")


def figures(sides: Sequence[Side], index: int, answer: Answer) -> Html:
    """Times and counts of one answer, and what its model takes."""
    side, original, begun = sides[index], sides[0], answer.began is not None
    mark = "shared the machine" if answer.shared and begun else ""
    read = f"{answer.visual_tokens} of them the picture" if answer.prompt_tokens else ""
    disk, memory = original.disk_bytes / side.disk_bytes, original.memory_bytes / side.memory_bytes
    rows = [
        ("First token after", _seconds(answer.first_seconds), mark),
        ("Whole answer", _seconds(answer.seconds), mark),
        ("Speed after the first", "–" if answer.rate is None else f"{answer.rate:.1f} tokens/s", mark),
        ("Tokens written", str(answer.tokens) if begun else "–", ""),
        ("Tokens read", str(answer.prompt_tokens) if answer.prompt_tokens else "–", read),
        ("On disk", format_size(side.disk_bytes), _times(disk, index)),
        (
            f"In memory ({side.dtype})",
            format_size(side.memory_bytes),
            _times(memory, index),
        ),
    ]
    cells = [
        tag("tr", tag("th", name, scope="row"), tag("td", value, tag("span", f" {remark}") if remark else None))
        for name, value, remark in rows
    ]
    return tag("table", tag("tbody", cells), class_="figures")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def standing(ticket: Ticket, ahead: int) -> Html:
    """One sentence on how far a question is, and which it is."""
    question = tag("p", f"Asked: {ticket.question.text.strip()}", class_="small asked")
    return tag("div", _standing(ticket, ahead), question)


def _standing(ticket: Ticket, ahead: int) -> Html:
    if ticket.error:
        return problem(ticket.error)
    first, second = ticket.answers
    if not ticket.done:
        if not ticket.started:
            return note(f"Waiting: {ahead} before you." if ahead else "Waiting …")
        if ticket.question.together:
            return note("Both are answering …")
        return note(f"The {TITLES[0 if second.began is None else 1].lower()} model is answering …")
    if ticket.late:
        return problem("Stopped: the time that a question may take is over")
    if ticket.cancelled:
        return note("Stopped.")
    return note("Both gave the same answer." if first.text.strip() == second.text.strip() else "The answers differ.")


def note(text: str) -> Html:
    """A sentence for the visitor."""
    return tag("p", text, class_="standing", role="status")


def problem(text: str) -> Html:
    """What went wrong, in a sentence that begins with a capital and ends with a full stop."""
    text = text[:1].upper() + text[1:]
    return tag("p", text if text.endswith((".", "!", "?")) else f"{text}.", class_="standing problem", role="alert")


def memory(sides: Sequence[Side]) -> Html:
    """What this process takes with both models in it."""
    said = f"This process, with both models in it, takes {format_size(psutil.Process().memory_info().rss)} of memory"
    place = sides[0].model.device
    if place.type == "cuda":
        said += f" and {format_size(torch.cuda.memory_allocated(place))} of {torch.cuda.get_device_name(place)}"
    return tag("p", f"{said}.", class_="small")


def right_answer(text: str) -> Html:
    """Of an example, where the answer is known."""
    return tag("p", "The right answer: ", tag("b", text), class_="small")


def scale(side: Side) -> Html:
    """What stands below the slider of visual tokens: the numbers that it can be set to."""
    return tag("div", [tag("span", str(count)) for count in side.counts], class_="scale", aria_hidden="true")


def tokens_label(side: Side, index: int) -> str:
    """What a position of a side's slider of visual tokens means."""
    count = side.counts[index]
    if count == max(side.counts):
        return f"Visual tokens: {count} (all)"
    return f"Visual tokens: {count}" if side.trained else f"Visual tokens: {count} (pooled, not trained for it)"
