"""Which engine answers, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_fa.errors import FourierError
from llava_fa.vllm import support

_TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")


@dataclass(frozen=True)
class Choice:
    """An engine, and the reason in a few words."""

    engine: str
    reason: str


def choose(
    wanted: str, model: str | Path | None = None, *, device: str = "auto", engine_args: Sequence[str] = ()
) -> Choice:
    """The engine for a model: vLLM where it can serve it, unless another is asked for.

    Args:
        wanted: ``"auto"``, ``"transformers"`` or ``"vllm"``.
        model: ``tiny``, a folder or a hub id; None asks for any.
        device: a torch device, which vLLM takes no notice of; or ``auto``.
        engine_args: arguments for vLLM.

    Raises:
        FourierError: what is asked for cannot be; there is no such model.
    """
    if wanted == "transformers":
        _refuse_arguments(engine_args, "--engine transformers has none")
        return Choice("transformers", "as asked")
    why = support.refusal(model, tensor_parallel=tensor_parallel(engine_args))
    if device != "auto":
        why = why or f"vLLM runs where it was built for, not on --device {device}"
    if why is None:
        found = f"vLLM {support.vllm_version()} is installed" + (" and serves it" if model is not None else "")
        return Choice("vllm", "as asked" if wanted == "vllm" else found)
    if wanted == "vllm":
        install = "`pip install 'llava-fa[vllm]'`, or take " if support.vllm_version() is None else "Take "
        raise FourierError(f"vLLM cannot serve it: {why}", remedy=f"{install}--engine transformers", where=str(model))
    _refuse_arguments(engine_args, f"{why}, and transformers has none")
    return Choice("transformers", why)


def tensor_parallel(arguments: Sequence[str]) -> int:
    """Over how many devices these arguments of vLLM's divide a model; 1 where they do not say it, or no number."""
    count = "1"
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in _TENSOR_PARALLEL:
            count = value if equals else following
    return int(count) if count.isascii() and count.isdecimal() and len(count) < 10 else 1


def _refuse_arguments(engine_args: Sequence[str], why: str) -> None:
    if engine_args:
        raise FourierError(f"--engine-arg is an argument of vLLM's: {why}", remedy="Leave it out")
