"""`llava-fa eval`: score an original or compressed model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.cli.output import VISUAL_TOKENS, print_json, stderr, stdout, visual_tokens_option
from llava_fa.errors import FourierError

SUITES = ("world", "video")


def evaluate(
    model: Annotated[str, typer.Argument(help="`tiny`, a folder, or a hub id; original or compressed.")],
    suite: Annotated[str, typer.Option(help=f"Which questions: {', '.join(SUITES)}.")] = "world",
    limit: Annotated[
        int, typer.Option(min=9, help="About how many questions (of clips a seventh), shared equally by the tasks.")
    ] = 2250,
    seed: Annotated[int, typer.Option(help="Of the test pictures.")] = 0,
    blank: Annotated[bool, typer.Option(help="Show a grey picture instead: what is known without looking.")] = False,
    visual_tokens: Annotated[str | None, typer.Option(help=VISUAL_TOKENS)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    answers: Annotated[Path | None, typer.Option(help="Also write every answer to this JSON file.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Answer held-out questions and score each task with its namesake's metric."""
    if suite not in SUITES:
        raise typer.BadParameter(f"{suite!r} is not one of {', '.join(SUITES)}", param_hint="--suite")
    count, elastic = visual_tokens_option(visual_tokens)
    from llava_fa.eval.runner import evaluate_video, evaluate_world
    from llava_fa.hub.loading import load

    loaded, processor = load(model, device, visual_tokens=count)
    with counting("answering") as progress:
        result = (evaluate_world if suite == "world" else evaluate_video)(
            loaded,
            processor,
            limit=limit if suite == "world" else max(9, limit // 7),
            seed=seed,
            blank=blank,
            batch_size=batch_size,
            elastic=elastic,
            progress=progress,
        )
    rows = result.pop("answers")
    if answers is not None:
        try:
            answers.write_text(json.dumps(rows, indent=1))
        except OSError as error:
            raise FourierError(str(error.strerror), remedy="Give a writable path", where=str(answers)) from None
    result = {"model": model, "suite": suite, "seed": seed, "blank": blank, **result}
    if json_output:
        print_json(result)
    else:
        stdout().print(task_table(model, result))
        if elastic:
            stdout().print(cost_line(result["visual_tokens"]))


def cost_line(cost: dict[str, Any]) -> str:
    """What choosing the number of visual tokens came to."""
    sets = ", ".join(f"{questions} questions {count}" for count, questions in cost["enough"].items())
    return (
        f"visual tokens: {cost['mean_tokens']:.1f} were enough on average ({sets}); {cost['tokens_spent']:.1f} were "
        f"read, and {100 * cost['flops_share']:.0f} % of the operations of asking once with all of them"
    )


def task_table(title: str, result: dict[str, Any]) -> Any:
    """One row a task, and the mean."""
    from rich.table import Table

    table = Table(title=f"{title}: {result['questions']} questions in {result['seconds']:.0f} s", title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("score", "95 %", "questions"):
        table.add_column(heading, justify="right")
    for name, task in result["tasks"].items():
        table.add_row(name, task["metric"], *_figures(task["score"], task["interval"]), str(task["questions"]))
    table.add_section()
    mean = _figures(result["accuracy"], result["interval"])
    table.add_row("accuracy", "mean of the tasks", *mean, str(result["questions"]))
    return table


def _figures(score: float, interval: list[float]) -> tuple[str, str]:
    return f"{100 * score:.1f}", f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A (done, all) callback that shows a bar on a terminal's stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
