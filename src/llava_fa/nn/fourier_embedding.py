"""`FourierEmbedding`: an embedding that holds packed tensors, and the embeddings and output embeddings tied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.kernels import run
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import PackedWeight
from llava_fa.nn.decoded_weight import rows_asked
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.own_forward import packed_as, plain_again
from llava_fa.nn.surgery import end_ties, replace_module

_DECODED = 1 << 24
"""Weights of a table that are decoded at once, about."""


class FourierEmbedding(FourierLinear):
    """y = W[ids] for a W [words, width] kept like the weight of a `FourierLinear`, method ``best``.

    Rows are decoded as they are looked up. The same tensors multiply in `project`: a tied output embedding
    (`TiedHead`) is stored once, and read in its packed form for every token.

    Args: see `FourierLinear`; there is no bias. m is the number of words, n the width.

    Shapes: ids int [...] → [..., n] in ``dtype``.
    """

    def __init__(
        self, layout: Layout, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        if layout.method != "best":
            raise FourierError(
                f"an embedding is looked up row by row, and method {layout.method!r} transforms its columns too",
                remedy="Use method 'best'",
            )
        super().__init__(layout, dtype=dtype, device=device)
        self.num_embeddings, self.embedding_dim = layout.out_features, layout.in_features
        self.padding_idx: int | None = None
        """As of the original, for models that ask: a packed row has no gradient to be spared."""

    def forward(self, ids: Tensor) -> Tensor:
        """W[ids]: int [...] → [..., n].

        Raises:
            IndexError: an id outside of the vocabulary.
        """
        return self.look_up(ids)

    def look_up(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """W[ids], whatever else the module's class does to it; further arguments of torch's concern gradients of W."""
        return run.rows(ids, self.packed_weight()).to(self.dtype)

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias: [..., n] → [..., m], the product of a tied output embedding."""
        return self.at_home(lambda x: self.multiply(x, None if bias is None else bias.to(x.device)), x)

    def at_home(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``compute(x)`` with the packed tensors, for modules that share them: x may come from another device."""
        hook = getattr(self, "_hf_hook", None)  # accelerate's: it brings back what is offloaded, for `forward` alone
        if hook is not None:
            hook.pre_forward(self)
        here = self.codes.device
        y = compute(x) if x.device == here else compute(x.to(here)).to(x.device)
        if hook is not None:
            hook.post_forward(self, ())
        return y

    def _answers(self) -> dict[Any, Callable[..., Any]]:
        return {**super()._answers(), nn.functional.embedding: self.look_up, Tensor.__getitem__: self._some}

    def _some(self, index: Any) -> Any:
        """``weight[index]``, where that asks for rows: Gemma 4 reads one at every step."""
        rows = rows_asked(index, self.num_embeddings)
        return NotImplemented if rows is None else self.look_up(rows.to(self.codes.device))

    def _dense(self) -> Tensor:
        weight = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.qweight.device)
        write_rows(self.packed_weight(), weight)
        return weight

    def to_plain(self) -> nn.Embedding:
        """A plain embedding of the original's class with the dequantised weight, in the layer's dtype."""
        if isinstance(self, nn.Embedding):
            return plain_again(self, self._dense())  # type: ignore[return-value]
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(self._dense())
        return embedding


def write_rows(packed: PackedWeight, weight: Tensor) -> None:
    """Decode W into a tensor [m, n], some rows at a time: a table may be larger than all layers together."""
    every = torch.arange(packed.layout.out_features, device=packed.codes.device)
    for ids in every.split(max(1, _DECODED // packed.layout.in_features)):
        weight[int(ids[0]) : int(ids[-1]) + 1] = run.rows(ids, packed).to(weight.device, weight.dtype)


class _OfItsClass(FourierEmbedding, nn.Embedding):  # type: ignore[misc]  # `weight` is no parameter
    """What stands between an embedding class with a forward of its own and `torch.nn.Embedding`."""


def packed_embedding(module: nn.Embedding, packed: FourierEmbedding) -> FourierEmbedding:
    """``packed`` in the place of this embedding, whose class may have a forward of its own (`only_looks_up`)."""
    packed.padding_idx = module.padding_idx
    return packed if type(module) is nn.Embedding else packed_as(module, packed, _OfItsClass)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """What uses the W of a `FourierEmbedding`, which alone holds the tensors."""

    embedding: FourierEmbedding

    def __init__(self, embedding: FourierEmbedding) -> None:
        super().__init__()
        object.__setattr__(self, "embedding", embedding)  # not a submodule: it has one place, and one name
        self.in_features, self.out_features = embedding.in_features, embedding.out_features

    @property
    def weight(self) -> Tensor:
        """That of the embedding (see `PackedLinear.weight`)."""
        return self.embedding.weight

    @property
    def qweight(self) -> Tensor:
        """That of the embedding (see `PackedLinear.qweight`)."""
        return self.embedding.qweight

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to another embedding"


class TiedHead(Tied):
    """y = W x + bias, an output embedding.

    Args:
        bias: [m] or None, its own.

    Shapes: x [..., n] → [..., m] in x's dtype.
    """

    def __init__(self, embedding: FourierEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias: [..., n] → [..., m]."""
        return self.embedding.project(x, self.bias)

    def to_plain(self, weight: nn.Parameter) -> nn.Module:
        """A linear layer with the dequantised weight of the embedding."""
        head = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        head.weight, head.bias = weight, self.bias
        return head


class TiedEmbedding(Tied):
    """y = W[ids]: a second embedding of a model, as of an encoder and a decoder with the same words."""

    def __init__(self, embedding: FourierEmbedding) -> None:
        super().__init__(embedding)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx: int | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """W[ids]: int [...] → [..., n]."""
        return self.embedding.at_home(self.embedding.look_up, ids)

    def to_plain(self, weight: nn.Parameter) -> nn.Module:
        """An embedding of the original's class with the dequantised weight of the other one."""
        if isinstance(self, nn.Embedding):
            return plain_again(self, weight)
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        module.weight = weight
        return module


class _TiedOfItsClass(TiedEmbedding, nn.Embedding):  # type: ignore[misc]  # `weight` is no parameter
    """As `_OfItsClass`."""


def tie(model: nn.Module, name: str, embedding: FourierEmbedding) -> None:
    """Let the embedding or output embedding ``name`` of a transformers model use ``embedding``; end the tie of weights.

    transformers ties parameters by name whenever it pleases (`tie_weights`); here there are none.
    """
    module = model.get_submodule(name)
    tied: nn.Module = TiedHead(embedding, getattr(module, "bias", None))
    if isinstance(module, nn.Embedding):
        tied = TiedEmbedding(embedding)
        tied.padding_idx = module.padding_idx
        tied = tied if type(module) is nn.Embedding else packed_as(module, tied, _TiedOfItsClass)
    replace_module(model, name, tied)
    end_ties(model, lambda key: key == f"{name}.weight")


def untie(model: nn.Module, plain: Mapping[FourierEmbedding, nn.Embedding]) -> None:
    """The inverse of every `tie`, where embeddings have been dequantised: plain modules that share their weights.

    What transformers ties by name is for `surgery.restore_ties`.
    """
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, Tied)]:
        replace_module(model, name, module.to_plain(plain[module.embedding].weight))  # type: ignore[operator]
