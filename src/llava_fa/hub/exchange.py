"""Packed modules in the place of a model's plain ones."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.checkpoint import LayerRecord
from llava_fa.kernels.layout import Layout
from llava_fa.nn.factored_linear import empty_layer
from llava_fa.nn.fourier_embedding import FourierEmbedding, packed_embedding, tie
from llava_fa.nn.fourier_linear import FourierLinear, packed_linear
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.nn.patches import Patches, matrix_shape
from llava_fa.nn.surgery import replace_module, tied_to


def exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module; keep transformers from initialising it anew through its parent.

    Some parents initialise ``self.q_proj.weight`` themselves. A parent without tensors of its own needs no
    initialisation: its children are visited one by one.
    """
    replace_module(model, name, module)
    keep_parent(model, name)


def keep_parent(model: nn.Module, name: str) -> None:
    """Keep transformers from initialising the parent of an exchanged module anew, if it owns nothing."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not parent._parameters and not parent._buffers:
        parent._is_hf_initialized = True


def empty_for(module: nn.Module, name: str, record: LayerRecord) -> PackedLinear:
    """The packed module, on meta, that takes the place of this plain one."""
    weight, layout, patches = getattr(module, "weight", None), record.layout, Patches.of(module)
    shape = matrix_shape(weight) if isinstance(weight, Tensor) else ()
    right = isinstance(module, nn.Embedding if record.embedding else nn.Linear)
    right |= patches is not None and not record.embedding
    if shape != (layout.out_features, layout.in_features) or not right:
        raise FourierError(
            f"config.json has a layer of {layout.out_features}×{layout.in_features}, the model "
            f"{type(module).__name__} {'×'.join(map(str, shape))}",
            remedy="Copy the folder again; config.json does not belong to these weights",
            where=name,
        )
    if isinstance(module, nn.Embedding) and isinstance(layout, Layout):
        table = FourierEmbedding(layout, dtype=module.weight.dtype, device="meta")
        empty: PackedLinear = packed_embedding(module, table)
    else:
        empty = empty_layer(layout, bias=module.bias is not None, dtype=module.weight.dtype, device="meta")
        if patches is not None:
            empty.convolve(patches)
        elif isinstance(empty, FourierLinear):
            empty = packed_linear(module, empty)
    empty.weight_error, empty.output_error = record.weight_error, record.output_error
    return empty


def tie_all(model: nn.Module) -> None:
    """Give embeddings and output embeddings that are tied to a packed one its tensors."""
    words = [(name, module) for name, module in model.named_modules() if isinstance(module, FourierEmbedding)]
    for name, embedding in words:
        for key in tied_to(model, name):
            tie(model, key.removesuffix(".weight"), embedding)


def find(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names that layers of the checkpoint have in this model, which may be its base model, or contain it."""
    modules = {name for name, _ in model.named_modules()}
    prefix, found = f"{getattr(model, 'base_model_prefix', '')}.", {}
    for name in names:
        here = next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in modules), None)
        if here is None:
            raise FourierError(
                f"config.json lists this layer, but {type(model).__name__} has no such module",
                remedy="Load it with the class named in config.json's architectures",
                where=name,
            )
        found[name] = here
    return found
