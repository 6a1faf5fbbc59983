"""Training samples: LLaVA-format JSON, Hugging Face datasets or samples in memory, as the model's inputs and labels.

A row is read when its turn comes. One that cannot be used stops the run with its number, or, when that was asked for,
is replaced by the next and counted: nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_fa.data.rows import Rows, SampleSource
from llava_fa.data.samples import Sample, chat_messages
from llava_fa.errors import FourierError, explained, located
from llava_fa.hub.calibration_data import MEND, check_length, or_skip, render
from llava_fa.hub.processor import pictures_for
from llava_fa.train.loss import IGNORED
from llava_fa.train.settings import TrainingSettings

ROWS_LEFT_OUT = "rows_left_out"
"""Key of a batch's inputs that lists the rows that could not be used."""

DataFactory = Callable[[Any, int], Any]
"""(processor, most tokens a sample may have) → map-style dataset whose items `Collator` takes."""

_BY_ANSWER = ("teacher_log_p", "teacher_ids")
"""Entries with a row for every answer token, in the order of the labels."""


class Conversations(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as the model's inputs with ``labels``: every assistant's turn is learnt, end mark included.

    Args:
        samples: `Rows`, or any sequence of samples (see `llava_fa.compress`).
        processor: the model's.
        max_length: tokens a sample may have.
        skip_bad_rows: replace a sample that cannot be used by the next, and list it under `ROWS_LEFT_OUT`.
    """

    def __init__(
        self, samples: Sequence[Sample], processor: Any, *, max_length: int, skip_bad_rows: bool = False
    ) -> None:
        if not len(samples):
            raise FourierError("there are no training samples", remedy="Give some")
        self.samples, self.processor = samples, processor
        self.max_length, self.skip_bad_rows = max_length, skip_bad_rows

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):  # so that a loop over the samples ends
            raise IndexError(index)
        left_out: list[int] = []
        while True:
            row = (index + len(left_out)) % len(self)
            try:
                item = self._item(row)
            except FourierError as error:
                if not self.skip_bad_rows:
                    raise or_skip(error) from error
                left_out.append(row)
                if len(left_out) == len(self):
                    raise FourierError(f"no row can be used ({error})", remedy="Mend the data") from error
            else:
                return {**item, ROWS_LEFT_OUT: left_out}

    def _item(self, index: int) -> dict[str, Tensor]:
        where = self.samples.where(index) if isinstance(self.samples, Rows) else f"sample {index}"
        messages, images = chat_messages(self.samples[index], where)
        with located(where), explained("the model's processor refuses it", remedy=MEND):
            inputs = encode(self.processor, messages, images)
        check_length(inputs, self.max_length, where)
        if not bool((inputs["labels"] != IGNORED).any()):
            raise FourierError("it has no answer", remedy=MEND, where=where)
        return inputs


def training_data(samples: Iterable[Sample], settings: TrainingSettings, count: int | None = None) -> DataFactory:
    """`Conversations` of these samples; of a file or dataset by name, ``count`` of its rows, or all."""

    def make(processor: Any, max_length: int) -> Conversations:
        rows: Sequence[Sample]
        if isinstance(samples, SampleSource) and samples.draw is None:
            rows = Rows(samples.name, images=samples.images, count=count, seed=settings.seed)
        else:
            rows = list(samples)
        return Conversations(rows, processor, max_length=max_length, skip_bad_rows=settings.skip_bad_rows)

    return make


def encode(processor: Any, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> dict[str, Tensor]:
    """One conversation as the model's inputs, with ``labels`` (not shifted) on what the assistant says.

    Where an answer lies is found in the text and carried over to the tokens: those that the processor puts in the
    place of pictures are skipped, all others are the tokenizer's own.

    Raises:
        FourierError: the processor changes the text beyond its pictures; the tokenizer cannot tell where tokens lie.
    """
    tokenizer = processor.tokenizer
    text, spans = _with_spans(processor, messages)
    inputs = dict(processor(images=pictures_for(processor, images), text=[text], return_tensors="pt"))
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if not getattr(tokenizer, "is_fast", False):
        raise FourierError("its tokenizer cannot tell where tokens lie", remedy="Use a model with a fast tokenizer")
    plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=True)
    mark = getattr(processor, "image_token_id", None)
    ids = inputs["input_ids"][0]
    places = (ids != mark).nonzero()[:, 0].tolist() if mark is not None else list(range(len(ids)))
    text_tokens = [i for i, token in enumerate(plain["input_ids"]) if token != mark]
    if [plain["input_ids"][i] for i in text_tokens] != ids[places].tolist():
        raise FourierError("its processor changes the text around pictures", remedy="Use another model family")
    labels = torch.full_like(ids, IGNORED)
    for place, i in zip(places, text_tokens, strict=True):
        start, end = plain["offset_mapping"][i]
        if end > start and any(first <= start and end <= last for first, last in spans):
            labels[place] = ids[place]
    return {**inputs, "labels": labels[None]}


def _with_spans(processor: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text and where in it the assistant speaks, end-of-turn marks included."""
    text = render(processor, messages)
    end_token = processor.tokenizer.eos_token
    spans, searched = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        said = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        before = render(processor, messages[:number], add_generation_prompt=True)
        after = render(processor, messages[: number + 1])
        if text.startswith(before) and text.startswith(after):
            start, end = len(before), len(after)
        elif (start := text.find(said, searched)) >= 0:  # a template that rewrites earlier turns
            end = start + len(said)
        else:
            raise FourierError("its chat template drops an answer", remedy="Split the conversation into shorter ones")
        spans.append((start, end))
        searched = end
    if spans and end_token and spans[-1][1] == len(text) and not text.rstrip().endswith(end_token):
        text = text.rstrip() + end_token  # a model must learn to stop
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


class Collator:
    """Samples → batch: tokens padded to the longest, on the right; pictures one after the other.

    A two-dimensional ``attention_mask`` (who sees whom, bool [length, length]) becomes an additive float one for the
    model, [batch, 1, length, length].
    """

    def __init__(self, pad_token_id: int) -> None:
        self.fill = {"input_ids": pad_token_id, "labels": IGNORED}

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of samples as datasets give them."""
        batch: dict[str, Any] = {}
        length = max(item["input_ids"].shape[-1] for item in items)
        for name in dict.fromkeys(name for item in items for name in item):
            values = [item[name] for item in items if name in item]
            if name == ROWS_LEFT_OUT:
                batch[name] = sorted({row for rows in values for row in rows})
            elif name == "attention_mask" and values[0].ndim == 2 and values[0].shape[0] == values[0].shape[1] > 1:
                batch[name] = _additive(values, length)
            elif name in _BY_ANSWER:
                batch[name] = torch.cat(values)
            elif all(len(values) == len(items) and _row(v).shape == _row(item["input_ids"]).shape
                     for v, item in zip(values, items, strict=False)):  # fmt: skip
                rows = [_row(value) for value in values]
                batch[name] = pad_sequence(rows, batch_first=True, padding_value=self.fill.get(name, 0))
            else:
                largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
                batch[name] = torch.cat([_padded(v, (v.shape[0], *largest), 0) for v in values])
        return batch


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors moved."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _row(value: Tensor) -> Tensor:
    """[1, L] or [L] → [L]; anything else as it is."""
    return value[0] if value.ndim == 2 and value.shape[0] == 1 else value


def _padded(value: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    if tuple(value.shape) == shape:
        return value
    out = value.new_full(shape, fill)
    out[tuple(slice(size) for size in value.shape)] = value
    return out


def _additive(values: Sequence[Tensor], length: int) -> Tensor:
    out = torch.full((len(values), 1, length, length), float("-inf"))
    for row, value in zip(out, values, strict=True):
        row[0].fill_diagonal_(0)  # padding sees itself: a row without anything to see would be NaN
        row[0, : len(value), : len(value)].masked_fill_(value, 0)
    return out
