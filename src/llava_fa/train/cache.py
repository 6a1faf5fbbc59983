"""What the teacher says, asked once and kept on disk: its k likeliest tokens for every answer token.

    FOLDER/000000-000063.safetensors    "<sample>.log_p" float16 [answers, k], "<sample>.ids" int32 [answers, k]

The rest of the vocabulary is one outcome more (`train.loss.divergence`), so nothing is thrown away but its order. A
file appears when it is whole, and is not asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_fa.errors import FourierError
from llava_fa.hub.course import passes
from llava_fa.hub.shards import Entry, Item, read_header, write_file
from llava_fa.train.data import on_device
from llava_fa.train.loss import ModelTeacher

_IN_A_FILE, _SIDE_BY_SIDE = 64, 16


class CachedTargets(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset whose items bring the teacher's word with them, as ``teacher_log_p`` and ``teacher_ids``.

    Args:
        dataset: map-style, the same item at every call.
        folder: of the files.
    """

    def __init__(self, dataset: Any, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        self._headers: dict[Path, dict[str, Entry]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = _file(self.folder, index, len(self))
        entries = self._headers.get(path)
        if entries is None:
            entries = self._headers[path] = read_header(path)[0]
        log_p, ids = (entries[f"{index}.{name}"].read() for name in ("log_p", "ids"))
        item = self.dataset[index]
        return {**item, "teacher_log_p": log_p.float(), "teacher_ids": ids.long()}


def ask(
    teacher: ModelTeacher,
    dataset: Any,
    collator: Callable[[list[Any]], dict[str, Any]],
    folder: Path,
    k: int,
) -> CachedTargets:
    """Ask the teacher about every sample that is not in the folder yet.

    One at a time; some side by side where the teacher's weights are on the disk (`course.passes`).

    Raises:
        FourierError: what the dataset or the teacher say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(dataset), _IN_A_FILE):
        path = _file(folder, first, len(dataset))
        if path.exists():
            continue
        items, last = [], min(first + _IN_A_FILE, len(dataset))
        for start in range(first, last, _SIDE_BY_SIDE):
            some = range(start, min(start + _SIDE_BY_SIDE, last))
            asked = [partial(_likeliest, teacher, dataset, collator, index, k) for index in some]
            for index, top in zip(some, passes(teacher.model, asked), strict=True):
                items += [
                    Item.of(f"{index}.log_p", top.values.to(torch.float16)),
                    Item.of(f"{index}.ids", top.indices.to(torch.int32)),
                ]
        write_file(path, items)
    return CachedTargets(dataset, folder)


def _likeliest(
    teacher: ModelTeacher, dataset: Any, collator: Callable[[list[Any]], dict[str, Any]], index: int, k: int
) -> Any:
    """``values`` and ``indices`` [answers, k]."""
    device = next(teacher.model.parameters()).device
    log_p = teacher(on_device(collator([dataset[index]]), device), hidden=False).log_p
    top = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    if not bool(torch.isfinite(top.values).all()):
        raise FourierError("the teacher's answer is not finite", remedy="Load it in bf16 or float32")
    return top


def _file(folder: Path, index: int, count: int) -> Path:
    first = index - index % _IN_A_FILE
    return folder / f"{first:06}-{min(first + _IN_A_FILE, count) - 1:06}.safetensors"
