"""Codebooks stored once for a whole model and used by all its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.packed_linear import Codebooks

MODULE = "fourier_codebooks"
"""Name of the `Codebooks` module at the root of a compressed model."""


def codebook_key(codebook: str) -> str:
    """Name of the shared codebook `Layout.codebook` in a state dict and in a checkpoint."""
    return f"{MODULE}.{codebook}"


def share_codebooks(model: nn.Module) -> None:
    """Move the codebooks of all `FourierLinear` layers to one `Codebooks` module at the root of the model.

    From then on the model has each codebook once, and layers ask that module for theirs.

    Raises:
        FourierError: two layers of one kind and size of code have different codebooks.
    """
    layers = _layers(model)
    codebooks: dict[str, Tensor] = {}
    for name, layer in layers:
        key = layer.layout.codebook
        codebook = layer.tensors()["codebook"]
        if not torch.equal(codebooks.setdefault(key, codebook).cpu(), codebook.cpu()):
            raise FourierError(
                f"its codebook of {layer.layout.code_bits} bits differs from that of other layers",
                remedy="Compress all layers with one version of llava-fa",
                where=name,
            )
    if not codebooks:
        return
    books = Codebooks({key: len(codebook) for key, codebook in codebooks.items()})
    for key, codebook in codebooks.items():
        setattr(books, key, codebook)
    attach(model, books)


def attach(model: nn.Module, books: Codebooks) -> None:
    """Put ``books`` at the root of the model, for all its layers (meta ones too, while a checkpoint is loaded)."""
    model.add_module(MODULE, books)
    for _, layer in _layers(model):
        layer.share(books)


def _layers(model: nn.Module) -> list[tuple[str, FourierLinear]]:
    """Every `FourierLinear` with a codebook (method ``best``)."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FourierLinear) and "codebook" in module.layout.tensors()
    ]
