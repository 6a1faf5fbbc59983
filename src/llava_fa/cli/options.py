"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="`tiny`, a folder (compressed or not), or a hub id.")]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, …")]
Images = Annotated[Path | None, typer.Option(help="Image folder of the LLaVA JSON. [default: the JSON's own folder]")]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Take the next row for one that cannot be used; list those left out."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Throw an interrupted run's work away, do not resume.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
VisualTokens = Annotated[
    str | None,
    typer.Option(
        help="Tokens per picture, or `auto`: as few as each question needs. [default: as the model was saved]"
    ),
]
# Of the commands that listen:
Host = Annotated[str, typer.Option(help="Address to listen on; by default only this machine can connect.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
MaxImage = Annotated[int, typer.Option(min=1, help="Bytes of a picture, as encoded.")]
JsonOnceListening = Annotated[bool, typer.Option("--json", help="Print one JSON object once it listens.")]


def refuse(wrong: object, message: str, option: str | None = None) -> None:
    """Wrong usage, exit code 2, if ``wrong`` is anything but false, none or empty."""
    if wrong:
        raise typer.BadParameter(message, param_hint=option)


def elastic(value: str | None) -> tuple[int | None, bool]:
    """``--visual-tokens``: (number or None, whether it is to be chosen for every question)."""
    if value is None or value == "auto":
        return None, value == "auto"
    refuse(not value.isdecimal(), f"{value!r} is neither a number nor auto", "--visual-tokens")
    return int(value), False
