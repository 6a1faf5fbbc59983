"""`llava-fa explain` and `llava-fa flops`: what an answer rests on, and what it costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_fa.bounds import COUNT
from llava_fa.cli import options, output


def explain(
    model: options.Model,
    question: Annotated[str, typer.Option(help="What to ask.", callback=options.text)],
    image: Annotated[Path, typer.Option(help="The picture to ask about.")],
    out: Annotated[Path, typer.Option(help="Where the picture with its saliency goes (PNG).")] = Path("explain.png"),
    visual_tokens: options.SavedVisualTokens = None,
    device: options.Device = "auto",
    json_output: options.Json = False,
) -> None:
    """Show which part of a picture an answer rests on (Grad-CAM), with and without FMVR where the model has it."""
    from llava_fa.data.pictures import open_picture
    from llava_fa.eval.explain import compare_restoration, draw
    from llava_fa.hub.loading import load

    picture = open_picture(image.expanduser(), "--image")
    loaded, processor = load(model, device, visual_tokens=visual_tokens)
    explanations = compare_restoration(loaded, processor, picture, question)
    new = out.expanduser().with_name(f".{out.name}.new")
    with output.writing(out, "Give a writable path"):
        draw(picture, explanations).save(new, format="PNG")
        os.replace(new, out.expanduser())
    if json_output:
        rows = {
            name: {
                "answer": one.answer,
                "log_probability": one.log_probability,
                "saliency": [[round(value, 4) for value in row] for row in one.saliency.tolist()],
            }
            for name, one in explanations.items()
        }
        output.print_json({"picture": str(out), "explanations": rows})
    else:
        for name, one in explanations.items():
            output.stdout().print(f"{name}: {one.answer}  [dim](log-probability {one.log_probability:.2f} a token)[/]")
        output.stdout().print(f"left to right in {out}: the picture, {', '.join(explanations)}")


def flops(
    model: Annotated[str, typer.Argument(help="`tiny`, a folder with a config.json, or a hub id.")],
    text: Annotated[int, options.count("Tokens of the prompt besides the picture.")] = 32,
    pictures: Annotated[int, options.count("Pictures, tiles or frames.")] = 1,
    generated: Annotated[int, options.whole(0, COUNT, "Tokens generated after the first.")] = 0,
    json_output: options.Json = False,
) -> None:
    """Count the operations of a question for every number of visual tokens, from config.json alone."""
    from llava_fa.hub.flops import count_flops, read_model_config
    from llava_fa.hub.visual_tokens import grid_of
    from llava_fa.nn.visual_tokens import VisualTokens

    config = read_model_config(model)
    counts = VisualTokens(grid_of(config), 1, "pooling").counts
    question = {"text": text, "pictures": pictures, "generated": generated}
    rows = {count: count_flops(config, visual_tokens=count, **question) for count in counts}
    if json_output:
        by_count = {count: row.to_dict() for count, row in rows.items()}
        output.print_json({"model": model, "text": text, "visual_tokens": by_count})
        return
    from rich.table import Table

    table = Table(
        title=f"{model}: GFLOPs of reading {text} text tokens and {pictures} picture(s)", title_justify="left"
    )
    for heading in ("visual tokens", "vision tower", "projector", "language model", "saved", "total", "saved"):
        table.add_column(heading, justify="right")
    full = rows[counts[0]]
    for count, row in rows.items():
        less = (1 - row.language_model / full.language_model, 1 - row.total / full.total)
        table.add_row(
            str(count),
            *(f"{part / 1e9:.4g}" for part in (row.vision_tower, row.projector, row.language_model)),
            f"{100 * less[0]:.1f} %",
            f"{row.total / 1e9:.4g}",
            f"{100 * less[1]:.1f} %",
        )
    output.stdout().print(table)
