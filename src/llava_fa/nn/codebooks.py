"""Codebooks stored once for a whole model and used by all its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.nn.fourier_linear import FourierLinear, Stored

MODULE = "fourier_codebooks"
"""Name of the `Codebooks` module at the root of a compressed model."""


def codebook_key(code_bits: int) -> str:
    """Name of the shared codebook in a state dict and in a checkpoint."""
    return f"{MODULE}.bits_{code_bits}"


class Codebooks(Stored):
    """One bf16 buffer [2^b, 2] per code size b, named ``bits_<b>``; casts leave it alone."""

    def __init__(self, code_bits: Iterable[int], device: torch.device | str | None = None) -> None:
        super().__init__()
        for bits in sorted(set(code_bits)):
            self.register_buffer(f"bits_{bits}", torch.zeros(1 << bits, 2, dtype=torch.bfloat16, device=device))

    def __getitem__(self, code_bits: int) -> Tensor:
        return self.get_buffer(f"bits_{code_bits}")


def share_codebooks(model: nn.Module) -> None:
    """Move the codebooks of all `FourierLinear` layers to one `Codebooks` module at the root of the model.

    From then on the state dict has each codebook once. Layers keep a reference (a copy on other devices) as a
    buffer outside the state dict; loading a state dict refreshes it.

    Raises:
        FourierError: two layers of one code size have different codebooks.
    """
    layers = _layers(model)
    found: dict[int, Tensor] = {}
    for name, layer in layers:
        bits = layer.layout.code_bits
        if not torch.equal(found.setdefault(bits, layer.codebook).cpu(), layer.codebook.cpu()):
            raise FourierError(
                f"its codebook of {bits} bits differs from that of other layers",
                remedy="Compress all layers with one version of llava-fa",
                where=name,
            )
    if not found:
        return
    books = Codebooks(found)
    for bits, codebook in found.items():
        setattr(books, f"bits_{bits}", codebook)
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
            layer.codebook = books[layer.layout.code_bits].to(layer.codes.device)


def _relink_hook(model: nn.Module, _: Any) -> None:
    relink(model)


def _layers(model: nn.Module) -> list[tuple[str, FourierLinear]]:
    """Every `FourierLinear` with a codebook (method ``best``)."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FourierLinear) and "codebook" in module.layout.tensors()
    ]
