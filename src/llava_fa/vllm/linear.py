"""Linear layers, alone and fused: q, k and v, or gate and up, as vLLM keeps them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from llava_fa.errors import FourierError
from llava_fa.vllm.shares import Rows, Share, shares, split, with_rows
from llava_fa.vllm.store import Store

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def method(store: Store, prefix: str, fused: Mapping[str, list[str]]) -> FourierLinearMethod | None:
    """What holds the packed layers that this module stands for; None if there are none."""
    names = stored_names(store, prefix, fused)
    if names is None:
        return None
    for name in names:
        if name in store.layers:
            store.claim(name, prefix)
    return FourierLinearMethod(store, names, prefix)


def stored_names(store: Store, prefix: str, fused: Mapping[str, list[str]]) -> list[str] | None:
    """The stored layers behind a module: itself, or those that vLLM fuses in it; None if none of them is packed.

    A part that was left dense goes by the name that it has beside a packed one.
    """
    if (name := store.names.find(prefix)) is not None:
        return [name]
    head, _, last = prefix.rpartition(".")
    # Classes that do not say what they fuse fuse what all others do.
    parts = fused.get(last) or _FUSED.get(last, [])
    found = [store.names.find(f"{head}.{part}" if head else part) for part in parts]
    known = next((name for name in found if name is not None), None)
    if known is None:
        return None
    parent = known.rpartition(".")[0]
    return [name or f"{parent}.{part}" for name, part in zip(found, parts, strict=True)]


def check_shape(store: Store, name: str, prefix: str, m: int, n: int) -> None:
    """Hold a stored layer against what vLLM's module wants, [m, n].

    Raises:
        FourierError: it is of another size.
    """
    layout = store.layers[name].layout
    if (layout.out_features, layout.in_features) != (m, n):
        raise FourierError(
            f"it is {layout.out_features}×{layout.in_features}, and vLLM's model wants {m}×{n} for {prefix}",
            remedy="Weights and config.json are of different models; copy the folder again",
            where=name,
        )


class FourierLinearMethod(LinearMethodBase):
    """Loads the layer's packed matrices, and multiplies with each.

    Args:
        store: the layers.
        names: the stored layers, in the order of the outputs; one for all of them where they are stored fused.
        prefix: vLLM's name of the module.
    """

    def __init__(self, store: Store, names: Sequence[str], prefix: str) -> None:
        self.store, self.names, self.prefix = store, list(names), prefix
        self.shares: list[Share] = []
        self.own: Rows | None = None
        """The rows of a row-parallel layer that this rank computes, where there are several ranks."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Settle which rows this rank has; nothing is read yet, and there is no parameter but vLLM's bias.

        Raises:
            FourierError: the stored matrices are of another size, or cannot be split among the ranks.
        """
        whole, wanted = _outputs(layer, output_partition_sizes, self.prefix)
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            self.own = wanted[0]
        if len(self.names) not in (1, len(wanted)):
            raise FourierError(
                f"vLLM fuses {len(wanted)} outputs here, the folder has {', '.join(self.names)}",
                remedy="Report this model class; `llava-fa serve --engine transformers` serves the model meanwhile",
                where=self.prefix,
            )
        self.shares = shares(self.names, wanted, whole)
        sizes = whole if len(self.shares) == len(whole) else [sum(whole)]
        for share, size in zip(self.shares, sizes, strict=True):
            record = self.store.layers.get(share.name)
            if record is None:
                continue
            check_shape(self.store, share.name, self.prefix, size, input_size)
            with_rows(record.layout, share)
        self.dtype, self.device = params_dtype, torch.empty(0).device

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read them: the rows of this rank, in the order of codes that its kernel takes."""
        if hasattr(layer, "packed"):
            return
        folder, layers = self.store.folder(), self.store.layers
        layer.packed = nn.ModuleList(
            (folder.layer if share.name in layers else folder.dense)(share, self.dtype, self.device)
            for share in self.shares
        )
        layer.qweight = next(layer.packed.buffers())  # vLLM's LoRA looks here for where a layer lies

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias: [..., n] → [..., m], of a rank its part."""
        packed: Any = layer.packed
        if self.own is not None:
            return self._own_rows(layer, packed[0], x)
        if len(packed) == 1:
            return packed[0].multiply(x, bias)  # type: ignore[no-any-return]
        sizes = [part.out_features for part in packed]
        biases: Sequence[Tensor | None] = [None] * len(packed) if bias is None else bias.split(sizes)
        return torch.cat([part.multiply(x, own) for part, own in zip(packed, biases, strict=True)], dim=-1)

    def _own_rows(self, layer: nn.Module, packed: Any, x: Tensor) -> Tensor:
        """The rows of this rank, the others zero: vLLM's sum over the ranks then puts the output together.

        vLLM would add the bias on one rank; here each has that of its rows, so that the sum rounds nothing.
        """
        start, end = self.own or (0, 0)
        bias = None if layer.skip_bias_add or layer.bias is None else layer.bias[start:end]
        y = packed.multiply(tensor_model_parallel_all_gather(x.contiguous()), bias)
        return nn.functional.pad(y, (start, int(layer.output_size) - end))


def _outputs(layer: Any, sizes: Sequence[int], prefix: str) -> tuple[list[int], list[Rows]]:
    """Rows of every output on all ranks together, and which of them are this rank's.

    Raises:
        FourierError: a class that splits its outputs in a way of its own, on several ranks.
    """
    ranks, rank = layer.tp_size, layer.tp_rank
    if isinstance(layer, RowParallelLinear):
        (m,) = sizes
        return [m], [split(m, ranks, rank)]
    if ranks == 1 or isinstance(layer, ReplicatedLinear):
        return list(sizes), [(0, size) for size in sizes]
    if type(layer) is QKVParallelLinear:
        q, k, v = sizes
        key, copies = rank // layer.num_kv_head_replicas, layer.num_kv_head_replicas
        whole = [q * ranks, k * ranks // copies, v * ranks // copies]
        return whole, [(rank * q, (rank + 1) * q), (key * k, (key + 1) * k), (key * v, (key + 1) * v)]
    if type(layer) in (ColumnParallelLinear, MergedColumnParallelLinear):
        return [size * ranks for size in sizes], [(rank * size, (rank + 1) * size) for size in sizes]
    raise FourierError(
        f"how {type(layer).__name__} splits its outputs among ranks is not known here",
        remedy="Serve the model with --tensor-parallel-size 1",
        where=prefix,
    )
