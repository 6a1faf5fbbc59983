"""Modules of a class with a forward of its own around torch's: a scale behind a look-up, a norm, another table.

Such a class calls ``super().forward``, or torch's function on ``self.weight``. Its packed module is of that very class,
with all that the original had but the weight; a packed layer stands between the class and torch's (`packed_as`). So
whatever the class does to what torch's forward gives, it does to what the packed layer gives, and code that asks for
the class finds it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its name everywhere

from llava_fa.errors import FourierError
from llava_fa.nn.decoded_weight import DecodedWeight, rows_asked

_TABLES = ("_parameters", "_buffers", "_modules")


@functools.cache
def _mixed(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of both: what ``kind`` calls its ``super()`` is ``base``, a subclass of torch's class too."""
    return type(f"Packed{kind.__name__}", (kind, base), {"__module__": __name__, "__reduce__": _reduce})


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    """For pickle, which finds classes by their names."""
    return _blank, type(module).__bases__, dict(vars(module))


def _blank(kind: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    return object.__new__(_mixed(kind, base))


def packed_as(module: nn.Module, packed: nn.Module, base: type[nn.Module]) -> Any:
    """A module of ``module``'s class with everything that it has but the weight, and all that ``packed`` has.

    Args:
        module: an instance of a class with a forward of its own.
        packed: what stands in for torch's forward: an instance of the first of ``base``'s classes.
        base: a class of ``packed``'s class and torch's, in this order.
    """
    made = _blank(type(module), base)
    vars(made).update({**vars(module), **vars(packed)})
    for table in _TABLES:
        beside, own = dict(vars(module)[table]), vars(packed)[table]
        beside.pop("weight", None)
        vars(made)[table] = {**own, **beside}  # its own first: by these it is known where a layer lies
    vars(made)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    vars(made)["beside"] = frozenset(vars(module)["_buffers"])
    vars(made)["_packed_names"] = frozenset(vars(packed)) - frozenset(vars(module)) | {"beside", "_packed_names"}
    vars(made)["_packed_entries"] = frozenset(
        name for table in _TABLES for name in vars(packed)[table] if name not in vars(module)[table]
    )
    return made


def plain_again(made: nn.Module, weight: Tensor) -> nn.Module:
    """The inverse of `packed_as`: the original class, with what it has now, and this weight as a parameter."""
    kind = type(made).__bases__[0]
    module = kind.__new__(kind)
    gone, entries = vars(made)["_packed_names"], vars(made)["_packed_entries"]
    vars(module).update({key: value for key, value in vars(made).items() if key not in gone | {"_packed_entries"}})
    for table in _TABLES:
        vars(module)[table] = {key: value for key, value in vars(made)[table].items() if key not in entries}
    first = {"weight": weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)}
    vars(module)["_parameters"] = {**first, **vars(module)["_parameters"]}
    return module


class _Trial:
    """A module without numbers: what torch's forward does is counted, and what else needs a number fails."""

    asked = 0

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Ones, of the shape of what torch's forward gives."""
        self.asked += 1
        rows, columns = self._shape()
        return torch.ones(*x.shape, columns) if isinstance(self, nn.Embedding) else torch.ones(*x.shape[:-1], rows)

    @property
    def weight(self) -> Tensor:
        """Its facts."""
        answers: dict[Any, Any] = {F.linear: self._answer}
        if isinstance(self, nn.Embedding):
            answers = {F.embedding: self._answer, Tensor.__getitem__: self._some}
        return DecodedWeight(_refuse, self._shape(), torch.float32, torch.device("cpu"), answers)

    def _shape(self) -> tuple[int, int]:
        if isinstance(self, nn.Embedding):
            return self.num_embeddings, self.embedding_dim
        assert isinstance(self, nn.Linear)
        return self.out_features, self.in_features

    def _answer(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Trial.forward(self, x)

    def _some(self, index: Any) -> Any:
        rows = rows_asked(index, self._shape()[0])
        return NotImplemented if rows is None else _Trial.forward(self, rows)


class _TrialEmbedding(_Trial, nn.Embedding):  # type: ignore[misc]  # `weight` is no parameter
    pass


class _TrialLinear(_Trial, nn.Linear):  # type: ignore[misc]
    pass


def _refuse() -> Tensor:
    raise FourierError("a number of the weight is asked for", remedy="Leave it as it is")


@torch.no_grad()
def _asks_alone(module: nn.Module, base: type[nn.Module], x: Tensor) -> bool:
    """Whether the class, given x, asks for torch's forward and for no number of the weight.

    Tried out on a copy without the weight: on any device, meta included.
    """
    double = copy.deepcopy(module, {id(module.weight): nn.Parameter(torch.empty(0))})
    double = double.to_empty(device="cpu").float()
    for tensor in (*double.parameters(), *double.buffers()):
        tensor.fill_(1)
    trial = packed_as(double, nn.Module(), base)
    try:
        trial(x)
    except Exception:  # it wants more than this, or reads the weight
        return False
    return bool(trial.asked)


def only_looks_up(module: nn.Embedding) -> bool:
    """Whether an embedding's forward, whatever else it does, needs nothing of its weight but rows by their numbers."""
    if type(module) is nn.Embedding or module.max_norm is not None:
        return module.max_norm is None
    return _asks_alone(module, _TrialEmbedding, torch.tensor([[0, 1]]))


def only_multiplies(module: nn.Linear) -> bool:
    """Whether a linear layer's forward, whatever else it does, needs nothing of its weight but products with it."""
    return type(module) is nn.Linear or _asks_alone(module, _TrialLinear, torch.ones(2, module.in_features))
