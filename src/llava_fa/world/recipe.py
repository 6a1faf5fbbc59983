"""The recipe that trains the tiny LMM from nothing, resumable, on a GPU or on two CPU cores.

Three things make it learn in hours instead of days (docs/results.md has what was tried):

1. The vision tower is taught first, densely: every patch must name what it shows, *in the language model's own
   words*: the projected patch is scored against the tied word embeddings of colors, shapes, sizes and characters.
   The language model then finds pictures written in the vocabulary of the questions.
2. Then all of it is trained on packed questions (`llava_fa.world.packing`), the dense loss kept beside as an anchor.
3. Some heads are told what to look at (`llava_fa.world.looking`): finding the thing that a question names is learned in
   hundreds of steps instead of many thousands.

The hidden matrices are trained with Muon, everything else with AdamW; warm-up, constant rate, linear cool-down.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava_fa.errors import FourierError
from llava_fa.hub.source import resolve_model
from llava_fa.hub.visual_tokens import FIELD
from llava_fa.world.looking import LAYERS, looking_loss, watched
from llava_fa.world.model import build_model, build_processor
from llava_fa.world.muon import Muon
from llava_fa.world.packing import IGNORED, TASK_NAMES, WorldBatches, attention_mask
from llava_fa.world.render import GRID
from llava_fa.world.vocabulary import dense_vocabulary

NOTHING_WEIGHT = {"color": 0.3, "shape": 0.3, "size": 0.3, "anchor": 0.1, "character": 0.05}
"""Weight of "nothing" patches in the dense loss: the rarer the thing, the less; what is shown weighs about half."""

GAIN_SCALE = 0.1
"""FMVR's gains, to which the loss is far more sensitive, learn so much slower than other parameters: at 1 to 5 they
wander, and the model is worse with them than without (docs/results.md)."""

LEARNED_LAST = ("relations", "counting", "choice")
"""Asked twice as often as the others."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one training run; steps are optimiser steps.

    ``muon_rate`` and ``adam_rate`` are those of the vision stage; in the language stage everything learns at
    ``language_scale`` of them, and the vision tower, after ``frozen_steps`` of rest, at ``vision_scale``.
    ``start`` is a model to go on from instead of nothing, ``visual_tokens`` the kind of elastic visual tokens to attach
    and train over all scales (`llava_fa.world.elastic`), ``written`` and ``asked_more`` what is asked more often than
    the world does (`llava_fa.world.packing.WorldBatches`: ``written``, ``tasks``).
    """

    vision_steps: int = 1200
    language_steps: int = 8000
    warmup_steps: int = 100
    cooldown_steps: int = 1500
    frozen_steps: int = 4000
    vision_batch: int = 64
    language_batch: int = 16
    wordy_batch: int = 16
    text_tokens: int = 160
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    language_scale: float = 0.4
    vision_scale: float = 0.2
    dense_weight: float = 0.5
    looking_weight: float = 0.2
    weight_decay: float = 0.01
    seed: int = 1
    start: str | None = None
    visual_tokens: str | None = None
    written: int = 0
    asked_more: tuple[str, ...] = LEARNED_LAST

    @property
    def steps(self) -> int:
        """All of them."""
        return self.vision_steps + self.language_steps

    def stage_end(self, step: int) -> int:
        """The step at which the stage that ``step`` is in gives way to the next: other batches begin there."""
        return next(end for end in (self.vision_steps, self.vision_steps + self.frozen_steps, self.steps) if step < end)

    def rate(self, step: int) -> float:
        """Progress of the learning rates: warm-up in each stage, constant, cool-down to 2 % at the very end."""
        since = step if step < self.vision_steps else step - self.vision_steps
        warm = min(1.0, (since + 1) / self.warmup_steps)
        left = (self.steps - step) / max(1, self.cooldown_steps)
        return warm * max(0.02, min(1.0, left))


def train(
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    workers: int = 1,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    save_every: int = 250,
    check_every: int = 500,
    check_batches: int = 8,
) -> LlavaForConditionalGeneration:
    """Run the recipe; resume from ``out/state.pt`` where there is one; leave the model in ``out/model`` at the end.

    The processor is kept in ``out/processor``: the weights know words by number, and a package whose vocabulary was
    learnt anew (`llava_fa.world.vocabulary`) must not renumber them under a run.
    A longer ``language_steps`` than that of the run that left the state continues it, cool-down included.

    Raises:
        FourierError: the loss is not finite any more (the last good state is kept).
    """
    out.mkdir(parents=True, exist_ok=True)
    processor = _keep_processor(out / "processor", recipe.start)
    learner = new_learner(processor, recipe, torch.device(device))
    state_path = out / "state.pt"
    if state_path.exists():
        learner.load(torch.load(state_path, map_location=device, weights_only=True))
    while learner.step < recipe.steps:
        vision_only = learner.step < recipe.vision_steps
        batches = WorldBatches(
            processor.tokenizer,
            split="train",
            seed=recipe.seed + (0 if vision_only else 1),
            batch=recipe.vision_batch if vision_only else recipe.language_batch,
            text=0 if vision_only else recipe.text_tokens,
            wordy=0 if learner.frozen else recipe.wordy_batch,
            start=learner.step,
            stop=recipe.stage_end(learner.step),
            tasks=(*TASK_NAMES, *recipe.asked_more),
            written=recipe.written,
        )
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers, prefetch_factor=6 if workers else None
        )
        window, began = [], time.monotonic()
        for batch in loader:
            losses = learner.update(batch)
            window.append(losses)
            if not all(value == value for value in losses.values()):
                raise FourierError(
                    f"the loss is not finite at step {learner.step}",
                    remedy=f"The last good state is in {state_path}; lower the rates and run again to resume",
                )
            if learner.step % 50 == 0:
                seconds, began = (time.monotonic() - began) / len(window), time.monotonic()
                means = {name: sum(row[name] for row in window) / len(window) for name in window[0]}
                report({"step": learner.step, "of": recipe.steps, **means, "seconds_per_step": seconds})
                window = []
            if learner.step % save_every == 0 or learner.step == recipe.steps:
                _save_atomically(learner.state(), state_path)
            if learner.step % check_every == 0 or learner.step == recipe.steps:
                report({"step": learner.step, "validation": learner.validate(check_batches)})
                began = time.monotonic()
    save_pretrained(learner.model, processor, out / "model")
    return learner.model


def new_learner(processor: LlavaProcessor, recipe: Recipe, device: torch.device) -> Learner:
    """The learner that a recipe asks for."""
    if recipe.visual_tokens is None:
        return Learner(processor, recipe, device)
    from llava_fa.world.elastic import ElasticLearner

    return ElasticLearner(processor, recipe, device)


def first_model(processor: LlavaProcessor, recipe: Recipe) -> LlavaForConditionalGeneration:
    """What training starts from: a random model, or the one that the recipe goes on from."""
    if recipe.start is None:
        return build_model(processor.tokenizer, recipe.seed)
    return LlavaForConditionalGeneration.from_pretrained(resolve_model(recipe.start), dtype=torch.float32)


class Learner:
    """Model, optimisers and the losses of one step."""

    def __init__(self, processor: LlavaProcessor, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device, self.processor = recipe, device, processor
        self.model = first_model(processor, recipe)
        self._prepare()
        self.model.to(device)
        width = self.model.config.text_config.hidden_size
        self.center_head = torch.nn.Linear(width, 2).to(device)
        self.words = {
            name: torch.tensor(ids, device=device) for name, ids in dense_vocabulary(processor.tokenizer).items()
        }
        self.optimizers = self._optimizers()
        self.step = 0
        self.autocast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()

    def _prepare(self) -> None:
        """What a subclass changes of the model before its parameters are shared out."""

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        vision, matrices, rest = [], [], list(self.center_head.parameters())
        gains = []
        for name, parameter in self.model.named_parameters():
            if FIELD in name and parameter.ndim == 1:
                gains.append(parameter)
            elif parameter.ndim != 2 or "embed" in name:
                rest.append(parameter)
            else:
                (vision if "vision_tower" in name else matrices).append(parameter)
        # apart: gains' gradients are ten times those of all others together
        own = {id(parameter) for parameter in gains}
        self.clipped = [[p for p in self.model.parameters() if id(p) not in own], gains]
        groups = [{"params": matrices}, {"params": vision}]
        muon = Muon(groups, lr=self.recipe.muon_rate, weight_decay=self.recipe.weight_decay)
        adam_groups = [{"params": rest, "scale": 1.0}] + [{"params": gains, "scale": GAIN_SCALE}] * bool(gains)
        adam = torch.optim.AdamW(adam_groups, lr=self.recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        return [muon, adam]

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain types."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "center_head": self.center_head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.center_head.load_state_dict(state["center_head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        rate = self.recipe.rate(self.step)
        muon, adam = self.optimizers
        language = self.step >= self.recipe.vision_steps
        scale, vision_scale = (self.recipe.language_scale, self.recipe.vision_scale) if language else (1.0, 1.0)
        for group, base in zip(muon.param_groups, (scale, vision_scale), strict=True):
            group["lr"] = rate * base * self.recipe.muon_rate
        for group in adam.param_groups:
            group["lr"] = rate * scale * group["scale"] * self.recipe.adam_rate
        self.model.train()
        self.model.model.vision_tower.requires_grad_(not self.frozen)
        losses = self.losses(batch)
        self.total(losses).backward()
        for parameters in self.clipped:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What is minimised."""
        dense = losses["dense"] * (1.0 if "answer" not in losses else self.recipe.dense_weight)
        looking = sum(loss for name, loss in losses.items() if name.startswith("looking"))
        return dense + losses.get("answer", 0.0) + self.recipe.looking_weight * looking

    @property
    def frozen(self) -> bool:
        """Whether the vision tower rests at this step."""
        return 0 <= self.step - self.recipe.vision_steps < self.recipe.frozen_steps

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The dense loss and, where the batch has questions, the answers' cross-entropy per token."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            batch = {name: value.to(self.device) for name, value in batch.items()}
            patches = self._patches(batch["pixels"])
            losses = {"dense": self._dense_loss(patches.float(), batch)}
            if "ids" in batch:
                losses |= self._answer_losses(patches[: len(batch["ids"])], batch)
        return losses

    def _answer_losses(self, patches: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses = {}
        attentions = [self.model.model.language_model.layers[number].self_attn for number in LAYERS]
        with watched(attentions) as seen:
            hidden = self._answer_states(patches, batch)
        for index, (attention, note) in enumerate(zip(attentions, seen, strict=True)):
            losses[f"looking {LAYERS[index]}"] = looking_loss(
                attention, note, batch["look_from"][:, index], batch["look_to"][:, index]
            )
        wanted = batch["target"] != IGNORED
        logits = self.model.lm_head(hidden[wanted])
        total = functional.cross_entropy(logits.float(), batch["target"][wanted], reduction="sum")
        losses["answer"] = total / wanted.sum().clamp(min=1)  # a share of few pictures may have nothing to ask about
        return losses

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected patches [batch, 64, width], in the language model's embedding space."""
        values = (pixels.float() / 255 - 0.5) / 0.25  # what the processor does to a picture of the right size
        inner = self.model.model
        features = inner.vision_tower(values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return inner.multi_modal_projector(features)

    def _dense_loss(self, patches: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        unit = functional.rms_norm(patches, patches.shape[-1:])
        embedding = self.model.get_input_embeddings().weight
        loss = unit.new_zeros(())
        for name, ids in self.words.items():
            weight = unit.new_ones(len(ids))
            weight[0] = NOTHING_WEIGHT[name]
            logits = unit @ embedding[ids].T
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), batch[name].flatten(), weight)
        grid = (torch.arange(GRID, device=unit.device) + 0.5) / GRID
        own = torch.stack([grid.repeat(GRID), grid.repeat_interleave(GRID)], 1)
        where = torch.where(batch["anchor"][..., None] == 1, batch["center"], own)
        return loss + 10 * functional.mse_loss(self.center_head(unit).float(), where)

    def _answer_states(self, patches: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        embeds = self.model.get_input_embeddings()(batch["ids"])
        count = patches.shape[1]
        embeds = torch.cat([embeds[:, :1], patches.to(embeds.dtype), embeds[:, 1 + count :]], 1)
        mask = attention_mask(batch["segment"]).to(embeds.dtype)
        out = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position"], use_cache=False
        )
        return out.last_hidden_state

    @torch.no_grad()
    def validate(self, batches: int) -> dict[str, float]:
        """Accuracy per task on validation scenes, and of the dense heads on patches that show something.

        An answer counts when every one of its tokens is the most likely one given those before it, which is exactly
        when greedy decoding would give it.
        """
        self.model.eval()
        data = WorldBatches(
            self.processor.tokenizer,
            split="validation",
            seed=0,
            batch=32,
            text=self.recipe.text_tokens,
            start=0,
            stop=batches,
        )
        right, asked = torch.zeros(len(TASK_NAMES)), torch.zeros(len(TASK_NAMES))
        dense = {name: [0, 0] for name in self.words}
        for batch in data:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            patches = self._patches(batch["pixels"])
            unit = functional.rms_norm(patches, patches.shape[-1:])
            for name, ids in self.words.items():
                shown = batch[name] > 0
                guess = (unit @ self.model.get_input_embeddings().weight[ids].T).argmax(-1)
                dense[name][0] += int((guess == batch[name])[shown].sum())
                dense[name][1] += int(shown.sum())
            if self.step <= self.recipe.vision_steps:
                continue
            self._tally(patches, batch, right, asked)
        result = {f"patch {name}": hits / max(1, total) for name, (hits, total) in dense.items()}
        if asked.sum():
            result |= {name: float(r / a) for name, r, a in zip(TASK_NAMES, right, asked, strict=True) if a}
        return {name: round(value, 4) for name, value in result.items()}

    def _tally(
        self, patches: torch.Tensor, batch: dict[str, torch.Tensor], right: torch.Tensor, asked: torch.Tensor
    ) -> None:
        """Count the questions of every task, and those that are answered rightly, into ``asked`` and ``right``."""
        guess = self.model.lm_head(self._answer_states(patches, batch)).argmax(-1)
        wrong = (batch["target"] != IGNORED) & (guess != batch["target"])
        for row in range(len(guess)):
            for number in range(1, int(batch["segment"][row].max()) + 1):
                inside = batch["segment"][row] == number
                task = int(batch["task"][row][inside][0])
                asked[task] += 1
                right[task] += not bool(wrong[row][inside].any())


def _keep_processor(folder: Path, start: str | None) -> LlavaProcessor:
    if not folder.exists():
        fresh = folder.with_suffix(".new")
        processor = build_processor() if start is None else AutoProcessor.from_pretrained(resolve_model(start))
        processor.save_pretrained(fresh)
        os.replace(fresh, folder)
    return AutoProcessor.from_pretrained(folder)  # type: ignore[no-any-return]


def save_pretrained(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the model in bf16 with its processor, as `from_pretrained` and AutoProcessor read it."""
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def log_to(path: Path) -> Callable[[dict[str, Any]], None]:
    """A `report` that appends one JSON object a line to a file."""

    def report(row: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"time": time.strftime("%H:%M:%S"), **row}) + "\n")

    return report
