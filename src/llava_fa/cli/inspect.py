"""`llava-fa inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_fa.cli import options, output
from llava_fa.cli.tables import show_report


def inspect(
    path: Annotated[str, typer.Argument(help="A compressed or original model: folder, hub id or `tiny`.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every layer, not only the worst.")] = False,
    json_output: options.Json = False,
) -> None:
    """Show what a model is made of: bits, size, each layer's errors, and what is not compressed."""
    from llava_fa.hub.inspect import inspect_model

    report = inspect_model(path)
    if json_output:
        output.print_json(report.to_dict())
    else:
        show_report(report, all_layers=layers)
