"""What all commands share: where output goes, how errors end, how numbers look.

stdout carries the result (with ``--json``: one object and nothing else); progress, notes and errors go to
stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from llava_fa.errors import FourierError, explained

P, R = ParamSpec("P"), TypeVar("R")


_NOT_GIVEN = ("json_output", "fresh", "ray", "ray_gpus")


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A function as a command: a `FourierError` becomes its message and exit code 1, never a traceback.

    Under ``--json`` (a ``json`` parameter that is true) stdout still carries one object: ``{"error": {…}}``.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        quiet_libraries()
        try:
            return function(*args, **kwargs)
        except FourierError as error:
            if kwargs.get("json_output"):
                parts = {"what": error.what, "remedy": error.remedy, "where": error.where}
                print_json({"error": {"message": str(error), **parts}})
            stderr().print(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            stderr().print("[bold red]stopped.[/] Finished work is kept; the same command resumes.")
            raise typer.Exit(1) from None

    return run


def given_command(context: typer.Context, **instead: str) -> str:
    """The running command as it was typed, as one line of shell, without what changes nothing of the result.

    Args:
        context: of the command.
        instead: parameter → what to say in its place.
    """
    arguments: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in _NOT_GIVEN:
            continue
        value = instead.get(name, context.params[name])
        if isinstance(value, float):
            value = f"{value:.12g}"
        values = [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
        if parameter.param_type_name == "argument":
            arguments += values
        elif isinstance(value, bool):
            options.append(parameter.opts[0])
        else:
            options += [word for one in values for word in (parameter.opts[0], one)]
    program = str(context.find_root().info_name)  # whatever it was started as
    names = context.command_path.removeprefix(program).split()
    return shlex.join(["llava-fa", *names, *arguments, *options])


@contextlib.contextmanager
def writing(path: Path, remedy: str = "Give a writable folder") -> Iterator[None]:
    """What the operating system says about a path that is written becomes an error that names it."""
    try:
        yield
    except OSError as error:
        raise FourierError(str(error.strerror or error), remedy=remedy, where=str(path)) from None


def needing(packages: str, extra: str) -> AbstractContextManager[None]:
    """What cannot be imported becomes an error that says what to install."""
    remedy = f"`pip install 'llava-fa[{extra}]'`"
    return explained(f"{packages} are not here", remedy=remedy, kinds=(ImportError,), words=str)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """A configuration that cannot be is wrong usage: exit code 2."""
    try:
        yield
    except FourierError as error:
        raise typer.BadParameter(str(error)) from None


def quiet_libraries() -> None:
    """Keep what libraries print (advice, bars, warnings) away from the command's own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def stderr() -> Console:
    """The console for everything but results; made anew, so that redirection in tests is seen."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def stdout() -> Console:
    """The console for results; wide enough for layer names where no terminal sets the width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=120, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout. NaN is not JSON, and is refused."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 3:05, 1:02:09."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
