"""Data-free compression: what comes out, and that it is what went in, smaller."""

import json
import shutil

import helpers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fa
from llava_fa import FourierConfig, FourierError, FourierLinear
from llava_fa.hub import source as sources
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.arrangement import arrange
from llava_fa.hub.inspect import inspect_model

LAYERS = 2 * 6 + 2 + 2 * 7  # vision, projector, language


def stored_names(source):
    """Parameter → name in the files."""
    weights = arrange(empty_model(source.folder, len(source.entries)), source.entries).weights
    return {name: stored.name for name, stored in weights.items()}


def tensors_of(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.usefixtures("exact_activations")
def test_the_result_loads_and_computes_with_the_approximated_weights(checkpoint, compressed):
    out, report = compressed
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    original = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FourierLinear)}
    assert set(linears) == {layer.name for layer in report.layers}
    assert len(linears) == LAYERS
    with torch.no_grad():
        for name, module in linears.items():
            original.get_submodule(name).weight.copy_(module.dequantize())
    inputs = helpers.inputs_for(AutoProcessor.from_pretrained(out))
    with torch.no_grad():
        ours, dense = model(**inputs).logits, original(**inputs).logits
    assert (ours - dense).norm() < 1e-3 * dense.norm()


def test_the_layers_are_those_of_approximate(checkpoint, compressed, quick):
    out, report = compressed
    original = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
    stored = tensors_of(out)
    fed, unfed = "model.language_model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.down_proj"
    gamma = original.get_submodule("model.language_model.layers.1.post_attention_layernorm").weight
    for name, moment in ((fed, gamma.float() ** 2), (unfed, None)):
        expected = llava_fa.approximate(original.get_submodule(name).weight, quick, moment)
        for key in ("codes", "row_scale", "input_scale", "signs"):
            assert torch.equal(stored[f"{name}.{key}"], expected.tensors[key]), key
        layer = next(layer for layer in report.layers if layer.name == name)
        assert layer.weight_error == expected.weight_error
        assert layer.output_error is None  # nothing was measured
    assert not torch.equal(
        stored[f"{fed}.input_scale"],
        llava_fa.approximate(original.get_submodule(fed).weight, quick).tensors["input_scale"],
    )


def test_everything_else_is_copied_bit_for_bit(checkpoint, compressed):
    out, report = compressed
    before, after = tensors_of(checkpoint), tensors_of(out)
    source = sources.open_source(checkpoint)
    names = stored_names(source)
    compressed_names = {f"{layer.name}.weight" for layer in report.layers}
    for name, key in names.items():
        if name not in compressed_names:
            assert torch.equal(after[name], before[key]), name
    assert not compressed_names & set(after)


def test_the_report_counts_every_byte(checkpoint, compressed):
    out, report = compressed
    values = json.loads(json.dumps(report.to_dict()))
    for key in ("bits_per_weight", "compression_ratio", "seconds"):
        assert values[key] > 0
    assert values["peak_rss_bytes"] > 50_000_000
    assert set(values["layers"][0]) >= {
        "name",
        "shape",
        "bits_per_weight",
        "weight_error",
        "output_error",
        "rank",
    }
    assert set(values["not_compressed"][0]) == {"name", "reason"}
    before, after = tensors_of(checkpoint), tensors_of(out)
    size = {
        folder: sum(t.numel() * t.element_size() for t in ts.values()) for folder, ts in (("a", before), ("b", after))
    }
    assert report.compression_ratio == size["a"] / size["b"]
    packed = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in after.items()
        if name.startswith("fourier_codebooks")
        or any(name.startswith(f"{layer.name}.") and not name.endswith(".bias") for layer in report.layers)
    )
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(8 * packed / weights)


def test_what_is_not_compressed_is_listed_with_the_reason(compressed):
    reasons = {skipped.name: skipped.reason for skipped in compressed[1].not_compressed}
    assert reasons["lm_head"] == "output embedding"
    assert "convolution" in reasons["model.vision_tower.embeddings.patch_embedding"]
    assert "embedding" in reasons["model.language_model.embed_tokens"]


