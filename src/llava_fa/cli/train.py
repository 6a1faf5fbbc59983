"""`llava-fa train`: train a compressed model back to what its original could do."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from llava_fa.cli import output
from llava_fa.errors import FourierError

if TYPE_CHECKING:
    from llava_fa.hub.report import Report
    from llava_fa.train.recover import TrainingReport
    from llava_fa.train.settings import TrainingSettings


def train(
    model: Annotated[str, typer.Argument(help="`tiny`, a folder (compressed or not), or a hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the trained model.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="`world` (generated samples), a LLaVA-format JSON file, or a Hugging Face dataset."
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(help="The model this one was compressed from: to be like it, and where factors begin."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step and process.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches whose gradients are added up for a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate; dense weights learn at a tenth of it.")] = 1e-3,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Rank of every layer's low-rank factors. [default: what the layers have]"),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="What is trained (repeatable). [default: factors scales norms biases projector]"),
    ] = None,
    ce: Annotated[float, typer.Option(help="Weight of the cross-entropy on answers.")] = 0.2,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the match of hidden states.")] = 0.0,
    matryoshka: Annotated[
        bool,
        typer.Option(
            "--matryoshka",
            help="Teach it to answer from any number of visual tokens: the loss averaged over all scales. With "
            "`--part visual_tokens` nothing else is changed.",
        ),
    ] = False,
    requantize: Annotated[
        int, typer.Option(min=0, help="How often to choose new codes for what the factors leave over.")
    ] = 0,
    cache_teacher: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Ask the teacher once: keep its K likeliest tokens for every answer token on disk; 0 asks every time.",
        ),
    ] = 0,
    images: Annotated[
        Path | None, typer.Option(help="Image folder of the LLaVA JSON. [default: the JSON's own folder]")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to draw. [default: all]")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out samples that cannot be used, and count them.")
    ] = False,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample. [default: the model's]")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bf16. [default: on a GPU]")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory, more time.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: shard what is trained and the rest over the processes.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read samples.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the order of samples, and of their draw.")] = 0,
    device: Annotated[str, typer.Option(help="`auto` or `cpu`.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an interrupted run's work away.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Train factors, scales, norms, biases and projector; codes stay. Killed, the same command resumes."""
    if images is not None and data == "world":
        raise typer.BadParameter("--images goes with a LLaVA JSON file, not with `world`")
    from llava_fa.hub.work_folder import refuse_existing
    from llava_fa.train.recover import recover
    from llava_fa.train.settings import DEFAULT_PARTS, TrainingSettings

    refuse_existing(out.expanduser())
    try:
        settings = TrainingSettings(
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            rate=lr,
            rank=rank,
            parts=tuple(part or DEFAULT_PARTS + ("visual_tokens",) * matryoshka),
            cross_entropy=ce,
            divergence=kl,
            hidden=hidden,
            requantize=requantize,
            cache_teacher=cache_teacher,
            max_length=max_length,
            seed=seed,
            save_every=save_every,
            bf16=bf16,
            checkpointing=checkpointing,
            fsdp=fsdp,
            workers=workers,
            skip_bad_rows=skip_bad_rows,
            device=device,
        )
    except FourierError as error:
        raise output.usage_error(error) from None
    options: dict[str, Any] = {"data": samples_of(data, images, samples, settings)}
    if matryoshka:
        from llava_fa.train.matryoshka import matryoshka as over_all_scales

        options = over_all_scales(model, options["data"])
    first = os.environ.get("RANK", "0") == "0"
    with training_progress(first) as report:
        found = recover(
            model,
            out,
            settings=settings,
            teacher=teacher,
            data_name=f"{data} {samples}" + " matryoshka" * matryoshka,
            fresh=fresh,
            report=report,
            **options,
        )
    if not first:
        return
    if json_output:
        output.print_json(found.to_dict())
    else:
        show(found)


def before_recovery(out: Path, asked: tuple[Any, ...], fresh: bool) -> Path:
    """Where `llava-fa compress --recover` keeps the model that is then trained: beside OUT, named by what was asked."""
    folder = out.expanduser().absolute()
    found = folder.with_name(f"{folder.name}.compressed-{hashlib.sha256(repr(asked).encode()).hexdigest()[:8]}")
    if fresh and found.exists():
        shutil.rmtree(found)
    return found


