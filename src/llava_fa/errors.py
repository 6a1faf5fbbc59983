"""The one exception the package raises on purpose, and how those of libraries become it."""

import contextlib
import errno
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path

_LONGEST = 1000
"""Characters of each part of a message."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FourierError(ValueError):
    """Something the user can mend: says where (layer or file), what is wrong, and what to do.

    The message reads ``"<where>: <what>. <remedy>"``; the parts stay available as attributes, so that an outer
    layer that knows more (which tensor of which file) re-raises with :meth:`at` and loses nothing.
    """

    def __init__(self, what: str, *, remedy: str = "", where: str = "") -> None:
        self.what, self.remedy, self.where = _cut(what), remedy, _cut(where)
        what, where = self.what, self.where
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def at(self, where: str) -> "FourierError":
        """The same error with its place put in front (outermost first)."""
        return FourierError(self.what, remedy=self.remedy, where=f"{where}: {self.where}" if self.where else where)


def _cut(text: str) -> str:
    """Text that repeats what a file or a request holds may be of any length: its begin and end say enough."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def shown(value: object, most: int = 80) -> str:
    """A value from outside as an error quotes it: text in quotation marks, no more than its beginning.

    Args:
        value: anything; a collection is looked at no further than what is shown.
        most: characters.
    """
    quoted = _SHORT.repr(value)
    return quoted if len(quoted) <= most else f"{quoted[: most - 1]}…"


class _Short(reprlib.Repr):
    """As ``repr``, but a row may hold a picture: long text, bytes and lists are cut before they are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxdict = self.maxlist = self.maxtuple = 8
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python writes no integers of more than 4300 digits
            return "a number of thousands of digits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"{len(value)} bytes"


_SHORT = _Short()
_LONGEST_SAID = 400
"""Characters of a library's message that are repeated."""


def _name_and_message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Inside, a `FourierError` gets ``where`` put in front of its place."""
    try:
        yield
    except FourierError as error:
        raise error.at(where) from error


@contextlib.contextmanager
def explained(
    what: str,
    *,
    remedy: str,
    where: str = "",
    kinds: tuple[type[Exception], ...] = (Exception,),
    words: Callable[[Exception], str] | None = _name_and_message,
) -> Iterator[None]:
    """Inside, what a library raises becomes a `FourierError`: ``what``, with the library's own words in brackets.

    Libraries raise all sorts on missing or damaged files, so that by default every exception is meant.
    """
    try:
        yield
    except FourierError:
        raise
    except kinds as error:
        said = words(error) if words else ""
        said = f" ({said if len(said) <= _LONGEST_SAID else said[: _LONGEST_SAID - 1] + '…'})" if words else ""
        raise FourierError(what + said, remedy=remedy, where=where) from error


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a disk into one error that tells the way out."""
    try:
        yield
    except FourierError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise FourierError(
                "the disk is full",
                remedy="Finished layers are kept: free some space and run the same command again, it resumes",
                where=str(path),
            ) from error
        raise FourierError(
            f"cannot write there ({error.strerror or error})",
            remedy="Give an OUT in a folder you may write to",
            where=str(path),
        ) from error
