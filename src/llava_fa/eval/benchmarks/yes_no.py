"""POPE and MME: questions that are answered by yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_fa.data.textfiles import lines_of, read_rows, read_text
from llava_fa.errors import FourierError, shown
from llava_fa.eval.benchmarks.base import (
    SHORT,
    Benchmark,
    Item,
    Score,
    broken,
    fields,
    sums_by_unit,
    write_json_lines,
    write_text,
)
from llava_fa.eval.benchmarks.statistics import bootstrap, part
from llava_fa.eval.intervals import f1_interval

CATEGORIES = ("random", "popular", "adversarial")


def pope_answer(text: str) -> str:
    """``"no"`` where the first sentence has the word No, no or not, else ``"yes"``: POPE's own rule."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


class POPE(Benchmark):
    """POPE (Li et al. 2023): is an object there? F1 of "yes", mean over three ways of choosing absent ones."""

    name = "pope"
    metric = "F1, mean of the categories"
    files = (
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (those that are there) and val2014/"
    )

    def read(self) -> list[Item]:
        """Items of the categories whose files are there; a unit is a picture, of which several questions are asked."""
        items = []
        for category in CATEGORIES:
            try:
                path = self.first(f"*pope_{category}.json", f"coco/*pope_{category}.json")
            except FourierError as error:
                if error.what == "no such file":
                    continue
                raise
            pictures = self.pictures_in("val2014", "images", ".")
            for number, row in enumerate(read_rows(path)):
                where = f"{path.name} row {number}"
                image, text, label = fields(row, ("image", "text", "label"), where)
                if label not in ("yes", "no"):
                    raise FourierError(f"its label is {shown(label)}", remedy="yes or no is expected", where=where)
                items.append(
                    Item(
                        f"{category}/{row.get('question_id', number + 1)}",
                        f"{text}\n{SHORT}",
                        (pictures / image,),
                        label,
                        part=category,
                        unit=image,
                        row=row,
                    )
                )
        if not items:
            raise self.missing(self.folder / "coco_pope_random.json")
        return items

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Accuracy, precision, recall, F1 and share of "yes" by category."""
        read = {item.id: pope_answer(text) for item, text in zip(items, answers, strict=True)}
        kinds = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]  # said, right
        table = [[kind == (read[item.id], item.expected) for kind in kinds] for item in items]
        units, counts = sums_by_unit(items, CATEGORIES, table)
        parts = {}
        for category, (tp, fp, fn, tn) in zip(CATEGORIES, counts.sum(0).tolist(), strict=True):
            if total := int(tp + fp + fn + tn):
                parts[category] = part(
                    float(_f1(np.array([tp, fp, fn, tn]))),
                    "F1",
                    f1_interval(int(tp), int(fp), int(fn)),
                    total,
                    accuracy=(tp + tn) / total,
                    precision=tp / (tp + fp) if tp + fp else 0.0,
                    recall=tp / (tp + fn) if tp + fn else 0.0,
                    yes=(tp + fp) / total,
                )
        correct: dict[str, float | None] = {item.id: float(read[item.id] == item.expected) for item in items}
        figures = {
            name: sum(part[key] for part in parts.values()) / len(parts)
            for name, key in (("f1", "score"), ("accuracy", "accuracy"), ("yes", "yes"))
        }
        return Score(figures, parts, correct, units, counts.reshape(len(units), -1), read)

    def headline(self, sums: np.ndarray) -> np.ndarray:
        """Mean F1 of the categories that have questions."""
        counts = sums.reshape(*sums.shape[:-1], len(CATEGORIES), 4)
        there = counts.sum(-1) > 0
        return (_f1(counts) * there).sum(-1) / np.maximum(there.sum(-1), 1)

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """One file a category, as the official ``evaluate.py`` reads them."""
        rows: dict[str, list[dict[str, str]]] = {}
        for item, text in zip(items, answers, strict=True):
            rows.setdefault(item.part, []).append({"question": item.row["text"], "answer": text})
        return [write_json_lines(folder / f"coco_pope_{name}_answers.json", some) for name, some in rows.items()]


def _f1(counts: np.ndarray) -> np.ndarray:
    """2 hits / (2 hits + false alarms + misses), [..., 4] → [...]; 0 without hits."""
    f1: np.ndarray = 2 * counts[..., 0] / np.maximum(2 * counts[..., 0] + counts[..., 1] + counts[..., 2], 1)
    return f1


PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
_ASKS = "Please answer yes or no."


def mme_answer(text: str) -> str:
    """``yes``, ``no`` or ``other``: the answer, or what its first four characters hold, in lower case."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


