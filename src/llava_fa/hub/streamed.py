"""A model whose parts have their weights only while they run: transformers' own, its weights left in the checkpoint.

It is loaded by `from_pretrained` from tensors that have nothing but a shape (`hub.absent`): names, conversions, ties,
dtypes, and the buffers that are not stored but computed, all come about as they do whenever it is loaded. What each
parameter is then read from is what `hub.arrangement` knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.hub.absent import Promised
from llava_fa.hub.architecture import model_class, transformers_errors
from llava_fa.hub.arrangement import Arrangement
from llava_fa.hub.conversion import Conversion, Stored
from llava_fa.hub.shards import DTYPES, Entry
from llava_fa.hub.shelf import Shelf
from llava_fa.hub.source import Source
from llava_fa.hub.weights import Weights, aliases
from llava_fa.nn.experts import unfuse

_CHUNK = 64 << 20
"""Bytes of a tensor that are read at once where they are to be of another dtype, or elsewhere."""


def streamed_model(
    source: Source,
    arrangement: Arrangement,
    dtype: str | torch.dtype,
    device: torch.device,
    units: Collection[str] = (),
    shelf: Shelf | None = None,
) -> Any:
    """The model in eval mode, equal to what `complete.loaded_source` and `unfuse` give, with its weights on the disk.

    Args:
        source, arrangement: the checkpoint, and how the model is stored in it.
        dtype, device: what it computes with, and where; a dtype as of `from_pretrained`.
        units: paths of the units of calibration (`hub.blocks`), which are parts.
        shelf: for hidden states that wait.

    Raises:
        FourierError: a tensor is missing, or transformers cannot load the model.
    """
    arrangement.check(str(source.folder))
    model = _outline(source, arrangement, dtype)
    unfuse(model)
    read = _Reader(model, arrangement, device)
    Weights(model, units, read, shelf, device).attach()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            value = buffer
            if isinstance(buffer, Promised):
                value = read.buffer(buffer)
            module._buffers[name] = value.to(device)
    return model


def _outline(source: Source, arrangement: Arrangement, dtype: str | torch.dtype) -> Any:
    """The model loaded from tensors without content, by its own names where transformers does not read the stored."""
    from transformers import GenerationConfig

    kind, config = model_class(source.home, str(source.folder))
    stored: dict[str, Stored] = {**source.entries}
    if source.prepared is not None:
        stored = dict(arrangement.weights)
    state = {
        name: Promised.of(torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta"))
        for name, one in stored.items()
        if one.dtype in DTYPES
    }
    remedy = "Check the folder with transformers alone first"
    with transformers_errors("it does not load", remedy=remedy, where=str(source.folder)):
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
        if (source.home / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.home)
        return model


class _Reader:
    """Reads parameters of a checkpoint as the model has them.

    Args:
        model: as transformers has loaded it, without content.
        arrangement: how it is stored.
        device: where the parameters are wanted.
    """

    def __init__(self, model: nn.Module, arrangement: Arrangement, device: torch.device) -> None:
        self.device = device
        self._stored: dict[str, tuple[str, Stored]] = {}
        self._like: dict[str, Tensor] = {}
        self._buffers: dict[int, str] = {}
        for first, names in aliases(model).items():
            self._like[first] = model.get_parameter(first)
            known = [name for name in names if name in arrangement.weights]
            if known:
                self._stored[first] = known[0], arrangement.weights[known[0]]
        for name, buffer in model.named_buffers():
            if name in arrangement.weights:
                self._buffers[id(buffer)] = name
        self._arrangement = arrangement

    def __call__(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of these names, one after the other; what comes of one conversion is converted once."""
        made: dict[int, dict[str, Tensor]] = {}
        for first in names:
            name, stored = self._stored[first]
            like = self._like[first]
            if not isinstance(stored, Entry) and stored.alone is None:
                key = id(stored.conversion)
                if key not in made:
                    made[key] = _converted(stored.conversion, like.dtype)
                value = self._placed(made[key].pop(name), like)
            else:
                value = self._read(stored, like)
            yield first, value

    def buffer(self, buffer: Tensor) -> Tensor:
        """A stored buffer."""
        return self._arrangement.weights[self._buffers[id(buffer)]].read().to(buffer.dtype)

    def _read(self, stored: Stored, like: Tensor) -> Tensor:
        same = DTYPES[stored.dtype] == like.dtype and self.device.type == "cpu"
        if not isinstance(stored, Entry) or same or not stored.shape or not like.is_contiguous():
            return self._placed(stored.read(), like)
        out = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        rows = max(1, _CHUNK * stored.shape[0] // max(stored.nbytes, 1))
        for start in range(0, stored.shape[0], rows):
            end = min(start + rows, stored.shape[0])
            out[start:end] = stored.rows(start, end).read()
        return out

    def _placed(self, value: Tensor, like: Tensor) -> Tensor:
        """On the device, in the dtype, and in the order of elements that loading gives: some experts lie transposed."""
        value = value.to(self.device, like.dtype)
        if value.stride() == like.stride():
            return value
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device).copy_(value)


def _converted(conversion: Conversion, dtype: torch.dtype) -> dict[str, Tensor]:
    """What loading makes of stored tensors; it changes their dtype before it converts them."""
    if conversion.ours:
        return dict(conversion.read())
    values = {i: entry.read() for i, entry in enumerate(conversion.sources)}
    return conversion.run({i: x.to(dtype) if x.is_floating_point() else x for i, x in values.items()})
