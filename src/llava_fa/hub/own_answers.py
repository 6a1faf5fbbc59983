"""What a model itself answers to the questions that it is calibrated with, where nobody else has (`data.asked`).

Greedy, since a killed run must end with the same bytes; every answer is kept in the work folder as it comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.hub.blocks import placed
from llava_fa.hub.course import passes
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import WorkFolder

FILE = "answers.json"
"""Of the work folder: number of a sample → what was answered."""
LENGTH = 64
"""Tokens of an answer at most."""


@torch.inference_mode()
def own_answers(
    model: Any,
    processor: Any,
    inputs: Sequence[Mapping[str, Tensor]],
    work: WorkFolder,
    tell: Callable[[str], object],
    memory: int | None = None,
) -> list[str]:
    """The answer to every sample, which ends where the answer begins; those that are known are not asked for again.

    Where the weights are on the disk, as many are asked side by side as the memory holds what they attend to: every
    token takes one reading of the model.

    Args:
        model: the original, in memory or streamed.
        processor: of the same.
        inputs: prepared samples, each a batch of one.
        work: where answers are kept.
        tell: called with words for people before some are asked.
        memory: bytes that the process may take, where the weights are on the disk; None: what is free.

    Raises:
        FourierError: the model fails on a sample, which is named.
    """
    known: dict[str, str] = work.read_json(FILE) or {}
    missing = [index for index in range(len(inputs)) if str(index) not in known]
    step = _together(model, inputs, memory) if Weights.of(model).streamed else 1
    for first in range(0, len(missing), step):
        some = missing[first : first + step]
        tell(f"question {some[0] + 1} of {len(inputs)}")
        found = passes(model, [functools.partial(_answer, model, processor, inputs[i], i) for i in some])
        known |= {str(index): text for index, text in zip(some, found, strict=True)}
        work.write_json(FILE, known)
    return [known[str(index)] for index in range(len(inputs))]


def _answer(model: Any, processor: Any, sample: Mapping[str, Tensor], index: int) -> str:
    try:
        ids = model.generate(**placed(model, sample), max_new_tokens=LENGTH, do_sample=False)
    except (FourierError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a sample the model cannot take, a model that cannot generate
        raise FourierError(
            f"the model does not answer it ({type(error).__name__}: {error})",
            remedy="Check the sample, or give samples with answers",
            where=f"calibration sample {index}",
        ) from error
    tokens = ids[0, sample["input_ids"].shape[1] :]
    tokenizer = getattr(processor, "tokenizer", processor)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _together(model: Any, inputs: Sequence[Mapping[str, Tensor]], memory: int | None) -> int:
    """How many samples' keys and values half of the memory left holds; at least one."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * next(model.parameters()).dtype.itemsize
    longest = max(sample["input_ids"].shape[1] for sample in inputs) + LENGTH
    free = psutil.virtual_memory().available
    left = free if memory is None else min(free, memory - psutil.Process().memory_info().rss)
    return max(1, left // 2 // (a_token * longest))
