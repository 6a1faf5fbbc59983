"""vLLM's LLaVA models with elastic visual tokens: as many placeholders as tokens, per server or per request.

Each class is vLLM's own and does nothing more where config.json has no ``visual_tokens``, but for one thing: weights
of a vision tower may go by the names that transformers gives them now. With it the projector's output passes through
`nn.visual_tokens.VisualTokens`, and whatever counts tokens is told a patch so much larger, as in
`hub.visual_tokens`. A request chooses its own number by ``mm_processor_kwargs={"visual_tokens": 16}``; the number is
an input of the model beside the pixels, and part of what vLLM's caches know a picture by.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next, llava_onevision
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.models.vision import get_vision_encoder_info
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from llava_fa.errors import FourierError
from llava_fa.hub.visual_tokens import FIELD, elastic_settings, grid_of, patch_size
from llava_fa.nn.visual_tokens import VisualTokens
from llava_fa.vllm.names import rewritten

_KEY = "visual_tokens"
"""Of ``mm_processor_kwargs``, and of the model's inputs."""


def _module(config: Any) -> VisualTokens | None:
    """What config.json says of visual tokens; None where it says nothing.

    Raises:
        FourierError: it says what cannot be.
    """
    settings = elastic_settings(config)
    return settings and VisualTokens(grid_of(config), config.text_config.hidden_size, **settings)


class _Info:
    """What counts tokens: as if patches were larger, where there are fewer tokens."""

    asked: int | None = None
    """By a request; None for what the server was started with."""

    def grid(self: Any) -> VisualTokens | None:
        """The grid of a picture's tokens, at the number that holds.

        Raises:
            FourierError: a request asks for a number that the grid cannot give, or of a model that is not elastic.
        """
        config = self.get_hf_config()
        settings = elastic_settings(config)
        if settings is None:
            if self.asked is not None:
                raise FourierError(
                    "this server's model always uses all its visual tokens",
                    remedy="Start it with --visual-tokens, or leave visual_tokens out of mm_processor_kwargs",
                )
            return None
        return VisualTokens(grid_of(config), 1, "pooling", settings["tokens"] if self.asked is None else self.asked)

    def get_vision_encoder_info(self: Any) -> Any:
        config, grid = self.get_hf_config(), self.grid()
        return get_vision_encoder_info(config if grid is None else _seen(config, grid))

    def _get_num_frame_tokens(self: Any, **size: int) -> int:
        grid = self.grid()  # frames that are pooled already are not pooled again
        if grid is not None and grid.level:
            return int(grid.tokens)
        return int(super()._get_num_frame_tokens(**size))  # type: ignore[misc]


def _seen(config: Any, grid: VisualTokens) -> Any:
    """The configuration as what counts or packs tokens is to see it."""
    seen, vision = copy.copy(config), copy.copy(config.vision_config)
    vision.patch_size = patch_size(vision.image_size, grid.side[0], vision.patch_size)
    seen.vision_config = vision
    return seen


