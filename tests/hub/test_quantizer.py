"""The transformers plug-in: compress in flight, save, load bit for bit, dequantise; traps on the way."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from helpers import inputs_for, processor, random_llava, save_llava
from safetensors import safe_open
from torch import nn

import llava_fa
from llava_fa import FourierConfig, FourierError, FourierLinear
from llava_fa.hub.checkpoint import read_metadata
from llava_fa.hub.quantizer import mark_compressed
from llava_fa.nn.surgery import classify, replace_module

BEST = FourierConfig(bits=3, rank=2, refine_passes=0, iterations=1)
PAPER = FourierConfig(method="paper", bits=2.5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def packed(plain, inputs, tmp_path_factory):
    """(config, dtype) → folder compressed in flight and saved, and the logits before it was saved."""
    made = {}

    def make(config, dtype=torch.float32):
        if (config, dtype) not in made:
            model = load(plain, quantization_config=config, dtype=dtype)
            assert len(layers(model)) == 28
            assert model.dtype == dtype
            folder = tmp_path_factory.mktemp("packed") / "model"
            model.save_pretrained(folder)
            made[config, dtype] = folder, logits(model, inputs)
        return made[config, dtype]

    return make


@pytest.fixture(scope="module")
def inputs():
    return inputs_for(processor())


def load(folder, **options):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def logits(model, inputs):
    cast = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return model(**cast).logits


def keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FourierLinear)}


both_methods = pytest.mark.parametrize("config", [BEST, PAPER], ids=["best", "paper"])


@both_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_and_load_are_bit_identical(packed, inputs, tmp_path, config, dtype):
    folder, wanted = packed(config, dtype)
    assert wanted.dtype == dtype
    for options in ({"dtype": "auto"}, {"dtype": dtype}, {"dtype": "auto", "device_map": "auto"}):
        again = load(folder, **options)
        assert torch.equal(logits(again, inputs), wanted), options
    again.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@both_methods
def test_sharded_files(packed, inputs, tmp_path, config):
    folder, wanted = packed(config)
    load(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path), inputs), wanted)


@pytest.mark.parametrize("asked", DTYPES, ids=str)
@both_methods
def test_another_dtype_never_rounds_the_packed_tensors(packed, config, asked):
    folder, _ = packed(config)
    model, other = load(folder, dtype=torch.float32), load(folder, dtype=asked)
    for name, layer in layers(other).items():
        for key, tensor in layer.packed().items():
            assert torch.equal(tensor, model.get_submodule(name).packed()[key])
    assert {p.dtype for p in other.parameters()} == {asked}


def test_tensors_kept_in_float32_by_the_model_are_still_as_stored(packed, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    monkeypatch.setattr(LlavaForConditionalGeneration, "_keep_in_fp32_modules_strict", {"multi_modal_projector"})
    model = load(packed(BEST)[0], dtype=torch.bfloat16)
    layer = model.model.multi_modal_projector.linear_1
    assert layer.bias.dtype == torch.float32
    layer.layout.check(layer.packed())


def test_in_flight_is_what_the_solver_does(plain):
    model, dense = load(plain, quantization_config=FourierConfig(bits=3, calibration="none")), load(plain)
    for name, layer in layers(model).items():
        linear = dense.get_submodule(name)
        found = llava_fa.approximate(linear.weight.detach(), FourierConfig(bits=3, calibration="none"))
        assert all(torch.equal(tensor, found.tensors[key]) for key, tensor in layer.packed().items())
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)


def test_the_norm_in_front_is_the_data(plain):
    model, dense = load(plain, quantization_config=FourierConfig(bits=3)), load(plain)
    block, compressed = dense.model.language_model.layers[1], model.model.language_model.layers[1]
    moment = block.post_attention_layernorm.weight.detach().square()
    found = llava_fa.approximate(block.mlp.up_proj.weight.detach(), FourierConfig(bits=3), moment)
    assert torch.equal(compressed.mlp.up_proj.codes, found.tensors["codes"])
    blind = llava_fa.approximate(block.mlp.up_proj.weight.detach(), FourierConfig(bits=3))
    assert not torch.equal(compressed.mlp.up_proj.codes, blind.tensors["codes"])
    assert compressed.mlp.up_proj.output_error is None  # nothing was measured


def test_in_flight_and_streaming_agree(packed, plain, inputs, tmp_path):
    folder, wanted = packed(BEST)
    llava_fa.compress(plain, tmp_path / "out", BEST)
    assert torch.equal(logits(load(tmp_path / "out"), inputs), wanted)
    ours, theirs = read_metadata(folder), read_metadata(tmp_path / "out")
    assert ours.config == theirs.config
    assert ours.layers == theirs.layers
    assert ours.not_compressed == theirs.not_compressed
    assert ours.codebooks == theirs.codebooks


def test_what_the_files_hold(packed, plain):
    folder, _ = packed(BEST)
    model = load(folder)
    assert keys(folder) == set(model.state_dict())
    assert sorted(key for key in keys(folder) if "codebook" in key) == ["fourier_codebooks.bits_6"]
    metadata = read_metadata(folder)
    assert set(metadata.layers) == set(layers(model))
    assert metadata.layers["model.multi_modal_projector.linear_2"].weight_error > 0
    assert metadata.config == BEST
    assert metadata.not_compressed == classify(load(plain)).not_compressed


@pytest.mark.usefixtures("exact_activations")
@both_methods
@pytest.mark.parametrize("reloaded", [False, True])
def test_dequantize_gives_a_plain_model(packed, plain, inputs, tmp_path, config, reloaded):
    model = load(packed(config)[0]) if reloaded else load(plain, quantization_config=config)
    if not reloaded:
        model.save_pretrained(tmp_path / "packed")  # leaves the dtype in model.config as a string
    before = logits(model, inputs)
    model.dequantize()
    assert not layers(model)
    assert not hasattr(model.config, "quantization_config")
    assert type(model.model.vision_tower.encoder.layers[0].mlp.fc1) is nn.Linear
    after = logits(model, inputs)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = load(tmp_path / "dense")
    assert torch.equal(logits(again, inputs), after)
    with (
        safe_open(plain / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "dense/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())


def test_dequantize_in_the_models_dtype(packed, inputs):
    model = load(packed(BEST)[0], dtype=torch.bfloat16)
    before = logits(model, inputs)
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model, inputs), before, rtol=0.05, atol=0.05)


def test_copies_and_casts_of_a_model(packed, plain, inputs):
    folder, wanted = packed(BEST)
    model = load(folder)
    assert torch.equal(logits(copy.deepcopy(model), inputs), wanted)
    state = copy.deepcopy(model.state_dict())
    other = load(plain, quantization_config=BEST.replace(seed=1))
    assert not torch.equal(logits(other, inputs), wanted)
    other.load_state_dict(state)
    assert torch.equal(logits(other, inputs), wanted)
    model.to(torch.bfloat16).to(torch.float32)
    assert all(layer.row_scale.dtype == torch.bfloat16 for layer in layers(model).values())


def test_generate(packed, inputs):
    model = load(packed(BEST)[0])
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4


def test_skip_patterns_in_flight(plain, tmp_path):
    model = load(plain, quantization_config=FourierConfig(bits=3, skip=["vision_tower", "*.k_proj"]))
    assert not any("vision_tower" in name or "k_proj" in name for name in layers(model))
    assert len(layers(model)) == 28 - 12 - 2
    model.save_pretrained(tmp_path)
    assert set(layers(load(tmp_path))) == set(layers(model))
    reason = read_metadata(tmp_path).not_compressed["model.vision_tower.encoder.layers.0.mlp.fc1"]
    assert reason == "skipped by pattern 'vision_tower'"


def test_errors_in_flight_reach_the_user(plain, tmp_path):
    with pytest.raises(FourierError, match="skip pattern 'towr' matches no module"):
        load(plain, quantization_config=FourierConfig(bits=3, skip=["towr"]))
    with pytest.raises(FourierError, match=r"self_attn.*rank.*layers failed"):
        load(plain, quantization_config=FourierConfig(bits=3, rank=30))
    model = random_llava()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(FourierError, match=r"^model\.language_model\.layers\.1\.mlp\.up_proj: .*(NaN|finite)"):
        load(save_llava(tmp_path, model=model), quantization_config=FourierConfig(bits=3))


@pytest.mark.parametrize("base", [False, True])
def test_a_plain_dict_tells_how_to_compress(plain, base):
    from transformers import AutoModel

    options = {"quantization_config": {"quant_method": "llava_fa", "bits": 3, "skip": ["vision_tower"]}}
    model = AutoModel.from_pretrained(plain, **options) if base else load(plain, **options)
    wanted = load(plain, quantization_config=FourierConfig(bits=3, skip=["vision_tower"]))
    assert len(layers(model)) == len(layers(wanted)) == 16
    for (_, one), (_, other) in zip(layers(model).items(), layers(wanted).items(), strict=True):
        assert torch.equal(one.codes, other.codes)
    config = FourierConfig.from_dict({"quant_method": "llava_fa"}).to_dict()
    assert load(plain, quantization_config=config).hf_quantizer.metadata.config == FourierConfig(bits=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bit": 4}, "unknown config field bit. Known are .*bits"),
        ({"bits": 9}, "bits is 9. Give 1 to 4"),
        ({"bits": "4"}, "bits is '4'. Give 1 to 4"),
        ({"config_version": 7}, "config_version is 7"),
        ({"format_version": 9}, "format version is 9; this package reads 1 to 4. Update llava-fa"),
    ],
)
def test_a_wrong_dict_is_one_error(plain, wrong, message):
    with pytest.raises(FourierError, match=message):
        load(plain, quantization_config={"quant_method": "llava_fa", **wrong})


def test_a_folder_without_format_version_is_no_request_to_compress(packed, tmp_path):
    shutil.copytree(packed(BEST)[0], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    del config["quantization_config"]["format_version"]
    for damaged in (config["quantization_config"], FourierConfig(bits=3).to_dict()):
        (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "quantization_config": damaged}))
        with pytest.raises(FourierError, match="the checkpoint's format version is None"):
            load(tmp_path / "copy")


def test_the_config_of_a_loaded_model_loads_again(packed, inputs):
    folder, wanted = packed(BEST)
    config = load(folder).config
    assert torch.equal(logits(load(folder, config=config), inputs), wanted)


def test_a_compressed_model_is_not_compressed_again(packed):
    with pytest.raises(ValueError, match=r"passing a FourierConfig"):
        load(packed(BEST)[0], quantization_config=BEST)
    with pytest.raises(ValueError, match=r"passing a dict"):
        load(packed(BEST)[0], quantization_config={"quant_method": "llava_fa", "bits": 2})


def test_a_state_dict_instead_of_files(packed, inputs):
    from transformers import AutoConfig, LlavaForConditionalGeneration

    folder, wanted = packed(BEST)
    state = load(folder).state_dict()

    def build(tensors):
        config = AutoConfig.from_pretrained(folder)
        return LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors)

    assert torch.equal(logits(build(state), inputs), wanted)
    name = "model.multi_modal_projector.linear_1.signs"
    with pytest.raises(FourierError, match=rf"^{name}: this tensor is missing"):
        build({key: tensor for key, tensor in state.items() if key != name})


def test_the_base_model_loads_too(packed, inputs):
    from transformers import AutoModel

    folder, _ = packed(BEST)
    model, base = load(folder), AutoModel.from_pretrained(folder)
    assert len(layers(base)) == 28
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert torch.equal(hidden, model.model(**inputs).last_hidden_state)


@pytest.mark.parametrize("config", [BEST, PAPER], ids=["best", "paper"])
def test_the_base_model_saves_under_its_own_names(packed, inputs, tmp_path, config):
    from transformers import AutoModel

    folder, wanted = packed(config)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    metadata = read_metadata(tmp_path / "base")
    assert set(metadata.layers) == {name.removeprefix("model.") for name in read_metadata(folder).layers}
    assert metadata.not_compressed["language_model.embed_tokens"] == "embedding"
    assert "lm_head" not in metadata.not_compressed
    assert layers(AutoModel.from_pretrained(tmp_path / "base")).keys() == metadata.layers.keys()
    whole = load(tmp_path / "base")  # without its head, which the base has not
    whole.lm_head = load(folder).lm_head
    assert torch.equal(logits(whole, inputs), wanted)
    whole.save_pretrained(tmp_path / "whole")
    assert read_metadata(tmp_path / "whole").layers == read_metadata(folder).layers
    assert torch.equal(logits(load(tmp_path / "whole"), inputs), wanted)


def test_a_model_changed_by_hand_saves_and_loads(inputs, tmp_path):
    model = random_llava(tied=True)
    names = classify(model, only=["language_model"]).layers
    configs = [FourierConfig(bits=2), FourierConfig(bits=4, rank=1), FourierConfig(method="paper", bits=3)]
    for index, name in enumerate(names):
        layer = FourierLinear.from_linear(model.get_submodule(name), configs[index % 3])
        replace_module(model, name, layer)
    mark_compressed(model, config=configs[0], not_compressed={"lm_head": "tied"})
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, inputs), wanted)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert set(read_metadata(tmp_path).codebooks) == {"bits_4", "bits_8"}
    assert torch.equal(logits(again.dequantize() or again, inputs), logits(model.dequantize() or model, inputs))


def other_llava(kind: str):
    """Random models of other families; their vision towers initialise linear layers in their own ways."""
    import transformers as tf

    text = tf.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    pinpoints = [[28, 28], [28, 56]]
    if kind == "next":
        vision = tf.CLIPVisionConfig(**size, image_size=28, patch_size=7)
        config = tf.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints)
        return tf.LlavaNextForConditionalGeneration(config).eval()
    vision = tf.SiglipVisionConfig(**size, image_size=28, patch_size=7, vision_use_head=False)
    config = tf.LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints)
    return tf.LlavaOnevisionForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_other_families(kind, tmp_path):
    torch.manual_seed(0)
    model = other_llava(kind)
    with torch.no_grad():
        model.model.image_newline.normal_()
    model.save_pretrained(tmp_path / "plain")
    packed = load(tmp_path / "plain", quantization_config=BEST)
    packed.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert set(layers(again)) == set(classify(model).layers)
    for name, module in again.named_modules():
        if not isinstance(module, FourierLinear):
            for key, parameter in module.named_parameters(recurse=False):
                assert torch.equal(parameter, model.get_submodule(name).get_parameter(key)), f"{name}.{key}"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, packed(input_ids=ids).logits)
        pixels = torch.randn(1, 3, 28, 28)
        assert torch.equal(
            again.model.vision_tower(pixels).last_hidden_state,
            packed.model.vision_tower(pixels).last_hidden_state,
        )
