"""Compress a model, then train it back towards its original: one call, resumable as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from llava_fa.bounds import COUNT, whole
from llava_fa.data.rows import SampleSource, candidates
from llava_fa.data.samples import Sample, chat_messages
from llava_fa.data.textfiles import read_json
from llava_fa.errors import FourierError
from llava_fa.hub.compress import carry_out
from llava_fa.hub.crew import Crew
from llava_fa.hub.flops import read_model_config
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.larger import stays_on_disk
from llava_fa.hub.plan import Plan
from llava_fa.hub.provenance import record
from llava_fa.hub.report import ProgressCallback, Report
from llava_fa.hub.request import CompressionRequest
from llava_fa.hub.shards import write_text
from llava_fa.hub.visual_tokens import FIELD
from llava_fa.hub.work_folder import refuse_existing
from llava_fa.train.data import DataFactory, training_data
from llava_fa.train.matryoshka import matryoshka
from llava_fa.train.recover import recover
from llava_fa.train.settings import DEFAULT_PARTS, TrainingSettings

_LIKELIEST = 64
"""Tokens that are kept of an original's word where it is asked once: its hidden states would be too many to keep."""


def compress_and_recover(
    request: CompressionRequest,
    out: str | Path,
    steps: int,
    data: Callable[[TrainingSettings], DataFactory] | None = None,
    *,
    fresh: bool = False,
    progress: ProgressCallback | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    told: Callable[[str], object] = lambda _: None,
) -> Report:
    """Compress a model, then train it back towards its original, for all numbers of visual tokens if it has them.

    Trained are low-rank factors, scales, norms, biases and the projector; where the request's configuration has no
    rank, factors get a rank of a 64th of the language model's width. An original that does not fit in memory is asked
    once (`hub.larger`), and its hidden states teach nothing. Killed at any moment, the same call goes on: the
    compressed model waits beside ``out`` until the trained one is there.

    Args:
        request: what is compressed and how; its calibration samples are needed.
        out: the new model folder; must not exist.
        steps: optimiser steps.
        data: what it is trained on; by default the samples of the request, of a `SampleSource` all of its rows.
        fresh: throw an interrupted run's work away.
        progress, on_plan: of the compression (`llava_fa.compress`).
        report: called with every log entry of the training.
        told: called with the name of every part of the original that is read while it is asked.

    Returns:
        The `Report` of the trained model.

    Raises:
        FourierError: as `llava_fa.compress` and `train.recover`; there are no calibration samples.
    """
    whole("steps", steps, 1, COUNT)  # before hours of compression
    if request.calibration is not None and not isinstance(request.calibration, SampleSource):
        request = dataclasses.replace(request, calibration=list(request.calibration))
    compressed = compress_first(request, out, fresh=fresh, progress=progress, on_plan=on_plan)
    return train_back(request, compressed, out, steps, data, fresh=fresh, report=report, told=told)


def compress_first(
    request: CompressionRequest,
    out: str | Path,
    *,
    fresh: bool = False,
    progress: ProgressCallback | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    crew: Crew | None = None,
) -> Path:
    """The first half of `compress_and_recover`: the compressed model, beside ``out`` and named by the request."""
    folder = Path(out).expanduser().absolute()
    refuse_existing(folder)
    if request.vision_tower is not None:
        raise FourierError(
            "the original teaches what is trained back, and its vision tower is looked for where config.json says",
            remedy=f"Put the tower, or a link to it, at mm_vision_tower below {request.model}, and leave it out here",
        )
    identity = [str(request.model), request.to_dict(), _identity(_samples(request))]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    compressed = folder.with_name(f"{folder.name}.compressed-{digest[:8]}")
    if fresh and compressed.exists():
        shutil.rmtree(compressed)
    if not compressed.exists():
        request = dataclasses.replace(request, command=None)  # it makes the trained model, not this one
        carry_out(request, compressed, fresh=fresh, progress=progress, on_plan=on_plan, crew=crew)
    return compressed


def train_back(
    request: CompressionRequest,
    compressed: Path,
    out: str | Path,
    steps: int,
    data: Callable[[TrainingSettings], DataFactory] | None = None,
    *,
    fresh: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    told: Callable[[str], object] = lambda _: None,
) -> Report:
    """The second half: train what `compress_first` made towards the original, and remove it."""
    samples, out = _samples(request), Path(out).expanduser().absolute()
    config = read_model_config(compressed)
    elastic = getattr(config, FIELD, None)
    device = "cpu" if str(request.device) == "cpu" else "auto"
    away = _asked_once(request, compressed, device)
    settings = TrainingSettings(
        steps=steps,
        rank=request.config.rank or max(1, config.get_text_config().hidden_size // 64),
        parts=DEFAULT_PARTS + ("visual_tokens",) * (elastic is not None),
        hidden=0.0 if away else 2.0,
        cache_teacher=_LIKELIEST if away else 0,
        skip_bad_rows=request.skip_bad_rows,
        save_every=20,
        device=device,
    )
    options: dict[str, Any] = {"data": training_data(samples, settings) if data is None else data(settings)}
    if elastic is not None:
        options = matryoshka(compressed, options["data"], tokens=elastic["tokens"])
    name = samples.name if isinstance(samples, SampleSource) else _identity(samples)
    recover(
        compressed,
        out,
        settings=settings,
        teacher=request.model,
        teacher_on_disk=away,
        data_name=f"{name} {request.visual_tokens}",
        fresh=fresh,
        report=report,
        told=told,
        **options,
    )
    shutil.rmtree(compressed)
    if request.command is not None:
        record(out, request.command)
    return inspect_model(out)


def _asked_once(request: CompressionRequest, compressed: Path, device: str) -> bool:
    """Whether the original does not fit in memory; a run that was interrupted goes on as it had begun."""
    path = compressed / "original_on_disk.json"
    if not path.exists():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the compression has left
        write_text(path, json.dumps(stays_on_disk(request.model, device, memory=request.memory)))
    return bool(read_json(path, "Give --fresh to start over"))


def _samples(request: CompressionRequest) -> Iterable[Sample]:
    if request.calibration is None:
        raise FourierError("a model is trained back on samples, and there are none", remedy="Give calibration samples")
    return request.calibration


def _identity(samples: Iterable[Sample]) -> str:
    """Tells samples from others: a source by its name and draw, samples in memory by all of them."""
    if isinstance(samples, SampleSource):
        return repr(samples)
    digest = hashlib.sha256()
    for candidate in candidates(samples):
        messages, images = chat_messages(candidate.open(), candidate.where)
        digest.update(json.dumps(messages).encode())
        for image in images:
            digest.update(image.tobytes())
    return digest.hexdigest()
