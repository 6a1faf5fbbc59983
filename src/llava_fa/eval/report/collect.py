"""Everything a report shows, measured: plain data, one `Run` a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import torch

from llava_fa.data.textfiles import read_json
from llava_fa.errors import FourierError
from llava_fa.eval.divergence import References, token_divergences
from llava_fa.eval.metrics import normalise
from llava_fa.eval.report.cache import Cache, fingerprint
from llava_fa.eval.runner import evaluate_world
from llava_fa.eval.spectra import Originals, Spectra, spectra
from llava_fa.hub.blocks import evenly
from llava_fa.hub.inspect import inspect_model, spending
from llava_fa.hub.loading import check_device, load
from llava_fa.hub.original import opened
from llava_fa.hub.processor import sees_pictures
from llava_fa.hub.report import LayerReport, Report
from llava_fa.hub.source import resolve_model
from llava_fa.world.samples import Sample, held_out_samples

Tell = Callable[[str, int, int], None]

DIFFERENCES = 10
"""Questions shown where the models differ most."""
_CANDIDATES = 30


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        limit: about how many held-out questions of the world every model answers; 0 for none.
        divergence: on about how many of them the KL divergence is measured.
        seed: of the questions' pictures.
        device: a torch device, or ``"auto"``.
        layers: patterns or names of the layers whose spectra are shown; by default the worst of each part.
    """

    limit: int = 450
    divergence: int = 90
    seed: int = 0
    device: str = "auto"
    layers: tuple[str, ...] = ()


@dataclasses.dataclass
class Difference:
    """One question that the original and a compressed model take differently; ``kl`` is the mean over its answer."""

    sample: Sample
    original: str
    compressed: str
    kl: float


@dataclasses.dataclass
class Run:
    """One model: what it is, how well it answers, and how far it is from the original.

    Attributes:
        name: for people, unique in the report.
        report, spent: as `inspect_model` and `spending` tell; None and nothing where there are only scores.
        scores: suite → result of `llava-fa eval` (``accuracy``, ``tasks``, ...).
        answers: one row a question, as `evaluate_world` gives them.
        divergence: KL of every token of the right answers, a list for each question of the even sample.
        differences: where this model and the original differ most.
        spectra: of the chosen layers.
    """

    name: str
    model: str
    report: Report | None = None
    spent: dict[str, int] = dataclasses.field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    answers: list[dict[str, Any]] | None = None
    divergence: list[list[float]] | None = None
    differences: list[Difference] = dataclasses.field(default_factory=list)
    differing: int = 0
    spectra: list[Spectra] = dataclasses.field(default_factory=list)

    @property
    def compressed(self) -> bool:
        """Whether this is a model that `llava-fa compress` has made."""
        return self.report is not None and self.report.method is not None


@dataclasses.dataclass(frozen=True)
class Findings:
    """All of a report: ``runs`` in the order they are shown, the original (where given) first."""

    runs: list[Run]
    original: Run | None
    settings: Settings
    dtypes: dict[str, str]
    """What was computed in which numbers."""


def collect(
    models: Sequence[str],
    original: str | None,
    settings: Settings,
    work: Path,
    tell: Tell = lambda what, done, total: None,
    answered: Mapping[str, dict[str, Any]] | None = None,
) -> Findings:
    """Measure everything; what takes long is kept in the folder ``work``, from which a killed run goes on.

    Args:
        models: folders, hub ids, ``tiny``, or JSON files that `llava-fa eval --json` wrote.
        original: what they were compressed from, for everything that compares.
        answered: model → what `evaluate_world` has told of it already, for ``settings``' questions.

    Raises:
        FourierError: no such model or file, or one that is not what it should be.
    """
    runs, first = _runs(models, original)
    cache = Cache(work)
    samples = held_out_samples(settings.limit, settings.seed) if settings.limit else []
    folders = [run for run in runs if run.report is not None]
    for run in folders if samples else ():
        result = (answered or {}).get(run.model) or cache(
            "answers",
            {"model": fingerprint(run.model), "limit": settings.limit, "seed": settings.seed},
            lambda run=run: _answer(run, settings, tell),
        )
        run.answers = result["answers"]
        run.scores.setdefault("world", {key: value for key, value in result.items() if key != "answers"})
    dtypes: dict[str, str] = {}
    if first is not None:
        others = [run for run in folders if run is not first]
        if samples:
            dtypes = _compare(first, others, samples, settings, cache, tell)
        _spectra(first, [run for run in others if run.compressed], settings, cache, tell)
    return Findings(runs, first, settings, dtypes)


