"""A compressed folder read layer by layer, the rows of one rank alone, every tensor checked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.checkpoint import LayerRecord, Metadata, check_content, file_keys, validate
from llava_fa.hub.shards import Entry
from llava_fa.hub.source import weight_files
from llava_fa.kernels.layout import FactoredLayout, Layout
from llava_fa.nn.arranged import arrange_layer
from llava_fa.nn.codebooks import codebook_key
from llava_fa.nn.factored_linear import layer_from_tensors
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.vllm.shares import Share, with_rows

_OF_ROWS = frozenset(("codes", "row_scale", "left"))
"""Tensors of a packed matrix that have a row for each of its own."""


class Dense(nn.Module):
    """Rows of a matrix that was not compressed, beside packed ones in a fused layer: y = W x + bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.out_features = len(weight)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., n] → [..., m]."""
        return nn.functional.linear(x, self.get_buffer("weight"), bias)

    def forward(self, x: Tensor) -> Tensor:
        """W x."""
        return self.multiply(x)


class Folder:
    """The packed layers of a folder.

    Args:
        path: the folder.
        metadata: what its config.json says.

    Raises:
        FourierError: a tensor is missing, of another shape or dtype, or a codebook is not the one of the metadata.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata
        self.entries = validate(weight_files(path), metadata)
        self._codebooks: dict[tuple[str, torch.device], Tensor] = {}
        self.packed_keys = {
            key: name for name, record in metadata.layers.items() for key in file_keys(name, record.layout).values()
        }
        """Name of a packed tensor in the files → its layer; of a codebook → some layer that uses it."""

    def record(self, name: str) -> LayerRecord:
        """What the metadata say of a layer."""
        return self.metadata.layers[name]

    def layer(self, share: Share, dtype: torch.dtype, device: torch.device) -> PackedLinear:
        """A layer of these rows, its codes in the order in which the kernel of this device reads them.

        Args:
            share: which rows of which layer.
            dtype: of the activations.
            device: where its tensors go.

        Raises:
            FourierError: what a tensor holds is out of range, or its rows cannot be split.
        """
        layout = with_rows(self.record(share.name).layout, share)
        tensors = {}
        for prefix, part in layout.parts().items():
            whole = self.record(share.name).layout.parts()[prefix]
            for key in part.tensors():
                if key == "codebook":
                    tensors[prefix + key] = self._codebook(part, device)
                    continue
                entry = self.entries[f"{share.name}.{prefix}{key}"]
                sliced = key in _OF_ROWS and part.out_features != whole.out_features
                tensors[prefix + key] = _read(entry, share if sliced else None)
        layout.check(tensors)
        check_content(share.name, layout, tensors)
        layer = _built(layout, tensors, dtype, device)
        arrange_layer(layer, dtype)
        return layer

    def dense(self, share: Share, dtype: torch.dtype, device: torch.device) -> Dense:
        """Rows of a layer that was left as it is.

        Raises:
            FourierError: there is no such layer either.
        """
        entry = self.entries.get(f"{share.name}.weight")
        if entry is None:
            raise FourierError(
                "this layer is in the model, and not in the weight files",
                remedy="Copy the folder again",
                where=share.name,
            )
        return Dense(_read(entry, share).to(device, dtype))

    def _codebook(self, part: Layout, device: torch.device) -> Tensor:
        """One copy a device, which all layers use."""
        key = part.codebook, device
        if key not in self._codebooks:
            self._codebooks[key] = self.entries[codebook_key(part.codebook)].read().to(device)
        return self._codebooks[key]


def _read(entry: Entry, share: Share | None) -> Tensor:
    if share is None:
        return entry.read()
    pieces = [entry.rows(start, end).read() for start, end in share.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _built(
    layout: Layout | FactoredLayout, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> PackedLinear:
    return layer_from_tensors(layout, {key: tensor.to(device) for key, tensor in tensors.items()}, dtype=dtype)
