"""Modules of a class with a forward of its own around torch's: a scale behind a look-up, a norm, another table.

Such a class calls ``super().forward``, or takes rows of ``self.weight``. Its packed module is of that very class,
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
    vars(made)["_packed_entries"] = frozenset(name for table in _TABLES for name in vars(packed)[table])
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


class _Trial(nn.Embedding):
    """A table without numbers: looking rows up is counted, and anything else that needs a number fails."""

    looked_up = 0

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ones."""
        self.looked_up += 1
        return torch.ones(*ids.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Its facts."""
        shape, answers = (
            (self.num_embeddings, self.embedding_dim),
            {F.embedding: self._rows, Tensor.__getitem__: self._some},
        )
        return DecodedWeight(_refuse, shape, torch.float32, torch.device("cpu"), answers)

    def _rows(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Trial.forward(self, ids)

    def _some(self, index: Any) -> Any:
        rows = rows_asked(index, self.num_embeddings)
        return NotImplemented if rows is None else _Trial.forward(self, rows)


def _refuse() -> Tensor:
    raise FourierError("a number of the weight is asked for", remedy="Leave it as it is")


@torch.no_grad()
def only_looks_up(module: nn.Embedding) -> bool:
    """Whether an embedding's forward, whatever else it does, needs nothing of its weight but rows by their numbers.

    Tried out with a small input, on a copy without the weight: on any device, meta included.
    """
    if type(module) is nn.Embedding:
        return module.max_norm is None
    if module.max_norm is not None:
        return False
    double = copy.deepcopy(module, {id(module.weight): nn.Parameter(torch.empty(0))})
    double = double.to_empty(device="cpu").float()
    for tensor in (*double.parameters(), *double.buffers()):
        tensor.fill_(1)
    trial = packed_as(double, nn.Module(), _Trial)
    try:
        trial(torch.tensor([[0, 1]]))
    except Exception:  # it wants more than numbers of rows, or reads the weight
        return False
    return bool(trial.looked_up)
