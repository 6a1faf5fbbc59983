"""Elastic visual tokens on LLaVA, LLaVA-NeXT and LLaVA-OneVision: attached, chosen, and restored by `from_pretrained`.

The projector's output passes through a `VisualTokens`; what the model's own code does with a tile afterwards
(unpadding, newlines) is told the smaller grid; and the processor is told a patch so much larger, so that it counts the
same tokens.
``config.visual_tokens`` says kind and number, so a saved model comes back as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig

from llava_fa.errors import FourierError, located
from llava_fa.hub.architecture import quiet_transformers
from llava_fa.hub.source import Source
from llava_fa.nn.visual_tokens import VisualTokens

FAMILIES = ("llava", "llava_next", "llava_onevision")
FIELD = "visual_tokens"
"""Of config.json, and the module's name in the model."""

RETIRED = ("queries",)
"""Kinds that earlier versions had: learned queries, which pooling surpassed at every number (docs/results.md)."""


def attach_visual_tokens(model: Any, processor: Any = None, tokens: int | None = None, kind: str = "fmvr") -> Any:
    """Give a model an elastic number of visual tokens; returns the same model.

    At first it answers as with plain pooling; `llava-fa train --matryoshka` teaches it to answer from few tokens.

    Args:
        model: a LLaVA, LLaVA-NeXT or LLaVA-OneVision model, compressed or not; what was attached before is replaced.
        processor: its processor, changed to agree.
        tokens: tokens per picture, tile or frame; all of the grid if None.
        kind: ``"fmvr"`` or ``"pooling"`` (no parameters; `nn.visual_tokens`).

    Raises:
        FourierError: another model, an unknown kind, or a number that the grid cannot give.
    """
    inner = _inner(model)
    config = inner.config
    module = VisualTokens(grid_of(config), config.text_config.hidden_size, kind, tokens)
    weight = next(inner.multi_modal_projector.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else inner.dtype
    _install(inner, module.to(weight.device, dtype))
    set_visual_tokens(model, module.tokens, processor)
    return model


def set_visual_tokens(model: Any, tokens: int, processor: Any = None) -> None:
    """Choose how many tokens a picture, tile or frame is told in, in the model and in its processor.

    A model to which nothing is attached gets plain pooling, unless it keeps all its tokens anyway.

    Raises:
        FourierError: a number that the grid cannot give; the message lists those it can.
    """
    module = visual_tokens_of(model)
    inner = _inner(model)
    if module is None:
        if tokens != VisualTokens(grid_of(inner.config), 1, "pooling").tokens:
            attach_visual_tokens(model, processor, tokens, "pooling")
        return
    module.tokens = tokens
    inner.config.visual_tokens = {"kind": module.kind, "tokens": module.tokens}
    if processor is not None:
        for key, value in processor_fields(inner.config).items():
            setattr(processor, key, value)


def visual_tokens_of(model: Any) -> VisualTokens | None:
    """What is attached to a model, None if nothing is."""
    return next((module for module in model.modules() if isinstance(module, VisualTokens)), None)


def grid_of(config: Any) -> tuple[int, int]:
    """Height and width of the grid of tokens that a model of this configuration makes of a picture or tile.

    Raises:
        FourierError: the model is none of `FAMILIES`, or its grid changes from picture to picture.
    """
    family = getattr(config, "model_type", "unknown")
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if (
        family not in FAMILIES
        or vision.model_type == "pixtral"
        or not (isinstance(size, int) and isinstance(patch, int))
    ):
        raise FourierError(
            f"a {family} model has no grid of visual tokens that is known here",
            remedy=f"Elastic visual tokens work with {', '.join(FAMILIES)} and square pictures of one size",
        )
    return size // patch, size // patch


def processor_fields(config: Any) -> dict[str, Any]:
    """The attributes that make a processor count the tokens that a model of this configuration gives.

    transformers' processors count (size of a picture // ``patch_size``)² tokens, but LLaVA-OneVision's its
    ``num_image_tokens``.
    """
    settings = getattr(config, FIELD, None)
    side = VisualTokens(grid_of(config), 1, "pooling", settings and settings["tokens"]).side[0]
    if config.model_type == "llava_onevision":
        return {"num_image_tokens": side * side}
    vision = config.vision_config
    return {"patch_size": patch_size(vision.image_size, side, vision.patch_size)}


def patch_size(size: int, side: int, patch: int) -> int:
    """The patch of which ``side`` fit into ``size``, the model's own where that does."""
    size_of_patch = patch if size // patch == side else size // side
    if size // size_of_patch != side:
        raise FourierError(
            f"no patch size divides {size} pixels into {side}", remedy="Choose another number of visual tokens"
        )
    return size_of_patch


def restore(model: nn.Module) -> None:
    """Attach what ``config.visual_tokens`` says, without weights: they are loaded next.

    transformers' constructors end by calling `PreTrainedModel.post_init`, which `hub.autoload` extends by this.
    """
    config = getattr(model, "config", None)
    if getattr(config, FIELD, None) is None or "multi_modal_projector" not in model._modules:
        return
    settings: Any = elastic_settings(config)
    with located(f"config.json: {FIELD}"):
        _install(model, VisualTokens(grid_of(config), config.text_config.hidden_size, **settings))


def elastic_settings(config: Any) -> dict[str, Any] | None:
    """Kind and number of visual tokens that a configuration says; None where it says nothing of them.

    Raises:
        FourierError: it says something else, or names a kind that is no more.
    """
    settings = getattr(config, FIELD, None)
    if settings is None:
        return None
    if not isinstance(settings, dict) or set(settings) != {"kind", "tokens"}:
        raise FourierError(
            f"{FIELD} is {settings!r}, not an object with kind and tokens",
            remedy="Copy config.json again",
            where="config.json",
        )
    if settings["kind"] in RETIRED:
        raise FourierError(
            f"visual tokens of kind {settings['kind']!r} are not supported any more",
            remedy="Train the original model again with --matryoshka, which gives it FMVR",
            where=f"config.json: {FIELD}",
        )
    return settings


def extend_post_init(base: type) -> None:
    """Let `restore` run at the end of the constructor of every model; called once, by `hub.autoload`."""
    original = base.post_init

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        restore(self)
        original(self)

    base.post_init = post_init


def _inner(model: Any) -> Any:
    """The part of a model that owns the projector."""
    for module in model.modules():
        if "multi_modal_projector" in module._modules and hasattr(module, "config"):
            return module
    raise FourierError(
        f"{type(model).__name__} has no projector between vision tower and language model",
        remedy="Give a LLaVA, LLaVA-NeXT or LLaVA-OneVision model",
    )


def _install(inner: Any, module: VisualTokens) -> None:
    old = inner._modules.get(FIELD)
    projector = inner.multi_modal_projector
    for key, hook in list(projector._forward_hooks.items()):
        if getattr(hook, "__self__", None) is old and old is not None:
            del projector._forward_hooks[key]
    inner.visual_tokens = module
    projector.register_forward_hook(module.after_projector)
    if not isinstance(inner, _Elastic):
        inner.__class__ = _elastic(type(inner))


class _Elastic:
    """What a model's inner part does differently once its tiles may have fewer tokens than patches."""

    def pack_image_features(self: Any, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """The original's, told the grid that comes out as if its patches were larger."""
        original = super().pack_image_features.__func__  # type: ignore[misc]
        return original(_seen_by_packing(self), image_features, image_sizes, *args, **kwargs)

    def apply_pooling(self: Any, image_features: Tensor) -> Tensor:
        """LLaVA-OneVision halves the grid of a video's frames; one that is pooled already it leaves alone."""
        if self.visual_tokens.level == 0:
            return super().apply_pooling(image_features)  # type: ignore[misc, no-any-return]
        return image_features

    def _init_weights(self, module: nn.Module) -> None:
        """Tensors that a checkpoint lacks start as if freshly attached."""
        if isinstance(module, VisualTokens):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


def _seen_by_packing(inner: Any) -> types.SimpleNamespace:
    vision = inner.config.vision_config
    patch = patch_size(vision.image_size, inner.visual_tokens.side[0], vision.patch_size)
    grid = types.SimpleNamespace(image_size=vision.image_size, patch_size=patch)
    config = types.SimpleNamespace(vision_config=grid, image_grid_pinpoints=inner.config.image_grid_pinpoints)
    return types.SimpleNamespace(config=config)


@functools.cache
def _elastic(base: type) -> type:
    """A subclass that goes by its base's name: libraries look models up by the names of their classes."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_Elastic, base), names)


def chosen(config: Any, tokens: int) -> dict[str, Any]:
    """``config.visual_tokens`` of a model that is set to so many; plain pooling where nothing is attached.

    Raises:
        FourierError: another model, or a number that the grid cannot give.
    """
    kind = (elastic_settings(config) or {"kind": "pooling"})["kind"]
    return {"kind": kind, "tokens": VisualTokens(grid_of(config), 1, "pooling", tokens).tokens}


def numbers_of(config: Any) -> tuple[int, ...]:
    """To how many tokens a model of this configuration can reduce a picture, most first; none if it is not elastic.

    Raises:
        FourierError: ``config.visual_tokens`` is something else, or does not fit the model.
    """
    settings = elastic_settings(config)
    return VisualTokens(grid_of(config), 1, **settings).counts if settings else ()


def with_visual_tokens(source: Source, tokens: int) -> Source:
    """A checkpoint whose copies are told pictures in so many tokens; plain pooling where nothing is attached.

    Raises:
        FourierError: another model, or a number that the grid cannot give.
    """
    with quiet_transformers():
        config = AutoConfig.from_pretrained(source.home, trust_remote_code=False)
    setattr(config, FIELD, chosen(config, tokens))
    written = {**source.config, FIELD: getattr(config, FIELD)}
    return dataclasses.replace(source, config=written, processor=processor_fields(config))
