"""TextVQA, VizWiz-VQA and GQA: one short answer a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_fa.data.textfiles import read_json, read_rows
from llava_fa.errors import FourierError, shown
from llava_fa.eval.benchmarks.base import (
    SHORT,
    Benchmark,
    Item,
    Score,
    fields,
    score_alone,
    write_json,
)
from llava_fa.eval.metrics import vqa_accuracy

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
ARTICLES = frozenset(("a", "an", "the"))
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code passes a flag in the place of a count: no more than this many periods go."""
_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
"""


def _contractions() -> dict[str, str]:
    """Every form with one apostrophe left out → the form with all of them; the official table is this and one slip."""
    table = {"somebody'd": "somebodyd"}
    for word in _WITH_APOSTROPHE.split():
        for place in (match.start() for match in re.finditer("'", word)):
            table[word[:place] + word[place + 1 :]] = word
    return table


CONTRACTIONS = _contractions()


def clean_answer(text: str) -> str:
    """An answer as VQA's official evaluation compares it.

    Lower case; commas and question marks away; other punctuation away where it stands beside a space, else a space in
    its place; periods away except before a digit; articles away; number words up to ten as digits; apostrophes put back
    where they are often left out.

    Source: the answer processor of TextVQA's evaluation (Singh et al. 2019), after VQA's (Antol et al. 2015).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class VQA(Benchmark):
    """Questions with an answer of each of several annotators: VQA accuracy."""

    metric = "VQA accuracy"
    key: ClassVar[str]
    """The field by which the challenge's server knows a question."""

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """VQA accuracy; nothing where the file has no answers."""
        return score_alone(
            items,
            answers,
            self.metric,
            lambda _, text: clean_answer(text),
            lambda item, text: vqa_accuracy(text, item.expected, clean_answer),
        )

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """EvalAI's format; answers in the form in which they are compared, as LLaVA-1.5 sends them."""
        rows = [
            {self.key: item.row[self.key], "answer": clean_answer(text)}
            for item, text in zip(items, answers, strict=True)
        ]
        return [write_json(folder / f"{self.name}.json", rows)]


class TextVQA(VQA):
    """TextVQA's validation set (Singh et al. 2019): VQA accuracy over ten annotators, each left out in turn."""

    name = "textvqa"
    key = "question_id"
    files = (
        "TextVQA_0.5.1_val.json and train_images/ (val's pictures are there); with llava_textvqa_val_v051_ocr.jsonl of "
        "LLaVA's eval.zip beside them its prompts, which name OCR tokens"
    )

    def read(self) -> list[Item]:
        """One item a question; the prompts of LLaVA's own file where it is there."""
        path = self.first("TextVQA_*_val.json", "TextVQA_*_test.json")
        pictures = self.pictures_in("train_images", "test_images" if "test" in path.name else "val_images")
        prompts = self._prompts_with_tokens()
        items = []
        for number, row in enumerate(_rows_of(read_json(path), "data", path)):
            where = f"{path.name} row {number}"
            name, question, image = fields(row, ("question_id", "question", "image_id"), where)
            prompt = f"{question.capitalize()}\n{SHORT}"  # as in LLaVA's files
            if prompts is not None:
                key = (str(image), question.lower())
                if key not in prompts:
                    raise FourierError(
                        f"it has no prompt for question {shown(name)} ({shown(question)})",
                        remedy="Take the file of the same version of TextVQA, or leave it out",
                        where=str(self.folder / OCR_PROMPTS),
                    )
                prompt = prompts[key]
            items.append(Item(str(name), prompt, (pictures / f"{image}.jpg",), row.get("answers"), row=row))
        return items

    def _prompts_with_tokens(self) -> dict[tuple[str, str], str] | None:
        path = self.folder / OCR_PROMPTS
        if not path.exists():
            return None
        prompts = {}
        for number, row in enumerate(read_rows(path)):
            name, text = fields(row, ("question_id", "text"), f"{path.name} row {number}")
            lines = text.split("\n")
            asked = lines[1] if lines[0].startswith("Reference OCR token") else lines[0]
            prompts[str(name), asked.lower()] = text
        return prompts

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """VQA accuracy; also tells whether the prompts named OCR tokens."""
        scored = super().score(items, answers)
        scored.figures["ocr_tokens"] = any("Reference OCR token" in item.prompt for item in items)
        return scored


