"""Safetensors files read and written tensor by tensor, so that memory holds one tensor and not one file.

The library's own `safe_open` maps the whole file (its pages count as resident memory) and its `save_file`
needs every tensor at once. The format is simple enough to do better: 8 bytes of header length
(little-endian), a JSON header name → {dtype, shape, data_offsets}, then the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from llava_fa.data.textfiles import reading
from llava_fa.errors import FourierError, explained

CHUNK = 16 << 20
"""Bytes copied at once."""

COPY_AGAIN = "Copy or download it again"
_SHORT = "the file is cut short"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "U32": 32, "U64": 64, "C64": 64},
}
"""Bits of an element, of every dtype that the format has."""
_LONGEST_HEADER = 100_000_000
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that can be compressed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: where its bytes lie, and what they mean."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slice(self, index: int) -> Entry:
        """The element ``index`` along the first axis, which stays: an entry of its own, [1, …]."""
        return self.rows(index, index + 1)

    def rows(self, start: int, end: int) -> Entry:
        """Elements along the first axis from one to before another: an entry of its own."""
        size, count = self.nbytes // self.shape[0], end - start
        shape = (count, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, start=self.start + start * size, nbytes=count * size)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its elements.

        Raises:
            FourierError: one that is not read here, such as float8.
        """
        if self.dtype not in DTYPES:
            raise FourierError(
                f"{self.name} has dtype {self.dtype}", remedy="Give a float16, bfloat16 or float32 checkpoint"
            ).at(self.file.name)
        return DTYPES[self.dtype]

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        dtype = self.torch_dtype
        with reading(self.file), open(self.file, "rb") as file:
            file.seek(self.start)
            buffer = torch.empty(self.nbytes, dtype=torch.uint8)
            if file.readinto(memoryview(buffer.numpy())) != self.nbytes:
                raise _damaged(self.file, f"{_SHORT}: {self.name} is incomplete")
        return buffer.view(dtype).reshape(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The raw bytes, a few MB at a time."""
        with reading(self.file), open(self.file, "rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise _damaged(self.file, f"{_SHORT}: {self.name} is incomplete")
                left -= len(chunk)
                yield chunk


def read_header(path: Path) -> tuple[dict[str, Entry], str]:
    """The tensors of one file and the SHA-256 of its header.

    What the safetensors library refuses is refused: tensors must fill the file behind the header without holes.

    Raises:
        FourierError: the file cannot be read, is shorter or longer than its header says, or is not safetensors.
    """
    with reading(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or size < 8 + length:
                raise _damaged(path, f"{_SHORT}: it has {size} bytes, less than its header")
            raw = file.read(length) if length <= _LONGEST_HEADER else b""
    kinds = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
    what = "its header is not that of a safetensors file"
    with explained(what, remedy=COPY_AGAIN, where=str(path), kinds=kinds, words=None):
        header = json.loads(raw.decode())
        notes = header.pop("__metadata__", None)
        if notes is not None and not all(isinstance(note, str) for note in notes.values()):
            raise ValueError
        entries = {name: _entry(path, name, 8 + length, **value) for name, value in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.start + entry.nbytes)):
        if entry.start != end:
            raise _damaged(path, f"{entry.name} begins at byte {entry.start} where the one before ends at {end}")
        if 8 * entry.nbytes != _BITS[entry.dtype] * entry.numel:
            raise _damaged(path, f"{entry.name}: {entry.nbytes} bytes do not make {entry.dtype} {list(entry.shape)}")
        end += entry.nbytes
    if end != size:
        short = f"{_SHORT}: " if end > size else ""
        raise _damaged(path, f"{short}it has {size} bytes where its header announces {end}")
    return entries, hashlib.sha256(raw).hexdigest()


def _entry(
    path: Path, name: str, origin: int, *, dtype: str, shape: list[int], data_offsets: list[int], **_: Any
) -> Entry:
    start, end = data_offsets
    if dtype not in _BITS or not all(type(value) is int and value >= 0 for value in (*shape, start, end - start)):
        raise ValueError(name)
    return Entry(path, name, dtype, tuple(shape), origin + start, end - start)


def read_entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of several files, as `read_header` gives those of each."""
    return {name: entry for path in paths for name, entry in read_header(path)[0].items()}


def file_metadata(path: Path) -> dict[str, str]:
    """The free-form part of a file's header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(length)).get("__metadata__", {}))


def _damaged(path: Path, what: str) -> FourierError:
    return FourierError(what, remedy=COPY_AGAIN, where=str(path))


class Copied(Protocol):
    """A stored tensor whose bytes can be had: an `Entry`, or what stands for one."""

    @property
    def dtype(self) -> str:
        """Its dtype, by the format's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""

    def chunks(self) -> Iterable[bytes]:
        """The raw bytes, in C order."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor to be written; ``data`` gives its ``nbytes`` bytes when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Iterable[bytes]]

    @classmethod
    def copy(cls, entry: Copied, name: str) -> Item:
        """Copies a stored tensor as it is, whatever its dtype, under a name of its own."""
        return cls(name, entry.dtype, entry.shape, entry.nbytes, entry.chunks)

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Item:
        """A tensor in memory."""
        nbytes = tensor.numel() * tensor.element_size()
        return cls(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), nbytes, lambda: tensor_chunks(tensor))

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return self.nbytes // max(math.prod(self.shape), 1)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in C order."""
    return b"".join(tensor_chunks(tensor))


def tensor_chunks(tensor: torch.Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in C order, a few MB at a time."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    for part in flat.view(torch.uint8).split(CHUNK) if flat.numel() else ():
        yield part.numpy().tobytes()


def write_file(path: Path, items: Iterable[Item], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all: a temporary name, fsync, then rename.

    Tensors are laid out as the library does (wide dtypes first), so that every one is aligned.
    """
    items = sorted(items, key=lambda item: (-item.width, item.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for item in items:
        end = offset + item.nbytes
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def body(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            for chunk in item.data():
                file.write(chunk)

    write_atomically(path, body)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, body: Callable[[BinaryIO], object]) -> None:
    """Run ``body`` on a temporary file beside ``path``, flush it to the disk, and give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        body(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
