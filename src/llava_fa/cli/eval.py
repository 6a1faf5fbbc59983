"""`llava-fa eval`: score an original or compressed model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.bounds import MOST_CLIPS, MOST_PICTURES
from llava_fa.cli import options
from llava_fa.cli.answering import Way
from llava_fa.cli.output import print_json, stdout
from llava_fa.eval.benchmarks import WHERE

GENERATED = {"world": 2250, "world-video": 300}
"""Tasks that need no files → about how many questions by default."""


def evaluate(
    model: Annotated[str, typer.Argument(help="`tiny`, a folder, or a hub id; original or compressed.")],
    task: Annotated[str, typer.Option(help=f"Which questions: {', '.join(WHERE)}.")] = "world",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark's official files (docs/benchmarks.md).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: answers, scores, submission; goes on where it stopped. Needed with --data."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run's folder: a paired test, and the questions that changed.")
    ] = None,
    limit: Annotated[
        int | None,
        options.count("About how many questions. [default: all; of the world 2250, of its clips 300]"),
    ] = None,
    seed: Annotated[int, options.seed("Of the world's test pictures.")] = 0,
    frames: Annotated[int | None, options.count("Of the task video: frames a clip is shown in. [default: 8]")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Of mmhal: base URL of an OpenAI-compatible judge; answers are sent there.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Which model the judge is.")] = None,
    blank: Annotated[bool, typer.Option(help="Show a grey picture instead: what is known without looking.")] = False,
    visual_tokens: options.VisualTokens = None,
    batch_size: Annotated[int | None, options.count("Questions at a time. [default: 16, of the world 64]")] = None,
    memory: Annotated[
        str | None,
        options.memory(
            "Memory that the model may take, such as `6GB`: an original that does not fit is read from the disk again "
            "for every token."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What runs the model: `transformers`, or `vllm`, started for this run.")
    ] = "transformers",
    engine_arg: options.EngineArgs = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a server that speaks OpenAI's API, such as http://127.0.0.1:8000/v1."),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(help="The model's name there. [default: the only one that the server lists]")
    ] = None,
    device: options.Device = "auto",
    ray: options.Ray = None,
    ray_gpus: options.RayGpus = None,
    json_output: options.Json = False,
) -> None:
    """Ask a benchmark's questions and score the answers by its official rules; by default those of the world."""
    refuse = options.refuse
    refuse(task not in WHERE, f"{task!r} is not one of {', '.join(WHERE)}", "--task")
    generated = task in GENERATED
    refuse(generated and data is not None, f"{task} needs no files", "--data")
    refuse(not generated and (data is None or out is None), f"{task} needs one", "--data" if data is None else "--out")
    refuse(not generated and seed, f"{task} has no seed", "--seed")
    refuse(task != "mmhal" and (judge or judge_model), f"{task} needs no judge", "--judge")
    refuse((judge is None) != (judge_model is None), "--judge and --judge-model go together", "--judge")
    refuse(task != "video" and frames is not None, f"{task} is not shown in frames of yours", "--frames")
    most = MOST_CLIPS if task == "world-video" else MOST_PICTURES
    refuse(generated and limit is not None and limit > most, f"at most {most} are drawn of {task}", "--limit")
    way = Way(engine, tuple(engine_arg or ()), endpoint, endpoint_model, device, visual_tokens, memory, ray, ray_gpus)
    way.check()
    from llava_fa.cli.progress import counting
    from llava_fa.eval.benchmarks import benchmark
    from llava_fa.eval.benchmarks.run import run

    settings = {"limit": limit or GENERATED[task], "seed": seed} if generated else {}
    if task == "video":
        settings = {"frames": frames or 8}
    if task == "mmhal":
        settings = {"judge": judge, "judge_model": judge_model, "reviews": str(out / "reviews.jsonl") if out else None}
    with contextlib.ExitStack() as stack, counting("answering") as progress:
        result = run(
            benchmark(task, data or Path(), **settings),
            lambda: way.answerer(model, stack),
            model=model,
            out=out,
            limit=None if generated else limit,
            blank=blank,
            visual_tokens=way.tokens_noted(),
            through=way.noted(),
            batch_size=batch_size or (64 if generated else 16),
            against=against,
            progress=progress,
        )
    if json_output:
        print_json(result)
    else:
        _show(model, result)


def _show(model: str, result: dict[str, Any]) -> None:
    console = stdout()
    console.print(task_table(f"{model}, {result['task']}", result))
    others = [f"{name} {value:.4g}" for name, value in result["figures"].items() if isinstance(value, (int, float))]
    if result["task"] not in GENERATED and others:
        console.print(", ".join(others))
    if result.get("visual_tokens_cost"):
        console.print(cost_line(result["visual_tokens_cost"]))
    if "against" in result:
        console.print(against_line(result))
    if result["out"]:
        console.print(f"[dim]answers, scores and submission are in {result['out']}[/]")


def cost_line(cost: dict[str, Any]) -> str:
    """What choosing the number of visual tokens came to."""
    sets = ", ".join(f"{questions} questions {count}" for count, questions in cost["enough"].items())
    return (
        f"visual tokens: {cost['mean_tokens']:.1f} were enough on average ({sets}); {cost['tokens_spent']:.1f} were "
        f"read, and {100 * cost['flops_share']:.0f} % of the operations of asking once with all of them"
    )


def against_line(result: dict[str, Any]) -> str:
    """What the comparison with another run came to."""
    comparison, scale = result["against"], 100 if result["percent"] else 1
    text = f"against {comparison['run']}: "
    if "p" in comparison:
        text += (
            f"{scale * comparison['difference']:+.1f} "
            f"({' to '.join(f'{scale * end:+.1f}' for end in comparison['interval'])}), "
            f"p = {comparison['p']:.2g} ({comparison['test']}); "
        )
    text += f"{comparison['lost']} questions lost, {comparison['gained']} gained, "
    text += f"{comparison['answers_that_differ']} answers differ"
    return text + (f"; which: {result['out']}/changes.json" if result["out"] else "")


def task_table(title: str, result: dict[str, Any]) -> Any:
    """One row a part, and the headline with its interval."""
    from rich.table import Table

    table = Table(title=f"{title}: {result['questions']} questions in {result['seconds']:.0f} s", title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("score", "95 %", "questions"):
        table.add_column(heading, justify="right")
    for name, part in result["tasks"].items():
        table.add_row(name, part["metric"], *_figures(part, 100), str(part["questions"]))
    table.add_section()
    headline = _figures(result, 100 if result["percent"] else 1)
    table.add_row("all", result["metric"], *headline, str(result["questions"]))
    return table


def _figures(score: dict[str, Any], scale: int) -> tuple[str, str]:
    if score["score"] is None:
        return "not known here", ""
    return f"{scale * score['score']:.1f}", "–".join(f"{scale * end:.1f}" for end in score["interval"])
