"""Other families than LLaVA-1.5: tiles, other projectors, vision features fed into deeper layers."""

import pytest
import torch
import transformers

import llava_fa
from llava_fa import FourierConfig
from llava_fa.hub import blocks as blockwise
from llava_fa.hub import calibrated
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.course import survey
from llava_fa.hub.plan import make_plan
from llava_fa.hub.source import open_source
from llava_fa.hub.streaming import Job, assemble
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import WorkFolder

IMAGE, START, END = 1, 3, 4
TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10_000.0}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
LANGUAGE = ["language_model.layers.0", "language_model.layers.1"]


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    pixels, sizes = torch.randn(1, 3, 3, 28, 28), torch.tensor([[28, 56]])
    tokens = len(model.model.get_image_features(pixels, sizes).pooler_output[0])
    vision = ["vision_tower.encoder.layers.0", "vision_tower.encoder.layers.1"]
    order = [*vision, "multi_modal_projector", *LANGUAGE]
    return model, {"pixel_values": pixels, "image_sizes": sizes}, tokens, order


def qwen(family, vision, text):
    config = getattr(transformers, f"{family}Config")(
        vision_config={"num_heads": 2, "depth": 2, "patch_size": 7, **vision},
        text_config={**TEXT, **text, "rope_parameters": MROPE},
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    return (
        model,
        {"pixel_values": torch.randn(16, 3 * 2 * 49), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        4,
    )


def qwen2_vl():
    model, pixels, tokens = qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}, {})
    return model, pixels, tokens, ["visual.blocks.0", "visual.blocks.1", "visual.merger.mlp", *LANGUAGE]


def qwen3_vl():
    """Features of the first vision block are added behind the first language layer."""
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 48,
        "intermediate_size": 48,
        "num_position_embeddings": 16,
    }
    model, pixels, tokens = qwen("Qwen3VL", {**vision, "deepstack_visual_indexes": [0]}, {})
    order = ["visual.blocks.0", "visual.deepstack_merger_list.0", "visual.blocks.1", "visual.merger", *LANGUAGE]
    return model, pixels, tokens, order


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    order = ["vision_tower.encoder.layers.0", "vision_tower.encoder.layers.1", "multi_modal_projector", *LANGUAGE]
    return model, {"pixel_values": torch.randn(1, 3, 28, 28)}, 16, order


def vip_llava():
    """The projector takes what several layers of the tower give, each normalised on its own."""
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2, 0],
    )
    model = transformers.VipLlavaForConditionalGeneration(config).eval()
    vision = ["vision_tower.encoder.layers.0", "vision_tower.encoder.layers.1"]
    return model, {"pixel_values": torch.randn(1, 3, 28, 28)}, 16, [*vision, "multi_modal_projector", *LANGUAGE]


def video_llava():
    """One tower for pictures and one for clips; both end in the same projector."""
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=2,
    )
    model = transformers.VideoLlavaForConditionalGeneration(config).eval()
    inputs = {"pixel_values_images": torch.randn(1, 3, 28, 28)}
    vision = ["image_tower.encoder.layers.0", "image_tower.encoder.layers.1"]
    return model, inputs, 16, [*vision, "multi_modal_projector", *LANGUAGE]


@pytest.mark.parametrize("family", [llava, vip_llava, video_llava, llava_next, qwen2_vl, qwen3_vl])
@torch.no_grad()
def test_family(family, tmp_path):
    torch.manual_seed(0)
    model, pixels, tokens, expected = family()
    before, after = torch.randint(5, 64, (1, 3)), torch.randint(5, 64, (1, 4))
    marks = torch.full((1, tokens), IMAGE)
    ids = torch.cat([before, torch.tensor([[START]]), marks, torch.tensor([[END]]), after], 1)
    inputs = {**pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    truth = model(**inputs).logits
    model.save_pretrained(tmp_path / "in")
    kind = type(model)
    config = FourierConfig(bits=2, refine_passes=0)

    def error(folder):
        return float((kind.from_pretrained(folder)(**inputs).logits - truth).norm() / truth.norm())

    llava_fa.compress(tmp_path / "in", tmp_path / "free", config)

    source = open_source(tmp_path / "in")
    plan = make_plan(empty_model(source.folder, len(source.entries)), source, config)
    units = blockwise.find_units(model, plan.layers)
    with Weights.of(model, [unit.path for unit in units]).gated():
        course = survey(model, units, [inputs])
    assert [unit.path.removeprefix("model.") for group in course.groups for unit in group.units] == expected
    assert all(len(group.units) == 1 and not group.repeated for group in course.groups)
    assert all("video_tower" in unit.path for unit in course.idle), "a picture goes past what is for clips alone"
    with WorkFolder(tmp_path / "data", {}) as work:
        job = Job(plan, work, lambda _: None)
        loaded = kind.from_pretrained(tmp_path / "in")
        calibrated.compress_calibrated(job, loaded, [inputs])
        assemble(plan, config, work)
    assert error(tmp_path / "data") < 0.8 * error(tmp_path / "free")
    again = kind.from_pretrained(tmp_path / "data").generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert again.shape[1] == ids.shape[1] + 3
