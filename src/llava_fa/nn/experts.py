"""The experts of a mixture as linear layers, one for each matrix: each is compressed, measured and run alone.

transformers holds a block's experts as parameters with an axis more, [experts, m, n] or transposed. `unfuse` exchanges
the module that holds them for an `Experts` with the same outputs, whose matrices are modules of their own
(``experts.gate_up.7``): what works on linear layers works on them. It computes only what the router chose.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.nn.packed_linear import PackedLinear

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_OWN = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
"""Parameter of transformers' → list of matrices here; by other names, since rules that convert go by names."""
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


class Experts(nn.Module):
    """out[t] = Σ over chosen e of weight[t, e] · W_down,e gate(W_up,e x[t]): a block's experts, matrix by matrix.

    Args:
        fused: transformers' module. Its matrices become views of its parameters: nothing is copied. It stays as what
            says how up and gate make one, without its parameters.

    Shapes: hidden_states [tokens, n]; top_k_index int [tokens, k], those beyond the last expert choose none;
    top_k_weights [tokens, k]. Experts that are given their tokens in order (Llama 4) take [experts · tokens, n] alone.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        names = [name for name in (*_UP, _DOWN) if name in fused._parameters]
        self.transposed = _is_transposed(fused)
        for name in names:
            stack, bias = fused._parameters[name], fused._parameters.get(f"{name}_bias")
            assert stack is not None
            self.add_module(_OWN[name], nn.ModuleList(_linears(stack, bias, self.transposed)))
        self.gated = names[0] == "gate_up_proj"
        self.count = len(self.lists[_DOWN])
        self.ordered = not _routed(fused)
        shell = copy.copy(fused)
        shell._parameters = dict.fromkeys(fused._parameters)
        object.__setattr__(self, "shell", shell)  # no submodule: it owns nothing

    @property
    def lists(self) -> dict[str, nn.ModuleList]:
        """Parameter of transformers' → the matrices that it holds, first those that come first."""
        return {name: getattr(self, own) for name, own in _OWN.items() if own in self._modules}

    def expert(self, index: int, x: Tensor) -> Tensor:
        """One expert's output on its tokens, [tokens, n] → [tokens, n]."""
        shell: Any = self.shell
        first, last = self.lists.values()
        y = first[index](x)
        if self.ordered:
            gate, up = y.chunk(2, dim=-1)
            y = up * shell.act_fn(gate)
        elif self.gated:
            y = _gated(shell, y)
        else:
            y = shell.act_fn(y)
        return last[index](y)  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None) -> Tensor:
        """The chosen experts' outputs, weighed and summed."""
        if self.ordered:
            return self._in_order(hidden_states)
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if not 0 <= index < self.count:
                continue
            tokens, place = torch.where(top_k_index == index)
            y = self.expert(index, hidden_states[tokens]) * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def _in_order(self, hidden_states: Tensor) -> Tensor:
        """Tokens come once for each expert, those that are not its own as zeros, of which every expert makes zeros."""
        stacked = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        out = torch.zeros_like(stacked)
        for index, own in enumerate(stacked):
            tokens = own.any(dim=-1).nonzero()[:, 0]
            if len(tokens):
                out[index, tokens] = self.expert(index, own[tokens]).to(out.dtype)
        return out.view(hidden_states.shape)

    def fuse(self) -> nn.Module:
        """transformers' module again, its parameters stacked; every matrix must be a plain `torch.nn.Linear`."""
        fused = copy.copy(self.shell)
        fused._parameters = dict(fused._parameters)  # type: ignore[union-attr]
        for name, linears in self.lists.items():
            stack = torch.stack([linear.weight.detach() for linear in linears])
            stack = stack.transpose(1, 2).contiguous() if self.transposed else stack
            fused._parameters[name] = nn.Parameter(stack)  # type: ignore[index]
            if linears[0].bias is not None:
                bias = torch.stack([linear.bias.detach() for linear in linears])
                fused._parameters[f"{name}_bias"] = nn.Parameter(bias)  # type: ignore[index]
        return fused  # type: ignore[return-value]


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this is one of transformers' modules of experts that `Experts` can take the place of."""
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    up = [name for name in _UP if name in parameters]
    known = {*up, _DOWN, *(f"{name}_bias" for name in (*up, _DOWN))}
    if "expert" not in type(module).__name__.lower() or len(up) != 1 or _DOWN not in parameters:
        return False
    if any(
        True for child in module.children() for _ in child.parameters()
    ):  # a norm behind the experts: not known here
        return False
    if set(parameters) - known or parameters[up[0]].dim() != 3 or parameters[_DOWN].dim() != 3:
        return False
    return _routed(module) or (_takes(module)[:1] == _ARGUMENTS[:1] and len(_takes(module)) == 1)


