"""Pictures: one way in for all of them, from files, bytes, datasets and memory, to upright RGB of 8 bits a channel.

Cameras store pictures as their sensor lies, and how they are to be turned in EXIF; whoever shows them turns them, and
so did those who wrote the questions. Pillow's ``convert`` clips what has more than 8 bits: a 16-bit picture becomes
white. All else is as ``convert("RGB")`` has it: alpha is dropped, a palette looked up, CMYK converted; of an animation
the first frame is taken.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from llava_fa.errors import FourierError, shown

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations; 1 is upright."""
_LONGEST = 300
"""Characters of a path, or of Pillow's words, that an error repeats."""
_SIXTEEN_BIT = ("PNG", "PPM")
"""Formats whose greyscale of 16 bits Pillow gives as mode I in some of its versions."""


def open_picture(picture: Any, where: str = "") -> Image.Image:
    """A picture, decoded now, so that an error comes now and says which it is.

    Args:
        picture: a path; a picture in memory; encoded bytes; or bytes and path as datasets keep them,
            ``{"bytes": …, "path": …}``.
        where: which row or option asks for it.

    Returns:
        A new picture in mode RGB, upright, without EXIF.

    Raises:
        FourierError: it is not there, cannot be decoded, or is something else.
    """
    if isinstance(picture, Mapping) and ("bytes" in picture or "path" in picture):
        content = picture.get("bytes")
        return open_picture(picture.get("path") if content is None else content, where)
    if isinstance(picture, Image.Image):
        with _readable("the picture", where):
            return upright(picture)
    if isinstance(picture, (bytes, bytearray, memoryview)):
        name, source = f"the picture of {len(picture)} bytes", io.BytesIO(picture)
    elif isinstance(picture, (str, os.PathLike)):
        name, source = f"image {_path(picture)}", picture
    else:
        what = f"{shown(picture)} is no picture"
        raise FourierError(what, remedy="Give a path, a PIL image, or a picture's bytes", where=where)
    with _readable(name, where), Image.open(source) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An opened picture in RGB, turned as its EXIF says; a new picture, without EXIF.

    Greyscale of more than 8 bits is scaled. Of 16 bits the upper 8 are kept, as Pillow does with colour. Where a mode
    has no range of its own (32 bits, floats), values in [0, 255] stay, those in [0, 1] (floats) and [0, 65535] are
    taken as shares of it, and all others are stretched from the least to the largest; what is not finite is black.
    """
    with _quiet():
        image.load()
        return _turned(image, _orientation(image))


def seen_otherwise(image: Image.Image) -> Image.Image | None:
    """An opened picture as `upright` has it where Pillow's ``exif_transpose`` and ``convert("RGB")``, which is what
    transformers does, would show it otherwise or fail; None where they show the same."""
    with _quiet():
        image.load()
        turn = _orientation(image)  # first: where EXIF is damaged, Pillow fails once and then says there is none
        if turn is not None and not _is_deep(image):
            try:
                ImageOps.exif_transpose(image)
            except Exception:  # it writes EXIF anew, and some that it reads it cannot write
                return _turned(image, turn)
            return None
        return _turned(image, turn)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, of damaged EXIF and of palettes: nothing that changes what is seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image) -> int | None:
    """EXIF's orientation of a loaded picture, None where EXIF is damaged: viewers show such pictures as they lie."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a parser of what cameras and editors wrote
        return None


def _turned(image: Image.Image, orientation: int | None) -> Image.Image:
    picture = (_scaled(image) if _is_deep(image) else image).convert("RGB")
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    picture.info.clear()  # else whoever opens it once more turns it once more
    return picture


def _is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits a channel, which Pillow's ``convert`` clips."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode.startswith("I;"):
        return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    values = values.astype(np.float64)
    known = values[np.isfinite(values)]
    least, most = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if image.mode == "I" and image.format in _SIXTEEN_BIT and least >= 0 and most <= 65535:
        scaled = np.floor(values / 256)
    elif image.mode == "F" and least >= 0 and most <= 1:
        scaled = np.rint(values * 255)
    elif least >= 0 and most <= 255:
        scaled = values
    elif image.mode == "I" and least >= 0 and most <= 65535:
        scaled = np.floor(values / 256)
    else:
        scaled = np.rint((values - least) * (255 / max(most - least, np.finfo(np.float64).tiny)))
    finite = np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
    return Image.fromarray(np.clip(finite, 0, 255).astype(np.uint8))


def film_frames(path: Path, choose: Callable[[int], Sequence[int]], where: str = "") -> list[Image.Image]:
    """Frames of an animated file.

    Args:
        path: a GIF, WebP or any other file that Pillow reads.
        choose: number of frames → which.
        where: which row asks for it.

    Raises:
        FourierError: it is not there, or cannot be decoded.
    """
    with _readable(f"image {_path(path)}", where), Image.open(path) as film:
        frames = []
        for number in choose(getattr(film, "n_frames", 1)):
            film.seek(number)
            frames.append(upright(film))
        return frames


def from_base64(text: str, where: str = "") -> bytes:
    """The bytes of a picture in base64, as tables hold them; line ends in it do not count.

    Raises:
        FourierError: it is not base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        what = f"{shown(text)} is no picture in base64 ({error})"
        raise FourierError(what, remedy="Mend or remove it", where=where) from None


def _path(path: str | os.PathLike[str]) -> str:
    """A path as errors name it: what is longer than any path is no path, but perhaps a picture in base64."""
    name = str(path)
    return name if len(name) <= _LONGEST else shown(name)


@contextmanager
def _readable(name: str, where: str) -> Iterator[None]:
    """What Pillow and the system raise on a picture becomes an error that names it."""
    try:
        yield
    except FourierError:
        raise
    except FileNotFoundError:
        what = f"{name} does not exist"
    except Image.DecompressionBombError:
        what = f"{name} has more pixels than Pillow decodes ({2 * (Image.MAX_IMAGE_PIXELS or 0)})"
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        said = getattr(error, "strerror", None) or str(error)[:_LONGEST]  # str() of an OSError repeats the path
        what = f"{name} cannot be read ({type(error).__name__}: {said})"
    else:
        return
    raise FourierError(what, remedy="Mend or remove it", where=where)
