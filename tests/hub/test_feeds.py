"""Which norm feeds which layer, against what the models really compute."""

import copy

import pytest
import torch
import transformers
from feed_rules import norm_by_name
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

from llava_fa.errors import FourierError
from llava_fa.hub.feeds import Feed, observe

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
SMALL_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
}
SMALL_MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
}


def build(name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key:
                parameter.copy_(0.2 + torch.rand(parameter.shape))
    return model


def empty(kind, config):
    with torch.device("meta"):
        return kind(config).eval()


def linear_layers(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def fed(model):
    feeds = observe(model)
    return {name: feed for name in linear_layers(model) if (feed := feeds.of(name)) is not None}


def text(name, **fields):
    return name + "Model", lambda: getattr(transformers, name + "Config")(**{**SMALL_TEXT, **fields})


FAMILIES = {
    "Llama": (*text("Llama"), 5),
    "Qwen2": (*text("Qwen2"), 5),
    "Mistral": (*text("Mistral"), 5),
    "Qwen3": (*text("Qwen3"), 5),
    "Phi3": (*text("Phi3", pad_token_id=0), 2),
    "Gemma": (*text("Gemma"), 5),
    "Gemma2": (*text("Gemma2"), 5),
    "Olmo2": (*text("Olmo2"), 0),  # norms after the attention and the MLP
    "Cohere2": (*text("Cohere2"), 5),  # one norm in front of both
    "Lfm2": (
        *text("Lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2, pad_token_id=0),
        3 + 5,
    ),  # in_proj of a convolution
    "Qwen3Next": (*text("Qwen3Next", num_experts=4, num_experts_per_tok=2, **SMALL_DELTA), 2 + 3 + 2 * 3),
    "DeepseekV3": (*text("DeepseekV3", **SMALL_MLA), 2 + 2 + 2),  # q_a, kv_a; q_b, kv_b; shared experts
    "CLIP": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**SMALL_VISION), 4),
    "SigLIP": ("SiglipVisionModel", lambda: transformers.SiglipVisionConfig(**SMALL_VISION), 5),  # its head's MLP too
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_said_to_feed_a_layer_is_what_it_is_given(family):
    """The layer's input is the norm's output, whose mean squares, for white inputs, are the promised ones."""
    name, config, count = FAMILIES[family]
    model = build(name, config())
    vision = family in ("CLIP", "SigLIP")
    inputs = torch.randn(64, 3, 28, 28) if vision else torch.randint(0, 64, (8, 64))
    feeds = fed(model)
    assert len(feeds) == count, list(feeds)
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
        assert torch.equal(seen[key].flatten(), outputs[feed.norm].flatten()), key
        promised = feed.second_moment(tensors, seen[key].shape[-1])
        with torch.no_grad():
            white = norms[feed.norm](torch.randn(20_000, promised.numel()))
        torch.testing.assert_close(promised, white.square().mean(0), rtol=0.1, atol=0.01)


def shallow(config):
    """Two layers of every tower, sizes as they are."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shallow(value)
        elif key in ("num_hidden_layers", "depth"):
            setattr(config, key, 2)
        elif key == "layer_types" and value:
            config.layer_types = value[:2]
        elif key == "deepstack_visual_indexes":
            config.deepstack_visual_indexes = [0, 1]
        elif key == "vision_feature_layer":
            config.vision_feature_layer = -1
    return config


NAMED = (
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "paligemma",
    "mistral3",
    "smolvlm",
    "idefics3",
    "glm4v",
)


@pytest.mark.parametrize("family", NAMED)
def test_what_was_known_by_name_is_seen(family):
    config = shallow(transformers.AutoConfig.for_model(family))
    if family == "glm4v":  # the published model's; transformers' default does not run
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]}
        config.text_config.rope_parameters = {**rope, "partial_rotary_factor": 0.5}
    model = empty(getattr(transformers, KINDS[family]), config)
    feeds, modules = observe(model), dict(model.named_modules())
    named = {name: norm for name in linear_layers(model) if (norm := norm_by_name(modules, name)) is not None}
    assert len(named) >= 14
    assert {name: feeds.of(name).norm for name in named} == named
    assert feeds.unseen == ()
    plus_one = {feeds.of(name).plus_one for name in named if "language_model" in name}
    assert plus_one <= {family in ("gemma3", "paligemma")}
    assert feeds.of("lm_head").norm.endswith(".norm")
    assert all(feeds.of(name) is None for name in named if name.endswith(("o_proj", "down_proj", "fc2")))


def test_layers_that_names_did_not_tell():
    """Cross attention, DaViT's blocks, joined patches behind a norm of the tower."""
    florence = fed(empty(transformers.Florence2ForConditionalGeneration, transformers.Florence2Config()))
    block = "model.vision_tower.blocks.1.0.spatial_block"
    assert florence[f"{block}.window_attn.qkv"].norm == f"{block}.norm1"  # windows cut out of it
    cross = "model.language_model.decoder.layers.0.encoder_attn"
    assert florence[f"{cross}.k_proj"].norm == "model.language_model.encoder.layers.11.final_layer_norm"
    smolvlm = fed(empty(transformers.SmolVLMForConditionalGeneration, shallow(transformers.SmolVLMConfig())))
    joined = smolvlm["model.connector.modality_projection.proj"]
    assert joined.norm == "model.vision_model.post_layernorm"
    assert joined.bias == "model.vision_model.post_layernorm.bias"


def test_the_norm_before_a_patch_merger_repeats():
    config = transformers.Qwen2VLConfig(
        vision_config={"embed_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 1, "mlp_ratio": 2},
        text_config={**SMALL_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    )
    feed = observe(empty(transformers.Qwen2VLForConditionalGeneration, config)).of("model.visual.merger.mlp.0")
    gamma, beta = torch.rand(32), torch.rand(32)
    moment = feed.second_moment({feed.weight: gamma, feed.bias: beta}, 128)
    assert torch.equal(moment, (gamma.square() + beta.square()).repeat(4))


def test_layers_without_a_norm_in_front():
    feeds = observe(build("Qwen2Model", transformers.Qwen2Config(**SMALL_TEXT)))
    for name in ("layers.0.mlp.down_proj", "layers.0.self_attn.o_proj"):
        assert name in feeds.seen
        assert feeds.of(name) is None


class Model(transformers.PreTrainedModel):
    """One layer behind a norm and whatever comes between them."""

    config_class = transformers.LlamaConfig

    def __init__(self, norm, between, width=8):
        super().__init__(transformers.LlamaConfig(vocab_size=50))
        self.embed = nn.Embedding(50, 8)
        self.norm, self.between, self.layer = norm, between, nn.Linear(width, 8)
        self.never = nn.Linear(8, 8)

    def forward(self, input_ids):
        return self.layer(self.between(self.norm(self.embed(input_ids)), self))


class Gate(nn.Module):
    """Has a weight like a norm, and is none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return torch.sigmoid(self.weight * x)


@pytest.mark.parametrize("norm", [Gate(), nn.Identity(), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8)])
def test_what_is_no_norm_is_not_believed(norm):
    assert observe(Model(norm, lambda x, _: x)).of("layer") is None


MOVED = {
    "nothing": lambda x, _: x,
    "one factor": lambda x, _: x * 0.5,
    "a factor a token": lambda x, _: x * torch.linspace(1, 2, x.shape[1])[:, None],
    "some tokens": lambda x, _: x[:, 2:7],
    "padding": lambda x, _: nn.functional.pad(x, (0, 0, 0, 3)),
    "tokens turned": lambda x, _: x.roll(3, 1).flip(1).contiguous(),
}
CHANGED = {
    "a residual": lambda x, model: x + model.embed.weight[:1],
    "a scale a channel": lambda x, model: x * model.embed.weight[0],
    "an activation": lambda x, _: nn.functional.silu(x),
    "a sign lost": lambda x, _: x.relu(),
    "an average": lambda x, _: x.unfold(1, 2, 2).mean(-1),
    "channels turned": lambda x, _: x.flip(-1),
    "heads turned": lambda x, _: x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2),
}


@pytest.mark.parametrize("between", MOVED)
def test_moving_numbers_about_keeps_the_feed(between):
    assert observe(Model(nn.LayerNorm(8), MOVED[between])).of("layer") == Feed(
        "norm", "norm.weight", "norm.bias", False
    )


@pytest.mark.parametrize("between", CHANGED)
def test_anything_else_ends_it(between):
    feeds = observe(Model(nn.LayerNorm(8), CHANGED[between]))
    assert "layer" in feeds.seen
    assert feeds.of("layer") is None


def test_joined_tokens_repeat_the_norm():
    feeds = observe(Model(nn.RMSNorm(8), lambda x, _: x.reshape(1, -1, 16), width=16))
    assert feeds.of("layer") == Feed("norm", "norm.weight", None, False)


def test_a_layer_that_is_given_two_things_has_no_feed():
    def twice(x, model):
        model.layer(model.embed.weight)
        return x

    assert observe(Model(nn.LayerNorm(8), twice)).of("layer") is None


def test_a_model_that_cannot_be_run_is_told():
    def fails(x, _):
        raise RuntimeError("not with these inputs")

    model = Model(nn.LayerNorm(8), fails)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert observe(model).unseen == ("layer", "never")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_is_seen_every_time():
    config = transformers.Qwen3Config(**SMALL_TEXT)
    state = torch.random.get_rng_state()
    one = observe(empty(transformers.Qwen3ForCausalLM, config))
    assert torch.equal(state, torch.random.get_rng_state())
    assert observe(empty(transformers.Qwen3ForCausalLM, config)) == one
    deeper = transformers.Qwen3Config(**{**SMALL_TEXT, "num_hidden_layers": 2})
    assert len(observe(empty(transformers.Qwen3ForCausalLM, deeper)).seen) > len(one.seen)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_embedding_multiplies_what_the_last_norm_returns(tied):
    config = transformers.Qwen3Config(**SMALL_TEXT, tie_word_embeddings=tied)
    model = empty(transformers.Qwen3ForCausalLM, config)
    feeds = observe(model)
    assert feeds.of_embedding(model, "lm_head").norm == "model.norm"
    words = feeds.of_embedding(model, "model.embed_tokens")
    assert words == (feeds.of_embedding(model, "lm_head") if tied else None)


def test_a_damaged_norm_is_named():
    feed = Feed("norm", "norm.weight", None, False)
    with pytest.raises(FourierError, match="NaN or Inf"):
        feed.second_moment({"norm.weight": torch.tensor([1.0, float("nan")])}, 2)
