"""Random LLaVA-NeXT and LLaVA-OneVision models, whose pictures are cut into tiles."""

from __future__ import annotations

import helpers
import torch

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PINPOINTS = [[96, 192], [192, 96], [192, 192]]


def next_model():
    """A random LLaVA-NeXT of 8×8 tokens a tile, and its processor."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        Qwen2Config,
    )

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=96, patch_size=12),
        text_config=Qwen2Config(**TEXT),
        image_token_index=1,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images,
        helpers.processor().tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaNextForConditionalGeneration(config).eval(), processor


def onevision_model():
    """A random LLaVA-OneVision of 9×9 tokens a tile."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=63, patch_size=7, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=1,
        video_token_index=2,
        image_grid_pinpoints=[[63, 126], [126, 63], [126, 126]],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


def onevision_count(model, processor_tokens, height, width):
    """What transformers' own processor counts, which cannot be built without torchvision (its video part)."""
    from transformers import LlavaOnevisionProcessor

    class Stand:
        image_processor = type("Images", (), {"image_grid_pinpoints": model.config.image_grid_pinpoints})
        num_image_tokens = processor_tokens
        vision_aspect_ratio = "anyres_max_9"
        _get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features

    return LlavaOnevisionProcessor._get_number_of_features(Stand(), height, width, 63, 63)
