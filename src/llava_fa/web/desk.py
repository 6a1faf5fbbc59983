"""Who is answered when: one question at a time, both models, in the order of arrival.

Two generations at once would take each other's cores, caches and memory bandwidth, and neither time would be its
model's own. So the sides answer one after the other, each with the whole machine, on one thread for everybody; whoever
would rather see both write at once asks for it, and the answers say that they shared the machine.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from PIL import Image

from llava_fa.bounds import is_text
from llava_fa.errors import FourierError
from llava_fa.serve.limits import Limits
from llava_fa.web.side import Answer, Side, generate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What a visitor asks both models.

    Attributes:
        picture, text: the question.
        max_new_tokens: longest answer.
        visual_tokens: one number a side; None for as many as the model was saved with.
        together: both at once.
    """

    picture: Image.Image
    text: str
    max_new_tokens: int
    visual_tokens: tuple[int | None, int | None] = (None, None)
    together: bool = False


class Ticket:
    """A question on its way: its answers so far, and how it ended."""

    def __init__(self, question: Question, end: float, visitor: str = "") -> None:
        self.question, self.end, self.visitor = question, end, visitor
        self.answers = (Answer(shared=question.together), Answer(shared=question.together))
        self.started = self.cancelled = False
        self.error: str | None = None
        self.late = False
        """Whether time ran out."""
        self._done, self._lock = threading.Event(), threading.Lock()

    def cancel(self) -> None:
        """Nobody wants it any more: it ends at the next token, or does not begin."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether nothing will change any more; of one that is stopped while it waits, at once."""
        with self._lock:
            return self._done.is_set() or (not self.started and self.stopped())

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until its turn is over; whether it is."""
        return self._done.wait(seconds)

    def begin(self) -> bool:
        """Its turn has come; False if it is to be passed over."""
        with self._lock:
            self.started = not self.stopped()
            return self.started

    def stopped(self) -> bool:
        """Whether to stop: given up, or out of time."""
        if not self.cancelled and time.monotonic() > self.end:
            self.late = True
        return self.cancelled or self.late

    def finish(self) -> None:
        """Nothing will change any more."""
        self._done.set()


class Desk:
    """Both models, and the questions that wait for them.

    Args:
        sides: the original and the compressed model.
        limits: of questions; ``requests`` wait at most, ``seconds`` are from the question to the end of both answers,
            waiting included.
    """

    def __init__(self, sides: tuple[Side, Side], limits: Limits) -> None:
        self.sides, self.limits = sides, limits
        self._line: list[Ticket] = []
        self._lock = threading.Lock()
        # One thread a side: torch's pool of workers belongs to the thread that calls it.
        self._pools = [ThreadPoolExecutor(1, f"side{i}") for i in range(2)]
        self._turns = ThreadPoolExecutor(1, "turns")

    def ask(self, visitor: str, question: Question) -> Ticket:
        """Join the line. A visitor has one question at a time: an earlier one of theirs is given up.

        Raises:
            FourierError: there is nothing to ask, it is too long, or too many wait.
        """
        if not question.text.strip():
            raise FourierError("there is no question", remedy="Type one")
        if len(question.text) > self.limits.text_characters:
            raise FourierError(f"the question has more than {self.limits.text_characters} characters")
        if not is_text(question.text):
            raise FourierError(
                "the question holds half of a surrogate pair, which is no character", remedy="Type it anew"
            )
        ticket = Ticket(question, time.monotonic() + self.limits.seconds, visitor)
        with self._lock:
            self._give_up(visitor)
            if sum(not other.cancelled for other in self._line) >= self.limits.requests:
                raise FourierError(
                    f"{self.limits.requests} people are being answered already", remedy="Try again in a moment"
                )
            self._line.append(ticket)
            self._turns.submit(self._turn, ticket)
        return ticket

    def stop(self, visitor: str) -> None:
        """Give up what this visitor has asked."""
        with self._lock:
            self._give_up(visitor)

    def ahead(self, ticket: Ticket) -> int:
        """How many are answered before this one."""
        with self._lock:
            before = itertools.takewhile(lambda other: other is not ticket, self._line)
            return sum(not other.cancelled for other in before)

    def close(self) -> None:
        """Give up everything and end the threads."""
        with self._lock:
            for ticket in self._line:
                ticket.cancel()
        for pool in (self._turns, *self._pools):
            pool.shutdown(wait=True)

    def _give_up(self, visitor: str) -> None:
        for ticket in self._line:
            if ticket.visitor == visitor:
                ticket.cancel()

    def _turn(self, ticket: Ticket) -> None:
        try:
            if ticket.begin():
                self._answer(ticket)
        except FourierError as error:
            ticket.error = str(error)
        except Exception:  # the visitor is told that it failed, the log why
            logger.exception("a question was not answered")
            ticket.error = "The model failed on this question; the terminal that runs the page says why."
        finally:
            with self._lock:
                self._line.remove(ticket)
            ticket.finish()

    def _answer(self, ticket: Ticket) -> None:
        if ticket.question.together:
            both = [self._start(ticket, index) for index in range(2)]
            done, _ = wait(both, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                ticket.cancel()  # the other need not go on
            wait(both)
            for future in both:
                future.result()
        else:
            for index in range(2):
                if not ticket.stopped():
                    self._start(ticket, index).result()

    def _start(self, ticket: Ticket, index: int) -> Future[None]:
        question = ticket.question
        return self._pools[index].submit(
            generate,
            self.sides[index],
            question.picture,
            question.text,
            ticket.answers[index],
            max_new_tokens=min(question.max_new_tokens, self.limits.tokens),
            visual_tokens=question.visual_tokens[index],
            stopped=ticket.stopped,
        )
