"""Codebooks stored once for a whole model and used by all its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.packed_linear import Stored

MODULE = "fourier_codebooks"
"""Name of the `Codebooks` module at the root of a compressed model."""


def codebook_key(codebook: str) -> str:
    """Name of the shared codebook `Layout.codebook` in a state dict and in a checkpoint."""
    return f"{MODULE}.{codebook}"


class Codebooks(Stored):
    """One bf16 buffer [points, 2] per codebook, named as `Layout.codebook` says; casts leave it alone.

    Args:
        points: number of points by name.
    """

    def __init__(self, points: Mapping[str, int], device: torch.device | str | None = None) -> None:
        super().__init__()
        for name in sorted(points):
            self.register_buffer(name, torch.zeros(points[name], 2, dtype=torch.bfloat16, device=device))

    def __getitem__(self, codebook: str) -> Tensor:
        return self.get_buffer(codebook)


def share_codebooks(model: nn.Module) -> None:
    """Move the codebooks of all `FourierLinear` layers to one `Codebooks` module at the root of the model.

    From then on the state dict has each codebook once. Layers keep a reference (a copy on other devices) as a
    buffer outside the state dict; loading a state dict refreshes it.

    Raises:
        FourierError: two layers of one kind and size of code have different codebooks.
    """
    layers = _layers(model)
    codebooks: dict[str, Tensor] = {}
    for name, layer in layers:
        key = layer.layout.codebook
        if not torch.equal(codebooks.setdefault(key, layer.codebook).cpu(), layer.codebook.cpu()):
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
    """Put ``books`` at the root of the model (meta codebooks too, while a checkpoint is loaded)."""
    first = not isinstance(getattr(model, MODULE, None), Codebooks)
    model.add_module(MODULE, books)
    for _, layer in _layers(model):
        layer.register_buffer("codebook", layer.codebook, persistent=False)
    if first:
        model.register_load_state_dict_post_hook(_relink_hook)
    relink(model)


def relink(model: nn.Module) -> None:
    """Point every layer's codebook to the shared one."""
    books = getattr(model, MODULE, None)
    if isinstance(books, Codebooks):
        for _, layer in _layers(model):
            layer.codebook = books[layer.layout.codebook].to(layer.codes.device)


def _relink_hook(model: nn.Module, _: Any) -> None:
    relink(model)


def _layers(model: nn.Module) -> list[tuple[str, FourierLinear]]:
    """Every `FourierLinear` with a codebook (method ``best``)."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FourierLinear) and "codebook" in module.layout.tensors()
    ]
