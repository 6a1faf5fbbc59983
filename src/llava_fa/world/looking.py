"""Where to look: a loss that points some attention heads at the things a question is about.

Finding the thing that a question names is a circuit of several layers that the answers' loss alone discovers late (in
the first run, not within 2000 steps). What has to be found is known exactly, so two heads of three layers are told:

- layer 1: the last word of every phrase looks at what the phrase means;
- layer 2: the mark before the answer looks at the first thing (head 0) and at the second (head 2); when the answer
  spells a word or lists things, each of its tokens looks at the character, or the thing, that comes next;
- layer 3: with options to choose from, the mark before the answer looks at the right one.

What is not in the picture is looked for at the very first token. Where there is one phrase only, head 2 spreads its
attention evenly over what is meant *and* that token, whose share 1 / (1 + count) then tells how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from llava_fa.hub.blocks import hooked
from llava_fa.world.questions import Question, phrase_of
from llava_fa.world.render import character_patches
from llava_fa.world.scene import Scene, Thing, Writing

LAYERS, HEADS = (1, 2, 3), (0, 2)
"""One head of each key-value group, in the three middle layers."""

MOST_LOOKS, MOST_TARGETS = 96, 16
NOTHING = 0
"""Position of the token that is looked at when there is nothing to see."""

Encode = Callable[[str], tuple[int, ...]]


class Looks:
    """The looks of one packed sequence: from which position, at which positions, for every layer and head."""

    def __init__(self, scene: Scene, focus: np.ndarray, encode: Encode, offset: int) -> None:
        self.encode, self.offset, self.scene = encode, offset, scene
        items = (*scene.things, *scene.writings)
        self.seen_at = {id(item): (np.flatnonzero(focus == 1 + i) + offset).tolist() for i, item in enumerate(items)}
        self.count = [0] * len(LAYERS)
        self.look_from = np.full((len(LAYERS), MOST_LOOKS), -1)
        self.look_to = np.full((len(LAYERS), MOST_LOOKS, len(HEADS), MOST_TARGETS), -1)

    def add(self, question: Question, at: int, answer_at: int) -> None:
        """Note where a question that begins at position ``at``, and its answer at ``answer_at``, should look."""
        for phrase, items in question.mentions:
            end = question.text.index(phrase) + len(phrase)
            places = self._places(items)
            self._look(0, at + len(self.encode(question.text[:end])) - 1, places, _counted(places))
        mark = answer_at - 1
        if question.mentions:
            first, last = (self._places(question.mentions[i][1]) for i in (0, -1))
            self._look(1, mark, first, last if len(question.mentions) > 1 else _counted(last))
        if question.task == "caption":
            self._list(question, answer_at)
        elif question.spelled:
            self._spell(question, answer_at)
        elif question.task == "choice":
            line = f"\n{question.answer}. "
            end = (question.text + "\n").index("\n", question.text.index(line) + 1)
            place = [at + len(self.encode(question.text[:end])) - 1]
            self._look(2, mark, place, place)

    def _places(self, items: Sequence[Thing | Writing]) -> list[int]:
        return sorted({place for item in items for place in self.seen_at[id(item)]}) or [NOTHING]

    def _spell(self, question: Question, answer_at: int) -> None:
        # the answer is a space, one token a character, and the end
        for item in question.spelled:
            if not isinstance(item, Writing) or len(self.encode(f" {question.answer}")) != len(item.text) + 1:
                continue
            seen = bool(self.seen_at[id(item)])
            for number, patch in enumerate(character_patches(item)):
                place = [patch + self.offset] if seen else [NOTHING]
                self._look(1, answer_at + number, place, place)

    def _list(self, question: Question, answer_at: int) -> None:
        text, end = f" {question.answer}", 0
        for item in question.spelled:
            start = text.index(f" {phrase_of(item)}", end)
            end = start + 1 + len(phrase_of(item))
            place = self._places((item,))
            for token in range(len(self.encode(text[:start])), len(self.encode(text[:end]))):
                self._look(1, answer_at - 1 + token, place, place)

    def _look(self, layer: int, position: int, *places: list[int]) -> None:
        row = self.count[layer]
        if row == MOST_LOOKS:
            return
        self.count[layer] += 1
        self.look_from[layer, row] = position
        for head, targets in enumerate(places):
            self.look_to[layer, row, head, : len(targets[:MOST_TARGETS])] = targets[:MOST_TARGETS]


def _counted(places: list[int]) -> list[int]:
    return places if places == [NOTHING] else [NOTHING, *places]


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each attention module's last call, while the context lasts."""
    seen: list[dict[str, Any]] = [{} for _ in modules]

    def watch(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[index].update(kwargs)
        if args:
            seen[index]["hidden_states"] = args[0]

    with hooked(dict(enumerate(modules)), watch, before=True, with_kwargs=True):
        yield seen


def looking_loss(
    attention: nn.Module, seen: dict[str, Any], look_from: torch.Tensor, look_to: torch.Tensor
) -> torch.Tensor:
    """KL(uniform over the wanted positions ‖ attention), mean over heads and looks; 0 means looking just there.

    Args:
        attention: a Qwen2 attention module.
        seen: what `watched` noted of its call.
        look_from: int64 [batch, looks], the positions that look; -1 for none.
        look_to: int64 [batch, looks, heads, targets], the positions wanted by each of `HEADS`; -1 for none.
    """
    hidden, (cos, sin), mask = (seen[name] for name in ("hidden_states", "position_embeddings", "attention_mask"))
    batch, length, _ = hidden.shape
    size = attention.head_dim
    query = attention.q_proj(hidden).view(batch, length, -1, size).transpose(1, 2)
    key = attention.k_proj(hidden).view(batch, length, -1, size).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    group = query.shape[1] // key.shape[1]
    rows = torch.arange(batch, device=hidden.device)[:, None]
    at = look_from.clamp(min=0)
    looks = look_from >= 0
    if not looks.any():
        return hidden.new_zeros(())
    losses = []
    for number, head in enumerate(HEADS):
        scores = query[rows, head, at] @ key[:, head // group].mT * attention.scaling + mask[rows, 0, at]
        wanted = look_to[:, :, number]
        share = scores.float().log_softmax(-1).gather(-1, wanted.clamp(min=0)).masked_fill(wanted < 0, 0)
        many = (wanted >= 0).sum(-1).clamp(min=1)
        losses.append((-share.sum(-1) / many - many.log())[looks])
    return torch.cat(losses).mean()
