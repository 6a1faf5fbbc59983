"""Questions shared out over a cluster: whole chunks of them, answered in the order in which they were asked."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from llava_fa.cluster.connect import check_versions, device_of, gpus_for, mendable, room
from llava_fa.errors import FourierError, located
from llava_fa.eval.answerers import Elastic, Loaded, Question
from llava_fa.hub.loading import load
from llava_fa.hub.source import resolve_model, weight_files

_AHEAD = 2
"""Chunks that a worker has: the one at work, and the next."""
_START = 300.0
"""Seconds until it is an error that no worker has started."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What workers are told.

    Attributes:
        model: folder, hub id or ``"tiny"``, as every node has it.
        device: where it runs.
        visual_tokens: how many, where that is chosen.
        elastic: whether they are chosen for every question.
        threads: of torch, the command's.
    """

    model: str
    device: str
    visual_tokens: int | None
    elastic: bool
    threads: int


@ray.remote(max_restarts=0)
class Reader:
    """A worker that has the model."""

    def __init__(self, name: str, reading: Reading) -> None:
        self.name, self.reading = name, reading
        self._answerer: Any = None

    def ready(self) -> None:
        """Load the model.

        Raises:
            FourierError: the node has it not, or cannot load it.
        """
        torch.set_num_threads(self.reading.threads)
        with located(f"{self.name} on {ray.util.get_node_ip_address()}"):
            loaded = load(self.reading.model, self.reading.device, visual_tokens=self.reading.visual_tokens)
            self._answerer = (Elastic if self.reading.elastic else Loaded)(*loaded)

    def answer(self, questions: Sequence[Question], options: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a question, as of `eval.answerers.Answerer`."""
        return self._answerer.answer(questions, **options)  # type: ignore[no-any-return]


class Readers:
    """Workers of a cluster that this process is connected to (`eval.answerers.Several`).

    Args:
        model: what answers, as this process has it.
        device, visual_tokens, elastic: as of `Reading`.
        gpus: that Ray is asked for, for each worker; None: 1 where the device is not the CPU and the cluster has any.

    Raises:
        FourierError: a node has other versions, or none has room for a worker.
    """

    def __init__(self, model: str, device: str, visual_tokens: int | None, elastic: bool, gpus: float | None) -> None:
        check_versions()
        folder = resolve_model(model)
        name = str(folder.absolute()) if Path(model).expanduser().is_dir() else model
        if gpus is None:
            gpus = gpus_for(device)
        self._reading = Reading(name, device_of(device, gpus), visual_tokens, elastic, torch.get_num_threads())
        memory = psutil.Process().memory_info().rss + 2 * sum(path.stat().st_size for path in weight_files(folder))
        self._asked = {"CPU": torch.get_num_threads(), "GPU": gpus, "memory": memory}
        self._count = room(self._asked)
        self._names, self._actors = 0, []

    def answer_all(
        self, chunks: Iterator[Sequence[Question]], *, batch_size: int, max_new_tokens: int
    ) -> Iterator[list[dict[str, Any]]]:
        """See `Several`; what a worker had that dies is answered by another.

        Raises:
            FourierError: a worker's.
        """
        options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        work = _Work(enumerate(chunks), {}, {}, deque(), deque(), {})
        for _ in range(self._count):
            self._begin(work)
        following = 0
        try:
            while work.hand_out(options):
                self._look(work)
                while following in work.found:
                    yield work.found.pop(following)
                    following += 1
        finally:
            for actor in self._actors:
                ray.kill(actor)

    def _look(self, work: _Work) -> None:
        """Wait for what comes first: a worker that has started, or answers."""
        done, _ = ray.wait([*work.starting, *work.running], timeout=_START)
        if not done and not work.running:
            raise FourierError(
                "no worker has started", remedy="Look at `ray status`: others may use all of the cluster"
            )
        for reference in done:
            actor = work.starting.pop(reference, None)
            number, questions, of = work.running.pop(reference, (None, (), actor))
            try:
                value = ray.get(reference)
            except RayTaskError as error:
                raise mendable(error) from error
            except RayError:
                if number is not None:
                    work.again.append((number, questions))
                if of in self._actors:
                    self._actors.remove(of)
                    work.free = deque(one for one in work.free if one is not of)
                    self._begin(work)
                continue
            if number is None:
                work.free += [of] * _AHEAD
            else:
                work.found[number] = value
                work.free.append(of)

    def _begin(self, work: _Work) -> None:
        self._names += 1
        options = {"num_cpus": self._asked["CPU"], "num_gpus": self._asked["GPU"], "memory": self._asked["memory"]}
        actor = Reader.options(**options).remote(f"worker {self._names}", self._reading)
        self._actors.append(actor)
        work.starting[actor.ready.remote()] = actor


@dataclasses.dataclass
class _Work:
    """Chunks on their way.

    Attributes:
        chunks: those that nobody has had, by number.
        starting: when a worker is there → the worker.
        running: answers to come → the chunk's number, the chunk, the worker.
        free: workers, each as often as it may have another chunk.
        again: chunks of workers that have died.
        found: number → answers that are not passed on yet.
    """

    chunks: Iterator[tuple[int, Sequence[Question]]]
    starting: dict[Any, Any]
    running: dict[Any, tuple[int, Sequence[Question], Any]]
    free: deque[Any]
    again: deque[tuple[int, Sequence[Question]]]
    found: dict[int, list[dict[str, Any]]]
    over: bool = False

    def hand_out(self, options: dict[str, Any]) -> bool:
        """Give free workers chunks; whether there is anything left to wait for."""
        while self.free and (self.again or not self.over):
            task = self.again.popleft() if self.again else next(self.chunks, None)
            if task is None:
                self.over = True
                break
            actor = self.free.popleft()
            self.running[actor.answer.remote(task[1], options)] = (*task, actor)
        return bool(self.running or self.again or not self.over)
