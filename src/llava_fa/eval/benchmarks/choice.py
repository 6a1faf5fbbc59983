"""ScienceQA-IMG, MMBench and MMBench-CN: one of several options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from llava_fa.data.textfiles import read_json, read_table
from llava_fa.errors import shown
from llava_fa.eval.benchmarks.base import (
    LETTER,
    Benchmark,
    Item,
    Score,
    broken,
    fields,
    mean_parts,
    score_alone,
    statistics_of,
    write_json,
)
from llava_fa.eval.benchmarks.spreadsheet import write_spreadsheet

LETTERS = "ABCDE"
_STATED = re.compile(r"The answer is ([A-Z]).")
"""As in LLaVA's script: any sign may follow the letter, but one must."""


def science_answer(text: str) -> str | None:
    """The letter of an answer: alone, at the start before ``". "``, or in one "The answer is X."; LLaVA's rule.

    Source: ``llava/eval/eval_science_qa.py`` of LLaVA-1.5.
    """
    text = text.strip()
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    stated = _STATED.findall(text)
    return stated[0] if len(stated) == 1 and stated[0] in LETTERS else None


class ScienceQA(Benchmark):
    """ScienceQA's test questions with a picture (Lu et al. 2022): accuracy."""

    name = "scienceqa"
    metric = "accuracy"
    files = "problems.json, pid_splits.json and test/ (or images/test/) with a folder a problem"

    def read(self) -> list[Item]:
        """Items of the test split that have a picture; parts are the subjects."""
        problems, splits = read_json(self.first("problems.json")), read_json(self.first("pid_splits.json"))
        (names,) = fields(splits, ("test",), "pid_splits.json")
        items = []
        for name in names:
            where = f"problems.json problem {name}"
            (row,) = fields(problems, (name,), "problems.json")
            if not row.get("image"):
                continue
            question, choices, answer = fields(row, ("question", "choices", "answer"), where)
            if not (isinstance(answer, int) and 0 <= answer < len(choices) <= len(LETTERS)):
                raise broken(f"answer {shown(answer)} of {len(choices)} choices", where)
            context = f"Context: {row['hint']}\n" if row.get("hint") else ""
            options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
            picture = self.pictures_in("test", "images/test") / str(name) / row["image"]
            items.append(
                Item(
                    str(name),
                    f"{context}{question}\n{options}\n{LETTER}",
                    (picture,),
                    LETTERS[answer],
                    part=row.get("subject", ""),
                    row={"choices": len(choices)},
                )
            )
        return items

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Accuracy; an answer that names no option that there is counts as wrong."""

        def rule(item: Item, text: str) -> str | None:
            letter = science_answer(text)
            return letter if letter and LETTERS.index(letter) < item.row["choices"] else None

        scored = score_alone(items, answers, self.metric, rule)
        scored.figures["unreadable"] = _unreadable(scored)
        return scored

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """The results file of ScienceQA's scorers: ``results`` (index, -1 where unreadable) and ``outputs``."""
        scored = self.score(items, answers)
        results = {name: LETTERS.index(letter) if letter else -1 for name, letter in scored.read.items()}
        outputs = {item.id: text for item, text in zip(items, answers, strict=True)}
        right = int(sum(value or 0.0 for value in scored.correct.values()))
        value = {
            "acc": 100 * right / len(items),
            "correct": right,
            "count": len(items),
            "results": results,
            "outputs": outputs,
        }
        return [write_json(folder / "scienceqa.json", value)]


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FIRST_ROTATION = 1_000_000
"""MMBench numbers the rotations of question i as i + 1000000, i + 2000000, …"""


def option_of(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by MMBench's rules without a judge; ``Z`` where it refuses, None where unclear.

    A letter that stands alone, the only one of the options', among the last four words; in an answer of more than three
    words an A is taken for an article. Else the only option whose text the answer holds, unless the answer is more than
    twice as long as all options.

    Source: MMBench's evaluation (Liu et al. 2023, section 4.3; VLMEvalKit), which asks GPT where this gives None.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = text.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1:
        if not ("A" in words and len(words) > 3) and words.index(named[0]) > len(words) - 5:
            return named[0]
    elif not named and "Z" in words:
        return "Z"
    lower = text.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, option in options.items() if option.lower() in lower]
    return held[0] if len(held) == 1 else None


