"""What compressing a model would come to, from its config.json alone: no weight is read, none need be there."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.arrangement import Arrangement
from llava_fa.hub.conversion import Stored
from llava_fa.hub.ledger import reason_of
from llava_fa.hub.original import recognise
from llava_fa.hub.plan import Plan, PlannedLayer, make_plan
from llava_fa.hub.report import kind_of_codes
from llava_fa.hub.shards import DTYPE_NAMES, FLOATS, Entry
from llava_fa.hub.source import SINGLE, Source, quantisation, read_config, resolve_config
from llava_fa.nn.surgery import is_output_embedding, is_stack_of_experts, twins

WEIGHTS_PER_SECOND = {"rings": 25e6, "trellis": 5.5e6}
"""Data-free, on two cores: the lower of the rates that benchmarks/compress_speed.py gives for its two shapes."""
_SIZES = 3.7
"""Memory that fitting a weight takes at its most, in float32 sizes of it; from the same table."""
_PROCESS = 500_000_000
"""Bytes of the process before it has read a weight: Python, torch and transformers."""


@dataclasses.dataclass(frozen=True)
class Staying:
    """Tensors that stay as they are for one reason: the first of them, how many, their elements and bytes."""

    reason: str
    first: str
    count: int
    elements: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a compression without data would come to; nothing in it is measured.

    Attributes:
        path, model: the folder, and transformers' class.
        bits, embeddings: as asked for.
        parameters, packed: numbers of the model, and those of them that are weights of packed layers and embeddings.
        linear, packed_linear: the same of linear layers and experts alone, output embeddings left out.
        original_bytes, compressed_bytes: of the tensors, counted as they would be stored.
        staying: what is not packed, largest first.
        memory_bytes: what compressing would hold, about: its largest layer at work, and the process.
        seconds: how long it would take on two cores, about (`WEIGHTS_PER_SECOND`).
    """

    path: str
    model: str
    bits: float
    embeddings: float | None
    parameters: int
    packed: int
    linear: int
    packed_linear: int
    original_bytes: int
    compressed_bytes: int
    staying: tuple[Staying, ...]
    memory_bytes: int
    seconds: float

    @property
    def share(self) -> float:
        """Of all parameters, those that are packed."""
        return self.packed / self.parameters

    @property
    def compression_ratio(self) -> float:
        """Bytes of the original over those of the result."""
        return self.original_bytes / self.compressed_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        derived = {"share": self.share, "compression_ratio": self.compression_ratio}
        return {**dataclasses.asdict(self), **derived}


def preview(model: str | Path, config: FourierConfig, embeddings: float | None = None) -> Preview:
    """What `llava_fa.compress` would make of a model, without data.

    Args:
        model: a folder with config.json, that file, or a hub id, of which only config.json is downloaded.
        config, embeddings: as for `llava_fa.compress`.

    Raises:
        FourierError: there is no config.json, or one of a model that is quantised already, that transformers cannot
            read or build, or in which nothing can be compressed.
    """
    folder = resolve_config(model)
    values = read_config(folder)
    if (method := quantisation(values)) is not None:
        raise FourierError(
            f"this model is quantised already ({method})",
            remedy="Give the config.json of the original, or leave bits out to see what this one is",
            where=str(folder),
        )
    if recognise(values) is not None:
        raise FourierError(
            "a config.json that transformers does not read: the vision tower, or the names of tensors, are not in it",
            remedy="Compress the folder; leave bits out to see what it is",
            where=str(folder),
        )
    return preview_of(empty_model(folder, 0), folder, config, embeddings)


