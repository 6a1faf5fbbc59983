"""`llava-fa train`: train a compressed model back to what its original could do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from llava_fa.bounds import COUNT, MOST_BATCH, MOST_PROCESSES, MOST_WEIGHT, from_environment
from llava_fa.cli import options, output, sources
from llava_fa.config import format_size, size_of

if TYPE_CHECKING:
    from llava_fa.train.recover import TrainingReport


def train(
    model: options.Model,
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
    steps: Annotated[int, options.count("Optimiser steps.")] = 1000,
    batch: Annotated[int, options.whole(1, MOST_BATCH, "Samples a step and process.")] = 8,
    accumulate: Annotated[int, options.whole(1, MOST_BATCH, "Batches whose gradients are added up for a step.")] = 1,
    lr: Annotated[
        float, options.real(0, MOST_WEIGHT, "Peak learning rate; dense weights learn at a tenth of it.")
    ] = 1e-3,
    rank: Annotated[
        int | None,
        options.whole(0, COUNT, "Rank of every layer's low-rank factors. [default: what the layers have]"),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="What is trained (repeatable). [default: factors scales norms biases projector]"),
    ] = None,
    ce: Annotated[float, options.real(0, MOST_WEIGHT, "Weight of the cross-entropy on answers.")] = 0.2,
    kl: Annotated[float, options.real(0, MOST_WEIGHT, "Weight of the divergence from the teacher.")] = 1.0,
    hidden: Annotated[float, options.real(0, MOST_WEIGHT, "Weight of the match of hidden states.")] = 0.0,
    matryoshka: Annotated[
        bool,
        typer.Option(
            "--matryoshka",
            help="Teach it to answer from any number of visual tokens: the loss averaged over all scales. With "
            "`--part visual_tokens` nothing else is changed.",
        ),
    ] = False,
    cache_teacher: Annotated[
        int,
        options.whole(
            0,
            COUNT,
            "Ask the teacher once: keep its K likeliest tokens for every answer token on disk; 0 asks every time.",
            metavar="K",
        ),
    ] = 0,
    memory: Annotated[
        str | None,
        options.memory("Memory that the teacher may take, such as `6GB`: one that does not fit is read part by part."),
    ] = None,
    images: options.Images = None,
    samples: Annotated[int | None, options.count("Samples to draw. [default: all]")] = None,
    skip_bad_rows: options.SkipBadRows = False,
    max_length: Annotated[int | None, options.count("Tokens of a sample. [default: the model's]")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bf16. [default: on a GPU]")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory, more time.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: shard what is trained and the rest over the processes.")
    ] = False,
    save_every: Annotated[int, options.count("Steps between checkpoints.")] = 100,
    workers: Annotated[int, options.whole(0, MOST_PROCESSES, "Processes that read samples.")] = 0,
    seed: Annotated[int, options.seed("Of the order of samples, and of their draw.")] = 0,
    device: Annotated[str, typer.Option(help="`auto` or `cpu`.")] = "auto",
    fresh: options.Fresh = False,
    json_output: options.Json = False,
) -> None:
    """Train factors, scales, norms, biases and projector; codes stay. Killed, the same command resumes."""
    sources.check_images(data, images)
    options.refuse(memory is not None and teacher is None, "it is the teacher's, and there is none", "--memory")
    from llava_fa.cli.progress import parts_read, training_progress
    from llava_fa.hub.work_folder import refuse_existing
    from llava_fa.train.recover import recover
    from llava_fa.train.settings import DEFAULT_PARTS, TrainingSettings

    refuse_existing(out.expanduser())
    with output.usage_errors():
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
    training: dict[str, Any] = {"data": sources.training_source(data, images, samples, settings)}
    if matryoshka:
        from llava_fa.train.matryoshka import matryoshka as over_all_scales

        training = over_all_scales(model, training["data"])
    first = not from_environment("RANK", 0, 0, COUNT)
    with training_progress(first) as report:
        outcome = recover(
            model,
            out,
            settings=settings,
            teacher=teacher,
            memory=None if memory is None else size_of(memory, "memory"),
            data_name=f"{data} {samples}" + " matryoshka" * matryoshka,
            fresh=fresh,
            report=report,
            told=parts_read(),
            **training,
        )
    if not first:
        return
    if json_output:
        output.print_json(outcome.to_dict())
    else:
        show(outcome)


def show(outcome: TrainingReport) -> None:
    """The report for people."""
    console = output.stdout()
    console.print(f"[bold]{escape(outcome.path)}[/]", soft_wrap=True)
    parts = ", ".join(f"{name} {count:,}" for name, count in outcome.by_part.items() if count)
    console.print(
        f"{outcome.steps} steps in {output.duration(outcome.seconds)}; "
        f"trained {outcome.trainable:,} of {outcome.total:,} parameters ({100 * outcome.share:.1f} %): {parts}",
        soft_wrap=True,
    )
    if outcome.history:
        first, last = outcome.history[0], outcome.history[-1]
        console.print(f"loss {first['loss']:.4f} → {last['loss']:.4f}")
    if outcome.bits_per_weight is not None and outcome.compressed_bytes is not None:
        console.print(f"{outcome.bits_per_weight:.3f} bits per weight; {format_size(outcome.compressed_bytes)}")
    if outcome.rows_left_out:
        console.print(f"left out {len(outcome.rows_left_out)} of {outcome.samples} samples")
