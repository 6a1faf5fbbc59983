"""Calibration samples as the model's inputs.

What a sample becomes is decided by the model's own processor and chat template (of a model that reads text alone, its
text; the pictures are left out); a sample that cannot be used
is an error that names its row, or, where that was asked for, gives its place to the next and is listed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from llava_fa.data.rows import SampleSource, candidates
from llava_fa.data.samples import Sample, chat_messages
from llava_fa.errors import FourierError, explained
from llava_fa.hub.processor import pictures_for
from llava_fa.hub.shards import tensor_bytes

MEND = "Mend or remove the row"
"""What to do about a sample that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Samples, what the processor made of each, and the places of those that could not be used."""

    samples: list[Sample]
    inputs: list[dict[str, torch.Tensor]]
    left_out: list[str]


def prepare_all(
    samples: Iterable[Sample], processor: Any, most: int, *, skip_bad_rows: bool = False, asks: bool = False
) -> Prepared:
    """Every sample opened and prepared; of a `SampleSource` as many as it names.

    Args:
        samples: of any kind.
        processor: the model's.
        most: tokens that the model takes.
        skip_bad_rows: leave out what cannot be used and go on with the next, a source's rows beyond its draw included.
        asks: prepare them up to where the model's answer begins.

    Raises:
        FourierError: a sample that cannot be used; or none can.
    """
    found = Prepared([], [], [])
    count = samples.count if isinstance(samples, SampleSource) else None
    failed: FourierError | None = None
    for candidate in candidates(samples):
        if len(found.samples) == count:
            break
        try:
            sample = candidate.open()
            inputs = _prepared(sample, processor, candidate.where, asks)
            check_length(inputs, most, candidate.where)
        except FourierError as error:
            if not skip_bad_rows:
                raise or_skip(error) from error
            failed = error
            found.left_out.append(candidate.where)
        else:
            found.samples.append(sample)
            found.inputs.append(inputs)
    if not found.samples:
        if failed is not None:
            raise FourierError(f"no row can be used ({failed})", remedy="Mend the data") from failed
        raise FourierError("there are no calibration samples", remedy="Give some, or None for no calibration")
    return found


def prepare(samples: Iterable[Sample], processor: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs, one sample each (batch of 1: no padding that would enter a statistic)."""
    for candidate in candidates(samples):
        yield _prepared(candidate.open(), processor, candidate.where)


def _prepared(sample: Sample, processor: Any, where: str, asks: bool = False) -> dict[str, torch.Tensor]:
    messages, images = chat_messages(sample, where)
    with explained(
        "the model's processor refuses it",
        remedy="Check the sample, and the processor files of the model",
        where=where,
    ):
        text = render(processor, messages, add_generation_prompt=asks)
        inputs = processor(images=pictures_for(processor, images), text=[text], return_tensors="pt")
    return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def check_length(inputs: Mapping[str, torch.Tensor], most: int, where: str) -> None:
    """`FourierError` for a prepared sample that the model has no room for, before it sees it."""
    length = inputs["input_ids"].shape[-1]
    if length > most:
        raise FourierError(f"it has {length} tokens, and there is room for {most}", remedy=MEND, where=where)


def or_skip(error: FourierError) -> FourierError:
    """The error of one row, with the other way to deal with it."""
    return FourierError(error.what, remedy=f"{error.remedy or MEND}, or give --skip-bad-rows", where=error.where)


def answer_start(sample: Sample, inputs: Mapping[str, torch.Tensor], processor: Any) -> int:
    """Position of the first token of the last answer in a prepared sample.

    Found by preparing the sample without it; where the tokens of that are no prefix (a template that rewrites earlier
    turns) or the sample ends with a question, it is the first token after the images, or else the second token.
    """
    ids = inputs["input_ids"][0]
    messages, images = chat_messages(sample, "calibration sample")
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        text = render(processor, messages[:-1], add_generation_prompt=True)
        shown = pictures_for(processor, images)
        prompt = processor(images=shown, text=[text], return_tensors="pt")["input_ids"][0]
        if len(prompt) < len(ids) and torch.equal(ids[: len(prompt)], prompt):
            return len(prompt)
    images_at = (ids == getattr(processor, "image_token_id", -1)).nonzero()
    start = int(images_at.max()) + 1 if len(images_at) else 1
    return start if start < len(ids) else 1


def render(processor: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Chat messages as the text that the model was trained on: its chat template, or LLaVA's first one."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    mark = getattr(processor, "image_token", "<image>")
    turns = []
    for message in messages:
        parts = [(mark and f"{mark}\n") if part["type"] == "image" else part["text"] for part in message["content"]]
        turns.append(f"{message['role'].upper()}: {''.join(parts)}")
    return " ".join([*turns, "ASSISTANT:"] if add_generation_prompt else turns)


def fingerprint(inputs: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 of prepared samples: the same samples give the same compressed model."""
    digest = hashlib.sha256()
    for tensors in inputs:
        for name in sorted(tensors):
            digest.update(f"{name}{tensors[name].dtype}{list(tensors[name].shape)}".encode())
            digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
