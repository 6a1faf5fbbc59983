"""Workers on the nodes of a cluster, led by the process that was asked for the compression.

Whoever dies is replaced. Where there is no room for another worker, one of those left gives way to one that has the
orphaned shares too. A replaced worker uses the parts that are finished, and sends its samples through again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch import nn

from llava_fa.cluster.connect import BUSY, alive, check_versions, connected, device_of, gpus_for, here, mendable, room
from llava_fa.cluster.desk import Desk
from llava_fa.cluster.member import Member, Orders
from llava_fa.cluster.proofreader import WALKED, Elsewhere
from llava_fa.errors import FourierError
from llava_fa.hub import allocation
from llava_fa.hub.blocks import Inputs
from llava_fa.hub.calibrated_model import needed_memory
from llava_fa.hub.request import CompressionRequest
from llava_fa.hub.shares import Shares, split
from llava_fa.hub.source import open_source
from llava_fa.hub.streaming import Job
from llava_fa.hub.team import Route

_START, _GRACE = 120.0, 20.0
"""Seconds that workers may take to be there at the beginning; and the one that takes the place of another."""
_LOOK = 0.2
"""Seconds between two looks at what has come."""
_LEAVE = 10.0
"""Seconds that workers have to tidy up at the end."""
_COPIES = 16
"""Bytes for each weight of a layer that is fitted without data."""


@contextmanager
def crew(address: str | None, gpus: float | None = None) -> Iterator[RayCrew]:
    """While it lasts, workers of a cluster (`hub.crew.Crew`).

    Args:
        address: as of `connect.connected`.
        gpus: that Ray is asked for, for each worker; a fraction where several share one. None: 1 where the device is
            not the CPU and the cluster has any.

    Raises:
        FourierError: nobody answers, or a node has other versions.
    """
    with connected(address):
        check_versions()
        yield RayCrew(gpus)


@dataclasses.dataclass
class _Worker:
    """One of them.

    Attributes:
        name: told to people.
        actor: of Ray.
        ready: its node, when it is there.
        since: when it was asked for.
        shares: numbers of the shares that it has.
        run: its work; None before it has begun.
    """

    name: str
    actor: Any
    ready: Any
    since: float
    shares: list[int]
    run: Any = None


class RayCrew:
    """See `crew`."""

    def __init__(self, gpus: float | None) -> None:
        self.gpus = gpus

    def _gpus(self, device: str) -> float:
        return gpus_for(device) if self.gpus is None else self.gpus

    def fit_all(self, job: Job, request: CompressionRequest) -> None:
        """See `Crew`."""
        if not job.missing(job.plan.all_layers):
            return
        memory = psutil.Process().memory_info().rss + _COPIES * max(layer.at_once for layer in job.plan.all_layers)
        gpus = self._gpus(str(request.device))
        with _Shift(job, _orders(job, request, None, gpus), {}, _asked(memory, gpus)) as shift:
            shift.start(lambda worker: worker.actor.fit_all.remote())
            shift.finish()

    @contextmanager
    def walk(
        self,
        job: Job,
        request: CompressionRequest,
        empty: nn.Module,
        dtype: str,
        inputs: Inputs,
        starts: Sequence[int],
        route: Route,
    ) -> Iterator[Elsewhere]:
        """See `Crew`."""
        shares = split(inputs)
        needed = needed_memory(job.plan, empty, dtype, inputs)
        most = max(int(node["Resources"].get("memory", 0)) for node in alive())
        memory = request.memory or (needed.whole if needed.whole <= most else max(needed.streamed, most))
        if gpus := self._gpus(str(request.device)):  # the weights are there, and whether it has room is asked there
            memory = request.memory or needed.streamed
        else:
            request = dataclasses.replace(request, memory=memory)
        stored = {
            number: ray.put([{key: x.numpy() for key, x in inputs[index].items()} for index in samples])
            for number, samples in shares.items()
        }

        def begin(worker: _Worker) -> Any:
            own = {number: shares[number] for number in sorted(worker.shares)}
            begins = {index: starts[index] for samples in own.values() for index in samples}
            return worker.actor.walk.remote(route, own, [stored[number] for number in own], begins)

        with _Shift(job, _orders(job, request, dtype, gpus), shares, _asked(memory, gpus)) as shift:
            shift.start(begin)
            shift.wait(shift.desk.posted.remote(WALKED))
            reader = Elsewhere(shift.desk, shift.wait, shift.look, len(inputs))
            yield reader
            reader.end()
            shift.leave()


def _asked(memory: int, gpus: float) -> dict[str, float]:
    return {"CPU": torch.get_num_threads(), "GPU": gpus, "memory": memory}


def _orders(job: Job, request: CompressionRequest, dtype: str | None, gpus: float) -> Orders:
    device = device_of(str(request.device), gpus)
    folder, name = job.plan.source.folder, str(request.model)
    elsewhere = name == "tiny" or not (Path(name).expanduser().is_dir() or folder.name.endswith(".merged"))
    return Orders(
        model=name if elsewhere else str(folder.absolute()),
        fingerprint=open_source(folder).fingerprint,
        request=dataclasses.replace(request, calibration=None if request.calibration is None else (), device=device),
        allocation=job.work.read_json(allocation.FILE),
        threads=torch.get_num_threads(),
        dtype=dtype,
    )


class _Shift:
    """The workers at one piece of work.

    Args:
        job: whose layers are fitted.
        orders: for all workers.
        shares: of the samples; without any, workers are independent of each other.
        asked: of Ray, for each worker.
    """

    def __init__(self, job: Job, orders: Orders, shares: Shares, asked: Mapping[str, float]) -> None:
        self.job, self.orders, self.shares, self.asked = job, orders, shares, asked
        finished = [layer.name for layer in job.plan.all_layers if layer.name in job.work]
        options = {"num_cpus": 0, "scheduling_strategy": here(), "max_concurrency": 1000}
        self.desk = ray.remote(Desk).options(**options).remote(str(job.work.parts), finished, len(shares))
        self.weights = {layer.name: layer.numel for layer in job.plan.all_layers}
        self.workers: list[_Worker] = []
        self._begin: Callable[[_Worker], Any] = lambda _: None
        self._names = 0

    def __enter__(self) -> _Shift:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        ray.kill(self.desk)

    def start(self, begin: Callable[[_Worker], Any]) -> None:
        """Have workers begin.

        Args:
            begin: starts the work of a worker that is there.

        Raises:
            FourierError: none is there, or one cannot work.
        """
        self._begin = begin
        left = len(self.job.missing(self.job.plan.all_layers))
        count = min(room(self.asked), max(left, len(self.shares)))  # layers are shared out too: some have no samples
        self.job.tell("waiting for workers")
        self.workers = [self._asked_for([]) for _ in range(count)]
        self._gathered()
        for number, worker in enumerate(self.workers):
            size = len(self.workers)
            worker.shares = [share for share in self.shares if share * size // len(self.shares) == number]
            worker.run = begin(worker)
        self.job.tell("compressing")

    def wait(self, reference: Any) -> Any:
        """What a call of the desk gives, in the end.

        Raises:
            FourierError: a worker's.
        """
        while not ray.wait([reference], timeout=0)[0]:
            self.look(reference)
        return ray.get(reference)

    def finish(self) -> None:
        """Wait until all layers are finished.

        Raises:
            FourierError: a worker's.
        """
        while self.job.done < self.job.total:
            self.look()
        self.leave()

    def leave(self) -> None:
        """Let workers tidy up that have nothing left to do."""
        runs = [worker.run for worker in self.workers if worker.run is not None]
        if runs:
            ray.wait(runs, num_returns=len(runs), timeout=_LEAVE)

    def _asked_for(self, shares: list[int]) -> _Worker:
        self._names += 1
        name = f"worker {self._names}"
        options = {"num_cpus": self.asked["CPU"], "num_gpus": self.asked["GPU"], "memory": self.asked["memory"]}
        actor = Member.options(**options).remote(name, self.orders, self.desk)
        return _Worker(name, actor, actor.ready.remote(), time.monotonic(), shares)

    def _gathered(self) -> None:
        """Wait for the workers; go on without those that others leave no room for."""
        ready, _ = ray.wait([worker.ready for worker in self.workers], num_returns=len(self.workers), timeout=_START)
        here_now = [worker for worker in self.workers if worker.ready in ready]
        for worker in self.workers:
            if worker not in here_now:
                ray.kill(worker.actor)
        self.workers = here_now
        for worker in list(here_now):
            try:
                ray.get(worker.ready)
            except RayTaskError as error:
                raise mendable(error) from error
            except RayActorError:
                self.workers.remove(worker)
        if not self.workers:
            raise FourierError("no worker has started", remedy=BUSY)

    def look(self, also: Any = None) -> None:
        """See what has come, for a moment, or until something else is there too."""
        waited = [worker.run or worker.ready for worker in self.workers] + [also] * (also is not None)
        done, _ = ray.wait(waited, num_returns=1, timeout=_LOOK)
        self._tell()
        for worker in list(self.workers):
            if (worker.run or worker.ready) in done:
                self._answered(worker)
            elif worker.run is None and time.monotonic() - worker.since > _GRACE and len(self.workers) > 1:
                self._merged(worker)

    def _answered(self, worker: _Worker) -> None:
        """A worker is there, is done, or is dead."""
        try:
            ray.get(worker.run or worker.ready)
        except RayTaskError as error:
            raise mendable(error) from error
        except RayError:
            self.workers.remove(worker)
            ray.get(self.desk.lost.remote(worker.name))
            self.job.tell("compressing", f"{worker.name} has died, another takes its place")
            self.workers.append(self._asked_for(worker.shares))
            return
        if worker.run is None:
            worker.run = self._begin(worker)
        else:
            self.workers.remove(worker)
            ray.kill(worker.actor)

    def _merged(self, late: _Worker) -> None:
        """There is no room for a worker: another begins anew in the place of one that is there, with both's shares."""
        self.workers.remove(late)
        ray.kill(late.actor)
        if not late.shares:
            return
        others = [worker for worker in self.workers if worker.run is not None]
        if not others:
            self.workers.append(self._asked_for(late.shares))
            return
        chosen = min(others, key=lambda worker: len(worker.shares))
        self.workers.remove(chosen)
        ray.kill(chosen.actor)
        ray.get(self.desk.lost.remote(chosen.name))
        self.workers.append(self._asked_for(sorted([*chosen.shares, *late.shares])))

    def _tell(self) -> None:
        """Pass on what workers have said."""
        for name, stage, layer in ray.get(self.desk.news.remote()):
            if stage:
                self.job.tell(stage, layer, name)
            else:
                self.job.count(self.weights[layer])
                self.job.tell("compressing", layer, name)
