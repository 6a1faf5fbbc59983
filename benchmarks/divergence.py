"""KL divergence of the next-token distribution of a compressed LLaVA-type model against the original's."""

from __future__ import annotations

from typing import Any

import torch

from llava_fa.hub.calibration_data import answer_start, prepare
from llava_fa.hub.loading import load
from llava_fa.world.samples import held_out_samples


class Divergence:
    """KL(original ‖ compressed) per answer token on the first ``count`` held-out questions, task by task in turn."""

    def __init__(self, model: str, count: int) -> None:
        self.original, processor = load(model, dtype=torch.float32)
        drawn = held_out_samples(count)
        samples = [(s.image, s.question.text, s.question.answer) for s in drawn]
        self.inputs = list(prepare(samples, processor))
        self.starts = [answer_start(s, x, processor) for s, x in zip(samples, self.inputs, strict=True)]
        self.logs = self._logs(self.original)

    @torch.inference_mode()
    def _logs(self, model: Any) -> list[torch.Tensor]:
        found = []
        for x, start in zip(self.inputs, self.starts, strict=True):
            given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in x.items()}
            found.append(model(**given, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1))
        return found

    def __call__(self, model: Any) -> float:
        pairs = zip(self.logs, self._logs(model), strict=True)
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
        return total / sum(len(p) for p in self.logs)