def recover_from(
    original: str,
    compressed: Path,
    out: Path,
    data: str,
    images: Path | None,
    steps: int,
    rank: int,
    visual_tokens: int | None,
    device: str,
    fresh: bool,
) -> Report:
    """Train ``compressed`` back towards ``original`` and remove it; the report of the model that came of it."""
    from llava_fa.hub.flops import read_model_config
    from llava_fa.hub.inspect import inspect_model
    from llava_fa.hub.visual_tokens import FIELD
    from llava_fa.train.matryoshka import matryoshka
    from llava_fa.train.recover import recover
    from llava_fa.train.settings import DEFAULT_PARTS, TrainingSettings

    config = read_model_config(compressed)
    elastic = getattr(config, FIELD, None) is not None
    settings = TrainingSettings(
        steps=steps,
        rank=rank or max(1, config.get_text_config().hidden_size // 64),
        parts=DEFAULT_PARTS + ("visual_tokens",) * elastic,
        hidden=2.0,
        save_every=20,
        device="cpu" if device == "cpu" else "auto",
    )
    options: dict[str, Any] = {"data": samples_of(data, images, None, settings)}
    if elastic:
        options = matryoshka(compressed, options["data"], tokens=getattr(config, FIELD)["tokens"])
    with training_progress(True) as report:
        recover(
            compressed,
            out,
            settings=settings,
            teacher=original,
            data_name=f"{data} {visual_tokens}",
            fresh=fresh,
            report=report,
            **options,
        )
    shutil.rmtree(compressed)
    return inspect_model(out)


def samples_of(
    source: str, images: Path | None, count: int | None, settings: TrainingSettings
) -> Callable[[Any, int], Any]:
    """(processor, most tokens) → dataset: packed questions of the world, or conversations."""

    def make(processor: Any, max_length: int) -> Any:
        if source == "world":
            from llava_fa.world.packed import PackedWorld

            seen = settings.steps * settings.batch * settings.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
            return PackedWorld(processor, pictures=min(count or seen, seen))
        from llava_fa.train.data import Conversations, Rows

        rows = Rows(source, images=images, count=count, seed=settings.seed)
        return Conversations(rows, processor, max_length=max_length, skip_bad_rows=settings.skip_bad_rows)

    return make


@contextmanager
def training_progress(shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for log entries: a bar on a terminal's stderr, otherwise a line each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = output.stderr()
    told = TextColumn("{task.fields[terms]}")
    columns = (TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), told, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("training", total=None, terms="")

        def update(row: dict[str, Any]) -> None:
            names = ("loss", "cross_entropy", "divergence", "hidden")
            terms = ", ".join(f"{name.replace('_', '-')} {row[name]:.4f}" for name in names if name in row)
            bar.update(task, completed=row["step"], total=row["of"], terms=terms)
            if shown and not console.is_terminal:
                console.print(f"step {row['step']}/{row['of']}  {terms}", markup=False, highlight=False)

        yield update


def show(found: TrainingReport) -> None:
    """The report for people."""
    console = output.stdout()
    console.print(f"[bold]{escape(found.path)}[/]", highlight=False, soft_wrap=True)
    parts = ", ".join(f"{name} {count:,}" for name, count in found.by_part.items() if count)
    console.print(
        f"{found.steps} steps in {output.duration(found.seconds)}; trained {found.trainable:,} of {found.total:,} "
        f"parameters ({100 * found.share:.1f} %): {parts}",
        highlight=False,
        soft_wrap=True,
    )
    if found.history:
        first, last = found.history[0], found.history[-1]
        console.print(f"loss {first['loss']:.4f} → {last['loss']:.4f}", highlight=False)
    if found.bits_per_weight is not None and found.compressed_bytes is not None:
        console.print(
            f"{found.bits_per_weight:.3f} bits per weight; {output.size(found.compressed_bytes)}", highlight=False
        )
    if found.rows_left_out:
        console.print(f"left out {len(found.rows_left_out)} of {found.samples} samples", highlight=False)
