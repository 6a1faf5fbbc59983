"""`recover`: a model folder in, the same model trained back out, in the same format."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_fa.bounds import COUNT, from_environment
from llava_fa.config import QUANT_METHOD
from llava_fa.data.textfiles import reading
from llava_fa.errors import FourierError, disk_errors
from llava_fa.hub import adapter
from llava_fa.hub.architecture import quiet_transformers
from llava_fa.hub.complete import carry_unused
from llava_fa.hub.inspect import describe
from llava_fa.hub.larger import load_within
from llava_fa.hub.ledger import LEDGER
from llava_fa.hub.loading import context_length, load, processor_of
from llava_fa.hub.processor import load_processor
from llava_fa.hub.quantizer import FourierQuantizationConfig, mark_compressed
from llava_fa.hub.report import TRAINING, peak_rss_bytes
from llava_fa.hub.shards import CHUNK, write_text
from llava_fa.hub.source import quantisation, read_config, resolve_model, weight_files
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import WorkFolder
from llava_fa.maths.metrics import weight_error
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.trainable import make_packed, make_trainable
from llava_fa.train.cache import CachedTargets, ask
from llava_fa.train.data import Collator, DataFactory, on_device
from llava_fa.train.factors import blank_factors, initial_factors, original_weight, second_moments
from llava_fa.train.loss import LossFunction, ModelTeacher, RecoveryLoss
from llava_fa.train.parts import choose
from llava_fa.train.settings import TrainingSettings
from llava_fa.train.trainer import RecoveryTrainer, trained_tensors

_LONGEST = 1 << 30
"""Tokens of a sample where neither the settings nor the model set a bound."""
_MOMENT_SAMPLES = 64
"""Samples on which the metric of the first factors is measured."""


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """What a training run came to.

    Attributes:
        path: the trained model.
        steps: optimiser steps, those before a resumption included.
        trainable, total, share, by_part: see `train.parts.TrainableCount`.
        settings: `TrainingSettings.to_dict`.
        history: log entries of this process's part of the run: step, loss and its terms, rate.
        samples: how many there were to draw from.
        rows_left_out: samples that this process could not use (only with ``skip_bad_rows``).
        bits_per_weight, compressed_bytes: of the result, every stored byte counted; None if it is not compressed.
        seconds, peak_rss_bytes: time, and the largest resident memory of this process.
    """

    path: str
    steps: int
    trainable: int
    total: int
    share: float
    by_part: dict[str, int]
    settings: dict[str, Any]
    history: list[dict[str, float]]
    samples: int
    rows_left_out: list[int]
    bits_per_weight: float | None
    compressed_bytes: int | None
    seconds: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)


def recover(
    model: str | Path,
    out: str | Path,
    data: DataFactory,
    settings: TrainingSettings | None = None,
    *,
    teacher: str | Path | None = None,
    memory: int | None = None,
    teacher_on_disk: bool | None = None,
    data_name: str = "",
    prepare: Callable[[nn.Module], None] | None = None,
    wrap_loss: Callable[[RecoveryLoss, nn.Module], LossFunction] | None = None,
    finish: Callable[[nn.Module, Any], None] | None = None,
    fresh: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    told: Callable[[str], object] = lambda _: None,
) -> TrainingReport:
    """Train a model back, and save it in the format it came in, factors quantised again.

    Killed at any moment, the same call resumes from its last checkpoint. Under ``torchrun`` every process calls it.

    Args:
        model: ``tiny``, a folder or a hub id; compressed (codes stay fixed) or not (then parts decide what is trained).
        out: folder to be made.
        data: what it is trained on (`train.data.DataFactory`).
        settings: see `TrainingSettings`.
        teacher: the model this one was compressed from; without it, cross-entropy alone.
        memory: bytes that the teacher may make this process take (`hub.larger`): one that does not fit is read part by
            part, once, and so its word must be cached.
        teacher_on_disk: whether it is, where that is settled.
        data_name: what the data are, for the resumption check: a run resumes with the data it began with.
        prepare: called with the loaded model before its parameters are chosen: to attach modules.
        wrap_loss: (loss, model) → the loss to train with: to average over several views of a batch.
        finish: called with the trained model and its processor before they are saved.
        fresh: throw an interrupted run's work away.
        report: called with every log entry.
        told: called with the name of every part of a teacher on the disk that is read.

    Raises:
        FourierError: what can be mended: models that do not belong together, unusable samples, a loss that is not
            finite, a checkpoint of another run.

    Source: LLaVA-FA (arXiv 2602.00135), section on fine-tuning; docs/training.md.
    """
    start, settings = time.monotonic(), settings or TrainingSettings()
    out = Path(out).expanduser().absolute()
    folder = resolve_model(model)
    if adapter.has_adapter(folder) and quantisation(read_config(folder)) == QUANT_METHOD:
        raise FourierError(
            "an adapter lies beside packed weights, and the trained model would lose it",
            remedy=f"Train the adapter itself with peft, or take {adapter.CONFIG} away, to train the model without it",
            where=str(folder),
        )
    identity = _identity(folder)
    manifest = {
        "llava_fa": version("llava-fa"),
        "model": identity,
        "teacher": None if teacher is None else _identity(resolve_model(teacher)),
        "settings": settings.to_dict(),
        "data": data_name,
    }
    work, first = WorkFolder(out, manifest, fresh), not from_environment("RANK", 0, 0, COUNT)
    with work if first else contextlib.nullcontext():  # the first process makes it, the others use it
        load_teacher = functools.partial(load_within, teacher, memory=memory, on_disk=teacher_on_disk, told=told)
        run = _Run(folder, settings, data, teacher, None if teacher is None else load_teacher, prepare)
        if settings.cache_teacher:
            run.cache(work.path / "teacher", first)
        trainer = RecoveryTrainer(
            run.model,
            run.loss if wrap_loss is None else wrap_loss(run.loss, run.model),
            run.dataset,
            run.collator,
            run.settings,
            work.path / "training",
            identity=identity,
            report=report,
        )
        trainer.accelerator.wait_for_everyone()
        with disk_errors(work.path / "training"), quiet_transformers():
            trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
        model_now = run.result(trainer)
        if finish is not None:
            finish(model_now, run.processor)
        outcome = TrainingReport(
            path=str(out),
            steps=trainer.state.global_step,
            **dataclasses.asdict(run.count),
            share=run.count.share,
            settings=settings.to_dict(),
            history=trainer.history,
            samples=len(run.dataset),
            rows_left_out=sorted(trainer.rows_left_out),
            bits_per_weight=None,
            compressed_bytes=None,
            seconds=time.monotonic() - start,
            peak_rss_bytes=peak_rss_bytes(),
        )
        if first:
            outcome = _save(model_now, run, work, outcome)
    trainer.accelerator.wait_for_everyone()
    return outcome


class _Run:
    """Everything that is loaded for a run."""

    def __init__(
        self,
        folder: Path,
        settings: TrainingSettings,
        data: DataFactory,
        teacher: str | Path | None,
        load_teacher: Callable[..., tuple[Any, Any]] | None,
        prepare: Callable[[nn.Module], None] | None,
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() and settings.device == "auto" else "cpu")
        fast = device.type == "cuda" if settings.bf16 is None else settings.bf16
        self.settings = settings = dataclasses.replace(settings, bf16=fast)
        self.folder, self.prepare = folder, prepare
        self.processor = load_processor(folder)
        self.teacher: nn.Module | None = None
        if teacher is not None and load_teacher is not None:
            check_tokenizers(self.processor, processor_of(teacher), str(teacher))
            self.teacher = load_teacher(device=str(device))[0]
            if Weights.of(self.teacher).streamed and (settings.hidden or not settings.cache_teacher):
                raise FourierError(
                    "the teacher does not fit in memory, and would be read from the disk at every step",
                    remedy="Let it speak once: --cache-teacher 64, without --hidden",
                    where=str(teacher),
                )
        self.model = self._load(device)
        quantised = getattr(self.model.config, "quantization_config", None)
        self.before = quantised.metadata if isinstance(quantised, FourierQuantizationConfig) else None
        longest = min(settings.max_length or _LONGEST, context_length(self.model), _LONGEST)
        self.dataset = data(self.processor, longest)
        self.collator = Collator(self.processor.tokenizer.pad_token_id or 0)
        self._make_trainable()
        self.count = choose(self.model, settings.parts)
        self.loss = RecoveryLoss(
            None if self.teacher is None else ModelTeacher(self.teacher),
            cross_entropy=settings.cross_entropy if self.teacher is not None else settings.cross_entropy or 1.0,
            divergence=settings.divergence,
            hidden=settings.hidden,
            temperature=settings.temperature,
        )

    def cache(self, folder: Path, first: bool) -> None:
        """Let the teacher speak once, then leave memory; the first process asks, the others wait for it."""
        if self.teacher is None or self.settings.hidden:
            raise FourierError(
                "only a teacher's distribution can be cached", remedy="Give --teacher, and leave --hidden out"
            )
        if first:
            ask(ModelTeacher(self.teacher), self.dataset, self.collator, folder, self.settings.cache_teacher)
        self.dataset = CachedTargets(self.dataset, folder)
        self.loss.teacher = None
        if not Weights.of(self.teacher).streamed:
            self.teacher = self.teacher.to("cpu")

    def _load(self, device: torch.device) -> nn.Module:
        # what is trained becomes float32; the rest is rounded by nobody on a CPU, and in bf16 on a GPU
        dtype = torch.bfloat16 if device.type == "cuda" and self.settings.bf16 else torch.float32
        return load(self.folder, str(device), dtype, answers=False)[0]

    def _make_trainable(self) -> None:
        model, rank, factors = self.model, self.settings.rank, None
        if self.prepare is not None:  # first: what it attaches changes what layers see
            self.prepare(model)
        if self.before is not None and rank is not None:
            if self.teacher is None:
                factors = blank_factors(model, rank, self.settings.seed)
            else:
                factors = initial_factors(model, self.teacher, rank, self.moments())
            has = [name for name, layer in packed_layers(model) if getattr(layer.layout, "rank", 0)]
            if rank == 0 and has:
                raise FourierError("the model's layers have factors", remedy="Leave --rank out", where=has[0])
        make_trainable(model, factors)

    def moments(self) -> dict[str, torch.Tensor]:
        """Second moments of what the layers now see (`train.factors.second_moments`)."""
        device = next(self.model.parameters()).device
        size, count = self.settings.batch, min(_MOMENT_SAMPLES, len(self.dataset))

        def batches() -> Iterator[dict[str, Any]]:
            for first in range(0, count, size):
                items = [self.dataset[i] for i in range(first, min(first + size, count))]
                yield on_device(self.collator(items), device)

        with torch.autocast(device.type, torch.bfloat16, enabled=bool(self.settings.bf16)):
            return second_moments(self.model, batches())

    def result(self, trainer: RecoveryTrainer) -> nn.Module:
        """The trained model, whole; where its parameters are sharded, put together anew (all processes call it)."""
        if not self.settings.fsdp:
            return trainer.accelerator.unwrap_model(trainer.model)
        tensors = trained_tensors(trainer.model)
        model = self._load(torch.device("cpu"))
        if self.before is not None:
            ranks = {name.rpartition(".")[0]: t for name, t in tensors.items() if name.endswith(".left")}
            make_trainable(model, {n: (t, tensors[f"{n}.right"]) for n, t in ranks.items()})
        if self.prepare is not None:
            self.prepare(model)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].data = tensor
        return model


def _save(model: nn.Module, run: _Run, work: WorkFolder, outcome: TrainingReport) -> TrainingReport:
    model = model.to("cpu")
    make_packed(model)
    stored = read_config(run.folder)
    model.to(getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype") or "float32")))
    if run.before is not None:
        for layer_name, layer in packed_layers(model):
            layer.output_error = None  # the inputs are others now
            layer.weight_error = None
            if run.teacher is not None:
                weight = original_weight(run.teacher, layer_name, layer)
                layer.weight_error = weight_error(weight, layer.dequantize())
        config, rank = run.before.config, run.settings.rank
        config = config if rank is None else config.replace(rank=rank)
        mark_compressed(model, None, config=config, not_compressed=run.before.not_compressed)
    with disk_errors(work.path), quiet_transformers():
        work.result.mkdir(exist_ok=True)
        model.save_pretrained(work.result)
        run.processor.save_pretrained(work.result)
        carry_unused(run.folder, work.result)
        if (run.folder / LEDGER).is_file():
            shutil.copyfile(run.folder / LEDGER, work.result / LEDGER)
        if run.before is not None:
            size = describe(work.result)
            outcome = dataclasses.replace(
                outcome, bits_per_weight=size.bits_per_weight, compressed_bytes=size.compressed_bytes
            )
        write_text(work.result / TRAINING, json.dumps(outcome.to_dict(), indent=1))
    work.finish()
    return outcome


def _identity(folder: Path) -> str:
    """SHA-256 over config.json and every byte of the weights, an adapter's too."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder), *adapter.files(folder)):
        with reading(path), path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def check_tokenizers(student: Any, teacher: Any, where: str) -> None:
    """Raise `FourierError` unless both processors number the same words alike."""
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise FourierError(
            "the teacher has another tokenizer than the model",
            remedy="Give the model that this one was compressed from as teacher",
            where=where,
        )
