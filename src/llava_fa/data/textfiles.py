"""Text, JSON, JSON lines and tables as they really come: one reader for all that users and benchmarks hand in.

UTF-8 with or without a byte order mark, and UTF-16 and UTF-32 with one, are read. Any other encoding is an error that
says where the file stops being UTF-8: what a byte means in the others cannot be known from the file. Lines end at
``\\n`` or ``\\r\\n`` and nowhere else: JSON may hold U+2028, U+2029 and U+0085 within its strings.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_fa.errors import FourierError

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHECK = "Check its permissions, and the disk"
_MEND = "Mend the file"
_CUT_SHORT = "It seems to be cut short: fetch or write it again"
_CONVERT = "Convert it to UTF-8: iconv -f ENCODING -t UTF-8"


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        FourierError: there is no such file, or it may not be read; names it.
    """
    with reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the operating system says about a file or folder that is read becomes an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FourierError("no such file", remedy="Check the path", where=str(path)) from None
    except OSError as error:
        remedy = "Give a file, not a folder" if isinstance(error, IsADirectoryError) else _CHECK
        raise FourierError(f"it cannot be read ({error.strerror or error})", remedy=remedy, where=str(path)) from error


def decoded(data: bytes, where: str) -> str:
    """Bytes of a text file as text, the byte order mark left out; line ends stay as they are.

    Args:
        data: all of the file.
        where: the file, for errors.

    Raises:
        FourierError: it is in another encoding; says at which byte.
    """
    mark, encoding = next(((m, name) for m, name in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        byte, line = f"0x{data[offset]:02x}", data.count(b"\n", 0, offset) + 1
        name = encoding[:-3].upper() if mark and encoding != "utf-8" else "UTF-8"
        what = f"it is not {name}: byte {byte} at offset {offset} (line {line})"
        raise FourierError(what, remedy=_CONVERT, where=where) from None
    if not mark and "\0" in text:
        offset = data.index(b"\0")
        what = f"there is a zero byte at offset {offset}: it is no text, or in UTF-16 without a byte order mark"
        raise FourierError(what, remedy=_CONVERT, where=where)
    return text


def read_text(path: Path) -> str:
    """A text file (see `decoded`), line ends as they are.

    Raises:
        FourierError: it cannot be read, or is in another encoding.
    """
    return decoded(read_bytes(path), str(path))


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends; the last one where it is not empty."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path, remedy: str = "") -> Any:
    """A JSON file.

    Args:
        path: the file.
        remedy: what to do about one that is not JSON, where more is known than that it should be mended.

    Raises:
        FourierError: it cannot be read, or is not JSON; says at which line and column.
    """
    return parsed(read_text(path), str(path), remedy=remedy)


def read_rows(path: Path, needs: str = "Give the official file") -> list[dict[str, Any]]:
    """The objects of a file: JSON lines, or one JSON list, whatever its ending.

    Args:
        path: the file.
        needs: what it should be, as the remedy where it is something else.

    Raises:
        FourierError: it cannot be read, is not JSON, or holds anything but objects.
    """
    text, where = read_text(path), str(path)
    rows = parsed(text, where) if text.lstrip()[:1] == "[" else rows_of(text, where)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            what = f"it is not a list of objects (row {number} is of type {type(row).__name__})"
            raise FourierError(what, remedy=needs, where=where)
    return rows


def rows_of(text: str, where: str) -> list[Any]:
    """The values of a text in JSON lines; empty lines count as lines, and hold none.

    Raises:
        FourierError: a line is not JSON; says which, and where in it.
    """
    lines = lines_of(text)
    if len(lines) > 1 and _is_json(text):  # one value, written over several lines
        return [json.loads(text)]
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    return [
        parsed(line, where, line=number, last=number == last) for number, line in enumerate(lines, 1) if line.strip()
    ]


def parsed(text: str, where: str, *, line: int = 1, last: bool = True, remedy: str = "") -> Any:
    """JSON text as a value.

    Args:
        text: the JSON.
        where: its file, for errors.
        line: the number that its first line has in the file.
        last: whether the file ends with it.
        remedy: as for `read_json`.

    Raises:
        FourierError: it is not JSON; says at which line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends_early = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        remedy = remedy or (_CUT_SHORT if last and ends_early else _MEND)
        raise FourierError(f"it is not JSON ({place}: {error.msg})", remedy=remedy, where=where) from None
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise FourierError(
            f"it is not JSON that can be read (line {line}: {said})", remedy=_MEND, where=where
        ) from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV file with a header; cells may hold line ends and pictures.

    Raises:
        FourierError: it cannot be read, or a row has not as many cells as the header.
    """
    text = read_text(path)
    csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    except csv.Error as error:
        raise FourierError(f"it is no table ({error})", remedy="Give the official TSV", where=str(path)) from None
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            what = f"row {number} has not as many cells as the header"
            raise FourierError(what, remedy="Fetch it again", where=str(path))
    return rows


def read_log(path: Path, *, shorten: bool = True) -> list[Any]:
    """The values of a file of JSON lines that is written line by line; a file that is not there yet has none.

    Args:
        path: the file.
        shorten: cut off the file what a killed run left half written, so that the next line can be appended; it is
            never read.

    Raises:
        FourierError: it cannot be read or shortened, or a whole line is not JSON.
    """
    if not path.exists():
        return []
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if shorten and whole != data:
        try:
            with path.open("r+b") as stream:
                stream.truncate(len(whole))
        except OSError as error:
            what = f"it ends in the middle of a line, and cannot be shortened ({error.strerror})"
            raise FourierError(what, remedy="Give a writable folder", where=str(path)) from None
    return rows_of(decoded(whole, str(path)), str(path))
