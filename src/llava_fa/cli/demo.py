"""`llava-fa demo`: the main job on the embedded model, from checkpoint to one table."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.bounds import MOST_PICTURES
from llava_fa.cli import options
from llava_fa.cli.output import given_command, print_json, stderr, stdout, writing
from llava_fa.cli.report import write_report
from llava_fa.config import format_size

METHODS = ("best", "paper")
BITS = (4.0, 3.0, 2.0)


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the compressed models and `demo.json`.")] = Path("demo-out"),
    model: Annotated[str, typer.Option(help="Which model; any that `compress` takes.")] = "tiny",
    limit: Annotated[int, options.whole(9, MOST_PICTURES, "About how many held-out questions.")] = 900,
    samples: Annotated[int, options.whole(1, MOST_PICTURES, "Calibration samples, for `best`.")] = 64,
    seed: Annotated[int, options.seed("Of questions and calibration samples.")] = 0,
    json_output: options.Json = False,
) -> None:
    """Compress the embedded model by both methods at 4, 3 and 2 bits, evaluate, print one table and write a report.

    The folder is made anew: the compressed models of an earlier demo in it are replaced.
    """
    from llava_fa.eval.report.collect import Settings
    from llava_fa.hub.source import open_source, resolve_model

    folder = resolve_model(model)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    answers: dict[str, Any] = {model: _evaluate(model, limit, seed)}
    size = {"bits_per_weight": 16.0, "bytes": open_source(folder).nbytes, "worst_layer": None, "worst_error": None}
    rows = [{"name": "original", **_without_answers(answers[model]), **size}]
    rows += _compressed(model, out, limit, samples, seed, answers)
    page = out / "report.html"
    settings = Settings(limit=limit, divergence=45, seed=seed)
    write_report([name for name in answers if name != model], model, settings, page, [given_command(context)], answers)
    summary = {"model": model, "seed": seed, "questions": rows[0]["questions"]}
    result = {**summary, "report": str(page), "rows": rows}
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    if json_output:
        print_json(result)
        return
    stdout().print(table(rows))
    for row in rows[1:]:
        stdout().print(f"worst layer of {row['name']}: {row['worst_layer']} (error {row['worst_error']:.3f})")
    best = out / "best-2bit"
    stdout().print(f"\nThe models are in {out}, and a report on them is {page}.")
    stdout().print(f"Try: llava-fa inspect {best}")


def _compressed(
    model: str, out: Path, limit: int, count: int, seed: int, answers: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Each row; what was answered goes to ``answers`` under the folder's name."""
    from llava_fa.cli.progress import layer_progress
    from llava_fa.config import FourierConfig
    from llava_fa.hub.compress import carry_out
    from llava_fa.hub.request import CompressionRequest
    from llava_fa.world.samples import calibration_samples

    samples = calibration_samples(count, seed)
    for method in METHODS:
        # the paper's only use of data, ODC, weighs the low-rank part, and there is none here: nothing would change
        calibration = samples if method == "best" else None
        for bits in BITS:
            name = f"{method}-{bits:g}bit"
            stderr().print(f"[bold]{name}[/]")
            shutil.rmtree(out / name, ignore_errors=True)
            request = CompressionRequest(
                model=model,
                config=FourierConfig(method=method, bits=bits, seed=seed),
                calibration=calibration,
                command=equivalent(model, method, bits, count, seed),
            )
            with layer_progress() as progress:
                report = carry_out(request, out / name, fresh=True, progress=progress)
            worst = report.worst
            answers[str(out / name)] = _evaluate(out / name, limit, seed)
            yield {
                "name": name,
                **_without_answers(answers[str(out / name)]),
                "bits_per_weight": report.bits_per_weight,
                "bytes": report.compressed_bytes,
                "worst_layer": worst and worst.name,
                "worst_error": worst and (worst.output_error if worst.output_error is not None else worst.weight_error),
                "compress_seconds": report.seconds,
            }


def equivalent(model: str, method: str, bits: float, samples: int, seed: int) -> str:
    """The command that makes the same folder as the demo does."""
    words = ["llava-fa", "compress", model, "OUT", "--method", method, "--bits", f"{bits:g}", "--seed", str(seed)]
    if method == "best":
        words += ["--calibration", "world", "--samples", str(samples)]
    return shlex.join(words)


def _without_answers(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "answers"}


def _evaluate(model: str | Path, limit: int, seed: int) -> dict[str, Any]:
    from llava_fa.cli.progress import counting
    from llava_fa.eval.runner import evaluate_world
    from llava_fa.hub.loading import load

    loaded, processor = load(model)
    with counting(f"answering with {model}") as progress:
        return evaluate_world(loaded, processor, limit=limit, seed=seed, progress=progress)


def table(rows: list[dict[str, Any]]) -> Any:
    """One column a model; bits, size, accuracy and each task in the rows."""
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"{rows[0]['questions']} held-out questions, scores in %"
    shown = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for row in rows:
        shown.add_column(row["name"].replace("-", "\n"), justify="right", no_wrap=True)
    shown.add_row("bits/weight", *(f"{row['bits_per_weight']:.2f}" for row in rows))
    shown.add_row("size", *(format_size(row["bytes"]) for row in rows))
    shown.add_section()
    for task in rows[0]["tasks"]:
        shown.add_row(task, *(f"{100 * row['tasks'][task]['score']:.1f}" for row in rows))
    shown.add_section()
    shown.add_row("accuracy", *(f"{100 * row['accuracy']:.1f}" for row in rows))
    return shown
