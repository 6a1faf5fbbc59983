"""One of the two models that are compared: loaded, measured, and answering."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava_fa.config import QUANT_METHOD
from llava_fa.errors import FourierError
from llava_fa.eval.runner import inputs_of, prompt, room
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.loading import load
from llava_fa.hub.processor import check_chat_template, check_sees
from llava_fa.hub.source import read_config, resolve_model, weight_files
from llava_fa.hub.visual_tokens import grid_of, set_visual_tokens, visual_tokens_of
from llava_fa.nn.visual_tokens import nested_grids


@dataclass(frozen=True)
class Side:
    """A model and what is to be said of it.

    Attributes:
        name: how it was given; of a folder its name.
        model, processor: loaded.
        disk_bytes: of its weight files.
        memory_bytes: of its tensors, as loaded.
        dtype: of what it computes.
        bits: per weight of the compressed layers; None for an original.
        counts: the numbers of visual tokens it can be told a picture in, fewest first; empty if it has no choice.
        saved: how many it was saved with; 0 if it has no choice.
        trained: whether fewer visual tokens have parameters of their own (FMVR) or are pooled plainly.
    """

    name: str
    model: Any
    processor: Any
    disk_bytes: int
    memory_bytes: int
    dtype: str
    bits: float | None
    counts: tuple[int, ...]
    saved: int
    trained: bool


@dataclass
class Answer:
    """One side's answer as it comes into being. One thread writes it, others read.

    Times are `time.perf_counter` of the thread that generates, each taken when its token was there; None until then.
    """

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    began: float | None = None
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    shared: bool = False
    """Whether the other side was generating beside it: then the times are not its own."""
    cut: bool = False
    """Whether it was ended by its length."""

    @property
    def first_seconds(self) -> float | None:
        """From the question to the first token: picture and question read."""
        return None if self.began is None or self.first is None else self.first - self.began

    @property
    def seconds(self) -> float | None:
        """From the question to the end of the answer, or until now."""
        if self.began is None:
            return None
        return (time.perf_counter() if self.ended is None else self.ended) - self.began

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first, which pays for the prompt."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.last - self.first, 1e-9)


def load_side(model: str, device: str = "auto") -> Side:
    """A model as it will be compared.

    Raises:
        FourierError: there is no such model, or it cannot be loaded, or cannot be asked.
    """
    folder = resolve_model(model)
    loaded, processor = load(folder, device)
    check_chat_template(processor, model)
    check_sees(processor, model)
    compressed = (read_config(folder).get("quantization_config") or {}).get("quant_method") == QUANT_METHOD
    module = visual_tokens_of(loaded)
    counts: tuple[int, ...]
    try:
        counts = module.counts if module else tuple(h * w for h, w in nested_grids(grid_of(loaded.config)))
    except FourierError:  # a family without a grid that is known: no choice
        counts = ()
    given = Path(model).expanduser()
    return Side(
        name=given.resolve().name if given.is_dir() else model,
        model=loaded,
        processor=processor,
        disk_bytes=sum(path.stat().st_size for path in weight_files(folder)),
        memory_bytes=_memory(loaded),
        dtype=str(loaded.dtype).removeprefix("torch."),
        bits=inspect_model(folder).bits_per_weight if compressed else None,
        counts=tuple(sorted(counts)),
        saved=module.tokens if module else max(counts, default=0),
        trained=module is not None and module.kind != "pooling",
    )


def chosen_counts(sides: Sequence[Side], places: Sequence[int]) -> tuple[int | None, int | None]:
    """Numbers of visual tokens: one a side, None where it has no choice.

    Args:
        sides: the two.
        places: an index into ``counts`` for each side that has a choice, in their order.
    """
    left = iter(places)
    first, second = (side.counts[next(left)] if len(side.counts) > 1 else None for side in sides)
    return first, second


def _memory(model: torch.nn.Module) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


@torch.inference_mode()
def generate(
    side: Side,
    picture: Image.Image,
    question: str,
    answer: Answer,
    *,
    max_new_tokens: int,
    visual_tokens: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Answer a question greedily, into ``answer``, token by token. One at a time a side.

    Args:
        side: who answers.
        picture, question: what is asked.
        answer: filled as tokens come; its clock starts before the picture is read.
        max_new_tokens: where the answer is cut off.
        visual_tokens: one of ``side.counts``; as many as the model was saved with if None.
        stopped: asked after every token; where it says yes, the answer ends as it is.

    Raises:
        FourierError: a number of visual tokens the model has not, or a prompt longer than its context.
    """
    model, processor = side.model, side.processor
    if side.counts:
        set_visual_tokens(model, visual_tokens or side.saved, processor)
    elif visual_tokens is not None:
        raise FourierError("this model has no choice of visual tokens", where=side.name)
    answer.began = time.perf_counter()
    try:
        inputs = inputs_of(model, processor, [[picture]], [prompt(processor, 1, question)])
        ids = inputs["input_ids"]
        answer.prompt_tokens = ids.shape[-1]
        answer.visual_tokens = int((ids == model.config.image_token_id).sum())
        limit = min(max_new_tokens, room(model, inputs, side.name, fewer=bool(side.counts)))
        tokenizer = getattr(processor, "tokenizer", processor)
        written = model.generate(
            **inputs,
            max_new_tokens=limit,
            do_sample=False,
            streamer=_Writer(tokenizer, answer),
            stopping_criteria=StoppingCriteriaList([_Clock(answer, stopped)]),
        )
        ends = model.generation_config.eos_token_id
        answer.cut = answer.tokens >= limit and int(written[0, -1]) not in (ends if isinstance(ends, list) else [ends])
    finally:
        answer.ended = time.perf_counter()


class _Writer(TextStreamer):
    """Text as soon as it is certain."""

    def __init__(self, tokenizer: Any, answer: Answer) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answer = answer

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.answer.text += text


class _Clock(StoppingCriteria):
    """When each token was there, and whether anybody wants another."""

    def __init__(self, answer: Answer, stopped: Callable[[], bool]) -> None:
        self.answer, self.stopped = answer, stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        now, answer = time.perf_counter(), self.answer
        answer.first, answer.last, answer.tokens = answer.first or now, now, answer.tokens + 1
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)
