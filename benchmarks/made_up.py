"""Inputs for a model of any family, without its processor: a few words, with a random picture or sound among them.

What a family's processor would give is not listed but found: every usual form of a picture's tensors (`_pictures`), or
of a sound's (`_sounds`), is tried with every number of marks in the text, until the model takes it and its answer
depends on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from shrunken import FIRST_SPECIAL

Inputs = dict[str, torch.Tensor]
_MOST_MARKS = 80
"""Marks tried in the text for one picture."""
_DIFFERENT = 1e-5
"""Of the largest logit: less than this is rounding, and the picture was not looked at."""


def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    """What the model answers."""
    with torch.no_grad():
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        return model(**inputs, **options).logits


def words(model: Any, seed: int = 0, length: int = 12) -> Inputs:
    """Random text alone."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, FIRST_SPECIAL - 50, (1, length), generator=random)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "bbox": torch.zeros(1, length, 4)}
    inputs |= {f"{other}_input_ids": ids for other in ("qformer", "protein")}
    inputs |= {f"{other}_attention_mask": torch.ones_like(ids) for other in ("qformer", "protein")}
    if model.config.is_encoder_decoder or hasattr(model.config, "canvas_length"):  # which else begins as noise
        inputs["decoder_input_ids"] = ids[:, :6]
    if codebooks := getattr(model.config, "num_codebooks", 0):  # a text's token, and the sound's of that moment
        inputs["input_ids"] = ids[..., None].repeat(1, 1, codebooks + 1)
    return _accepted(model, inputs)


def with_picture(model: Any, seed: int = 0) -> Inputs | None:
    """Random text with a random picture in it; None where no form of picture that we know is taken."""
    return _with(model, seed, _pictures(model, seed), "get_image_features")


def with_sound(model: Any, seed: int = 0) -> Inputs | None:
    """Random text with noise in it; None where no form of sound that we know is taken."""
    return _with(model, seed, _sounds(model, seed), "get_audio_features")


def _with(model: Any, seed: int, forms: Iterable[Inputs], counted: str) -> Inputs | None:
    text = words(model, seed)
    for form in forms:
        for marks in _marks(model, form, counted):
            inputs = _together(model, text, form, marks)
            other = {**inputs, **{key: x.flip(-1) for key, x in form.items() if x.is_floating_point()}}
            try:
                one, two = logits(model, inputs), logits(model, other)
            except Exception:  # whatever a model says of inputs that are not its own
                continue
            if one.shape == two.shape and float((one - two).abs().max()) > _DIFFERENT * float(one.abs().max()):
                return inputs
    return None


def _marks(model: Any, form: Inputs, counted: str) -> Iterator[int]:
    """Numbers of marks to try: as many as there are features, then all."""
    if (count := _features(model, form, counted)) is not None:
        yield count
    yield from range(_MOST_MARKS)


