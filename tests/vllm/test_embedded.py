"""The embedded model in vLLM, as it is, compressed in several ways, elastic, as a mixture, and on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engines import Prompt, from_transformers, from_vllm
from small_models import TOWER
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_fa
from llava_fa import FourierConfig
from llava_fa.eval.runner import prompt
from llava_fa.hub.loading import load, processor_of
from llava_fa.hub.source import resolve_model
from llava_fa.hub.visual_tokens import attach_visual_tokens, set_visual_tokens, visual_tokens_of
from llava_fa.world.mixture import upcycled
from llava_fa.world.samples import held_out_samples

pytestmark = pytest.mark.slow

COUNT = 16
TOLERANCE = 1e-4
"""Of a token's log-probability, in float32."""


def questions(number=9):
    """Prompts of the world, one of every task."""
    processor = processor_of("tiny")
    samples = held_out_samples(number, 0)
    return [Prompt(prompt(processor, 1, sample.question.text), (sample.image,)) for sample in samples]


def same(got, want, tolerance=TOLERANCE):
    assert [answer.asked for answer in got] == [answer.asked for answer in want]
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=tolerance)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The embedded model at 4 bits with a low-rank part, its tied words packed."""
    out = tmp_path_factory.mktemp("packed") / "out"
    llava_fa.compress("tiny", out, FourierConfig(bits=4, rank=8), embeddings=4)
    return out


def test_the_embedded_model_loads_as_it_is(exact_activations):
    folder, asked = resolve_model("tiny"), questions()
    same(from_vllm(folder, asked, COUNT)[0], from_transformers(folder, asked, COUNT))


def test_packed_words_and_their_tied_head(packed, exact_activations):
    asked = questions()
    same(from_vllm(packed, asked, COUNT)[0], from_transformers(packed, asked, COUNT))


def test_a_graph_compiled_by_inductor(packed, exact_activations):
    asked = questions(3)
    same(from_vllm(packed, asked, COUNT, enforce_eager=False)[0], from_transformers(packed, asked, COUNT))


def test_rounded_activations_are_as_near_as_rounding(packed, monkeypatch):
    """int8 may flip a token; where the first is the same, its log-probability moves by no more than a rounding does."""
    asked = questions()
    monkeypatch.setenv("LLAVA_FA_ACTIVATIONS", "exact")
    want = from_transformers(packed, asked, 1)
    monkeypatch.setenv("LLAVA_FA_ACTIVATIONS", "int8")
    got = from_vllm(packed, asked, 1)[0]
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a.tokens == b.tokens]
    assert len(pairs) >= len(want) - 1
    assert max(abs(a.log_probabilities[0] - b.log_probabilities[0]) for a, b in pairs) < 0.2


def adapter(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A LoRA of peft's format: rank 4, scaled by 2."""
    from safetensors.torch import save_file

    folder.mkdir()
    targets = sorted({name.rpartition(".")[2] for name in weights})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, weight in weights.items():
        left, singular, right = torch.linalg.svd(weight)
        tensors[f"base_model.model.{name}.lora_A.weight"] = (singular[:4, None] * right[:4]).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left[:, :4].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_lora_on_packed_layers(packed, tmp_path, exact_activations):
    """One on the plain model whose weights are the packed ones plus the LoRA's."""
    from vllm.lora.request import LoRARequest

    model, processor = load(packed, "cpu", torch.float32)
    model.dequantize()
    torch.manual_seed(0)
    base = "model.language_model.layers"
    names = [f"{base}.{index}.{kind}" for index in range(5) for kind in ("self_attn.v_proj", "mlp.down_proj")]
    added = {}
    for name in names:
        weight = model.get_submodule(name).weight.data
        low = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
        added[name] = low * weight.std() / low.std()
        weight += 2 * added[name]
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    asked = questions(4)
    want = from_transformers(tmp_path / "merged", asked, COUNT)
    assert [answer.tokens for answer in want] != [a.tokens for a in from_transformers(packed, asked, COUNT)]
    lora = LoRARequest("lora", 1, str(adapter(tmp_path / "lora", added)))
    same(from_vllm(packed, asked, COUNT, enable_lora=True, max_lora_rank=8, lora=lora)[0], want)


