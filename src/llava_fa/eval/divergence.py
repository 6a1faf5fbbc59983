"""KL divergence of the next-token distribution of a compressed vision-language model against the original's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llava_fa.hub.calibration_data import answer_start, prepare
from llava_fa.hub.loading import load
from llava_fa.world.samples import Sample, held_out_samples

Progress = Callable[[int, int], None]


class References:
    """Questions with their right answers as a model reads them, and where in the tokens each answer begins."""

    def __init__(self, samples: Sequence[Sample], processor: Any) -> None:
        triples = [(s.image, s.question.text, s.question.answer) for s in samples]
        self.inputs: list[Mapping[str, torch.Tensor]] = list(prepare(triples, processor))
        self.starts = [answer_start(s, x, processor) for s, x in zip(triples, self.inputs, strict=True)]

    @torch.inference_mode()
    def log_probabilities(self, model: Any, progress: Progress = lambda done, total: None) -> list[torch.Tensor]:
        """log p of every token of the vocabulary at every token of each answer: float32 [tokens, vocabulary].

        Teacher-forced: token t is predicted from the picture, the question and the right answer up to t - 1. One
        question at a time, so that no padding enters.
        """
        logs = []
        for index, (x, start) in enumerate(zip(self.inputs, self.starts, strict=True)):
            inputs = {k: v.to(model.device) for k, v in x.items()}
            inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            logits = model(**inputs, use_cache=False).logits[0, start - 1 : -1]
            logs.append(logits.float().log_softmax(-1).cpu())
            progress(index + 1, len(self.inputs))
        return logs


def token_divergences(original: Sequence[torch.Tensor], compressed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """KL(original ‖ compressed) = Σ_v p (log p - log q) at every answer token, in nats: float32 [tokens] a question."""
    return [(p.exp() * (p - q)).sum(-1) for p, q in zip(original, compressed, strict=True)]


class Divergence:
    """KL(original ‖ compressed) per answer token on about ``count`` held-out questions, every task alike."""

    def __init__(self, model: str, count: int) -> None:
        self.original, processor = load(model, dtype=torch.float32)
        self.references = References(held_out_samples(count), processor)
        self.logs = self.references.log_probabilities(self.original)

    def __call__(self, model: Any) -> float:
        """Nats per answer token of a model that reads the same inputs."""
        rows = token_divergences(self.logs, self.references.log_probabilities(model))
        return sum(float(row.sum()) for row in rows) / sum(len(row) for row in rows)
