"""MMHal-Bench: answers that a language model judges, at an address that the user names."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_fa.data.textfiles import read_json, read_log, read_text
from llava_fa.errors import FourierError
from llava_fa.eval.benchmarks.base import Benchmark, Item, Score, broken, fields, statistics_of, write_json
from llava_fa.eval.benchmarks.statistics import bootstrap, part
from llava_fa.eval.intervals import wilson

KEY = "OPENAI_API_KEY"
"""The environment variable that holds the judge's key, where it wants one."""
_TRIES = 4
_PATIENCE = 120.0
_REFUSED = 500
"""Statuses below this one will not get better by asking again, but for 429."""


def rating(review: str) -> int:
    """The one ``rating: 0`` to ``rating: 6`` that a review holds; 0 where it holds none, or several."""
    ratings = [number for number in range(7) if f"rating: {number}" in review.lower()]
    return ratings[0] if len(ratings) == 1 else 0


class MMHalBench(Benchmark):
    """MMHal-Bench (Sun et al. 2023): 96 questions of eight types, answers rated 0 to 6 by a judge.

    Options: ``judge``, the base URL of an OpenAI-compatible endpoint, and ``judge_model``; without them nothing is sent
    anywhere, and only the submission is written. ``reviews``, the file that keeps what the judge said.
    """

    name = "mmhal"
    metric = "mean rating, of 6"
    percent = False
    max_new_tokens = 1024
    files = (
        "response_template.json, images/ with the pictures that it links to, under their names; to have answers judged "
        "eval_gpt4.py too, whose template is read (not run)"
    )

    def asked_with(self) -> dict[str, Any]:
        """None: a judge may be named when all is answered."""
        return {}

    def read(self) -> list[Item]:
        """One item a row; parts are the question types."""
        path = self.first("response_template.json", "mmhal-bench_answer_template.json")
        rows = read_json(path)
        if not isinstance(rows, list):
            raise FourierError("it is no list of questions", remedy="Give the official file", where=str(path))
        pictures = self.pictures_in("images", ".")
        items = []
        for number, row in enumerate(rows):
            where = f"{path.name} row {number + 1}"
            names = ("question", "gt_answer", "image_src", "image_content", "question_type")
            question, answer, source, _, kind = fields(row, names, where)
            picture = pictures / source.rpartition("/")[2]
            items.append(Item(str(number), question, (picture,), answer, part=kind, row=row))
        if self.options.get("judge"):
            self.template = self._template()
        return items

    def _template(self) -> str:
        path = self.first("eval_gpt4.py", "eval_gpt_mmhal.py")
        try:
            tree = ast.parse(read_text(path))
        except SyntaxError as error:
            raise broken(f"it is not Python ({error.msg})", path) from None
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "template"
                and isinstance(node.value, ast.Constant)
                and str(node.value.value).count("{}") == 4
            ):
                return str(node.value.value)
        raise FourierError("it has no template with four places", remedy="Give the official file", where=str(path))

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Mean rating, and the share of ratings below 3, which count as hallucinations."""
        if not self.options.get("judge"):
            return Score({}, {}, dict.fromkeys(item.id for item in items), [], statistics_of([]))
        reviews = []
        for item, text in zip(items, answers, strict=True):
            reviews.append(self._review(item, text))
            self.progress(len(reviews), len(items))
        ratings = [rating(review) for review in reviews]
        bad = sum(number < 3 for number in ratings)
        parts = {}
        for kind in dict.fromkeys(item.part for item in items):
            some = [number / 6 for item, number in zip(items, ratings, strict=True) if item.part == kind]
            ends = bootstrap(statistics_of(some), self.headline)
            parts[kind] = part(sum(some) / len(some), "mean rating / 6", ends, len(some))
        figures = {
            "judge": self.options["judge_model"],
            "score": sum(ratings) / len(ratings),
            "hallucination_rate": bad / len(ratings),
            "hallucination_rate_interval": list(wilson(bad, len(ratings))),
        }
        correct: dict[str, float | None] = {item.id: n / 6 for item, n in zip(items, ratings, strict=True)}
        read = dict(zip(correct, reviews, strict=True))
        return Score(figures, parts, correct, list(correct), statistics_of(ratings), read)

    def headline(self, sums: np.ndarray) -> np.ndarray:
        """The mean rating."""
        mean: np.ndarray = sums[..., 0] / np.maximum(sums[..., 1], 1)
        return mean

    def _review(self, item: Item, text: str) -> str:
        """What the judge says of an answer; asked once, then read from the file of reviews."""
        content = ", ".join(item.row["image_content"])
        prompt = self.template.format(content, item.prompt, item.expected, text)
        key = hashlib.sha256(f"{self.options['judge_model']}\n{prompt}".encode()).hexdigest()
        if key not in self._reviews:
            self._reviews[key] = ask(self.options["judge"], self.options["judge_model"], prompt)
            path = self.options.get("reviews")
            if path is not None:
                with Path(path).open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": key, "id": item.id, "review": self._reviews[key]}) + "\n")
        return self._reviews[key]

    @functools.cached_property
    def _reviews(self) -> dict[str, str]:
        path = self.options.get("reviews")
        rows = read_log(Path(path)) if path else []
        try:
            return {row["key"]: row["review"] for row in rows}
        except (KeyError, TypeError):
            what = "a line is no review"
            raise FourierError(what, remedy="Remove the file: the judge is asked again", where=str(path)) from None

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """The template with ``model_answer`` filled in, which ``eval_gpt4.py`` reads."""
        rows = [{**item.row, "model_answer": text} for item, text in zip(items, answers, strict=True)]
        return [write_json(folder / "response.json", rows)]


def ask(base: str, model: str, prompt: str) -> str:
    """One chat completion at temperature 0; asked again, later each time, where the server is busy.

    Raises:
        FourierError: there is no server, it refuses, or it answers in another form.
    """
    url = f"{base.rstrip('/')}/chat/completions"
    if not url.startswith(("http://", "https://")):
        raise FourierError("it is no web address", remedy="Give https://…/v1", where=base)
    body = json.dumps({"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    for attempt in range(_TRIES):
        try:
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
                text = json.load(response)["choices"][0]["message"]["content"]
            return str(text)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 429 and error.code < _REFUSED:
                remedy = f"Check --judge-model and {KEY}"
                raise FourierError(f"the judge refuses (status {error.code})", remedy=remedy, where=url) from None
            what = f"status {error.code}"
        except (ValueError, KeyError, IndexError, TypeError):
            raise FourierError("it answers in another form", remedy="Give an OpenAI base URL", where=url) from None
        except OSError as error:
            what = str(error)
        if attempt < _TRIES - 1:
            time.sleep(2.0**attempt)
    raise FourierError(f"the judge does not answer ({what})", remedy="Check --judge; the run resumes", where=url)
