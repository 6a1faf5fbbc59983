"""Codes put in the order of the kernel that will read them, before the first call: all layers of a model, or one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llava_fa.kernels import registry
from llava_fa.kernels.packed import BestWeight
from llava_fa.nn.factored_linear import FactoredLinear
from llava_fa.nn.fourier_embedding import FourierEmbedding, TiedHead
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.packed_linear import PackedLinear


def arrange(model: nn.Module, spent: Callable[[Tensor], object] | None = None) -> None:
    """Put the codes of every layer that multiplies in the order that its kernel reads, one layer after the other.

    A first forward does the same, layer by layer as they are called; who loads a model to answer has it done here. An
    embedding that is only looked up keeps its codes as stored.

    Args:
        model: on the device where it will run.
        spent: called with the codes as they lay before, once their layer has others.
    """
    for layer in _multiplying(model):
        before = layer.codes
        arrange_layer(layer, layer.dtype)
        if spent is not None and layer.codes is not before:
            spent(before)


def _multiplying(model: nn.Module) -> Iterator[FourierLinear]:
    for module in model.modules():
        if isinstance(module, TiedHead):
            yield module.embedding
        elif isinstance(module, FourierLinear) and not isinstance(module, FourierEmbedding):
            yield module


def arrange_layer(layer: PackedLinear, dtype: torch.dtype) -> None:
    """The same of one layer, for inputs of this dtype.

    A graph, of torch.compile or of CUDA, knows a tensor by its address, which stays from then on.
    """
    for part in (layer.left, layer.right) if isinstance(layer, FactoredLinear) else (layer,):
        assert isinstance(part, FourierLinear)
        weight = part.packed_weight()
        if isinstance(weight, BestWeight) and weight.buffers is not None and not weight.codes.is_meta:
            # The right factor of two hands on float32; the order does not depend on it.
            probe = torch.empty(1, part.in_features, dtype=dtype, device=weight.codes.device)
            weight.arranged(registry.choose("best_linear", probe).order)
