"""CASP's bound on how far an attention map can move (docs/method.md): what its density is a reason for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llava_fa import FourierError
from llava_fa.solver.attention import EPSILON


def logit_error_bound(query: Tensor, key: Tensor, query_error: Tensor, key_error: Tensor, scaling: float) -> float:
    """Δ ≥ max |ẑ - z| of the logits z_ij = scaling · q_iᵀ k_j when q̂ = q + e_q and k̂ = k + e_k.

    ẑ - z = scaling (e_qᵀ k̂ + qᵀ e_k), so Δ = scaling (max‖e_q‖ max‖k̂‖ + max‖q‖ max‖e_k‖). Rotary embeddings rotate
    q and k (and their errors) by angles that depend on the position alone, so that all of these norms, and the bound,
    hold with them too.

    Args:
        query, query_error: [..., l, d] of one head, before or after rotary embedding. key, key_error: [..., k, d].
        scaling: usually d^-½.
    """

    def largest(vectors: Tensor) -> float:
        return float(vectors.to(torch.float64).norm(dim=-1).max())

    return scaling * (largest(query_error) * largest(key + key_error) + largest(query) * largest(key_error))


def attention_error_bound(
    density: float, logit_error: float, shape: tuple[int, int], epsilon: float = EPSILON
) -> float:
    """CASP's bound: how far an attention map can move, ‖Ŝ - S‖_F, when its logits move by at most Δ.

        ‖Ŝ - S‖_F ≤ min( √(D E) tanh(Δ/2) + ε √l min(e^{2Δ} - 1, ε⁻¹),  √(2 l) )

    with l rows, E entries in all and density D: the sparser the map, the less W_q and W_k can do wrong. For: entry i
    of a row obeys logit(ŝ_i) - logit(s_i) = δ_i - log Σ_{j≠i} s_j e^{δ_j} / (1 - s_i), which lies within ±2Δ, so
    |ŝ_i - s_i| ≤ σ(Δ) - σ(-Δ) = tanh(Δ/2) for the D E entries that are kept; and ŝ_i / s_i = e^{δ_i} / Σ_j s_j e^{δ_j}
    ≤ e^{2Δ}, so that the others, of mass ≤ ε a row, move by (e^{2Δ} - 1) ε at most. Two distributions are never more
    than √2 apart. (The paper's theorem says the same of density in kind; the constants here are our own derivation.)

    Args:
        density: D, at this ε (`attention_density`).
        logit_error: Δ ≥ max |δ|, up to a constant a row (`logit_error_bound`).
        shape: (l, E): rows, and the entries that D is a share of.

    Raises:
        FourierError: a density outside [0, 1], a negative Δ.
    """
    if not 0 <= density <= 1 or logit_error < 0:
        raise FourierError(
            f"density {density}, logit error {logit_error}", remedy="Give a density in [0, 1] and an error ≥ 0"
        )
    rows, entries = shape
    tail = min(epsilon * math.expm1(min(2 * logit_error, 700.0)), 1.0)
    bound = math.sqrt(density * entries) * math.tanh(logit_error / 2) + math.sqrt(rows) * tail
    return min(bound, math.sqrt(2 * rows))
