"""Tensors of LLaVA's first format and of InternLM-2 by transformers' names (`hub.original`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llava_fa.errors import FourierError, shown
from llava_fa.hub.conversion import Conversion, Translation
from llava_fa.hub.shards import Entry

INSIDE = "model.vision_tower.vision_tower."
"""In front of a vision tower's tensors among the model's own."""
NEWLINE = "model.image_newline"
_PROJECTOR = "model.mm_projector."
_WORDS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_INTERNLM = (
    (r"^model\.tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
"""InternLM-2's names → Llama's; no name of another language model is touched."""
_FUSED = re.compile(r"(.*)\.attention\.wqkv\.(weight|bias)")
_BUFFERS = (".rotary_emb.inv_freq", "embeddings.position_ids")
_PICTURES = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
"""Parts of a CLIP or SigLIP vision model that LLaVA runs."""
_DEPTH = re.compile(r"encoder\.layers\.(\d+)\.")


def language_name(key: str) -> str:
    """A language model's tensor by Llama's name."""
    for pattern, name in _INTERNLM:
        key = re.sub(pattern, name, key)
    return key


def words_of(entries: Mapping[str, Entry], vocabulary: Any, where: str) -> int:
    """Rows of the word embedding.

    Raises:
        FourierError: there is none, or config.json says another number.
    """
    stored = [entry for key, entry in entries.items() if language_name(key) in (_WORDS, _HEAD)]
    if not any(language_name(entry.name) == _WORDS for entry in stored):
        raise FourierError(
            f"there is no {_WORDS} in the weights", remedy="Check that config.json and the weights belong together"
        ).at(where)
    for entry in stored:
        if len(entry.shape) != 2 or entry.shape[0] != vocabulary:
            raise FourierError(
                f"it is {list(entry.shape)}, and vocab_size of config.json is {shown(vocabulary)}",
                remedy="Weights and config.json belong to different models",
                where=f"{where}: {entry.name}",
            )
    return int(vocabulary)


def projector(entries: Mapping[str, Entry], kind: Any, where: str) -> tuple[bool, Entry]:
    """(whether LLaVA's projector is one matrix, its first matrix).

    Raises:
        FourierError: it is one that transformers' class does not have, or not in the weights.
    """
    kind = "linear" if kind is None else kind
    if kind not in ("linear", "mlp1x_gelu", "mlp2x_gelu"):
        raise FourierError(
            f"transformers' LLaVA has no projector of the type {shown(kind)} (mm_projector_type in config.json)",
            remedy="Known are linear, mlp1x_gelu and mlp2x_gelu",
            where=where,
        )
    linear = kind != "mlp2x_gelu"
    first = entries.get(_PROJECTOR + ("weight" if kind == "linear" else "0.weight"))
    if first is None or len(first.shape) != 2:
        raise FourierError(
            f"there is no {_PROJECTOR}* in the weights as mm_projector_type {shown(kind)} has it",
            remedy="Merge mm_projector into the weights with the code that trained it; a pretrained projector alone is "
            "no model",
            where=where,
        )
    return linear, first


def translate(
    entries: Mapping[str, Entry], tower: Mapping[str, Entry], config: Any, *, fused: Any, newline: bool = False
) -> Translation:
    """How stored tensors are those of transformers' model of this configuration.

    Args:
        entries, tower: of the model and of its vision tower, where that is stored apart.
        config: transformers' configuration of the whole; its vocabulary may be larger than what is stored.
        fused: configuration of the language model, for heads that are stored in one tensor.
        newline: whether pictures are cut up, and ``image_newline`` is used.
    """
    vision = getattr(config, "vision_config", None)
    prefix = "" if vision is None else "language_model."
    names: dict[str, str] = {}
    conversions: list[Conversion] = []
    left_out: dict[str, str] = {}
    for key, entry in (*entries.items(), *tower.items()):
        if key.endswith(_BUFFERS):
            left_out[key] = "config.json says what it is"
        elif vision is not None and (key in tower or key.startswith(INSIDE)):
            name = key.removeprefix(INSIDE).removeprefix("vision_model.")
            if (reason := _unused(name, vision.num_hidden_layers)) is None:
                names[key] = f"vision_tower.vision_model.{name}"
            else:
                left_out[key] = reason
        elif key == NEWLINE and not newline:
            left_out[key] = "pictures are told whole, and no row of pieces ends"
        elif (heads := _FUSED.fullmatch(key)) is not None:
            conversions.append(_heads(entry, prefix + heads[1], heads[2], fused))
        elif key.startswith(_PROJECTOR) and config.projector_hidden_act == "linear":
            conversions.append(_one_matrix(entry))
        elif (name := language_name(key)) in (_WORDS, _HEAD) and fused.vocab_size > entry.shape[0]:
            conversions.append(_more_rows(entry, prefix + name, fused.vocab_size))
        else:
            names[key] = _plain(key, name, prefix)
    return Translation(names, tuple(conversions), left_out)


def _plain(key: str, name: str, prefix: str) -> str:
    if prefix and key == NEWLINE:
        return "image_newline"
    if prefix and key.startswith(_PROJECTOR):
        layer, _, rest = key.removeprefix(_PROJECTOR).partition(".")
        return f"multi_modal_projector.linear_{ {'0': 1, '2': 2}.get(layer, layer) }.{rest}"
    return prefix + name


def _unused(name: str, layers: int) -> str | None:
    """Why LLaVA does not run this tensor of its vision tower; None where it does."""
    if not name.startswith(_PICTURES):
        return "LLaVA takes the patches of its vision tower, and nothing after or beside them"
    depth = _DEPTH.match(name)
    return "LLaVA cuts its SigLIP tower off before this layer" if depth and int(depth[1]) >= layers else None


def _heads(entry: Entry, attention: str, kind: str, config: Any) -> Conversion:
    """Of each key-value head: the query heads of its group, the key's, the value's."""
    groups, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    each = config.num_attention_heads // groups + 2

    def run(values: dict[int, Tensor]) -> dict[str, Tensor]:
        fused = values[0]
        if fused.shape[0] != groups * each * width:
            raise FourierError(
                f"it has {fused.shape[0]} rows, and the heads of config.json make {groups * each * width}",
                remedy="Weights and config.json belong to different models",
                where=entry.name,
            )
        apart = fused.reshape(groups, each, width, *fused.shape[1:])
        parts = (("q", apart[:, :-2]), ("k", apart[:, -2]), ("v", apart[:, -1]))
        return {f"{attention}.self_attn.{part}_proj.{kind}": x.reshape(-1, *fused.shape[1:]) for part, x in parts}

    return Conversion((entry,), ("",), run)


def _one_matrix(entry: Entry) -> Conversion:
    """transformers' projector has two; the second is the identity then, and what is between them does nothing."""
    kind = entry.name.rpartition(".")[2]
    second = f"multi_modal_projector.linear_2.{kind}"

    def run(values: dict[int, Tensor]) -> dict[str, Tensor]:
        first = values[0]
        rows, like = first.shape[0], {"dtype": first.dtype, "device": first.device}
        other = torch.eye(rows, **like) if kind == "weight" else torch.zeros(rows, **like)
        return {f"multi_modal_projector.linear_1.{kind}": first, second: other}

    return Conversion((entry,), ("",), run, made=frozenset({second}))


def _more_rows(entry: Entry, name: str, rows: int) -> Conversion:
    """An embedding with room for added tokens, whose rows are the mean of all: no answer ever begins with one.

    transformers' scripts draw them at random around the mean of the word embedding; the same folder shall give the same
    bytes.
    """
    return Conversion((entry,), ("",), functools.partial(_with_mean_rows, name=name, rows=rows))


def _with_mean_rows(values: dict[int, Tensor], name: str, rows: int) -> dict[str, Tensor]:
    stored = values[0]
    total = sum((part.double().sum(0) for part in stored.split(4096)), torch.zeros((), device=stored.device))
    mean = (total / stored.shape[0]).to(stored.dtype)
    return {name: torch.cat([stored, mean.expand(rows - stored.shape[0], -1)])}
