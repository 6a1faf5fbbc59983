"""HTML that cannot be broken by what it shows: everything that is not built by `tag` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

VOID = ("meta", "img", "br", "link", "rect", "line", "path", "circle", "polyline", "polygon")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """One element. Children that are not `Html` are escaped, iterables are joined, None is left out.

    Attributes: None is left out, True stands alone, ``_`` at the end is dropped and ``_`` inside is a hyphen
    (``class_``, ``stroke_width``); SVG's ``viewBox`` is given as it is.
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        named = key.rstrip("_").replace("_", "-")
        written += f" {named}" if value is True else f' {named}="{html.escape(_text(value))}"'
    if name in VOID and not children:
        return Html(f"<{name}{written}/>" if name not in ("meta", "img", "br", "link") else f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after the other, as `tag` has them."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(child))
        else:
            parts.append(html.escape(_text(child)))
    return Html("".join(parts))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(headings: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str, *, numbers: int = 1) -> Html:
    """A table that scrolls by itself where it is too wide; columns from ``numbers`` on are right-aligned."""
    shown = tag("tr", [tag("th", h, scope="col", class_=_right(i, numbers)) for i, h in enumerate(headings)])
    body = [
        tag(
            "tr",
            [
                tag("td" if i else "th", cell, class_=_right(i, numbers), scope=None if i else "row")
                for i, cell in enumerate(row)
            ],
        )
        for row in rows
    ]
    return scroll(tag("table", tag("caption", caption), tag("thead", shown), tag("tbody", body)), caption)


def scroll(content: Html, label: str) -> Html:
    """Something that may be wider than the screen; the keyboard can scroll it too."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def _right(index: int, numbers: int) -> str | None:
    return "n" if index >= numbers else None


def percent(share: float | None, digits: int = 1) -> str:
    """A share for people: 92.6 %."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Significant digits: 0.0314, 2.12; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.{digits}f}"
