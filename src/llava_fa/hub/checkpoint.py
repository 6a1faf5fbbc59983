"""The format of a compressed checkpoint: its metadata, the names of its tensors, its checks (docs/format.md).

A compressed folder is an ordinary Hugging Face folder. ``config.json`` carries, as ``quantization_config``,
what `Metadata` holds; the safetensors files carry, for every layer, one tensor per entry of `Layout.tensors`
under ``<module name>.<tensor>``, except the codebook, stored once for all layers under `codebook_key`.
Module names are those of the model class in transformers, not older saved names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError, explained, located
from llava_fa.hub.shards import DTYPE_NAMES, Entry, read_entries, tensor_bytes
from llava_fa.hub.source import read_config, weight_files
from llava_fa.kernels.layout import FactoredLayout, Layout, layout_from_dict
from llava_fa.maths.dft import padded
from llava_fa.nn.codebooks import MODULE, codebook_key
from llava_fa.nn.factored_linear import layer_from_tensors
from llava_fa.nn.fourier_embedding import FourierEmbedding
from llava_fa.nn.packed_linear import PackedLinear

FORMAT_VERSION = 4
"""The newest version; models without embeddings, factored layers, or trellis codes are written, as before, in versions
3, 2 and 1."""

ORIGINAL_BYTES = "llava_fa_original_bytes"
"""Key in the metadata of the weight files: bytes of all tensors of the checkpoint that was compressed."""

NAMES = "llava_fa_names"
"""Key in the metadata of the weight files: `names_digest` of all tensors that were written."""

_COMPRESS_AGAIN = "Compress the model again, or copy the folder again"
_DAMAGED = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)
"""What reading a description raises that is none."""


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What config.json says of one layer: how to read it, and how good it is (None: not measured)."""

    layout: Layout | FactoredLayout
    weight_error: float | None = None
    output_error: float | None = None
    sensitivity: float | None = None
    predicted_loss: float | None = None
    embedding: bool = False
    """Whether it is an embedding, looked up row by row; a tied output embedding uses the same tensors."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the last two only where there was a budget."""
        values = {"weight_error": self.weight_error, "output_error": self.output_error}
        if self.sensitivity is not None:
            values |= {"sensitivity": self.sensitivity, "predicted_loss": self.predicted_loss}
        if self.embedding:
            values["embedding"] = True
        return {**self.layout.to_dict(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerRecord:
        """The inverse of `to_dict`."""
        values = dict(values)
        known = ("weight_error", "output_error", "sensitivity", "predicted_loss")
        measured = [values.pop(name, None) for name in known]
        if not all(value is None or _is_number(value) for value in measured):
            raise FourierError("its errors are no numbers", remedy=_COMPRESS_AGAIN)
        embedding = values.pop("embedding", False)
        layout = layout_from_dict(values)
        if embedding is not False and not (
            embedding is True and isinstance(layout, Layout) and layout.method == "best"
        ):
            raise FourierError("no embedding can be stored like that", remedy=_COMPRESS_AGAIN)
        return cls(layout, *measured, embedding=embedding)

    @classmethod
    def of(cls, layer: PackedLinear) -> LayerRecord:
        """The record of a layer in memory."""
        embedding = isinstance(layer, FourierEmbedding)
        return cls(layer.layout, layer.weight_error, layer.output_error, embedding=embedding)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The ``quantization_config`` of a compressed checkpoint.

    Attributes:
        config: what the model was compressed with.
        layers: module name → record, every compressed layer.
        not_compressed: module (or parameter) name → reason.
        codebooks: `Layout.codebook` → SHA-256 of the codebook's bytes.
        budget: what the whole model was given and what it came to; None where every layer got the same.
        attention_density: attention module → density of every head in the original; None where not measured.
    """

    config: FourierConfig
    layers: dict[str, LayerRecord] = dataclasses.field(default_factory=dict)
    not_compressed: dict[str, str] = dataclasses.field(default_factory=dict)
    codebooks: dict[str, str] = dataclasses.field(default_factory=dict)
    budget: dict[str, Any] | None = None
    attention_density: dict[str, list[float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: `FourierConfig.to_dict`, then what this format adds."""
        return {
            **self.config.to_dict(),
            "format_version": _version(self.layers),
            "layers": {name: record.to_dict() for name, record in self.layers.items()},
            "not_compressed": dict(self.not_compressed),
            "codebooks": {name.removeprefix("bits_"): digest for name, digest in self.codebooks.items()},
            **({} if self.budget is None else {"budget": self.budget}),
            **({} if self.attention_density is None else {"attention_density": self.attention_density}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metadata:
        """The inverse of `to_dict`.

        Raises:
            FourierError: an unknown format version, an unknown field, a damaged layer description.
        """
        with explained("the quantization_config is damaged", remedy=_COMPRESS_AGAIN, kinds=_DAMAGED, words=None):
            return cls._from_dict(dict(values))

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> Metadata:
        version = values.pop("format_version", None)
        if version not in range(1, FORMAT_VERSION + 1):
            raise FourierError(
                f"the checkpoint's format version is {version!r}; this package reads 1 to {FORMAT_VERSION}",
                remedy="Update llava-fa, or compress the model again",
            )
        parts = [values.pop(name, {}) for name in ("layers", "not_compressed", "codebooks")]
        budget = values.pop("budget", None)
        density = values.pop("attention_density", None)
        if not all(isinstance(text, str) for part in parts[1:] for text in part.values()):
            raise TypeError
        layers = {}
        for name, record in parts[0].items():
            with located(name):
                layers[name] = LayerRecord.from_dict(record)
        if _version(layers) > version:
            newer = {2: "trellis codes", 3: "factored layers", 4: "packed embeddings"}[_version(layers)]
            raise FourierError(f"a checkpoint of version {version} has no {newer}", remedy=_COMPRESS_AGAIN)
        codebooks = {f"bits_{name}" if name.isdigit() else name: digest for name, digest in parts[2].items()}
        budget = _budget(budget)
        return cls(FourierConfig.from_dict(values), layers, dict(parts[1]), codebooks, budget, _densities(density))


def _budget(values: Any) -> dict[str, Any] | None:
    """What a budget was and what it came to, as `hub.allocation` writes it."""
    if values is None:
        return None
    given = [values[name] for name in ("bits", "size") if values.get(name) is not None]
    losses = [values["predicted_loss"], *([] if values["uniform_loss"] is None else [values["uniform_loss"]])]
    if len(given) != 1 or not all(_is_number(value) for value in given + losses) or not isinstance(values["unit"], str):
        raise FourierError("the budget is damaged", remedy=_COMPRESS_AGAIN)
    return dict(values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _densities(values: Any) -> dict[str, list[float]] | None:
    if values is None:
        return None
    rows = values.values() if isinstance(values, Mapping) else [None]
    if not all(isinstance(row, list) and all(type(x) in (int, float) and 0 <= x <= 1 for x in row) for row in rows):
        raise FourierError("attention_density is no table of numbers between 0 and 1", remedy=_COMPRESS_AGAIN)
    return dict(values)


def _version(layers: Mapping[str, LayerRecord]) -> int:
    """The first format version in which such layers can be told."""
    layouts = [record.layout for record in layers.values()]
    if any(record.embedding for record in layers.values()):
        return 4
    if any(isinstance(layout, FactoredLayout) for layout in layouts):
        return 3
    return 2 if any(part.codes == "trellis" for layout in layouts for part in layout.parts().values()) else 1


def codebook_digest(codebook: Tensor) -> str:
    """SHA-256 of a codebook's bytes as stored (bf16 [points, 2], C order)."""
    return hashlib.sha256(tensor_bytes(codebook)).hexdigest()


def names_digest(names: Iterable[str]) -> str:
    """SHA-256 of tensors' names: with it a folder is known to be whole without the model's class."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def is_codebook(key: str) -> bool:
    """Whether a tensor of a layer is its codebook, which layers share."""
    return key.rpartition(".")[2] == "codebook"


def file_keys(name: str, layout: Layout | FactoredLayout) -> dict[str, str]:
    """Tensor of a layer → its name in the file, codebooks included."""
    return {
        prefix + key: codebook_key(part.codebook) if key == "codebook" else f"{name}.{prefix}{key}"
        for prefix, part in layout.parts().items()
        for key in part.tensors()
    }


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a compressed folder.

    Raises:
        FourierError: not a model folder, not compressed by this package, or what `Metadata.from_dict` finds.
    """
    values = read_config(folder).get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != "llava_fa":
        raise FourierError(
            "this model is not compressed by llava-fa",
            remedy="Run `llava-fa compress` first",
            where=str(folder),
        )
    with located(str(folder / "config.json")):
        return Metadata.from_dict(values)


def validate(files: Iterable[Path], metadata: Metadata) -> dict[str, Entry]:
    """Check names, dtypes and shapes of every packed tensor, and the codebooks, against the metadata.

    Reads the headers and the codebooks only; what the tensors contain is for `check_content`.

    Returns:
        Every tensor of the files by name.

    Raises:
        FourierError: a file cut short, a tensor missing, of wrong dtype or shape, a codebook that is not the
            one the model was compressed with.
    """
    entries = read_entries(files)
    for name, record in metadata.layers.items():
        for prefix, part in record.layout.parts().items():
            for key, (dtype, shape) in part.tensors().items():
                if key == "codebook":
                    _check_codebook(entries, metadata, part, name)
                else:
                    _check_entry(entries, f"{name}.{prefix}{key}", dtype, shape)
    return entries


def _check_entry(entries: Mapping[str, Entry], key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
    if key not in entries:
        raise FourierError("this tensor is missing from the weight files", remedy=_COMPRESS_AGAIN, where=key)
    entry = entries[key]
    if entry.dtype != DTYPE_NAMES[dtype] or entry.shape != shape:
        raise FourierError(
            f"it is {entry.dtype} {list(entry.shape)}; config.json says {DTYPE_NAMES[dtype]} {list(shape)}",
            remedy="Weights and config.json are of different models; copy the folder again",
            where=f"{entry.file}: {key}",
        )
    return entry


def _check_codebook(entries: Mapping[str, Entry], metadata: Metadata, layout: Layout, layer: str) -> None:
    entry = _check_entry(entries, codebook_key(layout.codebook), torch.bfloat16, (layout.points, 2))
    if codebook_digest(entry.read()) != metadata.codebooks.get(layout.codebook):
        raise FourierError(
            f"the codebook of {layout.code_bits} bits is not the one that {layer} was compressed with",
            remedy="Weights and config.json are of different models; copy the folder again",
            where=f"{entry.file}: {entry.name}",
        )


def check_content(name: str, layout: Layout | FactoredLayout, tensors: Mapping[str, Tensor]) -> None:
    """Check the values of one layer's tensors.

    Raises:
        FourierError: bits set behind a row's last code or sign (a code out of range: every value of b bits is
            a code, so this is the only way to be outside), a scale that is NaN, infinite or not positive.
    """
    for prefix, part in layout.parts().items():
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        _check_part(f"{name}.{prefix}".rstrip("."), part, own)


def _check_part(name: str, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    _check_padding(name, "codes", tensors["codes"], layout.row_bits)
    if layout.method == "best":
        _check_padding(name, "signs", tensors["signs"][None], padded(layout.in_features))
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        least = tensor.min() if key in ("row_scale", "r_max", "input_scale") else torch.inf
        if not tensor.isfinite().all() or least < 0 or (key == "input_scale" and least == 0):
            raise FourierError(
                f"{key} holds a value that is NaN, infinite or out of range",
                remedy=_COMPRESS_AGAIN,
                where=name,
            )


def _check_padding(name: str, key: str, packed: Tensor, bits: int) -> None:
    rows = (packed[:, -1] >> bits % 8).nonzero() if bits % 8 else ()
    if len(rows):
        raise FourierError(
            f"{key}: code out of range in row {int(rows[0])}: bits are set behind the last code",
            remedy=_COMPRESS_AGAIN,
            where=name,
        )


def read_layer(folder: Path, name: str) -> PackedLinear:
    """One compressed layer of a folder by itself, without its bias, checked.

    Raises:
        FourierError: what `read_metadata`, `validate` and `check_content` find, or no such layer.
    """
    metadata = read_metadata(folder)
    if name not in metadata.layers:
        raise FourierError(f"no compressed layer {name!r}", remedy="`llava-fa inspect` lists them", where=str(folder))
    record = metadata.layers[name]
    entries = validate(weight_files(folder), dataclasses.replace(metadata, layers={name: record}))
    tensors = {key: entries[stored].read() for key, stored in file_keys(name, record.layout).items()}
    check_content(name, record.layout, tensors)
    layer = layer_from_tensors(record.layout, tensors)
    layer.weight_error, layer.output_error = record.weight_error, record.output_error
    return layer


@dataclasses.dataclass(frozen=True)
class Accounting:
    """Where the bytes of a compressed checkpoint are.

    Attributes:
        layers: module name → bits per weight: its packed tensors, neither bias nor shared codebooks.
        bits_per_weight: of all compressed layers together, shared codebooks included.
        packed_bytes, codebook_bytes, other_bytes: their sum is the bytes of all tensors.
        dense_bytes: what all tensors would take with every compressed layer in 16 bits.
    """

    layers: dict[str, float]
    bits_per_weight: float
    packed_bytes: int
    codebook_bytes: int
    other_bytes: int
    dense_bytes: int


def account(entries: Mapping[str, Entry], metadata: Metadata) -> Accounting:
    """Count every stored byte of validated `entries` (see `validate`)."""
    layers: dict[str, float] = {}
    packed, weights = 0, 0
    for name, record in metadata.layers.items():
        keys = [stored for key, stored in file_keys(name, record.layout).items() if not is_codebook(key)]
        nbytes = sum(entries[key].nbytes for key in keys)
        count = record.layout.out_features * record.layout.in_features
        layers[name] = 8 * nbytes / count
        packed, weights = packed + nbytes, weights + count
    codebook_bytes = sum(entry.nbytes for key, entry in entries.items() if key.startswith(f"{MODULE}."))
    other_bytes = sum(entry.nbytes for entry in entries.values()) - packed - codebook_bytes
    return Accounting(
        layers=layers,
        bits_per_weight=8 * (packed + codebook_bytes) / max(weights, 1),
        packed_bytes=packed,
        codebook_bytes=codebook_bytes,
        other_bytes=other_bytes,
        dense_bytes=2 * weights + other_bytes,
    )
