"""`llava-fa world`: look at the generated world, and train the tiny model in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.bounds import MOST_PICTURES, MOST_PROCESSES
from llava_fa.cli import options
from llava_fa.cli.output import command, print_json, stderr, stdout, writing

world = typer.Typer(
    help="The generated world: sample its pictures and questions, train the tiny model.", no_args_is_help=True
)


def sample(
    out: Annotated[Path, typer.Argument(help="Folder for the pictures and their questions (LLaVA-format JSON).")],
    count: Annotated[
        int, options.whole(1, MOST_PICTURES, "About how many questions, shared equally by the tasks.")
    ] = 45,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seed: Annotated[int, options.seed("Of the pictures.")] = 0,
    json_output: options.Json = False,
) -> None:
    """Write pictures, ``questions.json`` in the LLaVA format, and ``overview.png`` with all of it at a glance."""
    options.refuse(
        split not in ("train", "validation", "test"), f"{split!r} is not one of train, validation, test", "--split"
    )
    from llava_fa.world.gallery import write_gallery
    from llava_fa.world.questions import TASKS
    from llava_fa.world.samples import samples

    drawn = samples(split, seed, -(-count // len(TASKS)))  # type: ignore[arg-type]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        questions, overview = write_gallery(drawn, out)
    if json_output:
        print_json({"questions": len(drawn), "file": str(questions), "overview": str(overview)})
    else:
        stdout().print(f"{len(drawn)} questions in {questions}; a look at them in {overview}")


def train(
    out: Annotated[Path, typer.Argument(help="Folder for state, log and model; an earlier run there is resumed.")],
    vision_steps: Annotated[int, options.count("Steps of dense supervision of the vision tower.")] = 1200,
    steps: Annotated[int, options.count("Steps on questions; raise it to continue a finished run.")] = 8000,
    cooldown: Annotated[int, options.count("How many of the last steps lower the rate.")] = 1500,
    start: Annotated[str, typer.Option(help="With --visual-tokens or --experts: the model to go on from.")] = "tiny",
    visual_tokens: Annotated[
        str | None,
        typer.Option(help="Teach a trained model to answer from any number of tokens: fmvr or pooling."),
    ] = None,
    experts: Annotated[
        int | None, options.whole(2, 256, "Turn a trained model into a mixture of so many experts, an even number.")
    ] = None,
    device: options.Device = "auto",
    workers: Annotated[int, options.whole(0, MOST_PROCESSES, "Processes that draw pictures.")] = 1,
    seed: Annotated[int, options.seed("Of weights and pictures.")] = 1,
    json_output: options.Json = False,
) -> None:
    """Train the tiny LMM from nothing, the recipe behind the embedded model; or teach a trained one more."""
    known = visual_tokens in (None, "fmvr", "pooling")
    options.refuse(not known, f"{visual_tokens!r} is not one of fmvr, pooling", "--visual-tokens")
    options.refuse(
        None not in (visual_tokens, experts), "visual tokens and experts are learnt one after the other", "--experts"
    )
    import torch

    from llava_fa.world.elastic import elastic_recipe
    from llava_fa.world.mixture import mixture_recipe
    from llava_fa.world.recipe import Recipe
    from llava_fa.world.training import log_to
    from llava_fa.world.training import train as run

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if experts is not None:
        recipe = mixture_recipe(experts, steps, start=start, seed=seed)
    elif visual_tokens is None:
        recipe = Recipe(vision_steps=vision_steps, language_steps=steps, cooldown_steps=cooldown, seed=seed)
    else:
        recipe = elastic_recipe(visual_tokens, steps, start=start, seed=seed)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    log = log_to(out / "log.jsonl")
    last: dict[str, Any] = {}

    def report(row: dict[str, Any]) -> None:
        last.update(row)
        log(row)
        stderr().print(json.dumps(row), markup=False)

    run(out, recipe, device=place, workers=workers, report=report)
    if json_output:
        print_json({"model": str(out / "model"), **last})
    else:
        stdout().print(f"the model is in {out / 'model'}; `llava-fa eval {out / 'model'}` scores it")


world.command()(command(sample))
world.command()(command(train))
