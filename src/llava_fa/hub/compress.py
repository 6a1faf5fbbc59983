"""`llava_fa.compress`: a LLaVA-type checkpoint in, a smaller one in the same format out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llava_fa.config import MAX_BITS, Budget, Casp, FourierConfig
from llava_fa.data.asked import Asked, with_answer
from llava_fa.data.samples import Sample
from llava_fa.errors import disk_errors, explained
from llava_fa.hub import allocation, attention_density, proofread, provenance
from llava_fa.hub.adapter import has_adapter, identity, merged, remove_merged
from llava_fa.hub.architecture import model_of
from llava_fa.hub.blocks import evenly
from llava_fa.hub.calibrated import compress_calibrated, route_of
from llava_fa.hub.calibrated_model import calibrated_model, running_dtype
from llava_fa.hub.calibration_data import answer_start, fingerprint, prepare, prepare_all
from llava_fa.hub.checkpoint import codebook_digest
from llava_fa.hub.crew import Crew
from llava_fa.hub.inspect import describe
from llava_fa.hub.loading import check_device, context_length
from llava_fa.hub.model_sensitivity import SAMPLES
from llava_fa.hub.original import opened
from llava_fa.hub.own_answers import LENGTH, own_answers
from llava_fa.hub.plan import Plan, make_plan
from llava_fa.hub.processor import load_processor, sees_pictures
from llava_fa.hub.report import Progress, ProgressCallback, Report
from llava_fa.hub.request import CompressionRequest
from llava_fa.hub.source import Source, beside, open_source, resolve_model
from llava_fa.hub.streaming import Job, assemble, compress_streaming
from llava_fa.hub.team import Route
from llava_fa.hub.visual_tokens import with_visual_tokens
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import WorkFolder, check_space, refuse_existing
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import MAX_CODE_BITS, MIN_CODE_BITS, trellis_points
from llava_fa.solver.scratch import scratch

_PARTS = 4
"""Raised whenever parts are written otherwise (`hub.work_folder`)."""
_SPARE = 64_000_000
"""Bytes of disk asked for beyond the estimate."""


def compress(
    model: str | Path,
    out: str | Path,
    config: FourierConfig | None = None,
    calibration: Iterable[Sample] | None = None,
    *,
    budget: Budget | None = None,
    casp: Casp | None = None,
    embeddings: float | None = None,
    visual_tokens: int | None = None,
    vision_tower: str | Path | None = None,
    drop_unused: bool = False,
    device: str | torch.device = "auto",
    skip_bad_rows: bool = False,
    memory: int | str | None = None,
    fresh: bool = False,
    progress: ProgressCallback | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Report:
    """Compress every linear layer of vision tower, projector and language model, and, if asked, its word embeddings.

    Without calibration data the checkpoint is streamed: memory holds the largest layer, not the model, and
    what is known of a layer's inputs comes from the norm in front of it. With data each layer is fitted to the inputs
    that the already compressed layers before it produce (`hub.calibrated` says how); the model is in memory where it
    fits, and else streamed as well. Killed at any moment, the same call goes on from the last finished
    layer (they wait in ``OUT.partial``) and ends with the same bytes as a run in one go.

    Args:
        model: a folder, a hub id, or ``"tiny"`` (the embedded model). Safetensors only.
        out: the new model folder; must not exist. Loads with `from_pretrained` once `llava_fa` is imported.
        config: method, bits, rank, layers to skip; `FourierConfig()` if None.
        calibration: samples ``(image, question, answer)`` or chat messages (see `data.samples`); or
            `llava_fa.data.asked.Asked`, pictures and questions that the model is to answer itself.
        budget: what the whole model may take; every layer then gets the bits (and the rank, none or the configured
            one) that make the predicted loss least (docs/method.md), and ``config.bits`` is the most it may get.
        casp: query and key projections as two narrow factors (arXiv 2503.05936); bits are then chosen under ``budget``,
            or, without one, within the very bytes that ``config`` would take without ``casp``.
        embeddings: bits (1 to 4) of the word embedding, which whatever is tied to it shares, of an output embedding of
            its own, and of other large tables: half of a small model's bytes at 2 bits. Fitted without data, outside of
            a budget in bits. None: they stay as they are.
        visual_tokens: how many tokens the new model is told a picture in (and is calibrated with): what is trained into
            it (`llava-fa train --matryoshka`), or plain pooling; whoever loads it can choose another number.
        vision_tower: folder or hub id of the vision tower of a model in LLaVA's first format, where it is neither among
            the weights nor where ``mm_vision_tower`` of config.json says.
        drop_unused: leave out tensors that no module of transformers' model has (such as a head that predicts several
            tokens, ``mtp.*``); by default they are copied as they are, for programs that know them.
        device: where layers are fitted and the model runs on the calibration samples: ``"cpu"``, ``"cuda"``, …;
            ``"auto"`` is a GPU where there is one, else the CPU. Its arithmetic is not a CPU's: codes differ where two
            are equally good.
        skip_bad_rows: take the next for a sample that cannot be used, and list it in the report, instead of stopping.
        memory: bytes that a calibrated run may take, a number or text such as ``"6GB"``: where the whole model does not
            fit, its weights are read block by block. By default it does that where the model has not half of the memory
            that is free. The result is the same.
        fresh: throw away what an interrupted run left, instead of resuming.
        progress: called with a `Progress` before each layer and after the last.
        on_plan: called with the `Plan` (which layers, which not and why) before any work; once more, with samples, when
            it is known what memory that takes; and once more, under a budget, when it is settled who gets what.

    Returns:
        A `Report`; bits per weight, ratio and each layer's errors, as JSON through ``.to_dict()``.

    Raises:
        FourierError: everything that can be mended: unusable input (found before the work where possible), a full
            disk, a layer that cannot be approximated (named).

    Source: docs/method.md; LLaVA-FA (arXiv 2602.00135) for method ``paper``.
    """
    request = CompressionRequest(
        model=model,
        config=FourierConfig() if config is None else config,
        calibration=calibration,
        budget=budget,
        casp=casp,
        embeddings=embeddings,
        visual_tokens=visual_tokens,
        vision_tower=vision_tower,
        drop_unused=drop_unused,
        device=device,
        skip_bad_rows=skip_bad_rows,
        memory=memory,
    )
    return carry_out(request, out, fresh=fresh, progress=progress, on_plan=on_plan)


def carry_out(
    request: CompressionRequest,
    out: str | Path,
    *,
    fresh: bool = False,
    progress: ProgressCallback | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    crew: Crew | None = None,
) -> Report:
    """`compress` as a request says it; the other arguments, the result and the errors are the same.

    ``crew``: who fits the layers in the place of this process (`cluster.crew`); the result is the same.
    """
    out = Path(out).expanduser().absolute()
    refuse_existing(out)
    device = check_device(request.device)
    show_progress: ProgressCallback = progress or (lambda _: None)
    with _source(request, out, show_progress) as source:
        return _compressed(request, source, out, device, fresh, show_progress, on_plan or (lambda _: None), crew)


def _compressed(
    request: CompressionRequest,
    source: Source,
    out: Path,
    device: torch.device,
    fresh: bool,
    show_progress: ProgressCallback,
    show: Callable[[Plan], None],
    crew: Crew | None,
) -> Report:
    start = time.monotonic()
    empty = model_of(source)
    plan = make_plan(empty, source, request.config, request.embeddings, request.drop_unused)
    if request.casp is not None:
        allocation.check_casp(plan)
        if request.budget is None:
            most = request.config.replace(bits=MAX_BITS)
            request = dataclasses.replace(request, config=most, budget=allocation.same_bytes(plan))
    show(plan)
    beside(source.home)  # said now, not when all the work is done
    check_space(out.parent, plan.output_bytes + plan.part_bytes + _SPARE)
    data = None if request.calibration is None else _Calibration.of(source, request, context_length(empty))
    with (
        WorkFolder(out, _manifest(request, source, data), fresh) as work,
        _memory_errors(device),
        contextlib.ExitStack() as stack,
    ):
        job = Job(plan, work, show_progress, device)
        stack.callback(job.overlap.close)
        model = None
        if data is not None and (job.done < job.total or not proofread.settle(work)):
            dtype = running_dtype(plan, device, work)
            job.tell("loading the model")
            model = calibrated_model(request, plan, empty, dtype, data.at_most, work.hidden, show)
            if Weights.of(model).streamed or request.memory is not None:
                stack.enter_context(scratch(work.hidden))
            if Weights.of(model).streamed:
                Weights.of(model).told = lambda path: job.tell(job.stage, path)
            if data.asked:
                tell = functools.partial(job.tell, "asking the model")
                data = data.answered(own_answers(model, data.processor, data.inputs, work, tell, request.memory))
        if request.budget is not None:
            job.plan = _allocated(request, job, model, data)
            show(job.plan)
        density, route = work.read_json(attention_density.FILE), None
        if data is not None and model is not None:
            density, route = _followed(job, model, data.inputs, work, density)
        job.tell("compressing")
        fit = compress_streaming if crew is None else functools.partial(crew.fit_all, request=request)
        if data is None:
            fit(job)
        elif route is not None and crew is not None:
            model = None
            with crew.walk(job, request, empty, dtype, data.inputs, data.answers, route) as reader:
                proofread.proofread(job, reader)
        elif model is not None:
            listener = proofread.Listener(data.inputs, data.answers)
            compress_calibrated(job, model, data.inputs, listener, route)
            proofread.proofread(job, listener.reader(model))
            Weights.of(model).shelf.clear()
            del model
        measured = {layer.name: work.measurement(layer.name) for layer in job.plan.all_layers}
        job.tell("writing")
        assemble(job.plan, request.config, work, density)
        job.tell("done")
    remove_merged(_merged(out))
    if request.command is not None:
        provenance.record(out, request.command)
    report = describe(out, original_bytes=source.nbytes, seconds=time.monotonic() - start, measured=measured)
    return report if data is None else dataclasses.replace(report, rows_left_out=tuple(data.left_out))


def _followed(
    job: Job,
    model: torch.nn.Module,
    inputs: Sequence[dict[str, torch.Tensor]],
    work: WorkFolder,
    density: dict[str, list[float]] | None,
) -> tuple[dict[str, list[float]], Route]:
    """How sparse attention is, where that is not known yet, seen of some of the samples that show the way; and that."""
    if density is not None:
        return density, route_of(job, model, inputs, whole=True)
    with attention_density.watched(model, len(inputs)) as maps:
        route = route_of(job, model, inputs, whole=True, around=maps.of)
    work.write_json(attention_density.FILE, maps.densities())
    return maps.densities(), route


@contextlib.contextmanager
def _source(request: CompressionRequest, out: Path, tell: ProgressCallback) -> Iterator[Source]:
    """The checkpoint: an adapter beside its weights is merged into a folder that lasts as long as the work."""
    folder = resolve_model(request.model)
    with opened(folder, request.vision_tower) as source:
        if has_adapter(folder):
            tell(Progress("merging the adapter", "", 0, 0, 0, 0, 0))
            with disk_errors(_merged(out)):
                source = dataclasses.replace(open_source(merged(folder, _merged(out))), fingerprint=identity(folder))
        if request.visual_tokens is not None:
            source = with_visual_tokens(source, request.visual_tokens)
        yield source


def _merged(out: Path) -> Path:
    return out.with_name(out.name + ".merged")


def _memory_errors(device: torch.device) -> AbstractContextManager[None]:
    """A `FourierError` that says what is kept, when the device runs out of memory."""
    return explained(
        "the device ran out of memory",
        remedy="Finished layers are kept: the same command with --device cpu goes on from them",
        where=str(device),
        kinds=(torch.OutOfMemoryError,),
        words=None,
    )


def _manifest(request: CompressionRequest, source: Source, data: _Calibration | None) -> dict[str, Any]:
    """What a left-over work folder must have been begun with for this run to go on from it."""
    return {
        "llava_fa": version("llava-fa"),
        "parts": _PARTS,
        "codebook": _codebooks(),
        "source": source.fingerprint,
        "calibration": None if data is None else fingerprint(data.inputs),
        **request.to_dict(),
    }


def _codebooks() -> str:
    """SHA-256 of all codebooks that layers are given: parts made with others must not be gone on with."""
    sizes = range(MIN_CODE_BITS, MAX_CODE_BITS + 1)
    books = [points(bits) for points in (ring_codebook, trellis_points) for bits in sizes]
    return codebook_digest(torch.cat(books).to(torch.bfloat16))


def _allocated(request: CompressionRequest, job: Job, model: torch.nn.Module | None, data: _Calibration | None) -> Plan:
    """The plan under a budget: the one that an interrupted run had settled on, or a new one."""
    if (known := allocation.load(job.plan, job.work)) is not None:
        return known
    plan, config, casp = job.plan, request.config, request.casp
    tell = functools.partial(job.tell, "measuring sensitivity")
    if data is None:
        unit, predictions = allocation.BLIND, allocation.estimate(plan, config, tell, casp)
    else:  # then the model was loaded, since no layer can be finished before this
        some = evenly(len(data.inputs), SAMPLES)
        inputs, answers = [data.inputs[i] for i in some], [data.answers[i] for i in some]
        unit, predictions = allocation.NATS, allocation.measure(plan, config, model, inputs, answers, tell, casp)
    plan = allocation.spend(plan, config, request.budget, predictions, unit, casp)
    allocation.save(plan, job.work)
    return plan


@dataclasses.dataclass(frozen=True)
class _Calibration:
    """Calibration samples, and what the model's processor makes of them; ``asked``: they are still to be answered."""

    samples: Sequence[Sample]
    inputs: Sequence[dict[str, torch.Tensor]]
    processor: Any
    left_out: Sequence[str]
    asked: bool = False

    @classmethod
    def of(cls, source: Source, request: CompressionRequest, most: int) -> _Calibration:
        """Read and prepared for the model of this checkpoint, which takes so many tokens."""
        processor = load_processor(source.home, str(source.folder))
        for key, value in source.processor.items():
            setattr(processor, key, value)
        samples, asked = request.calibration or (), isinstance(request.calibration, Asked)
        if isinstance(samples, Asked):
            samples, most = dataclasses.replace(samples, sees=sees_pictures(processor)), most - LENGTH
        found = prepare_all(samples, processor, most, skip_bad_rows=request.skip_bad_rows, asks=asked)
        return cls(found.samples, found.inputs, processor, found.left_out, asked)

    @property
    def at_most(self) -> Sequence[dict[str, torch.Tensor]]:
        """The inputs, as long as they may become."""
        if not self.asked:
            return self.inputs
        return [{**x, "input_ids": torch.nn.functional.pad(x["input_ids"], (0, LENGTH))} for x in self.inputs]

    def answered(self, answers: Sequence[str]) -> _Calibration:
        """The samples with what was answered."""
        samples = [with_answer(sample, text) for sample, text in zip(self.samples, answers, strict=True)]
        inputs = list(prepare(samples, self.processor))
        return dataclasses.replace(self, samples=samples, inputs=inputs, asked=False)

    @functools.cached_property
    def answers(self) -> list[int]:
        """Where the answer of each sample begins."""
        pairs = zip(self.samples, self.inputs, strict=True)
        return [answer_start(sample, inputs, self.processor) for sample, inputs in pairs]
