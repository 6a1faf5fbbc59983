"""`FourierEmbedding`: a word embedding that holds packed tensors, and the output embedding that is tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.kernels import run
from llava_fa.kernels.layout import Layout
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.surgery import replace_module


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

    def forward(self, ids: Tensor) -> Tensor:
        """W[ids]: int [...] → [..., n].

        Raises:
            IndexError: an id outside of the vocabulary.
        """
        return run.rows(ids, self.packed_weight()).to(self.dtype)

    def project(self, x: Tensor) -> Tensor:
        """W x: [..., n] → [..., m], the product of a tied output embedding; x may come from another device."""
        hook = getattr(self, "_hf_hook", None)  # accelerate's: it brings back what is offloaded, for `forward` alone
        if hook is not None:
            hook.pre_forward(self)
        here = self.codes.device
        y = super().forward(x) if x.device == here else super().forward(x.to(here)).to(x.device)
        if hook is not None:
            hook.post_forward(self, ())
        return y

    def to_embedding(self) -> nn.Embedding:
        """A plain `torch.nn.Embedding` with the dequantised weight, in the layer's dtype."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = nn.Parameter(self.dequantize().to(self.dtype))
        return embedding


class TiedHead(nn.Module):
    """y = W x with the W of a `FourierEmbedding`, which alone holds the tensors.

    Shapes: x [..., n] → [..., m] in x's dtype.
    """

    def __init__(self, embedding: FourierEmbedding) -> None:
        super().__init__()
        object.__setattr__(self, "embedding", embedding)  # not a submodule: it has one place, and one name
        self.in_features, self.out_features = embedding.in_features, embedding.out_features

    embedding: FourierEmbedding

    def forward(self, x: Tensor) -> Tensor:
        """W x: [..., n] → [..., m]."""
        return self.embedding.project(x)

    @property
    def weight(self) -> Tensor:
        """That of the embedding, decoded anew on every access: for code that reads weights."""
        return self.embedding.weight

    @property
    def qweight(self) -> Tensor:
        """That of the embedding (see `PackedLinear.qweight`)."""
        return self.embedding.qweight

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to the input embedding"


def tie_head(model: nn.Module, name: str, embedding: FourierEmbedding) -> None:
    """Let the output embedding ``name`` of a transformers model use ``embedding``, and end the tie of their weights.

    transformers ties parameters by name whenever it pleases (`tie_weights`); here there are none.
    """
    replace_module(model, name, TiedHead(embedding))
    for place, module in model.named_modules():  # the rule may be that of a model within the model
        inside = f"{place}." if place else ""
        rules = getattr(module, "all_tied_weights_keys", None)
        if isinstance(rules, dict) and any(inside + key == f"{name}.weight" for key in rules):
            rules = {key: of for key, of in rules.items() if inside + key != f"{name}.weight"}
            module.all_tied_weights_keys = module._tied_weights_keys = rules  # type: ignore[assignment]


def untie_head(model: nn.Module, name: str, embedding: nn.Embedding) -> None:
    """The inverse of `tie_head` for a dequantised embedding: a plain linear layer that shares its weight."""
    words, width = embedding.weight.shape
    head = nn.Linear(width, words, bias=False, device="meta")
    head.weight = embedding.weight
    replace_module(model, name, head)
    changed = [module for module in model.modules() if "_tied_weights_keys" in vars(module)]
    for module in changed:
        del module._tied_weights_keys  # the class has its own
    for module in changed:
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
