"""`llava-fa inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_fa.cli import options, output
from llava_fa.cli.tables import show_preview, show_report
from llava_fa.config import MAX_BITS, MIN_BITS, FourierConfig


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A compressed or original model: folder, hub id or `tiny`. With --bits a config.json does."
        ),
    ],
    bits: Annotated[
        float | None,
        options.real(
            MIN_BITS,
            MAX_BITS,
            "Preview from config.json alone, no weight is read: what compressing to so many bits (1 to 4 by halves) "
            "would give.",
        ),
    ] = None,
    embeddings: Annotated[
        float | None,
        options.real(MIN_BITS, MAX_BITS, "With --bits: the embeddings compressed too, as `compress` does it."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer, not only the worst.")] = False,
    json_output: options.Json = False,
) -> None:
    """Show what a model is made of: bits, size, each layer's errors, and what is not compressed."""
    options.refuse(embeddings is not None and bits is None, "it goes with --bits", "--embeddings")
    options.refuse(layers and bits is not None, "a preview has no layers' errors to list", "--layers")
    if bits is not None:
        from llava_fa.hub.preview import preview

        made = preview(path, FourierConfig(bits=bits), embeddings)
        output.print_json(made.to_dict()) if json_output else show_preview(made)
        return
    from llava_fa.hub.inspect import inspect_model

    report = inspect_model(path)
    if json_output:
        output.print_json(report.to_dict())
    else:
        show_report(report, all_layers=layers)
