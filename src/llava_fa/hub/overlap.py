"""Reading and writing beside the fitting on a GPU: the weight of the next layer, the tensors of the last.

On a CPU nothing is done beside: the fitting has all its threads and its memory, which one weight more would exceed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from llava_fa.hub.plan import PlannedLayer
from llava_fa.hub.report import Measurement
from llava_fa.hub.work_folder import WorkFolder


class Overlap:
    """What is read and written while a layer is fitted on a device: one weight and one layer's tensors.

    Parts are written whole and one after the other, so that whenever the run is killed the first ones are there.

    Args:
        work: where finished layers are kept; open.
        device: where layers are fitted.
    """

    def __init__(self, work: WorkFolder, device: torch.device) -> None:
        self.work = work
        self._threads = None if device.type == "cpu" else ThreadPoolExecutor(2, "overlap")
        self._coming: list[PlannedLayer] = []
        self._ahead: dict[str, Future[Tensor]] = {}
        self._written: Future[None] | None = None

    def expect(self, layers: Sequence[PlannedLayer]) -> None:
        """These are fitted next, in this order; what is fitted otherwise is read when its turn comes."""
        self._coming = [layer for layer in layers if layer.at_once >= layer.numel]
        self._ahead.clear()

    def reader(self, layer: PlannedLayer) -> Callable[[], Tensor]:
        """What gives the layer's weight; the one after it is read from now on."""
        if self._threads is None:
            return layer.read
        here = self._ahead.pop(layer.name, None)
        after = [later for one, later in zip(self._coming, self._coming[1:], strict=False) if one is layer]
        for later in after:
            self._ahead[later.name] = self._threads.submit(later.read)
        return layer.read if here is None else here.result

    def write(self, name: str, tensors: Mapping[str, Tensor], measurement: Measurement) -> None:
        """Keep one finished layer.

        Raises:
            FourierError: this one, or on a GPU the one before, cannot be written.
        """
        if self._threads is None:
            self.work.save(name, tensors, measurement)
            return
        self.settle()
        here = {key: value.cpu() for key, value in tensors.items()}
        self._written = self._threads.submit(self.work.save, name, here, measurement)

    def settle(self) -> None:
        """Wait until all that was finished is written.

        Raises:
            FourierError: it cannot be.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """End the threads, when what they do is done."""
        if self._threads is not None:
            self._threads.shutdown()
