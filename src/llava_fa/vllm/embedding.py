"""Word embeddings and output embeddings, packed; and heads tied to packed words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from llava_fa.errors import FourierError
from llava_fa.kernels import run
from llava_fa.vllm.shares import Share, with_rows
from llava_fa.vllm.store import Store


def method(store: Store, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
    """What holds this embedding; None where vLLM's own does."""
    name = store.names.find(prefix)
    if name is not None:
        store.claim(name, prefix)
        return FourierEmbeddingMethod(store, name)
    packed = any(record.embedding for record in store.layers.values())
    return TiedHeadMethod() if packed and isinstance(layer, ParallelLMHead) else None


class FourierEmbeddingMethod(QuantizeMethodBase):
    """y = W[ids], and y = W x of a head: packed rows, of a rank those of its part of the vocabulary.

    Args:
        store: the layers.
        name: the stored layer.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    def create_weights(self, layer: nn.Module, *sizes: Any, params_dtype: torch.dtype, **_: Any) -> None:
        """Settle which rows this rank has.

        Raises:
            FourierError: the stored table is of another size, or has no row for this rank.
        """
        layout, part = self.store.layers[self.name].layout, layer.shard_indices
        wanted = layer.org_vocab_size, layer.embedding_dim
        if (layout.out_features, layout.in_features) != wanted or layer.num_added_embeddings:
            raise FourierError(
                f"it is {layout.out_features}×{layout.in_features}, and vLLM's model wants {wanted[0]}×{wanted[1]} "
                f"and {layer.num_added_embeddings} rows more",
                remedy="Weights and config.json are of different models; copy the folder again",
                where=self.name,
            )
        self.share = Share(self.name, ((part.org_vocab_start_index, part.org_vocab_end_index),))
        with_rows(layout, self.share)
        self.dtype, self.device = params_dtype, torch.empty(0).device

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read them."""
        if not hasattr(layer, "packed"):
            layer.packed = self.store.folder().layer(self.share, self.dtype, self.device)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """W[ids]: int [...] → [..., n]."""
        return run.rows(input_, layer.packed.packed_weight()).to(self.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias: [..., n] → [..., words of this rank, those that pad its part included]."""
        y = layer.packed.multiply(x, bias)
        return y if layer.tp_size == 1 else nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A head that is stored packed beside its words stays what it is."""
        return layer


class TiedHeadMethod(UnquantizedEmbeddingMethod):
    """A head that becomes the embedding itself where its words are packed, and an ordinary one where they are not."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The module that is the head from now on."""
        if isinstance(embed_tokens.quant_method, FourierEmbeddingMethod):
            return embed_tokens
        return super().tie_weights(layer, embed_tokens)  # type: ignore[no-any-return]
