"""Pictures for the page: those that visitors upload, and examples of the generated world."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava_fa.data.pictures import upright
from llava_fa.errors import FourierError
from llava_fa.serve.errors import ApiError
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Pictures, Sources
from llava_fa.world.samples import held_out_samples


def read_picture(path: str | Path | None, limits: Limits) -> Image.Image:
    """An uploaded picture, upright and RGB, decoded only once it is known to be within the limits.

    Raises:
        FourierError: there is none, it is no picture, or it is too large.
    """
    if path is None:
        raise FourierError("there is no picture", remedy="Upload one, or pick an example")
    try:
        with Path(path).open("rb") as file:
            data = file.read(limits.image_bytes + 1)
    except OSError:
        raise FourierError("the picture is not here any more", remedy="Upload it again") from None
    try:
        picture = Pictures(limits, Sources()).look(data)
    except ApiError as error:
        raise FourierError(f"the picture is not taken: {error.message}", remedy="Give another") from None
    return upright(picture)


def write_examples(folder: Path, count: int = 9) -> list[tuple[str, str, str]]:
    """(picture's file, question, right answer) of so many pictures, every task of the world in turn."""
    examples, seen = [], set()
    for sample in held_out_samples(count):
        if id(sample.image) in seen:  # a pair or a rotation asks of its picture again
            continue
        seen.add(id(sample.image))
        path = folder / f"{len(examples):03d}.png"
        sample.image.save(path)
        examples.append((str(path), sample.question.text, sample.question.answer))
    return examples
