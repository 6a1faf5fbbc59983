"""One compression: what is compressed and how, checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_fa.bounds import COUNT, whole
from llava_fa.config import Budget, Casp, FourierConfig, size_of
from llava_fa.errors import FourierError

if TYPE_CHECKING:
    import torch

    from llava_fa.data.samples import Sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionRequest:
    """What `llava_fa.compress` is asked for; the command and the Python API build it, `hub.compress` carries it out.

    Args:
        model, config, calibration, budget, casp, embeddings, visual_tokens, vision_tower, drop_unused, device: as
            for `llava_fa.compress`. ``calibration`` is read once, when it is needed (`data.rows.SampleSource` names a
            file).
        memory: bytes of the machine's memory that a calibrated run may take (`hub.memory`); None: what it has.
        skip_bad_rows: a calibration sample that cannot be used gives its place to the next, and is listed in the
            report; otherwise it is an error.
        command: the command it came from, with OUT for the new folder; kept beside the weights (`hub.provenance`).

    Raises:
        FourierError: a value that cannot be, or two that exclude each other.
    """

    model: str | Path
    config: FourierConfig = dataclasses.field(default_factory=FourierConfig)
    calibration: Iterable[Sample] | None = None
    budget: Budget | None = None
    casp: Casp | None = None
    embeddings: float | None = None
    visual_tokens: int | None = None
    vision_tower: str | Path | None = None
    drop_unused: bool = False
    device: str | torch.device = "auto"
    memory: int | None = None
    skip_bad_rows: bool = False
    command: str | None = None

    def __post_init__(self) -> None:
        if self.calibration is None and self.config.calibration == "feedback":
            raise FourierError(
                "calibration 'feedback' needs samples",
                remedy="Give calibration samples, or use calibration='auto'",
            )
        if self.calibration is not None and self.config.calibration == "none":
            raise FourierError(
                "there are calibration samples, but the config's calibration is 'none'",
                remedy="Leave one of the two out",
            )
        if self.embeddings is not None:
            FourierConfig(bits=self.embeddings)  # checks it
        if self.memory is not None:
            object.__setattr__(self, "memory", size_of(self.memory, "memory"))
        if self.visual_tokens is not None:
            whole("visual_tokens", self.visual_tokens, 1, COUNT)
        if self.budget is None and self.casp is None:
            return
        if self.config.inner_rank:
            raise FourierError(
                "inner_rank is one width for all layers, and a budget chooses",
                remedy="Leave inner_rank out; or give casp",
            )
        if self.config.method != "best":
            raise FourierError(
                f"a budget is for method 'best', not {self.config.method!r}",
                remedy="Leave the budget out and give bits",
            )

    def to_dict(self) -> dict[str, Any]:
        """How the model is compressed, as JSON types: an interrupted run is resumed only by an equal one."""
        options = {
            "budget": self.budget and self.budget.to_dict(),
            "casp": self.casp and self.casp.to_dict(),
            "embeddings": self.embeddings,
            "visual_tokens": self.visual_tokens,
            "drop_unused": self.drop_unused or None,
        }
        return {
            "config": self.config.to_dict(),
            **{name: value for name, value in options.items() if value is not None},
        }
