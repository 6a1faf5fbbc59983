"""Charts as inline SVG: every one has a title for screen readers, and none needs its colours to be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llava_fa.eval.report.markup import Html, join, number, tag

KINDS = 8
"""Series, or kinds of bytes, that can be told apart: colours c0 to c7, with a mark, a dash and a hatching each."""

_LEFT, _TOP, _BOTTOM = 54, 10, 40


def svg(width: float, height: float, title: str, *children: Any) -> Html:
    """The frame of a chart."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", tag("title", title), *children, viewBox=box, width=width, height=height, role="img")


def hatchings() -> Html:
    """The patterns that bars are filled with; once a document."""
    angles = (0, 45, -45, 90, 0, 45, -45, 90)
    patterns = []
    for i, angle in enumerate(angles):
        ground = tag("rect", width=8, height=8, class_=f"f{i}")
        line = tag("line", x1=0, y1=0, x2=0, y2=8, class_="hatch", stroke_width=2 if i < 4 else 5) if i else None
        place = {"patternUnits": "userSpaceOnUse", "patternTransform": f"rotate({angle})"}
        patterns.append(tag("pattern", ground, line, id=f"h{i}", width=8, height=8, **place))
    return tag("svg", tag("defs", patterns), width=0, height=0, class_="defs", aria_hidden="true")


def mark(kind: int, x: float, y: float, r: float = 4.5) -> Html:
    """The mark of a series: circle, square, triangle, diamond, cross, plus, and two hollow ones."""
    kind %= KINDS
    cls = f"m f{kind}" if kind < 4 else f"m o{kind}"
    if kind in (0, 6):
        return tag("circle", cx=x, cy=y, r=r, class_=cls)
    if kind in (1, 7):
        return tag("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, class_=cls)
    corners = {2: ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)), 3: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0))}
    if kind in corners:
        return tag("polygon", points=" ".join(f"{x + r * a:g},{y + r * b:g}" for a, b in corners[kind]), class_=cls)
    d = f"M{x - r:g},{y - r:g}L{x + r:g},{y + r:g}M{x - r:g},{y + r:g}L{x + r:g},{y - r:g}"
    if kind == 5:
        d = f"M{x - r:g},{y:g}H{x + r:g}M{x:g},{y - r:g}V{y + r:g}"
    return tag("path", d=d, class_=cls)


def legend(names: Sequence[str], series: Sequence[int] | None = None, *, filled: bool = False) -> Html:
    """What each mark (or hatching) stands for; by default of the first series."""
    entries = []
    for i, name in zip(series or range(len(names)), names, strict=True):
        if filled:
            sign = tag("rect", x=1, y=1, width=26, height=12, fill=f"url(#h{i % KINDS})", class_="edge")
        else:
            sign = join([tag("line", x1=0, y1=7, x2=28, y2=7, class_=f"s{i % KINDS}"), mark(i, 14, 7)])
        entries.append(tag("li", tag("svg", sign, width=28, height=14, aria_hidden="true"), " ", name))
    return tag("ul", entries, class_="legend")


def bars(rows: Sequence[tuple[str, Sequence[float], str]], title: str) -> Html:
    """Stacked horizontal bars: (name, parts, what is written behind), parts in the order of the hatchings."""
    width, left, right, step = 720.0, 130.0, 90.0, 34.0
    longest = max(sum(parts) for _, parts, _ in rows) or 1.0
    drawn: list[Html] = []
    for k, (name, parts, remark) in enumerate(rows):
        x, y = left, 4 + k * step
        drawn.append(tag("text", clip(name, 19), x=left - 8, y=y + 17, class_="end"))
        for i, part in enumerate(parts):
            wide = part / longest * (width - left - right)
            if wide > 0:
                drawn.append(tag("rect", x=x, y=y, width=wide, height=24, fill=f"url(#h{i % KINDS})", class_="edge"))
            x += wide
        drawn.append(tag("text", remark, x=x + 6, y=y + 17))
    return svg(width, 8 + step * len(rows), title, drawn)


def intervals(rows: Sequence[tuple[int, str, float, Sequence[float] | None]], title: str, low: float) -> Html:
    """Scores with whiskers between ``low`` and 1: (series, name, score, interval)."""
    width, left, right, step = 340.0, 112.0, 52.0, 22.0
    height = len(rows) * step + 26

    def at(score: float) -> float:
        return left + (max(score, low) - low) / (1 - low) * (width - left - right)

    drawn: list[Html] = []
    for i in range(5):
        score = low + i * (1 - low) / 4
        drawn.append(tag("line", x1=at(score), x2=at(score), y1=2, y2=height - 22, class_="grid"))
        drawn.append(tag("text", f"{100 * score:.0f}", x=at(score), y=height - 6, class_="mid small"))
    for k, (series, name, score, interval) in enumerate(rows):
        y = 2 + step * (k + 0.5)
        drawn.append(tag("text", clip(name, 16), x=left - 8, y=y + 4, class_="end"))
        if interval is not None:
            a, b = at(interval[0]), at(interval[1])
            d = f"M{a:.1f},{y:g}H{b:.1f}M{a:.1f},{y - 4:g}v8M{b:.1f},{y - 4:g}v8"
            drawn.append(tag("path", d=d, class_=f"whisker s{series % KINDS} solid"))
        drawn.append(mark(series, at(score), y))
        drawn.append(tag("text", f"{100 * score:.1f}", x=width - 2, y=y + 4, class_="end"))
    return svg(width, height, title, drawn)


