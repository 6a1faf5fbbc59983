"""Small random models of every architecture that transformers maps to pictures or sound and text.

A model is its default configuration with every size made small by the name of its field (`SIZES`); where sizes
depend on each other in ways that no name tells, `FAMILIES` has what is set afterwards. Biases and norms are shaken, so
that one that gets lost shows.
"""

from __future__ import annotations

import copy
import re
import tempfile
import zlib
from typing import Any

import torch
from transformers import AutoConfig

VOCABULARY = 320
FIRST_SPECIAL = 300
"""Ids from here on are markers of pictures and the like; text is drawn from below."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"(\w+_)?(hidden_size|d_model|embed_dim|width|projection_dim|proj_dim|output_dim)|dim|n_embd", 64),
    (r"hidden_size_per_layer_input|pli_dim", 16),
    (r"(\w+_)?(intermediate_size|ffn_dim|mlp_dim|hidden_dim|inner_dim|d_ff)|intermediate_size_mlp|d_inner", 96),
    (r"(\w*_)?(expert|moe)\w*_intermediate_size", 48),
    (r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth|num_blocks)", 2),
    (r"(\w+_)?(num_attention_heads|num_heads|n_heads?|attention_heads)", 4),
    (r"(\w+_)?num_key_value_heads|n_kv_heads|multi_query_group_num|linear_num_key_heads", 2),
    (r"linear_num_value_heads|mamba_num_heads|index_n_heads", 4),
    (
        r"head_dim|attention_head_dim|global_head_dim|linear_\w+_head_dim|mamba_head_dim|d_kv|v_head_dim|ssm_state_size",
        16,
    ),
    (r"qk_nope_head_dim|qk_rope_head_dim|index_head_dim", 16),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"n_groups", 2),
    (r"n_group|topk_group|n_shared_experts|moe_num_shared_experts|first_k_dense_replace", 1),
    (r"kv_lora_rank|q_lora_rank", 32),
    (r"max_position_embeddings|num_position_embeddings|position_embedding_size", 256),
    (r"max_source_positions", 48),
    (r"canvas_length", 16),
    (r"image_size|img_size", 56),
    (r"patch_size", 14),
    (r"sliding_window|attention_chunk_size|window_size", 64),
    (r"laurel_rank", 8),
)
"""Field, as a pattern for its whole name → the most that it may be."""


def shrink(config: Any) -> Any:
    """A configuration, and those within it, with small sizes; returned for convenience."""
    if "_heterogeneity_spec" in vars(config):  # layers of sizes of their own: of layers that are no longer there
        config.per_layer_config = None
    whole_head, whole_rotary = (vars(config).get(key) or 0 for key in ("head_dim", "qk_rope_head_dim"))
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value)
        elif type(value) is int:
            setattr(config, key, _smaller(key, value))
        elif isinstance(value, (list, tuple)) and key.endswith("token_id") and any(x >= FIRST_SPECIAL for x in value):
            setattr(config, key, [2])
    if rotary := vars(config).get("qk_rope_head_dim", 0):  # latent attention: sizes that follow from others
        config.head_dim = rotary * max(1, whole_head // max(1, whole_rotary))
        config.qk_head_dim = vars(config).get("qk_nope_head_dim", 0) + rotary
    if "kv_lora_rank" in vars(config):
        config.num_key_value_heads = config.num_attention_heads
    layers = getattr(config, "num_hidden_layers", None)
    for key, kinds in list(vars(config).items()):
        if key.endswith("layer_types") and isinstance(kinds, (list, tuple)) and isinstance(layers, int):
            setattr(config, key, (list(dict.fromkeys(kinds)) * layers)[:layers])  # one of each kind, as far as they go
    return config


def _smaller(key: str, value: int) -> int:
    if key.endswith(("token_id", "token_index")):  # of its own, where the vocabulary is that small
        return (
            value if value < FIRST_SPECIAL else FIRST_SPECIAL + zlib.crc32(key.encode()) % (VOCABULARY - FIRST_SPECIAL)
        )
    return next((min(value, most) for pattern, most in SIZES if re.fullmatch(pattern, key)), value)


DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "aya_vision": ("14 heads do not divide the width of 1152", {"vision_config.num_attention_heads": 16}),
    "blip-2": ("there is no mark for pictures", {"image_token_index": 50_264}),
    "instructblip": ("there is no mark for pictures", {"image_token_index": 50_264}),
    "instructblipvideo": ("there is no mark for pictures", {"video_token_index": 50_264}),
    "chameleon": ("vocabulary_map is None", {"vocabulary_map": {"<image>": 8711, "IMGIMGA": 4}}),
    "cohere_compass": (
        "rope_parameters has no layer type",
        {
            "text_config.rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10_000.0}
                for kind in ("full_attention", "sliding_attention")
            }
        },
    ),
    "deepseek_ocr2": (
        "mlp_layer_types and num_experts_per_tok are None",
        {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 31, "text_config.num_experts_per_tok": 6},
    ),
    "diffusion_gemma": (
        "the number and size of experts are None",
        {"text_config.num_experts": 128, "text_config.top_k_experts": 8, "text_config.moe_intermediate_size": 704},
    ),
    "emu3": ("vocabulary_map is None", {"vocabulary_map": {"<image>": 151_851, "<|visual token 000000|>": 151_854}}),
    "granite4_vision": (
        "deepstack_layer_map and downsample_rate are None",
        {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2", "spatial_target_layers": [12]},
    ),
    "gemma4": ("it has no vision tower", {"vision_config": {"model_type": "gemma4_vision"}}),
    "gemma4_unified": ("it has no vision tower", {"vision_config": {"model_type": "gemma4_unified_vision"}}),
    "hunyuan_vl": (
        "head_dim is None, and there are no sections of rotary positions",
        {"text_config.head_dim": 128, "text_config.rope_parameters.mrope_section": [16, 16, 16, 16]},
    ),
    "qwen2_5_omni": ("the thinker has no vision_start_token_id", {"thinker_config.vision_start_token_id": 151_652}),
    "qwen2_5_omni_thinker": ("there is no vision_start_token_id", {"vision_start_token_id": 151_652}),
    "qwen3_omni_moe": (
        "the talker lacks shared_expert_intermediate_size and spatial_merge_size",
        {
            "talker_config.text_config.shared_expert_intermediate_size": 768,
            "talker_config.spatial_merge_size": 2,
            "thinker_config.vision_start_token_id": 151_652,
        },
    ),
    "qwen3_omni_moe_thinker": ("there is no vision_start_token_id", {"vision_start_token_id": 151_652}),
    "qwen4_exp": (
        "the indexer's sizes are None",
        {
            "text_config.indexer_n_heads": 4,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 256,
            "text_config.indexer_budget": 2048,
            "text_config.indexer_compress_ratio": 4,
        },
    ),
    "step3p7": ("sliding_window is None", {"text_config.sliding_window": 512}),
}
"""Family → what its default configuration lacks, and with what it can be built: values of the same size."""

_ROTARY = "sections of rotary positions add up to half a head"
_WIDER = ("heads of full attention are wider", {"text_config.per_layer_config": {1: {"head_dim": 32}}})
_PINPOINTS = ("the grids of tiles are those of large pictures", {"image_grid_pinpoints": [[56, 112], [112, 56]]})


def _sections(*sizes: int, where: str = "text_config") -> tuple[str, dict[str, Any]]:
    return _ROTARY, {f"{where}.rope_parameters.mrope_section": list(sizes)}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite_speech": ("sound is as wide as the projector takes it", {"encoder_config.hidden_dim": 64}),
    "granite_speech_plus": ("sound is as wide as the projector takes it", {"encoder_config.hidden_dim": 64}),
    "nemotron_h_omni": ("there is no mark for pictures", {"image_token_id": 309}),
    "voxtral": ("there is no mark for sounds", {"audio_token_id": 310}),
    "fun_asr_nano": ("a quarter of the text's width", {"adaptor_config.intermediate_size": 16}),
    "cosmos3_edge": _sections(2, 3, 3),
    "cosmos3_omni": _sections(2, 3, 3),
    "dots3_note": (
        "layers of sizes of their own; sound is joined to the text's width",
        {
            "text_config.per_layer_config": {
                1: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "kv_lora_rank": 48}
            },
            "vision_config.per_layer_config": {1: {"num_local_experts": 2}},
            "vision_config.adapter_in_dim": 64,
            "vision_config.adapter_out_dim": 64,
            "audio_config.adapter_input_size": 64,
            "audio_config.adapter_out_dim": 64,
            "audio_config.downsample_hidden_size": 16,
            "audio_config.conv_output_size": 256,
        },
    ),
    "nemo_speechlm": (
        "queries, keys and values are stored as one, of three equal parts",
        {
            "audio_config.asr_config.num_key_value_heads": 4,
            "audio_config.diarization_config.audio_config.num_key_value_heads": 4,
            "word_timestamp_config.num_key_value_heads": 4,
        },
    ),
    "minimax_m3_vl": ("four patches are joined", {"merged_hidden_size": 256}),
    "mistral_large4": (
        "a value for every layer",
        {"text_config.kv_source_layers": [0, 1], "text_config.no_rope_layers": [1, 0]},
    ),
    "molmo2": (
        "the tower's inner layers by number, a picture's two sides",
        {
            "vision_config.image_size": [56, 56],
            "vision_config.num_position_embeddings": 16,
            "adapter_config.vision_feature_layer": [1, 0],
            "image_patch_id": 310,
            "text_config.rope_scaling_layers": [0, 1],
        },
    ),
    "muse_glimmer": ("four patches are joined", {"out_hidden_size": 256}),
    "diffusion_gemma": _WIDER,
    "gemma3n": (
        "a value for every layer",
        {"text_config.intermediate_size": [96, 96], "text_config.activation_sparsity_pattern": [0.95, 0.0]},
    ),
    "gemma4": _WIDER,
    "gemma4_unified": _WIDER,
    "muse_spark": (
        "four patches are joined; four stages of sound",
        {"out_hidden_size": 256, "audio_config.num_hidden_layers": 4},
    ),
    "chameleon": (
        "the picture's codes are stored in vq_config",
        {"vq_config.base_channels": 32, "vq_config.resolution": 64, "vq_config.num_embeddings": 64},
    ),
    "emu3": ("the picture's codes", {"vq_config.base_channels": 32, "vq_config.codebook_size": 64}),
    "ernie4_5_vl_moe": (
        "two kinds of experts; the rotary sections are fixed",
        {"text_config.moe_intermediate_size": [48, 48], "text_config.head_dim": 128},
    ),
    "kyutai_speech_to_text": (
        "groups of the codec are its width",
        {
            "codec_config.upsample_groups": 64,
            "codec_config.codebook_dim": 64,
            "codec_config.vector_quantization_hidden_dimension": 64,
        },
    ),
    "florence2": (
        "four stages, each of a width",
        {
            "vision_config.depths": (1, 1, 1, 1),
            "vision_config.embed_dim": (32, 32, 64, 64),
            "vision_config.num_heads": (4, 4, 4, 4),
            "vision_config.num_groups": (4, 4, 4, 4),
        },
    ),
    "janus": ("the generator of pictures", {"vq_config.base_channels": 32, "vq_config.num_embeddings": 64}),
    "vibevoice_asr": (
        "seven stages of doubling width",
        {
            f"{part}_tokenizer_encoder_config.{key}": value
            for part in ("acoustic", "semantic")
            for key, value in (("num_filters", 4), ("depths", (1,) * 7))
        },
    ),
    "aria": ("queries by number of patches", {"projector_patch_to_query_dict": {16: 4}}),
    "gemma3": ("16 patches of a picture make 4 tokens", {"mm_tokens_per_image": 4}),
    "shieldgemma2": ("16 patches of a picture make 4 tokens", {"mm_tokens_per_image": 4}),
    "t5gemma2": ("16 patches of a picture make 4 tokens", {"encoder.mm_tokens_per_image": 4}),
    "pix2struct": ("a patch's numbers", {"vision_config.patch_embed_hidden_size": 588}),
    "kosmos-2.5": ("a patch's numbers", {"vision_config.patch_embed_hidden_size": 588}),
    "glm46v": _sections(2, 3, 3),
    "glm4v": _sections(2, 3, 3),
    "glm4v_moe": _sections(1, 1, 2),
    "glm_ocr": _sections(2, 3, 3),
    "glmga": _sections(2, 3, 3),
    "hunyuan_vl": _sections(2, 2, 2, 2),
    "paddleocr_vl": _sections(2, 3, 3),
    "qwen2_vl": _sections(2, 3, 3),
    "qwen2_5_vl": _sections(2, 3, 3),
    "qwen2_5_omni_thinker": _sections(2, 3, 3),
    "granite4_vision": _PINPOINTS,
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "llama4": (
        "four patches are joined before the projector",
        {
            "vision_config.intermediate_size": 256,
            "vision_config.projector_input_dim": 64,
            "vision_config.projector_output_dim": 64,
        },
    ),
    "mllama": (
        "outputs of inner layers are put together",
        {
            "vision_config.intermediate_layers_indices": [0],
            "vision_config.vision_output_dim": 128,
            "text_config.cross_attention_layers": [1],
        },
    ),
    "vipllava": ("outputs of inner layers are put together", {"vision_feature_layers": [-2, -1]}),
    "qwen2_5_omni": (
        f"{_ROTARY}; the vocoder",
        _sections(2, 3, 3, where="thinker_config.text_config")[1]
        | {
            "token2wav_config.bigvgan_config.upsample_initial_channel": 64,
            "token2wav_config.dit_config.enc_channels": (32,) * 5,
        },
    ),
}
"""Family → why sizes by name do not do, and what is set after them."""


def default_config(name: str) -> Any:
    """transformers' default configuration of an architecture, with what it needs to be built at all."""
    return _set(AutoConfig.for_model(name), DEFAULTS.get(name))


def small_config(name: str) -> Any:
    """The same, small, as it is once saved and loaded: what a class computes from other fields it computes again."""
    config = _set(shrink(copy.deepcopy(default_config(name))), FAMILIES.get(name))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return type(config).from_pretrained(folder)


def _set(config: Any, mends: tuple[str, dict[str, Any]] | None) -> Any:
    for path, value in (mends[1] if mends else {}).items():
        *parts, key = path.split(".")
        holder = config
        for part in parts:
            holder = getattr(holder, part)
        if isinstance(holder, dict):
            holder[key] = value
        else:
            is_config = isinstance(value, dict) and "model_type" in value
            setattr(holder, key, AutoConfig.for_model(**value) if is_config else copy.deepcopy(value))
    return config


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of such a size that every layer, and a picture, counts; noise on biases, norms and all other vectors.

    What starts at 0 or 1 everywhere proves nothing, and with transformers' initial weights narrow layers pass on
    next to nothing.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        elif "norm" not in name:
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            noise = torch.randn(parameter.shape, generator=random)  # in place of weights that begin at 0
            spread = float(parameter.data.float().std())
            parameter.data.copy_((parameter.data.float() / spread if spread > 0 else noise) / fan_in**0.5)
