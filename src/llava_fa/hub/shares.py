"""How calibration samples are split into shares, whose sums are made apart and added in their order.

The split depends on the samples alone, so that whoever has which share, the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from llava_fa.hub.blocks import Inputs

SHARE, MOST = 16384, 64
"""Tokens of a share, at least, so that adding it is little beside making it; shares, at most."""

Shares = Mapping[int, range]
"""Number of a share → its samples."""


def split(inputs: Inputs) -> dict[int, range]:
    """The shares of these samples: consecutive, of about as many tokens each."""
    tokens = [sample["input_ids"].numel() for sample in inputs]
    count = max(1, min(MOST, len(tokens), sum(tokens) // SHARE))
    begins, seen = [0], 0
    for index, more in enumerate(tokens):
        enough = seen * count >= len(begins) * sum(tokens) or len(tokens) - index == count - len(begins)
        if len(begins) < count and enough and index > begins[-1]:
            begins.append(index)
        seen += more
    return {number: range(*ends) for number, ends in enumerate(zip(begins, [*begins[1:], len(tokens)], strict=True))}
