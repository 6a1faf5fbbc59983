"""The sizes and rates of the tiny LMM's training (`llava_fa.world.training`)."""

from __future__ import annotations

import dataclasses

LEARNED_LAST = ("relations", "counting", "choice")
"""Asked twice as often as the others."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one training run; steps are optimiser steps.

    ``muon_rate`` and ``adam_rate`` are those of the vision stage; in the language stage everything learns at
    ``language_scale`` of them, and the vision tower, after ``frozen_steps`` of rest, at ``vision_scale``.
    ``start`` is a model to go on from instead of nothing, ``visual_tokens`` the kind of elastic visual tokens to attach
    and train over all scales (`llava_fa.world.elastic`), ``experts`` how many its language model's MLPs become
    (`llava_fa.world.mixture`), ``written`` and ``asked_more`` what is asked more often than
    the world does (`llava_fa.world.packing.WorldBatches`: ``written``, ``tasks``).
    """

    vision_steps: int = 1200
    language_steps: int = 8000
    warmup_steps: int = 100
    cooldown_steps: int = 1500
    frozen_steps: int = 4000
    vision_batch: int = 64
    language_batch: int = 16
    wordy_batch: int = 16
    text_tokens: int = 160
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    language_scale: float = 0.4
    vision_scale: float = 0.2
    dense_weight: float = 0.5
    looking_weight: float = 0.2
    weight_decay: float = 0.01
    seed: int = 1
    start: str | None = None
    visual_tokens: str | None = None
    experts: int | None = None
    written: int = 0
    asked_more: tuple[str, ...] = LEARNED_LAST

    @property
    def steps(self) -> int:
        """All of them."""
        return self.vision_steps + self.language_steps

    def stage_end(self, step: int) -> int:
        """The step at which the stage that ``step`` is in gives way to the next: other batches begin there."""
        return next(end for end in (self.vision_steps, self.vision_steps + self.frozen_steps, self.steps) if step < end)

    def rate(self, step: int) -> float:
        """Progress of the learning rates: warm-up in each stage, constant, cool-down to 2 % at the very end."""
        since = step if step < self.vision_steps else step - self.vision_steps
        warm = min(1.0, (since + 1) / self.warmup_steps)
        left = (self.steps - step) / max(1, self.cooldown_steps)
        return warm * max(0.02, min(1.0, left))
