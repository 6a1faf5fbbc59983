"""`compress(embeddings=BITS)`: tied and untied word embeddings, from a checkpoint to an answer and back."""

from __future__ import annotations

import json

import helpers
import pytest
import tiled_models
import torch
from transformers import LlavaForConditionalGeneration

import llava_fa
from llava_fa import Budget, FourierConfig, FourierError
from llava_fa.hub.checkpoint import Metadata, read_metadata
from llava_fa.hub.inspect import inspect_model
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.fourier_embedding import FourierEmbedding, TiedHead
from llava_fa.nn.fourier_linear import FourierLinear

WORDS = "model.language_model.embed_tokens"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request, tmp_path_factory, quick, samples):
    """(folder of the original, compressed folder, report, tied); calibrated, so that all stages see the new words."""
    folder = tmp_path_factory.mktemp("embeddings")
    source = helpers.save_llava(folder / "source", model=helpers.random_llava(tied=request.param))
    report = llava_fa.compress(source, folder / "out", quick, samples, embeddings=4)
    return source, folder / "out", report, request.param


def logits(model, processor) -> torch.Tensor:
    with torch.no_grad():
        return model(**helpers.inputs_for(processor)).logits


def test_the_report_tells_them(case):
    source, out, report, tied = case
    rows = {layer.name: layer for layer in report.layers}
    assert rows[WORDS].embedding
    assert 4 < rows[WORDS].bits_per_weight < 4.9  # 48 columns: scales weigh
    assert ("lm_head" in rows) is not tied
    assert report.to_dict() | {"seconds": 0, "peak_rss_bytes": 0, "path": ""} == (
        inspect_model(out).to_dict() | {"seconds": 0, "peak_rss_bytes": 0, "path": ""}
    )
    rest = {skipped.name: skipped.reason for skipped in report.not_compressed}
    assert WORDS not in rest
    assert rest.get("lm_head") == ("output embedding, tied to the input embedding" if tied else None)
    kept = llava_fa.compress(source, out.with_name("kept"), FourierConfig(bits=2, refine_passes=0))
    assert kept.compressed_bytes > report.compressed_bytes


def test_what_is_loaded_is_what_was_stored(case):
    _, out, _, tied = case
    model = LlavaForConditionalGeneration.from_pretrained(out)
    processor = helpers.processor()
    words = model.get_input_embeddings()
    assert isinstance(words, FourierEmbedding)
    assert isinstance(model.lm_head, TiedHead if tied else FourierLinear)
    assert not [name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name]
    model.tie_weights()  # transformers does this whenever it pleases
    found = logits(model, processor)
    plain = LlavaForConditionalGeneration.from_pretrained(out).dequantize()
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) is tied
    assert bool(plain.all_tied_weights_keys) is tied
    torch.testing.assert_close(found, logits(plain, processor), rtol=1e-3, atol=1e-4)


def test_saved_again_and_dequantised(case, tmp_path):
    _, out, _, tied = case
    processor = helpers.processor()
    model = LlavaForConditionalGeneration.from_pretrained(out)
    found = logits(model, processor)
    model.save_pretrained(tmp_path / "again")
    assert read_metadata(tmp_path / "again").layers[WORDS].embedding
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(found, logits(again, processor))
    again.dequantize().save_pretrained(tmp_path / "plain")
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(found, logits(plain, processor), rtol=1e-3, atol=1e-4)
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) is tied


def test_it_generates(case):
    _, out, _, _ = case
    model = LlavaForConditionalGeneration.from_pretrained(out)
    inputs = helpers.inputs_for(helpers.processor())
    told = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert told.shape[1] == inputs["input_ids"].shape[1] + 4


def test_the_format_says_so(case):
    _, out, _, _ = case
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 4
    assert config["layers"][WORDS]["embedding"] is True
    assert [name for name, record in config["layers"].items() if "embedding" in record] == [WORDS]
    assert Metadata.from_dict(config).to_dict() == config
    for change, message in (
        ({"format_version": 3}, "packed embeddings"),
        ({"layers": {WORDS: {**config["layers"][WORDS], "embedding": "yes"}}}, "no embedding"),
    ):
        with pytest.raises(FourierError, match=message):
            Metadata.from_dict({**config, **change})


def test_a_layer_is_not_taken_for_an_embedding(case, tmp_path):
    _, out, _, _ = case
    for name in out.iterdir():
        if name.is_file():
            (tmp_path / name.name).write_bytes(name.read_bytes())
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["layers"][WORDS]["embedding"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FourierError, match="does not belong to these weights"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_streamed_is_resumed_to_the_same_bytes(tmp_path, checkpoint, quick, digest, monkeypatch):
    llava_fa.compress(checkpoint, tmp_path / "whole", quick, embeddings=3)
    from llava_fa.hub import streaming

    compress_layer, left = streaming.compress_layer, [3]

    def some(*args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        compress_layer(*args, **kwargs)

    monkeypatch.setattr(streaming, "compress_layer", some)
    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(checkpoint, tmp_path / "cut", quick, embeddings=3)
    with pytest.raises(FourierError, match="another embeddings"):
        llava_fa.compress(checkpoint, tmp_path / "cut", quick, embeddings=4)
    monkeypatch.undo()
    llava_fa.compress(checkpoint, tmp_path / "cut", quick, embeddings=3)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_size_counts_them(tmp_path, checkpoint, quick):
    with_words = llava_fa.compress(checkpoint, tmp_path / "a", quick, embeddings=2)
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors")) + 2000
    found = llava_fa.compress(checkpoint, tmp_path / "b", budget=Budget(size=size), embeddings=2)
    assert sum(path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors")) <= size
    assert {layer.name for layer in found.layers} == {layer.name for layer in with_words.layers}


def test_patterns_keep_them(tmp_path, checkpoint, quick):
    found = llava_fa.compress(checkpoint, tmp_path / "out", quick.replace(skip=("lm_head",)), embeddings=4)
    assert [layer.name for layer in found.layers if layer.embedding] == [WORDS]
    assert "lm_head" not in [layer.name for layer in found.layers]
    both = quick.replace(skip=("lm_head", "*embed_tokens"))
    with pytest.raises(FourierError, match="no embedding"):
        llava_fa.compress(checkpoint, tmp_path / "none", both, embeddings=4)


def test_bits_that_cannot_be(tmp_path, checkpoint):
    with pytest.raises(FourierError, match="bits is 9"):
        llava_fa.compress(checkpoint, tmp_path / "out", embeddings=9)


@pytest.mark.parametrize("make", [lambda: tiled_models.next_model()[0], tiled_models.onevision_model])
def test_other_families(make, tmp_path, quick):
    """LLaVA-NeXT and LLaVA-OneVision: words and head become packed, and the model still reads text."""
    model = make()
    model.save_pretrained(tmp_path / "source")
    llava_fa.compress(tmp_path / "source", tmp_path / "out", quick, embeddings=4)
    small = type(model).from_pretrained(tmp_path / "out")
    names = [name for name, layer in packed_layers(small) if isinstance(layer, FourierEmbedding)]
    assert names == [WORDS]
    ids = torch.tensor([[5, 6, 7]])
    assert small(input_ids=ids).logits.isfinite().all()
