"""Answer questions with a vision-language model, in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from llava_fa.data.samples import MARK, split_at_marks
from llava_fa.errors import FourierError
from llava_fa.eval.intervals import interval_of_mean
from llava_fa.eval.metrics import normalise
from llava_fa.eval.world import score
from llava_fa.hub.flops import count_flops
from llava_fa.hub.loading import context_length
from llava_fa.hub.visual_tokens import set_visual_tokens, visual_tokens_of
from llava_fa.world.samples import held_out_samples

_MARKS = 2
"""Tokens that a chat template adds at least."""


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[Image.Image | Sequence[Image.Image], str]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    until: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Answers to (picture or frames, question) pairs, in their order; greedy ones unless ``sampling`` says otherwise.

    Args:
        model: any image-text-to-text model of transformers, original or compressed.
        processor: its processor, with a chat template.
        questions: the pairs, a pair without pictures too; longer questions are batched together, so padding is little.
        batch_size: questions at a time.
        max_new_tokens: where an answer is cut off.
        until: texts at which an answer ends; they are left out.
        sampling: how the next token is chosen, by the names of `generate`; ``{"do_sample": True, "top_p": 0.9}``.
        progress: called with (answered, all) after every batch.
    """
    answers = [""] * len(questions)
    shown = [pictures_of(seen) for seen, _ in questions]
    asked = [question for _, question in questions]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **(sampling or {})}
    if until:
        options |= {"stop_strings": list(until), "tokenizer": processor.tokenizer}
    processor.tokenizer.padding_side = "left"
    done = 0
    for chosen in batches(asked, shown, batch_size):
        prompts = [prompt(processor, len(shown[i]), asked[i]) for i in chosen]
        inputs = inputs_of(model, processor, [shown[i] for i in chosen], prompts)
        ids = model.generate(**inputs, **options)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = cut(text, until)
        done += len(chosen)
        progress(done, len(questions))
    return answers


def cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it, without the space around it."""
    return text[: min((text.find(end) for end in until if end in text), default=None)].strip()


def pictures_of(seen: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures that go with a question: one, frames, or none."""
    return [seen] if isinstance(seen, Image.Image) else list(seen)


