"""Packed layers of modules that vLLM builds without asking for a quantisation: exchanged before weights are read.

Vision MLPs whose sizes are no multiples of 64, projectors, whole vision towers: a model class of vLLM's tells them of
no quantisation, or builds torch's own linear layers. Their weights are allocated by then, and freed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from llava_fa.vllm import linear
from llava_fa.vllm.shares import Share
from llava_fa.vllm.store import Store

_PLAIN = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear)
"""Classes that leave the product to their method; those derived from them may read the weight themselves."""


def exchange(store: Store, model: nn.Module, fused: Mapping[str, list[str]]) -> None:
    """Let linear layers that are packed in the folder, and that nothing holds yet, hold it packed.

    Args:
        store: the layers.
        model: vLLM's, its weights not read yet.
        fused: what its class says that it fuses.

    Raises:
        FourierError: a stored matrix is of another size, or cannot be split among the ranks.
    """
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            _torchs(store, model, path, module)
        elif type(module) in _PLAIN and type(module.quant_method) is UnquantizedLinearMethod:
            _vllms(store, path, module, fused)


def _torchs(store: Store, model: nn.Module, path: str, plain: nn.Linear) -> None:
    """In the place of torch's layer, which is whole on every rank, a packed one with its bias."""
    name = store.names.find(path)
    if name is None:
        return
    linear.check_shape(store, name, path, plain.out_features, plain.in_features)
    store.claim(name, path)
    share = Share(name, ((0, plain.out_features),))
    packed = store.folder().layer(share, plain.weight.dtype, plain.weight.device)
    packed.bias = plain.bias
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, packed)


def _vllms(store: Store, path: str, layer: Any, fused: Mapping[str, list[str]]) -> None:
    """vLLM's layer as if it had been told of the quantisation."""
    method = linear.method(store, path, fused)
    if method is None:
        return
    device = layer.weight.device
    del layer.weight
    with device:
        method.create_weights(
            layer,
            input_size_per_partition=getattr(layer, "input_size_per_partition", layer.input_size),
            output_partition_sizes=layer.output_partition_sizes,
            input_size=layer.input_size,
            output_size=layer.output_size,
            params_dtype=layer.params_dtype,
        )
    layer.quant_method = method
