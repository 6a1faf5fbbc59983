"""config.json of a checkpoint that transformers does not read (`hub.original`), as transformers' configurations."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fa.errors import FourierError, explained, shown
from llava_fa.hub.architecture import one_line
from llava_fa.hub.shards import Entry
from llava_fa.hub.source import open_source, read_config, resolve_model

_LANGUAGES = {"llama": "LlamaConfig", "internlm2": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}
_TOWERS = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}
_ROPE = ("rope_theta", "rope_scaling")
"""Fields of older configurations that newer ones fold into one."""
_OTHERS = ("architectures", "model_type", "transformers_version", "quantization_config", "_name_or_path")
"""Fields that say what a configuration is of, not what it says."""


def language_config(values: Mapping[str, Any], language: str, where: str) -> Any:
    """transformers' configuration of the language model.

    Args:
        values: config.json.
        language: as `hub.original.Original` has it.
        where: what errors call the folder.

    Raises:
        FourierError: a field that cannot be.
    """
    fields = dict(values)
    if language == "internlm2" and "bias" in fields:  # of attention alone, as Llama's `attention_bias`
        fields["attention_bias"] = fields["bias"]
    config = _config(_LANGUAGES[language], fields, where)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    if min(heads, groups, width) < 1 or width % heads or heads % groups:
        raise FourierError(
            f"config.json divides a width of {width} among {heads} heads, and those among {groups} keys and values",
            remedy="Check that config.json is of this model, and whole",
            where=where,
        )
    return config


def _config(name: str, values: Mapping[str, Any], where: str) -> Any:
    """A configuration of this class from the fields that it knows; LLaVA adds many of its own to the same object."""
    import transformers

    kind = getattr(transformers, name)
    known = {*kind().to_dict(), *_ROPE} - {*_OTHERS}
    fields = {key: value for key, value in values.items() if key in known and (value is not None or key not in _ROPE)}
    if (dtype := values.get("dtype") or values.get("torch_dtype")) is not None:
        fields["dtype"] = dtype
    remedy = "Check that config.json is of this model, and whole"
    with explained(f"config.json makes no {name}", remedy=remedy, where=where, words=one_line):
        return kind(**fields)


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower: its folder, its configuration as far as LLaVA uses it, and its tensors.

    Attributes:
        entries: none where they are among the model's own weights.
        fingerprint: of its config.json and headers.
    """

    folder: Path
    config: Any
    entries: dict[str, Entry]
    fingerprint: str


def find_tower(
    folder: Path, values: Mapping[str, Any], inside: bool, given: str | Path | None, columns: int | None
) -> Tower:
    """The vision tower that a LLaVA's config.json names, or the one that is given.

    Args:
        folder, values: the model and its config.json.
        inside: whether the tower's tensors are among the model's weights.
        given: its folder or hub id, instead of what config.json says.
        columns: what the projector takes; None where that is not known.

    Raises:
        FourierError: it is not found, not one that transformers has a class for, or not of the projector's width.
    """
    named = values.get("mm_vision_tower", values.get("vision_tower"))
    place = _tower_folder(folder, named, given)
    stored = read_config(place)
    kind = re.match("clip|siglip", str(stored.get("model_type")))
    if kind is None or str(stored["model_type"]).removeprefix(kind[0]) not in ("", "_model", "_vision_model"):
        raise FourierError(
            f"the vision tower is a {shown(stored.get('model_type'))}",
            remedy="Give a CLIP or SigLIP folder, or hub id, with --vision-tower",
            where=str(place),
        )
    part = stored.get("vision_config")
    config = _config(_TOWERS[kind[0]], part if isinstance(part, Mapping) else stored, str(place))
    sizes = config.image_size, config.patch_size, config.num_hidden_layers
    if not all(type(size) is int and size > 0 for size in sizes) or config.patch_size > config.image_size:
        raise FourierError(
            f"the vision tower has {shown(sizes)} as sides of pictures and patches, and number of layers",
            remedy="Check its config.json",
            where=str(place),
        )
    if kind[0] == "siglip":  # LLaVA cuts off the last layer and the head, and takes what comes out
        config.num_hidden_layers -= 1
        config.vision_use_head = False
    widths = {
        "mm_hidden_size of config.json": values.get("mm_hidden_size"),
        "the projector's input": columns,
    }
    for what, width in widths.items():
        if width is not None and width != config.hidden_size:
            raise FourierError(
                f"the vision tower gives {config.hidden_size} numbers a patch, and {what} is {shown(width)}",
                remedy=f"Give the tower that this model was trained with ({shown(named)}) with --vision-tower",
                where=str(place),
            )
    if inside:
        return Tower(place, config, {}, "")
    weights = open_source(place)
    return Tower(place, config, weights.entries, weights.fingerprint)


