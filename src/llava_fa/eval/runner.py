"""Answer questions with a vision-language model, in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from llava_fa.eval.world import score
from llava_fa.world.samples import Sample, held_out_samples


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[Image.Image, str]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers to (picture, question) pairs, in their order.

    Args:
        model: any image-text-to-text model of transformers, original or compressed.
        processor: its processor, with a chat template.
        questions: the pairs; longer questions are batched together, so padding is little.
        batch_size: questions at a time.
        max_new_tokens: where an answer is cut off.
        progress: called with (answered, all) after every batch.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][1]))
    answers = [""] * len(questions)
    processor.tokenizer.padding_side = "left"
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[i][1]}]}],
                add_generation_prompt=True,
            )
            for i in chosen
        ]
        inputs = processor(
            images=[[questions[i][0]] for i in chosen], text=prompts, padding=True, return_tensors="pt"
        ).to(model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        progress(min(first + batch_size, len(order)), len(order))
    return answers


def evaluate_world(
    model: Any,
    processor: Any,
    *,
    limit: int = 2250,
    seed: int = 0,
    blank: bool = False,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Score a model on held-out questions of the world.

    Args:
        model, processor: as for `answer`.
        limit: about how many questions, shared equally by the tasks.
        seed: of the test pictures.
        blank: show a grey picture instead of each: what the model knows without looking.
        batch_size, progress: as for `answer`.

    Returns:
        ``accuracy`` (mean of the tasks' scores), ``tasks`` (task → score, metric, ...), ``questions``, ``seconds``,
        and ``answers``: one row per question, for comparing models.
    """
    began = time.monotonic()
    samples: list[Sample] = held_out_samples(limit, seed)
    grey = Image.new("RGB", samples[0].image.size, (128, 128, 128))
    pairs = [(grey if blank else s.image, s.question.text) for s in samples]
    predictions = answer(model, processor, pairs, batch_size=batch_size, progress=progress)
    tasks = score(samples, predictions)
    return {
        "accuracy": sum(task["score"] for task in tasks.values()) / len(tasks),
        "tasks": tasks,
        "questions": len(samples),
        "seconds": time.monotonic() - began,
        "answers": [
            {"task": s.question.task, "question": s.question.text, "expected": s.question.answer, "answer": p}
            for s, p in zip(samples, predictions, strict=True)
        ],
    }
