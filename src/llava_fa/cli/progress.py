"""How progress looks: a bar on a terminal's stderr, otherwise lines of text, not too often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from llava_fa.cli import output
from llava_fa.config import format_size

if TYPE_CHECKING:
    from llava_fa.hub.report import Progress, ProgressCallback

PLAIN_SECONDS = 10.0
"""Without a terminal, progress is a line of text at most this often."""


def _bar(console: Console, *columns: Any, shown: bool = True) -> Bar:
    """A bar with these columns; without a terminal it stays invisible."""
    return Bar(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


@contextmanager
def layer_progress() -> Iterator[ProgressCallback]:
    """A callback that shows layer, rate, time left and peak memory of a compression."""
    console = output.stderr()
    columns = (
        TextColumn("{task.fields[stage]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}  {task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[layer]}"),
    )
    with _bar(console, *columns) as bar:
        task = bar.add_task("", total=None, stage="reading", count="", figures="", layer="")
        clock, last = _Clock(), -PLAIN_SECONDS
        workers: dict[str, str] = {}

        def update(progress: Progress) -> None:
            nonlocal last
            count, figures, now = f"{progress.done}/{progress.total}", clock.figures(progress), time.monotonic()
            bar.update(task, total=progress.weights_total, completed=progress.weights_done)
            name = progress.name
            if progress.worker:
                workers[progress.worker] = name
                name = ", ".join(f"{worker}: {at}" for worker, at in workers.items() if at)
            bar.update(task, stage=progress.stage, count=count, figures=figures, layer=name)
            if console.is_terminal or (now - last < PLAIN_SECONDS and progress.done < progress.total):
                return
            last = now
            parts = (f"{progress.stage} {count}", figures, name)
            console.print("  ".join(part for part in parts if part), markup=False)

        yield update


class _Clock:
    """Rate and time left, from the weights done since a stage began (resumed ones cost no time)."""

    def __init__(self) -> None:
        self.stage, self.start, self.first = "", 0.0, 0

    def figures(self, progress: Progress) -> str:
        from llava_fa.hub.report import peak_rss_bytes

        if progress.stage != self.stage:
            self.stage, self.start, self.first = progress.stage, time.monotonic(), progress.weights_done
        elapsed, done = time.monotonic() - self.start, progress.weights_done - self.first
        memory = f"peak {format_size(peak_rss_bytes())}"
        if elapsed <= 0 or done <= 0:
            return memory
        left = (progress.weights_total - progress.weights_done) * elapsed / done
        rate = done / elapsed
        speed = f"{rate / 1e6:.2f} M" if rate >= 1e5 else f"{rate / 1e3:.1f} k"
        return f"{speed} weights/s, {output.duration(left)} left, {memory}"


@contextmanager
def training_progress(shown: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for log entries of a training; without a terminal a line each."""
    console = output.stderr()
    terms_column = TextColumn("{task.fields[terms]}")
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        terms_column,
        TimeRemainingColumn(),
    )
    with _bar(console, *columns, shown=shown) as bar:
        task = bar.add_task("training", total=None, terms="")

        def update(row: dict[str, Any]) -> None:
            names = ("loss", "cross_entropy", "divergence", "hidden")
            terms = ", ".join(f"{name.replace('_', '-')} {row[name]:.4f}" for name in names if name in row)
            bar.update(task, completed=row["step"], total=row["of"], terms=terms)
            if shown and not console.is_terminal:
                console.print(f"step {row['step']}/{row['of']}  {terms}", markup=False)

        yield update


@contextmanager
def step_progress(first: str = "reading", plain: bool = True) -> Iterator[Callable[[str, int, int | None], None]]:
    """A (what, done, all) callback; ``first`` is shown before its first call, ``plain``: lines without a terminal."""
    console = output.stderr()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with _bar(console, *columns) as bar:
        task, current, last = bar.add_task(first, total=None), first, time.monotonic()

        def update(what: str, done: int, total: int | None) -> None:
            nonlocal current, last
            if what != current:
                bar.reset(task, description=what, total=total)
                current = what
            bar.update(task, completed=done, total=total)
            if plain and not console.is_terminal and time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                console.print(f"{what} {done}/{total}", markup=False)

        yield update


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A (done, all) callback that shows a bar on a terminal's stderr, and nothing elsewhere."""
    with step_progress(what, plain=False) as update:
        yield lambda done, total: update(what, done, total)


def parts_read() -> Callable[[str], None]:
    """A callback that is told of every part of a model read from the disk, and says so now and then."""
    console, last = output.stderr(), -PLAIN_SECONDS

    def update(part: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            console.print(f"larger than memory: reading {part}", markup=False)

    return update
