"""The loss of recovery training: answers, the teacher's distribution over them, its hidden states.

    loss = w_ce · CE(q, answer) + w_kl · τ² KL(p_τ ‖ q_τ) + w_h · Σ_l ‖h_l - t_l‖² / ‖t_l‖² / layers

The first two are means over answer tokens; all others are masked. p is the teacher's next-token distribution (softened
by the temperature τ), q the student's. h_l and t_l are their hidden states in front of and behind every block of the
language model, pictures' tokens included, so that all tokens teach, and the vision tower is taught at its output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_fa.errors import FourierError

IGNORED = -100
"""Label of tokens that are no answer."""

Inputs = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Inputs], dict[str, Tensor]]
"""(model, inputs) → terms by name; ``loss`` is what is differentiated, the others are logged."""

NOT_FOR_THE_MODEL = ("labels", "teacher_log_p", "teacher_ids", "rows_left_out")
"""What a batch holds beyond the inputs of a model."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the teacher says of every answer token, in the order of the labels.

    Attributes:
        log_p: log-probabilities [answers, k], float32: of the k most likely tokens, or of all.
        ids: which tokens these are [answers, k]; None for all, in order.
        hidden: hidden states [layers + 1, tokens, width] of all tokens that are no padding, or None.
    """

    log_p: Tensor
    ids: Tensor | None = None
    hidden: Tensor | None = None


class Teacher(Protocol):
    """Whoever knows the `Targets` of a batch."""

    def __call__(self, inputs: Inputs, *, hidden: bool) -> Targets:
        """Targets of the answers in ``inputs``."""


def answers(model: nn.Module, inputs: Inputs, *, hidden: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a model and keep the places that predict an answer token.

    Args:
        model: any image-text-to-text model of transformers whose forward has ``logits_to_keep``.
        inputs: its inputs, and ``labels`` [batch, length], not shifted, `IGNORED` where there is no answer.
        hidden: also return hidden states.

    Returns:
        Logits float32 [answers, vocabulary], labels [answers], hidden states [layers + 1, tokens, width] or None.

    Raises:
        FourierError: the batch has no answer token.
    """
    labels = inputs["labels"]
    answer = labels[:, 1:] != IGNORED
    columns = answer.any(0).nonzero()[:, 0]
    if not len(columns):
        raise FourierError("the batch has no answer to learn from", remedy="Give samples with answers")
    rest = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
    out = model(**rest, logits_to_keep=columns, use_cache=False, output_hidden_states=hidden)
    places = answer[:, columns]
    states = torch.stack([state[_real(rest)] for state in out.hidden_states]).float() if hidden else None
    return out.logits[places].float(), labels[:, 1:][:, columns][places], states


class ModelTeacher:
    """A teacher in memory, in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, *, hidden: bool) -> Targets:
        """Its whole distribution for every answer token."""
        logits, _, states = answers(self.model, inputs, hidden=hidden)
        return Targets(logits.log_softmax(-1), hidden=states)


class RecoveryLoss:
    """The sum above; call it with a model and a batch.

    Args:
        teacher: asked for targets that a batch does not bring with it; None for cross-entropy alone.
        cross_entropy, divergence, hidden: weights; a term of weight 0 costs nothing.
        temperature: τ.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        *,
        cross_entropy: float = 0.2,
        divergence: float = 1.0,
        hidden: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.teacher, self.temperature = teacher, temperature
        self.weights = {"cross_entropy": cross_entropy, "divergence": divergence, "hidden": hidden}

    def targets(self, inputs: Inputs) -> Targets | None:
        """What the teacher says of this batch, from the batch itself where it was cached; None without a teacher."""
        if "teacher_log_p" in inputs:
            return Targets(inputs["teacher_log_p"].float(), inputs.get("teacher_ids"))
        needed = self.weights["divergence"] or self.weights["hidden"]
        if self.teacher is None or not needed:
            return None
        return self.teacher(inputs, hidden=bool(self.weights["hidden"]))

    def __call__(self, model: nn.Module, inputs: Inputs, targets: Targets | None = None) -> dict[str, Tensor]:
        """The loss and its terms; ``targets`` where they are known already (see `targets`)."""
        targets = self.targets(inputs) if targets is None else targets
        with_hidden = bool(self.weights["hidden"]) and targets is not None and targets.hidden is not None
        logits, labels, states = answers(model, inputs, hidden=with_hidden)
        terms = {"cross_entropy": functional.cross_entropy(logits, labels)}
        if targets is not None:
            terms["divergence"] = divergence(logits, targets, self.temperature)
            if with_hidden:
                terms["hidden"] = mismatch(states, targets.hidden)
        total = sum((self.weights[name] * term for name, term in terms.items()), logits.new_zeros(()))
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}


def _real(inputs: Inputs) -> Tensor:
    """Which tokens are no padding, bool [batch, length]."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if mask.ndim == 2:
        return mask.bool()
    return mask[:, 0, :, 0] == 0  # who sees the first token of the sequence; padding sees only itself


def mismatch(states: Tensor, wanted: Tensor) -> Tensor:
    """Σ ‖h - t‖² / Σ ‖t‖² over tokens, mean over layers; both [layers + 1, tokens, width].

    Raises:
        FourierError: student and teacher differ in layers, width or tokens.
    """
    if states.shape != wanted.shape:
        raise FourierError(
            f"the teacher's hidden states are {list(wanted.shape)}, the student's {list(states.shape)}",
            remedy="Leave --hidden out, or give the model that this one was compressed from as teacher",
        )
    return ((states - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))).mean()


def divergence(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """τ² KL(p_τ ‖ q_τ), mean over answers, in nats; logits [answers, vocabulary].

    Of k most likely tokens, the rest of the vocabulary counts as one more outcome.

    Raises:
        FourierError: teacher and student have different vocabularies.
    """
    if targets.ids is None and targets.log_p.shape[-1] != logits.shape[-1]:
        raise FourierError(
            f"the teacher has a vocabulary of {targets.log_p.shape[-1]}, the student of {logits.shape[-1]}",
            remedy="Give the model that this one was compressed from as teacher",
        )
    log_p, log_q = targets.log_p, logits
    if targets.ids is not None:
        if temperature != 1:
            raise FourierError("cached logits have temperature 1", remedy="Leave the temperature at 1")
        log_q = logits.log_softmax(-1).gather(-1, targets.ids)
        log_p, log_q = (torch.cat([x, _rest(x)], -1) for x in (log_p, log_q))
    else:
        log_p, log_q = ((x / temperature).log_softmax(-1) for x in (log_p, log_q))
    p = log_p.exp()
    # where p is 0 nothing is to be learnt; 0 · -inf would be NaN
    return temperature**2 * (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1).mean()


def _rest(log_p: Tensor) -> Tensor:
    """log(1 - Σ exp(log_p)) [answers, 1], kept off -inf."""
    return torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
