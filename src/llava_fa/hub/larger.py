"""A model that answers although it is larger than memory: it stays in its files, and parts are read as they run.

Every forward pass reads all of its weights, some 14 GB for 7 billion: what is asked side by side, in one batch or by
`course.passes`, reads them once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from llava_fa.config import QUANT_METHOD, format_size
from llava_fa.errors import FourierError
from llava_fa.hub.adapter import has_adapter
from llava_fa.hub.complete import arranged
from llava_fa.hub.loading import check_device, fast_dtype, load
from llava_fa.hub.original import opened
from llava_fa.hub.processor import load_processor
from llava_fa.hub.shards import DTYPES
from llava_fa.hub.source import Source, quantisation, read_config, resolve_model
from llava_fa.hub.streamed import streamed_model
from llava_fa.hub.visual_tokens import set_visual_tokens
from llava_fa.hub.weights import Weights

_BESIDE = 1.2
"""Memory of a model at work, in times its weights."""
_LARGEST = 512 << 20
"""Bytes beside a streamed model's largest weights: what a forward computes, and a cache for some questions."""


def load_within(
    model: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    visual_tokens: int | None = None,
    *,
    memory: int | None = None,
    on_disk: bool | None = None,
    answers: bool = True,
    told: Callable[[str], object] = lambda _: None,
) -> tuple[Any, Any]:
    """`loading.load`; but an original whose weights do not fit stays on the disk (`hub.streamed`).

    Args:
        model, device, dtype, visual_tokens, answers: as for `loading.load`.
        memory: bytes of the machine's memory that this process may take; None: what is free. Weights on a GPU do not
            count, which only pass through it: whether they fit is asked there.
        on_disk: whether the weights stay there, where that is settled; None: as `stays_on_disk` says.
        told: called with the name of every part that is read.

    Raises:
        FourierError: as `loading.load`; even a part of it at a time takes more than ``memory``.
    """
    if not (stays_on_disk(model, device, dtype, memory) if on_disk is None else on_disk):
        return load(model, device, dtype, visual_tokens, answers=answers)
    folder, place = resolve_model(model), check_device(device)
    dtype = dtype or fast_dtype(place)
    with opened(folder) as source:
        processor = load_processor(source.home, str(folder))
        loaded = streamed_model(source, arranged(source), dtype, place)
    weights = Weights.of(loaded)
    weights.told = told
    _check(weights, dtype, memory, str(folder))
    if visual_tokens is not None:
        set_visual_tokens(loaded, visual_tokens, processor)
    return loaded, processor


def stays_on_disk(
    model: str | Path, device: str = "auto", dtype: torch.dtype | None = None, memory: int | None = None
) -> bool:
    """Whether `load_within` leaves the weights there; never those of a compressed model, or ones with an adapter."""
    folder, place = resolve_model(model), check_device(device)
    if quantisation(read_config(folder)) == QUANT_METHOD or has_adapter(folder):
        return False
    with opened(folder) as source:
        return _BESIDE * _bytes(source, dtype or fast_dtype(place)) > _room(place, memory)


def _bytes(source: Source, dtype: torch.dtype) -> int:
    """Of the weights, as they are computed with."""
    return sum(
        entry.numel * (dtype.itemsize if DTYPES[entry.dtype].is_floating_point else 1)
        for entry in source.entries.values()
        if entry.dtype in DTYPES
    )


def _room(place: torch.device, memory: int | None) -> int:
    """Bytes for a model at work: of a GPU what is free there, whatever may be taken of the machine's memory."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    if memory is None:
        return psutil.virtual_memory().available
    return memory - psutil.Process().memory_info().rss


def _check(weights: Weights, dtype: torch.dtype, memory: int | None, where: str) -> None:
    """Refuse what cannot be held."""
    largest = max((sum(p.numel() for p in part.parameters()) for part in weights.parts.values()), default=0)
    needed = psutil.Process().memory_info().rss + dtype.itemsize * largest + _LARGEST
    if memory is not None and needed > memory:
        raise FourierError(
            f"read part by part it takes about {format_size(needed)} of memory, and {format_size(memory)} are allowed",
            remedy=f"Give --memory {format_size(needed * 1.05).replace(' ', '')}",
            where=where,
        )
