"""Which norm feeds which layer, against what the models really compute."""

import copy

import pytest
import torch
import transformers
from torch import nn

from llava_fa.hub.families import feeding_norm

SMALL_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def build(name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key:
                parameter.copy_(0.2 + torch.rand(parameter.shape))
    return model


LANGUAGE = {
    "Llama": ("LlamaModel", lambda: transformers.LlamaConfig(**SMALL_TEXT)),
    "Qwen2": ("Qwen2Model", lambda: transformers.Qwen2Config(**SMALL_TEXT)),
    "Mistral": ("MistralModel", lambda: transformers.MistralConfig(**SMALL_TEXT)),
    "Qwen3": ("Qwen3Model", lambda: transformers.Qwen3Config(**SMALL_TEXT)),
    "Phi3": ("Phi3Model", lambda: transformers.Phi3Config(**SMALL_TEXT, pad_token_id=0)),
    "Gemma": ("GemmaModel", lambda: transformers.GemmaConfig(**SMALL_TEXT)),
    "Gemma2": ("Gemma2Model", lambda: transformers.Gemma2Config(**SMALL_TEXT)),
    "Olmo2": ("Olmo2Model", lambda: transformers.Olmo2Config(**SMALL_TEXT)),
    "CLIP": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**SMALL_VISION)),
    "SigLIP": ("SiglipVisionModel", lambda: transformers.SiglipVisionConfig(**SMALL_VISION)),
}
FED = {"Olmo2": 0, "CLIP": 4, "SigLIP": 4, "Phi3": 2}


@pytest.mark.parametrize("family", LANGUAGE)
def test_a_norm_said_to_feed_a_layer_is_what_it_is_given(family):
    """The layer's input is the norm's output, whose mean squares, for white inputs, are the promised ones."""
    name, config = LANGUAGE[family]
    model = build(name, config())
    vision = family in ("CLIP", "SigLIP")
    inputs = torch.randn(64, 3, 28, 28) if vision else torch.randint(0, 64, (8, 64))
    feeds = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            feed = feeding_norm(model, key)
            if feed is not None:
                feeds[key] = feed
    assert len(feeds) == FED.get(family, 5)
    norms = {feed.norm: copy.deepcopy(model.get_submodule(feed.norm)) for feed in feeds.values()}
    outputs, seen = {}, {}
    for key, feed in feeds.items():
        model.get_submodule(feed.norm).register_forward_hook(
            lambda _, args, output, norm=feed.norm: outputs.__setitem__(norm, output)
        )
        model.get_submodule(key).register_forward_pre_hook(lambda _, args, key=key: seen.__setitem__(key, args[0]))
    with torch.no_grad():
        model(inputs)
    tensors = model.state_dict()
    for key, feed in feeds.items():
        assert torch.equal(seen[key], outputs[feed.norm]), key
        promised = feed.second_moment(tensors, seen[key].shape[-1])
        with torch.no_grad():
            white = norms[feed.norm](torch.randn(20_000, promised.numel()))
        torch.testing.assert_close(promised, white.square().mean(0), rtol=0.1, atol=0.01)


def test_the_norm_before_a_patch_merger_repeats():
    model = transformers.Qwen2VLForConditionalGeneration
    config = transformers.Qwen2VLConfig(
        vision_config={"embed_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 1, "mlp_ratio": 2},
        text_config={**SMALL_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
    )
    with torch.device("meta"):
        built = model(config)
    feed = feeding_norm(built, "model.visual.merger.mlp.0")
    gamma, beta = torch.rand(32), torch.rand(32)
    moment = feed.second_moment({feed.weight: gamma, feed.bias: beta}, 128)
    assert torch.equal(moment, (gamma.square() + beta.square()).repeat(4))


def test_layers_without_a_norm_in_front():
    model = build("Qwen2Model", transformers.Qwen2Config(**SMALL_TEXT))
    assert feeding_norm(model, "layers.0.mlp.down_proj") is None
    assert feeding_norm(model, "layers.0.self_attn.o_proj") is None


class Block(nn.Module):
    """A layout that a rule names, around any module in the norm's place."""

    def __init__(self, norm):
        super().__init__()
        self.input_layernorm = norm
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})


class Gate(nn.Module):
    """Has a weight like a norm, and is none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return torch.sigmoid(self.weight * x)


@pytest.mark.parametrize(
    "norm",
    [Gate(), nn.Identity(), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(3), nn.Linear(8, 8)],
)
def test_what_is_no_norm_is_not_believed(norm):
    assert feeding_norm(nn.ModuleDict({"block": Block(norm)}), "block.self_attn.q_proj") is None
