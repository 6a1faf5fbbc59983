"""The recipe that trains the tiny LMM from nothing, resumable, on a GPU or on two CPU cores."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava_fa.errors import FourierError
from llava_fa.hub.shards import write_atomically
from llava_fa.hub.source import resolve_model
from llava_fa.world.elastic import ElasticLearner
from llava_fa.world.learner import Learner
from llava_fa.world.mixture import MixtureLearner
from llava_fa.world.model import build_processor
from llava_fa.world.packing import TASK_NAMES, WorldBatches
from llava_fa.world.recipe import Recipe


def new_learner(processor: LlavaProcessor, recipe: Recipe, device: torch.device) -> Learner:
    """The learner that a recipe asks for."""
    if recipe.experts is not None:
        return MixtureLearner(processor, recipe, device)
    return (Learner if recipe.visual_tokens is None else ElasticLearner)(processor, recipe, device)


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
    make_learner: Callable[[LlavaProcessor, Recipe, torch.device], Learner] = new_learner,
) -> LlavaForConditionalGeneration:
    """Run the recipe; resume from ``out/state.pt`` where there is one; leave the model in ``out/model`` at the end.

    The processor is kept in ``out/processor``: the weights know words by number, and a package whose vocabulary was
    learnt anew (`llava_fa.world.vocabulary`) must not renumber them under a run.
    A longer ``language_steps`` than that of the run that left the state continues it, cool-down included.
    ``make_learner`` gives what takes the steps, by default the one that the recipe asks for.

    Raises:
        FourierError: the loss is not finite any more (the last good state is kept).
    """
    out.mkdir(parents=True, exist_ok=True)
    processor = _keep_processor(out / "processor", recipe.start)
    learner = make_learner(processor, recipe, torch.device(device))
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
                write_atomically(state_path, partial(torch.save, learner.state()))
            if learner.step % check_every == 0 or learner.step == recipe.steps:
                report({"step": learner.step, "validation": learner.validate(check_batches)})
                began = time.monotonic()
    save_pretrained(learner.model, processor, out / "model")
    return learner.model


def _keep_processor(folder: Path, start: str | None) -> LlavaProcessor:
    if not folder.exists():
        fresh = folder.with_suffix(".new")
        processor = (
            build_processor()
            if start is None
            else AutoProcessor.from_pretrained(resolve_model(start), trust_remote_code=False)
        )
        processor.save_pretrained(fresh)
        os.replace(fresh, folder)
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)  # type: ignore[no-any-return]


def save_pretrained(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the model in bf16 with its processor, as `from_pretrained` and AutoProcessor read it."""
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def log_to(path: Path) -> Callable[[dict[str, Any]], None]:
    """A `report` that appends one JSON object a line to a file."""

    def report(row: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"time": time.strftime("%H:%M:%S"), **row}) + "\n")

    return report
