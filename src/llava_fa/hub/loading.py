"""A model that answers: original or compressed, ready to generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import llava_fa.hub.quantizer  # noqa: F401  registers the format with transformers
from llava_fa.errors import FourierError
from llava_fa.hub.adapter import has_adapter, loaded_with_adapter
from llava_fa.hub.architecture import model_class
from llava_fa.hub.complete import loaded_model, loaded_source
from llava_fa.hub.mapped import MappedFiles
from llava_fa.hub.original import opened, recognise
from llava_fa.hub.processor import load_processor
from llava_fa.hub.source import read_config, refuse_quantised, resolve_model, weight_files
from llava_fa.hub.visual_tokens import set_visual_tokens
from llava_fa.nn.arranged import arrange


def load(
    model: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    visual_tokens: int | None = None,
    *,
    answers: bool = True,
) -> tuple[Any, Any]:
    """(model in eval mode, processor) of ``tiny``, a folder or a hub id, original or compressed.

    Args:
        model: which one.
        device: a torch device, or ``"auto"`` for a GPU where there is one, else the CPU.
        dtype: of what is computed; by default bf16 where the device is fast at it, else float32.
        visual_tokens: how many tokens a picture is told in (`hub.visual_tokens`); by default as the model was saved.
        answers: whether it is to answer: then its codes are at once put in the order of the kernels that read them
            (`nn.arranged`), and the pages of the files that they came from are given back.

    Raises:
        FourierError: there is no such model, or it cannot be loaded or has no processor.
    """
    folder = resolve_model(model)
    place = check_device(device)
    refuse_quantised(config := read_config(folder), folder)
    weight_files(folder)
    dtype = dtype or fast_dtype(place)
    if recognise(config) is not None:
        with opened(folder) as source:
            processor = load_processor(source.home, str(folder))
            loaded = loaded_source(source, dtype=dtype)
    else:
        model_class(folder)  # what is wrong with these has its own error, and is not the processor's fault
        processor = load_processor(folder)
        loaded = (loaded_with_adapter if has_adapter(folder) else loaded_model)(folder, dtype=dtype)
    if visual_tokens is not None:
        set_visual_tokens(loaded, visual_tokens, processor)
    loaded = loaded.to(place)
    if answers:
        arrange(loaded, MappedFiles().give_back)
    return loaded, processor


def processor_of(model: str | Path) -> Any:
    """The processor that `load` gives, without the model.

    Raises:
        FourierError: as `load`.
    """
    folder = resolve_model(model)
    if recognise(read_config(folder)) is None:
        return load_processor(folder)
    with opened(folder) as source:
        return load_processor(source.home, str(folder))


def context_length(model: Any) -> int:
    """Longest prompt and answer together, in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def check_device(device: str | torch.device) -> torch.device:
    """The device, if there is one of that name here, ``"auto"`` a GPU or else the CPU; `FourierError` if not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise FourierError(f"{device!r} is not a device", remedy="Give auto, cpu, cuda, cuda:1, mps, …") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise FourierError(
            f"there is no {place} here ({torch.cuda.device_count()} GPUs seen)", remedy="Give device cpu"
        )
    return place


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs and on CPUs with bf16 instructions; other CPUs emulate it far slower than float32."""
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32
