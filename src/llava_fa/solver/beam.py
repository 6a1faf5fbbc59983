"""Rounding with feedback that keeps several hypotheses alive instead of committing to the nearest code at
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.maths.nearest import NearestCode

# Columns per block. The hypotheses of a row differ within one block only: at its end the best one is kept,
# and the correction from all earlier blocks is one GEMM for one history.
_BLOCK = 64
# Codes tried for each hypothesis: the nearest and its neighbours. More gains nothing measurable.
_TRIED = 4


def round_with_beam(
    target: Tensor, unit: Tensor, root: Tensor, search: NearestCode, width: int
) -> tuple[Tensor, Tensor]:
    """Codes int32 [N/2, m] and errors E [N, m], from a beam search over the loss of `round_with_feedback`.

    The loss Σ_p ‖(E_p + Σ_{j<p} M_jpᵀ E_j)ᵀ R_pp‖² grows pair by pair, so a prefix of codes has a cost of its
    own; each row keeps the `width` cheapest prefixes (the M-algorithm, as used for sphere decoding). Width 1
    is plain feedback, but for the metric R_pp.

    Args:
        target: A [N, m], rows of W divided by their scale, transformed and transposed; contiguous.
        unit: M of `feedback.unit_upper`.
        root: R of `feedback.damped_root`.
        width: hypotheses kept, a power of two.
    """
    size, rows = target.shape
    error = torch.empty_like(target)
    codes = torch.empty(size // 2, rows, dtype=torch.int32, device=target.device)
    row_index = torch.arange(rows, device=target.device)
    points = len(search.codebook)
    tried = min(_TRIED, points)
    neighbours = torch.cdist(search.codebook, search.codebook).topk(tried, largest=False).indices.T
    near_re, near_im = search.codebook[neighbours].permute(2, 0, 1).contiguous()  # [tried, points]
    neighbours = neighbours.to(torch.int32).flatten()
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        base = target[start:stop]
        if start:
            base = torch.addmm(base, unit[:start, start:stop].T, error[:start])
        # One line of `block` errors per (hypothesis, row): choosing parents then copies whole lines.
        history = target.new_zeros(rows, _BLOCK)
        cost = target.new_zeros(1, rows)
        steps: list[tuple[Tensor, Tensor]] = []
        for at in range(start, stop, 2):
            local = at - start
            aim = base[local : local + 2, None, :]
            alive = cost.shape[0]
            if local:
                pull = history[:, :local] @ unit[start:at, at : at + 2]
                aim = aim + pull.T.view(2, alive, rows)
            first = search(aim[0], aim[1]).flatten()
            x = aim[0] - near_re.index_select(1, first).view(tried, alive, rows)
            y = aim[1] - near_im.index_select(1, first).view(tried, alive, rows)
            a, b, c = root[at, at], root[at, at + 1], float(root[at + 1, at + 1])
            total = (a * x).square_().add_((b * x).add_(y, alpha=c).square_()).add_(cost)
            kept = min(width, tried * alive)
            # Everything here is a power of two: shifts and masks divide.
            cost, choice = total.view(-1, rows).topk(kept, dim=0, largest=False, sorted=False)
            parent = choice & (alive - 1)
            line = (parent * rows + row_index).flatten()
            flat = (choice >> (alive.bit_length() - 1)).mul_(points).flatten() + first.index_select(0, line)
            code = neighbours.index_select(0, flat).view(kept, rows)
            steps.append((parent, code))
            history = history.index_select(0, line)
            fresh = target[at : at + 2, None, :] - search.points(code)
            history[:, local : local + 2] = fresh.flatten(1).T
        final = cost.argmin(0)
        error[start:stop] = history.index_select(0, final * rows + row_index)[:, : stop - start].T
        for index in range(len(steps) - 1, -1, -1):
            parent, code = steps[index]
            codes[start // 2 + index] = code.gather(0, final[None])[0]
            final = parent.gather(0, final[None])[0]
    return codes, error
