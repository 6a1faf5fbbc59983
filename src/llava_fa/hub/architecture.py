"""Which of transformers' classes a checkpoint is of: built empty, or loaded whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_fa.errors import FourierError, explained
from llava_fa.hub.source import Source
from llava_fa.nn.experts import unfuse

AUTO = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING")
"""What transformers can build that writes text, in the order in which they are asked."""

_COUNTS = re.compile(r"(layers|depth|blocks)$")
"""Fields of a configuration that say how often something with tensors of its own is repeated."""
_MANY = 2000
"""Layers that any configuration may make without being asked whether it has the tensors for them."""


def model_class(folder: Path, where: str = "") -> tuple[Any, Any]:
    """(the class that loads this folder, its configuration).

    It is the one that config.json names, or, where it names none or one without a head, the one that transformers'
    Auto classes take for such a configuration: image-text-to-text, multimodal, causal.

    Args:
        folder: with config.json.
        where: what errors call it.

    Raises:
        FourierError: transformers does not know the model, or it does not write text.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    where = where or str(folder)
    with transformers_errors(
        f"transformers {transformers.__version__} cannot read config.json",
        remedy="Give a checkpoint in the Hugging Face format, such as llava-hf/llava-1.5-7b-hf",
        where=where,
    ):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    mappings: list[Any] = [getattr(modeling_auto, name) for name in AUTO if hasattr(modeling_auto, name)]
    fitting = [kind for mapping in mappings if (kind := mapping.get(type(config), None)) is not None]
    known = {kind.__name__: kind for one in fitting for kind in (one if isinstance(one, tuple) else (one,))}
    names = getattr(config, "architectures", None)
    named = str(names[0]) if isinstance(names, list) and names else ""
    if named in known:
        return known[named], config
    if known and ("For" not in named or not hasattr(transformers, named)):  # none, or one without a head, or a name
        return next(iter(known.values())), config  # of another program's; the weights must fit all the same
    raise FourierError(
        f"{named or type(config).__name__} is not a model that writes text",
        remedy="Give a vision-language model, another multimodal one, or a causal language model",
        where=where,
    )


def reads_text_alone(config: Any) -> bool:
    """Whether a model of this configuration has no part but a language model."""
    from transformers.models.auto import modeling_auto

    others: list[Any] = [getattr(modeling_auto, name) for name in AUTO[:-1] if hasattr(modeling_auto, name)]
    return not config.sub_configs and all(type(config) not in mapping for mapping in others)


def model_of(source: Source) -> nn.Module:
    """`empty_model` of a checkpoint, in whatever format it is."""
    return empty_model(source.home, len(source.entries), str(source.folder))


def empty_model(folder: Path, tensors: int, where: str = "") -> nn.Module:
    """The model on the meta device: every module and name, no memory.

    Args:
        folder: of the model.
        tensors: how many its weight files hold; a configuration with more layers would be built without end.
        where: what errors call the folder.

    Raises:
        FourierError: as `model_class`, or the configuration makes no model, or one that is not this.
    """
    where = where or str(folder)
    kind, config = model_class(folder, where)
    if (layers := _most_layers(config.to_dict())) > max(tensors, _MANY):
        raise FourierError(
            f"config.json makes {layers} layers, and there are {tensors} tensors in the weight files",
            remedy="Check that config.json and the weights belong together",
            where=where,
        )
    what = f"transformers cannot build {kind.__name__} from config.json"
    remedy = "Check the folder with transformers alone first"
    with quiet_transformers(), explained(what, remedy=remedy, where=where), torch.device("meta"):
        model: nn.Module = kind(config).eval()
        unfuse(model)
        return model


def _most_layers(values: Any) -> int:
    """The largest number of layers, blocks or experts in a configuration."""
    if not isinstance(values, dict):
        return 0
    counts = [value for key, value in values.items() if type(value) is int and _COUNTS.search(str(key))]
    return max([0, *counts, *map(_most_layers, values.values())])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the screen; errors still come."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def transformers_errors(what: str, *, remedy: str, where: str) -> Iterator[None]:
    """transformers, quiet, on a folder that may be no model: what it then raises, the first line of it, `explained`."""
    with quiet_transformers(), explained(what, remedy=remedy, where=where, words=one_line):
        yield


def one_line(error: Exception) -> str:
    """What an exception says, as one line; `explained` cuts what is too long."""
    said = " ".join(str(error).split())
    if not said or isinstance(error, KeyError):  # which says the key alone
        said = f"{type(error).__name__} {said}".strip()
    return said