def _features(model: Any, form: Inputs, counted: str) -> int | None:
    features = getattr(model, counted, None)
    if features is None:
        return None
    try:
        with torch.no_grad():
            found = features(**form)
    except Exception:  # as above
        return None
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    if not all(isinstance(part, torch.Tensor) and part.ndim >= 2 for part in parts):
        return None
    return sum(part.numel() // part.shape[-1] for part in parts)


def _together(model: Any, text: Inputs, form: Inputs, marks: int) -> Inputs:
    named = inspect.signature(model.forward).parameters
    if "input_ids" not in text:
        return {**text, **form}
    if any(key.startswith("input_") for key in form):
        begin, end = _token(model, "audio_start_token_id"), _token(model, "audio_end_token_id")
        mark = _token(model, "audio_token_id", "audio_token_index")
    else:
        begin = _token(model, "vision_start_token_id", "boi_token_id")
        end = _token(model, "vision_end_token_id", "eoi_token_id")
        mark = _token(model, "image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    if mark is None and "image_embeds_position_mask" in named:
        mark = FIRST_SPECIAL  # the mask says where the picture is, any id will do
    ids = text["input_ids"]
    if mark is not None and marks:
        middle = [*([begin] if begin is not None else []), *[mark] * marks, *([end] if end is not None else [])]
        ids = torch.cat([ids[:, :4], torch.tensor([middle]), ids[:, 4:]], 1)
    of_picture = ids == mark if mark is not None else torch.zeros_like(ids, dtype=torch.bool)
    more = {
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": of_picture.long(),
        "token_type_ids": of_picture.long(),
        "image_embeds_position_mask": of_picture,
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
        "bbox": torch.zeros(*ids.shape, 4),
    }
    return _accepted(model, {**text, "input_ids": ids, **more, **form})


def _token(model: Any, *names: str) -> int | None:
    configs = [model.config, *(getattr(model.config, key, None) for key in ("thinker_config", "vlm_config"))]
    values = [getattr(config, name, None) for config in configs if config is not None for name in names]
    return next((value for value in values if isinstance(value, int)), None)


def _accepted(model: Any, inputs: Inputs) -> Inputs:
    """Those that the model's forward names."""
    named = inspect.signature(model.forward).parameters
    return {key: value for key, value in inputs.items() if key in named}


def _pictures(model: Any, seed: int) -> Iterator[Inputs]:
    """The usual forms of one picture's tensors, those first that the model names most of."""
    named = set(inspect.signature(model.forward).parameters)
    vision = _vision(model.config)
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    side = _number(vision, "image_size", "img_size", "resolution", default=56)
    patch = _number(vision, "patch_size", "spatial_patch_size", default=14)
    channels = _number(vision, "num_channels", "in_channels", "in_chans", default=3)
    frames = _number(vision, "temporal_patch_size", "patch_temporal", default=1)
    merge = _number(vision, "spatial_merge_size", "merge_size", default=2)
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    flat = noise(4 * merge * merge, channels * frames * patch * patch)
    tile = noise(1, channels, side, side)
    for key in ("image_grid_thw", "grid_thw", "image_grid_hws", "grid_hws", "image_grid_hw"):
        if key in named:
            yield {"pixel_values": flat, key: grid if key.endswith("thw") else grid[:, 1:]}
            cut = flat.reshape(len(flat), channels, -1, patch, patch)
            yield {"pixel_values": cut[:, :, 0], key: grid if key.endswith("thw") else grid[:, 1:]}
            yield {"pixel_values": cut, key: grid}
    if "aspect_ratio_ids" in named:
        tiles = vision.max_num_tiles
        yield {
            "pixel_values": noise(1, 1, tiles, channels, side, side),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, 12, 1, tiles, dtype=torch.long),
        }
    if "state" in named:  # a robot's, and the noise that its next movements come of
        config = model.config
        yield {
            "pixel_values": tile[None],
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
            "state": noise(1, config.max_state_dim),
            "noise": noise(1, config.chunk_size, config.max_action_dim),
            "timestep": torch.tensor([0.5]),
        }
    if "image_token_pooling" in named:
        yield {
            "pixel_values": noise(1, 16, channels * patch * patch),
            "image_token_pooling": torch.arange(16).reshape(4, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
            "image_num_crops": torch.tensor([1]),
        }
    if "flattened_patches" in named:
        yield {"flattened_patches": noise(1, 16, 2 + channels * patch * patch).abs() + 1}
    if "image_position_ids" in named or "pixel_position_ids" in named:
        key = "image_position_ids" if "image_position_ids" in named else "pixel_position_ids"
        count = _number(vision, "pooling_kernel_size", default=2) * 2
        places = torch.cartesian_prod(torch.arange(count), torch.arange(count))[None]
        yield {"pixel_values": noise(1, count * count, channels * patch * patch).sigmoid(), key: places}
    if "image_sizes" in named:
        sizes = torch.tensor([[side, side]])
        yield {"pixel_values": noise(1, 5, channels, side, side), "image_sizes": sizes}
        yield {"pixel_values": noise(1, 3, channels, side, side), "image_sizes": torch.tensor([[side, 2 * side]])}
        yield {"pixel_values": tile, "image_sizes": sizes}
    if "spatial_shapes" in named:
        yield {
            "pixel_values": noise(1, 16, channels * patch * patch),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }
    if "image_merge_sizes" in named:
        yield {"pixel_values": flat, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([merge])}
    if "pixel_attention_mask" in named:
        yield {"pixel_values": tile[None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    if "pixel_values" in named:
        yield {"pixel_values": tile}
        yield {"pixel_values": tile[None]}
        yield {"pixel_values": noise(1, 16, channels * patch * patch)}
    if "high_res_pixel_values" in named:
        high = _number(model.config.high_res_vision_config, "image_size", default=side)
        yield {"pixel_values": tile, "high_res_pixel_values": noise(1, channels, high, high)}


def _sounds(model: Any, seed: int) -> Iterator[Inputs]:
    """The usual forms of one sound's tensors: a spectrogram of a second, or of all that an encoder hears; a wave."""
    named = set(inspect.signature(model.forward).parameters)
    random = torch.Generator().manual_seed(seed)
    heard = max(_all(model.config, "max_source_positions"), default=48)
    bands = set(_all(model.config, "num_mel_bins", "feature_size", "input_dim"))
    bands |= {many * one for many in _all(model.config, "num_stacked_frames") for one in bands}
    if "input_features" in named:
        for frames in dict.fromkeys((96, 200, 2 * heard)):
            mask = torch.ones(1, frames, dtype=torch.long)
            beside = {"feature_attention_mask": mask, "input_features_mask": mask}
            beside |= {"chunk_sample_lengths": torch.tensor([160 * frames])}
            beside = {key: value for key, value in beside.items() if key in named}
            for shape in (shape for many in sorted(bands) for shape in ((1, many, frames), (1, frames, many))):
                yield {"input_features": torch.randn(shape, generator=random), **beside}
                yield {"input_features": torch.randn(shape, generator=random)}
    if "input_values" in named:
        for shape in ((1, 19_200), (1, 1, 19_200)):
            yield {"input_values": torch.randn(shape, generator=random)}


def _all(config: Any, *names: str) -> Iterator[int]:
    """The values of these fields in a configuration and those within it."""
    for key, value in vars(config).items():
        if key in names and isinstance(value, int):
            yield value
        elif hasattr(value, "to_dict"):
            yield from _all(value, *names)


def _vision(config: Any) -> Any:
    for part in (config, *(getattr(config, key, None) for key in ("thinker_config", "vlm_config"))):
        for key in ("vision_config", "vit_config", "vq_config", "encoder"):
            if (found := getattr(part, key, None)) is not None:
                return found
    return config


def _number(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return default