class _Processor:
    """Reads a request's number, and hands it to the model with the pixels."""

    def _for(self: Any, kwargs: Mapping[str, object]) -> tuple[Any, dict[str, object]]:
        """The processor for a request's number of tokens, and what else it asks for."""
        rest = dict(kwargs)
        asked = rest.pop(_KEY, None)
        if asked is None:
            return self, rest
        other = copy.copy(self)
        other.info = copy.copy(self.info)
        other.info.asked = asked
        other.info.grid()  # which raises if the number cannot be
        return other, rest

    def _get_prompt_updates(self: Any, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        chosen, rest = self._for(hf_processor_mm_kwargs)
        return super(_Processor, chosen)._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc, no-any-return]

    def _apply_hf_processor_main(self: Any, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        chosen, rest = self._for(hf_kwargs)
        data = super(_Processor, chosen)._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        grid = chosen.info.grid()
        if grid is not None:
            for modality, count in mm_items.get_all_counts().items():
                if count:
                    data[f"{_KEY}_{modality}"] = torch.full((count,), grid.tokens)
        return data

    def _get_mm_fields_config(
        self: Any, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        numbers = {
            f"{_KEY}_{modality}": MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in ("image", "video")
        }
        return {**fields, **numbers}


class _Dummy:
    """What vLLM measures memory with: the most tokens that a request may ask for."""

    def get_dummy_processor_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = super().get_dummy_processor_inputs(*args, **kwargs)  # type: ignore[misc]
        grid = self.info.grid()
        if grid is not None:
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, _KEY: grid.counts[0]}
        return inputs


class _Model:
    """The model: its projector's output pooled, at the number of each picture."""

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        module = _module(self.config)
        self.elastic = module is not None
        if module is not None:
            self.visual_tokens = module.to(self.dtype_of_weights(vllm_config))
            self.multi_modal_projector.register_forward_hook(module.after_projector)

    @staticmethod
    def dtype_of_weights(vllm_config: Any) -> torch.dtype:
        dtype: torch.dtype = vllm_config.model_config.dtype
        return dtype

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        renamed = rewritten(self, self.hf_to_vllm_mapper.get_rename_mapper().map_name)
        return super().load_weights((renamed(name), tensor) for name, tensor in weights)  # type: ignore[misc, no-any-return]

    def embed_multimodal(self: Any, **kwargs: Any) -> Any:
        """As vLLM's, pictures of one number of tokens at a time."""
        numbers = [kwargs.pop(f"{_KEY}_{modality}", None) for modality in ("image", "video")]
        given = next((number for number in numbers if number is not None), None)
        if not self.elastic or given is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        counts = [int(number) for number in given]
        made: list[Any] = [None] * len(counts)
        for count in sorted(set(counts)):
            chosen = [index for index, number in enumerate(counts) if number == count]
            self.visual_tokens.tokens = count
            some = kwargs if len(chosen) == len(counts) else {key: _some(kwargs[key], chosen) for key in kwargs}
            for index, embedding in zip(chosen, super().embed_multimodal(**some), strict=True):  # type: ignore[misc]
                made[index] = embedding
        return made

    def _merge_image_patch_embeddings(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The original's, told the grid that comes out as if its patches were larger."""
        original = super()._merge_image_patch_embeddings.__func__  # type: ignore[misc]
        if not self.elastic:
            return original(self, *args, **kwargs)  # type: ignore[no-any-return]
        seen = SimpleNamespace(config=_seen(self.config, self.visual_tokens), image_newline=self.image_newline)
        return original(seen, *args, **kwargs)  # type: ignore[no-any-return]

    def apply_pooling(self: Any, image_features: Tensor, stride: int = 2) -> Tensor:
        """LLaVA-OneVision halves the grid of a video's frames; one that is pooled already it leaves alone."""
        if self.elastic and self.visual_tokens.level:
            return image_features
        return super().apply_pooling(image_features, stride)  # type: ignore[misc, no-any-return]


def _some(value: Any, chosen: list[int]) -> Any:
    return value[chosen] if isinstance(value, Tensor) else [value[index] for index in chosen]


@functools.cache
def _with(mixin: type, base: type) -> type:
    return type(base.__name__, (mixin, base), {"__module__": __name__, "__qualname__": base.__name__})


def _llava_info(ctx: Any) -> Any:
    info = llava._build_llava_or_pixtral_hf_info(ctx)
    return _with(_Info, type(info))(ctx) if isinstance(info, llava.LlavaProcessingInfo) else info


def _llava_processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    if isinstance(info, _Info):
        return _with(_Processor, llava.LlavaMultiModalProcessor)(info, dummy_inputs, **kwargs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs, **kwargs)


class _LlavaDummy(_Dummy, llava.LlavaDummyInputsBuilder):
    def get_dummy_processor_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.info, _Info):
            return super().get_dummy_processor_inputs(*args, **kwargs)
        return super(_Dummy, self).get_dummy_processor_inputs(*args, **kwargs)  # type: ignore[misc]


def _mapper(base: Any) -> WeightsMapper:
    return base.hf_to_vllm_mapper | WeightsMapper(orig_to_new_prefix={f"model.{FIELD}.": f"{FIELD}."})  # type: ignore[no-any-return]


@MULTIMODAL_REGISTRY.register_processor(_llava_processor, info=_llava_info, dummy_inputs=_LlavaDummy)
class LlavaForConditionalGeneration(_Model, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 and its kin."""

    hf_to_vllm_mapper = _mapper(llava.LlavaForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    _with(_Processor, llava_next.LlavaNextMultiModalProcessor),
    info=_with(_Info, llava_next.LlavaNextProcessingInfo),
    dummy_inputs=_with(_Dummy, llava.LlavaDummyInputsBuilder),
)
class LlavaNextForConditionalGeneration(_Model, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    hf_to_vllm_mapper = _mapper(llava_next.LlavaNextForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    _with(_Processor, llava_onevision.LlavaOnevisionMultiModalProcessor),
    info=_with(_Info, llava_onevision.LlavaOnevisionProcessingInfo),
    dummy_inputs=_with(_Dummy, llava_onevision.LlavaOnevisionDummyInputsBuilder),
)
class LlavaOnevisionForConditionalGeneration(_Model, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    hf_to_vllm_mapper = _mapper(llava_onevision.LlavaOnevisionForConditionalGeneration)
