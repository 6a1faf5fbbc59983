"""Where low-rank factors begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.blocks import input_moments
from llava_fa.kernels.run import dense
from llava_fa.maths.lowrank import fourier_svd, weighted_low_rank
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.fourier_embedding import FourierEmbedding
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.trainable import Factors
from llava_fa.solver.feedback import damped_root
from llava_fa.train.loss import NOT_FOR_THE_MODEL, Inputs

_DAMPING = 0.01


def layers_by_name(model: nn.Module) -> dict[str, FourierLinear]:
    """Every packed matrix that can have factors: those inside of a factored layer, embeddings, and output embeddings
    of a class of their own cannot."""
    return {
        name: layer
        for name, layer in packed_layers(model)
        if isinstance(layer, FourierLinear) and not isinstance(layer, (FourierEmbedding, nn.Linear))
    }


@torch.no_grad()
def second_moments(model: nn.Module, batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """E[x xᵀ] of every packed layer's inputs over some batches: name → float32 [n, n]."""
    training = model.training
    model.eval()
    with input_moments(layers_by_name(model)) as moments:
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL})
    model.train(training)
    return {name: moment.value() for name, moment in moments.items() if moment.count}


def initial_factors(
    model: nn.Module, original: nn.Module, rank: int, moments: Mapping[str, Tensor]
) -> dict[str, Factors]:
    """The rank-r factors that best make up for what the codes leave: W - Ŵ ≈ L R (FourierSVD).

    For ``best`` the norm is ‖(W - Ŵ - L R) G‖ with H = G Gᵀ the second moment of the layer's inputs, so that it is the
    layer's *output* that is met (the transform is unitary: factors found in the spatial domain are those of the
    spectrum). For ``paper`` the factors are those of the half spectrum of W - Ŵ (Algorithm 2).

    Args:
        model: compressed.
        original: the model it was compressed from: its weights, by the same names.
        rank: r; at most the smaller side of a layer.
        moments: layer name → H [n, n]; layers without one get H = I.

    Raises:
        FourierError: the two models do not belong together.
    """
    if rank == 0:
        return {}
    factors = {}
    for name, layer in layers_by_name(model).items():
        weight = original_weight(original, name, layer)
        codes = dense(layer.packed_weight()._replace(left=None, right=None))
        rest = weight.to(codes.device) - codes  # what the codes leave
        own = min(rank, *weight.shape)
        if layer.layout.method == "paper":
            left, right = fourier_svd(torch.fft.rfft2(rest, norm="ortho"), min(own, layer.layout.coefficients))
            factors[name] = (torch.view_as_real(left).clone(), torch.view_as_real(right.resolve_conj()).clone())
        else:
            moment = moments.get(name)
            root = None if moment is None else damped_root(moment.to(rest.device), _DAMPING)[0]
            factors[name] = weighted_low_rank(rest, own, root)
    return factors


def blank_factors(model: nn.Module, rank: int, seed: int = 0) -> dict[str, Factors]:
    """Factors that change nothing yet, for training without the original: L = 0, R ~ N(0, 1/n) as in LoRA."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in layers_by_name(model).items():
        if layer.layout.method == "paper":
            raise FourierError(
                "new factors of method `paper` begin with the original's weight", remedy="Give --teacher", where=name
            )
        own = min(rank, layer.out_features, layer.in_features)
        right = torch.randn(own, layer.in_features, generator=generator) / layer.in_features**0.5
        factors[name] = (torch.zeros(layer.out_features, own), right)
    return factors


def original_weight(original: nn.Module, name: str, layer: FourierLinear) -> Tensor:
    """W of a layer, float32 [m, n] on the CPU.

    Raises:
        FourierError: the original has no such layer, or of another shape.
    """
    try:
        weight = original.get_submodule(name).weight.detach().flatten(1)
    except AttributeError:
        weight = None
    shape = (layer.out_features, layer.in_features)
    if weight is None or tuple(weight.shape) != shape:
        got = "no such layer" if weight is None else f"one of {list(weight.shape)}"
        raise FourierError(
            f"the compressed model has a layer of {list(shape)}, the teacher {got}",
            remedy="Give the model that this one was compressed from as teacher",
            where=name,
        )
    return weight.to("cpu", torch.float32)
