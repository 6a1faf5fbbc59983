"""Samples that go through a model side by side, so that each part of it is needed once for all of them.

A sample's pass is the model's own forward, in a thread of its own. In front of every part (`hub.weights`) the thread
stops and hands over what the part was called with; whoever has all of them in hand runs the part for one sample after
the other, and gives each what came of it. One thread at a time runs, and which one is settled by the samples' order,
so that results are the same every time. What a model does between its parts nobody has to know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llava_fa.hub.shelf import Shelf

_STACK = 4 << 20
"""Bytes of a thread's stack: between parts little is called."""


class Stop(BaseException):
    """Ends a pass that has gone far enough."""


class Arrival:
    """What a sample is waiting with in front of a part: the arguments of the part's forward.

    ``back`` is what it has beside these where it comes back to the part with gradients (`hub.recompute`), ``phase`` how
    often it has set out to come back.
    """

    def __init__(
        self, traveller: Traveller, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], back: Any = None
    ) -> None:
        self.traveller, self.path, self.args, self.kwargs = traveller, path, args, kwargs
        self.back, self.phase = back, traveller.phase
        self._shelf: Shelf | None = None
        self._tensors: list[Tensor] = []

    @property
    def label(self) -> int:
        """Whose pass it is."""
        return self.traveller.label

    @property
    def original(self) -> bool:
        """Whether it is one through the original model."""
        return self.traveller.original

    def lay_down(self, shelf: Shelf) -> None:
        """Let the shelf have the tensors until they are needed."""
        self._shelf, self._tensors = shelf, list(_tensors((self.args, self.kwargs)))
        shelf.put(self._tensors)

    def take_up(self) -> None:
        """Have the tensors back."""
        if self._shelf is not None:
            self._shelf.take(self._tensors)
            self._shelf = None

    @contextmanager
    def present(self) -> Iterator[None]:
        """While it lasts the tensors are there."""
        shelf = self._shelf
        self.take_up()
        try:
            yield
        finally:
            if shelf is not None:
                self.lay_down(shelf)


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) is Tensor:
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Traveller(threading.Thread):
    """One pass through the model, which runs only while somebody waits for it in `go`.

    Args:
        label: whose pass it is.
        travel: the pass.
        original: whether it is through the original model, where weights have been exchanged for others.

    Attributes:
        waits: what it waits with; None before it has begun and when it has ended.
        result: of the pass.
        visits: the parts that it has reached, in order; on the way there alone.
        phase: how often it has set out to come back with gradients; the pass itself says so.
        shelf: where what it needs later may lie.
    """

    def __init__(self, label: int, travel: Callable[[], Any], original: bool = False) -> None:
        super().__init__(daemon=True)
        self.label, self.original = label, original
        self.waits: Arrival | None = None
        self.result: Any = None
        self.visits: list[str] = []
        self.phase = 0
        self.shelf: Shelf | None = None
        self._travel, self._grad = travel, torch.is_grad_enabled()  # a thread begins with gradients
        self._error: BaseException | None = None
        self._answer: Any = None
        self._away = self._ending = False
        self._given, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """What the thread does."""
        self._given.acquire()
        torch.set_num_threads(1)  # or every thread would have a pool of its own
        try:
            if isinstance(self._answer, Stop):
                return
            with torch.set_grad_enabled(self._grad):
                self.result = self._travel()
        except Stop:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()

    def reach(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], back: Any = None) -> Any:
        """In the thread: wait in front of a part for what it gives."""
        if self._ending:  # on its way out, by what the model does at the end whatever happens
            raise Stop
        if back is None:
            self.visits.append(path)
        self.waits = Arrival(self, path, args, kwargs, back)
        self._back.release()
        self._given.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def go(self, answer: Any = None) -> None:
        """Let it go on with what the part has given, or raise what it has raised, until it waits again or has ended.

        Raises:
            BaseException: whatever ended the pass.
        """
        self.waits, self._answer, self._away = None, answer, True
        self._given.release()
        self._back.acquire()
        self._away = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def end(self) -> None:
        """End the pass wherever it is."""
        self._ending = True
        if self._away:  # whoever waited for it was interrupted
            self._back.acquire()
            self._away = False
        if self.is_alive() and (self.waits is not None or not self.visits):
            self.waits, self._answer = None, Stop()
            self._given.release()
        self.join()


def current() -> Traveller | None:
    """Whose thread this is."""
    thread = threading.current_thread()
    return thread if isinstance(thread, Traveller) else None


class Walk:
    """Passes under way (use as a context manager: what has not ended by then is ended).

    Args:
        rank: part → its place in the order in which the model runs them. Where many wait, those in front of the first
            of their parts are next (one that has no place is before all others): then all have come to it that will. On
            the way back it is the last of them, once nobody is left on the way there.
        shelf: where waiting tensors lie.
    """

    def __init__(self, rank: Mapping[str, int], shelf: Shelf | None = None) -> None:
        self.rank, self.shelf = rank, shelf
        self.travellers: list[Traveller] = []
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        for traveller in self.travellers:
            traveller.end()

    def start(self, label: int, travel: Callable[[], Any], original: bool = False) -> Traveller:
        """Begin a pass, up to the first part."""
        before = threading.stack_size(_STACK)
        try:
            traveller = Traveller(label, travel, original)
            traveller.shelf = self.shelf
            traveller.start()
            self.travellers.append(traveller)
        finally:
            threading.stack_size(before)
        try:
            self._go(traveller)
        finally:
            torch.set_num_threads(self._threads)  # of this thread; the other's is its own
        return traveller

    def waiting(self) -> list[Arrival]:
        """Everyone who waits, in the order in which they began."""
        return [traveller.waits for traveller in self.travellers if traveller.waits is not None]

    def front(self) -> tuple[str, list[Arrival]] | None:
        """The part that is next, and those in front of it; None when all passes have ended."""
        waiting = self.waiting()
        if not waiting:
            return None
        place = min(self._place(one) for one in waiting)
        arrivals = [one for one in waiting if self._place(one) == place]
        return place[-1], arrivals

    def first(self, arrivals: Iterable[Arrival]) -> str:
        """The first of the parts that these wait in front of."""
        return min(self._place(one) for one in arrivals)[-1]

    def _place(self, arrival: Arrival) -> tuple[int, int, str]:
        rank = self.rank.get(arrival.path, -1)
        return arrival.phase, rank if arrival.back is None else -rank, arrival.path

    def answer(self, arrival: Arrival, forward: Callable[..., Any]) -> None:
        """Run a part for one sample, and let the sample go on to the next.

        Raises:
            FourierError: the pass fails, there or on the way.
        """
        arrival.take_up()
        try:
            value = forward(*arrival.args, **arrival.kwargs)
        except Exception as error:  # it is the pass's own, which knows whose it is
            value = error
        self._go(arrival.traveller, value)

    def _go(self, traveller: Traveller, answer: Any = None) -> None:
        traveller.go(answer)
        if traveller.waits is not None and self.shelf is not None:
            traveller.waits.lay_down(self.shelf)
