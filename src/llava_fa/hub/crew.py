"""Workers elsewhere that fit the layers of a compression which this process leads (`cluster.crew` has some)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from llava_fa.hub.blocks import Inputs
from llava_fa.hub.proofread import Reader
from llava_fa.hub.request import CompressionRequest
from llava_fa.hub.streaming import Job
from llava_fa.hub.team import Route


class Crew(Protocol):
    """What `hub.compress` asks of them."""

    def fit_all(self, job: Job, request: CompressionRequest) -> None:
        """Fit every layer that has no part yet, without data.

        Args:
            job: of the plan that is carried out; its work folder gets the parts.
            request: what is compressed and how.
        """

    def walk(
        self,
        job: Job,
        request: CompressionRequest,
        empty: nn.Module,
        dtype: str,
        inputs: Inputs,
        starts: Sequence[int],
        route: Route,
    ) -> AbstractContextManager[Reader]:
        """Take the samples along a route, and fit every layer that has no part yet.

        Args:
            job, request: as of `fit_all`.
            empty: the model on the meta device.
            dtype: that it computes with.
            inputs: prepared samples.
            starts: where their answers begin.
            route: of `calibrated.route_of`.

        Returns:
            When all layers are finished, who reads what has become of the model, while the context lasts.
        """
