"""What a compression will do, decided in full before any of it is done."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub.families import Feed, feeding_norm, final_norm
from llava_fa.hub.report import Skipped
from llava_fa.hub.shards import FLOATS, Entry
from llava_fa.hub.source import Source, match_names
from llava_fa.kernels.layout import FactoredLayout, Layout, layout_of
from llava_fa.nn.surgery import classify, tied_to


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """A layer or embedding to be compressed: module name, weight in the checkpoint, norm in front of it, and how."""

    name: str
    weight: Entry
    layout: Layout | FactoredLayout
    feed: Feed | None
    config: FourierConfig
    sensitivity: float | None = None
    """Under a budget: the predicted loss per unit of the codes' distortion."""
    predicted_loss: float | None = None
    """Under a budget: what this layer is predicted to add to the model's loss."""
    embedding: bool = False
    """Whether rows of it are looked up."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of the weight."""
        return self.layout.out_features, self.layout.in_features

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.weight.numel

    @property
    def packed_bytes(self) -> int:
        """Bytes of the layer's tensors once compressed, codebook included."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.tensors().values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every layer that will be compressed, in the model's order, and everything that will not."""

    source: Source
    layers: tuple[PlannedLayer, ...]
    not_compressed: tuple[Skipped, ...]
    names: dict[str, str]
    """Parameter in the model → name in the source checkpoint."""
    budget: dict[str, Any] | None = None
    """Under a budget: what it was and what it came to, as stored in the checkpoint (docs/format.md)."""
    embeddings: tuple[PlannedLayer, ...] = ()
    """Word embeddings that will be compressed, without data and outside of any budget."""
    repeated: tuple[Entry, ...] = ()
    """Tensors of tied output embeddings that repeat one of ``embeddings``; the new checkpoint leaves them out."""

    @property
    def all_layers(self) -> tuple[PlannedLayer, ...]:
        """Everything that will be compressed."""
        return self.embeddings + self.layers

    @property
    def part_bytes(self) -> int:
        """Disk the parts take while the work lasts."""
        return sum(layer.packed_bytes for layer in self.all_layers)

    @property
    def output_bytes(self) -> int:
        """Disk the new checkpoint's weights take."""
        return self.kept_bytes + self.part_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of the source's tensors that the new checkpoint has as they are."""
        gone = [layer.weight for layer in self.all_layers] + list(self.repeated)
        return self.source.nbytes - sum(entry.nbytes for entry in gone)


def make_plan(model: nn.Module, source: Source, config: FourierConfig, embeddings: float | None = None) -> Plan:
    """Match the model's linear layers (``model`` may be on the meta device) with the checkpoint's tensors.

    Args:
        embeddings: bits of the word embedding, and of an output embedding of its own; None: they stay as they are.

    Raises:
        FourierError: a pattern that matches nothing, nothing left to compress, a rank that is too large for a
            layer (named), a weight whose shape or dtype is not what the model has (named).
    """
    names, converted = match_names(model, source)
    choice = classify(model, config.skip, config.only, embeddings=embeddings is not None)
    rest = dict(choice.not_compressed)
    layers, words, repeated = [], [], []
    for name in choice.layers + choice.embeddings:
        stored = [source.entries[names[key]] for key in (f"{name}.weight", *tied_to(model, name)) if key in names]
        if not stored:
            stacked = f"{name}.weight" in converted.values()
            rest[name] = "its weight is stored rearranged" if stacked else "its weight is not in the checkpoint"
            continue
        weight, *twins = stored
        if name in choice.layers:
            layers.append(_planned(model, name, weight, config, feeding_norm(model, name)))
        elif all(_same(weight, twin) for twin in twins):
            repeated += twins
            packed = config.replace(method="best", bits=embeddings, rank=0, inner_rank=0)
            words.append(_planned(model, name, weight, packed, final_norm(model, name)))
        else:
            rest[name] = f"config.json ties it to {twins[0].name}, which is another one in the checkpoint"
    if not layers:
        raise FourierError(
            "none of its linear layers is stored as the model has it",
            remedy="Load and save it once with transformers, then compress that folder",
            where=str(source.folder),
        )
    if choice.embeddings and not words:
        name = choice.embeddings[0]
        raise FourierError(
            f"no embedding of this model can be compressed: {rest[name]}", remedy="Leave embeddings out", where=name
        )
    not_compressed = tuple(Skipped(name, reason) for name, reason in rest.items())
    return Plan(source, tuple(layers), not_compressed, names, embeddings=tuple(words), repeated=tuple(repeated))


def _same(one: Entry, other: Entry) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one.read(), other.read())


def _planned(model: nn.Module, name: str, entry: Entry, config: FourierConfig, feed: Feed | None) -> PlannedLayer:
    m, n = model.get_submodule(name).weight.shape  # type: ignore[union-attr]
    if entry.shape != (m, n):
        raise FourierError(
            f"its weight is {list(entry.shape)}, and config.json makes it {[m, n]}",
            remedy="Weights and config.json belong to different models",
            where=name,
        )
    if entry.dtype not in FLOATS:
        raise FourierError(
            f"its weight is {entry.dtype}",
            remedy="Give a float16, bfloat16 or float32 checkpoint",
            where=name,
        )
    if (rank := max(config.rank, config.inner_rank)) > min(m, n):
        raise FourierError(
            f"rank {rank} is larger than min({m}, {n})",
            remedy=f"Give a rank of at most {min(m, n)}, or skip this layer",
            where=name,
        )
    embedding = isinstance(model.get_submodule(name), nn.Embedding)
    return PlannedLayer(name, entry, layout_of(config, m, n), feed, config, embedding=embedding)
