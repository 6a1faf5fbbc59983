"""A worker: a process on some node, which fits layers, and has some shares of the calibration samples."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from torch import nn

from llava_fa.cluster.proofreader import GONE, WALKED, Proofreader, read_only
from llava_fa.errors import FourierError, located
from llava_fa.hub import allocation
from llava_fa.hub.architecture import model_of
from llava_fa.hub.calibrated import follow
from llava_fa.hub.calibrated_model import calibrated_model
from llava_fa.hub.loading import check_device
from llava_fa.hub.original import opened
from llava_fa.hub.plan import PlannedLayer, make_plan
from llava_fa.hub.proofread import Listener
from llava_fa.hub.report import Progress
from llava_fa.hub.request import CompressionRequest
from llava_fa.hub.shards import write_atomically
from llava_fa.hub.shares import Shares
from llava_fa.hub.source import open_source, resolve_model
from llava_fa.hub.streaming import Job
from llava_fa.hub.sums import Blank, State, Sums
from llava_fa.hub.team import Route, Total
from llava_fa.hub.visual_tokens import with_visual_tokens
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import Parts
from llava_fa.solver.scratch import scratch

_FOLDER = "llava-fa-worker-"
"""What the names of workers' folders begin with, before the number of the process."""
_AGAIN = 0.2
"""Seconds until matrices are asked for again whose owner has died."""


@dataclasses.dataclass(frozen=True)
class Orders:
    """What all workers of a run are told.

    Attributes:
        model: folder, hub id or ``"tiny"``, as every node has it.
        fingerprint: of its checkpoint.
        request: what is compressed and how; without samples.
        allocation: what a budget came to (`hub.allocation`); None without one.
        threads: of torch, the command's.
        dtype: what the model computes with on samples; None where there are none.
    """

    model: str
    fingerprint: str
    request: CompressionRequest
    allocation: dict[str, Any] | None
    threads: int
    dtype: str | None


@ray.remote(max_restarts=0)
class Member:
    """A worker, by name; an actor of Ray."""

    def __init__(self, name: str, orders: Orders, desk: Any) -> None:
        torch.set_num_threads(orders.threads)
        self.name, self.orders, self.desk = name, orders, desk

    def ready(self) -> str:
        """The node that it runs on.

        Raises:
            FourierError: the node has not the checkpoint.
        """
        node = str(ray.util.get_node_ip_address())
        with located(f"{self.name} on {node}"):
            self._checked()
        return node

    def _checked(self) -> Path:
        try:
            folder = resolve_model(self.orders.model)
        except FourierError as error:
            raise FourierError(
                f"the node does not see the checkpoint {self.orders.model} ({error.what})",
                remedy="Put it where all nodes have it under the same path",
            ) from error
        if open_source(folder).fingerprint != self.orders.fingerprint:
            raise FourierError(
                f"the node has another checkpoint in {self.orders.model}",
                remedy="Put the same files there on all nodes",
            )
        return folder

    def fit_all(self) -> None:
        """Fit layers without data until none is left."""
        with self._job() as (job, _):
            in_order = sorted(job.plan.all_layers, key=lambda layer: -layer.numel)
            team = Colleagues(job, self.name, self.desk, {})
            team.fit("layers", [[layer] for layer in in_order], lambda _: None, lambda layer, _: job.compress(layer))

    def walk(self, route: Route, shares: Shares, inputs: Sequence[Any], starts: Mapping[int, int]) -> None:
        """Take shares of the samples along a route, fit layers meanwhile until none is left, then proofread.

        Args:
            route: the same for all.
            shares: those of this worker.
            inputs: prepared samples of each, in Ray's store.
            starts: where the answers of these samples begin.
        """
        samples: dict[int, Any] = {}
        for (_, numbers), some in zip(shares.items(), ray.get(list(inputs)), strict=True):
            samples |= {number: _tensors(sample) for number, sample in zip(numbers, some, strict=True)}
        with self._job() as (job, empty), contextlib.ExitStack() as stack:
            request, place = self.orders.request, job.work.parts.parent
            job.tell("loading the model")
            own = list(samples.values())
            model = calibrated_model(request, job.plan, empty, str(self.orders.dtype), own, place / "hidden")
            if Weights.of(model).streamed:
                stack.enter_context(scratch(place / "hidden"))
            listener = Listener(own, [starts[number] for number in samples])
            place_of = {number: index for index, number in enumerate(samples)}

            def hear(model: nn.Module, number: int, original: bool) -> None:
                listener(model, place_of[number], original)

            follow(job, model, Colleagues(job, self.name, self.desk, shares), samples, route, hear)
            ray.get(self.desk.post.remote(self.name, WALKED, dict.fromkeys(shares)))
            Proofreader(self.name, self.desk, job, listener.reader(model), shares, place_of).serve()

    @contextlib.contextmanager
    def _job(self) -> Iterator[tuple[Job, Any]]:
        """The plan, made anew from the checkpoint, and parts in a folder that lasts as long as the work."""
        request, folder = self.orders.request, self._checked()
        place = _own_folder()
        try:
            with contextlib.ExitStack() as stack:
                source = stack.enter_context(opened(folder, request.vision_tower))
                if request.visual_tokens is not None:
                    source = with_visual_tokens(source, request.visual_tokens)
                empty = model_of(source)
                plan = make_plan(empty, source, request.config, request.embeddings, request.drop_unused)
                if self.orders.allocation is not None:
                    plan = allocation.apply(plan, self.orders.allocation)
                (place / "parts").mkdir()
                job = Job(plan, Parts(place / "parts"), self._say, check_device(request.device))
                stack.callback(job.overlap.close)
                yield job, empty
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _say(self, progress: Progress) -> None:
        self.desk.say.remote(self.name, progress.stage, progress.name)