def unfuse(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Exchange fused experts for `Experts`, in a model on any device; names of the modules that were exchanged."""
    names = [name for name, module in model.named_modules() if is_fused_experts(module) and wanted(name)]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(model.get_submodule(name)))
    return names


def fuse(model: nn.Module) -> None:
    """The inverse of `unfuse`, where every matrix is plain again."""
    for name, module in [pair for pair in model.named_modules() if isinstance(pair[1], Experts)]:
        if not any(isinstance(part, PackedLinear) for part in module.modules()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.fuse())


def fused_copy(model: nn.Module) -> nn.Module:
    """A model on the meta device as it was before `unfuse`: for what asks for parameters by their names."""
    whole = copy.deepcopy(model)
    fuse(whole)
    return whole


class Stack(NamedTuple):
    """A parameter of fused experts, and the parameters that it has become.

    Attributes:
        module: name of the `Experts`. parameter: of what was there, ``module.gate_up_proj``.
        parts: ``module.gate_up.0.weight``, … . transposed: whether it holds them transposed.
    """

    module: str
    parameter: str
    parts: tuple[str, ...]
    transposed: bool


def stacks(model: nn.Module) -> Iterator[Stack]:
    """Of all `Experts` of a model."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for key, linears in module.lists.items():
                places = [f"{name}.{_OWN[key]}.{index}" for index in range(len(linears))]
                weights, biases = (tuple(f"{place}.{kind}" for place in places) for kind in ("weight", "bias"))
                yield Stack(name, f"{name}.{key}", weights, module.transposed)
                if linears[0].bias is not None:
                    yield Stack(name, f"{name}.{key}_bias", biases, False)


def within(layer: str, module: str) -> bool:
    """Whether a layer of a checkpoint is an expert of this module of the model, which may be its base model."""
    parent = layer.rpartition(".")[0].rpartition(".")[0]
    return parent == module or parent.endswith(f".{module}") or module.endswith(f".{parent}")


def _takes(module: nn.Module) -> tuple[str, ...]:
    forward = inspect.unwrap(type(module).forward)
    return tuple(inspect.signature(forward).parameters)[1:]


def _routed(module: nn.Module) -> bool:
    return len(_takes(module)) >= 3 and _takes(module)[0] == _ARGUMENTS[0]


def _is_transposed(module: nn.Module) -> bool:
    """Whether parameters are [experts, n, m]: as the module says, or by its two shapes, which fit one way only."""
    said = getattr(module, "is_transposed", None)
    return bool(said) if said is not None else not _routed(module)


def _linears(stack: Tensor, bias: Tensor | None, transposed: bool) -> Iterator[nn.Linear]:
    for index in range(len(stack)):
        weight = stack.detach()[index]
        linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.T if transposed else weight, requires_grad=stack.requires_grad)
        linear.out_features, linear.in_features = linear.weight.shape
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[index], requires_grad=bias.requires_grad)
        yield linear


def _gated(shell: Any, y: Tensor) -> Tensor:
    if hasattr(shell, "_apply_gate"):
        return shell._apply_gate(y)  # type: ignore[no-any-return]
    gate, up = y.chunk(2, dim=-1)
    return shell.act_fn(gate) * up  # type: ignore[no-any-return]
