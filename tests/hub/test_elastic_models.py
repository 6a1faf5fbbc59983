"""Elastic visual tokens on whole models: families, processors, saving, loading, compressing."""

import copy
import json

import helpers
import pytest
import torch
from tiled_models import TEXT, next_model, onevision_count, onevision_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_fa
from llava_fa.hub.loading import load
from llava_fa.hub.visual_tokens import attach_visual_tokens, set_visual_tokens, visual_tokens_of


def image_features(model, **inputs):
    return model.model.get_image_features(**inputs, return_dict=True).pooler_output


@pytest.mark.parametrize("count", [16, 4, 1])
def test_llava_model_processor_and_positions_agree(count):
    model, processor = helpers.random_llava(), helpers.processor()
    attach_visual_tokens(model, processor, count)
    inputs = helpers.inputs_for(processor)
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == count
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_all_tokens_are_the_model_as_it_was():
    model, processor = helpers.random_llava(), helpers.processor()
    inputs = helpers.inputs_for(processor)
    with torch.no_grad():
        before = model(**inputs).logits
        attach_visual_tokens(model, processor)
        assert torch.equal(model(**helpers.inputs_for(processor)).logits, before)


def test_what_the_language_model_is_given_is_the_pooled_grid():
    model = helpers.random_llava()
    inputs = helpers.inputs_for(helpers.processor())
    with torch.no_grad():
        full = image_features(model, pixel_values=inputs["pixel_values"])[0]
        attach_visual_tokens(model, tokens=4)
        four = image_features(model, pixel_values=inputs["pixel_values"])[0]
    torch.testing.assert_close(four, full.view(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1))


@pytest.mark.parametrize("size", [(96, 96), (200, 90), (90, 200), (150, 140), (300, 97)])
@pytest.mark.parametrize("count", [64, 16, 4, 1])
def test_llava_next_tiles_and_newlines_agree(size, count):
    model, processor = next_model()
    attach_visual_tokens(model, processor, count)
    picture = helpers.picture(size=max(size)).crop((0, 0, *size))
    inputs = processor(images=[picture], text=["<image> what?"], return_tensors="pt")
    with torch.no_grad():
        model(**inputs)  # raises where tokens and features differ in number
        features = image_features(model, pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    assert len(features[0]) == (inputs["input_ids"] == 1).sum()


@pytest.mark.parametrize("count", [81, 25, 9, 1])
def test_onevision_tiles_and_newlines_agree(count):
    model = onevision_model()
    processor = type("Processor", (), {"num_image_tokens": 81})()
    attach_visual_tokens(model, processor, count)
    assert processor.num_image_tokens == count
    for height, width in ((63, 63), (126, 50), (40, 200), (130, 120)):
        tiles = 1 + (height > 63 or width > 63) + 1 * (height > 63 and width > 63) * 2 + 2
        pixels = torch.randn(1, max(tiles, 5), 3, 63, 63)
        with torch.no_grad():
            features = image_features(model, pixel_values=pixels, image_sizes=torch.tensor([[height, width]]))
        assert len(features[0]) == onevision_count(model, count, height, width)


def test_onevision_videos_take_as_many_tokens_a_frame():
    model = onevision_model()
    frames = torch.randn(1, 3, 3, 63, 63)

    def tokens():
        with torch.no_grad():
            return model.model.get_video_features(frames, return_dict=True).pooler_output.shape[1]

    assert tokens() == 3 * 25 + 1  # its own pooling, and one newline
    attach_visual_tokens(model, tokens=9)
    assert tokens() == 3 * 9 + 1
    set_visual_tokens(model, 81)
    assert tokens() == 3 * 25 + 1


def test_several_pictures_are_frames():
    model, processor = helpers.random_llava(), helpers.processor()
    attach_visual_tokens(model, processor, 4)
    frames = [helpers.picture(seed) for seed in range(3)]
    inputs = processor(images=[frames], text=["<image><image><image> what moves?"], return_tensors="pt")
    assert (inputs["input_ids"] == 1).sum() == 12
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("kind", ["fmvr", "pooling"])
def test_saved_and_restored(tmp_path, kind):
    model, processor = helpers.random_llava(), helpers.processor()
    attach_visual_tokens(model, processor, 4, kind)
    for parameter in model.model.visual_tokens.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["visual_tokens"] == {"kind": kind, "tokens": 4}
    again, its = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = helpers.inputs_for(its)
    assert (inputs["input_ids"] == 1).sum() == 4
    with torch.no_grad():
        want, got = model(**helpers.inputs_for(processor)).logits, again(**inputs).logits
    assert torch.equal(want, got)
    assert visual_tokens_of(again).kind == kind


def test_tensors_that_a_checkpoint_lacks_start_afresh(tmp_path):
    model = attach_visual_tokens(helpers.random_llava(), tokens=4, kind="pooling")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["visual_tokens"]["kind"] = "fmvr"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = helpers.inputs_for(helpers.processor())
    features = [image_features(m, pixel_values=inputs["pixel_values"])[0] for m in (model, again)]
    torch.testing.assert_close(*features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fmvr", "tokens": 5}, "config.json: visual_tokens: a grid of 4×4 cannot give 5"),
        ({"kind": "magic", "tokens": 4}, "'magic' is no kind"),
        (
            {"kind": "queries", "tokens": 4},
            "config.json: visual_tokens: .*kind 'queries' .* --matryoshka",
        ),
        ({"tokens": 4}, "not an object with kind and tokens"),
        (7, "not an object with kind and tokens"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, settings, message):
    helpers.save_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "visual_tokens": settings}))
    with pytest.raises(llava_fa.FourierError, match=message):
        load(tmp_path, "cpu")