def inputs_of(model: Any, processor: Any, pictures: Sequence[list[Image.Image]], texts: Sequence[str]) -> Any:
    """What a model is given for a batch; its texts all have pictures, or none has."""
    images = list(pictures) if pictures[0] else None
    several = len(texts) > 1  # some tokenizers have nothing to pad with
    inputs = processor(images=images, text=list(texts), padding=several, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def room(model: Any, inputs: Any, name: str = "", *, fewer: bool = False) -> int:
    """How many tokens an answer to these inputs may have in the model's context.

    Args:
        model, inputs: of one question.
        name: of the model, for the error.
        fewer: whether pictures could be told in fewer tokens.

    Raises:
        FourierError: none is left.
    """
    length, context = inputs["input_ids"].shape[-1], context_length(model)
    if length >= context:
        raise FourierError(
            f"picture and question are {length} tokens, the model takes {context} with its answer",
            remedy="Ask a shorter question" + (", or choose fewer visual tokens" if fewer else ""),
            where=name,
        )
    return context - length


def batches(texts: Sequence[str], shown: Sequence[Sequence[Any]], batch_size: int) -> Iterator[list[int]]:
    """Questions of like length, by index; those that are ``shown`` no pictures go apart."""
    for with_pictures in (False, True):
        order = [i for i, pictures in enumerate(shown) if bool(pictures) == with_pictures]
        order.sort(key=lambda i: len(texts[i]))
        yield from (order[first : first + batch_size] for first in range(0, len(order), batch_size))


def content_of(pictures: int, question: str) -> list[dict[str, str]]:
    """The parts of a chat message that asks a question about so many pictures.

    The pictures come first, as in LLaVA's training, unless the question itself holds `<image>` once for each.
    """
    parts = [question]
    if MARK in question:
        parts = split_at_marks(question)
    if len(parts) - 1 != pictures:
        parts = [*[""] * pictures, "\n".join(filter(None, parts))]
    content: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": part}] if part else []
    return content


def prompt(processor: Any, pictures: int, question: str, answer: str | None = None) -> str:
    """A question as the model's chat template has it, up to where the answer begins; or up to the end of ``answer``."""
    messages = [{"role": "user", "content": content_of(pictures, question)}]
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    said = (answer or "").strip()
    if answer is None or not said:
        return text
    messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    whole: str = processor.apply_chat_template(messages)
    rest = whole[len(text) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    if not whole.startswith(text) or not rest.lstrip().startswith(said):
        return text + answer  # a template that rewrites what comes before, or thinks first
    return text + space + said


def answer_elastic(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[Image.Image | Sequence[Image.Image], str]],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> tuple[list[str], list[int], dict[str, Any]]:
    """Greedy answers, each from as few visual tokens as the question needs by the model's own judgement.

    A question is asked with the smallest set of tokens, then with the next, until two answers running agree (or all
    tokens are used): the smaller of these two sets was enough.

    Returns:
        answers; for each question the set that was enough; and the cost: ``mean_tokens`` of those sets,
        ``tokens_spent`` (mean over the questions of all sets tried, the one that confirmed included), ``flops_share``,
        the operations of everything tried as a share of asking once with all tokens (generated tokens apart; the
        vision tower counted once, as if its grid were kept), and ``enough``, how many questions each set sufficed for.

    Raises:
        FourierError: nothing is attached to the model that could give fewer tokens.
    """
    module = visual_tokens_of(model)
    if module is None:
        raise FourierError(
            "the model always uses all its visual tokens", remedy="Train it with --matryoshka, or give a number"
        )
    before, counts = module.tokens, sorted(module.counts)
    answers, enough = [""] * len(questions), [counts[-1]] * len(questions)
    tried: list[list[int]] = [[] for _ in questions]
    waiting = list(range(len(questions)))
    try:
        for index, count in enumerate(counts):
            set_visual_tokens(model, count, processor)
            texts = answer(model, processor, [questions[i] for i in waiting], **options)
            agreed = set()
            for i, text in zip(waiting, texts, strict=True):
                if index and normalise(text) == normalise(answers[i]):
                    agreed.add(i)
                    enough[i] = counts[index - 1]
                answers[i] = text
                tried[i].append(count)
            waiting = [i for i in waiting if i not in agreed]
            progress(len(questions) - len(waiting), len(questions))
            if not waiting:
                break
    finally:
        set_visual_tokens(model, before, processor)
    progress(len(questions), len(questions))
    shares = []
    for (seen, question), sets in zip(questions, tried, strict=True):
        size = {"text": len(processor.tokenizer.encode(question)) + _MARKS, "pictures": len(pictures_of(seen))}
        full = count_flops(model.config, visual_tokens=counts[-1], **size)
        spent = sum(count_flops(model.config, visual_tokens=count, **size).language_model for count in sets)
        shares.append((full.vision_tower + full.projector + spent) / full.total)
    many = max(1, len(questions))
    cost = {
        "mean_tokens": sum(enough) / many,
        "tokens_spent": sum(map(sum, tried)) / many,
        "flops_share": sum(shares) / many,
        "enough": {str(count): enough.count(count) for count in counts},
    }
    return answers, enough, cost


def evaluate_world(
    model: Any,
    processor: Any,
    *,
    limit: int = 2250,
    seed: int = 0,
    blank: bool = False,
    elastic: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score a model on held-out questions of the world, in memory (`benchmarks.run` keeps a run on disk).

    Args:
        model, processor: as for `answer`.
        limit: about how many questions, shared equally by the tasks.
        seed: of the test pictures.
        blank: show a grey picture instead of each: what the model knows without looking.
        elastic: choose the number of visual tokens for every question (`answer_elastic`).
        options: those of `answer`.

    Returns:
        ``accuracy`` (mean of the tasks' scores), its 95 % ``interval``, ``tasks`` (task → score, metric, interval,
        ...), ``questions``, ``seconds``, and ``answers``: one row per question, for comparing models; with ``elastic``
        also ``visual_tokens``, the cost.
    """
    began = time.monotonic()
    samples = held_out_samples(limit, seed)
    shown = [Image.new("RGB", s.image.size, (128, 128, 128)) if blank else s.image for s in samples]
    pairs = [(picture, s.question.text) for picture, s in zip(shown, samples, strict=True)]
    cost: dict[str, Any] = {}
    if elastic:
        predictions, _, cost = answer_elastic(model, processor, pairs, **options)
    else:
        predictions = answer(model, processor, pairs, **options)
    tasks = score(samples, predictions)
    return {
        "accuracy": sum(task["score"] for task in tasks.values()) / len(tasks),
        "interval": list(interval_of_mean(tasks)),
        "tasks": tasks,
        "questions": len(samples),
        "seconds": time.monotonic() - began,
        **({"visual_tokens": cost} if elastic else {}),
        "answers": [
            {"task": s.question.task, "question": s.question.text, "expected": s.question.answer, "answer": p}
            for s, p in zip(samples, predictions, strict=True)
        ],
    }
