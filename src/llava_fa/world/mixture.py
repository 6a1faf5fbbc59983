"""The tiny LMM with a mixture of experts in its language model, upcycled from a trained dense one.

A fixed part of every MLP's neurons becomes the shared expert; each expert begins with half of the others, so that two
experts drawn blindly come to the dense MLP on average. Part of what an expert begins with is drawn anew, as
drop-upcycling does (Nakamura et al., 2025): experts that are all alike at first would stay alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2MoeConfig

from llava_fa.errors import FourierError
from llava_fa.world.learner import Batch, Learner
from llava_fa.world.recipe import Recipe

CHOSEN = 2
"""Experts that every token goes to, beside the shared one."""

DRAWN_ANEW = 0.5
"""Share of an expert's neurons that are drawn anew."""

PICTURES = 12
"""Of a step."""

BALANCE_WEIGHT = 0.02
"""Weight of the load-balancing loss."""

_ALIKE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def mixture_recipe(experts: int, steps: int, *, start: str = "tiny", seed: int = 1) -> Recipe:
    """How a trained dense model becomes a mixture: by questions, the vision tower at rest; half the steps cool down."""
    return Recipe(
        vision_steps=0,
        language_steps=steps,
        warmup_steps=min(20, steps),
        cooldown_steps=max(1, steps // 2),
        frozen_steps=steps,
        language_batch=PICTURES,
        wordy_batch=0,
        dense_weight=0.0,
        start=start,
        experts=experts,
        seed=seed,
    )


def upcycled(model: LlavaForConditionalGeneration, experts: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with a mixture in the place of each of the language model's MLPs (Qwen2 → Qwen2-MoE).

    Of the dense MLP's d neurons the first d/2 (in an order drawn from the seed) are the shared expert's; each expert
    has d/4: a half of the rest, experts 2k and 2k + 1 complementary halves, of which `DRAWN_ANEW` give way to neurons
    drawn anew, which say nothing at first. Down projections are doubled: the gate of the shared expert begins at ½,
    and the two routing weights sum to 1.

    Args:
        model: a LLaVA model whose language model is Qwen2, float32.
        experts: how many; even.
        seed: of the routers, and of who gets which neurons.

    Raises:
        FourierError: another language model, an odd number of experts or fewer than are chosen, or a width that does
            not divide by 8.
    """
    old = model.config.text_config
    if old.model_type != "qwen2" or old.intermediate_size % 8:
        raise FourierError(
            f"a language model of type {old.model_type} with {old.intermediate_size} neurons cannot be upcycled",
            remedy="Start from a dense model of the world, as `tiny` is",
        )
    if experts < CHOSEN or experts % 2:
        raise FourierError(f"{experts} experts", remedy=f"Choose an even number, at least {CHOSEN}")
    text = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in _ALIKE},
        shared_expert_intermediate_size=old.intermediate_size // 2,
        moe_intermediate_size=old.intermediate_size // 4,
        num_experts=experts,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_WEIGHT,
    )
    config = LlavaConfig(**{**model.config.to_dict(), "text_config": text})
    torch.manual_seed(seed)  # the routers' weights
    mixture = LlavaForConditionalGeneration(config)
    mixture.generation_config = model.generation_config
    missing, unexpected = mixture.load_state_dict(model.state_dict(), strict=False)
    if any(".mlp." not in name for name in (*missing, *unexpected)):
        raise FourierError("a parameter beside the MLPs has no counterpart in the mixture")
    draw = torch.Generator().manual_seed(seed)
    pairs = zip(model.model.language_model.layers, mixture.model.language_model.layers, strict=True)
    for dense, sparse in pairs:
        _divide(dense.mlp, sparse.mlp, draw)
    return mixture


@torch.no_grad()
def _divide(dense: nn.Module, sparse: nn.Module, draw: torch.Generator) -> None:
    gate, up, down = (getattr(dense, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    order = torch.randperm(len(gate), generator=draw)
    shared, rest = order.chunk(2)
    sparse.shared_expert.gate_proj.weight.copy_(gate[shared])
    sparse.shared_expert.up_proj.weight.copy_(up[shared])
    sparse.shared_expert.down_proj.weight.copy_(2 * down[:, shared])
    sparse.shared_expert_gate.weight.zero_()
    halves: list[Tensor] = []
    for index in range(sparse.experts.num_experts):
        if index % 2 == 0:
            halves = list(rest[torch.randperm(len(rest), generator=draw)].chunk(2))
        own = halves[index % 2]
        new = slice(0, int(DRAWN_ANEW * len(own)))
        parts = [gate[own], up[own]]
        for part in parts:
            part[new] = torch.randn(part[new].shape, generator=draw) * part.std()
        out = 2 * down[:, own]
        out[:, new] = 0
        sparse.experts.gate_up_proj[index] = torch.cat(parts)
        sparse.experts.down_proj[index] = out


class MixtureLearner(Learner):
    """A `Learner` whose language model is a mixture: it also keeps the experts about equally busy."""

    def first_model(self) -> LlavaForConditionalGeneration:
        """The trained dense model that the recipe goes on from, upcycled."""
        if self.recipe.start is None:
            raise FourierError("a mixture is upcycled", remedy="Name the trained dense model to start from")
        return upcycled(super().first_model(), int(self.recipe.experts or 0), self.recipe.seed)

    def _answer_losses(self, patches: Tensor, batch: Batch) -> dict[str, Tensor]:
        logits: list[Tensor] = []
        routers = [layer.mlp.gate for layer in self.model.model.language_model.layers]
        hooks = [router.register_forward_hook(lambda *call: logits.append(call[2][0])) for router in routers]
        try:
            losses = super()._answer_losses(patches, batch)
        finally:
            for hook in hooks:
                hook.remove()
        losses["balance"] = balance_loss(logits, (batch["segment"] >= 0).flatten())
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimised."""
        return super().total(losses) + BALANCE_WEIGHT * losses["balance"]


def balance_loss(logits: Sequence[Tensor], real: Tensor) -> Tensor:
    """Mean over layers of E/k · Σ_e f_e p_e: f the share of tokens whose k choices include e, p its mean probability.

    1 where all E experts are equally busy (Fedus et al., 2022). Of each layer by itself: transformers' own adds the
    layers up first, and lets one layer's busy expert be another's idle one.

    Args:
        logits: of every layer's router, [tokens, experts].
        real: bool [tokens], False for padding.
    """
    losses = []
    for layer in logits:
        probability = functional.softmax(layer[real].float(), -1)
        chosen = torch.zeros_like(probability).scatter_(1, probability.topk(CHOSEN).indices, 1.0)
        losses.append((chosen.mean(0) * probability.mean(0)).sum() * layer.shape[-1] / CHOSEN)
    return torch.stack(losses).mean()
