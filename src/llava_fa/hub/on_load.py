"""Compressing weights as transformers reads them: what `from_pretrained(folder, quantization_config=…)` does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub.arrangement import Arrangement, arrange
from llava_fa.hub.conversion import Stored
from llava_fa.hub.exchange import exchange
from llava_fa.hub.feeds import Feed, observe
from llava_fa.hub.shards import read_entries
from llava_fa.nn.experts import Experts, Stack, is_fused_experts, stacks, unfuse
from llava_fa.nn.factored_linear import layer_from_approximation
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.nn.patches import Patches
from llava_fa.nn.surgery import classify
from llava_fa.nn.twins import link
from llava_fa.solver.approximate import approximate


class Loading:
    """A model that is compressed while its weights are read: which of them are, and what they have become.

    Experts arrive as transformers holds them, one tensor for all; their module is exchanged when all has been read.

    Args:
        model: on the meta device.
        files: its weights; none where a state dict is given instead: then nothing is known of what feeds a layer.

    Raises:
        FourierError: a weight is missing, or patterns leave nothing to compress.
    """

    def __init__(self, model: nn.Module, config: FourierConfig, files: list[Path]) -> None:
        self.config = config
        self.failures: list[FourierError] = []
        apart = model
        if any(is_fused_experts(module) for module in model.modules()):
            apart = copy.deepcopy(model)
            unfuse(apart)
        plan = classify(apart, config.skip, config.only)
        link(model, plan.layers)
        self.not_compressed, self.layers = plan.not_compressed, frozenset(plan.layers)
        wanted = {f"{name}.weight" for name in plan.layers}
        self._stacks: dict[str, Stack] = {}
        for stack in stacks(apart):
            if wanted & set(stack.parts):
                self._stacks[stack.parameter] = stack
                wanted -= set(stack.parts)
        self.targets = wanted | set(self._stacks)
        self._experts: dict[str, dict[str, list[nn.Module]]] = {}
        self._carriers: set[str] = set()
        self._weights: dict[str, Stored] = {}
        if files:
            arrangement = arrange(model, read_entries(files))
            check_complete(model, arrangement, files)
            self._weights = arrangement.weights
            # transformers asks by the first of the parameters that come of one stored tensor
            together = [c.parameters for c in arrangement.conversions if self.targets & set(c.parameters)]
            self._carriers = {name for parameters in together for name in parameters}
        self._feeds: dict[str, Feed | None] = {}
        if config.calibration != "none" and files:
            feeds = observe(apart)
            self._feeds = {name: feeds.of(name) for name in plan.layers}

    def wants(self, parameter: str) -> bool:
        """Whether a parameter is compressed, or comes of a stored tensor that others come of that are."""
        return parameter in self.targets or parameter in self._carriers

    def take(self, model: nn.Module, parameter: str, value: Tensor) -> None:
        """Compress one of the ``targets``, and leave it in the model."""
        if value.shape != model.get_parameter(parameter).shape:
            raise FourierError(
                f"the checkpoint has {list(value.shape)}, the model {list(model.get_parameter(parameter).shape)}",
                remedy="config.json does not belong to these weights",
            )
        stack = self._stacks.get(parameter)
        if stack is None:
            name = parameter.removesuffix(".weight")
            module = model.get_submodule(name)
            layer = self._layer(name, value.flatten(1), module.bias)
            if (patches := Patches.of(module)) is not None:
                layer.convolve(patches)
            exchange(model, name, layer)
            return
        made: list[nn.Module] = []
        for part, one in zip(stack.parts, value, strict=True):
            name, weight = part.removesuffix(".weight"), one.T if stack.transposed else one
            made.append(self._layer(name, weight, None) if name in self.layers else _plain(weight))
        self._experts.setdefault(stack.module, {})[parameter.rpartition(".")[2]] = made

    def finish(self, model: nn.Module) -> None:
        """Exchange the modules of experts.

        Raises:
            FourierError: a layer could not be compressed.
        """
        if self.failures:
            first = self.failures[0]
            more = f" ({len(self.failures)} layers failed)" if len(self.failures) > 1 else ""
            raise FourierError(first.what + more, remedy=first.remedy, where=first.where)
        for name, lists in self._experts.items():
            experts = Experts(model.get_submodule(name))
            for parameter, layers in lists.items():
                linears = experts.lists[parameter]
                for index, layer in enumerate(layers):
                    layer.bias = linears[index].bias
                    linears[index] = layer
            exchange(model, name, experts)
        for name in self.layers:
            try:
                found: nn.Module | None = model.get_submodule(name)
            except AttributeError:
                found = None
            if not isinstance(found, PackedLinear):
                self.not_compressed[name] = "its weight is not in the checkpoint"

    def _layer(self, name: str, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        feed = self._feeds.get(name)
        moment = None if feed is None else feed.read_second_moment(self._weights.get, weight.shape[1])
        moment = None if moment is None else moment.to(weight.device)
        try:
            approximation = approximate(weight, self.config, moment)
        except FourierError as error:
            raise error.at(name) from None
        layer = layer_from_approximation(approximation, bias, weight.dtype)
        layer.output_error = None  # against a norm's γ², not against real inputs: not a measurement
        return layer


class Compress(ConversionOps):
    """Takes dense weights, leaves packed layers in the model."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compress what is to be compressed among the tensors for ``full_layer_name``; hand the rest on."""
        rest = {}
        for key, value in input_dict.items():
            if key not in self.loading.targets:
                rest[key] = value
                continue
            if missing_keys is not None:
                missing_keys.discard(key)
            try:
                self.loading.take(model, key, value[0] if isinstance(value, list) else value)
            except FourierError as error:
                # transformers logs what is raised here and goes on; the quantizer raises after loading
                self.loading.failures.append(error.at(key.removesuffix(".weight")))
        return rest


def check_complete(model: nn.Module, arrangement: Arrangement, files: list[Path]) -> None:
    """`FourierError` for a tensor that is missing, unless the model is of another class than the checkpoint.

    A head that the checkpoint never had starts anew, as in transformers, which says so.
    """
    if type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
        arrangement.check(str(files[0].parent))


def _plain(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear
