"""What a training run may be told: one frozen, checked object."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from llava_fa.errors import FourierError

DEFAULT_PARTS = ("factors", "scales", "norms", "biases", "projector")

_POSITIVE = ("steps", "batch", "accumulate", "save_every", "log_every", "max_length")
_NOT_NEGATIVE = ("warmup", "cross_entropy", "divergence", "hidden", "workers", "cache_teacher")
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
        for name in (*_POSITIVE, *_NOT_NEGATIVE, "rate", "temperature"):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            least = 0 if name in _NOT_NEGATIVE else 1 if name in _POSITIVE else math.ulp(0)
            if isinstance(value, bool) or not math.isfinite(value) or value < least:
                raise FourierError(f"{name} is {value!r}", remedy=f"Give a number of at least {least:g}")
        if self.warmup > 1:
            raise FourierError(f"warmup is {self.warmup!r}", remedy="Give a share of the steps, 0 to 1")
        if self.rank is not None and self.rank < 0:
            raise FourierError(f"rank is {self.rank}", remedy="Give 0 or more")
        if not self.cross_entropy and not self.divergence and not self.hidden:
            raise FourierError("no term of the loss has a weight", remedy="Give cross_entropy or divergence a weight")
        if self.device not in ("auto", "cpu"):
            raise FourierError(f"device is {self.device!r}", remedy="Give auto (a GPU where there is one) or cpu")

    def to_dict(self) -> dict[str, Any]:
        """What decides about the result, as JSON types: a run that resumes must agree in it."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _NOT_OF_THE_RESULT}
