"""The command `llava-fa`. A command is one line below; heavy packages are imported inside its function."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from llava_fa.cli.chat import chat
from llava_fa.cli.compare import compare
from llava_fa.cli.compress import compress
from llava_fa.cli.demo import demo
from llava_fa.cli.doctor import doctor
from llava_fa.cli.eval import evaluate
from llava_fa.cli.explain import explain, flops
from llava_fa.cli.inspect import inspect
from llava_fa.cli.options import WithRay
from llava_fa.cli.output import command
from llava_fa.cli.report import report
from llava_fa.cli.serve import serve
from llava_fa.cli.train import train
from llava_fa.cli.world import world

app = typer.Typer(
    name="llava-fa",
    help="Large multimodal models made small enough to use: compress, inspect, evaluate, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(cls=WithRay)(command(compress))
app.command()(command(inspect))
app.command()(command(train))
app.command("eval", cls=WithRay)(command(evaluate))
app.command()(command(report))
app.command()(command(chat))
app.command()(command(compare))
app.command()(command(serve))
app.command()(command(explain))
app.command()(command(flops))
app.command()(command(demo))
app.command()(command(doctor))
app.add_typer(world, name="world")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(version("llava-fa"))
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Large multimodal models made small enough to use: compress, inspect, evaluate, chat."""


if __name__ == "__main__":
    app()
