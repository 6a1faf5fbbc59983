"""Packed experts behind vLLM's router: every matrix of every expert is a layer of the folder (`nn.experts`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from llava_fa.errors import FourierError
from llava_fa.nn.routed import Groups, routed
from llava_fa.vllm.shares import Rows, Share, split, with_rows
from llava_fa.vllm.store import Store

_UP, _DOWN = ("gate_up", "up"), "down"
"""The lists of matrices as `nn.experts` calls them."""
_GATES = {
    MoEActivation.SILU: nn.functional.silu,
    MoEActivation.GELU: nn.functional.gelu,
    MoEActivation.GELU_TANH: lambda gate: nn.functional.gelu(gate, approximate="tanh"),
}
"""Gated activations that are plain functions of the first half of the rows; the others are vLLM's kernels alone."""


def method(store: Store, layer: Any, prefix: str) -> FourierExpertsMethod | None:
    """What holds these experts; None where none of them is packed.

    Raises:
        FourierError: some of a block's matrices are packed and others are not.
    """
    lists = [_stored(store, prefix, kind, layer.global_num_experts) for kind in (*_UP, _DOWN)]
    up, down = next((names for names in lists[:-1] if any(names)), []), lists[-1]
    if not any(up) and not any(down):
        return None
    missing = [index for names in (up, down) for index, name in enumerate(names) if name is None]
    if missing or not up:
        raise FourierError(
            f"matrices of expert {missing[0] if missing else 0} were left as they are, and those of others are packed",
            remedy="Compress the model again without --skip for experts",
            where=prefix,
        )
    for name in (*up, *down):
        store.claim(str(name), prefix)
    return FourierExpertsMethod(store, layer.moe_config, [str(name) for name in up], [str(name) for name in down])


def _stored(store: Store, prefix: str, kind: str, count: int) -> list[str | None]:
    return [store.names.find(f"{prefix}.{kind}.{index}") for index in range(count)]