def test_inspect_says_the_same_afterwards(compressed):
    out, report = compressed
    again = inspect_model(out).to_dict()
    for key, value in report.to_dict().items():
        if key not in ("seconds", "peak_rss_bytes"):
            assert again[key] == value, key


def test_inspect_shows_an_original(checkpoint):
    report = inspect_model(checkpoint)
    assert report.method is None
    assert report.compression_ratio == 1
    assert report.bits_per_weight == 16
    assert len(report.layers) == LAYERS


def test_all_layouts_of_names_give_the_same_model(checkpoint, compressed, quick, tmp_path):
    source = sources.open_source(checkpoint)
    names = stored_names(source)
    tensors = {name: source.entries[key].read() for name, key in names.items()}
    layouts = {
        "module names": dict(tensors),
        "llava-1.5 on the hub": {
            names[name].replace("vision_tower.", "vision_tower.vision_model."): tensor
            for name, tensor in tensors.items()
        },
    }
    for number, (title, content) in enumerate(layouts.items()):
        folder = tmp_path / f"in{number}"
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        llava_fa.compress(folder, tmp_path / f"out{number}", quick)
        ours, theirs = tensors_of(tmp_path / f"out{number}"), tensors_of(compressed[0])
        assert ours.keys() == theirs.keys(), title
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), title


def test_the_files_are_plain_safetensors(compressed):
    for path in compressed[0].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert all(file.get_tensor(key) is not None for key in file.keys())  # noqa: SIM118


def test_large_models_are_written_in_shards(checkpoint, compressed, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_fa.hub.streaming.SHARD_BYTES", 30_000)
    llava_fa.compress(checkpoint, tmp_path / "out", quick)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(compressed[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_processor_template_and_generation_config_come_along(compressed):
    processor = AutoProcessor.from_pretrained(compressed[0])
    assert processor.chat_template == helpers.CHAT_TEMPLATE
    assert (compressed[0] / "generation_config.json").is_file()
    model = LlavaForConditionalGeneration.from_pretrained(compressed[0])
    assert model.generate(**helpers.inputs_for(processor), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    "config",
    [
        FourierConfig(bits=3, rank=4, refine_passes=0, iterations=2),
        FourierConfig(method="paper", bits=3, rank=4, iterations=2),
        FourierConfig(bits=2, calibration="none", refine_passes=0),
    ],
)
def test_other_configurations_load(checkpoint, tmp_path, config):
    report = llava_fa.compress(checkpoint, tmp_path / "out", config)
    assert all(layer.rank == config.rank for layer in report.layers)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = helpers.inputs_for(AutoProcessor.from_pretrained(tmp_path / "out"))
    assert model(**inputs).logits.isfinite().all()


def test_tied_embeddings_stay_tied(tmp_path, quick):
    model = helpers.random_llava(tied=True)
    helpers.save_llava(tmp_path / "in", model=model)
    report = llava_fa.compress(tmp_path / "in", tmp_path / "out", quick)
    assert "lm_head" in {skipped.name for skipped in report.not_compressed}
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


def test_skip_and_only_are_resolved_before_the_work(checkpoint, tmp_path, quick):
    plans = []
    config = quick.replace(only=("language_model.layers.0",), skip=("*.mlp.*",))
    report = llava_fa.compress(checkpoint, tmp_path / "out", config, on_plan=plans.append)
    names = [layer.name.rpartition(".")[2] for layer in report.layers]
    assert sorted(names) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert [layer.name for layer in plans[0].layers] == [layer.name for layer in report.layers]
    reasons = {skipped.name: skipped.reason for skipped in report.not_compressed}
    assert "*.mlp.*" in reasons["model.language_model.layers.0.mlp.up_proj"]
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_a_pattern_that_matches_nothing_is_an_error(checkpoint, tmp_path, quick):
    with pytest.raises(FourierError, match=r"skip pattern 'vision_towr' matches no module.*vision_tower"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick.replace(skip=("vision_towr",)))
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_layers_and_weights(checkpoint, tmp_path, quick):
    seen = []
    llava_fa.compress(checkpoint, tmp_path / "out", quick, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == LAYERS
    assert seen[-1].weights_done == seen[-1].weights_total
    assert seen[-1].stage == "done"
