"""Training batches: one picture, many questions, each of which sees the picture and itself but not its neighbours.

The picture's tokens are shared by all questions of a sequence, so they are paid for once; the attention mask and the
position ids make every question see exactly what it would see alone (docs/results.md has the rate).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from llava_fa.world.looking import Looks
from llava_fa.world.questions import TASKS, Question, ask
from llava_fa.world.render import GRID, patch_labels, render
from llava_fa.world.scene import Scene, Split, sample_scene, scene_rng
from llava_fa.world.vocabulary import ASSISTANT, END, IMAGE, USER

PREFIX = 1 + GRID * GRID
"""Tokens that all questions share: the user mark and the picture."""

IGNORED = -100
TASK_NAMES = tuple(TASKS)


class WorldBatches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batch number i, the same on every machine and in every process.

    Args:
        tokenizer: the tiny model's.
        split, seed: which pictures; see `llava_fa.world.scene.sample_scene`.
        batch: pictures in a batch.
        wordy: pictures full of writing, without questions, that come on top: what is read is seldom and small.
        text: tokens for questions and answers in a sequence; 0 leaves the questions out (vision only).
        start, stop: the batch numbers that `len` and `__getitem__` span.
        tasks: the families of questions to ask; one that is named twice comes twice as often.
        written: every so many-th picture with questions is full of writing; 0: as few as the world has.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        split: Split,
        seed: int,
        batch: int,
        text: int,
        wordy: int = 0,
        start: int,
        stop: int,
        tasks: tuple[str, ...] = TASK_NAMES,
        written: int = 0,
    ) -> None:
        self.split, self.seed, self.batch, self.text = split, seed, batch, text
        self.start, self.stop, self.wordy, self.tasks, self.written = start, stop, wordy, tasks, written
        self.prefix = tokenizer.convert_tokens_to_ids([USER] + [IMAGE] * (GRID * GRID))
        self.marks = tuple(tokenizer.convert_tokens_to_ids([ASSISTANT, END]))
        self.pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.encode = functools.lru_cache(maxsize=100_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        first = (self.start + number) * self.batch
        rows = [self._row(first + i) for i in range(self.batch)]
        first = (self.start + number) * self.wordy
        rows += [self._wordy_row(first + i) for i in range(self.wordy)]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows if name in row])) for name in rows[0]}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))

    def _row(self, index: int) -> dict[str, np.ndarray[Any, Any]]:
        rng = scene_rng(self.split, self.seed, index)
        scene = sample_scene(rng, self.split, wordy=self.written > 0 and index % self.written == 0)
        row = _picture(scene, rng)
        if self.text:
            row |= self._pack(scene, row["focus"], self._questions(scene, rng))
        return row

    def _wordy_row(self, index: int) -> dict[str, np.ndarray[Any, Any]]:
        rng = scene_rng(self.split, self.seed, index, "wordy")
        return _picture(sample_scene(rng, self.split, wordy=True), rng)

    def _questions(self, scene: Scene, rng: random.Random) -> Iterator[Question]:
        asked_before: set[str] = set()
        for _ in range(40):
            asked = ask(rng.choice(self.tasks), scene, rng, self.split)
            # one rotation is enough to learn from; both halves of a pair show what tells them apart
            for question in asked[:1] if asked and asked[0].task == "choice" else asked:
                if question.text not in asked_before:
                    asked_before.add(question.text)
                    yield question

    def _pack(
        self, scene: Scene, focus: np.ndarray[Any, Any], questions: Iterator[Question]
    ) -> dict[str, np.ndarray[Any, Any]]:
        length = PREFIX + self.text
        ids = np.full(length, self.pad)
        target = np.full(length, IGNORED)
        segment = np.zeros(length, np.int64)
        position = np.arange(length)
        task = np.zeros(length, np.int64)
        looks = Looks(scene, focus, self.encode, offset=1)
        ids[:PREFIX] = self.prefix
        at = PREFIX
        for number, question in enumerate(questions, start=1):
            asked = (*self.encode(question.text), self.marks[0])
            answer = (*self.encode(f" {question.answer}"), self.marks[1])
            end = at + len(asked) + len(answer)
            if end > length:
                break
            ids[at:end] = asked + answer
            target[at + len(asked) - 1 : end - 1] = answer  # shifted: what each position has to predict
            segment[at:end] = number
            task[at:end] = TASK_NAMES.index(question.task)
            position[at:end] = PREFIX + np.arange(end - at)
            looks.add(question, at, at + len(asked))
            at = end
        segment[at:] = -1
        return {
            "ids": ids,
            "target": target,
            "segment": segment,
            "position": position,
            "task": task,
            "look_from": looks.look_from,
            "look_to": looks.look_to,
        }


def _picture(scene: Scene, rng: random.Random) -> dict[str, np.ndarray[Any, Any]]:
    return {"pixels": np.asarray(render(scene, rng)).transpose(2, 0, 1), **vars(patch_labels(scene))}


def attention_mask(segment: torch.Tensor) -> torch.Tensor:
    """Additive mask [batch, 1, length, length], float32: causal, the picture for all, each question for itself.

    Args:
        segment: int64 [batch, length]; 0 marks the shared prefix, n ≥ 1 the n-th question, -1 padding.
    """
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    same = segment[:, :, None] == segment[:, None, :]
    visible = causal & (same | (segment[:, None, :] == 0))
    return torch.zeros(visible.shape, device=segment.device).masked_fill_(~visible, float("-inf"))[:, None]
