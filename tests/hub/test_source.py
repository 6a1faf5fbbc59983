"""Folders as they come: stale files, odd configurations, tensors too few or too many, files kept from reading."""

import builtins
import json
import os
import shutil
import sys
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.hub.complete import carry_unused
from llava_fa.hub.inspect import inspect_model, spending
from llava_fa.hub.loading import load
from llava_fa.hub.source import open_source

CONFIG = FourierConfig(bits=2, refine_passes=0)
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in one file, to spoil."""
    return helpers.save_llava(tmp_path / "in", dtype=torch.bfloat16)


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))


# Weights other than the model's.


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lost", ["projector", "embedding", "half a tower", "all but one"])
def test_what_is_missing_is_never_filled_in(folder, tmp_path, packed, lost):
    """Neither by whatever asks, nor where it is looked at."""
    if packed:
        llava_fa.compress(folder, tmp_path / "small", CONFIG.replace(skip=("*.linear_1", "*.encoder.layers.1")))
        folder = tmp_path / "small"
    wanted = {
        "projector": lambda key: "linear_1.weight" not in key,
        "embedding": lambda key: "embed_tokens" not in key,
        "half a tower": lambda key: "encoder.layers.1." not in key,
        "all but one": lambda key: "lm_head" in key,
    }[lost]
    kept = {key: value for key, value in load_file(folder / "model.safetensors").items() if wanted(key)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"tensors of LlavaForConditionalGeneration are (not )?in the weight files|missing from the weight files"
    uses = [lambda: load(folder, "cpu"), lambda: inspect_model(folder)]
    if packed:  # as for all that is loaded through this package's format
        uses += [lambda: AutoModelForImageTextToText.from_pretrained(folder)]
    if not packed:
        uses += [lambda: llava_fa.compress(folder, tmp_path / "out", CONFIG)]
        uses += [lambda: AutoModelForImageTextToText.from_pretrained(folder, quantization_config=CONFIG)]
    for use in uses:
        with pytest.raises(FourierError, match=message):
            use()
    assert not (tmp_path / "out").exists()


def test_the_single_file_counts_and_not_a_stale_index(folder, tmp_path):
    """As in transformers; the shards are told of."""
    other = helpers.save_llava(tmp_path / "other", model=helpers.random_llava(7), dtype=torch.bfloat16, shard="60KB")
    for path in other.glob("model*"):
        shutil.copyfile(path, folder / path.name)
    stored = load_file(folder / "model.safetensors")[EMBEDDING]
    assert torch.equal(open_source(folder).entries[EMBEDDING].read(), stored)
    assert torch.equal(load(folder, "cpu", torch.bfloat16)[0].get_input_embeddings().weight, stored)
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG)
    assert set(report.source_ledger.unread) == {path.name for path in other.glob("*.safetensors")}
    assert torch.equal(load(tmp_path / "out", "cpu", torch.bfloat16)[0].get_input_embeddings().weight, stored)


def test_a_file_that_the_configuration_names(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "ema.safetensors")
    configure(folder, transformers_weights="ema.safetensors")
    llava_fa.compress(folder, tmp_path / "out", CONFIG)
    load(tmp_path / "out")
    for name in ("../in/ema.safetensors", "weights.bin", 3):
        configure(folder, transformers_weights=name)
        with pytest.raises(FourierError, match=r"config\.json names weights that are no safetensors of this folder"):
            open_source(folder)


def test_a_name_in_two_files_counts_once(folder, tmp_path):
    """The last file, as in transformers; the other tensor is dropped, and that is said."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    save_file({EMBEDDING: torch.zeros_like(tensors[EMBEDDING])}, folder / "a.safetensors", metadata={"format": "pt"})
    weight_map = {**dict.fromkeys(tensors, "b.safetensors"), EMBEDDING: "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG)
    assert torch.equal(load(folder, "cpu", torch.bfloat16)[0].get_input_embeddings().weight, tensors[EMBEDDING])
    assert torch.equal(
        load(tmp_path / "out", "cpu", torch.bfloat16)[0].get_input_embeddings().weight, tensors[EMBEDDING]
    )
    fates = [(account.file, account.fate) for account in report.source_ledger.tensors if account.name == EMBEDDING]
    assert fates == [("a.safetensors", "dropped"), ("b.safetensors", "kept")]
    assert report.source_ledger.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture
def with_more(folder):
    """The checkpoint with a head for several tokens that no module has."""
    spoil(folder, lambda tensors: tensors.update({f"mtp.{i}.weight": torch.ones(32, 48) for i in range(3)}))
    return folder


def test_tensors_that_no_module_has_are_kept_and_told(with_more, tmp_path):
    report = llava_fa.compress(with_more, tmp_path / "out", CONFIG)
    why = "no module of LlavaForConditionalGeneration has it"
    for ledger in (report.ledger, report.source_ledger, inspect_model(tmp_path / "out").ledger):
        lines = [line for line in ledger.summary() if line.why == why]
        assert [(line.fate, line.count, line.bytes) for line in lines] == [("kept", 3, 3 * 4 * 32 * 48)]
    assert spending(tmp_path / "out")["unused"] == spending(with_more)["unused"] == 3 * 4 * 32 * 48
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mtp.1.weight"], torch.ones(32, 48))
    load(tmp_path / "out")


def test_they_are_dropped_where_that_is_asked_for(with_more, tmp_path):
    report = llava_fa.compress(with_more, tmp_path / "out", CONFIG, drop_unused=True)
    assert not [account for account in report.ledger.tensors if "mtp" in account.name]
    dropped = [account.name for account in report.source_ledger.tensors if account.fate == "dropped"]
    assert dropped == ["mtp.0.weight", "mtp.1.weight", "mtp.2.weight"]
    assert inspect_model(tmp_path / "out").source_ledger == report.source_ledger
    assert report.compressed_bytes == sum(account.bytes for account in report.ledger.tensors)
    load(tmp_path / "out")


def test_a_tied_embedding_stored_as_the_head_is_packed_in_the_ledger_too(tmp_path):
    folder = helpers.save_llava(tmp_path / "in", model=helpers.random_llava(tied=True), dtype=torch.bfloat16)
    head = "language_model.lm_head.weight"
    spoil(folder, lambda tensors: tensors.update({head: tensors.pop(EMBEDDING)}))
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG, embeddings=4)
    lines = [(account.fate, account.why) for account in report.source_ledger.tensors if account.name == head]
    assert lines == [("packed", "model.language_model.embed_tokens")]


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_what_transformers_leaves_out_is_carried_over(with_more, tmp_path, shard):
    AutoModelForImageTextToText.from_pretrained(with_more).save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert len(list((tmp_path / "saved").glob("*.index.json"))) == (shard == "60KB")
    carry_unused(with_more, tmp_path / "saved")
    before, after = open_source(with_more), open_source(tmp_path / "saved")
    assert before.entries.keys() == after.entries.keys()
    assert all(torch.equal(entry.read(), after.entries[name].read()) for name, entry in before.entries.items())
    if shard == "60KB":
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == after.nbytes
    carry_unused(with_more, tmp_path / "saved")  # once is enough
    assert open_source(tmp_path / "saved").fingerprint == after.fingerprint