def test_copies_are_independent():
    model = attach_visual_tokens(helpers.random_llava(), tokens=4)
    other = copy.deepcopy(model)
    set_visual_tokens(other, 1)
    assert (visual_tokens_of(model).tokens, visual_tokens_of(other).tokens) == (4, 1)
    inputs = helpers.inputs_for(helpers.processor())
    with torch.no_grad():
        lengths = [len(image_features(m, pixel_values=inputs["pixel_values"])[0]) for m in (model, other)]
    assert lengths == [4, 1]


def test_attaching_again_replaces():
    model = attach_visual_tokens(helpers.random_llava(), tokens=4)
    attach_visual_tokens(model, tokens=1, kind="pooling")
    assert len(model.model.multi_modal_projector._forward_hooks) == 1
    assert [module.kind for name, module in model.named_modules() if name.endswith("visual_tokens")] == ["pooling"]


def test_choosing_all_of_a_plain_model_attaches_nothing():
    model = helpers.random_llava()
    set_visual_tokens(model, 16)
    assert visual_tokens_of(model) is None
    set_visual_tokens(model, 4)
    assert visual_tokens_of(model).kind == "pooling"
    with pytest.raises(llava_fa.FourierError, match="16, 4, 1"):
        set_visual_tokens(helpers.random_llava(), 7)


def test_other_models_are_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with pytest.raises(llava_fa.FourierError, match="has no projector"):
        attach_visual_tokens(Qwen2ForCausalLM(Qwen2Config(**TEXT)))
    model = helpers.random_llava()
    model.config.model_type = "vipllava"
    with pytest.raises(llava_fa.FourierError, match="llava, llava_next, llava_onevision"):
        attach_visual_tokens(model)


def test_loading_with_a_number(tmp_path):
    folder = helpers.save_llava(tmp_path / "model")
    _model, processor = load(folder, "cpu", visual_tokens=4)
    assert (helpers.inputs_for(processor)["input_ids"] == 1).sum() == 4
    with pytest.raises(llava_fa.FourierError, match="16, 4, 1"):
        load(folder, "cpu", visual_tokens=3)


def test_compressed_with_fewer_tokens(tmp_path, checkpoint, quick, samples):
    out = tmp_path / "out"
    llava_fa.compress(checkpoint, out, quick, samples, visual_tokens=4)
    model, processor = load(out, "cpu")
    inputs = helpers.inputs_for(processor)
    assert (inputs["input_ids"] == 1).sum() == 4
    assert visual_tokens_of(model).kind == "pooling"
    model.generate(**inputs.to(model.dtype), max_new_tokens=2, do_sample=False)
    with pytest.raises(llava_fa.FourierError, match="16, 4, 1"):
        llava_fa.compress(checkpoint, tmp_path / "other", quick, visual_tokens=8)


def test_a_trained_model_keeps_its_restoration_when_compressed(tmp_path, quick):
    model = attach_visual_tokens(helpers.random_llava(), tokens=16)
    torch.nn.init.constant_(model.model.visual_tokens.restoration[0].maximum.low, 0.25)
    folder = helpers.save_llava(tmp_path / "model", model=model)
    report = llava_fa.compress(folder, tmp_path / "out", quick, visual_tokens=4)
    assert any("visual_tokens" in skipped.name for skipped in report.not_compressed)
    again, processor = load(tmp_path / "out", "cpu")
    module = visual_tokens_of(again)
    assert (module.kind, module.tokens) == ("fmvr", 4)
    assert torch.equal(module.restoration[0].maximum.low.float(), torch.full((48,), 0.25))
    set_visual_tokens(again, 1, processor)
    again.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    third, _ = load(tmp_path / "saved", "cpu")
    assert (visual_tokens_of(third).kind, visual_tokens_of(third).tokens) == ("fmvr", 1)
