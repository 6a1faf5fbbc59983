"""Packed questions of the world as training samples for any trainer: one picture, many questions, one row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaProcessor

from llava_fa.world.packing import IGNORED, TASK_NAMES, WorldBatches, attention_mask
from llava_fa.world.recipe import LEARNED_LAST

Item = dict[str, torch.Tensor]


class PackedWorld(torch.utils.data.Dataset[Item]):
    """Picture number i with its questions, the same on every machine.

    Each item has ``input_ids``, ``labels`` (not shifted), ``position_ids`` [length], ``attention_mask`` bool
    [length, length] (who sees whom) and ``pixel_values`` [1, 3, 96, 96].

    Args:
        processor: the tiny model's.
        pictures: how many.
        text: tokens for questions and answers.
        seed: of the training pictures; the recipe that trained the tiny model used others.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        *,
        pictures: int,
        text: int = 160,
        seed: int = 1000,
    ) -> None:
        self.batches = WorldBatches(
            processor.tokenizer,
            split="train",
            seed=seed,
            batch=1,
            text=text,
            start=0,
            stop=pictures,
            tasks=(*TASK_NAMES, *LEARNED_LAST),
        )
        image = processor.image_processor
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (image.image_mean, image.image_std))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Item:
        return self.item(self.batches[index])

    def item(self, row: dict[str, Any]) -> Item:
        """One row of `WorldBatches` as a model's inputs, cut behind its last question."""
        length = int((row["segment"][0] >= 0).sum())
        ids, target, segment, position = (row[name][0, :length] for name in ("ids", "target", "segment", "position"))
        labels = torch.full_like(ids, IGNORED)
        labels[1:][target[:-1] != IGNORED] = ids[1:][target[:-1] != IGNORED]
        mask = attention_mask(segment[None])[0, 0] == 0
        pixels = (row["pixels"].float() / 255 - self.mean) / self.std
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": position,
            "attention_mask": mask,
            "pixel_values": pixels,
        }