class MMBench(Benchmark):
    """MMBench (Liu et al. 2023): right only if right under every rotation of the options (circular evaluation)."""

    name = "mmbench"
    metric = "circular accuracy"
    files = "one TSV of MMBench (mmbench_dev_20230712.tsv, MMBench_DEV_EN.tsv, …), with or without its rotations"
    instruction = LETTER
    chinese = False

    def read(self) -> list[Item]:
        """Items of the file's rotations, or of rotations made here where it has none; a unit is a question."""
        paths = [
            path
            for path in sorted(self.folder.glob("*.tsv"))
            if "mmbench" in path.name.lower() and ("_cn" in path.name.lower()) == self.chinese
        ]
        if len(paths) != 1:
            what = f"{len(paths)} files fit: {', '.join(path.name for path in paths)}" if paths else "no such file"
            raise self.missing(self.folder / "*.tsv", what)
        name, rows = paths[0].name, read_table(paths[0])
        for number, row in enumerate(rows, 2):
            where = f"{name} row {number}"
            fields(row, ("index", "question", "A", "B", "image"), where)
            if not row["index"].isdecimal():
                raise broken(f"its index is {shown(row['index'])}", where)
        pictures = {row["index"]: row["image"] for row in rows}
        if all(int(row["index"]) < _FIRST_ROTATION for row in rows):
            rows = [rotated for row in rows for rotated in rotations(row)]
        return [self._item(row, pictures, name) for row in rows]

    def _item(self, row: dict[str, str], pictures: dict[str, str], file: str) -> Item:
        options, answer = options_in(row), row.get("answer", "")
        where = f"{file} question {row['index']}"
        if answer and answer not in options:
            raise broken(f"its answer {shown(answer)} is not one of {', '.join(options)}", where)
        hint = f"{row['hint']}\n" if _has_text(row.get("hint", "")) else ""
        lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        image = row["image"]
        if image.isdecimal() and image in pictures:  # a rotation may name the question whose picture it shares
            image = pictures[image]
        unit = str(int(row["index"]) % _FIRST_ROTATION)
        part = row.get("l2-category") or row.get("category", "")
        prompt = f"{hint}{row['question']}\n{lines}\n{self.instruction}"
        cells = {name: value for name, value in row.items() if name != "image"}
        return Item(row["index"], prompt, (image,), answer or None, part=part, unit=unit, row=cells)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Circular accuracy; ``accuracy`` beside it counts every rotation for itself."""
        alone = score_alone(items, answers, self.metric, lambda item, text: option_of(text, options_in(item.row)))
        alone.figures["unreadable"] = _unreadable(alone)
        if not alone.units:
            return alone
        whole: dict[str, float] = {}
        for item in items:
            whole[item.unit] = min(whole.get(item.unit, 1.0), alone.correct[item.id] or 0.0)
        firsts = list({item.unit: item for item in items}.values())
        return dataclasses.replace(
            alone,
            figures={"circular_accuracy": sum(whole.values()) / len(whole), **alone.figures},
            parts=mean_parts(firsts, {item.id: whole[item.unit] for item in firsts}, self.metric),
            units=list(whole),
            statistics=statistics_of(list(whole.values())),
        )

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """The server's format: the table's columns without the picture, ``prediction`` after the options, as XLSX."""
        dropped = ("hint", "category", "source", "image", "comment", "l2-category")
        columns = [name for name in items[0].row if name not in dropped]
        place = 1 + max(columns.index(letter) for letter in "ABCD" if letter in columns)
        columns.insert(place, "prediction")
        rows = [
            [int(item.id) if name == "index" else text if name == "prediction" else item.row[name] for name in columns]
            for item, text in zip(items, answers, strict=True)
        ]
        return [write_spreadsheet(folder / f"{self.name}.xlsx", columns, rows)]


class MMBenchCN(MMBench):
    """MMBench-CN: the same in Chinese."""

    name = "mmbench-cn"
    files = "one TSV of MMBench-CN (mmbench_dev_cn_20231003.tsv, MMBench_DEV_CN.tsv, …)"
    instruction = "请直接回答选项字母。"
    chinese = True


def options_in(row: dict[str, str]) -> dict[str, str]:
    """Letter → text of the options that a row has."""
    return {letter: row[letter] for letter in "ABCD" if _has_text(row.get(letter, ""))}


def rotations(row: dict[str, str]) -> list[dict[str, str]]:
    """A question once for every option it has: the j-th moves every option j letters up, round the end."""
    options = options_in(row)
    letters, texts = list(options), list(options.values())
    rows = []
    for j in range(len(letters)):
        rotation = dict(zip(letters, texts[j:] + texts[:j], strict=True))
        answer = row.get("answer", "")
        if answer in letters:
            rotation["answer"] = letters[(letters.index(answer) - j) % len(letters)]
        rows.append({**row, **rotation, "index": str(int(row["index"]) + j * _FIRST_ROTATION)})
    return rows


_NOTHING = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "n/a",
        "null",
    )
)
"""What the official scripts' reader of tables (pandas) takes for an empty cell."""


def _has_text(cell: str) -> bool:
    cell = cell.strip()
    return cell not in _NOTHING and cell.lower() not in ("nan", "-nan", "none")


def _unreadable(scored: Score) -> float:
    return sum(letter is None for letter in scored.read.values()) / max(1, len(scored.read))
