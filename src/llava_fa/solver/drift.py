"""What a layer can make up for of the errors of the layers before it.

Compressed layers give the next one x̂ where the original ones gave x. What its output should be is W x, and the matrix
that comes nearest to it from x̂ is not W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.maths.products import add_product, product
from llava_fa.solver.feedback import damped_factor

DAMPING = 0.1
"""λ: how strongly the corrected weight is held to the original one (docs/results.md)."""


def corrected_weight(weight: Tensor, moment: Tensor, drift: Tensor, damping: float = DAMPING) -> Tensor:
    """W* = W + W D (Ĥ + δI)⁻¹: the minimiser over V of E‖W x - V x̂‖² + δ‖V - W‖²; float32 [m, n].

    δ = damping × mean diagonal of Ĥ. The correction is a regression on samples: without δ it would fit their noise.
    The loss of any Ŵ is E‖W x - Ŵ x̂‖² ≈ tr((W* - Ŵ) Ĥ (W* - Ŵ)ᵀ) + what no Ŵ can change, so that codes are chosen
    for W* exactly as they would be for W. That the inputs are to be matched across the two models is the
    observation of GPTAQ (Li et al. 2025), there with a correction column by column.

    Args:
        weight: W [m, n], any float dtype.
        moment: Ĥ = E[x̂ x̂ᵀ] [n, n].
        drift: D = E[(x - x̂) x̂ᵀ] [n, n]; or, of a weight with fewer rows than columns, W D [m, n].
    """
    values = weight.detach().to(torch.float32)
    mean = float(moment.diagonal().mean(dtype=torch.float64))
    if mean == 0 or not bool(drift.any()):
        return values
    factor, _ = damped_factor(moment, damping)
    if len(drift) < drift.shape[1]:
        return factor.solve_rows(drift.to(factor.dtype, copy=True)).add_(values).to(torch.float32)
    if len(values) <= values.shape[1]:  # rows of W to solve for, else those of D
        rows = product(values, drift.to(torch.float32))
        return factor.solve_rows(rows.to(factor.dtype)).add_(values).to(torch.float32)
    rows = factor.solve_rows(drift.to(factor.dtype, copy=True)).to(torch.float32)
    return add_product(values.clone(), values, rows)