# Architectures.


@pytest.mark.parametrize("architectures", [..., [], None, ["LlavaModel"], ["LlavaLlamaForCausalLM"]])
def test_the_name_of_the_class_is_not_needed(folder, tmp_path, architectures):
    configure(folder, architectures=architectures)
    assert len(llava_fa.compress(folder, tmp_path / "out", CONFIG).layers) == 28
    for path in (folder, tmp_path / "out"):
        assert type(load(path)[0]).__name__ == "LlavaForConditionalGeneration"


@pytest.fixture
def text_model(tmp_path):
    return helpers.save_text_model(tmp_path / "in")


def test_a_text_model_is_calibrated_with_text(text_model, tmp_path):
    samples = [(helpers.picture(seed), f"what is {seed}?", "a picture") for seed in range(3)]
    report = llava_fa.compress(text_model, tmp_path / "out", CONFIG, samples)
    assert len(report.layers) == 14
    assert all(layer.output_error is not None for layer in report.layers)
    model, processor = load(tmp_path / "out")
    from llava_fa.eval.runner import answer

    assert len(answer(model, processor, [([], "hello?")], max_new_tokens=2)) == 1
    with pytest.raises(FourierError, match="this model does not see pictures"):
        answer(model, processor, [(helpers.picture(), "hello?")], max_new_tokens=2)


def test_a_text_model_whose_tokenizer_names_a_processor(text_model):
    """As that of a language model taken out of a vision-language model does."""
    path = text_model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "LlavaProcessor"}))
    processor = load(text_model)[1]
    assert processor(text=["hello"])["input_ids"]


def test_layers_without_end_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    configure(folder, vision_config={**config["vision_config"], "num_hidden_layers": 10**9})
    with pytest.raises(FourierError, match=r"config\.json makes 1000000000 layers, and there are 70 tensors"):
        inspect_model(folder)


# Files that cannot be read, configurations that are odd.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_file_that_may_not_be_read(folder, tmp_path, monkeypatch, name):
    """Before any work, whatever part of the folder it is. Root, who runs CI, may read everything."""
    true = builtins.open, Path.open, os.open

    def refuse(which):
        def opened(path, *args, **kwargs):
            if str(path) == str(folder / name):
                raise PermissionError(13, "Permission denied", str(path))
            return which(path, *args, **kwargs)

        return opened

    monkeypatch.setattr(builtins, "open", refuse(true[0]))
    monkeypatch.setattr(Path, "open", refuse(true[1]))
    monkeypatch.setattr(Path, "read_bytes", refuse(Path.read_bytes))
    uses = [lambda: llava_fa.compress(folder, tmp_path / "out", CONFIG)]
    if not name.startswith("tokenizer"):
        uses += [lambda: inspect_model(folder), lambda: load(folder)]
    for use in uses:
        with pytest.raises(FourierError, match=rf"{name}: it cannot be read \(Permission denied\)"):
            use()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("fp8", "fp8"),
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "unknown method"),
        (["fp8"], "fp8"),
        (True, "True"),
    ],
)
@pytest.mark.parametrize("inside", [None, "text_config"])
def test_however_a_model_says_that_it_is_quantised(folder, tmp_path, value, said, inside):
    config = json.loads((folder / "config.json").read_text())
    changed = {"quantization_config": value}
    configure(folder, **({inside: {**config[inside], **changed}} if inside else changed))
    with pytest.raises(FourierError, match=rf"already quantised \(.*{said}.*\)\. Give the original float checkpoint"):
        llava_fa.compress(folder, tmp_path / "out", CONFIG)
    for use in (inspect_model, load):
        with pytest.raises(FourierError, match="already quantised"):
            use(folder)


def test_a_configuration_that_is_wrong_is_not_the_processors_fault(folder):
    configure(folder, dtype="float99")
    with pytest.raises(FourierError, match=r"cannot read config\.json"):
        load(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders there")
def test_a_pipe_in_the_place_of_a_file_does_not_block(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(FourierError, match="there are no weights"):
        inspect_model(folder)
