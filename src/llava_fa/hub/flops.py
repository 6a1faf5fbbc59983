"""Floating-point operations of a question, counted from a configuration alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llava_fa.errors import FourierError, explained
from llava_fa.hub.architecture import transformers_errors
from llava_fa.hub.original import opened, recognise
from llava_fa.hub.source import read_config, resolve_model
from llava_fa.hub.visual_tokens import FIELD, grid_of
from llava_fa.nn.visual_tokens import VisualTokens


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of each part, in operations (a multiply-add is two).

    Counted are matrix products: linear layers, the patch embedding, attention scores and sums over the whole square of
    positions (the half that is masked included, as counters of running code have it), the output embedding at one
    position. Not counted: norms, activations, softmax, pooling and FMVR (a few operations a value, under 0.1 %).
    """

    vision_tower: int
    projector: int
    language_model: int
    sequence: int
    """Tokens that the language model reads."""

    @property
    def total(self) -> int:
        """All parts together."""
        return self.vision_tower + self.projector + self.language_model

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**dataclasses.asdict(self), "total": self.total}


def count_flops(
    config: Any, *, text: int, visual_tokens: int | None = None, pictures: int = 1, generated: int = 0
) -> Flops:
    """Of reading ``pictures`` and ``text`` tokens and generating further ones from the cache.

    Args:
        config: of a LLaVA-type model (transformers); no weights are needed.
        text: tokens of the prompt besides the pictures.
        visual_tokens: per picture (or tile); by default what the configuration says, else all.
        pictures: pictures, tiles or frames.
        generated: tokens after the first, each a pass of one token.

    Raises:
        FourierError: a number of visual tokens that the grid cannot give, or an architecture that is not known here.
    """
    settings = getattr(config, FIELD, None)
    if visual_tokens is None and settings:
        visual_tokens = settings["tokens"]
    grid = grid_of(config)
    tokens = VisualTokens(grid, 1, "pooling", visual_tokens).tokens
    # a class token passes to the language model only under the strategy "full"
    classes = 1 if config.vision_config.model_type == "clip_vision_model" else 0
    extra = classes if config.vision_feature_select_strategy == "full" else 0
    sequence = text + pictures * (tokens + extra)
    patches = grid[0] * grid[1]
    language = _language_model(config.text_config, sequence, 0)
    # every token after the first costs the same more than the one before it: an arithmetic series
    first, second = (_language_model(config.text_config, 1, sequence + step) for step in (0, 1))
    language += generated * first + generated * (generated - 1) // 2 * (second - first)
    return Flops(
        vision_tower=pictures * _vision_tower(config.vision_config, patches, classes),
        projector=pictures * _projector(config, patches + extra),
        language_model=language,
        sequence=sequence,
    )


def read_model_config(model: str | Path) -> Any:
    """The configuration of ``"tiny"``, a folder that needs no weights, or a hub id (config.json alone is fetched).

    Raises:
        FourierError: there is none, or transformers does not know it.
    """
    local = str(model) == "tiny" or Path(model).expanduser().exists()
    folder = resolve_model(model) if local else model
    if local:
        read_config(Path(folder))
    with transformers_errors(
        "it has no configuration that transformers can read",
        remedy="Give `tiny`, a folder with a config.json, or a hub id",
        where=str(model),
    ):
        if local and recognise(read_config(Path(folder))) is not None:
            with opened(Path(folder)) as source:  # which takes weights: they tell where the vision tower is
                return AutoConfig.from_pretrained(source.home, trust_remote_code=False)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _vision_tower(config: Any, patches: int, classes: int) -> int:
    width, inner = config.hidden_size, config.intermediate_size
    tokens = patches + classes
    embedding = 2 * patches * width * config.num_channels * config.patch_size**2
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return embedding + config.num_hidden_layers * layer


def _projector(config: Any, tokens: int) -> int:
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return 2 * tokens * (width * config.text_config.hidden_size + config.text_config.hidden_size**2)


def _language_model(config: Any, tokens: int, cached: int) -> int:
    what = f"the operations of a {config.model_type} cannot be counted"
    remedy = "Counted are Llama, Qwen2, Mistral and models built like them"
    with explained(what, remedy=remedy, kinds=(AttributeError,), words=str):
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        groups, layers = config.num_key_value_heads, config.num_hidden_layers
    if any(hasattr(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise FourierError(
            f"{config.model_type} has experts, whose operations depend on the router",
            remedy="Counted are dense language models",
        )
    size = getattr(config, "head_dim", None) or width // heads
    linear = 2 * tokens * (2 * width * heads * size + 2 * width * groups * size + 3 * width * inner)
    attention = 4 * tokens * (tokens + cached) * heads * size
    head = 2 * width * config.vocab_size
    return int(layers * (linear + attention) + head)