OCR_PROMPTS = "llava_textvqa_val_v051_ocr.jsonl"


class VizWiz(VQA):
    """VizWiz-VQA (Gurari et al. 2018): VQA accuracy; half of the questions of blind people cannot be answered."""

    name = "vizwiz"
    key = "image"
    files = "val.json and val/ (scored here), or test.json and test/ (scored by the challenge's server)"

    def read(self) -> list[Item]:
        """One item a picture; the validation set where its file is there, else the test set."""
        path = self.first("val.json", "[Aa]nnotations/val.json", "test.json", "[Aa]nnotations/test.json")
        pictures = self.pictures_in(path.stem, f"images/{path.stem}")
        items = []
        for number, row in enumerate(_rows_of(read_json(path), None, path)):
            image, question = fields(row, ("image", "question"), f"{path.name} row {number}")
            answers = row.get("answers")
            expected = [answer["answer"] for answer in answers] if answers is not None else None
            prompt = f"{question.capitalize()}\n{UNANSWERABLE}\n{SHORT}"  # as in LLaVA's llava_test.jsonl
            part = row.get("answer_type", "")
            items.append(Item(image, prompt, (pictures / image,), expected, part=part, row={"image": image}))
        return items


UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class GQA(Benchmark):
    """GQA's balanced testdev questions (Hudson and Manning 2019): exact match."""

    name = "gqa"
    metric = "accuracy"
    files = "testdev_balanced_questions.json (or val_…, test_…) and images/"

    def read(self) -> list[Item]:
        """One item a question; parts are the structural types."""
        splits = ("testdev", "val", "test")
        names = [f"{folder}{split}_balanced_questions.json" for split in splits for folder in ("", "questions*/")]
        path = self.first(*names)
        pictures = self.pictures_in("images", "allImages/images")
        questions = read_json(path)
        if not isinstance(questions, dict):
            raise FourierError("it is not a table of questions", remedy="Give the official file", where=str(path))
        items = []
        for name, row in questions.items():
            question, image = fields(row, ("question", "imageId"), f"{path.name} question {name}")
            part = row.get("types", {}).get("structural", "")
            picture = pictures / f"{image}.jpg"
            items.append(Item(name, f"{question}\n{SHORT}", (picture,), row.get("answer"), part=part, row=row))
        return items

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Exact match after lower case and without a last period, as LLaVA-1.5 hands answers to the official scorer."""
        scored = score_alone(items, answers, self.metric, lambda _, text: gqa_answer(text))
        if scored.units and all(item.part for item in items):
            for name, is_open in (("binary", False), ("open", True)):
                some = [scored.correct[item.id] or 0.0 for item in items if (item.part == "query") == is_open]
                if some:
                    scored.figures[name] = sum(some) / len(some)
        return scored

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """What the official ``eval.py`` reads."""
        rows = [
            {"questionId": item.id, "prediction": gqa_answer(text)} for item, text in zip(items, answers, strict=True)
        ]
        return [write_json(folder / "testdev_balanced_predictions.json", rows)]


def gqa_answer(text: str) -> str:
    """Lower case, without periods at the end."""
    return text.rstrip(".").lower()


def _rows_of(value: Any, key: str | None, path: Path) -> list[dict[str, Any]]:
    if key is not None:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        what = f"it has no list {key!r}" if key else "it is no list of questions"
        raise FourierError(what, remedy="Give the official file", where=str(path))
    return value
