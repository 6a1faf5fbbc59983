"""Who answers a benchmark's questions: a loaded model, or one that chooses its tokens (a server: `.endpoint`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from llava_fa.errors import FourierError
from llava_fa.eval.runner import answer, answer_elastic

Question = tuple[Image.Image | Sequence[Image.Image], str]
"""(The picture or pictures, what is asked.)"""


class Answerer(Protocol):
    """What `benchmarks.run` asks."""

    def answer(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int,
        max_new_tokens: int,
        progress: Callable[[int, int], None],
    ) -> list[dict[str, Any]]:
        """A row a question, in their order: ``answer``, and what else is to be kept of it.

        Args:
            questions: what is shown and asked.
            batch_size: questions at a time.
            max_new_tokens: where an answer is cut off.
            progress: called with (answered, all).
        """


@runtime_checkable
class Several(Protocol):
    """Who answers many questions at the same time (`cluster.answers`)."""

    def answer_all(
        self, chunks: Iterator[Sequence[Question]], *, batch_size: int, max_new_tokens: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows of one chunk after the other, each as of `Answerer`, in the order of chunks."""


class Loaded:
    """A model in this process; answers are greedy."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Of `hub.loading.load`.

        Raises:
            FourierError: the processor has no chat template.
        """
        if not getattr(processor, "chat_template", None):
            raise FourierError("its processor has no chat template", remedy="Add chat_template.jinja to the model")
        self.model, self.processor = model, processor

    def answer(self, questions: Sequence[Question], **options: Any) -> list[dict[str, Any]]:
        """See `Answerer`."""
        return [{"answer": text} for text in answer(self.model, self.processor, questions, **options)]


class Elastic(Loaded):
    """The same, each answer from as few visual tokens as its question needs (`runner.answer_elastic`)."""

    def answer(self, questions: Sequence[Question], **options: Any) -> list[dict[str, Any]]:
        """Rows with ``enough``, and with what was spent: means over these questions in every row.

        So their mean over all rows is the mean over all questions.
        """
        texts, enough, cost = answer_elastic(self.model, self.processor, questions, **options)
        spent = {name: cost[name] for name in ("tokens_spent", "flops_share")}
        return [{"answer": text, "enough": count, **spent} for text, count in zip(texts, enough, strict=True)]
