"""Where samples come from: LLaVA-format files, Hugging Face datasets, and whatever else gives samples.

Calibration and training read the same rows of the same file in the same way; a row is opened when its turn comes.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_fa.data.samples import Sample, sample_of
from llava_fa.data.textfiles import read_rows
from llava_fa.errors import FourierError, explained

_CANNOT = "the dataset cannot be read"
_CHECK = "Check its name, the network, and that its images decode"
_BUFFER = 1000
"""Rows of a stream that are shuffled together, at least."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A sample that might be used: how people are told of it, and what opens it."""

    where: str
    open: Callable[[], Sample]


class Rows(Sequence[Sample]):
    """The samples of a source, opened one by one.

    Args:
        source: a LLaVA ``.json`` / ``.jsonl`` file, or a Hugging Face dataset.
        images: folder of the file's pictures; its own folder where not given.
        count: how many to draw; None for all.
        seed: of the draw.

    Raises:
        FourierError: the source cannot be read, or is empty.
    """

    def __init__(self, source: str, *, images: Path | None = None, count: int | None = None, seed: int = 0) -> None:
        self._table = _Table.of(source, images, streaming=False)
        self._indices = draw(len(self._table.rows), count, seed)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Sample:
        return self._table.sample(self._indices[index])

    def where(self, index: int) -> str:
        """How people are told of a row."""
        return self._table.where(self._indices[index])


@dataclasses.dataclass(frozen=True)
class SampleSource:
    """Samples by name, read anew whenever they are iterated.

    Args:
        name: a ``.json`` / ``.jsonl`` file with ``image`` and ``conversations`` in each row, or a dataset (folder or
            hub id).
        images: folder of the file's pictures; its own folder where not given.
        count: how many to draw; all when there are fewer.
        seed: of the draw.
        draw: (count, seed) → samples, for a source that is no file and no dataset.

    Raises:
        FourierError: a count below 1; when iterated, a source, row or picture that cannot be read.
    """

    name: str
    images: Path | None = None
    count: int = 128
    seed: int = 0
    draw: Callable[[int, int], Iterable[Sample]] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise FourierError(f"{self.count} samples", remedy="Give at least 1")

    def __iter__(self) -> Iterator[Sample]:
        candidates = self.candidates()
        return (candidate.open() for _, candidate in zip(range(self.count), candidates, strict=False))

    def candidates(self) -> Iterator[Candidate]:
        """The samples drawn, then all others: what may take the place of one that cannot be used.

        Raises:
            FourierError: the source cannot be read, or is empty.
        """
        if self.draw is not None:
            yield from candidates(self.draw(self.count, self.seed))
            return
        table = _Table.of(self.name, self.images, streaming=True)
        if not table.counted:
            yield from _streamed(table, self.count, self.seed)
            return
        drawn = draw(len(table.rows), self.count, self.seed)
        for index in (*drawn, *sorted(set(range(len(table.rows))) - set(drawn))):
            yield Candidate(table.where(index), functools.partial(table.sample, index))


def candidates(samples: Iterable[Sample], kind: str = "calibration sample") -> Iterator[Candidate]:
    """Samples in memory as candidates, numbered; those of a `SampleSource` by their rows."""
    if isinstance(samples, SampleSource):
        yield from samples.candidates()
        return
    for index, sample in enumerate(samples):
        yield Candidate(f"{kind} {index}", lambda sample=sample: sample)


def draw(total: int, count: int | None, seed: int) -> list[int]:
    """``count`` of so many indices, in their order; all where there are fewer, or for None."""
    return sorted(random.Random(seed).sample(range(total), total if count is None else min(count, total)))


@dataclasses.dataclass(frozen=True)
class _Table:
    """Rows that a file or a dataset holds: those that can be counted have numbers, a stream has none."""

    name: str
    rows: Any
    folder: Path

    @classmethod
    def of(cls, source: str, images: Path | None, *, streaming: bool) -> _Table:
        path = Path(source).expanduser()
        if path.suffix.lower() in (".json", ".jsonl"):
            rows = read_rows(path, needs='Each row needs "image" and "conversations"')
            folder = path.parent if images is None else images
            if not folder.is_dir():
                raise FourierError("no such image folder", remedy="Give the folder of the images", where=str(folder))
            table = cls(path.name, rows, folder)
        else:
            if images is not None:
                what = "an image folder goes with a LLaVA JSON file"
                raise FourierError(what, remedy="Leave it out", where=source)
            with explained(_CANNOT, remedy=_CHECK, where=source):
                table = cls(source, _split(source, streaming=streaming), Path())
        if table.counted and not len(table.rows):
            raise FourierError("it has no rows", remedy="Give another one", where=source)
        return table

    @property
    def counted(self) -> bool:
        """Whether rows can be counted, and had by number; a stream's class has a ``__getitem__`` that fails."""
        return hasattr(self.rows, "__len__")

    def where(self, index: int) -> str:
        return f"{self.name} row {index}"

    def sample(self, index: int) -> Sample:
        where = self.where(index)
        with explained(_CANNOT, remedy=_CHECK, where=where):  # `datasets` decodes pictures here
            row = self.rows[index]
        return sample_of(row, self.folder, where)


def _split(source: str, *, streaming: bool) -> Any:
    """The training split (or the first) of a Hugging Face dataset, saved in a folder or on the hub."""
    with explained(
        "reading a Hugging Face dataset needs the package `datasets`",
        remedy="`pip install datasets`, or give a LLaVA-format .json file",
        where=source,
        kinds=(ImportError,),
        words=None,
    ):
        import datasets
    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(source)
    else:
        data = datasets.load_dataset(source, streaming=streaming)
    return data["train" if "train" in data else next(iter(data))] if hasattr(data, "keys") else data


def _streamed(table: _Table, count: int, seed: int) -> Iterator[Candidate]:
    with explained(_CANNOT, remedy=_CHECK, where=table.name):
        reader = iter(table.rows.shuffle(seed=seed, buffer_size=max(_BUFFER, count)))
    index = 0
    while True:
        where = f"{table.name} sample {index}"
        with explained(_CANNOT, remedy=_CHECK, where=where):
            row = next(reader, None)
        if row is None:
            break
        yield Candidate(where, functools.partial(sample_of, row, table.folder, where))
        index += 1
    if not index:
        raise FourierError("it has no rows", remedy="Give another one", where=table.name)
