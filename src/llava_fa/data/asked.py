"""Calibration without a dataset: pictures and questions about them, and what a model is asked to write.

Nobody has answered them; the model that is compressed does (`hub.own_answers`). A model is mostly run on its own words.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_fa.data.rows import Candidate, SampleSource
from llava_fa.data.samples import Sample
from llava_fa.errors import FourierError

QUESTIONS = (
    "Describe this picture in detail.",
    "What text can be read in this picture? Write it down as it stands there.",
    "How many things of each kind are there in this picture? Count them.",
    "Where is what in this picture? Say for each thing where it stands.",
    "What is in the foreground of this picture, and what in the background?",
    "What colours are the things in this picture?",
    "What may have happened just before this picture was made, and what tells you so?",
    "Write a caption of one sentence for this picture.",
    "Is there anything unusual in this picture? Explain your answer step by step.",
    "List what can be seen in this picture as JSON, with a name and a place for each thing.",
)
"""Asked of every picture in turn: describing, reading, counting, locating, reasoning."""
PROMPTS = (
    "Explain how a refrigerator works to a child of ten.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What are the main causes of inflation? Give examples.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Summarise the history of the printing press in one paragraph.",
    "Translate into French, German and Spanish: The train leaves at half past seven.",
    "A shop sells pens at 3 for 2 euros. What do 12 pens cost? Show your steps.",
    "Write a polite e-mail that asks for a delayed parcel.",
    "Compare cats and dogs as pets in a table.",
    "What should I see in two days in Kyoto?",
    "Give me a recipe for a vegetable soup, with amounts and steps.",
    "Explain the difference between a virus and a bacterium.",
    "Write a poem of eight lines about the first snow.",
    "Which planets of the solar system have rings? Answer as a list.",
    "Turn this into JSON: Ann is 34 and lives in Oslo, Ben is 29 and lives in Porto.",
    "What is the derivative of x squared times sine of x? Explain each step.",
    "Write a dialogue between a customer and a waiter about a wrong order.",
    "How does a bill become a law in a parliamentary democracy?",
    "Give five tips for sleeping better, with a reason for each.",
    "Write an SQL query that lists the ten customers with the largest sales.",
    "What did people believe about the heart before William Harvey?",
    "Explain recursion with an example from daily life.",
    "Draft a press release for a small museum that opens a new wing.",
    "Why is the sky blue, and why are sunsets red?",
)
"""What a model is asked to write without a picture."""
TEXTS_EVERY = 4
"""One sample of so many is text alone: pictures alone would cost the model its language."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm")
_TABLES = ("*.arrow", "*.parquet", "*.json", "*.jsonl", "*.csv")


@dataclasses.dataclass(frozen=True)
class Asked(SampleSource):
    """Samples that end with a question; the answers are the model's own.

    Args:
        name: a folder of pictures; with ``draw`` only how people are told of it.
        count, seed: as of a `SampleSource`.
        draw: (count, seed) → samples whose pictures are taken, in the place of a folder.
        ask: questions of the user's own, in whatever language, asked of the pictures before the built-in ones.
        sees: whether the model takes pictures; else all is text.

    Raises:
        FourierError: when iterated, a folder without pictures.
    """

    ask: tuple[str, ...] = ()
    sees: bool = True

    def candidates(self) -> Iterator[Candidate]:
        """Every `TEXTS_EVERY`-th is a prompt; pictures come round with another question until all are asked."""
        prompts = _shuffled(PROMPTS, self.seed)
        if not self.sees:
            yield from prompts
            return
        turns = self._turns()
        for number in itertools.count(1):
            candidate = next(prompts, None) if number % TEXTS_EVERY == 0 else next(turns, None)
            if candidate is None and (candidate := next(turns, None) or next(prompts, None)) is None:
                return
            yield candidate

    def _turns(self) -> Iterator[Candidate]:
        pictures, questions = self._pictures(), (*self.ask, *QUESTIONS)
        for turn in range(len(questions)):
            for index, (where, picture) in enumerate(pictures):
                question = questions[(index + turn) % len(questions)]
                yield Candidate(where, functools.partial(_question, question, picture))

    def _pictures(self) -> Sequence[tuple[str, Any]]:
        if self.draw is not None:
            drawn = enumerate(self.draw(self.count, self.seed))
            return [(f"picture {index} of {self.name}", sample[0]) for index, sample in drawn]
        paths = pictures_in(Path(self.name).expanduser())
        if not paths:
            raise FourierError("there are no pictures in it", remedy="Give a folder of pictures", where=self.name)
        random.Random(self.seed).shuffle(paths)
        return [(str(path), path) for path in paths]


def _shuffled(prompts: Sequence[str], seed: int) -> Iterator[Candidate]:
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    return (Candidate(f"prompt {index}", functools.partial(_question, prompts[index])) for index in order)


def _question(text: str, *pictures: Any) -> Sample:
    """A user's turn, the picture first as in LLaVA's training."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def pictures_in(folder: Path) -> list[Path]:
    """The picture files in a folder and those below it, by their names; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def is_album(name: str) -> bool:
    """Whether a source is a folder of pictures and no dataset: no table lies beside them."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _TABLES):
        return False
    return bool(pictures_in(folder))


def with_answer(sample: Any, answer: str) -> Sample:
    """A sample that ends with a question, and what was answered; nothing, if that is what was said."""
    turn: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [*sample, turn] if answer else sample