def _own_folder() -> Path:
    """A new one of this process; those of workers that were killed here go."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        owner = path.name.removeprefix(_FOLDER).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))


def _tensors(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A sample in memory of its own: Ray's is read-only."""
    return {key: torch.tensor(value) for key, value in sample.items()}


class Colleagues:
    """The team (`hub.team.Team`) of one worker among others, by way of the desk.

    Args:
        job: in which this one fits layers.
        name: of this worker.
        desk: where they meet.
        shares: this one's.
    """

    def __init__(self, job: Job, name: str, desk: Any, shares: Shares) -> None:
        self.job, self.name, self.desk, self.shares = job, name, desk, shares

    def together(self, key: str, own: Mapping[int, Any]) -> dict[int, Any]:
        """See `Team`."""
        ray.get(self.desk.post.remote(self.name, key, dict(own)))
        return ray.get(self.desk.posted.remote(key))  # type: ignore[no-any-return]

    def missing(self, layers: Sequence[PlannedLayer]) -> list[PlannedLayer]:
        """See `Team`."""
        names = set(ray.get(self.desk.missing.remote([layer.name for layer in layers])))
        return [layer for layer in layers if layer.name in names]

    def total(self, key: str, word: str, blanks: Mapping[str, Blank], make: Callable[[int], dict[str, Sums]]) -> Total:
        """See `Team`; the sums are added by whoever fits a layer to them."""
        tokens: dict[int, dict[str, int]] = {}
        for number in self.shares:
            sums = make(number)
            tokens[number] = {name: one.tokens for name, one in sums.items()}
            matrices = {name: ray.put(_arrays(sums.pop(name).state())) for name in list(sums)}
            ray.get(self.desk.post.remote(self.name, f"sums of {key}, {word}", {number: matrices}, key))
        every: dict[str, int] = {}
        for share in self.together(f"tokens of {key}, {word}", tokens).values():
            for name, count in share.items():
                every[name] = every.get(name, 0) + count
        return Total(every, lambda _: None, lambda name: self._taken(f"sums of {key}, {word}", blanks[name], name))

    def _taken(self, key: str, blank: Blank, name: str) -> Sums | None:
        """Sums of all shares, added in their order; those of a worker that dies come again from another."""
        while True:
            shares = [share[name] for share in ray.get(self.desk.posted.remote(key)).values() if name in share]
            sums = blank.sums() if shares else None
            try:
                for reference in shares:
                    sums.merge(_state(ray.get(reference)))  # type: ignore[union-attr]
            except GONE:
                time.sleep(_AGAIN)
                continue
            return sums

    def fit(
        self,
        key: str,
        groups: Sequence[Sequence[PlannedLayer]],
        statistics: Callable[[PlannedLayer], Any],
        fit: Callable[[PlannedLayer, Any], None],
    ) -> None:
        """See `Team`: layers that nobody has taken, one at a time, until all of them are finished."""
        names = [[layer.name for layer in group] for group in groups]
        by_name = {layer.name: (layer, group[0]) for group in groups for layer in group}
        last, known = "", None
        while (name := ray.get(self.desk.take.remote(self.name, key, names, last))) is not None:
            names = []  # the desk knows them now
            layer, leader = by_name[name]
            if leader.name != last:
                known = None  # not two at a time
                last, known = leader.name, statistics(leader)
            fit(layer, known)
            self.job.overlap.settle()
            ray.get(self.desk.done.remote(self.name, name, self.job.work.part(name).read_bytes()))

    def fetch(self, layers: Iterable[PlannedLayer]) -> None:
        """See `Team`: from the work folder, which the desk has."""
        for layer in layers:
            if layer.name not in self.job.work:
                part = ray.get(self.desk.part.remote(layer.name))
                write_atomically(self.job.work.part(layer.name), lambda file, part=part: file.write(part))


def _arrays(state: State) -> Any:
    """As Ray moves it without a copy."""
    (count, moment), drift = state.moment, state.drift
    pairs = None if drift is None else (drift[0], [x.cpu().numpy() for x in drift[1]])
    return state.tokens, (count, [x.cpu().numpy() for x in moment]), pairs


def _state(arrays: Any) -> State:
    tokens, (count, moment), drift = arrays
    pairs = None if drift is None else (drift[0], [read_only(x) for x in drift[1]])
    return State(tokens, (count, [read_only(x) for x in moment]), pairs)
