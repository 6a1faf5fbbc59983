"""The counter against torch's own, and against the paper's figure."""

import helpers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import llava_fa
from llava_fa.hub.flops import count_flops, read_model_config
from llava_fa.hub.visual_tokens import attach_visual_tokens


def llava_7b():
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064))


@pytest.mark.parametrize("tokens", [16, 4])
@pytest.mark.parametrize("frames", [1, 3])
def test_equals_what_torch_counts_while_the_model_runs(tokens, frames):
    model, processor = helpers.random_llava(), helpers.processor()
    model.set_attn_implementation("eager")  # torch counts the attention of CPUs only when it is spelled out
    attach_visual_tokens(model, processor, tokens)
    pictures = [helpers.picture(seed) for seed in range(frames)]
    inputs = processor(images=[pictures], text=["<image>" * frames + " what is it?"], return_tensors="pt")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    text = inputs["input_ids"].shape[1] - frames * tokens
    ours = count_flops(model.config, text=text, pictures=frames)
    assert ours.sequence == inputs["input_ids"].shape[1]
    # rotary angles are the one product of matrices that is not counted here
    assert counter.get_total_flops() == pytest.approx(ours.total, rel=2e-3)
    assert counter.get_total_flops() >= ours.total


def test_generated_tokens_read_the_cache():
    config = llava_7b()
    prompt = count_flops(config, text=32, visual_tokens=36).language_model
    one = count_flops(config, text=32, visual_tokens=36, generated=1).language_model - prompt
    two = count_flops(config, text=32, visual_tokens=36, generated=2).language_model - prompt
    five, six = (count_flops(config, text=32, visual_tokens=36, generated=n).language_model - prompt for n in (5, 6))
    assert six - five == two - one + 4 * (two - 2 * one)  # each costs the same more than the one before
    attention = 4 * 4096 * 32  # one position more, in 32 layers
    assert two - 2 * one == attention


def test_llava_7b_at_36_of_576_tokens_saves_what_the_paper_says():
    config = llava_7b()
    full, few = (count_flops(config, text=32, visual_tokens=count) for count in (576, 36))
    assert full.language_model == pytest.approx(8.07e12, rel=0.01)
    assert 1 - few.language_model / full.language_model == pytest.approx(0.89, abs=0.005)
    assert 1 - few.total / full.total == pytest.approx(0.848, abs=0.005)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(llava_fa.FourierError, match="576, 144, 36, 9, 1"):
        count_flops(llava_7b(), text=32, visual_tokens=100)
    with pytest.raises(llava_fa.FourierError, match=r"no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(llava_fa.FourierError, match="no configuration that transformers can read"):
        read_model_config(tmp_path)
    from transformers import MixtralConfig

    config = llava_7b()
    config.text_config = MixtralConfig()
    with pytest.raises(llava_fa.FourierError, match="has experts"):
        count_flops(config, text=1)


def test_a_config_alone_is_enough(tmp_path):
    llava_7b().save_pretrained(tmp_path)
    found = count_flops(read_model_config(tmp_path), text=32)
    assert found == count_flops(llava_7b(), text=32)
