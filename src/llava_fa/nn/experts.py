"""The experts of a mixture as linear layers, one for each matrix: each is compressed, measured and run alone.

transformers holds a block's experts as parameters with an axis more, [experts, m, n] or transposed. `unfuse` exchanges
the module that holds them for an `Experts` with the same outputs, whose matrices are modules of their own
(``experts.gate_up.7``): what works on linear layers works on them. What the router chose
alone is computed (`nn.routed`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.nn.routed import Groups, each, routed

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_OWN = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
"""Parameter of transformers' → list of matrices here; by other names, since rules that convert go by names."""
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


class Experts(nn.Module):
    """out[t] = Σ over chosen e of weight[t, e] · W_down,e gate(W_up,e x[t]): a block's experts, matrix by matrix.

    Args:
        fused: transformers' module. Its matrices become views of its parameters: nothing is copied. It stays as what
            says how up and gate make one, without its parameters. One with modules of its own beside the activation (a
            norm behind every expert) runs its own forward, in which a matrix is whatever layer has taken its place.

    Shapes: hidden_states [tokens, n]; top_k_index int [tokens, k], those beyond the last expert choose none;
    top_k_weights [tokens, k]. Experts that are given their tokens in order (Llama 4) take [experts · tokens, n] alone.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        names = [name for name in (*_UP, _DOWN) if name in fused._parameters]
        self.transposed = _is_transposed(fused)
        shell = copy.copy(fused)
        shell._parameters = {}
        for name in names:
            stack, bias = fused._parameters[name], fused._parameters.get(f"{name}_bias")
            assert stack is not None
            linears = nn.ModuleList(_linears(stack, bias, self.transposed))
            self.add_module(_OWN[name], linears)
            shell.__dict__[name] = _Matrices(linears)
        for name, child in _further(fused):
            self.add_module(name, child)
        self.gated = names[0] == "gate_up_proj"
        self.count = len(self.lists[_DOWN])
        self.ordered = not _routed(fused)
        self.own_forward = any(True for _ in _further(fused))
        object.__setattr__(self, "shell", shell)  # no submodule: it owns nothing
        self._register()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _modules[self.number] = self
        self.__dict__["_grouped"] = Groups()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        self.__dict__["_grouped"] = Groups()  # the old ones would keep what is moved
        super()._apply(fn, recurse)
        return self

    @property
    def own(self) -> dict[str, nn.ModuleList]:
        """The matrices by their names here, ``gate_up``, ``down``."""
        return {own: getattr(self, own) for own in _OWN.values() if own in self._modules}

    @property
    def lists(self) -> dict[str, nn.ModuleList]:
        """Parameter of transformers' → the matrices that it holds, first those that come first."""
        return {name: getattr(self, own) for name, own in _OWN.items() if own in self._modules}

    def forward(self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None) -> Tensor:
        """The chosen experts' outputs, weighed and summed."""
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            number: Any = self.number
            result: Tensor = torch.ops.llava_fa.experts(hidden_states, top_k_index, top_k_weights, number)
            return result
        return self.run(hidden_states, top_k_index, top_k_weights)

    def run(self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None) -> Tensor:
        """`forward`, as which experts are chosen decides: nothing that a graph can be made of."""
        if self.own_forward:
            shell: Any = self.shell
            given = (hidden_states,) if self.ordered else (hidden_states, top_k_index, top_k_weights)
            return inspect.unwrap(type(shell).forward)(shell, *given)  # type: ignore[no-any-return]
        if self.ordered:
            return self._in_order(hidden_states)
        return routed(
            hidden_states, top_k_index, top_k_weights, *self.lists.values(), between=self._between, groups=self._grouped
        )

    def _in_order(self, hidden_states: Tensor) -> Tensor:
        """Tokens come once for each expert, those that are not its own as zeros, of which every expert makes zeros."""
        own = hidden_states.view(self.count, -1, hidden_states.shape[-1]).any(dim=-1)
        rows = own.view(-1).nonzero()[:, 0]
        first, last = self.lists.values()
        y = each(first, hidden_states[rows], range(self.count), own.sum(1).tolist())
        y = each(last, self._between(y), range(self.count), own.sum(1).tolist())
        return torch.zeros_like(hidden_states).index_copy(0, rows, y.to(hidden_states.dtype))

    def _between(self, y: Tensor) -> Tensor:
        """What the second matrix is given, of what the first one gives."""
        shell: Any = self.shell
        if self.ordered:
            gate, up = y.chunk(2, dim=-1)
            return up * shell.act_fn(gate)  # type: ignore[no-any-return]
        return _gated(shell, y) if self.gated else shell.act_fn(y)  # type: ignore[no-any-return]

    def fuse(self) -> nn.Module:
        """transformers' module again, its parameters stacked; every matrix must be a plain `torch.nn.Linear`."""
        fused = copy.copy(self.shell)
        fused._parameters = {}  # type: ignore[union-attr]
        for name, linears in self.lists.items():
            del fused.__dict__[name]  # type: ignore[union-attr]
            stack = torch.stack([linear.weight.detach() for linear in linears])
            stack = stack.transpose(1, 2).contiguous() if self.transposed else stack
            fused._parameters[name] = nn.Parameter(stack)  # type: ignore[index]
            if linears[0].bias is not None:
                bias = torch.stack([linear.bias.detach() for linear in linears])
                fused._parameters[f"{name}_bias"] = nn.Parameter(bias)  # type: ignore[index]
        return fused  # type: ignore[return-value]


_numbers = itertools.count()
_modules: weakref.WeakValueDictionary[int, Experts] = weakref.WeakValueDictionary()
# One node of a graph: which matrices run is not known when it is made, and they are too many to be its inputs.
torch.library.define("llava_fa::experts", "(Tensor x, Tensor? index, Tensor? weights, SymInt module) -> Tensor")


@torch.library.impl("llava_fa::experts", "default")
def _run(x: Tensor, index: Tensor | None, weights: Tensor | None, module: int) -> Tensor:
    return _modules[int(module)].run(x, index, weights)


@torch.library.register_fake("llava_fa::experts")
def _shape(x: Tensor, index: Tensor | None, weights: Tensor | None, module: int) -> Tensor:
    return torch.empty_like(x)


class _Matrices:
    """What stands for a parameter [experts, m, n] in the forward of transformers' own module."""

    def __init__(self, linears: nn.ModuleList) -> None:
        self.linears = linears

    def __getitem__(self, index: Any) -> _Matrix:
        return _Matrix(self.linears[int(index)])


class _Matrix:
    """One of them: `torch.nn.functional.linear` with it is the layer that has taken its place."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear and len(args) == 2 and isinstance(args[1], cls):
            return args[1].layer(args[0])
        raise FourierError(
            f"experts whose matrices go through {getattr(function, '__name__', function)} are not known",
            remedy="Leave them out with --skip",
        )


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this is one of transformers' modules of experts that `Experts` can take the place of."""
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    up = [name for name in _UP if name in parameters]
    known = {*up, _DOWN, *(f"{name}_bias" for name in (*up, _DOWN))}
    if "expert" not in type(module).__name__.lower() or len(up) != 1 or _DOWN not in parameters:
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


def _further(fused: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of its own beside the activation."""
    return ((name, child) for name, child in fused.named_children() if name != "act_fn")


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
