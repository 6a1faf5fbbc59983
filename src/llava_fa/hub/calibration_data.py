"""Calibration samples, images with question and answer, from a LLaVA JSON file, a dataset or an iterable.

What a sample becomes is decided by the model's own processor and chat template; a sample that cannot be read
is an error that names its row and file, since a silently skipped one would change the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image

from llava_fa.errors import FourierError, explained
from llava_fa.hub.shards import tensor_bytes

Sample: TypeAlias = "tuple[Any, str, str] | Sequence[Mapping[str, Any]]"
"""``(image, question, answer)``, or chat messages with image parts ``{"type": "image", "image": image}``.

An image is a PIL image or a path.
"""


@dataclasses.dataclass(frozen=True)
class SampleSource:
    """Samples by name, read anew whenever they are iterated.

    Args:
        name, images, count, seed: as for `read_samples`.
        draw: (count, seed) → samples, for a source that is no file and no dataset.
    """

    name: str
    images: Path | None = None
    count: int = 128
    seed: int = 0
    draw: Callable[[int, int], Iterable[Sample]] | None = dataclasses.field(default=None, repr=False)

    def __iter__(self) -> Iterator[Sample]:
        if self.draw is not None:
            return iter(self.draw(self.count, self.seed))
        return iter(read_samples(self.name, images=self.images, count=self.count, seed=self.seed))


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_QUESTION = ("question", "query", "prompt", "instruction")
_ANSWER = ("answer", "multiple_choice_answer", "answers", "response", "label", "caption", "output", "text")


def read_samples(source: str, *, images: Path | None = None, count: int = 128, seed: int = 0) -> list[Sample]:
    """Samples from a LLaVA JSON or JSON-lines file, or from a Hugging Face dataset (folder or id).

    Args:
        source: a ``.json`` / ``.jsonl`` file with ``image`` and ``conversations`` in each row, or a dataset.
        images: folder of the images; the JSON file's own folder where not given.
        count: how many to draw; all when there are fewer.
        seed: of the draw.

    Raises:
        FourierError: unreadable file, row or image, with row number and file name.
    """
    if count < 1:
        raise FourierError(f"{count} calibration samples", remedy="Give at least 1")
    path = llava_file(source, images)
    if path is None:
        return _dataset(source, count, seed)
    rows, folder = llava_rows(path, images)
    with_image = [index for index, row in enumerate(rows) if row.get("image")]
    if not with_image:
        raise FourierError("no row has an image", remedy='Each row needs "image" and "conversations"', where=str(path))
    return [conversation(rows[i], folder, f"{path.name} row {i}") for i in draw(with_image, count, seed)]


def llava_file(source: str, images: Path | None) -> Path | None:
    """The path of a LLaVA JSON or JSON-lines file, None for a dataset.

    Raises:
        FourierError: a dataset with an image folder beside it.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in (".json", ".jsonl"):
        return path
    if images is not None:
        raise FourierError("an image folder goes with a LLaVA JSON file", remedy="Leave it out", where=source)
    return None


def llava_rows(path: Path, images: Path | None = None) -> tuple[list[dict[str, Any]], Path]:
    """All rows of a LLaVA-format JSON or JSON-lines file, and the folder of their images.

    Raises:
        FourierError: no such file or folder, or not a list of objects.
    """
    if not path.is_file():
        raise FourierError("no such file", remedy="Give a LLaVA-format JSON file", where=str(path))
    with explained("it is not JSON", remedy="Check the file", where=str(path), kinds=(ValueError,), words=str):
        text = path.read_text(encoding="utf-8")
        lines = path.suffix.lower() == ".jsonl"
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FourierError(
            "it is not a list of objects",
            remedy='Each row needs "image" and "conversations"',
            where=str(path),
        )
    folder = path.parent if images is None else images
    if not folder.is_dir():
        raise FourierError("no such image folder", remedy="Give the folder of the images", where=str(folder))
    return rows, folder


def draw(indices: Sequence[int], count: int, seed: int) -> list[int]:
    """``count`` of the indices, in their order; all where there are fewer."""
    return sorted(random.Random(seed).sample(list(indices), min(count, len(indices))))


