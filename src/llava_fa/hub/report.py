"""What a compression, or a look at a compressed model, tells: plain data with one JSON form."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llava_fa.hub.ledger import Ledger
from llava_fa.kernels.layout import FactoredLayout, Layout


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One compressed layer. Errors are relative: ‖W-Ŵ‖/‖W‖, and sqrt(tr(EHEᵀ)/tr(WHWᵀ)) where H was known.

    ``inner_rank``: width of the two factors that the layer is stored as (CASP); 0 for one matrix.

    ``embedding``: whether it is an embedding, looked up row by row (a tied output embedding shares it).

    ``tokens``: calibration tokens that reached it, which is what its second moment is made of; an expert of a mixture
    sees those that its router sends it. None without samples, and where a folder is looked at: told by the run alone.

    ``codes``: "rings", "trellis" or (method ``paper``) "grid"; None for a layer that is not compressed.

    Under a budget, ``predicted_loss`` is what the layer was expected to add to the model's loss, and ``sensitivity``
    the same per unit of the codes' distortion: what earned it its bits.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    weight_error: float | None
    output_error: float | None
    rank: int
    notes: tuple[str, ...] = ()
    codes: str | None = None
    sensitivity: float | None = None
    predicted_loss: float | None = None
    inner_rank: int = 0
    embedding: bool = False
    tokens: int | None = None


class Measurement(NamedTuple):
    """Of one layer when it was compressed: errors and tokens as in `LayerReport`, and notes for people."""

    weight_error: float
    output_error: float | None
    notes: Sequence[str]
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A module or tensor that stayed as it was, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `llava_fa.compress`, and what `llava-fa inspect` shows.

    Attributes:
        path: the model folder.
        method, bits, rank: as configured; None for a model that is not compressed, and bits under a budget of bytes.
        bits_per_weight: all stored bits of the compressed layers (codes, scales, signs, factors, codebooks;
            not their biases, which stay as they were) over the number of their weights.
        compression_ratio: bytes of all tensors of the original checkpoint over those of this one.
        original_bytes, compressed_bytes: these two numbers.
        layers, not_compressed: every layer.
        seconds, peak_rss_bytes: time, and the largest resident memory of this process so far.
        budget: under a budget, what it was (``bits`` or ``size``), the predicted loss of the chosen bits and of the
            best uniform ones in the same budget (None: none fits), and their unit.
        attention_density: attention module of the original → for every head the share of entries that hold 95 % of
            its attention (`solver.attention`), measured on calibration samples; None without any.
        training: what ``training.json`` of the folder says of recovery training (`llava_fa.train`); None without.
        rows_left_out: calibration samples that could not be used (only with ``skip_bad_rows``); told by the run alone.
        provenance: the command that made the folder, and with which versions (`hub.provenance`); None where it was
            made through the Python API.
        ledger: every stored tensor of this folder, accounted for exactly once.
        source_ledger: what became of every tensor of the original; None in folders of earlier releases.
    """

    path: str
    method: str | None
    bits: float | None
    rank: int | None
    bits_per_weight: float
    compression_ratio: float
    original_bytes: int
    compressed_bytes: int
    layers: tuple[LayerReport, ...]
    not_compressed: tuple[Skipped, ...]
    seconds: float
    peak_rss_bytes: int
    budget: dict[str, Any] | None = None
    attention_density: dict[str, list[float]] | None = None
    training: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    ledger: Ledger | None = None
    source_ledger: Ledger | None = None
    rows_left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)

    @property
    def worst(self) -> LayerReport | None:
        """The layer with the largest output error (weight error where no layer has one)."""
        key = "output_error" if any(layer.output_error is not None for layer in self.layers) else "weight_error"
        known = [layer for layer in self.layers if getattr(layer, key) is not None]
        return max(known, key=lambda layer: getattr(layer, key), default=None)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a compression stands; given to the ``progress`` callback before each layer and after the last.

    Attributes:
        stage: what is being done, such as ``"compressing"`` or ``"writing"``.
        name: the layer at work.
        done, total: layers finished, and in all.
        weights_done, weights_total: the same in weights.
        resumed: layers found finished from an interrupted run.
        worker: whose doing it is, where several are at work (docs/cluster.md).
    """

    stage: str
    name: str
    done: int
    total: int
    weights_done: int
    weights_total: int
    resumed: int
    worker: str = ""


TRAINING = "training.json"
"""File of a trained model's folder that says how it was trained."""

ProgressCallback = Callable[[Progress], None]


def kind_of_codes(layout: Layout | FactoredLayout) -> str:
    """What people are told of a layer's codes: "rings", "trellis" or "grid"; of two factors those of the wide one."""
    part = layout.right if isinstance(layout, FactoredLayout) else layout
    return "grid" if part.method == "paper" else part.codes


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
