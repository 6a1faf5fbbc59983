"""The one exception the package raises on purpose, and how those of libraries become it."""

import contextlib
from collections.abc import Callable, Iterator

_LONGEST = 1000
"""Characters of each part of a message."""


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
        said = f" ({words(error)})" if words else ""
        raise FourierError(what + said, remedy=remedy, where=where) from error