def preview_of(model: nn.Module, folder: Path, config: FourierConfig, embeddings: float | None = None) -> Preview:
    """The same for a model that is built already (on the meta device, say); ``folder`` is what it is told as.

    Raises:
        FourierError: nothing in it can be compressed, or no embedding where they are asked for.
    """
    entries = _entries(model, folder)
    arrangement = Arrangement(
        type(model).__name__, dict(entries), (), {}, {}, {}, (), {}, total=len(entries), compressed=False
    )
    source = Source(folder, {}, entries, "")
    plan = make_plan(model, source, config, embeddings, arrangement=arrangement)
    loose = sum(entry.numel for name, entry in plan.kept.items() if _is_linear(model, name))
    inside = sum(layer.numel for layer in plan.layers)
    return Preview(
        path=str(folder),
        model=type(model).__name__,
        bits=config.bits,
        embeddings=embeddings,
        parameters=sum(entry.numel for entry in entries.values()),
        packed=sum(layer.numel for layer in plan.all_layers),
        linear=inside + loose,
        packed_linear=inside,
        original_bytes=source.nbytes,
        compressed_bytes=_bytes(plan),
        staying=_staying(plan),
        memory_bytes=_PROCESS + max(map(_working_bytes, plan.all_layers)),
        seconds=sum(layer.numel / WEIGHTS_PER_SECOND[_codes(layer)] for layer in plan.all_layers),
    )


def _working_bytes(layer: PlannedLayer) -> int:
    """That fitting a layer takes: copies of what is at work, and, in portions, what is finished of it."""
    return int(_SIZES * 4 * layer.at_once) + (layer.packed_bytes if layer.at_once < layer.numel else 0)


def _entries(model: nn.Module, folder: Path) -> dict[str, Entry]:
    """The tensors as `save_pretrained` would store them: what is tied once, floats in the dtype of config.json."""
    config: Any = getattr(model, "config", None)
    dtype = getattr(config, "dtype", None) or getattr(getattr(config, "text_config", None), "dtype", None)
    if not isinstance(dtype, torch.dtype) or DTYPE_NAMES.get(dtype) not in FLOATS:
        dtype = torch.bfloat16
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    doubles = tuple(f"{place}." for place in twins(model))
    entries, start = {}, 0
    for name, tensor in model.state_dict().items():
        if name in tied or name.startswith(doubles):
            continue
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * kind.itemsize
        entries[name] = Entry(folder / SINGLE, name, DTYPE_NAMES[kind], tuple(tensor.shape), start, size)
        start += size
    return entries


def _is_linear(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a linear layer's weight, output embeddings aside, or a stack of experts' weights."""
    module, _, own = name.rpartition(".")
    holder = model.get_submodule(module)
    if isinstance(holder, nn.Linear):
        return own == "weight" and not is_output_embedding(model, module)
    parameter = dict(holder.named_parameters(recurse=False)).get(own)
    return parameter is not None and parameter.ndim == 3 and is_stack_of_experts(f"{name} {type(holder).__name__}")


def _bytes(plan: Plan) -> int:
    """Of the result's tensors; `Plan.output_bytes` counts a codebook for every layer that uses it."""
    total, books = plan.output_bytes, {}
    for layer in plan.all_layers:
        tensors = layer.layout.tensors()
        for prefix, part in layer.layout.parts().items():
            if (stored := tensors.get(f"{prefix}codebook")) is not None:
                books[part.codebook] = stored[0].itemsize * math.prod(stored[1])
                total -= books[part.codebook]
    return total + sum(books.values())


def _staying(plan: Plan) -> tuple[Staying, ...]:
    rest = {skipped.name: skipped.reason for skipped in plan.not_compressed}
    layers = {layer.name for layer in plan.all_layers}
    reasons: dict[str, list[tuple[str, Stored]]] = {}
    for name, entry in plan.kept.items():
        reasons.setdefault(_general(reason_of(name, rest, layers)), []).append((name, entry))
    made = [
        Staying(reason, some[0][0], len(some), sum(e.numel for _, e in some), sum(e.nbytes for _, e in some))
        for reason, some in reasons.items()
    ]
    return tuple(sorted(made, key=lambda one: -one.bytes))


def _general(reason: str) -> str:
    """A reason without the shape in it, so that layers that differ in shape alone share a line."""
    return re.sub(r"(of shape )?\d+(×\d+)+,? ?", "", reason)


def _codes(layer: PlannedLayer) -> str:
    return "trellis" if kind_of_codes(layer.layout) == "trellis" else "rings"
