"""Small random models of the families that both transformers and vLLM run, each with a real processor beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
"""Special tokens that every tokenizer here has, whatever a family calls them."""
MROPE = {"rope_type": "default", "rope_theta": 10_000.0}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
TILE = {"height": 28, "width": 28}

Built = tuple[Any, Any]
"""A model, and its processor."""


def tokenizer(*more: str, **named: str) -> Any:
    """The world's tokenizer with a family's special tokens behind its own.

    Args:
        more: further special tokens.
        named: special tokens that the processor asks the tokenizer for, by attribute.
    """
    from llava_fa.world.vocabulary import build_tokenizer

    made = build_tokenizer()
    made.add_tokens([IMAGE, VIDEO, START, END, *more], special_tokens=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        pad_token=made.pad_token,
        eos_token=made.eos_token,
        padding_side="left",
        extra_special_tokens=named,
    )


def text(words: Any, **other: Any) -> dict[str, Any]:
    """A language model's configuration for these words."""
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return {**TEXT, **ids, "vocab_size": len(words), **other}


def number(words: Any, token: str) -> int:
    """A token's id."""
    found: int = words.convert_tokens_to_ids(token)
    return found


def qwen(family: str, patch: int, vision: dict[str, Any], rope: dict[str, Any], **other: Any) -> Built:
    """A model of Qwen's.

    Args:
        family: in the names of transformers' classes.
        patch: side of a patch.
        vision, rope, other: of the configuration of the tower, of positions, of the language model.
    """
    words = tokenizer()
    config = getattr(transformers, f"{family}Config")(
        text_config=text(words, rope_parameters={**MROPE, **rope}, **other),
        vision_config={"depth": 2, "num_heads": 2, "patch_size": patch, "out_hidden_size": 128, **vision},
        image_token_id=number(words, IMAGE),
        video_token_id=number(words, VIDEO),
        vision_start_token_id=number(words, START),
        vision_end_token_id=number(words, END),
    )
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 16 * (2 * patch) ** 2}
    parts = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    clips = transformers.Qwen2VLVideoProcessor if family == "Qwen2_5_VL" else transformers.Qwen3VLVideoProcessor
    kind = getattr(transformers, f"{family.removesuffix('Moe')}Processor")
    processor = kind(transformers.Qwen2VLImageProcessor(**parts), words, clips(**parts))
    return getattr(transformers, f"{family}ForConditionalGeneration")(config), processor


def qwen2_5_vl() -> Built:
    """Qwen2.5-VL: windows of 2×2 merged patches in the first block of the tower, all patches in the second.

    Patches are so large that the convolution on them is one of those that are packed, as in published models.
    """
    vision = {"hidden_size": 64, "intermediate_size": 96, "window_size": 216, "fullatt_block_indexes": [1]}
    return qwen("Qwen2_5_VL", 54, vision, {"mrope_section": [4, 6, 6]})


def qwen3_vl(family: str = "Qwen3VL", **other: Any) -> Built:
    """Qwen3-VL: features of the tower's first block are added behind the first language layer."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return qwen(family, 16, vision, {"mrope_section": [6, 5, 5], "mrope_interleaved": True}, **other)


def qwen3_vl_moe() -> Built:
    """The same with a mixture of experts in every language layer."""
    return qwen3_vl("Qwen3VLMoe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)


def llava_next() -> Built:
    """LLaVA-NeXT: tiles of a CLIP tower and newlines between their rows; a Llama."""
    words = tokenizer("<image>", image_token="<image>")
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7),
        text_config=transformers.LlamaConfig(**text(words)),
        image_token_index=number(words, "<image>"),
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    tiles = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size=TILE, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        tiles,
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> Built:
    """LLaVA-OneVision: tiles of a SigLIP tower; a Qwen2."""
    words = tokenizer("<image>", "<video>", image_token="<image>", video_token="<video>")
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=28, patch_size=7, vision_use_head=False),
        text_config=transformers.Qwen2Config(**text(words)),
        image_token_index=number(words, "<image>"),
        video_token_index=number(words, "<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    tiles = transformers.LlavaOnevisionImageProcessor(size=TILE, image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaOnevisionProcessor(
        tiles,
        words,
        transformers.LlavaOnevisionVideoProcessor(size=TILE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def gemma3() -> Built:
    """Gemma 3: 4 tokens a picture, that attend to one another; a sliding window in one layer; a tied head.

    The MLPs of its tower are, as in published models, no multiple of 64 wide.
    """
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(*names.values(), **names)
    words.add_tokens(["\n" * count for count in (1, 2, 3, 4)])  # by which vLLM looks for a picture's surroundings
    tower = {**TOWER, "intermediate_size": 104, "image_size": 28, "patch_size": 7, "vision_use_head": False}
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**tower),
        text_config=transformers.Gemma3TextConfig(
            **text(words, tie_word_embeddings=True, query_pre_attn_scalar=32, sliding_window=64),
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        image_token_index=number(words, names["image_token"]),
        boi_token_index=number(words, names["boi_token"]),
        eoi_token_index=number(words, names["eoi_token"]),
    )
    pictures = transformers.Gemma3ImageProcessor(size=TILE)
    processor = transformers.Gemma3Processor(pictures, words, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def internvl() -> Built:
    """InternVL: tiles of 4 tokens, their channels shuffled together; a Qwen2."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(*names.values(), **names)
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**TOWER, image_size=[28, 28], patch_size=[7, 7]),
        text_config=transformers.Qwen2Config(**text(words)),
        image_token_id=number(words, names["context_image_token"]),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    tiles = transformers.GotOcr2ImageProcessor(size=TILE, crop_to_patches=True, min_patches=1, max_patches=4)
    clips = transformers.InternVLVideoProcessor(size=TILE)
    processor = transformers.InternVLProcessor(tiles, words, clips, image_seq_length=4)
    return transformers.InternVLForConditionalGeneration(config), processor


def mistral3() -> Built:
    """Mistral 3: pictures of any size through a Pixtral tower, 2×2 patches merged; a Mistral."""
    marks = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    words = tokenizer(*marks.values())
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**TOWER, image_size=112, patch_size=14),
        text_config=transformers.MistralConfig(**text(words)),
        image_token_index=number(words, "[IMG]"),
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    pictures = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=28)
    processor = transformers.PixtralProcessor(pictures, words, patch_size=14, spatial_merge_size=2, **marks)
    return transformers.Mistral3ForConditionalGeneration(config), processor


FAMILIES: dict[str, tuple[Callable[[], Built], str]] = {
    "qwen2_5_vl": (qwen2_5_vl, f"{START}{IMAGE}{END}"),
    "qwen3_vl": (qwen3_vl, f"{START}{IMAGE}{END}"),
    "qwen3_vl_moe": (qwen3_vl_moe, f"{START}{IMAGE}{END}"),
    "llava_next": (llava_next, "<image>"),
    "llava_onevision": (llava_onevision, "<image>"),
    "gemma3": (gemma3, "<start_of_image>"),
    "internvl": (internvl, "<IMG_CONTEXT>"),
    "mistral3": (mistral3, "[IMG]"),
}
"""Name → builder, and what stands for a picture in a prompt."""


@torch.no_grad()
def shaken(model: Any) -> Any:
    """The model with weights on all of which its answers depend: vectors drawn anew, matrices four times as large."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape) + (0.5 if name.endswith("weight") else -0.5))
        elif "embed" not in name and "lm_head" not in name:
            parameter.mul_(4)
    return model


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a random float32 model of a family with its processor; the folder."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[name][0]()
    shaken(model).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
