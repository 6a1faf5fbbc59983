"""Samples: pictures with what is asked and answered, as chat messages, from whatever shape a row has.

A row is what a LLaVA-format file or a Hugging Face dataset holds; both become the same sample, for calibration and for
training. A row that cannot be read is an error that names it: what is left out in silence changes the result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from llava_fa.data.pictures import open_picture
from llava_fa.errors import FourierError, shown

Sample: TypeAlias = "tuple[Any, str, str] | Sequence[Mapping[str, Any]]"
"""``(image, question, answer)``, or chat messages with image parts ``{"type": "image", "image": image}``.

An image is whatever `data.pictures.open_picture` takes: a path, a PIL image, encoded bytes.
"""

MARK = "<image>"
"""What stands for a picture in the text of a row or a question; transformers' name for it in LLaVA's prompts."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_QUESTION = ("question", "questions", "query", "prompt", "instruction")
_ANSWER = ("answer", "multiple_choice_answer", "answers", "response", "label", "caption", "output", "text")
_MEND = "Mend or remove the row"
_COLUMNS = 'Give "image" or "images", and "conversations", "texts", or "question" and "answer"'


def sample_of(row: Mapping[str, Any], folder: Path, where: str) -> Sample:
    """The chat messages of a row, its pictures opened; a row without a picture is text alone.

    Pictures are in ``image`` or ``images``, or in numbered columns (``image_1``, ``image_2``, …); what is said in
    ``conversations`` (LLaVA), in ``texts`` (the_cauldron), each with several turns, or in a question and an answer by
    the names that datasets give these columns. Of several answers to one question, which are alternatives, the most
    frequent is taken, and of equally frequent ones the first; where questions are a list, answers are one each. An
    answer of 0 or False is an answer.

    Args:
        row: of a JSON file or of a dataset.
        folder: that pictures given as relative paths lie in.
        where: the row's place, for errors.

    Raises:
        FourierError: a picture that is missing or cannot be read, or neither turns nor a question.
    """
    pictures = [open_picture(_in_folder(picture, folder), where) for picture in _pictures(row, where)]
    return _messages(_turns(row, bool(pictures), where), pictures, where)


def _in_folder(picture: Any, folder: Path) -> Any:
    if isinstance(picture, Mapping) and picture.get("bytes") is None and picture.get("path") is not None:
        picture = picture["path"]
    return folder / picture if isinstance(picture, str) else picture


def _pictures(row: Mapping[str, Any], where: str) -> list[Any]:
    """The pictures of a row, not opened, in their order."""
    numbered = [(name, name.removeprefix("image").removeprefix("_")) for name in row if name.startswith("image")]
    columns = [name for _, name in sorted((int(rest), name) for name, rest in numbered if rest.isdecimal())]
    for names in (("image",), ("images",), columns):
        values = [row[name] for name in names if name in row]
        found = [picture for value in values for picture in (value if isinstance(value, list) else [value])]
        if found := [picture for picture in found if not _is_missing(picture)]:
            return found
    if unknown := sorted(name for name, value in row.items() if _is_picture(value)):
        what = f"its pictures are in {', '.join(unknown)}, which is not where they are looked for"
        raise FourierError(what, remedy=_COLUMNS, where=where)
    return []


