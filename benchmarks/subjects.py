"""The models that peers are compared on, how ours compresses them, and what is measured of a compressed one."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from pathlib import Path
from typing import Any

import language
import torch
from common import compressed
from real_layers import collect, minilm_windows
from stagewise import Rounded, round_layers
from torch import Tensor, nn

import llava_fa
from llava_fa import Budget, FourierConfig
from llava_fa.eval.divergence import Divergence
from llava_fa.eval.metrics import normalise
from llava_fa.eval.runner import answer
from llava_fa.eval.world import score
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.loading import load
from llava_fa.maths.metrics import output_error, stored_bytes
from llava_fa.nn.surgery import classify
from llava_fa.world.samples import calibration_samples, held_out_samples

MOMENT_SAMPLES = 60
HELD_OUT_WINDOWS = 96
WINDOW, MANUALS = 256, 32
"""Tokens of a language model's window, and held-out windows."""


class LMM:
    """A LLaVA-type model: output error, KL of the next-token distribution, accuracy per task of the world suite.

    Everything runs in float32 with dense weights: a compressed model is decoded once (the same function of the input
    up to rounding), so that all rows run the same code.
    """

    def __init__(self, model: str, samples: int, questions: int, limit: int) -> None:
        self.path, self.questions = model, held_out_samples(limit) if limit else []
        self.samples = calibration_samples(samples)
        self.divergence = Divergence(model, questions)
        self.original, self.processor = self.divergence.original, load(model)[1]
        self.original.requires_grad_(False)
        self.names = list(classify(self.original).layers)
        self.inputs = list(prepare(self.samples, self.processor))
        held_out = self.divergence.references.inputs[:: max(1, questions // MOMENT_SAMPLES)]
        layers = {name: self.original.get_submodule(name) for name in self.names}
        self.moments = collect(layers, lambda: [self.original(**x) for x in held_out])

    def dense(self) -> nn.Module:
        """A copy of the original to be rounded in place."""
        return copy.deepcopy(self.original)

    def ours(
        self, folder: Path, config: FourierConfig, budget: Budget | None, *, data: bool
    ) -> tuple[nn.Module, float]:
        """What `llava_fa.compress` makes of it, and its true bits per weight."""
        samples = self.samples if data else None
        model, _, report = compressed(self.path, folder, config, samples, budget=budget)
        shutil.rmtree(folder)
        return model, report.bits_per_weight

    def measure(self, model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {"output_error": mean_output_error(self, model), "kl": self.kl(model)}
        if not self.questions:
            return found
        # what evaluate_world does, the pictures drawn once for all rows
        answers = answer(model, self.processor, [(s.image, s.question.text) for s in self.questions])
        tasks = score(self.questions, answers)
        found["accuracy"] = sum(task["score"] for task in tasks.values()) / len(tasks)
        # for the error of a difference: which questions are answered exactly, but for captions, which never are
        asked = [(s.question, a) for s, a in zip(self.questions, answers, strict=True)]
        hits = "".join("01"[normalise(a) == normalise(q.answer)] for q, a in asked if q.task != "caption")
        return {**found, "tasks": {task: result["score"] for task, result in tasks.items()}, "hits": hits}

    def kl(self, model: nn.Module) -> float:
        return self.divergence(model)


class Language:
    """SmolLM2-135M-Instruct (`language`): KL of the next token and perplexity on manuals; calibrated with prose.

    Samples are turns of a chat, as a user would give them: the model continues a text.
    """

    def __init__(self, samples: int) -> None:
        self.path = str(language.folder())
        self.original, tokenizer = load(self.path, dtype=torch.float32)
        self.original.requires_grad_(False)
        self.names = list(classify(self.original).layers)
        self.samples = [
            continued(tokenizer, window) for window in language.windows(language.prose(), tokenizer, WINDOW, samples)
        ]
        self.inputs = list(prepare(self.samples, tokenizer))
        self.held_out = language.windows(language.manuals(), tokenizer, WINDOW, MANUALS)
        layers = {name: self.original.get_submodule(name) for name in self.names}
        self.moments = collect(layers, lambda: [self.original(input_ids=part) for part in self.held_out.split(4)])

    def dense(self) -> nn.Module:
        """A copy of the original to be rounded in place."""
        return copy.deepcopy(self.original)

    def ours(
        self, folder: Path, config: FourierConfig, budget: Budget | None, *, data: bool
    ) -> tuple[nn.Module, float]:
        """What `llava_fa.compress` makes of it, and its true bits per weight."""
        model, _, report = compressed(self.path, folder, config, self.samples if data else None, budget=budget)
        shutil.rmtree(folder)
        return model, report.bits_per_weight

    def measure(self, model: nn.Module) -> dict[str, Any]:
        nats, perplexity = self._compared(model)
        return {"output_error": mean_output_error(self, model), "kl": nats, "perplexity": perplexity}

    def kl(self, model: nn.Module) -> float:
        return self._compared(model)[0]

    @torch.inference_mode()
    def _compared(self, model: nn.Module) -> tuple[float, float]:
        """KL(original ‖ model) a token, nats, and the model's perplexity."""
        nats = surprise = 0.0
        for part in self.held_out.split(2):
            p, q = (m(input_ids=part, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (self.original, model))
            nats += float((p.exp() * (p - q)).sum())
            surprise -= float(q.gather(-1, part[:, 1:, None]).sum())
        tokens = self.held_out[:, 1:].numel()
        return nats / tokens, math.exp(surprise / tokens)


def continued(tokenizer: Any, window: Tensor) -> list[dict[str, Any]]:
    """A window of text as a turn to continue it: its first quarter is the question, the rest the answer."""
    quarter = len(window) // 4
    asked, answered = (tokenizer.decode(part) for part in (window[:quarter], window[quarter:]))
    turns = {"user": f"Continue this text: {asked}", "assistant": answered}
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns.items()]


class Encoder:
    """all-MiniLM-L6-v2, a sentence encoder trained by others: output error, error of the final states, and retrieval.

    Its next-token distribution is the softmax over 20 × the cosines of a text's mean embedding with the other texts':
    what it was trained to get right. KL is between that distribution and the original's; `agreement` is the share of
    texts whose nearest neighbour stays the same.
    """

    def __init__(self, windows: int) -> None:
        self.original, texts = minilm_windows()
        self.original.requires_grad_(False)
        self.held_out, calibration = texts[:HELD_OUT_WINDOWS], texts[HELD_OUT_WINDOWS:][:windows]
        self.names = [n for n, m in self.original.named_modules() if isinstance(m, nn.Linear) and "encoder" in n]
        self.inputs = [{"input_ids": part} for part in calibration.split(1)]
        layers = {name: self.original.get_submodule(name) for name in self.names}
        self.moments = collect(layers, lambda: self._states(self.original))

    def dense(self) -> nn.Module:
        return copy.deepcopy(self.original)

    def ours(
        self, folder: Path, config: FourierConfig, budget: Budget | None, *, data: bool
    ) -> tuple[nn.Module, float]:
        """`llava_fa.approximate` on every layer (the product's compressor is for LLaVA-type models)."""
        assert budget is None
        model = self.dense()

        def rounder(weight: Tensor, moment: Tensor | None) -> Rounded:
            result = llava_fa.approximate(weight, config, moment)
            tensors = dict(result.tensors)
            codebook = tensors.pop("codebook", None)
            shared = {} if codebook is None else {"codebook": 8.0 * stored_bytes([codebook])}
            return Rounded(result.dequantize(), 8.0 * stored_bytes(tensors.values()), shared)

        return model, round_layers(model, self.names, rounder, self.inputs if data else None, follow=True)

    @torch.no_grad()
    def _states(self, model: nn.Module) -> Tensor:
        return torch.cat([model(input_ids=part).last_hidden_state for part in self.held_out.split(16)])

    @functools.cached_property
    def _reference(self) -> Tensor:
        return self._states(self.original)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        before, after = self._reference, self._states(model)
        same = retrieval(before).argmax(1) == retrieval(after).argmax(1)
        return {
            "output_error": mean_output_error(self, model),
            "state_error": float((after - before).norm() / before.norm()),
            "kl": self.kl(model),
            "accuracy": float(same.float().mean()),
            "hits": "".join("01"[hit] for hit in same.tolist()),
        }

    def kl(self, model: nn.Module) -> float:
        p, q = retrieval(self._reference), retrieval(self._states(model))
        return float((p.exp() * (p - q)).nan_to_num().sum(1).mean())


def retrieval(states: Tensor) -> Tensor:
    """Log-probabilities [texts, texts] of what each text is matched with, itself left out; states [texts, t, d]."""
    embedding = nn.functional.normalize(states.mean(1), dim=1)
    cosines = 20 * embedding @ embedding.T
    return cosines.fill_diagonal_(-torch.inf).log_softmax(1)


def mean_output_error(subject: LMM | Language | Encoder, model: nn.Module) -> float:
    """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) under the original's inputs on held-out samples, averaged over the layers."""
    total = 0.0
    for name in subject.names:
        before, after = (m.get_submodule(name).weight.data.float() for m in (subject.original, model))
        total += output_error(before, after, subject.moments[name])
    return total / len(subject.names)