def conversation(row: Mapping[str, Any], folder: Path, where: str) -> Sample:
    """The chat messages of one LLaVA row, its images opened; a row without ``image`` is text alone.

    Raises:
        FourierError: an image that is missing or cannot be read, or turns that are not as LLaVA has them.
    """
    named = row.get("image") or []
    names = named if isinstance(named, list) else [named]
    waiting: list[Any] = [open_image(folder / str(name), where) for name in names]
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise FourierError('it has no "conversations"', remedy="Add them, or remove the row", where=where)
    messages: list[Mapping[str, Any]] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("from", turn.get("role"))) if isinstance(turn, dict) else "")
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise FourierError(
                f"a turn is {turn!r}", remedy='Each needs "from" (human or gpt) and "value"', where=where
            )
        parts: list[dict[str, Any]] = []
        for _ in range(text.count("<image>")):
            if not waiting:
                raise FourierError("it has more <image> marks than images", remedy="Mend the row", where=where)
            parts.append({"type": "image", "image": waiting.pop(0)})
        messages.append({"role": role, "content": [*parts, _text(text.replace("<image>", "").strip())]})
    if waiting:  # LLaVA puts an unmarked image in front of the first question
        messages[0]["content"][:0] = [{"type": "image", "image": image} for image in waiting]
    return messages


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def open_image(image: Any, where: str = "") -> Image.Image:
    """A PIL image, or the path of one, as RGB; decoded now, so that an error comes now and names the file."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        what = f"image {image} does not exist"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = f"image {image} cannot be read ({type(error).__name__}: {error})"
    raise FourierError(what, remedy="Mend or remove it", where=where)


def dataset_split(source: str, *, streaming: bool) -> Any:
    """The training split (or the first) of a Hugging Face dataset, saved in a folder or on the hub.

    Raises:
        FourierError: the package `datasets` is not installed.
    """
    with explained(
        "reading a Hugging Face dataset needs the package `datasets`",
        remedy="`pip install datasets`, or give a LLaVA-format .json file",
        where=source,
        kinds=(ImportError,),
        words=None,
    ):
        import datasets
    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(source)
    else:
        data = datasets.load_dataset(source, streaming=streaming)
    return data["train" if "train" in data else next(iter(data))] if hasattr(data, "keys") else data


def _dataset(source: str, count: int, seed: int) -> list[Sample]:
    samples: list[Sample] = []
    what, remedy = "the dataset cannot be read", "Check its name, the network, and that its images decode"
    with explained(what, remedy=remedy, where=source):
        split = dataset_split(source, streaming=True)
        buffered = {} if hasattr(split, "__len__") else {"buffer_size": max(1000, count)}
        reader = iter(split.shuffle(seed=seed, **buffered))
    for index in range(count):
        where = f"{source} sample {index}"
        with explained(what, remedy=remedy, where=where):
            row = next(reader, None)
            if row is None:
                break
            samples.append(dataset_row(row, where))
    if not samples:
        raise FourierError("the dataset is empty", remedy="Give another one", where=source)
    return samples


def dataset_row(row: Mapping[str, Any], where: str) -> Sample:
    """A sample from one row of a Hugging Face dataset, by the names that such datasets give their columns.

    Raises:
        FourierError: no image, or neither question nor answer.
    """
    images = row.get("image", row.get("images"))
    images = images if isinstance(images, list) else [images]
    question = next((row[key] for key in _QUESTION if row.get(key)), None)
    answer = next((row[key] for key in _ANSWER if row.get(key)), None)
    if isinstance(row.get("conversations"), list) and images[0] is not None:
        return conversation({**row, "image": images}, Path(), where)
    if isinstance(row.get("texts"), list) and row["texts"]:  # the_cauldron
        question, answer = row["texts"][0].get("user"), row["texts"][0].get("assistant")
    if isinstance(answer, list):
        answer = answer[0]
    if isinstance(answer, Mapping):
        answer = answer.get("answer", next(iter(answer.values()), None))
    if images[0] is None or (question is None and answer is None):
        raise FourierError(
            f"no image with a question or answer among its columns {sorted(row)}",
            remedy='Give a dataset with "image" and "question"/"answer", "texts" or "conversations"',
            where=where,
        )
    return open_image(images[0], where), str(question or "Describe the image."), str(answer or "")


def prepare(samples: Iterable[Sample], processor: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs, one sample each (batch of 1: no padding that would enter a statistic)."""
    for index, sample in enumerate(samples):
        where = f"calibration sample {index}"
        messages, images = chat_messages(sample, where)
        with explained(
            "the model's processor refuses it",
            remedy="Check the sample, and the processor files of the model",
            where=where,
        ):
            text = render(processor, messages)
            inputs = processor(images=images or None, text=[text], return_tensors="pt")
        yield {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def answer_start(sample: Sample, inputs: Mapping[str, torch.Tensor], processor: Any) -> int:
    """Position of the first token of the last answer in a prepared sample.

    Found by preparing the sample without it; where the tokens of that are no prefix (a template that rewrites earlier
    turns) or the sample ends with a question, it is the first token after the images, or else the second token.
    """
    ids = inputs["input_ids"][0]
    messages, images = chat_messages(sample, "calibration sample")
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        text = render(processor, messages[:-1], add_generation_prompt=True)
        prompt = processor(images=images or None, text=[text], return_tensors="pt")["input_ids"][0]
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
        parts = [f"{mark}\n" if part["type"] == "image" else part["text"] for part in message["content"]]
        turns.append(f"{message['role'].upper()}: {''.join(parts)}")
    return " ".join([*turns, "ASSISTANT:"] if add_generation_prompt else turns)


def chat_messages(sample: Any, where: str) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A sample as chat messages with the images taken out of them, opened, in order.

    Raises:
        FourierError: it is no sample, or an image cannot be read.
    """
    if isinstance(sample, tuple) and len(sample) == 3:
        image, question, answer = sample
        ask = [{"type": "image", "image": image}, _text(str(question))]
        sample = [{"role": "user", "content": ask}, {"role": "assistant", "content": [_text(str(answer))]}]
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    try:
        for message in sample:
            content = message["content"]
            parts = []
            for part in [_text(content)] if isinstance(content, str) else content:
                if part["type"] == "image":
                    images.append(open_image(part["image"], where))
                    parts.append({"type": "image"})
                else:
                    parts.append(_text(part["text"]))
            messages.append({"role": message["role"], "content": parts})
    except (KeyError, TypeError, AttributeError):
        raise FourierError(
            f"it is {type(sample).__name__}, not (image, question, answer) or chat messages",
            remedy="See llava_fa.compress",
            where=where,
        ) from None
    return messages, images


def fingerprint(inputs: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 of prepared samples: the same samples give the same compressed model."""
    digest = hashlib.sha256()
    for tensors in inputs:
        for name in sorted(tensors):
            digest.update(f"{name}{tensors[name].dtype}{list(tensors[name].shape)}".encode())
            digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
