"""Learned queries, a baseline for elastic visual tokens that measurement has rejected (docs/results.md).

MQT's query transformer (arXiv 2405.19315) in small, as a further kind of visual tokens: `with_queries` makes
``{"kind": "queries", "tokens": …}`` of a configuration mean it, for as long as the process runs.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_fa.hub import visual_tokens
from llava_fa.nn.visual_tokens import Grid, VisualTokens, nested_grids
from llava_fa.world.elastic import ElasticLearner, shortened

KIND = "queries"
NOWHERE = -2
"""The place of a token that was cut off: `shortened`, which counts the user mark in front, makes -1 of it, no look."""


class LearnedQueries(nn.Module):
    """Token i = the grid's token i + what query i finds in the grid; only the first N of a coarse-to-fine order stay.

    One layer of cross-attention beside a residual path, whose output projection starts at zero, and the tokens stay in
    the grid's order, so that it can be attached to a trained model and changes nothing where all tokens stay.
    """

    def __init__(self, channels: int, grid: Grid, head_size: int = 64) -> None:
        super().__init__()
        self.heads = max(1, channels // head_size)
        self.order = coarse_to_fine(grid)
        self.query_embed = nn.Parameter(torch.empty(grid[0] * grid[1], channels))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(channels, channels, bias=False) for _ in range(4)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start."""
        nn.init.normal_(self.query_embed)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=self.query_embed.shape[1] ** -0.5)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, tokens: Tensor, count: int) -> Tensor:
        """[batch, h·w, channels] → [batch, count, channels]."""
        batch, _, channels = tokens.shape
        chosen = sorted(self.order[:count])
        unit = functional.rms_norm(tokens, (channels,))
        query = self.q_proj(self.query_embed[chosen].to(tokens.dtype)).expand(batch, -1, -1)
        split = [
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, self.k_proj(unit), self.v_proj(unit))
        ]
        seen = functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return tokens[:, chosen] + self.o_proj(seen)


def coarse_to_fine(grid: Grid) -> list[int]:
    """All cells of a grid, numbered by rows, so ordered that each nested grid's worth of them covers the picture."""
    grids = nested_grids(grid)
    chosen = {(y, x): (y, x) for y in range(grid[0]) for x in range(grid[1])}
    levels = [list(chosen.values())]
    for height, width in grids[1:]:
        parents: dict[Grid, Grid] = {}
        for cell in chosen.values():  # a cell is stood for by that of its parts nearest to its centre
            parent = (cell[0] * height // grid[0], cell[1] * width // grid[1])
            best = parents.get(parent)
            centre = ((parent[0] + 0.5) * grid[0] / height - 0.5, (parent[1] + 0.5) * grid[1] / width - 0.5)
            if best is None or _distance(cell, centre) < _distance(best, centre):
                parents[parent] = cell
        chosen = parents
        levels.append(list(chosen.values()))
    order = dict.fromkeys(cell for level in reversed(levels) for cell in level)
    return [y * grid[1] + x for y, x in order]


def _distance(cell: Grid, point: tuple[float, float]) -> float:
    return (cell[0] - point[0]) ** 2 + (cell[1] - point[1]) ** 2


class QueryTokens(VisualTokens):
    """`VisualTokens` that knows one kind more."""

    def __init__(self, grid: Grid, channels: int, kind: str = "fmvr", tokens: int | None = None) -> None:
        super().__init__(grid, channels, "pooling" if kind == KIND else kind, tokens)
        if kind == KIND:
            self.kind, self.queries = kind, LearnedQueries(channels, grid)

    def reset_parameters(self) -> None:
        """Back to the start."""
        super().reset_parameters()
        if self.kind == KIND:
            self.queries.reset_parameters()

    def forward(self, features: Tensor, tokens: int | None = None) -> Tensor:
        """As of `VisualTokens`; queries can be cut anywhere."""
        if self.kind != KIND:
            return super().forward(features, tokens)
        extra = features.shape[1] - self.counts[0]
        count = self.tokens if tokens is None else tokens
        return torch.cat([features[:, :extra], self.queries(features[:, extra:], count)], 1)


def with_queries() -> None:
    """From now on models are given, and loaded with, `QueryTokens`."""
    visual_tokens.VisualTokens = QueryTokens  # type: ignore[misc]
    visual_tokens.RETIRED = ()


class QueryLearner(ElasticLearner):
    """Cut at random in every step, every octave of the number of tokens equally likely."""

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As of `ElasticLearner`, each share of the pictures in a random number of tokens."""
        self.random = random.Random(f"{self.recipe.seed}|{self.step}")
        return super().losses(batch)

    def _reduced(self, patches: Tensor, batch: dict[str, Tensor], count: int) -> tuple[Tensor, Any]:
        if self.model.training:
            count = round(self.tokens.counts[0] ** self.random.random())
        return self.tokens(patches, count), shortened(batch, count, places(self.tokens, count))


def places(tokens: QueryTokens, count: int) -> list[int]:
    """Which of the ``count`` tokens shows the n-th patch; `NOWHERE` where none does."""
    place = {patch: index for index, patch in enumerate(sorted(tokens.queries.order[:count]))}
    return [place.get(patch, NOWHERE) for patch in range(tokens.counts[0])]
