"""The model that calibration samples go through: with which dtype, and whether it is in memory or streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from llava_fa.errors import explained
from llava_fa.hub.blocks import Inputs
from llava_fa.hub.calibrated import part_names
from llava_fa.hub.complete import loaded_source
from llava_fa.hub.loading import check_device, fast_dtype
from llava_fa.hub.memory import Need, need
from llava_fa.hub.plan import Plan
from llava_fa.hub.request import CompressionRequest
from llava_fa.hub.shelf import Shelf
from llava_fa.hub.source import Source
from llava_fa.hub.streamed import streamed_model
from llava_fa.hub.visual_tokens import set_visual_tokens
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import WorkFolder
from llava_fa.nn.experts import unfuse

_DTYPE_FILE = "dtype.json"
"""Of the work folder."""


def running_dtype(plan: Plan, device: torch.device, work: WorkFolder) -> str:
    """What the model computes with on the samples; the weights that are compressed are the checkpoint's, exactly.

    As it is stored (``"auto"``), but on CPUs float32 where they would emulate 16-bit floats, several times slower;
    float16 otherwise becomes bf16, since it overflows and is slow there too. What an interrupted run had chosen is
    kept, so that all layers see the same arithmetic. All by transformers' names.
    """
    if (decided := work.read_json(_DTYPE_FILE)) is not None:
        return decided
    name = "auto"
    if device.type == "cpu":
        if fast_dtype(device) == torch.float32:
            name = "float32"
        elif any(layer.weight.dtype == "F16" for layer in plan.all_layers):
            name = "bfloat16"
    work.write_json(_DTYPE_FILE, name)
    return name


def _computed_with(dtype: str, source: Source) -> torch.dtype:
    """The dtype that a name of `from_pretrained`'s means; of weights as they are stored that of the largest."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    return max(source.entries.values(), key=lambda entry: entry.nbytes).torch_dtype


def needed_memory(plan: Plan, empty: torch.nn.Module, dtype: str, inputs: Inputs) -> Need:
    """What calibrating this model on these samples takes, computed with a dtype as `from_pretrained` names it."""
    return need(plan, empty, _computed_with(dtype, plan.source), inputs, part_names(empty, plan))


def calibrated_model(
    request: CompressionRequest,
    plan: Plan,
    empty: torch.nn.Module,
    dtype: str,
    inputs: Inputs,
    hidden: Path,
    show: Callable[[Plan], None] = lambda plan: None,
) -> torch.nn.Module:
    """The model that samples go through, in memory or streamed, with as many visual tokens as are asked for.

    Args:
        request, plan: what is compressed and how.
        empty: the model on the meta device.
        dtype: that it computes with, as `from_pretrained` names it.
        inputs: prepared samples.
        hidden: folder for hidden states that wait.
        show: called with the plan and what memory this takes, before it is taken.

    Raises:
        FourierError: it takes more memory than the request allows, or the device cannot hold it.
    """
    device = check_device(request.device)
    needed = needed_memory(plan, empty, dtype, inputs)
    streams = needed.streams(request.memory, device)
    show(dataclasses.replace(plan, memory=needed.told(request.memory, streams, device)))
    shelf, names = Shelf(needed.limit(request.memory, streams, device), hidden), part_names(empty, plan)
    if streams:
        model = streamed_model(plan.source, plan.arrangement, dtype, device, names, shelf)
    else:
        model = _load(plan.source, dtype, device)
        Weights(model, names, shelf=shelf).attach()
    if request.visual_tokens is not None:
        set_visual_tokens(model, request.visual_tokens)
    return model


def _load(source: Source, dtype: str, device: torch.device) -> torch.nn.Module:
    loading = explained(
        f"the model cannot be loaded to {device}",
        remedy="Choose another --device, or compress without calibration, which streams",
        where=str(source.folder),
        kinds=(RuntimeError, AssertionError),  # torch says a missing or full device in both ways
        words=str,
    )
    with loading:
        model: torch.nn.Module = loaded_source(source, dtype=dtype).to(device)
        unfuse(model)
        return model
