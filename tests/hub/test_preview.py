"""A preview promises what compressing then gives."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import random_llava
from typer.testing import CliRunner

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.cli.main import app
from llava_fa.hub.preview import preview, preview_of
from llava_fa.nn.experts import unfuse


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with its weights, and its config.json alone."""
    whole, alone = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("alone")
    random_llava().save_pretrained(whole)
    (alone / "config.json").write_bytes((whole / "config.json").read_bytes())
    return whole, alone


@pytest.mark.parametrize(("bits", "embeddings"), [(4, None), (2, 4)])
def test_sizes_and_shares_are_those_of_the_compression(folders, tmp_path, bits, embeddings):
    whole, alone = folders
    made = preview(alone, FourierConfig(bits=bits), embeddings)
    report = llava_fa.compress(whole, tmp_path / "out", FourierConfig(bits=bits), embeddings=embeddings)
    assert made.compressed_bytes == report.compressed_bytes
    assert made.original_bytes == report.original_bytes
    assert made.packed == sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert made.parameters == made.packed + sum(one.elements for one in made.staying)
    assert made.packed_linear <= made.linear < made.parameters


def test_experts_are_packed_as_linear_layers_are():
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "moe_intermediate_size": 32}
    text |= {"num_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": []})
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name)
    plain = {id(m.weight): m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear}
    assert experts > 0
    unfuse(model)
    made = preview_of(model, Path("here"), FourierConfig())
    assert made.packed_linear >= experts
    assert made.linear == experts + sum(plain.values()) - model.lm_head.weight.numel()


def test_more_layers_take_longer_and_memory_follows_the_largest(folders, tmp_path):
    larger = tmp_path / "larger"
    random_llava(hidden=96, layers=6).save_pretrained(larger)
    small, large = (preview(path, FourierConfig(bits=3)) for path in (folders[1], larger))
    assert large.seconds > small.seconds > 0
    assert large.memory_bytes > small.memory_bytes
    trellis = preview(larger, FourierConfig(bits=3, codes="trellis"))
    assert trellis.seconds > 2 * large.seconds


def test_the_command_reads_the_file_itself_and_says_what_stays(folders):
    run = CliRunner().invoke(app, ["inspect", str(folders[1] / "config.json"), "--bits", "4", "--embeddings", "4"])
    assert run.exit_code == 0, run.output
    assert "x smaller" in run.output
    assert "of those in linear layers and experts" in run.output
    assert "(normalisation)" in run.output
    as_json = CliRunner().invoke(app, ["inspect", str(folders[1]), "--bits", "4", "--embeddings", "4", "--json"])
    values = json.loads(as_json.output)
    assert values == json.loads(json.dumps(preview(folders[1], FourierConfig(bits=4), 4).to_dict()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--embeddings", "4"], "it goes with --bits"),
        (["--bits", "4", "--layers"], "no layers' errors"),
        (["--bits", "9"], "equal to 4"),
    ],
)
def test_options_that_do_not_go_together(folders, options, said):
    run = CliRunner().invoke(app, ["inspect", str(folders[1]), *options])
    assert run.exit_code == 2
    assert said in run.output


def test_what_cannot_be_previewed(folders, tmp_path):
    with pytest.raises(FourierError, match=r"no config\.json"):
        preview(tmp_path, FourierConfig())
    values = json.loads((folders[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(FourierError, match=r"quantised already \(gptq\).*config.json of the original"):
        preview(tmp_path, FourierConfig())


@pytest.mark.parametrize("named", ["LlavaLlamaForCausalLM", "InternLM2ForCausalLM"])
def test_a_config_that_transformers_does_not_read(tmp_path, named):
    """Of LLaVA's first format transformers would build a model of its own default sizes."""
    values = {"architectures": [named], "model_type": "llava", "hidden_size": 64, "mm_vision_tower": "tower"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FourierError, match=r"does not read.*Compress the folder"):
        preview(tmp_path, FourierConfig())