def _runs(models: Sequence[str], original: str | None) -> tuple[list[Run], Run | None]:
    runs: dict[Path | str, Run] = {}
    results = []
    for model in [*([original] if original else []), *models]:
        if model.endswith(".json"):
            results.append(_result(Path(model).expanduser()))
        else:
            runs.setdefault(resolve_model(model).resolve(), Run(model, model))
    for where, result in results:
        try:
            key: Path | str = resolve_model(result["model"]).resolve()
        except FourierError:  # a result may outlive its model, or come from another machine
            key = result["model"]
        run = runs.setdefault(key, Run(result["model"], result["model"]))
        suite = str(result.get("task") or where.stem)
        run.scores[suite] = result
    for key, run in runs.items():
        if isinstance(key, Path):
            run.report, run.spent = inspect_model(run.model), spending(run.model)
    short = [Path(run.model).name for run in runs.values()]
    for run, name in zip(runs.values(), short, strict=True):
        run.name = name if short.count(name) == 1 else run.model
    every = list(runs.values())
    first = every[0] if original else None
    if first is not None and first.compressed:
        raise FourierError(
            "the original is a compressed model", remedy="Give the checkpoint it was made from", where=str(original)
        )
    return every, first


def _result(path: Path) -> tuple[Path, dict[str, Any]]:
    """What `llava-fa eval --json` wrote; ``accuracy`` is the headline where it is a share, None for points (MME)."""
    remedy = "Give what `llava-fa eval --json` wrote"
    result = read_json(path, remedy)
    try:
        tasks = {name: task for name, task in result["tasks"].items() if task["score"] is not None}
        headline = result["score"] if result.get("percent", True) else None
        good = bool(tasks) and isinstance(result["model"], str) and (headline is None or 0 <= headline <= 1)
        good = good and all(0 <= task["score"] <= 1 and task["questions"] >= 0 for task in tasks.values())
        result = {**result, "tasks": tasks, "accuracy": headline}
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise FourierError("it is no result of `llava-fa eval --json`", remedy=remedy, where=str(path))
    return path, result


def _answer(run: Run, settings: Settings, tell: Tell) -> dict[str, Any]:
    tell(f"loading {run.name}", 0, 1)
    model, processor = load(run.model, settings.device)
    if not sees_pictures(processor):
        raise FourierError(
            "this model does not see the pictures that the world's questions are about",
            remedy="Ask none: --limit 0",
            where=run.model,
        )
    return evaluate_world(
        model,
        processor,
        limit=settings.limit,
        seed=settings.seed,
        progress=functools.partial(tell, f"asking {run.name}"),
    )