def _is_missing(value: Any) -> bool:
    """Whether a cell holds nothing. 0 and False are something."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return value.get("bytes") is None and value.get("path") is None
    if isinstance(value, float) and math.isnan(value):  # what pandas makes of an empty cell
        return True
    return value is None or (isinstance(value, (str, list, Mapping)) and not value)


def _is_picture(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, (Image.Image, bytes)) or (isinstance(first, Mapping) and set(first) == {"bytes", "path"})


def _said(value: Any, where: str) -> str:
    """A cell as text: words or a number; whatever else it holds was not meant to be read out."""
    if isinstance(value, (bytes, Image.Image, Mapping, list, tuple)):
        raise FourierError(f"{shown(value)} is no text", remedy=_MEND, where=where)
    return str(value)


def _turns(row: Mapping[str, Any], has_picture: bool, where: str) -> list[tuple[str, str]]:
    """(role, text) of everything that is said."""
    if conversation := _objects(row.get("conversations"), where):
        return [_turn(turn, where) for turn in conversation]
    if texts := _objects(row.get("texts"), where):  # the_cauldron
        pairs = [(pair.get("user"), pair.get("assistant")) for pair in texts]
    else:
        questions = next((row[name] for name in _QUESTION if not _is_missing(row.get(name))), None)
        answers = next((row[name] for name in _ANSWER if _answer(row.get(name), where) is not None), None)
        pairs = _pairs(questions, answers, where)
    turns: list[tuple[str, str]] = []
    for question, given in pairs:
        answer = _answer(given, where)
        if _is_missing(question) and (answer is None or not has_picture):
            what = f'it has no "conversations" and no question (its columns are {shown(sorted(map(str, row)), 200)})'
            raise FourierError(what, remedy=_COLUMNS, where=where)
        turns.append(("user", "Describe the image." if _is_missing(question) else _said(question, where)))
        turns += [] if answer is None else [("assistant", answer)]
    return turns


def _pairs(questions: Any, answers: Any, where: str) -> list[tuple[Any, Any]]:
    if not isinstance(questions, list):
        return [(questions, answers)]
    if not isinstance(answers, list) or len(answers) != len(questions):
        count = len(answers) if isinstance(answers, list) else 1
        raise FourierError(f"it has {len(questions)} questions and {count} answers", remedy=_MEND, where=where)
    return list(zip(questions, answers, strict=True))


def _objects(value: Any, where: str) -> list[Any]:
    """A list of objects, which datasets may keep as an object of lists; empty where the cell is."""
    if _is_missing(value):
        return []
    if isinstance(value, Mapping):
        lists = {name: items for name, items in value.items() if isinstance(items, list)}
        if not lists or len({len(items) for items in lists.values()}) != 1:
            raise FourierError(f"its turns are {shown(value)}", remedy=_MEND, where=where)
        return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, Mapping):
            raise FourierError(f"a turn is {shown(item)}", remedy=_MEND, where=where)
    return value


def _turn(turn: Mapping[str, Any], where: str) -> tuple[str, str]:
    role = _ROLES.get(str(turn.get("from", turn.get("role"))))
    text = turn.get("value", turn.get("content"))
    if role is None or not isinstance(text, str):
        remedy = 'Each needs "from" (human or gpt) and "value"'
        raise FourierError(f"a turn is {shown(turn)}", remedy=remedy, where=where)
    return role, text


def _answer(value: Any, where: str) -> str | None:
    """An answer as text, None where there is none; the most frequent of alternatives, the first of equals."""
    if _is_missing(value):
        return None
    if isinstance(value, Mapping):
        return _answer(value.get("answer", next(iter(value.values()))), where)
    if isinstance(value, (list, tuple)):
        given = [text for one in value if (text := _answer(one, where)) is not None]
        return Counter(given).most_common(1)[0][0] if given else None
    return _said(value, where)


def split_at_marks(text: str) -> list[str]:
    """What a text says before, between and after its `MARK` s, the space around them left to the chat template."""
    return [part.strip() for part in text.split(MARK)]


def _messages(turns: Sequence[tuple[str, str]], pictures: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Turns as chat messages: every picture where its mark stands; those without one before the first question."""
    waiting = list(pictures)
    marks = sum(text.count(MARK) for _, text in turns)
    if marks > len(waiting):
        raise FourierError("it has more <image> marks than images", remedy=_MEND, where=where)
    unmarked = [waiting.pop(0) for _ in range(len(waiting) - marks)]  # as LLaVA does
    messages: list[dict[str, Any]] = []
    for role, text in turns:
        parts: list[dict[str, Any]] = []
        if role == "user" and unmarked:
            parts, unmarked = [_image(picture) for picture in unmarked], []
        for number, said in enumerate(split_at_marks(text)):
            parts += [_image(waiting.pop(0))] if number else []
            parts += [_text(said)] if said else []
        messages.append({"role": role, "content": parts or [_text("")]})
    if unmarked:
        raise FourierError("it has images, and nobody asks about them", remedy=_MEND, where=where)
    return messages


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(picture: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture}


def chat_messages(sample: Any, where: str) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A sample as chat messages with the images taken out of them, opened, in order.

    Raises:
        FourierError: it is no sample, or an image cannot be read.
    """
    if isinstance(sample, tuple) and len(sample) == 3:
        image, question, answer = sample
        ask = [_image(image), _text(str(question))]
        sample = [{"role": "user", "content": ask}, {"role": "assistant", "content": [_text(str(answer))]}]
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    try:
        for message in sample:
            content = message["content"]
            parts = []
            for part in [_text(content)] if isinstance(content, str) else content:
                if part["type"] == "image":
                    images.append(open_picture(part["image"], where))
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
