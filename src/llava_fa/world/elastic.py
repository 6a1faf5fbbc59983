"""The tiny LMM learns to answer from any number of visual tokens: the recipe's loss, averaged over all scales.

Every step shares its pictures out among the scales, so that the averaged loss of Matryoshka training (M3, FMVR) is
estimated without bias at the cost of one pass. The full grid, which the model knows, and the single token, which tells
little, get fewer pictures than the scales between, and the same weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_fa.errors import FourierError
from llava_fa.hub.visual_tokens import attach_visual_tokens, visual_tokens_of
from llava_fa.nn.visual_tokens import VisualTokens
from llava_fa.world.learner import Batch, Learner
from llava_fa.world.packing import PREFIX, TASK_NAMES
from llava_fa.world.recipe import Recipe
from llava_fa.world.render import GRID

INNER = 3
"""Pictures that a scale between the first and the last gets for each of theirs."""

READING = ("reading", "reading")
"""What few tokens cost most, and a model that is asked for it as seldom as the world does forgets (docs/results.md)."""

_ALONG = ("ids", "target", "segment", "position", "task")


def elastic_recipe(kind: str, steps: int, *, start: str = "tiny", seed: int = 1) -> Recipe:
    """How the embedded model (or another of its kind) was taught: a short warm-up, then three quarters cooling down."""
    return Recipe(
        vision_steps=0,
        language_steps=steps,
        warmup_steps=min(20, steps),
        cooldown_steps=max(1, 3 * steps // 4),
        frozen_steps=0,
        language_batch=8,
        wordy_batch=0,
        start=start,
        visual_tokens=kind,
        seed=seed,
        written=3,
        asked_more=READING,
    )


class ElasticLearner(Learner):
    """A `Learner` whose model has elastic visual tokens; the vision tower learns with the rest."""

    def __init__(self, processor: LlavaProcessor, recipe: Recipe, device: torch.device) -> None:
        if recipe.vision_steps or recipe.frozen_steps or recipe.wordy_batch:
            raise FourierError(
                "elastic visual tokens are trained on questions only",
                remedy="Set vision_steps, frozen_steps and wordy_batch to 0, and start from a trained model",
            )
        super().__init__(processor, recipe, device)

    @property
    def tokens(self) -> VisualTokens:
        """What is trained to be elastic."""
        module = visual_tokens_of(self.model)
        assert module is not None
        return module

    def first_model(self) -> LlavaForConditionalGeneration:
        """The trained model that the recipe goes on from, visual tokens attached."""
        return attach_visual_tokens(super().first_model(), kind=str(self.recipe.visual_tokens))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """For every scale the answers' cross-entropy and the looking loss, on that scale's share of the pictures."""
        batch = self.here(batch)
        counts = self.tokens.counts
        shares = shared_out(len(batch["ids"]), len(counts))
        losses = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            patches = self._patches(batch["pixels"])
            for index, (count, share) in enumerate(zip(counts, shares, strict=True)):
                part = {name: value[share] for name, value in batch.items()}
                terms = self._answer_losses(*self._reduced(patches[share], part, count))
                losses |= {f"{name}, scale {index}": loss for name, loss in terms.items()}
        return losses

    def total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean over the scales."""
        weights = {name: 1.0 if name.startswith("answer") else self.recipe.looking_weight for name in losses}
        scales = sum(name.startswith("answer") for name in losses)
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum() / scales

    def _reduced(self, patches: torch.Tensor, batch: Batch, count: int) -> tuple[torch.Tensor, Batch]:
        """Pictures in ``count`` tokens, and the sequences to go with them."""
        return self.tokens(patches, count), shortened(batch, count, cells(self.tokens, count))

    @torch.no_grad()
    def validate(self, batches: int) -> dict[str, float]:
        """For every scale the mean of the tasks' accuracies on validation scenes, and each task's own."""
        result = {}
        for count in self.tokens.counts:
            tally = torch.zeros(len(TASK_NAMES), 2)
            for batch in self._validation(batches):
                tally += self._tally(*self._reduced(self._patches(batch["pixels"]), batch, count))
            right, asked = tally.unbind(1)
            scores = right / asked.clamp(min=1)
            result[f"{count}"] = float(scores[asked > 0].mean())
            result |= {f"{count} {name}": float(score) for name, score in zip(TASK_NAMES, scores, strict=True)}
        return {name: round(value, 4) for name, value in result.items()}


def shared_out(pictures: int, scales: int) -> list[list[int]]:
    """Which pictures of a batch each scale gets: one in turn to the first and the last, `INNER` to those between.

    Raises:
        FourierError: the batch is too small for every scale to get one.
    """
    turn = [scale for scale in range(scales) for _ in range(INNER if 0 < scale < scales - 1 else 1)]
    if pictures < len(turn):
        raise FourierError(
            f"{pictures} pictures are too few for {scales} scales", remedy=f"Choose a batch of {len(turn)} or more"
        )
    return [[i for i in range(pictures) if turn[i % len(turn)] == scale] for scale in range(scales)]


def cells(tokens: VisualTokens, count: int) -> list[int]:
    """Which of the ``count`` tokens shows the n-th patch."""
    fine, coarse = tokens.grids[0], tokens.grids[tokens.counts.index(count)]
    return [
        (y * coarse[0] // fine[0]) * coarse[1] + x * coarse[1] // fine[1]
        for y in range(fine[0])
        for x in range(fine[1])
    ]


def shortened(batch: Batch, count: int, shown_by: Sequence[int]) -> Batch:
    """A packed batch (`llava_fa.world.packing`) whose pictures have ``count`` tokens instead of one a patch.

    A look at a patch becomes one at the token that shows it; several patches of one token keep their weight.
    """
    less = GRID * GRID - count
    result = {name: torch.cat([batch[name][:, : 1 + count], batch[name][:, PREFIX:]], 1) for name in _ALONG}
    result["position"] = torch.where(result["segment"] == 0, result["position"], result["position"] - less)
    device = batch["look_to"].device
    length = batch["ids"].shape[1]
    text = range(PREFIX - less, length - less)
    table = torch.tensor([0, *(1 + token for token in shown_by), *text, -1], device=device)  # -1 stays -1
    return result | {name: table[batch[name]] for name in ("look_from", "look_to")}
