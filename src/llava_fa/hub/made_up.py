"""Inputs made up from a configuration alone, for a model whose processor need not be there.

Only shapes matter. What an argument means is told by its name, which transformers' classes share; how pixels are laid
out is not, so there are several layouts, and the first that the model takes is the right one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

_TOKENS = 12
_GRID = 8
"""Patches a side of a picture whose size is free: enough for mergers of 2 × 2 and 4 × 4 patches."""
_SIDE = 224
_FRAMES = 3000
"""Frames of a spectrogram: Whisper's 30 seconds, which its encoders insist on."""
_WAVE = 19_200
"""Samples of a sound: 1.2 s, in whole frames of any usual length."""


def words(function: Callable[..., Any], config: Any) -> Iterator[Arguments]:
    """The one way to call ``function`` with a few words: what of them its signature names; none if it wants more."""
    return _calls(function, config, [{}])


def pictures_and_sounds(function: Callable[..., Any], config: Any) -> Iterator[Arguments]:
    """Ways to call ``function`` with a picture or a sound, and with words beside it, likeliest first."""
    known = set(inspect.signature(function).parameters)
    return _calls(function, config, [layout for layout in _layouts(config, known) if known & set(layout)])


def _calls(function: Callable[..., Any], config: Any, layouts: Iterable[Arguments]) -> Iterator[Arguments]:
    known = inspect.signature(function).parameters
    more = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {name for name, one in known.items() if one.default is one.empty and one.kind not in more}
    beside = _words(config)
    for layout in layouts:
        given = {name: value for name, value in {**beside, **layout}.items() if name in known}
        if needed <= set(given):
            yield given


def _some(*shape: Any) -> Tensor:
    return torch.full(shape[0] if isinstance(shape[0], tuple) else shape, 0.5)


def _words(config: Any) -> Arguments:
    """A few tokens, none of them special, under all the names that they have."""
    sizes = [size for one in _every(config) if isinstance(size := getattr(one, "vocab_size", None), int)]
    special = {token for one in _every(config) for token in _special(one)}
    few = range(min([1 << 16, *sizes]))
    tokens = torch.tensor([[token for token in few if token not in special][:_TOKENS] or [0]])
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(tokens)
    return {
        **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "protein_input_ids"), tokens),
        **dict.fromkeys(("attention_mask", "decoder_attention_mask", "qformer_attention_mask"), ones),
        "protein_attention_mask": ones,
        **dict.fromkeys(("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"), zeros),
        "image_attention_mask": ones[..., None],
        "bbox": zeros[..., None].expand(-1, -1, 4),
        "use_cache": False,
    }


def _every(config: Any) -> Iterator[Any]:
    """A configuration and those inside it, outermost first."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _every(value)


def _special(config: Any) -> Iterator[int]:
    for key, value in vars(config).items():
        if key.endswith(("token_id", "token_index", "token_ids")):
            yield from [one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, int)]


def _number(config: Any, *names: str, default: int) -> int:
    """The first of the fields that is there, in this configuration or one inside it; of sizes the height."""
    for one in _every(config):
        for name in names:
            value = getattr(one, name, None)
            if isinstance(value, dict):
                value = [value["height"]] if "height" in value else list(value.values())
            if isinstance(value, (list, tuple)):
                value = value[0] if value else None
            if isinstance(value, int) and value > 0:
                return value
    return default


def _layouts(config: Any, known: set[str]) -> Iterator[Arguments]:
    """Pictures as patches where the signature has a word for their grid, whole pictures, sounds."""
    vision = getattr(config, "vision_config", None)
    vision = config if vision is None or isinstance(vision, dict) else vision
    patch = _number(vision, "patch_size", "spatial_patch_size", default=16)
    channels = _number(vision, "in_channels", "num_channels", "in_chans", default=3)
    side = _number(vision, "image_size", "img_size", default=_SIDE)
    grid = {**_grid(), "flattened_patches": _some(1, _GRID * _GRID, 2 + channels * patch * patch)}
    if known & set(grid):
        frames = dict.fromkeys((_number(vision, "temporal_patch_size", default=1), 1, 2))
        count, pixels = _GRID * _GRID, channels * patch * patch
        mask = torch.ones(1, count, dtype=torch.long)
        for shape in (*((count, pixels * many) for many in frames), (count, channels, patch, patch)):
            yield {**_pixels(_some(shape)), "hidden_states": _some(shape), **grid}
        yield {**_pixels(_some(1, count, pixels)), **grid, "pixel_attention_mask": mask}
    tiles = _number(vision, "max_num_tiles", default=1)
    for leading in ((1,), (1, 1), (1, 1, tiles), (1, 5)):
        for size in dict.fromkeys((_GRID * patch, side)):  # a small one where the size is free
            yield {**grid, **_whole(_some(*leading, channels, size, size))}
    across = side // patch
    crops = _some(1, across * across, channels * patch * patch)
    yield {**_pixels(crops), **grid, "image_token_pooling": torch.arange(across * across // 4 * 4).view(-1, 4)}
    yield from _sounds(config)


def _grid() -> Arguments:
    """What goes with the patches of one square picture."""
    size = torch.tensor([[1, _GRID, _GRID]])
    rows, columns = torch.meshgrid(torch.arange(_GRID), torch.arange(_GRID), indexing="ij")
    positions = torch.stack([columns.flatten(), rows.flatten()], -1)[None]
    return {
        **dict.fromkeys(("image_grid_thw", "video_grid_thw", "grid_thw", "grid_thws"), size),
        **dict.fromkeys(("image_grid_hw", "image_grids", "spatial_shapes", "target_sizes"), size[:, 1:]),
        **dict.fromkeys(("image_position_ids", "pixel_position_ids"), positions),
        "image_merge_sizes": torch.tensor([2]),
    }


def _pixels(pixels: Tensor) -> Arguments:
    names = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_pixel_values")
    return dict.fromkeys(names, pixels)


def _whole(pixels: Tensor) -> Arguments:
    """One picture, or its tiles, and what goes with it."""
    *leading, _, high, wide = pixels.shape
    mask = torch.ones(*leading, high, wide, dtype=torch.long)
    return {
        **_pixels(pixels),
        "high_res_pixel_values": _some(*leading, 3, 1024, 1024),
        "image_sizes": torch.tensor([[high, wide]]).expand(math.prod(leading), 2),
        **dict.fromkeys(("pixel_attention_mask", "pixel_mask"), mask),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, leading[-1], dtype=torch.long),
        "num_local_patches": [0],
    }


def _sounds(config: Any) -> Iterator[Arguments]:
    bands = _number(config, "num_mel_bins", "input_feat_size", "input_dim", "n_mels", default=128)
    for shape in ((1, bands, _FRAMES), (1, _FRAMES, bands), (bands, _FRAMES)):
        mask = torch.ones(1, _FRAMES, dtype=torch.long)
        yield {
            **dict.fromkeys(("input_features", "audio_mel"), _some(shape)),
            **dict.fromkeys(("feature_attention_mask", "input_features_mask"), mask),
            **dict.fromkeys(("feature_lens", "audio_feature_lengths"), torch.tensor([_FRAMES])),
            "aftercnn_lens": torch.tensor([_FRAMES // 2]),
        }
    wave = _some(1, _WAVE)
    yield {"input_values": wave, "padding_mask": torch.ones_like(wave, dtype=torch.bool)}
