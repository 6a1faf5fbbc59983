"""`llava-fa compress`."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_fa.bounds import COUNT
from llava_fa.cli import options, output, sources, tables
from llava_fa.config import MAX_BITS, MIN_BITS, Budget, Casp, FourierConfig

MOST_BITS = 8.0
"""Of method `paper`; what a layer of the other may have is `MAX_BITS`."""

if TYPE_CHECKING:
    from llava_fa.hub.crew import Crew
    from llava_fa.hub.report import Report
    from llava_fa.hub.request import CompressionRequest
    from llava_fa.train.data import DataFactory
    from llava_fa.train.settings import TrainingSettings


def compress(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="`tiny` (the embedded model), a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the compressed model.")],
    method: Annotated[str, typer.Option(help="`best`, or `paper` (LLaVA-FA literally).")] = "best",
    bits: Annotated[
        float | None,
        options.real(
            MIN_BITS,
            MOST_BITS,
            "Bits per weight: 1 to 4 by halves gives every layer's codes just that; anything between, such as 2.25, is "
            "a budget for all stored bytes, spent where it counts most. `paper` goes up to 8. [default: 4]",
        ),
    ] = None,
    codes: Annotated[
        str,
        typer.Option(
            help="`rings`: a code for each coefficient; `trellis`: codes that overlap, a tenth less error at the same "
            "size, slower to find and, but for CPUs with AVX-512 VNNI, much slower to decode; `auto`: trellis for "
            "layers of 64 inputs or more."
        ),
    ] = "rings",
    size: options.Size = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Take --bits as a budget also where it is a half step.")
    ] = False,
    rank: Annotated[int, options.whole(0, COUNT, "Rank of the low-rank part; 0 leaves it out.")] = 0,
    casp: Annotated[
        bool,
        typer.Option(
            "--casp",
            help="Store query and key projections of the language model as two narrow factors, and spend what that "
            "saves on all layers: the same bytes as without.",
        ),
    ] = False,
    casp_keep: Annotated[
        float | None,
        options.real(0, 1, "With --casp: share of a projection's numbers that its factors have. [default: 0.25]"),
    ] = None,
    amplitude_bits: Annotated[int | None, options.whole(1, 8, "`paper`: bits of each |coefficient|.")] = None,
    phase_bits: Annotated[int | None, options.whole(1, 8, "`paper`: bits of each angle.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A folder of pictures, which the model is asked about; `self` (drawn pictures, the same); `world` "
            "(drawn pictures with their answers), a LLaVA-format JSON file, or a Hugging Face dataset. "
            "Without it the weights alone are used, and the model is streamed.",
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUESTION",
            help="With `--calibration self` or pictures: a question of your own about them, in your language, besides "
            "those that are built in (repeatable).",
        ),
    ] = None,
    images: options.Images = None,
    samples: Annotated[int, options.count("Calibration samples to draw.")] = 128,
    seed: Annotated[int, options.seed("Seed of the draw and of the random signs.")] = 0,
    skip: Annotated[
        list[str] | None, typer.Option(help="Layers to leave as they are (name or pattern; repeatable).")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Compress only these layers (name or pattern; repeatable).")
    ] = None,
    embeddings: Annotated[
        float | None,
        options.real(
            MIN_BITS,
            MAX_BITS,
            "Compress the word embedding and the output embedding too, to 1 to 4 bits: kept as they are, they can be "
            "half of a small model at 2 bits. Not part of a budget in --bits.",
            metavar="BITS",
        ),
    ] = None,
    visual_tokens: Annotated[
        int | None,
        options.count("Tokens per picture that the new model starts with: trained sets, or plain pooling."),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ID",
            help="The vision tower of a model in LLaVA's first format, where it is neither among the weights nor where "
            "`mm_vision_tower` of config.json says.",
        ),
    ] = None,
    drop_unused: Annotated[
        bool,
        typer.Option(
            "--drop-unused",
            help="Leave out tensors that no module of the model has, such as `mtp.*`. [default: copy them as they are]",
        ),
    ] = False,
    recover: Annotated[
        int | None,
        options.count(
            "Then train it back towards the original, so many steps on the calibration source, for all numbers of "
            "visual tokens if it has them (`llava-fa train` has the settings). Without --rank, factors get a rank of "
            "a 64th of the model's width.",
            metavar="STEPS",
        ),
    ] = None,
    skip_bad_rows: options.SkipBadRows = False,
    device: Annotated[
        str, typer.Option(help="Where layers are fitted, and the model runs on samples: `auto`, `cpu`, `cuda`, …")
    ] = "auto",
    memory: Annotated[
        str | None,
        options.memory(
            "Memory that a calibrated run may take, such as `6GB`: where the whole model does not fit, it is read "
            "block by block, with the same result."
        ),
    ] = None,
    ray: options.Ray = None,
    ray_gpus: options.RayGpus = None,
    fresh: options.Fresh = False,
    json_output: options.Json = False,
) -> None:
    """Compress a LLaVA-type model. Killed at any moment, the same command resumes."""
    refuse = options.refuse
    both = bits is not None and amplitude_bits is not None
    refuse(both, "--bits and --amplitude-bits exclude each other: the sum of the two decides")
    refuse(casp_keep is not None and not casp, "--casp-keep goes with --casp")
    refuse(images is not None and calibration is None, "--images goes with --calibration FILE.json")
    refuse(memory is not None and calibration is None, "--memory goes with --calibration")
    refuse(skip_bad_rows and calibration is None, "--skip-bad-rows goes with --calibration")
    refuse(recover is not None and calibration is None, "--recover goes with --calibration, which it trains on")
    refuse(bool(ask) and calibration is None, "--ask goes with --calibration")
    if recover is not None and calibration is not None:
        refuse(sources.is_asked(calibration), "--recover trains on answers: give a --calibration that has them")
    refuse(ray_gpus is not None and ray is None, "--ray-gpus goes with --ray")
    sources.check_images(calibration, images)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, if torch is not imported yet (docs/results.md)
    from llava_fa.hub.request import CompressionRequest

    source = sources.calibration_source(calibration, images, samples, seed, ask or ()) if calibration else None
    with output.usage_errors():
        budget = _budget(method, bits, size, mixed)
        config = FourierConfig(
            method=method,  # type: ignore[arg-type]  # FourierConfig checks it
            bits=MAX_BITS if bits is None or budget is not None else bits,
            codes=codes,  # type: ignore[arg-type]  # likewise
            rank=rank,
            amplitude_bits=amplitude_bits,
            phase_bits=phase_bits,
            seed=seed,
            skip=tuple(skip or ()),
            only=tuple(only or ()),
        )
        request = CompressionRequest(
            model=model,
            config=config,
            calibration=source,
            budget=budget,
            casp=Casp(keep=Casp.keep if casp_keep is None else casp_keep) if casp else None,
            embeddings=embeddings,
            visual_tokens=visual_tokens,
            vision_tower=vision_tower,
            drop_unused=drop_unused,
            device=device,
            memory=memory,  # type: ignore[arg-type]  # text becomes bytes
            skip_bad_rows=skip_bad_rows,
            command=output.given_command(context, out="OUT"),
        )
    with _crew(ray, ray_gpus) as crew:
        if recover is None or calibration is None:
            report = _compress(request, out, fresh, crew)
        else:
            data = functools.partial(sources.training_source, calibration, images, None)
            report = _compress_and_recover(request, out, recover, data, fresh, crew)
    if json_output:
        output.print_json(report.to_dict())
    else:
        tables.show_report(report)


@contextlib.contextmanager
def _crew(ray: str | None, gpus: float | None) -> Iterator[Crew | None]:
    """Workers of a cluster, where one is named."""
    if ray is None:
        yield None
        return
    with output.needing("Ray and what goes with it", "ray"):
        from llava_fa.cluster.crew import crew
    with crew(options.address(ray), gpus) as workers:
        yield workers


def _compress(request: CompressionRequest, out: Path, fresh: bool, crew: Crew | None) -> Report:
    from llava_fa.cli.progress import layer_progress
    from llava_fa.hub.compress import carry_out

    with layer_progress() as progress:
        return carry_out(request, out, fresh=fresh, progress=progress, on_plan=tables.show_plan, crew=crew)


def _compress_and_recover(
    request: CompressionRequest,
    out: Path,
    steps: int,
    data: Callable[[TrainingSettings], DataFactory],
    fresh: bool,
    crew: Crew | None,
) -> Report:
    from llava_fa.cli.progress import layer_progress, parts_read, training_progress
    from llava_fa.train.compress_recover import compress_first, train_back

    with layer_progress() as progress:  # one bar after the other; from Python, compress_and_recover does both
        compressed = compress_first(request, out, fresh=fresh, progress=progress, on_plan=tables.show_plan, crew=crew)
    with training_progress() as report:
        return train_back(request, compressed, out, steps, data, fresh=fresh, report=report, told=parts_read())


def _budget(method: str, bits: float | None, size: str | None, mixed: bool) -> Budget | None:
    options.refuse(size is None and mixed and bits is None, "--mixed goes with --bits")
    if size is not None:
        options.refuse(bits is not None, "--bits and --size exclude each other: each is a budget")
        budget = Budget(size=size)  # type: ignore[arg-type]  # text becomes bytes
    elif bits is not None and (mixed or (2 * bits != round(2 * bits) and MIN_BITS < bits < MAX_BITS)):
        budget = Budget(bits=bits)
    else:
        return None
    options.refuse(
        method != "best", f"a budget (--size, --mixed or --bits between half steps) is not for method {method!r}"
    )
    return budget
