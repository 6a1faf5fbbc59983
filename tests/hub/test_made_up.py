"""Inputs made up from a configuration: what a signature names, and nothing special among the tokens."""

import torch
import transformers

from llava_fa.hub.made_up import pictures_and_sounds, words


def text(input_ids, attention_mask=None, use_cache=None):
    """A language model's signature."""


def test_words_are_no_special_tokens():
    config = transformers.LlavaConfig(image_token_index=2, text_config={"vocab_size": 40, "model_type": "llama"})
    (given,) = words(text, config)
    assert set(given) == {"input_ids", "attention_mask", "use_cache"}
    tokens = given["input_ids"][0].tolist()
    special = {2, config.text_config.bos_token_id, config.text_config.eos_token_id}
    assert len(tokens) == 12
    assert special.isdisjoint(tokens)
    assert max(tokens) < 40


def test_what_a_signature_insists_on_is_given_or_it_is_not_called():
    def more(input_ids, something_else):
        """Wants what nobody knows."""

    assert list(words(more, transformers.LlamaConfig())) == []
    assert list(pictures_and_sounds(text, transformers.LlamaConfig())) == []


def test_a_grid_calls_for_patches_first():
    def features(pixel_values, image_grid_thw=None):
        """A model's way from pixels to words."""

    config = transformers.Qwen2VLConfig()
    first = next(pictures_and_sounds(features, config))
    grid, vision = first["image_grid_thw"], config.vision_config
    assert first["pixel_values"].shape == (int(grid.prod()), 3 * vision.temporal_patch_size * vision.patch_size**2)


def test_whole_pictures_come_small_and_as_large_as_the_configuration_has_them():
    def picture(pixel_values):
        """A vision tower's signature."""

    config = transformers.LlavaConfig(vision_config={"model_type": "clip_vision_model", "image_size": 336})
    shapes = [tuple(given["pixel_values"].shape) for given in pictures_and_sounds(picture, config)]
    assert shapes[:2] == [(1, 3, 8 * 32, 8 * 32), (1, 3, 336, 336)]


def test_sounds():
    def sound(input_features, feature_lens=None):
        """An audio tower's signature."""

    config = transformers.Qwen2AudioConfig()
    first = next(pictures_and_sounds(sound, config))
    assert first["input_features"].shape == (1, config.audio_config.num_mel_bins, 3000)
    assert torch.equal(first["feature_lens"], torch.tensor([3000]))
