"""Matryoshka training: the loss of every batch, averaged over all numbers of visual tokens.

    loss = 1/S Σ_s loss(model with n_s tokens a picture, batch without the image tokens that n_s leaves over)

The teacher is asked once, with all tokens: it is what every scale is to be like. Hidden states are matched with all
tokens only, since other scales have other tokens.
Source: M3 (arXiv 2405.17430), FMVR (arXiv 2603.11220).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.flops import read_model_config
from llava_fa.hub.visual_tokens import (
    FIELD,
    attach_visual_tokens,
    grid_of,
    processor_fields,
    set_visual_tokens,
    visual_tokens_of,
)
from llava_fa.train.data import DataFactory
from llava_fa.train.loss import IGNORED, Inputs, RecoveryLoss


def matryoshka(
    model: str | Path, data: DataFactory, kind: str | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """The arguments of `train.recover` that make of it a training over all scales.

    Args:
        model: the one to be trained.
        data: what it is trained on, as for `recover`.
        kind: of the visual tokens, `nn.visual_tokens.KINDS`; by default the model's own, or FMVR where they have no
            parameters yet (which FMVR leaves, at first, as they are).
        tokens: how many the trained model starts with; all of the grid if None.

    Raises:
        FourierError: a model that cannot have elastic visual tokens, or that has them of another kind.
    """
    config = read_model_config(model)
    grid_of(config)
    own = (getattr(config, FIELD, None) or {}).get("kind", "pooling")
    if kind is not None and own not in ("pooling", kind):
        raise FourierError(f"the model has visual tokens of kind {own}", remedy=f"Give {own}, or the original model")
    target = kind or ("fmvr" if own == "pooling" else own)
    setattr(config, FIELD, None)

    def all_tokens(processor: Any, max_length: int) -> Any:
        for key, value in processor_fields(config).items():
            setattr(processor, key, value)
        return data(processor, max_length)

    def prepare(loaded: nn.Module) -> None:
        module = visual_tokens_of(loaded)
        if module is None or module.kind != target:
            attach_visual_tokens(loaded, kind=target)
        else:
            set_visual_tokens(loaded, module.counts[0])

    def finish(trained: nn.Module, processor: Any) -> None:
        module = visual_tokens_of(trained)
        if module is not None:
            set_visual_tokens(trained, tokens or module.counts[0], processor)

    return {"data": all_tokens, "prepare": prepare, "wrap_loss": MatryoshkaLoss, "finish": finish}


class MatryoshkaLoss:
    """The mean of a loss over the scales of a model; called as `train.loss` says.

    Args:
        loss: at one scale.
        model: with visual tokens attached, and all of them chosen.
    """

    def __init__(self, loss: RecoveryLoss, model: nn.Module) -> None:
        module = visual_tokens_of(model)
        if module is None:
            raise FourierError("the model has no elastic visual tokens", remedy="Attach them first")
        self.loss, self.tokens = loss, module
        self.inner = next(m for m in model.modules() if "multi_modal_projector" in m._modules)

    def __call__(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """``loss``, its terms averaged over the scales, and the cross-entropy of each scale."""
        counts = self.tokens.counts
        sums: dict[str, Tensor] = {}
        targets = self.loss.targets(inputs)
        try:
            for count in counts:
                if targets is not None and count < counts[0]:
                    targets = dataclasses.replace(targets, hidden=None)
                terms = self.loss(model, self.at(inputs, count), targets)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value / len(counts)  # type: ignore[operator]
                sums[f"cross_entropy, {count} tokens"] = terms["cross_entropy"]
        finally:
            self.tokens.tokens = counts[0]
        return sums

    def at(self, inputs: Inputs, count: int) -> dict[str, Any]:
        """Choose ``count`` tokens a grid, and leave the image tokens beyond them out of a batch made for all."""
        before = self._lengths(inputs, self.tokens.counts[0])
        after = self._lengths(inputs, count)
        return without_image_tokens(inputs, self.inner.config.image_token_id, before, after)

    def _lengths(self, inputs: Inputs, count: int) -> list[int]:
        """Tokens of every picture of the batch; ``count`` stays chosen."""
        self.tokens.tokens = count
        sizes = inputs.get("image_sizes")
        strategy = self.inner.config.vision_feature_select_strategy
        if sizes is None:
            clip = self.inner.config.vision_config.model_type == "clip_vision_model"
            return [count + (1 if clip and strategy == "full" else 0)] * len(inputs.get("pixel_values", ()))
        newline = torch.zeros(1)
        options = {"vision_feature_select_strategy": strategy}
        if self.inner.config.model_type == "llava_onevision":
            options = {"vision_aspect_ratio": self.inner.config.vision_aspect_ratio}
        alone = [n == 1 for n in inputs.get("batch_num_images", [1] * len(sizes)) for _ in range(int(n))]
        lengths = []
        for size, tiled in zip(sizes, alone, strict=True):
            tiles = _tiles(self.inner.config, size) if tiled else 1
            shape = torch.zeros(tiles, count, 1)
            packed = self.inner.pack_image_features([shape], size[None], image_newline=newline, **options)
            lengths.append(int(packed[1][0]))
        return lengths


def _tiles(config: Any, size: Tensor) -> int:
    """Tiles of a picture of this height and width, the one that shows all of it included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


def without_image_tokens(inputs: Inputs, image_token: int, before: list[int], after: list[int]) -> dict[str, Any]:
    """A batch in which picture i has ``after[i]`` image tokens instead of ``before[i]``: the first of them.

    Args:
        inputs: ``input_ids`` [batch, length], ``labels``, ``attention_mask`` ([batch, length], or additive [batch, 1,
            length, length]), ``position_ids`` where given; everything else is passed on.
        image_token: the id of image tokens, which lie in ``input_ids`` picture by picture, row by row.
        before, after: by picture.

    Raises:
        FourierError: another number of image tokens than ``before`` sums up to.
    """
    ids = inputs["input_ids"]
    images = (ids == image_token).nonzero()
    if len(images) != sum(before):
        raise FourierError(
            f"the batch has {len(images)} image tokens, its pictures give {sum(before)}",
            remedy="The processor must count all of the grid's tokens",
        )
    if before == after:
        return dict(inputs)
    parts = zip(before, after, strict=True)
    stays = torch.tensor([i < new for old, new in parts for i in range(old)], device=ids.device)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[images[:, 0], images[:, 1]] = stays
    length = int(keep.sum(1).max())
    at = (~keep).long().argsort(dim=1, stable=True)[:, :length]  # rows with fewer pictures end in what was dropped
    valid = keep.gather(1, at)
    result: dict[str, Any] = dict(inputs)
    fills = {"input_ids": int(image_token == 0), "labels": IGNORED}
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        value = inputs.get(name)
        if value is None:
            continue
        if value.ndim == 4:
            rows = value.gather(2, at[:, None, :, None].expand(-1, 1, -1, value.shape[-1]))
            result[name] = rows.gather(3, at[:, None, None, :].expand(-1, 1, length, -1))
            continue
        if name == "position_ids":
            value = value - (~keep).long().cumsum(1)
        result[name] = value.gather(1, at).masked_fill(~valid, fills.get(name, 0))
    return result
