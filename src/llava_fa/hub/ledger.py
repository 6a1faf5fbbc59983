"""Every tensor of a checkpoint, accounted for exactly once: packed, kept (why), dropped (why).

What is missing is no line of a ledger but an error (`hub.arrangement`): nothing is filled in.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from llava_fa.config import format_size
from llava_fa.errors import FourierError, located
from llava_fa.hub.arrangement import Arrangement
from llava_fa.hub.checkpoint import Metadata, file_keys, is_codebook
from llava_fa.hub.shards import Entry, write_text
from llava_fa.hub.source import LEDGER, Source, read_object, unread

PACKED, KEPT, DROPPED = "packed", "kept", "dropped"
_NAMED = 4
_BESIDE = "beside packed codes: bias or buffer of its layer"
_BUFFER = "no weight: a buffer of its module"


@dataclasses.dataclass(frozen=True)
class Account:
    """What a tensor is, or what became of it.

    Attributes:
        name: as it is stored.
        file, bytes: where, and how much of it.
        fate: ``packed``, ``kept`` (stored as the original had it) or ``dropped`` (not in the new checkpoint).
        why: of what is packed: the layer; else the reason.
    """

    name: str
    file: str
    bytes: int
    fate: str
    why: str


class Line(NamedTuple):
    """Tensors of one fate for one reason: the first of them, how many, their bytes."""

    fate: str
    why: str
    first: str
    count: int
    bytes: int

    def __str__(self) -> str:
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.first}{more}, {format_size(self.bytes)}"


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The accounts of one checkpoint.

    Attributes:
        tensors: one account a stored tensor, in the order of files and names.
        headers: weight file → bytes before its tensors; with these the accounts add up to the files' sizes.
        unread: weight files in the folder that are no part of the checkpoint → bytes.
    """

    tensors: tuple[Account, ...]
    headers: dict[str, int]
    unread: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.headers.values()) + sum(account.bytes for account in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)

    def summary(self) -> list[Line]:
        """Tensors of one fate for one reason together, largest first; all that is packed in one line."""
        lines: dict[tuple[str, str], list[Account]] = {}
        for account in self.tensors:
            key = (account.fate, "" if account.fate == PACKED else account.why)
            lines.setdefault(key, []).append(account)
        made = [
            Line(*key, some[0].name, len(some), sum(account.bytes for account in some)) for key, some in lines.items()
        ]
        return sorted(made, key=lambda line: -line.bytes)


def of_source(
    source: Source,
    arrangement: Arrangement,
    *,
    packed: Mapping[str, str] | None = None,
    rest: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Ledger:
    """What the tensors of an original are, or become.

    Args:
        source, arrangement: the checkpoint, and how the model is stored in it.
        packed: parameter → layer, of everything that is compressed.
        rest: module or parameter → why it is not.
        left_out: stored name → why, of everything that the new checkpoint does not have.
    """
    packed, rest, left_out = packed or {}, rest or {}, left_out or {}
    layers = set(packed.values())

    def account(key: str) -> tuple[str, str]:
        if key in left_out:
            return DROPPED, left_out[key]
        parameters = arrangement.parameters.get(key, (key,))
        if names := [packed[name] for name in parameters if name in packed]:
            return PACKED, ", ".join(names) if len(names) <= _NAMED else f"{names[0]} and {len(names) - 1} more"
        return KEPT, reason_of(parameters[0], rest, layers)

    return _ledger(source, account)


def of_compressed(folder: Path, entries: Mapping[str, Entry], metadata: Metadata) -> Ledger:
    """What the tensors of a compressed folder are (`checkpoint.validate` gives them)."""
    packed = {
        stored: "codebook of all layers" if is_codebook(key) else name
        for name, record in metadata.layers.items()
        for key, stored in file_keys(name, record.layout).items()
    }
    layers = set(metadata.layers)

    def account(key: str) -> tuple[str, str]:
        return (PACKED, packed[key]) if key in packed else (KEPT, reason_of(key, metadata.not_compressed, layers))

    others = unread(folder, {entry.file for entry in entries.values()})
    return _ledger(Source(folder, {}, dict(entries), "", unread=others), account)


def reason_of(parameter: str, rest: Mapping[str, str], layers: Set[str]) -> str:
    """Why a parameter stays as it is.

    Args:
        parameter: its name in the model.
        rest: module or parameter → why it is not compressed.
        layers: names of the layers that are.
    """
    module = parameter.rpartition(".")[0]
    return rest.get(parameter) or rest.get(module) or (_BESIDE if module in layers else _BUFFER)


def _ledger(source: Source, account: Callable[[str], tuple[str, str]]) -> Ledger:
    shadow = "the last file that has a tensor of this name is the one that counts"
    files = sorted({entry.file for entry in (*source.entries.values(), *source.shadowed)})
    label = _labels(files)
    accounts = [Account(e.name, label[e.file], e.nbytes, DROPPED, shadow) for e in source.shadowed]
    accounts += [Account(key, label[e.file], e.nbytes, *account(key)) for key, e in source.entries.items()]
    accounts.sort(key=lambda one: (one.file, one.name))
    inside: dict[str, int] = dict.fromkeys(label.values(), 0)
    for one in accounts:
        inside[one.file] += one.bytes
    headers = {label[file]: file.stat().st_size - inside[label[file]] for file in files}
    return Ledger(tuple(accounts), headers, {path.name: path.stat().st_size for path in source.unread})


def _labels(files: list[Path]) -> dict[Path, str]:
    """Weight file → what it is called: its path from the innermost folder that has them all."""
    common = os.path.commonpath([file.parent for file in files]) if files else ""
    return {file: file.relative_to(common).as_posix() for file in files}


def write(folder: Path, ledger: Ledger) -> None:
    """Keep the original's ledger in a compressed folder."""
    write_text(folder / LEDGER, json.dumps(ledger.to_dict(), indent=0) + "\n")


def read(folder: Path) -> Ledger | None:
    """What `write` kept; None in a folder that has none.

    Raises:
        FourierError: the file is something else.
    """
    path = folder / LEDGER
    if not path.is_file():
        return None
    values = read_object(path)
    with located(str(path)):
        try:
            accounts = tuple(Account(**account) for account in values["tensors"])
            ledger = Ledger(accounts, dict(values["headers"]), dict(values["unread"]))
            ledger.summary(), ledger.nbytes
        except (KeyError, TypeError, ValueError, AttributeError):
            remedy = "Remove it; the model does not need it"
            raise FourierError("it is not the ledger of a compression", remedy=remedy) from None
    return ledger