def _compare(
    first: Run, others: list[Run], samples: list[Sample], settings: Settings, cache: Cache, tell: Tell
) -> dict[str, str]:
    """KL divergences and differences; one model in memory at a time, the original's distributions kept."""
    assert first.answers is not None
    even = evenly(len(samples), settings.divergence)  # tasks come one after the other
    differing = {}
    for run in others:
        rows = zip(first.answers, run.answers or [], strict=True)
        where = [i for i, (a, b) in enumerate(rows) if normalise(a["answer"]) != normalise(b["answer"])]
        run.differing = len(where)
        differing[run.model] = [where[i] for i in evenly(len(where), _CANDIDATES)]
    wanted = sorted({*even, *(i for chosen in differing.values() for i in chosen)})
    place = check_device(settings.device)
    # float32 on a CPU that has the memory, so that no model's own rounding is taken for divergence
    assert first.report is not None
    enough = 3 * first.report.compressed_bytes < psutil.virtual_memory().available
    dtype = torch.float32 if place.type == "cpu" and enough else None

    def loaded(run: Run) -> tuple[Any, Any, Tell]:
        tell(f"loading {run.name}", 0, 1)
        return *load(run.model, settings.device, dtype), functools.partial(tell, f"distributions of {run.name}")

    @functools.cache
    def original() -> tuple[References, list[torch.Tensor]]:
        model, processor, progress = loaded(first)
        references = References([samples[i] for i in wanted], processor)
        return references, references.log_probabilities(model, progress)

    def measure(run: Run) -> list[list[float]]:
        references, logs = original()
        model, _, progress = loaded(run)
        if run.compressed:
            model.dequantize()  # once, not for every question: the same function of the input up to rounding
        return [row.tolist() for row in token_divergences(logs, references.log_probabilities(model, progress))]

    for run in others:
        key = {
            "model": fingerprint(run.model),
            "original": fingerprint(first.model),
            "questions": wanted,
            "limit": settings.limit,
            "seed": settings.seed,
            "dtype": str(dtype),
        }
        rows = cache("divergence", key, functools.partial(measure, run))
        kls = dict(zip(wanted, rows, strict=True))
        run.divergence = [kls[i] for i in even]
        differences = [
            Difference(
                samples[i], first.answers[i]["answer"], (run.answers or [])[i]["answer"], sum(kls[i]) / len(kls[i])
            )
            for i in {*even, *differing[run.model]}
        ]
        differences.sort(key=lambda d: (normalise(d.original) != normalise(d.compressed), d.kl), reverse=True)
        run.differences = differences[:DIFFERENCES]
    return {"divergence": str(dtype).removeprefix("torch.") if dtype else "as loaded"}


PARTS = ("vision tower", "projector", "language model")
"""Of a vision-language model."""


def part_of(layer: str) -> str:
    """Which of `PARTS` a layer belongs to."""
    if any(mark in layer for mark in ("vision", "visual.", "image_encoder")):
        return "vision tower"
    return (
        "language model" if any(mark in layer for mark in ("language_model", "lm_head", "text_model")) else "projector"
    )


def layer_error(layer: LayerReport) -> float | None:
    """The error that matters, as `inspect` ranks: of the output where it is known, else of the weight."""
    return layer.weight_error if layer.output_error is None else layer.output_error


def chosen_layers(report: Report, wanted: Sequence[str]) -> list[str]:
    """Layers whose spectra are shown: those that match, or by default the worst of every part.

    Raises:
        FourierError: a pattern matches no compressed layer.
    """
    names = [layer.name for layer in report.layers]
    if wanted:
        chosen = []
        for pattern in wanted:
            hits = [n for n in names if n == pattern or n.endswith(f".{pattern}") or fnmatchcase(n, pattern)]
            if not hits:
                raise FourierError(
                    f"no compressed layer matches {pattern!r}", remedy="`llava-fa inspect --layers` lists them"
                )
            chosen += hits
        return list(dict.fromkeys(chosen))
    worst: dict[str, LayerReport] = {}
    # An embedding's error is never an output error, and its matrix is too large to take apart unasked.
    plain = [layer for layer in report.layers if not layer.embedding]
    for layer in sorted(plain, key=lambda layer: layer_error(layer) or 0.0, reverse=True):
        worst.setdefault(part_of(layer.name), layer)
    return [worst[part].name for part in PARTS if part in worst]


def _spectra(first: Run, runs: list[Run], settings: Settings, cache: Cache, tell: Tell) -> None:
    with opened(resolve_model(first.model)) as source:
        _compared(Originals(source), first, runs, settings, cache, tell)


def _compared(originals: Originals, first: Run, runs: list[Run], settings: Settings, cache: Cache, tell: Tell) -> None:
    todo = [(run, name) for run in runs if run.report for name in chosen_layers(run.report, settings.layers)]
    for done, (run, name) in enumerate(todo):
        tell(f"spectrum of {name}", done, len(todo))
        key = {"model": fingerprint(run.model), "original": fingerprint(first.model), "layer": name}
        folder = resolve_model(run.model)
        values = cache(
            "spectra", key, lambda folder=folder, name=name: dataclasses.asdict(spectra(originals, folder, name))
        )
        run.spectra.append(Spectra(**values))
