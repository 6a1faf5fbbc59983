"""The plug-in through which transformers loads, saves, compresses and decompresses models in this format.

`from_pretrained(compressed folder)`: layers become empty `FourierLinear` on the meta device, then are filled.
`from_pretrained(folder, quantization_config=FourierConfig(...))`: every weight is compressed, without data,
as it is read. `save_pretrained` writes docs/format.md; `dequantize()` gives the plain model back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llava_fa.config import QUANT_METHOD, FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub.arrangement import arrange
from llava_fa.hub.checkpoint import (
    LayerRecord,
    Metadata,
    check_content,
    codebook_digest,
    file_keys,
    is_codebook,
    validate,
)
from llava_fa.hub.exchange import empty_for, exchange, find, keep_parent, tie_all
from llava_fa.hub.on_load import Compress, Loading, check_complete
from llava_fa.nn.codebooks import MODULE, attach, share_codebooks
from llava_fa.nn.experts import fuse, unfuse, within
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.fourier_embedding import untie
from llava_fa.nn.packed_linear import Codebooks
from llava_fa.nn.surgery import restore_ties
from llava_fa.nn.twins import link, share, unlink


@register_quantization_config(QUANT_METHOD)
class FourierQuantizationConfig(QuantizationConfigMixin):
    """`Metadata` in the form in which transformers carries it, as ``model.config.quantization_config``."""

    def __init__(self, metadata: Metadata) -> None:
        self.quant_method = QUANT_METHOD
        self.metadata = metadata

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read ``quantization_config`` of a config.json (see `Metadata.from_dict`), or what a user gives as one.

        Without a format version it tells how to compress, and is a `FourierConfig`.
        """
        told = {"format_version", "layers"} & set(config_dict)
        config = cls(Metadata.from_dict(config_dict)) if told else FourierConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: so transformers asks, where it is given the config of a loaded model."""
        return self.to_dict().get(key, default)

    def to_dict(self) -> dict[str, Any]:
        """What config.json stores."""
        return self.metadata.to_dict()


@register_quantizer(QUANT_METHOD)
class FourierHfQuantizer(HfQuantizer):
    """Loads checkpoints of this format, and compresses others while they are loaded."""

    is_trainable = True
    """transformers' Trainer takes it: gradients pass to adapters, and to what `nn.trainable` makes trainable."""
    is_qat_trainable = True
    """Without adapters too (`llava_fa.train`)."""
    is_compileable = True
    """`torch.compile` works."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, FourierConfig):
            if kwargs.get("pre_quantized"):
                Metadata.from_dict(quantization_config.to_dict())  # a folder that says no format version: its error
            quantization_config = FourierQuantizationConfig(Metadata(quantization_config))
        super().__init__(quantization_config, **kwargs)
        self._loading: Loading | None = None
        self._stored: dict[str, frozenset[str]] = {}  # module → those of its tensors that keep their stored dtype
        self._validated = False

    @property
    def metadata(self) -> Metadata:
        """What is known of the checkpoint."""
        return self.quantization_config.metadata

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes a weight will take, for the device map; scales and signs come to a few percent."""
        return None if self.pre_quantized else 1.05 * self.metadata.config.bits / 8

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """A map by hand names the model's modules; codebooks go to its first accelerator, or to the CPU."""
        if not isinstance(device_map, dict) or {"", MODULE} & set(device_map) or not self.metadata.codebooks:
            return device_map
        places = [place for place in device_map.values() if str(place) not in ("cpu", "disk")]
        return {**device_map, MODULE: next(iter(places), "cpu")}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether this weight is to be compressed while it is loaded."""
        return self._loading is not None and self._loading.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to such a weight."""
        assert self._loading is not None
        return Compress(self._loading)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors keep their stored dtype, whatever is asked for or kept in float32."""
        layer, _, name = str(converter.target_patterns[0]).rpartition(".")
        stored = name in self._stored.get(layer, ())
        return None if stored else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or []]
        with torch.device("cpu"):  # transformers builds under the meta device
            (self._expect_layers if self.pre_quantized else self._plan)(model, files)

    def _expect_layers(self, model: nn.Module, files: list[Path]) -> None:
        for name in unfuse(model, lambda name: any(within(layer, name) for layer in self.metadata.layers)):
            keep_parent(model, name)
        places = find(model, self.metadata.layers)
        link(model, places.values())
        if files:
            entries = validate(files, self.metadata)
            self._validated = True
            for name, record in self.metadata.layers.items():
                for stored in file_keys(name, record.layout).values():
                    entries.pop(stored, None)
            check_complete(model, arrange(model, entries, self.metadata.layers), files)
        books: dict[str, int] = {}
        for name, record in self.metadata.layers.items():
            here = places[name]
            exchange(model, here, empty_for(model.get_submodule(here), name, record))
            for prefix, part in record.layout.parts().items():
                self._stored[f"{here}.{prefix}".rstrip(".")] = frozenset(part.tensors())
                if part.method == "best":
                    books[part.codebook] = part.points
        share(model)
        tie_all(model)
        self._stored[MODULE] = frozenset(books)
        if books:
            attach(model, Codebooks(books, device="meta"))

    def _plan(self, model: nn.Module, files: list[Path]) -> None:
        self._loading = Loading(model, self.metadata.config, files)
        self.quantization_config = FourierQuantizationConfig(
            Metadata(self.metadata.config, {}, self._loading.not_compressed, {})
        )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            self._check_loaded(model)
            model._weight_conversions = []  # the format's names are the module names, whatever else was read
            self._rename(model)
            return model
        assert self._loading is not None
        self._loading.finish(model)
        share(model)
        mark_compressed(model, self)
        return model

    def _rename(self, model: nn.Module) -> None:
        """Let a model that is the base of the one that was saved, or contains it, be saved under its own names."""
        metadata = _renamed(self.metadata, model)
        if metadata is not self.metadata:
            model.config.quantization_config = self.quantization_config = FourierQuantizationConfig(metadata)

    def _check_loaded(self, model: nn.Module) -> None:
        for name, layer in packed_layers(model):
            tensors = layer.packed()
            for key, tensor in tensors.items():
                loaded = getattr(tensor, "_is_hf_initialized", False) or is_codebook(key)
                if not (loaded or self._validated):  # given a state dict instead of files
                    raise FourierError(
                        "this tensor is missing from the weights",
                        remedy="Copy the folder again, or compress the model again",
                        where=f"{name}.{key}",
                    )
            if not any(tensor.is_meta for tensor in tensors.values()):  # meta: offloaded to disk
                check_content(name, layer.layout, tensors)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained leaves a string
        layers = packed_layers(model)
        for name, layer in layers:  # before the first is exchanged
            if layer.qweight.is_meta:
                raise FourierError("it is offloaded", remedy="Load the model without offloading", where=name)
        plain = {}
        for name, layer in layers:
            plain[layer] = layer.to(dtype).to_plain()
            exchange(model, name, plain[layer])
        untie(model, plain)
        fuse(model)
        unlink(model)
        restore_ties(model)
        if hasattr(model, MODULE):
            delattr(model, MODULE)
        model._weight_conversions = None  # saved names are again those of the plain format
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        return model


def mark_compressed(model: nn.Module, quantizer: FourierHfQuantizer | None = None, **metadata: Any) -> None:
    """Make a model with `FourierLinear` layers one that `save_pretrained` and `dequantize` know.

    Args:
        model: a transformers model, some of whose linear layers have been exchanged.
        quantizer: the one that loaded it, if any.
        metadata: without a quantizer: ``config`` and ``not_compressed`` of `Metadata`.

    Raises:
        FourierError: layers of one kind and size of code have different codebooks.
    """
    if quantizer is None:
        start = Metadata(**metadata)
        quantizer = FourierHfQuantizer(FourierQuantizationConfig(start), pre_quantized=True)
    share_codebooks(model)
    layers = {name: LayerRecord.of(layer) for name, layer in packed_layers(model)}
    parts = [part for record in layers.values() for part in record.layout.parts().values()]
    used = {part.codebook for part in parts if part.method == "best"}
    digests = {name: codebook_digest(getattr(model, MODULE)[name]) for name in sorted(used)}
    before = quantizer.metadata
    config = FourierQuantizationConfig(
        Metadata(before.config, layers, before.not_compressed, digests, attention_density=before.attention_density)
    )
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    model._weight_conversions = []  # the format's names are the module names


def _renamed(metadata: Metadata, model: nn.Module) -> Metadata:
    """The metadata under the names of this model, which may be the base of the one that was saved, or contain it."""
    places = find(model, metadata.layers)
    layers = {places[name]: record for name, record in metadata.layers.items()}
    if list(layers) == list(metadata.layers):
        return metadata
    prefix = f"{model.base_model_prefix}."
    inside = not next(iter(layers)).startswith(prefix)

    def renamed(names: dict[str, Any]) -> dict[str, Any]:
        if inside:
            return {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
        return {prefix + name: value for name, value in names.items()}

    density = metadata.attention_density and renamed(metadata.attention_density)
    rest = renamed(metadata.not_compressed)
    return dataclasses.replace(metadata, layers=layers, not_compressed=rest, attention_density=density)
