"""The same prompts put to vLLM, in this process, and to transformers: greedy tokens and their log-probabilities."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 4,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
    "disable_log_stats": True,
}
"""Of an engine for a small model."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text with a placeholder for each picture, as a family's processor expects them.

    Attributes:
        text, pictures: as said.
        settings: of vLLM's processor (``mm_processor_kwargs``).
    """

    text: str
    pictures: tuple[Image.Image, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        asked: the prompt's tokens, placeholders expanded.
        tokens: the answer's.
        log_probabilities: of each of them.
    """

    asked: list[int]
    tokens: list[int]
    log_probabilities: list[float]


def from_vllm(
    folder: Path,
    prompts: Sequence[Prompt],
    count: int,
    look: Callable[[Any], Any] | None = None,
    *,
    together: bool = False,
    lora: Any = None,
    **options: Any,
) -> tuple[list[Answer], Any]:
    """vLLM's answers of so many tokens each.

    Args:
        look: told the model, once it has answered.
        together: whether all prompts are put at once, instead of one at a time.
        lora: an adapter that answers, too (vLLM's ``LoRARequest``).
        options: of the engine, beside `OPTIONS`.

    Returns:
        The answers, and what `look` returned.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine, seen = LLM(str(folder), **{**OPTIONS, **options}), None
    try:
        greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0)
        answers = []
        requests = [_request(prompt) for prompt in prompts]
        for made in (
            made
            for some in ([requests] if together else [[request] for request in requests])
            for made in engine.generate(some, greedy, use_tqdm=False, lora_request=lora)
        ):
            (out,) = made.outputs
            tokens = list(out.token_ids)
            likely = [at[token].logprob for at, token in zip(out.logprobs, tokens, strict=True)]
            answers.append(Answer(list(made.prompt_token_ids), tokens, likely))
        if look is not None:
            (seen,) = engine.apply_model(look)
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()
    return answers, seen


def _request(prompt: Prompt) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt": prompt.text}
    if prompt.pictures:
        request["multi_modal_data"] = {"image": list(prompt.pictures)}
    if prompt.settings:
        request["mm_processor_kwargs"] = dict(prompt.settings)
    return request


@torch.no_grad()
def from_transformers(folder: Path, prompts: Sequence[Prompt], count: int) -> list[Answer]:
    """transformers' answers of so many tokens each, in float32."""
    from llava_fa.hub.loading import load

    model, processor = load(folder, "cpu", torch.float32)
    model.generation_config.eos_token_id = None  # as vLLM goes on behind the end
    answers = []
    for prompt in prompts:
        pictures = {"images": list(prompt.pictures)} if prompt.pictures else {}
        inputs = processor(text=[prompt.text], return_tensors="pt", **pictures)
        (asked,) = inputs["input_ids"].tolist()
        made = model.generate(
            **inputs, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        tokens = made.sequences[0, len(asked) :].tolist()
        likely = [float(at[0].log_softmax(-1)[token]) for at, token in zip(made.logits, tokens, strict=True)]
        answers.append(Answer(asked, tokens, likely))
    return answers
