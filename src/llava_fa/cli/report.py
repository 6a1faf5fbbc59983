"""`llava-fa report`: models, their errors and their answers in one HTML file."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.bounds import MOST_PICTURES
from llava_fa.cli import options, output
from llava_fa.config import format_size
from llava_fa.errors import FourierError


def report(
    context: typer.Context,
    runs: Annotated[
        list[str], typer.Argument(help="Compressed model folders, and results of `eval --json` (.json files).")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    original: Annotated[
        str | None,
        typer.Option(help="What they were compressed from (`tiny`, a folder, a hub id): to compare."),
    ] = None,
    limit: Annotated[
        int, options.whole(0, MOST_PICTURES, "About how many held-out questions of the world; 0 asks none.")
    ] = 450,
    seed: Annotated[int, options.seed("Of the questions' pictures.")] = 0,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer whose spectra are shown, name or pattern; repeatable. [default: each part's worst]"),
    ] = None,
    device: options.Device = "auto",
    json_output: options.Json = False,
) -> None:
    """Write one self-contained HTML file to hand on: bytes, accuracy, divergence, layers, answers, commands."""
    from llava_fa.eval.report.collect import Settings

    settings = Settings(limit=limit, seed=seed, device=device, layers=tuple(layer or ()))
    summary = write_report(runs, original, settings, out, [output.given_command(context)])
    if json_output:
        output.print_json(summary)
    else:
        output.stdout().print(f"{summary['report']} ({format_size(summary['bytes'])})", soft_wrap=True)


def write_report(
    models: list[str],
    original: str | None,
    settings: Any,
    out: Path,
    commands: list[str],
    answered: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure, write the file, and say what it shows."""
    from llava_fa.cli.progress import step_progress
    from llava_fa.errors import disk_errors
    from llava_fa.eval.report.answers import mean_divergence
    from llava_fa.eval.report.collect import collect
    from llava_fa.eval.report.page import page
    from llava_fa.hub.shards import write_text

    out = out.expanduser().absolute()
    if out.is_dir() or not out.parent.is_dir():
        what = "this is a folder" if out.is_dir() else "no such folder"
        raise FourierError(
            what, remedy="Give a file in a folder that exists", where=str(out if out.is_dir() else out.parent)
        )
    work = out.with_name(f"{out.name}.partial")
    with step_progress() as tell:
        results = collect(models, original, settings, work, tell, answered)
    text = page(results, commands, datetime.date.today())
    with disk_errors(out):
        write_text(out, text)
    shutil.rmtree(work, ignore_errors=True)
    rows = [
        {
            "name": run.name,
            "bits_per_weight": run.report and run.report.bits_per_weight,
            "bytes": run.report and run.report.compressed_bytes,
            "accuracy": {suite: result["accuracy"] for suite, result in run.scores.items()},
            "divergence": mean_divergence(run),
            "differing": run.differing if run.differences else None,
        }
        for run in results.runs
    ]
    return {"report": str(out), "bytes": len(text.encode()), "models": rows}