def test_codes_of_another_layer_are_noticed(packed, tmp_path, exact_activations):
    """A control: the comparison fails where one of all layers is wrong."""
    from safetensors.torch import load_file, save_file

    wrong = shutil.copytree(packed, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    key = "model.language_model.layers.3.mlp.down_proj.row_scale"
    tensors[key] = tensors[key].flip(0)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    asked = questions()
    with pytest.raises(AssertionError):
        same(from_vllm(wrong, asked, COUNT)[0], from_transformers(packed, asked, COUNT))


def test_a_trained_mixture(tmp_path, exact_activations):
    model, processor = load("tiny", "cpu", torch.float32)
    mixture = upcycled(model, 8)
    mixture.save_pretrained(tmp_path / "mixture")
    processor.save_pretrained(tmp_path / "mixture")
    out, asked = tmp_path / "out", questions()
    llava_fa.compress(tmp_path / "mixture", out, FourierConfig(bits=4))
    want = from_transformers(out, asked, COUNT)
    same(from_vllm(out, asked, COUNT)[0], want)
    same(from_vllm(out, asked[:3], COUNT, enforce_eager=False)[0], want[:3])


@pytest.fixture(scope="module")
def elastic(packed, tmp_path_factory) -> Path:
    """The packed model with FMVR whose parameters do something."""
    model, processor = load(packed, "cpu", torch.float32)
    attach_visual_tokens(model, processor, 16)
    torch.manual_seed(0)
    for parameter in visual_tokens_of(model).parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    out = tmp_path_factory.mktemp("elastic") / "out"
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def told_in(folder: Path, asked: list[Prompt], count: int):
    """transformers' answers from so many visual tokens."""
    copy = folder.parent / f"told-in-{count}"
    if not copy.exists():
        model, processor = load(folder, "cpu", torch.float32)
        set_visual_tokens(model, count, processor)
        model.save_pretrained(copy)
        processor.save_pretrained(copy)
    return from_transformers(copy, asked, COUNT)


def test_visual_tokens_as_saved_and_by_request(elastic, exact_activations):
    """The same pictures one after the other at three numbers, so that a cache that knew only pictures would be seen."""
    some = questions(4)
    asked = [
        Prompt(one.text, one.pictures, {} if number is None else {"visual_tokens": number})
        for number in (None, 64, 1)
        for one in some
    ]
    want = [answer for number in (16, 64, 1) for answer in told_in(elastic, some, number)]
    got = from_vllm(elastic, asked, COUNT)[0]
    same(got, want)
    assert len({tuple(answer.tokens) for answer in got}) > len(some)
    # All at once: pictures of several numbers in one batch.
    same(from_vllm(elastic, asked, COUNT, together=True)[0], want)


def test_visual_tokens_of_a_server(elastic, exact_activations):
    asked = questions(3)
    overrides = {"visual_tokens": {"kind": "fmvr", "tokens": 4}}
    same(from_vllm(elastic, asked, COUNT, hf_overrides=overrides)[0], told_in(elastic, asked, 4))


def test_numbers_that_cannot_be_are_refused(elastic):
    with pytest.raises(ValueError, match="cannot give 5 visual tokens"):
        from_vllm(elastic, [Prompt(questions(1)[0].text, questions(1)[0].pictures, {"visual_tokens": 5})], 1)


def test_a_model_that_is_not_elastic_says_so(packed):
    one = questions(1)[0]
    with pytest.raises(ValueError, match="always uses all its visual tokens"):
        from_vllm(packed, [Prompt(one.text, one.pictures, {"visual_tokens": 16})], 1)


def test_a_class_that_would_ignore_the_number_is_refused_at_start():
    from types import SimpleNamespace

    from llava_fa.vllm.config import PackedConfig

    config = PackedConfig(SimpleNamespace(layers={}, model=""))
    told = {"visual_tokens": {"kind": "pooling", "tokens": 4}}
    with pytest.raises(ValueError, match="always uses all its visual tokens in vLLM"):
        config.maybe_update_config("m", SimpleNamespace(architectures=["Qwen3VLForConditionalGeneration"], **told))
    config.maybe_update_config("m", SimpleNamespace(architectures=["Qwen3VLForConditionalGeneration"]))
    config.maybe_update_config("m", SimpleNamespace(architectures=["LlavaForConditionalGeneration"], **told))
    assert config.store.model == "m"


def test_damage_is_told_by_the_layers_name(packed, tmp_path):
    from safetensors.torch import load_file, save_file

    wrong = shutil.copytree(packed, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    key = "model.language_model.layers.3.mlp.down_proj"
    del tensors[f"{key}.signs"]
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{key}.signs: this tensor is missing"):
        from_vllm(wrong, questions(1), 1)


def test_a_newer_format_is_told(packed, tmp_path):
    newer = shutil.copytree(packed, tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version is 99"):
        from_vllm(newer, questions(1), 1)


def splittable(folder: Path, experts: int = 0) -> Path:
    """A random model like the embedded one whose heads two ranks can share; of the words one rank has fewer."""
    model, processor = load("tiny", "cpu", torch.float32)
    vision = CLIPVisionConfig(**TOWER, image_size=96, patch_size=12)
    config = LlavaConfig(**{**model.config.to_dict(), "vision_config": vision})
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config)
    made.model.language_model.load_state_dict(model.model.language_model.state_dict())
    made = upcycled(made, experts) if experts else made
    made.generation_config = model.generation_config
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("experts", "whole"), [(0, False), (8, False), (8, True)])
def test_two_ranks_answer_as_one(experts, whole, tmp_path, monkeypatch, exact_activations):
    out, asked = tmp_path / "out", questions(4)
    config = FourierConfig(bits=4, rank=8)
    llava_fa.compress(splittable(tmp_path / "model", experts), out, config, embeddings=None if experts else 4)
    want = from_vllm(out, asked, COUNT)[0]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": whole}
    same(from_vllm(out, asked, COUNT, **ranks)[0], want, 1e-5)


def test_what_cannot_be_split_says_so(tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    llava_fa.compress(splittable(tmp_path / "model"), out, FourierConfig(method="paper", bits=4))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RuntimeError):
        from_vllm(out, questions(1), 1, tensor_parallel_size=2)
    said = "".join(capfd.readouterr())
    assert "method paper transforms columns too" in said
