"""What every benchmark is: questions read from the files as they are published, and the official rules that score them.

A benchmark is a folder of the user's, read into `Item`s by `Benchmark.read`; the runner (`.run`) asks a model; and
`Benchmark.score` turns the answers into a `Score`: the official figures, and statistics that intervals and comparisons
are drawn from (`.statistics`). Downloading is left to the user: nothing here touches the network.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from llava_fa.data import pictures
from llava_fa.errors import FourierError, shown
from llava_fa.eval.benchmarks.statistics import part
from llava_fa.eval.intervals import wilson
from llava_fa.hub import shards

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""The two instructions of LLaVA-1.5's evaluation (Liu et al. 2023, appendix)."""

Reporter = Callable[[int, int], None]
"""Called with (done, all)."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question to ask. ``id`` is unique in the benchmark; ``unit`` ties questions that only count together.

    A picture is a file, base64 text as in the TSV files, or a picture in memory.
    """

    id: str
    prompt: str
    pictures: tuple[Any, ...]
    expected: Any = None
    part: str = ""
    unit: str = ""
    row: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """What the official file says of it, for scoring and for the submission."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Scored answers.

    Attributes:
        figures: the official figures by name, shares as shares (0.5, not 50), the headline figure excepted.
        parts: category → ``{"score", "metric", "interval", "questions"}``.
        correct: item id → share of the question that was answered right, in [0, 1]; None where it is not known.
        units: names of what is drawn together when the benchmark is resampled: a question, a pair, a rotation.
        statistics: float64 [units, k]; the headline figure is `Benchmark.headline` of their sum.
        read: item id → what the official rules made of the answer, where they do more than compare.
        interval: ([low, high], how) of the headline where the benchmark has its own; else drawn from the statistics.
    """

    figures: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    correct: dict[str, float | None]
    units: list[str]
    statistics: np.ndarray
    read: dict[str, Any] = dataclasses.field(default_factory=dict)
    interval: tuple[list[float], str] | None = None


class Benchmark(abc.ABC):
    """One benchmark: subclasses say how its files are read, scored and written.

    ``options`` holds what only some benchmarks need (a judge's address); a benchmark takes from it what it knows.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    """Name of the headline figure."""
    percent: ClassVar[bool] = True
    """Whether the headline figure is a share, shown times 100."""
    max_new_tokens: ClassVar[int] = 128
    """LLaVA-1.5's limit for short answers; long ones have their own."""
    files: ClassVar[str] = ""
    """What belongs into the folder, for help and for errors."""
    from_files: ClassVar[bool] = True
    """Whether ``--data`` is needed."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.options = options
        self.progress: Reporter = lambda done, total: None
        """Told of scoring that takes long."""

    def asked_with(self) -> dict[str, Any]:
        """The options that answers depend on: a run is continued only with the same."""
        return self.options

    @abc.abstractmethod
    def read(self) -> list[Item]:
        """The questions, in the files' order.

        Raises:
            FourierError: a file is missing or broken; says which, what is wrong and what is expected.
        """

    @abc.abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """The official figures of these answers. Items may be a part of the benchmark; units are whole."""

    def headline(self, sums: np.ndarray) -> np.ndarray:
        """Headline figure of summed statistics, [..., k] → [...]; by default Σ score / Σ count."""
        return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)

    @abc.abstractmethod
    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """Write the files that the official scorer or server takes; returns them."""

    def missing(self, path: Path, what: str = "no such file") -> FourierError:
        """The error for what is not there."""
        return FourierError(what, remedy=f"{self.name} needs {self.files}", where=str(path))

    def first(self, *patterns: str) -> Path:
        """The first file that matches a pattern in the folder; several matches of one pattern are ambiguous."""
        for pattern in patterns:
            paths = sorted(self.folder.glob(pattern))
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                raise FourierError(
                    f"several files fit {pattern}: {names}", remedy="Keep one a folder", where=str(self.folder)
                )
            if paths:
                return paths[0]
        raise self.missing(self.folder / patterns[0])

    def pictures_in(self, *names: str) -> Path:
        """The first of these folders that exists; the benchmark's own folder where ``.`` is the last."""
        for name in names:
            if (self.folder / name).is_dir():
                return self.folder / name
        raise self.missing(self.folder / names[0], "no such folder")


def broken(what: str, where: object) -> FourierError:
    """The error for an official file that is not whole, or another one."""
    return FourierError(what, remedy="Fetch it again", where=str(where))


def mean_parts(items: Sequence[Item], correct: Mapping[str, float | None], metric: str) -> dict[str, dict[str, Any]]:
    """Mean correctness of every part, in order of appearance."""
    groups: dict[str, list[float]] = {}
    for item in items:
        if item.part:
            groups.setdefault(item.part, []).append(correct[item.id] or 0.0)
    return {
        name: part(sum(values) / len(values), metric, wilson(sum(values), len(values)), len(values))
        for name, values in groups.items()
    }


def sums_by_unit(
    items: Sequence[Item], parts: Sequence[str], values: Sequence[Sequence[float]]
) -> tuple[list[str], np.ndarray]:
    """The units in order of appearance, and the sums of their items' k values: float64 [units, parts, k]."""
    units = list(dict.fromkeys(item.unit for item in items))
    places = {unit: i for i, unit in enumerate(units)}
    sums = np.zeros((len(units), len(parts), len(values[0])))
    for item, row in zip(items, values, strict=True):
        sums[places[item.unit], parts.index(item.part)] += row
    return units, sums


def score_alone(
    items: Sequence[Item],
    answers: Sequence[str],
    metric: str,
    rule: Callable[[Item, str], Any],
    right: Callable[[Item, str], float] | None = None,
) -> Score:
    """Answers that count one by one; where the right ones are not known, nothing but what the rules read.

    Args:
        items, answers: what was asked and answered.
        metric: of the parts.
        rule: what the official rules make of an answer.
        right: the share of an answer that is right; by default whether what was read is what is expected.
    """
    pairs = list(zip(items, answers, strict=True))
    read = {item.id: rule(item, text) for item, text in pairs}
    if any(item.expected is None for item in items):
        return Score({}, {}, dict.fromkeys(read), [], statistics_of([]), read)
    correct: dict[str, float | None] = {
        item.id: float(read[item.id] == item.expected if right is None else right(item, text)) for item, text in pairs
    }
    values = [value or 0.0 for value in correct.values()]
    figures = {"accuracy": sum(values) / len(values)}
    return Score(figures, mean_parts(items, correct, metric), correct, list(correct), statistics_of(values), read)


def fields(row: dict[str, Any], names: Sequence[str], where: str) -> list[Any]:
    """The named fields of a row; one that is missing is an error with the row's place."""
    absent = [name for name in names if name not in row]
    if absent:
        raise FourierError(
            f"it has no {', '.join(map(repr, absent))} (it has {shown(list(row), 200)})",
            remedy="Give the official file",
            where=where,
        )
    return [row[name] for name in names]


def open_picture(picture: Any, where: str) -> Image.Image:
    """A picture of an `Item`, upright and RGB."""
    return pictures.open_picture(pictures.from_base64(picture, where) if isinstance(picture, str) else picture, where)


def write_text(path: Path, text: str) -> Path:
    """Write a file, complete or not at all."""
    shards.write_text(path, text)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON through a temporary name; NaN is refused."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """One object a line, through a temporary name."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def statistics_of(values: Sequence[float]) -> np.ndarray:
    """Statistics [units, 2] of a figure that is a mean: (value, 1) a unit."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1).reshape(-1, 2)