class MME(Benchmark):
    """MME (Fu et al. 2023): two questions a picture; accuracy and accuracy+ (both right), in percent, summed."""

    name = "mme"
    metric = "perception + cognition, of 2800"
    percent = False
    files = "the folders existence/, count/, … with pictures and text files (or images/ and questions_answers_YN/)"

    def read(self) -> list[Item]:
        """Items of the sub-tasks whose folders are there; a unit is a picture."""
        root = self.folder / "MME_Benchmark_release_version"
        root = root if root.is_dir() else self.folder
        items = []
        for task in SUBTASKS:
            if not (root / task).is_dir():
                continue
            texts, pictures = (
                root / task / name if (root / task / name).is_dir() else root / task
                for name in ("questions_answers_YN", "images")
            )
            for path in sorted(texts.glob("*.txt")):
                candidates = (pictures / f"{path.stem}{end}" for end in (".jpg", ".png"))
                picture = next(filter(Path.exists, candidates), None)
                if picture is None:
                    raise self.missing(path, "its picture is missing")
                items += self._pair(task, path, picture)
        if not items:
            raise self.missing(self.folder, "there is no sub-task in it")
        return items

    def _pair(self, task: str, path: Path, picture: Path) -> list[Item]:
        lines = [line for line in lines_of(read_text(path)) if line.strip()]
        items = []
        for number, line in enumerate(lines):
            question, tab, label = line.strip().rpartition("\t")
            if not tab or label.lower() not in ("yes", "no"):
                raise broken(f"line {number + 1} is not a question, a tab, and Yes or No", path)
            prompt = f"{question.replace(_ASKS, '').strip()}\n{SHORT}"
            unit = f"{task}/{picture.name}"
            row = {"question": question, "label": label}
            items.append(Item(f"{unit}/{number}", prompt, (picture,), label.lower(), part=task, unit=unit, row=row))
        if len(items) != 2:
            raise broken(f"it has {len(items)} questions, not 2", path)
        return items

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Accuracy and accuracy+ of every sub-task; ``points`` of a part is their sum in percent, of 200."""
        read = {item.id: mme_answer(text) for item, text in zip(items, answers, strict=True)}
        correct: dict[str, float | None] = {item.id: float(read[item.id] == item.expected) for item in items}
        rows = [(correct[item.id] or 0.0, 1, 0) for item in items]  # right answers, questions, both right
        units, counts = sums_by_unit(items, SUBTASKS, rows)
        counts[..., 2] = (counts[..., 1] > 0) & (counts[..., 0] == counts[..., 1])
        parts = {}
        for place, (task, (right, questions, both)) in enumerate(zip(SUBTASKS, counts.sum(0).tolist(), strict=True)):
            if questions:
                accuracy, plus = right / questions, 2 * both / questions
                parts[task] = part(
                    (accuracy + plus) / 2,
                    "mean of accuracy and accuracy+",
                    bootstrap(counts[counts[:, place, 1] > 0, place], _half_points),
                    int(questions),
                    points=100 * (accuracy + plus),
                    accuracy=accuracy,
                    accuracy_plus=plus,
                )
        figures = {
            name: sum(parts[task]["points"] for task in tasks if task in parts)
            for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        figures["other"] = sum(answer == "other" for answer in read.values()) / len(read)
        return Score(figures, parts, correct, units, counts.reshape(len(units), -1), read)

    def headline(self, sums: np.ndarray) -> np.ndarray:
        """Σ over sub-tasks of 100 (right / questions + pairs right / pairs)."""
        counts = sums.reshape(*sums.shape[:-1], len(SUBTASKS), 3)
        total: np.ndarray = 200 * _half_points(counts).sum(-1)
        return total

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """One text file a sub-task, as the official ``calculation.py`` reads them."""
        texts: dict[str, str] = {}
        for item, text in zip(items, answers, strict=True):
            cells = (item.pictures[0].name, item.row["question"], item.row["label"], " ".join(text.split()))
            texts[item.part] = texts.get(item.part, "") + "\t".join(cells) + "\n"
        return [write_text(folder / f"{task}.txt", text) for task, text in texts.items()]


def _half_points(counts: np.ndarray) -> np.ndarray:
    """(right / questions + pairs right / pairs) / 2, [..., 3] → [...]."""
    half: np.ndarray = (counts[..., 0] + 2 * counts[..., 2]) / np.maximum(2 * counts[..., 1], 1)
    return half
