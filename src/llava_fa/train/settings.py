"""What a training run may be told: one frozen, checked object."""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_fa.bounds import COUNT, MOST_BATCH, MOST_PROCESSES, MOST_WEIGHT, SEED, real, whole
from llava_fa.errors import FourierError

DEFAULT_PARTS = ("factors", "scales", "norms", "biases", "projector")

_WHOLE = {
    "steps": (1, COUNT),
    "batch": (1, MOST_BATCH),
    "accumulate": (1, MOST_BATCH),
    "rank": (0, COUNT),
    "cache_teacher": (0, COUNT),
    "max_length": (1, COUNT),
    "seed": (0, SEED),
    "save_every": (1, COUNT),
    "log_every": (1, COUNT),
    "workers": (0, MOST_PROCESSES),
}
"""Fields that are integers, with their bounds; rank and max_length may be None."""
_NOT_OF_THE_RESULT = ("save_every", "log_every", "workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model is trained back.

    Args:
        steps: optimiser steps.
        batch: samples a step and process, before accumulation.
        accumulate: batches whose gradients are added up before a step.
        rate: peak learning rate (AdamW, linear warm-up, cosine to zero) of factors, scales, norms and biases; weights
            that are dense (an uncompressed projector, ``all``) learn at a tenth of it.
        warmup: share of the steps that warm up.
        rank: of the low-rank factors; None keeps the layers' own, any other begins with the FourierSVD of what the
            codes leave of the original's weight (`train.factors`).
        parts: what is trained (`train.parts.PARTS`).
        cross_entropy, divergence, hidden: weights of the loss's terms (`train.loss`); the latter two need a teacher.
        temperature: of the divergence.
        cache_teacher: ask the teacher once and keep its so many likeliest tokens for every answer token on disk
            (`train.cache`); 0 keeps the teacher in memory and asks it at every step.
        max_length: tokens of the longest sample; None for what the model can take.
        seed: of the order of samples.
        save_every, log_every: steps between checkpoints, and between log entries.
        bf16: compute in bf16 (autocast; trained numbers stay float32); None where the device is fast at it.
        checkpointing: gradient checkpointing: less memory, a third more time.
        fsdp: shard parameters over the processes of torchrun (FSDP2).
        workers: processes that read samples.
        skip_bad_rows: leave out samples that cannot be used, and count them, instead of stopping.
        device: "auto", or "cpu" also where there is a GPU.

    Raises:
        FourierError: a value that cannot be.
    """

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    rate: float = 1e-3
    warmup: float = 0.05
    rank: int | None = None
    parts: tuple[str, ...] = DEFAULT_PARTS
    cross_entropy: float = 0.2
    divergence: float = 1.0
    hidden: float = 0.0
    temperature: float = 1.0
    cache_teacher: int = 0
    max_length: int | None = None
    seed: int = 0
    save_every: int = 100
    log_every: int = 10
    bf16: bool | None = None
    checkpointing: bool = False
    fsdp: bool = False
    workers: int = 0
    skip_bad_rows: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        for name, (low, high) in _WHOLE.items():
            if getattr(self, name) is not None or name not in ("rank", "max_length"):
                whole(name, getattr(self, name), low, high)
        for name in ("cross_entropy", "divergence", "hidden"):
            real(name, getattr(self, name), 0, MOST_WEIGHT)
        real("rate", self.rate, 0, MOST_WEIGHT, above=True)
        real("temperature", self.temperature, 0, MOST_WEIGHT, above=True)
        real("warmup", self.warmup, 0, 1, remedy="Give a share of the steps, 0 to 1")
        if not self.cross_entropy and not self.divergence and not self.hidden:
            raise FourierError("no term of the loss has a weight", remedy="Give cross_entropy or divergence a weight")
        if self.device not in ("auto", "cpu"):
            raise FourierError(f"device is {self.device!r}", remedy="Give auto (a GPU where there is one) or cpu")

    def to_dict(self) -> dict[str, Any]:
        """What decides about the result, as JSON types: a run that resumes must agree in it."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _NOT_OF_THE_RESULT}
