"""peft on packed layers: LoRA by peft's own functions, whoever calls them (`get_peft_model`, `from_pretrained`, …).

peft knows the layers of other formats by a list inside of itself. Here two of its methods are extended, once
(`install`, run by `hub.autoload` when peft is imported): what every adapter passes on its way into a model, and what
every merge passes. The layers themselves go through ``_register_custom_module``, peft's door for types from outside.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from llava_fa.errors import FourierError
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.fourier_embedding import FourierEmbedding, Tied, TiedEmbedding, TiedHead
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.nn.patches import Patches

_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Beginnings of A and B that leave the weight below them as it is."""
_VARIANTS = ("use_dora", "alora_invocation_tokens")
"""Variants that ask the layer below for its output, or read its weight and never write it."""
_TABLES = (FourierEmbedding, TiedEmbedding)
"""What is looked up, and takes no adapter."""
_INSIDE = ".base_layer"
"""Where peft puts the layer that an adapter is laid on."""


class LoraPackedLinear(lora.Linear):
    """peft's own LoRA layer, y = W x + (α/r) B (A x), whose base is asked for its output, and never written to.

    Its name has ``Linear`` in it: by that peft finds layers that have an adapter already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # that peft does not know these layers is why this class is there
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(*args, **kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Where the adapter goes, and as what; peft would decode the weight to see."""
        layer = base_layer.embedding if isinstance(base_layer, Tied) else base_layer
        return layer.qweight.device, layer.dtype

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused: a sum of codes and adapters is no codes."""
        raise _no_merge()


def install() -> None:
    """Let every adapter that enters a model, and every merge, see to packed layers; doing it again changes nothing."""
    if hasattr(BaseTuner.inject_adapter, "__wrapped__"):
        return
    inject, check_merge = BaseTuner.inject_adapter, lora.LoraModel._check_merge_allowed

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        prepare(self, self.peft_config[adapter_name], model)
        return inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(check_merge)
    def check_merge_allowed(self: Any) -> None:
        if any(isinstance(module, LoraPackedLinear) for module in self.model.modules()):
            raise _no_merge()  # before dense layers are merged, and half of an adapter is left
        check_merge(self)

    BaseTuner.inject_adapter = inject_adapter
    lora.LoraModel._check_merge_allowed = check_merge_allowed


def prepare(tuner: BaseTuner, config: PeftConfig, model: nn.Module) -> None:
    """Make an adapter's configuration one that fits the packed layers of a model; nothing without any.

    Args:
        tuner: peft's class for this kind of adapter.
        config: is changed: ``"all-linear"``, and patterns that match the inside of a layer too, become lists of layers.

    Raises:
        FourierError: what is asked for cannot be had on a packed layer; the model is as it was.
    """
    layers = _layers(model)
    if not layers:
        return

    def targets(names: Iterable[str]) -> list[str]:
        return [name for name in names if tuner._check_target_module_exists(config, name)]

    asked = getattr(config, "target_modules", None)
    _check_saved(config, layers)
    if isinstance(asked, str) and asked.lower() == "all-linear":
        config.target_modules = _all_linear(config, model, layers)
    elif isinstance(asked, str):
        inner = {f"{name}.{part}" for name in layers for part, _ in layers[name].named_modules() if part}
        if targets(inner):
            names = [name for name, _ in model.named_modules() if name and name not in inner]
            config.target_modules = set(targets(names))
    found = targets(layers) if asked is not None else []
    if found:
        _check_kind(config, found[0])
    for name in found:
        if isinstance(layers[name], _TABLES) or Patches.of(layers[name]):
            kind = "word embedding" if isinstance(layers[name], _TABLES) else "convolution"
            raise FourierError(f"a packed {kind} takes no adapter", remedy="Leave it out of target_modules", where=name)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Packed layers, and what is tied to a packed embedding, by the name that an adapter has or will have."""
    tied = [(name, module) for name, module in model.named_modules() if isinstance(module, Tied)]
    return {name.removesuffix(_INSIDE): layer for name, layer in [*packed_layers(model), *tied]}


def _all_linear(config: Any, model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """What peft takes for linear, and every packed layer but embeddings and the output embedding."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    head = getattr(model, "get_output_embeddings", lambda: None)()
    own = {name for name, layer in layers.items() if isinstance(layer, PackedLinear) and layer is not head}
    own -= {name for name, layer in layers.items() if isinstance(layer, _TABLES) or Patches.of(layer)}
    dense: set[str] = set(_maybe_include_all_linear_layers(config, model).target_modules)
    return dense | own


def _check_kind(config: PeftConfig, name: str) -> None:
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise FourierError(
            f"{kind} adapters do not know packed layers", remedy="Use LoRA (peft.LoraConfig)", where=name
        )
    if config.init_lora_weights not in _INITS:
        raise FourierError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weight below the adapter, and codes stay",
            remedy="Leave it out, or give 'gaussian', 'orthogonal' or 'eva'",
            where=name,
        )
    for field in ("use_qalora", *(key for key, value in _fields(config).items() if value.get("is_lora_variant"))):
        if getattr(config, field, None) and field not in _VARIANTS:
            raise FourierError(
                f"{field} is a variant of LoRA that packed layers do not know",
                remedy=f"Use plain LoRA, or one of {', '.join(_VARIANTS)}",
                where=name,
            )
    config.fan_in_fan_out = False  # weights of packed layers are [m, n], as peft sets it for torch.nn.Linear
    config._register_custom_module(dict.fromkeys((PackedLinear, TiedHead), LoraPackedLinear))


def _fields(config: Any) -> dict[str, Any]:
    return {name: field.metadata for name, field in config.__dataclass_fields__.items()}


def _check_saved(config: Any, layers: dict[str, nn.Module]) -> None:
    """What is trained whole, as a copy, must have weights that can be trained."""
    for asked in getattr(config, "modules_to_save", None) or ():
        for name, layer in layers.items():
            if any(part.endswith(asked) for part in _places(name)):
                raise FourierError(
                    f"modules_to_save has {asked!r}, and codes cannot be trained",
                    remedy="Give it to target_modules" if not isinstance(layer, _TABLES) else "Leave it out",
                    where=name,
                )
    words = [name for name, layer in layers.items() if isinstance(layer, _TABLES)]
    if words and getattr(config, "trainable_token_indices", None):
        raise FourierError(
            "trainable_token_indices needs a word embedding that is not packed",
            remedy="Compress the model again without embeddings",
            where=words[0],
        )


def _places(name: str) -> list[str]:
    """A module's name and those of all that it is in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _no_merge() -> FourierError:
    return FourierError(
        "an adapter cannot be merged into packed codes",
        remedy="Keep it beside the model, or load it into a model after dequantize()",
    )
