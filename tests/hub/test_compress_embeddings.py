"""`compress(embeddings=BITS)`: tied and untied word embeddings, from a checkpoint to an answer and back."""

from __future__ import annotations

import json

import helpers
import pytest
import tiled_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_fa
from llava_fa import Budget, FourierConfig, FourierError
from llava_fa.hub.checkpoint import Metadata, read_metadata
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.preview import preview
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
    told = report.to_dict() | {"seconds": 0, "peak_rss_bytes": 0, "path": ""}
    assert told == inspect_model(out).to_dict() | {"seconds": 0, "peak_rss_bytes": 0, "path": ""}
    rest = {skipped.name: skipped.reason for skipped in report.not_compressed}
    assert WORDS not in rest
    assert rest.get("lm_head") == ("output embedding, tied to the input embedding" if tied else None)
    kept = llava_fa.compress(source, out.with_name("kept"), FourierConfig(bits=2, refine_passes=0))
    assert kept.compressed_bytes > report.compressed_bytes


@pytest.mark.usefixtures("exact_activations")
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


@pytest.mark.usefixtures("exact_activations")
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

    compress_layer, left = streaming.Job.compress, [3]

    def some(*args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        compress_layer(*args, **kwargs)

    monkeypatch.setattr(streaming.Job, "compress", some)
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
    assert WORDS in names
    ids = torch.tensor([[5, 6, 7]])
    assert small(input_ids=ids).logits.isfinite().all()


def twice(folder, other: bool):
    """A tied model whose checkpoint has its output embedding too, or that alone; ``other``: with other numbers."""
    source = helpers.save_llava(folder, model=helpers.random_llava(tied=True))
    tensors = load_file(source / "model.safetensors")
    words = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors["language_model.lm_head.weight"] = tensors[words] + other
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source, tensors, words


def test_a_tied_head_that_is_stored_too_is_left_out(tmp_path, quick, digest):
    plain = helpers.save_llava(tmp_path / "plain", model=helpers.random_llava(tied=True))
    llava_fa.compress(plain, tmp_path / "once", quick, embeddings=4)
    source, tensors, words = twice(tmp_path / "both", other=False)
    report = llava_fa.compress(source, tmp_path / "twice", quick, embeddings=4)
    size = sum(path.stat().st_size for path in (tmp_path / "twice").glob("*.safetensors"))
    budget = Budget(size=size + 9000)  # well under the 57.6 kB of a second head
    llava_fa.compress(source, tmp_path / "budget", FourierConfig(refine_passes=0), budget=budget, embeddings=4)
    del tensors[words]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    llava_fa.compress(source, tmp_path / "head", quick, embeddings=4)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice", "head")]
    assert [layer.name for layer in report.layers if layer.embedding] == [WORDS]
    for found in stored[1:]:
        assert found.keys() == stored[0].keys()
        assert all(torch.equal(found[key], stored[0][key]) for key in found)


def test_a_head_that_is_tied_by_name_alone(tmp_path, quick):
    """transformers then loads two weights; sharing the first would be another model."""
    source, _, _ = twice(tmp_path / "source", other=True)
    with pytest.raises(FourierError, match="another one in the checkpoint"):
        llava_fa.compress(source, tmp_path / "out", quick, embeddings=4)


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def blip():
    text = {**TEXT, "intermediate_size": 64, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2}
    config = transformers.BlipConfig(vision_config=TOWER, text_config=text, tie_word_embeddings=True)
    return transformers.BlipForConditionalGeneration(config)


def git():
    config = transformers.GitConfig(vision_config=TOWER, **TEXT, intermediate_size=64, tie_word_embeddings=True)
    return transformers.GitForCausalLM(config)


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize(("make", "head"), [(blip, "text_decoder.cls.predictions.decoder"), (git, "output")])
def test_heads_with_a_bias_are_tied(make, head, tmp_path, quick):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model.get_submodule(head).bias.normal_()
    model.save_pretrained(tmp_path / "source")
    llava_fa.compress(tmp_path / "source", tmp_path / "out", quick, embeddings=4)
    small = type(model).from_pretrained(tmp_path / "out")
    tied = small.get_submodule(head)
    assert isinstance(tied, TiedHead)
    assert tied.embedding is small.get_input_embeddings()
    assert torch.equal(tied.bias, model.get_submodule(head).bias)
    x = torch.randn(5, 32)
    found = tied(x)
    plain = small.dequantize()
    assert plain.get_submodule(head).weight is plain.get_input_embeddings().weight
    torch.testing.assert_close(found, plain.get_submodule(head)(x), rtol=1e-3, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert torch.equal(again.get_submodule(head).bias, tied.bias)


def test_a_tie_within_the_language_model(tmp_path, quick):
    text = {**TEXT, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}
    former = {**TEXT, "intermediate_size": 64, "encoder_hidden_size": 32}
    config = transformers.Blip2Config(vision_config=TOWER, qformer_config=former, text_config=text, num_query_tokens=4)
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    llava_fa.compress(tmp_path / "source", tmp_path / "out", quick, embeddings=4)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    head = model.language_model.lm_head
    assert isinstance(head, TiedHead)
    assert torch.equal(head.weight, model.get_input_embeddings().weight)
    model.tie_weights()
    plain = model.dequantize()
    plain.tie_weights()
    assert plain.language_model.lm_head.weight is plain.get_input_embeddings().weight


def gemma3n():
    """Scaled words, and a second table for all layers together."""
    text = {**TEXT, "num_hidden_layers": 4, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    config = transformers.Gemma3nTextConfig(
        **text, vocab_size_per_layer_input=280, hidden_size_per_layer_input=16, laurel_rank=8, num_kv_shared_layers=0
    )
    return transformers.Gemma3nForCausalLM(config), ["model.embed_tokens", "model.embed_tokens_per_layer"], []


def t5gemma2():
    """Scaled words of an encoder and a decoder, tied, with one word in a parameter of its own."""
    text = {**TEXT, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    config = transformers.T5Gemma2Config(
        encoder={"text_config": text, "vision_config": TOWER, "mm_tokens_per_image": 16, "eoi_token_index": 9},
        decoder=text,
        eoi_token_index=9,
        tie_word_embeddings=True,
    )
    model = transformers.T5Gemma2ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.encoder.text_model.embed_tokens.eoi_embedding.normal_()
    return model, ["model.encoder.text_model.embed_tokens"], ["model.decoder.embed_tokens", "lm_head.out_proj"]


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize("make", [gemma3n, t5gemma2])
def test_embeddings_with_a_forward_of_their_own(make, tmp_path, quick):
    torch.manual_seed(0)
    model, tables, tied = make()
    model = model.eval()
    model.save_pretrained(tmp_path / "source")
    made = preview(tmp_path / "source", quick, 4)
    report = llava_fa.compress(tmp_path / "source", tmp_path / "out", quick, embeddings=4)
    assert {layer.name for layer in report.layers if layer.embedding} >= set(tables)
    assert made.compressed_bytes == report.compressed_bytes
    small = type(model).from_pretrained(tmp_path / "out")
    for name in tables:
        assert isinstance(small.get_submodule(name), type(model.get_submodule(name)))
        assert isinstance(small.get_submodule(name), FourierEmbedding)
    for name in tied:
        assert small.get_submodule(name).embedding is small.get_submodule(tables[0])
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        rows = [model.get_submodule(name)(ids) for name in tables]
        found = [small.get_submodule(name)(ids) for name in tables]
        for before, after in zip(rows, found, strict=True):
            assert (before - after).norm() < 0.2 * before.norm()
        small.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again")
        kwargs = {"input_ids": ids} | ({"decoder_input_ids": ids} if small.config.is_encoder_decoder else {})
        logits = small(**kwargs).logits
        assert torch.equal(again(**kwargs).logits, logits)
        again.dequantize()
        assert {type(again.get_submodule(name)) for name in tables} == {
            type(model.get_submodule(name)) for name in tables
        }
        torch.testing.assert_close(again(**kwargs).logits, logits, rtol=1e-3, atol=1e-4)
        again.save_pretrained(tmp_path / "plain")
        plain = type(model).from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(plain(**kwargs).logits, logits, rtol=1e-3, atol=1e-4)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_a_large_table_is_fitted_in_portions(tmp_path, checkpoint, quick, digest, monkeypatch):
    """The same bytes, whatever the portions; the table is never in memory as a whole."""
    from llava_fa.hub.shards import Entry
    from llava_fa.solver import portions

    llava_fa.compress(checkpoint, tmp_path / "whole", quick, embeddings=4)
    before = preview(checkpoint, quick, 4).memory_bytes
    read, most = Entry.read, []

    def reading(entry):
        most.append(entry.numel)
        return read(entry)

    with monkeypatch.context() as small:
        small.setattr(portions, "PORTION", 64 * 48)
        small.setattr(Entry, "read", reading)
        llava_fa.compress(checkpoint, tmp_path / "portions", quick, embeddings=4)
        assert preview(checkpoint, quick, 4).memory_bytes < before
    found, whole = digest(tmp_path / "portions"), digest(tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert {name for name in found if found[name] != whole[name]} <= {"config.json"}  # the last digit of an error
    assert max(most) < 300 * 48 <= helpers.random_llava().get_input_embeddings().weight.numel()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("make", [gemma3n, t5gemma2])
def test_embeddings_with_a_forward_of_their_own_on_disk(make, tmp_path, quick):
    """What is beside the packed tensors is brought back with them, for those that share them too."""
    torch.manual_seed(0)
    model, tables, _ = make()
    model.eval().save_pretrained(tmp_path / "source")
    llava_fa.compress(tmp_path / "source", tmp_path / "out", quick, embeddings=4)
    ids = torch.tensor([[5, 9, 7]])
    kwargs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        wanted = type(model).from_pretrained(tmp_path / "out")(**kwargs).logits
        away = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload", "offload_buffers": True}
        small = type(model).from_pretrained(tmp_path / "out", **away)
        assert small.get_submodule(tables[0]).qweight.is_meta
        for _ in range(2):
            assert torch.equal(small(**kwargs).logits, wanted)
