"""What a calibrated run takes of memory, told before it begins, and whether its weights can all be in memory.

The numbers are bounds of what the parts of the work were seen to take, not what they may take in the worst case: a
model's own forward is transformers'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import Tensor, nn

from llava_fa.config import format_size
from llava_fa.errors import FourierError
from llava_fa.hub.blocks import Unit, find_units
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.routing import experts_of
from llava_fa.hub.shares import split
from llava_fa.hub.sums import waiting
from llava_fa.hub.weights import parts_of

_SQUARES, _SQUARES_FOLLOWED, _COPIES = 8, 16, 16
"""Of a layer [m, n] that is fitted: bytes for each of n² (more where the original model is followed and the drift is
[n, n], since m is not less than n), and for each of m n."""
_WAITING = 16
"""Bytes for each number among the inputs that wait to be added up (`sums.waiting`)."""
_HELD = 3
"""Hidden states that a sample holds between two parts beside the ones that can be put away: what words and pictures
were made into, and what a deeper layer is to be given."""
_STREAMS = 2
"""Of every sample: through the present model, and beside it through the original."""
_LEAST = 64 << 20
"""Bytes of hidden states that stay in memory at least."""
_HOLES = 0.15
"""Of hidden states and kept outputs, what malloc holds between them and cannot give back: 0.2 to 0.4 GB of 2.2 on
LLaVA-1.5-7B's shape, less in the first block than in later ones (docs/results.md)."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of memory that a calibrated run takes.

    Attributes:
        base: the process before it.
        model: all weights, as they are computed with.
        outside: those of them that are in memory all the time where the model is streamed.
        part: the largest part.
        fitting: the largest of: a unit, its compressed weights beside it, and the statistics of one stage and what they
            are worked into.
        held: what samples hold of hidden states whether or not others are put away.
        shelved: hidden states that can be put away.
        kept: what the layers of a block gave, where there is memory for it (`hub.settled`).
    """

    base: int
    model: int
    outside: int
    part: int
    fitting: int
    held: int
    shelved: int
    kept: int = 0

    @property
    def streamed(self) -> int:
        """Of a run that reads its weights part by part, as many hidden states put away as can be."""
        return self.base + self.outside + max(self.part, self.fitting) + _holed(self._hidden)

    @property
    def whole(self) -> int:
        """Of a run with the whole model in memory, as many hidden states put away as can be."""
        return self.base + self.model + self.fitting + _holed(self._hidden)

    @property
    def _hidden(self) -> int:
        """Hidden states, as many put away as can be."""
        return self.held + min(self.shelved, _LEAST)

    @property
    def beside(self) -> int:
        """The machine's, of a run whose weights are on a GPU: as `streamed`, for what that has no room for is here."""
        return self.streamed - self.outside

    def streams(self, memory: int | None, device: torch.device) -> bool:
        """Whether the weights stay on the disk: the model does not fit.

        On a GPU weights and fitting must fit into what is free there, and ``memory`` is the machine's: the weights pass
        through it when they are loaded, and hidden states wait in it.

        Args:
            memory: bytes that the run may take; None: what the machine has to spare.
            device: where the model is.

        Raises:
            FourierError: even so it takes more than it may.
        """
        gpu = device.type == "cuda"
        full = gpu and self.model + max(self.model, self.fitting) > torch.cuda.mem_get_info(device)[0]
        if memory is None:
            return full or (1 if gpu else 2) * self.model > psutil.virtual_memory().available
        least = self._least(True, device)
        whole = max(least, self.base + self.model) if gpu else self.whole
        if not full and whole <= memory:
            return False
        if least > memory:
            takes, may = format_size(least), format_size(memory)
            raise FourierError(
                f"calibration takes about {takes} of memory, and {may} are allowed",
                remedy=f"Give --memory {format_size(least * 1.05).replace(' ', '')}, or fewer samples",
            )
        return True

    def _least(self, streams: bool, device: torch.device) -> int:
        """Bytes of the machine's memory once the model is where it computes."""
        if device.type == "cuda":
            return self.beside
        return self.streamed if streams else self.whole

    def limit(self, memory: int | None, streams: bool, device: torch.device) -> int:
        """Bytes of hidden states that may stay in the machine's memory."""
        if memory is None:
            return max(_LEAST, psutil.virtual_memory().available // 4)
        return max(_LEAST, int((memory - self._least(streams, device)) / (1 + _HOLES)))

    def told(self, memory: int | None, streams: bool, device: torch.device) -> str:
        """For people, before the run."""
        limit = self.limit(memory, streams, device)
        stay, kept = min(self.shelved, limit), 0 if device.type == "cuda" else self.kept
        more = min(self.shelved + kept, limit) - min(self.shelved, _LEAST)
        total = self._least(streams, device) + _holed(more)
        whole = "the whole model in it"
        if device.type == "cuda":
            total, whole = max(total, 0 if streams else self.base + self.model), "the whole model on the GPU"
        away = f", {format_size(self.shelved - stay)} of hidden states on the disk" if stay < self.shelved else ""
        how = "the model block by block" if streams else whole
        return f"calibration takes about {format_size(total)} of memory, {how}{away}"


def need(
    plan: Plan,
    empty: nn.Module,
    dtype: torch.dtype,
    inputs: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
) -> Need:
    """What calibrating this model takes.

    Args:
        plan: what is compressed.
        empty: the model on the meta device.
        dtype: that it computes with.
        inputs: prepared samples.
        names: modules that are parts whatever their size (`calibrated.part_names`).
    """
    size = dtype.itemsize
    parts = {path: _numel(part) for path, part in parts_of(empty, names).items()}
    follows = any(layer.config.follows_outputs for layer in plan.layers)
    shares = split(inputs)
    text, fitting, given = empty.config.get_text_config(), 0, 0.0
    for unit in find_units(empty, plan.layers):
        ours = sum(layer.numel for layer in unit.layers)
        largest = max(_fitting(layer, follows, len(shares)) for layer in unit.layers)
        fitting = max(fitting, size * (_numel(unit.module) + ours) + largest)
        given = max(given, _outputs(unit, getattr(text, "num_experts_per_tok", None)))
    width = int(getattr(text, "hidden_size", 0))
    tokens = sum(sample["input_ids"].numel() for sample in inputs)
    words = tokens * width * size
    pictures = sum(x.numel() for sample in inputs for x in sample.values() if x.is_floating_point()) * size
    total = _numel(empty)
    return Need(
        base=psutil.Process().memory_info().rss,
        model=size * total,
        outside=size * (total - sum(parts.values())),
        part=size * max(parts.values(), default=0),
        fitting=fitting,
        held=_STREAMS * (_HELD * words + pictures),
        shelved=_STREAMS * max(words, 2 * pictures),
        kept=int(_STREAMS * tokens * given * size),
    )


def _outputs(unit: Unit, chosen: int | None) -> float:
    """Numbers that the layers of a unit give of a token, which so many of its experts are chosen for."""
    total = 0.0
    for layer in unit.layers:
        experts = experts_of(unit, layer.name)
        total += layer.shape[0] * (min(1.0, chosen / experts.count) if experts and chosen else 1)
    return total


def _fitting(layer: PlannedLayer, follows: bool, shares: int) -> int:
    m, n = layer.shape
    squares = _SQUARES_FOLLOWED if follows and m >= n else _SQUARES
    gathered = 6 * n * n + _WAITING * waiting(n) * n
    if shares > 1:  # the sums of one share beside those of the ones before it
        gathered += 4 * n * n + (8 * n * min(m, n) if follows else 0)
    return max(squares * n * n, gathered) + _COPIES * m * n


def _holed(size: int) -> int:
    """Bytes of memory that so many of hidden states take."""
    return int((1 + _HOLES) * size)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