class FourierExpertsMethod(FusedMoEMethodBase):
    """out[t] = Σ over chosen e of weight[t, e] · W_down,e act(W_up,e x[t]).

    Args:
        store: the layers.
        moe: vLLM's description of the block.
        up, down: the stored layers, expert by expert.
    """

    def __init__(self, store: Store, moe: Any, up: list[str], down: list[str]) -> None:
        super().__init__(moe)
        self.store, self.up, self.down = store, up, down
        self.groups = Groups()

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """As they are: the kernels take any size."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig:
        """Nothing that vLLM's own kernels would need."""
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Settle which experts, and which rows of them, this rank has.

        Raises:
            FourierError: the stored matrices are of another size, or the activation is none that is known here.
        """
        moe, ranks = self.moe, self.moe.moe_parallel_config.tp_size
        intermediate = moe.intermediate_size
        rows_up = intermediate * (2 if moe.is_act_and_mul else 1)
        layouts = self.store.layers[self.up[0]].layout, self.store.layers[self.down[0]].layout
        shapes = [(layout.out_features, layout.in_features) for layout in layouts]
        if shapes != [(rows_up, hidden_size), (hidden_size, intermediate)]:
            raise FourierError(
                f"experts are {shapes}, and vLLM's model wants {(rows_up, hidden_size)} and "
                f"{(hidden_size, intermediate)}",
                remedy="Weights and config.json are of different models; copy the folder again",
                where=layer.layer_name,
            )
        if intermediate % ranks:
            raise FourierError(
                f"{intermediate} rows of an expert cannot be split among {ranks} ranks",
                remedy="Choose another --tensor-parallel-size, or --enable-expert-parallel",
                where=layer.layer_name,
            )
        rank = moe.moe_parallel_config.tp_rank
        self.own = split(hidden_size, ranks, rank)
        self.pieces = self._up_rows(intermediate, ranks, rank)
        for layout, rows in zip(layouts, (self.pieces, (self.own,)), strict=True):
            with_rows(layout, Share(layer.layer_name, rows))
        self.hidden, self.ranks = hidden_size, ranks
        self.dtype, self.device = params_dtype, torch.empty(0).device

    def _up_rows(self, intermediate: int, ranks: int, rank: int) -> tuple[Rows, ...]:
        """Of the first matrix, so that the rank's outputs are a gate and an up of its own."""
        start, end = split(intermediate, ranks, rank)
        if not self.moe.is_act_and_mul:
            return ((start, end),)
        if self.moe.activation == MoEActivation.SWIGLUOAI:  # a row of the gate, a row of up, in turn
            return ((2 * start, 2 * end),)
        return ((start, end), (intermediate + start, intermediate + end)) if ranks > 1 else ((0, 2 * intermediate),)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the experts that this rank has."""
        if hasattr(layer, "first"):
            return
        folder, here = self.store.folder(), _experts_here(layer)

        def read(names: list[str], rows: tuple[Rows, ...]) -> nn.ModuleList:
            shares = (Share(names[expert], rows) for expert in here)
            return nn.ModuleList(self._with_bias(folder, folder.layer(s, self.dtype, self.device), s) for s in shares)

        layer.first, layer.last = read(self.up, self.pieces), read(self.down, (self.own,))
        if self.device.type == "cuda":
            self._first_calls(layer)

    @torch.inference_mode()
    def _first_calls(self, layer: Any) -> None:
        """Make what a first call makes, tables and kernels, before vLLM captures a CUDA graph, which cannot wait.

        vLLM's own first runs may have too many tokens to go that way (`nn.routed`); kernels are compiled for one row,
        for a multiple of 16 and for other numbers.
        """
        for rows in (1, 2, 16):
            index = torch.zeros(rows, 1, dtype=torch.int32, device=self.device)
            x = torch.zeros(rows, self.hidden, dtype=self.dtype, device=self.device)
            self.run(layer, x, torch.ones(rows, 1, device=self.device), index)

    def _with_bias(self, folder: Any, packed: Any, share: Share) -> Any:
        """An expert's bias, which no loader of vLLM's has seen; of a rank its rows."""
        entry = folder.entries.get(f"{share.name}.bias")
        if entry is not None:
            pieces = [entry.rows(start, end).read() for start, end in share.rows]
            packed.bias = nn.Parameter(torch.cat(pieces).to(self.device, self.dtype), requires_grad=False)
        return packed

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Weighed sum of the chosen experts' outputs, of a rank its part; shared experts are vLLM's to run."""
        if torch.compiler.is_compiling():  # vLLM's CPU path traces this; its GPU path has made one node of it already
            result: Tensor = torch.ops.vllm.llava_fa_experts(x, topk_weights, topk_ids, layer.layer_name)
            return result
        return self.run(layer, x, topk_weights, topk_ids)

    def run(self, layer: Any, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """`apply`, as which experts are chosen decides."""
        if layer.apply_router_weight_on_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        if layer.expert_map is not None:
            index = layer.expert_map[index.long()]
        y = routed(x, index, weights, layer.first, layer.last, between=self._between, groups=self.groups)
        start, end = self.own
        return y if self.ranks == 1 else nn.functional.pad(y, (start, self.hidden - end))

    def _between(self, y: Tensor) -> Tensor:
        y = _activated(self.moe, y)
        return y if self.ranks == 1 else tensor_model_parallel_all_gather(y.contiguous())


def _experts_here(layer: Any) -> list[int]:
    """The experts of this rank, in its own numbering."""
    if layer.expert_map is None:
        return list(range(layer.global_num_experts))
    own = layer.expert_map.tolist()
    return sorted((expert for expert, local in enumerate(own) if local >= 0), key=lambda expert: int(own[expert]))


def _activated(moe: Any, y: Tensor) -> Tensor:
    """[pairs, a] → [pairs, b], what vLLM's activation of these experts makes of the first product."""
    gate = _GATES.get(moe.activation)
    if gate is not None and moe.swiglu_limit is None:
        first, second = y.chunk(2, dim=-1)
        return gate(first) * second
    out = y.new_empty(len(y), y.shape[-1] // 2 if moe.is_act_and_mul else y.shape[-1])
    return apply_moe_activation(moe.activation, out, y)


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    layer: Any = get_forward_context().no_compile_layers[layer_name].routed_experts
    result: Tensor = layer.quant_method.run(layer, x, topk_weights, topk_ids)
    return result


def _fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("llava_fa_experts", _experts, fake_impl=_fake)
