"""Object-HalBench: which of the objects that a description names are not in the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_fa.data.textfiles import lines_of, read_json, read_rows, read_text
from llava_fa.errors import FourierError, shown
from llava_fa.eval.benchmarks.base import Benchmark, Item, Score, fields, write_json_lines
from llava_fa.eval.benchmarks.statistics import bootstrap, part

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "knives": "knife", "geese": "goose", "mice": "mouse"}


class Synonyms:
    """CHAIR's table: a line an object, its name first, then what else it is called, divided by commas.

    Source: Rohrbach et al., "Object hallucination in image captioning" (2018), section 2.1, and its two-word rules.
    """

    def __init__(self, path: Path) -> None:
        self.names: dict[str, str] = {}
        for line in lines_of(read_text(path)):
            words = [word.strip() for word in line.split(",") if word.strip()]
            self.names |= dict.fromkeys(words, words[0] if words else "")
        if not self.names:
            raise FourierError("there is no object in it", remedy="Give CHAIR's table of synonyms", where=str(path))
        pairs = {name: name for name in self.names if " " in name} | {"home plate": "", "train track": ""}
        pairs |= {f"{young} {animal}": animal for animal in _ANIMALS for young in ("baby", "adult")}
        pairs |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
        self.pairs = pairs | {"bow tie": "tie", "toilet seat": "toilet"}
        self.words = {word for name in (*self.names, *self.pairs) for word in name.split()}

    def mentions(self, text: str) -> list[str]:
        """The objects that a text names, by their first names, once for every time they are named."""
        words = [self.singular(word) for word in _WORD.findall(text.lower())]
        named, place = [], 0
        while place < len(words):
            pair = " ".join(words[place : place + 2])
            named.append(self.pairs.get(pair, words[place]))
            place += 2 if pair in self.pairs else 1
        if "toilet" in named:  # the seat of a toilet is no chair
            named = [word for word in named if word != "seat"]
        return [self.names[word] for word in named if word in self.names]

    def singular(self, word: str) -> str:
        """A word of the table for its plural; other words as they are."""
        if word in self.words:
            return word
        endings = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
        made = [_IRREGULAR.get(word, "")] + [word.removesuffix(old) + new for old, new in endings if word.endswith(old)]
        return next((form for form in made if form in self.words), word)


class ObjectHalBench(Benchmark):
    """Object-HalBench (Rohrbach et al. 2018; Yu et al. 2024): CHAIR rates of 300 descriptions; less is better."""

    name = "object-halbench"
    metric = "responses that name an absent object (less is better)"
    max_new_tokens = 1024
    files = (
        "obj_halbench_300_with_image.jsonl, the table synonyms_refine.txt (or synonyms.txt), and COCO 2014's "
        "instances_val2014.json and captions_val2014.json (or annotations/ with them)"
    )

    def read(self) -> list[Item]:
        """One item a row; what is there comes from COCO's segmentations and captions, both."""
        path = self.first("obj_halbench*.jsonl")
        rows = read_rows(path)
        names = ("image_id", "question", "image")
        cells = [fields(row, names, f"{path.name} row {i}") for i, row in enumerate(rows, 1)]
        self.synonyms = Synonyms(self.first("synonyms*.txt"))
        there = self._objects({int(image_id) for image_id, _, _ in cells})
        items = []
        for number, (image_id, question, image) in enumerate(cells):
            if not there[int(image_id)]:
                raise FourierError(
                    f"COCO's files say nothing of picture {image_id}",
                    remedy="Give the annotations of COCO 2014, val",
                    where=f"{path.name} row {number + 1}",
                )
            row = {"image_id": int(image_id), "question": question}
            expected = sorted(there[int(image_id)])
            items.append(Item(f"{number}/{image_id}", question, (image,), expected, row=row))
        return items

    def _objects(self, image_ids: set[int]) -> dict[int, set[str]]:
        there: dict[int, set[str]] = {image_id: set() for image_id in image_ids}
        for path in self._coco("instances"):
            content = read_json(path)
            categories, annotations = fields(content, ("categories", "annotations"), path.name)
            names = {row["id"]: row["name"] for row in categories}
            for row in annotations:
                if row["image_id"] in there:
                    name = names[row["category_id"]]
                    if name not in self.synonyms.names:
                        raise FourierError(
                            f"{shown(name)} is not in the table of synonyms",
                            remedy="Give CHAIR's table",
                            where=path.name,
                        )
                    there[row["image_id"]].add(self.synonyms.names[name])
        for path in self._coco("captions"):
            (annotations,) = fields(read_json(path), ("annotations",), path.name)
            for row in annotations:
                if row["image_id"] in there:
                    there[row["image_id"]].update(self.synonyms.mentions(row["caption"]))
        return there

    def _coco(self, kind: str) -> list[Path]:
        """Val's file, and train's where it is there too (the 300 pictures are val's)."""
        val = self.first(f"{kind}_val2014.json", f"annotations/{kind}_val2014.json")
        train = val.with_name(f"{kind}_train2014.json")
        return [val, train] if train.exists() else [val]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """Response rate: of answers that name an object, those that name an absent one. Mention rate: of mentions."""
        rows, correct, read = [], {}, {}
        for item, text in zip(items, answers, strict=True):
            said = self.synonyms.mentions(text)
            absent = [name for name in said if name not in item.expected]
            named = {name for name in said if name in item.expected}
            rows.append([bool(absent), bool(said), len(absent), len(said), len(named), len(item.expected)])
            correct[item.id] = float(not absent) if said else None
            read[item.id] = {"absent": absent, "named": sorted(named)}
        counts = np.array(rows, dtype=np.float64)
        parts = {}
        for name, some in (("response", counts[:, :2]), ("mention", counts[:, 2:4])):
            rate = float(_rate(some.sum(0)))
            parts[name] = part(rate, "share that is absent", bootstrap(some, _rate), len(items))
        totals = counts.sum(0)
        figures = {
            "response": parts["response"]["score"],
            "mention": parts["mention"]["score"],
            "recall": float(_rate(totals[4:6])),
            "silent": float(1 - totals[1] / len(items)),
            "words": sum(len(text.split()) for text in answers) / len(items),
        }
        return Score(figures, parts, correct, [item.id for item in items], counts, read)

    def headline(self, sums: np.ndarray) -> np.ndarray:
        """The response rate."""
        return _rate(sums)

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """What ``eval_gpt_obj_halbench.py`` reads, which asks GPT what an answer names."""
        rows = [{**item.row, "answer": text} for item, text in zip(items, answers, strict=True)]
        return [write_json_lines(folder / "obj_halbench_answer.jsonl", rows)]


def _rate(sums: np.ndarray) -> np.ndarray:
    share: np.ndarray = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return share
