"""An elastic number of visual tokens: nested grids by pooling, and what makes up for the pooling (FMVR).

The projector gives a picture h·w tokens that lie on a grid. Pooled again and again they make nested sets, 576, 144, 36,
9 and 1 tokens of a 24×24 grid, and one model serves all of them (Matryoshka; M3, arXiv 2405.17430). FMVR (arXiv
2603.11220) adds to every pooled grid what a few parameters per channel make of its frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_fa.errors import FourierError, shown

KINDS = ("fmvr", "pooling")
"""FMVR, and pooling alone (M3)."""

Grid = tuple[int, int]


def nested_grids(grid: Grid) -> list[Grid]:
    """The grids that pooling gives, from the full one to 1×1.

    Every step halves both sides (2×2 average; an odd side is rounded up, with windows that overlap), and a grid of at
    most 3×3 becomes 1×1: 24 → 12 → 6 → 3 → 1, 8 → 4 → 2 → 1, 27 → 14 → 7 → 4 → 2 → 1.

    Args:
        grid: height and width of the full grid, in tokens.
    """
    grids = [grid]
    while grids[-1] != (1, 1):
        height, width = grids[-1]
        grids.append((1, 1) if max(height, width) <= 3 else (-(-height // 2), -(-width // 2)))
    return grids


def pool(maps: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Average-pool maps [batch, channels, h, w] step by step through ``grids``."""
    for grid in grids:
        maps = functional.adaptive_avg_pool2d(maps, grid)
    return maps


class Modulation(nn.Module):
    """lo ⊙ low + hi ⊙ (1 + high) + x ⊙ hi ⊙ a + x ⊙ b, with x, lo, hi of shape [batch, channels, h, w].

    All four are learned per channel. The start makes the whole of FMVR the identity, whatever the paper's start
    (low = high = a = 0, b = 1) would make of a model that is trained already: see `FrequencyRestoration`.
    """

    def __init__(self, channels: int, b: float) -> None:
        super().__init__()
        self.start = {"low": 0.0, "high": -1.0, "a": 0.0, "b": b}
        for name in self.start:
            self.register_parameter(name, nn.Parameter(torch.empty(channels)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start."""
        for name, value in self.start.items():
            nn.init.constant_(getattr(self, name), value)

    def forward(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """The modulated sum."""
        low, high, a, b = (getattr(self, name)[:, None, None].to(x.dtype) for name in self.start)
        return lo * low + hi * (1 + high) + x * hi * a + x * b


class FrequencyRestoration(nn.Module):
    """x + average branch + maximum branch, for one scale.

    average:  lo = mean of x over the grid, hi = x - lo;              modulated + x
    maximum:  hi = 3×3 maximum of x (stride 1, padding 1), lo = x - hi;  modulated

    The modulations start at high = -1 and b = -1 (average) or 0 (maximum), where both branches are zero: attached to a
    trained model the module changes nothing, and it is trained from there. The paper starts at high = 0 and b = 1, a
    gain of about four, which a model then has to be trained around.

    Source: FMVR, arXiv 2603.11220.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.average = Modulation(channels, b=-1.0)
        self.maximum = Modulation(channels, b=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Restored maps [batch, channels, h, w], computed in float32 or better."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = exact.mean((-2, -1), keepdim=True)
        peak = functional.max_pool2d(exact, 3, stride=1, padding=1)
        restored = self.average(exact, mean, exact - mean) + exact + self.maximum(exact, exact - peak, peak)
        return (exact + restored).to(x.dtype)


class VisualTokens(nn.Module):
    """Between projector and language model: a grid of tokens in, as many tokens as ``tokens`` says out.

    Args:
        grid: height and width of the projector's grid.
        channels: width of the language model.
        kind: one of `KINDS`.
        tokens: how many a grid is reduced to; all of them if None.

    Raises:
        FourierError: an unknown kind, or a number that the grid cannot give (the message lists those it can).
    """

    def __init__(self, grid: Grid, channels: int, kind: str = "fmvr", tokens: int | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise FourierError(f"{kind!r} is no kind of visual tokens", remedy=f"Choose among {', '.join(KINDS)}")
        self.kind, self.grids = kind, nested_grids(grid)
        if kind == "fmvr":  # the full grid has lost nothing
            self.restoration = nn.ModuleList(FrequencyRestoration(channels) for _ in self.grids[1:])
        self.tokens = self.counts[0] if tokens is None else tokens
        self.restored = True
        """Whether FMVR's modules are used; False leaves plain pooling (for comparisons)."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of tokens that the grid can give, largest first."""
        return tuple(height * width for height, width in self.grids)

    @property
    def tokens(self) -> int:
        """Tokens per grid (a picture, a tile or a frame)."""
        return self._tokens

    @tokens.setter
    def tokens(self, count: int) -> None:
        if isinstance(count, bool) or count not in self.counts:
            height, width = self.grids[0]
            raise FourierError(
                f"a grid of {height}×{width} cannot give {shown(count)} visual tokens",
                remedy=f"It can give {', '.join(map(str, self.counts))}",
            )
        self._tokens = int(count)

    @property
    def level(self) -> int:
        """How often the grid is pooled."""
        return self.counts.index(self.tokens)

    @property
    def side(self) -> Grid:
        """Height and width of the grid that comes out."""
        return self.grids[self.level]

    def reset_parameters(self) -> None:
        """Back to the start, where a trained model is changed by nothing but the pooling."""
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()

    def forward(self, features: Tensor, tokens: int | None = None) -> Tensor:
        """[batch, k + h·w, channels] → [batch, k + tokens, channels]; the first k (class tokens) pass unchanged.

        Args:
            features: what the projector gives.
            tokens: instead of ``self.tokens``.
        """
        count = self.tokens if tokens is None else tokens
        height, width = self.grids[0]
        extra = features.shape[1] - height * width
        if extra < 0:
            raise FourierError(
                f"the projector gives {features.shape[1]} tokens, too few for a grid of {height}×{width}",
                remedy="Elastic visual tokens need pictures of the size that the vision tower was made for",
            )
        first, rest = features[:, :extra], features[:, extra:]
        level = self.counts.index(count)
        if level == 0:
            return features
        maps = pool(rest.transpose(1, 2).unflatten(2, (height, width)), self.grids[1 : level + 1])
        if self.kind == "fmvr" and self.restored:
            maps = self.restoration[level - 1](maps)
        return torch.cat([first, maps.flatten(2).transpose(1, 2)], 1)

    def after_projector(self, projector: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """`forward` as a forward hook of the projector."""
        del projector, inputs
        return self(output)
