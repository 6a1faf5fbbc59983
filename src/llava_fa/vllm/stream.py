"""The stream of weights that vLLM's loader gives a model: without packed layers, with those that no module holds dense.

vLLM has no place where a plug-in sees the whole stream, so the loader's method that makes it is wrapped, once a
process; models of other formats pass through it unchanged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config

from llava_fa.hub.checkpoint import is_codebook
from llava_fa.nn.codebooks import MODULE
from llava_fa.nn.fourier_embedding import write_rows
from llava_fa.vllm import unasked
from llava_fa.vllm.names import rewritten
from llava_fa.vllm.shares import Share
from llava_fa.vllm.store import Store

logger = logging.getLogger(__name__)
_DONE = "_llava_fa"
Weights = Iterator[tuple[str, Tensor]]


def install() -> None:
    """Wrap the loader's method; repeatable."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.get_all_weights
    if getattr(original, _DONE, False):
        return

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Weights:
        store = store_of(model)
        weights = original(self, model_config, model)
        if store is None:
            return weights
        unasked.exchange(store, model, getattr(model, "packed_modules_mapping", {}))
        return unpacked(store, model, weights, model_config.dtype)

    setattr(get_all_weights, _DONE, True)
    DefaultModelLoader.get_all_weights = get_all_weights


def store_of(model: nn.Module) -> Store | None:
    """What a model's packed layers come from; None where it has none."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    found = (getattr(method, "store", None) for method in methods)
    # The last: of a model none of whose modules holds a packed layer.
    current = getattr(get_current_vllm_config().quant_config, "store", None)
    return next((store for store in (*found, current) if isinstance(store, Store)), None)


def unpacked(store: Store, model: nn.Module, weights: Weights, dtype: torch.dtype) -> Weights:
    """The stream without what packed layers read themselves, every layer that no module holds decoded.

    What is no linear layer in vLLM's model, as convolutions on patches, gets the dense weight that the packed one
    stands for.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    loaded = mapper.map_name if mapper is not None else str
    renamed = rewritten(model, mapper.get_rename_mapper().map_name if mapper is not None else str)
    folder, decoded = store.folder(), []
    # A convolution on patches is stored as the matrix that it is.
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.dim() > 2}
    read = {f"{share.name}.weight" for share in _shares(model) if share.name not in store.layers}
    for name, tensor in weights:
        layer = folder.packed_keys.get(name)
        if layer is None:
            if name not in read and not _of_experts(store, name):
                yield renamed(name), tensor
            continue
        if is_codebook(name) or name.startswith(f"{MODULE}.") or layer in store.claimed or layer in decoded:
            continue
        new = renamed(f"{layer}.weight")
        place = loaded(new)
        if place is None or _left_out(model, place):  # compressed or not
            continue
        decoded.append(layer)
        weight = decode(store, layer, dtype)
        yield new, weight.view(shapes.get(place, weight.shape))
    if decoded:
        names = ", ".join(decoded[:3]) + (", …" if len(decoded) > 3 else "")
        logger.info("%d layers that no module of vLLM's can hold packed are held dense: %s", len(decoded), names)


def _left_out(model: nn.Module, name: str) -> bool:
    """Whether a list of blocks ends before the one of this name: vLLM builds a tower as far as it is used."""
    module: nn.Module | None = model
    for part in name.split("."):
        behind = module
        module = behind._modules.get(part)
        if module is None:
            return isinstance(behind, nn.ModuleList)
    return False


def _shares(model: nn.Module) -> Iterator[Share]:
    for module in model.modules():
        yield from getattr(getattr(module, "quant_method", None), "shares", ())


def _of_experts(store: Store, name: str) -> bool:
    """Whether it is the bias of a packed expert, which reads it itself."""
    layer, _, kind = name.rpartition(".")
    return kind == "bias" and layer in store.claimed and store.claimed[layer].endswith("experts")


def decode(store: Store, layer: str, dtype: torch.dtype) -> Tensor:
    """The weight of a stored layer, dense, on the CPU: [m, n]."""
    record = store.layers[layer]
    m, n = record.layout.out_features, record.layout.in_features
    with torch.device("cpu"):
        packed = store.folder().layer(Share(layer, ((0, m),)), dtype, torch.device("cpu"))
        weight = torch.empty(m, n, dtype=dtype)
        if record.embedding:
            write_rows(packed.packed_weight(), weight)  # type: ignore[operator]
        else:
            weight.copy_(packed.dequantize())
    return weight
