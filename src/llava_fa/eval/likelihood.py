"""How likely a vision-language model finds an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from llava_fa.eval.runner import batches, inputs_of, pictures_of, prompt


@torch.inference_mode()
def log_likelihood(
    model: Any,
    processor: Any,
    answers: Sequence[tuple[Image.Image | Sequence[Image.Image], str, str]],
    *,
    batch_size: int = 16,
) -> list[tuple[float, bool]]:
    """For each (picture or frames, question, answer): the answer's log-probability, and whether it is the greedy one.

        log p(answer | picture, question) = Σ_t log p(y_t | picture, question, y_<t)

    over the answer's tokens y, in nats; the mark that ends a turn is not one of them. The question is put as `answer`
    of the runner puts it, and the chat template says what stands between it and the answer, spaces around which are not
    counted. Where the last token of the question is another once the answer follows, it belongs to the answer.

    Args:
        model: any image-text-to-text model of transformers, original or compressed.
        processor: its processor, with a chat template.
        answers: the triples; an answer may be empty, and is certain then.
        batch_size: triples at a time.
    """
    tokenizer = processor.tokenizer
    shown = [pictures_of(seen) for seen, _, _ in answers]
    texts = [prompt(processor, len(s), q, a) for s, (_, q, a) in zip(shown, answers, strict=True)]
    counts = []
    for s, (_, question, _), text in zip(shown, answers, texts, strict=True):
        # a picture is one token here and many in the model's inputs, but always before the answer
        before, whole = tokenizer(prompt(processor, len(s), question))["input_ids"], tokenizer(text)["input_ids"]
        same = next((i for i, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
        counts.append(len(whole) - same)
    results = [(0.0, True)] * len(answers)
    tokenizer.padding_side = "right"  # positions are counted from the left where none are given
    for chosen in batches(texts, shown, batch_size):
        inputs = inputs_of(model, processor, [shown[i] for i in chosen], [texts[i] for i in chosen])
        logits = model(**inputs, use_cache=False).logits
        for row, i in enumerate(chosen):
            end = int(inputs["attention_mask"][row].sum())
            ids = inputs["input_ids"][row, end - counts[i] : end]
            logs = logits[row, end - counts[i] - 1 : end - 1].float().log_softmax(-1)
            chosen_logs = logs.gather(-1, ids[:, None])
            results[i] = (float(chosen_logs.double().sum()), bool((logs.argmax(-1) == ids).all()))
    return results
