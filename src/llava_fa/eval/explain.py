"""Which part of a picture an answer rests on: class activation maps over the projector's grid."""

from __future__ import annotations

import dataclasses
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from llava_fa.eval.runner import inputs_of, prompt, room
from llava_fa.hub.visual_tokens import grid_of, visual_tokens_of

SHOWN = 336
"""Side in pixels at which each picture is shown."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """An answer, its mean log-probability a token, and how much each cell of the grid spoke for it (0 to 1)."""

    answer: str
    log_probability: float
    slope: float
    """Of the answer's log-probability when all that is seen grows by a factor: the sum of the map before the relu."""
    saliency: torch.Tensor
    """float32 [height, width]; all zero where nothing in the picture spoke for the answer."""


def explain(
    model: Any, processor: Any, picture: Image.Image, question: str, *, max_new_tokens: int = 48
) -> Explanation:
    """Answer a question, and say what in the picture spoke for the answer.

        S = Σ_t log p(answer token t),   map = relu(Σ_c A_c ⊙ ∂S/∂A_c) / its maximum

    where A [channels, height, width] is what the projector gives for the whole picture, before any pooling; a model's
    visual tokens, their number and their restoration, act behind it. Grad-CAM proper puts the mean of ∂S/∂A_c over the
    cells in the place of each cell's own: made for networks that end in a global mean, it does not find the thing that
    a question is about in a language model (docs/results.md); each cell's own does.

    Args:
        model: a LLaVA model, with or without elastic visual tokens, in its present state.
        processor: its processor, counting the same tokens.
        picture, question: what to ask.
        max_new_tokens: where the answer is cut off.

    Raises:
        FourierError: the model has no grid of visual tokens (LLaVA, LLaVA-NeXT and LLaVA-OneVision have).

    Source: Selvaraju et al., "Grad-CAM" (2017), with the gradients of Draelos and Carin, "HiResCAM" (2020).
    """
    height, width = grid_of(model.config)
    answer, log_probability, grid, slope = evidence(model, processor, picture, question, max_new_tokens=max_new_tokens)
    spoken = (grid * slope).sum(1)
    saliency = spoken.relu().view(height, width).float().cpu()
    peak = saliency.max()
    return Explanation(answer, log_probability, float(spoken.sum()), saliency / peak if peak > 0 else saliency)


def evidence(
    model: Any, processor: Any, picture: Image.Image, question: str, *, max_new_tokens: int = 48
) -> tuple[str, float, torch.Tensor, torch.Tensor]:
    """The answer, its mean log-probability a token, A and ∂S/∂A (`explain`), float64 [height · width, channels]."""
    height, width = grid_of(model.config)
    inputs = inputs_of(model, processor, [[picture]], [prompt(processor, 1, question)])
    longest = min(max_new_tokens, room(model, inputs))
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    start = inputs["input_ids"].shape[1]
    grids: list[torch.Tensor] = []
    projector = model.model.multi_modal_projector

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        grids.append(output.detach().requires_grad_())
        return grids[-1]

    with projector.register_forward_hook(keep, prepend=True), torch.enable_grad():
        mask = torch.ones_like(ids)
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits
        chosen = logits[0, start - 1 : -1].double().log_softmax(-1).gather(1, ids[0, start:, None])
        (slope,) = torch.autograd.grad(chosen.sum(), grids)
    # of tiles the first shows the whole picture; class tokens stand in front
    grid, slope = (x[0, -height * width :].double().detach() for x in (grids[0], slope))
    answer = processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    return answer, float(chosen.detach().mean()), grid, slope


def compare_restoration(model: Any, processor: Any, picture: Image.Image, question: str) -> dict[str, Explanation]:
    """Explanations ``"with FMVR"`` and ``"without FMVR"`` (plain pooling), or ``"model"`` where there is no FMVR."""
    module = visual_tokens_of(model)
    if module is None or module.kind != "fmvr" or module.level == 0:
        return {"model": explain(model, processor, picture, question)}
    explanations = {"with FMVR": explain(model, processor, picture, question)}
    module.restored = False
    try:
        explanations["without FMVR"] = explain(model, processor, picture, question)
    finally:
        module.restored = True
    return explanations


def draw(picture: Image.Image, explanations: dict[str, Explanation]) -> Image.Image:
    """The picture, and beside it, for every explanation, the picture under its map of saliency."""
    size = (SHOWN, SHOWN)
    base = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [base]
    for explanation in explanations.values():
        values = Image.fromarray((255 * explanation.saliency).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
        colors = matplotlib.colormaps["turbo"](np.asarray(values) / 255.0)[..., :3]
        heat = Image.fromarray((255 * colors).astype(np.uint8))
        panels.append(Image.blend(base, heat, 0.55))
    sheet = Image.new("RGB", (len(panels) * (SHOWN + 8) - 8, SHOWN), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index * (SHOWN + 8), 0))
    return sheet
