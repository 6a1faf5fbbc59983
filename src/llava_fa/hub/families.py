"""Which normalisation feeds which linear layer: what is known of a layer's inputs without any data.

After RMSNorm (no offset) every input has E[x_j²] = γ_j², up to one common factor; after LayerNorm
γ_j² + β_j². That is the diagonal second moment which data-free compression uses. The rules below are written
per block layout, not per model: nearly all vision towers and language models in transformers share these few.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import nn

from llava_fa.errors import FourierError
from llava_fa.hub.arrangement import Stored


@dataclasses.dataclass(frozen=True)
class Rule:
    """Within one block, the module ``norm`` feeds the modules ``linears``.

    It holds only in blocks that have none of the modules in ``unless``: layouts with norms *after* the
    attention or the MLP reuse the names of the ones before it.
    """

    norm: str
    linears: tuple[str, ...]
    unless: tuple[str, ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.fc1")

RULES = (
    # LLaMA, Qwen2/3, Mistral, Phi-3, InternLM, Gemma (2 and 3 put a second pair of norms around the MLP)
    Rule("input_layernorm", _QKV),
    Rule(
        "post_attention_layernorm",
        _GATE_UP,
        unless=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Rule("pre_feedforward_layernorm", _GATE_UP),
    # CLIP, SigLIP, and the older text decoders built like them
    Rule("layer_norm1", _QKV),
    Rule("layer_norm2", ("mlp.fc1",)),
    # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V vision blocks
    Rule("norm1", ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj")),
    Rule("norm2", ("mlp.fc1", "mlp.linear_fc1", "mlp.gate_proj", "mlp.up_proj")),
    # Pixtral
    Rule("attention_norm", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    Rule("ffn_norm", ("feed_forward.gate_proj", "feed_forward.up_proj")),
    # InternVL vision blocks, ViT
    Rule("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    Rule("layernorm_after", ("mlp.fc1",)),
    # Projectors: Qwen2-VL's merger normalises each patch, then joins 2 × 2 of them; InternVL, PaliGemma-like
    Rule("ln_q", ("mlp.0",)),
    Rule("layer_norm", ("linear_1",)),
)


@dataclasses.dataclass(frozen=True)
class Feed:
    """The norm in front of a linear layer: names of its tensors, and how its weight is to be read."""

    norm: str
    weight: str
    bias: str | None
    plus_one: bool
    """Gemma stores γ - 1."""

    def second_moment(self, tensors: Mapping[str, torch.Tensor], inputs: int) -> torch.Tensor:
        """E[x_j²] of the linear layer's inputs, float32 [inputs], up to a common factor.

        A norm narrower than the layer feeds it several positions side by side: the diagonal repeats.
        """
        gamma = tensors[self.weight].float()
        if not torch.isfinite(gamma).all():
            raise FourierError("the weight holds NaN or Inf", remedy="The checkpoint is damaged", where=self.norm)
        power = (gamma + 1 if self.plus_one else gamma).square()
        if self.bias is not None:
            power = power + tensors[self.bias].float().square()
        return power.repeat(inputs // power.numel())

    def read_second_moment(self, entry: Callable[[str], Stored | None], inputs: int) -> torch.Tensor | None:
        """The same from a checkpoint, ``entry`` finding a tensor by its name; None where one is missing."""
        entries = {name: entry(name) for name in (self.weight, self.bias) if name is not None}
        tensors = {name: stored.read() for name, stored in entries.items() if stored is not None}
        return self.second_moment(tensors, inputs) if len(tensors) == len(entries) else None


def is_query_or_key(name: str) -> bool:
    """Whether a layer is the query or the key projection of an attention module."""
    return name.rpartition(".")[2] in ("q_proj", "k_proj")


def is_vision(name: str) -> bool:
    """Whether a module belongs to a vision tower (of a vision-language model in transformers' naming)."""
    return any(part.startswith(("vision", "visual")) for part in name.split("."))


def feeding_norm(model: nn.Module, name: str) -> Feed | None:
    """The norm that alone produces the inputs of the linear layer ``name``, or None where no rule says so.

    None also when the norm's width does not divide the layer's, or it has no weight (then γ says nothing).
    """
    linear = model.get_submodule(name)
    for rule in RULES:
        for suffix in rule.linears:
            if not name.endswith("." + suffix):
                continue
            block = name[: -len(suffix)]
            if _has(model, block + rule.norm) and not any(_has(model, block + other) for other in rule.unless):
                return _feed(model, block + rule.norm, linear)
    return None


def final_norm(model: nn.Module, name: str) -> Feed | None:
    """The norm whose outputs the output embedding ``name`` multiplies, or the word embedding that is tied to it.

    None for a word embedding that is only looked up, and where the language model has no module ``norm`` beside it.
    """
    first, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    module = model.get_submodule(name)
    weights = (getattr(head, "weight", None), getattr(first, "weight", None))
    tied = weights[0] is weights[1] or f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}).values()
    if module is not head and not tied:
        return None
    inside = next(place for place, other in model.named_modules() if other is first).rpartition(".")[0]
    norm = f"{inside}.norm".lstrip(".")
    return _feed(model, norm, module) if _has(model, norm) else None


def _feed(model: nn.Module, name: str, linear: nn.Module) -> Feed | None:
    norm = model.get_submodule(name)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    inputs = linear.weight.shape[1]  # type: ignore[union-attr,index]
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or inputs % weight.numel():
        return None
    if (plus_one := _adds_one(norm)) is None:
        return None
    return Feed(name, f"{name}.weight", f"{name}.bias" if bias is not None else None, plus_one)


@torch.no_grad()
def _adds_one(norm: nn.Module) -> bool | None:
    """Whether the norm scales by 1 + weight: tried out, since a dozen classes do and most do not.

    None when the module is no norm: its output does not vanish with γ, or is not x / |x| with γ = 1.
    """
    probe = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    x = torch.linspace(-1, 1, probe.weight.numel()).roll(1)[None]
    power = []
    for gamma in (0.0, 1.0):
        for parameter in probe.parameters():
            parameter.zero_()
        probe.weight.fill_(gamma)
        try:
            power.append(float(probe(x).square().mean()))
        except (TypeError, RuntimeError):  # it wants more than x: not a plain norm
            return None
    for plus_one in (False, True):
        expected = [(gamma + plus_one) ** 2 for gamma in (0.0, 1.0)]
        if all(abs(value - target) < 0.05 for value, target in zip(power, expected, strict=True)):
            return plus_one
    return None


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