def _tower_folder(folder: Path, named: Any, given: str | Path | None) -> Path:
    if given is not None:
        return resolve_model(given)
    remedy = "Give its folder or hub id with --vision-tower"
    if not isinstance(named, str) or not named:
        raise FourierError("config.json names no vision tower (mm_vision_tower)", remedy=remedy, where=str(folder))
    for place in (folder / named, folder.parent / named):  # an absolute path is itself in both
        if place.is_dir():
            return place
    try:
        return resolve_model(named)
    except FourierError as error:
        what = f"its vision tower, {shown(named)} (mm_vision_tower in config.json), is not found ({error.what})"
        raise FourierError(what, remedy=remedy, where=str(folder)) from error


def model_config(values: Mapping[str, Any], text: Any, vision: Any, *, linear: bool, newline: bool, where: str) -> Any:
    """transformers' configuration of the whole: LLaVA, LLaVA-NeXT or LLaVA-OneVision.

    Args:
        values: LLaVA's config.json.
        text, vision: of its parts.
        linear: whether the projector is one matrix.
        newline: whether ``image_newline`` is stored.
        where: what errors call the folder.

    Raises:
        FourierError: it cuts pictures up in a way that none of the three does, or what that takes is missing.
    """
    import transformers

    siglip = vision.model_type.startswith("siglip")
    selected = values.get("mm_vision_select_feature") or "patch"
    fields = {
        "text_config": text,
        "vision_config": vision,
        "projector_hidden_act": "linear" if linear else "gelu",
        "vision_feature_select_strategy": "full" if siglip or selected == "cls_patch" else "default",
        "vision_feature_layer": -1 if siglip else values.get("mm_vision_select_layer", -2),
        "tie_word_embeddings": bool(text.tie_word_embeddings),
        "dtype": text.dtype,
    }
    layer, layers = fields["vision_feature_layer"], vision.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise FourierError(
            f"mm_vision_select_layer of config.json is {shown(layer)}, and the vision tower has {layers} layers",
            remedy="Check that config.json and the vision tower belong together",
            where=where,
        )
    name = _class_of(values, newline, where)
    if name == "LlavaOnevision":
        fields["vision_aspect_ratio"] = values["image_aspect_ratio"]
    else:
        fields["image_seq_length"] = (vision.image_size // vision.patch_size) ** 2
    if name != "Llava":
        fields["image_grid_pinpoints"] = _grid(values.get("image_grid_pinpoints"), vision.image_size, where)
    with explained("config.json makes no LLaVA", remedy="Check that it is whole", where=where, words=one_line):
        config = getattr(transformers, f"{name}Config")(**fields)
    config.architectures = [f"{name}ForConditionalGeneration"]
    return config


def _class_of(values: Mapping[str, Any], newline: bool, where: str) -> str:
    """Which of transformers' classes puts pictures together as this LLaVA does."""
    aspect = str(values.get("image_aspect_ratio") or "square")
    merge = values.get("mm_patch_merge_type") or "flat"
    if aspect in ("square", "pad"):
        return "Llava"
    name = {"anyres": "LlavaNext"}.get(aspect, "LlavaOnevision" if re.fullmatch(r"anyres_max_\d+", aspect) else "")
    if not name or merge != "spatial_unpad":
        raise FourierError(
            f"none of transformers' classes cuts pictures up by {shown(aspect)} and merges them by {shown(merge)}",
            remedy="Known are image_aspect_ratio square, pad, or anyres and anyres_max_N with mm_patch_merge_type "
            "spatial_unpad",
            where=where,
        )
    if not newline:
        raise FourierError(
            "config.json merges pieces of pictures by spatial_unpad, and the weights have no model.image_newline",
            remedy="Copy or download it again: all files of the weights are needed",
            where=where,
        )
    return name


def _grid(pinpoints: Any, side: int, where: str) -> list[list[int]]:
    """Sizes of pictures as (height, width); LLaVA writes (width, height), or a range ``(1x1),...,(6x6)`` of tiles."""
    with explained(
        f"image_grid_pinpoints of config.json are no sizes: {shown(pinpoints)}",
        remedy="Give a list such as [[336, 672], [672, 336]], in pixels",
        where=where,
        words=None,
    ):
        if isinstance(pinpoints, str) and "x" in pinpoints:
            tiles = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
            (left, low), (right, high) = tiles[0], tiles[-1]
            sizes = [(side * i, side * j) for i in range(left, right + 1) for j in range(low, high + 1)]
        else:
            sizes = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        grid = [[int(height), int(width)] for width, height in sizes]
        if not grid or min(map(min, grid)) < side:
            raise ValueError
        return grid
