"""Arguments and options that several commands have, and how options that are numbers are checked.

A number has bounds that are checked when the line is read, before anything is loaded or written: `whole` and `real`
are the only ways to declare one (`tests/cli/test_cli_numbers.py` sees to it).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from llava_fa.bounds import COUNT, MOST_BYTES, SEED, is_text
from llava_fa.config import Budget, size_of
from llava_fa.errors import FourierError


def refuse(wrong: object, message: str, option: str | None = None) -> None:
    """Wrong usage, exit code 2, if ``wrong`` is anything but false, none or empty."""
    if wrong:
        raise typer.BadParameter(message, param_hint=option)


def whole(low: int, high: int, help: str, *names: str, **more: Any) -> Any:
    """An option that is an integer from ``low`` to ``high``."""
    return typer.Option(*names, min=low, max=high, help=help, **more)


def real(low: float, high: float, help: str, *names: str, **more: Any) -> Any:
    """An option that is a finite number from ``low`` to ``high``."""
    return typer.Option(*names, min=low, max=high, help=help, callback=_no_nan, **more)


def _no_nan(value: float | None) -> float | None:
    refuse(value is not None and math.isnan(value), "it is not a number")  # neither below nor above any bound
    return value


_ADDRESS = re.compile(r"auto|[\w.\[\]:-]+:\d+|\w+://.*")


class WithRay(TyperCommand):
    """A command whose ``--ray`` may stand without its address, which then is ``auto``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See typer: the address is put in where it is left out."""
        given = list(args)
        for place in [index for index, word in enumerate(args) if word == "--ray"][::-1]:
            if not _ADDRESS.fullmatch("".join(given[place + 1 : place + 2])):
                given.insert(place + 1, "auto")
        return super().parse_args(ctx, given)


def count(help: str, **more: Any) -> Any:
    """An option that counts something: at least 1."""
    return whole(1, COUNT, help, **more)


def seed(help: str) -> Any:
    """An option that is a seed."""
    return whole(0, SEED, help)


def text(value: str) -> str:
    """The callback of what a model is asked."""
    refuse(not is_text(value), "it holds bytes that are not UTF-8")
    return value


def _size(text: str) -> str:
    try:
        Budget(size=text)  # type: ignore[arg-type]  # text becomes bytes
    except FourierError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _memory(text: str) -> str:
    try:
        size_of(text, "memory")
    except FourierError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _tokens_or_auto(text: str) -> str:
    number = text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0
    refuse(text != "auto" and not number, f"{text[:40]!r} is neither a number nor auto")
    return text


def elastic(value: str | None) -> tuple[int | None, bool]:
    """``--visual-tokens``: (number or None, whether it is to be chosen for every question)."""
    return (None if value in (None, "auto") else int(value)), value == "auto"  # type: ignore[arg-type]


Model = Annotated[str, typer.Argument(help="`tiny`, a folder (compressed or not), or a hub id.")]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, …")]
Images = Annotated[Path | None, typer.Option(help="Image folder of the LLaVA JSON. [default: the JSON's own folder]")]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Take the next row for one that cannot be used; list those left out."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Throw an interrupted run's work away, do not resume.")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Share the work out over a cluster of Ray: HOST:PORT of its head, or nothing, for the one that runs here, "
        "or else for this machine alone (docs/cluster.md). The result is the same.",
    ),
]
RayGpus = Annotated[
    float | None,
    real(
        0,
        8,
        "With --ray: GPUs for each worker; 0.5: two share one. [default: 1, if there are any]",
        "--ray-gpus",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
Size = Annotated[
    str | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Budget for the size of the whole model, such as `1.1GB`; instead of --bits.",
    ),
]


def memory(says: str) -> Any:
    """``--memory SIZE``, and what may take so much."""
    return typer.Option(parser=_memory, metavar="SIZE", help=f"{says} [default: what is free]")


MaxTokens = Annotated[int, count("Longest answer, in tokens.")]
VisualTokens = Annotated[
    str | None,
    typer.Option(
        parser=_tokens_or_auto,
        metavar="N|auto",
        help="Tokens per picture, or `auto`: as few as each question needs. [default: as the model was saved]",
    ),
]
SavedVisualTokens = Annotated[int | None, count("Tokens per picture. [default: as the model was saved]")]
ENGINES = ("auto", "transformers", "vllm")
Engine = Annotated[
    str, typer.Option(help="What runs the model: `vllm`, `transformers`, or `auto`, vLLM where it can serve the model.")
]
EngineArgs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="An argument of vLLM's own, as --engine-arg=--max-model-len=4096; may be given repeatedly."
    ),
]
# Of the commands that listen:
Host = Annotated[str, typer.Option(help="Address to listen on; by default only this machine can connect.")]
Port = Annotated[int, whole(0, 65535, "Port to listen on; 0 takes a free one.")]
MaxImage = Annotated[int, whole(1, MOST_BYTES, "Bytes of a picture, as encoded.")]
JsonOnceListening = Annotated[bool, typer.Option("--json", help="Print one JSON object once it listens.")]


def address(ray: str) -> str | None:
    """``--ray``: of the cluster's head; None for the one that is found."""
    return None if ray == "auto" else ray
