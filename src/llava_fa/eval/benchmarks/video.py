"""Questions about clips of the user's own: a folder of frames, or one animated file, a clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_fa.data.pictures import film_frames
from llava_fa.data.textfiles import read_rows
from llava_fa.errors import FourierError
from llava_fa.eval.benchmarks.base import (
    SHORT,
    Benchmark,
    Item,
    Score,
    fields,
    score_alone,
    write_json,
)
from llava_fa.eval.metrics import normalise

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Video(Benchmark):
    """Clips as frames, evenly spaced: exact match with one of the answers given.

    ``questions.jsonl`` (or ``.json``) has a row a question: ``video`` (a folder of pictures, in the order of their
    names, or a GIF or WebP), ``question``, and where it is to be scored ``answer``, one text or several; ``task`` is
    the part it counts to.

    Options: ``frames``, how many a clip is shown in.
    """

    name = "video"
    metric = "exact match"
    files = "questions.jsonl (video, question and answer in each row) and the clips: folders of frames, GIF or WebP"

    def read(self) -> list[Item]:
        """One item a row."""
        path = self.first("questions.jsonl", "questions.json")
        items = []
        for number, row in enumerate(read_rows(path), 1):
            where = f"{path.name} row {number}"
            clip, question = fields(row, ("video", "question"), where)
            answers = row.get("answer")
            given = answers if isinstance(answers, list) else [answers]
            expected = None if answers is None else [str(one) for one in given]
            frames = frames_of(self.folder / clip, self.options["frames"], where)
            items.append(Item(str(number), f"{question}\n{SHORT}", frames, expected, part=row.get("task", ""), row=row))
        return items

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Right where the answer is one of the given ones, but for case, articles and punctuation."""
        return score_alone(
            items,
            answers,
            self.metric,
            lambda _, text: normalise(text),
            lambda item, text: normalise(text) in map(normalise, item.expected),
        )

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """The rows with ``prediction``."""
        rows = [{**item.row, "prediction": text} for item, text in zip(items, answers, strict=True)]
        return [write_json(folder / "video.json", rows)]


def frames_of(clip: Path, count: int, where: str) -> tuple[Any, ...]:
    """At most ``count`` frames of a folder of pictures (their paths), a GIF or a WebP, evenly spaced.

    Raises:
        FourierError: there is no picture; ``where`` says who asked for it.
    """
    if clip.is_dir():
        frames = sorted(path for path in clip.iterdir() if path.suffix.lower() in PICTURES)
        if not frames:
            raise FourierError(f"there is no picture in {clip}", remedy="Give its frames", where=where)
        return tuple(frames[i] for i in _even(len(frames), count))
    try:
        return tuple(film_frames(clip, lambda total: _even(total, count), where))
    except FourierError as error:
        remedy = "Give a folder of frames (ffmpeg -i clip.mp4 -vf fps=1 clip/%04d.jpg), a GIF or a WebP"
        raise FourierError(error.what, remedy=remedy, where=error.where) from None


def _even(total: int, count: int) -> list[int]:
    """Places of ``count`` frames among all, each in the middle of its share; all where there are no more."""
    if total <= count:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