class Plane:
    """Axes of a chart with a linear or logarithmic scale each way."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        size: tuple[float, float] = (680.0, 280.0),
        logs: tuple[bool, bool] = (False, False),
    ) -> None:
        self.width, self.height = size
        self.logs = logs
        self.x, self.y = self._range(xs, logs[0]), self._range(ys, logs[1])

    @staticmethod
    def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
        values = [v for v in values if not log or v > 0] or [1.0]
        low, high = min(values), max(values)
        if log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            return (low, high) if high > low else (low, 10 * low)
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def _share(self, value: float, axis: int) -> float:
        low, high = (self.x, self.y)[axis]
        if self.logs[axis]:
            value, low, high = (math.log10(max(v, low)) for v in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where in the picture a point lies; outside of the axes on their edge."""
        width, height = self.width - _LEFT - 14, self.height - _TOP - _BOTTOM
        return _LEFT + self._share(x, 0) * width, self.height - _BOTTOM - self._share(y, 1) * height

    def chart(self, title: str, x_name: str, y_name: str, *content: Any) -> Html:
        """The whole picture: axes with their names, and what is drawn over them."""
        return svg(self.width, self.height, title, self._frame(x_name, y_name), content)

    def _frame(self, x_name: str, y_name: str) -> list[Html]:
        """Grid, numbers and names of the axes."""
        drawn = []
        for value in ticks(*self.x, log=self.logs[0]):
            px, _ = self.at(value, self.y[0])
            drawn.append(tag("line", x1=px, x2=px, y1=_TOP, y2=self.height - _BOTTOM, class_="grid"))
            drawn.append(tag("text", label(value), x=px, y=self.height - _BOTTOM + 15, class_="mid small"))
        for value in ticks(*self.y, log=self.logs[1]):
            _, py = self.at(self.x[0], value)
            drawn.append(tag("line", x1=_LEFT, x2=self.width - 14, y1=py, y2=py, class_="grid"))
            drawn.append(tag("text", label(value), x=_LEFT - 6, y=py + 4, class_="end small"))
        drawn.append(tag("text", x_name, x=(self.width + _LEFT) / 2, y=self.height - 6, class_="mid small"))
        turned = f"rotate(-90 12 {(self.height - _BOTTOM) / 2:g})"
        drawn.append(tag("text", y_name, x=12, y=(self.height - _BOTTOM) / 2, class_="mid small", transform=turned))
        return drawn

    def line(self, xs: Sequence[float], ys: Sequence[float], series: int) -> Html:
        """A line in the colour and dash of its series."""
        points = (self.at(x, y) for x, y in zip(xs, ys, strict=True))
        return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"line s{series % KINDS}")

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], series: int) -> Html:
        """What lies between two lines."""
        there = [self.at(x, y) for x, y in zip(xs, high, strict=True)]
        back = [self.at(x, y) for x, y in zip(xs, low, strict=True)][::-1]
        return tag(
            "polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in there + back), class_=f"band f{series % KINDS}"
        )


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers within a range."""
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        return [10.0**e for e in range(first, last + 1, max(1, -(-(last - first) // 6)))]
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A number beside an axis."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if 0 < abs(value) < 0.001 else f"{value:.4g}"


def heatmap(
    columns: Sequence[str], rows: Sequence[str], cells: dict[tuple[int, int], float], title: str, unit: str
) -> Html:
    """Values over (row, column): the darker the larger, and the number in every cell."""
    left, wide, step, top = 150.0, 44.0, 24.0, 20.0
    low, high = min(cells.values()), max(cells.values())
    drawn = [
        tag("text", name, x=left + wide * (i + 0.5), y=top - 6, class_="mid small") for i, name in enumerate(columns)
    ]
    for r, name in enumerate(rows):
        y = top + step * r
        drawn.append(tag("text", clip(name, 22), x=left - 8, y=y + 16, class_="end small"))
        for c in range(len(columns)):
            if (r, c) not in cells:
                continue
            value = cells[r, c]
            share = (value - low) / (high - low) if high > low else 0.5
            x = left + wide * c
            shade = min(9, int(10 * share))
            hint = tag("title", f"{name}, {columns[c]}: {value:.4g} {unit}")
            drawn.append(tag("rect", hint, x=x, y=y, width=wide - 2, height=step - 2, class_=f"cell q{shade}"))
            text = f"{value:.2f}" if value >= 1 else f"{value:.3f}"[1:]
            drawn.append(
                tag("text", text, x=x + wide / 2 - 1, y=y + 15, class_="mid figure on" if shade > 4 else "mid figure")
            )
    title = f"{title}, from {number(low, 3)} to {number(high, 3)} {unit}"
    return svg(left + wide * len(columns) + 4, top + step * len(rows) + 4, title, drawn)


def clip(text: str, length: int) -> str:
    """Text that fits; the beginning is what is cut."""
    return text if len(text) <= length else "…" + text[-(length - 1) :]
