"""LLaVA's first format and InternLM-2: compressed as if transformers' scripts had converted them before."""

import dataclasses
import json

import helpers
import original_folders as old
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.cli.main import app
from llava_fa.hub.flops import count_flops, read_model_config
from llava_fa.hub.inspect import inspect_model, spending
from llava_fa.hub.loading import load
from llava_fa.hub.original_processor import chat_template
from llava_fa.hub.request import CompressionRequest

CONFIG = FourierConfig(bits=4, refine_passes=0)

LLAVAS = {
    "llama": {},
    "llama, inside": {"inside": True},
    "mistral, next": {"language": "mistral", "kind": "LlavaNext"},
    "mistral, next, inside": {"language": "mistral", "kind": "LlavaNext", "inside": True},
    "qwen, onevision": {"language": "qwen2", "kind": "LlavaOnevision", "siglip": True},
    "qwen, onevision, tied, inside": {
        "language": "qwen2",
        "kind": "LlavaOnevision",
        "siglip": True,
        "tied": True,
        "inside": True,
    },
    "qwen, one picture": {"language": "qwen2", "siglip": True},
    "internlm2": {"language": "internlm2"},
    "internlm2 under the name of llama": {"names": "internlm2"},
}


@pytest.fixture(params=LLAVAS)
def written(request, tmp_path):
    return old.save_llava(tmp_path, **LLAVAS[request.param])


def same(one, other, ignore=()):
    """Whether two folders hold the same tensors, to the last bit."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name
    return set(a)


def test_a_llava_is_compressed_as_its_conversion_is(written, tmp_path):
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG)
    llava_fa.compress(written.converted, tmp_path / "expected", CONFIG)
    same(tmp_path / "out", tmp_path / "expected")
    assert not list(tmp_path.glob("out.*"))


def test_what_stays_is_the_original_to_the_last_bit(written, tmp_path):
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG.replace(only=("lm_head", "*.layers.0.mlp.up_proj")))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = written.model.state_dict()
    kept = model.keys() & stored.keys()
    assert all(torch.equal(stored[name], model[name]) for name in kept)
    assert len(kept) >= len(model) - 3


def test_the_result_answers_as_the_converted_model(written, tmp_path):
    """Its processor, tokens and chat template are the new folder's own."""
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG.replace(only=("*.layers.1.mlp.down_proj",)))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    inputs = old.question(tmp_path / "out", model)
    assert (inputs["input_ids"] == old.ROWS).sum() >= 16
    dense = written.model
    dense.get_submodule("model.language_model.layers.1.mlp.down_proj").weight.data = (
        model.get_submodule("model.language_model.layers.1.mlp.down_proj").dequantize().to(torch.bfloat16)
    )
    with torch.no_grad():
        got, wanted = model(**inputs).logits.float(), dense(**inputs).logits.float()
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert answer[:, inputs["input_ids"].shape[1] :].max() < old.ROWS, "a token that was added"


@pytest.mark.parametrize("name", ["llama", "mistral, next", "qwen, one picture", "internlm2"])
def test_calibrated_as_its_conversion_is(name, tmp_path, samples):
    written = old.save_llava(tmp_path, **LLAVAS[name])
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG, samples)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    processor.save_pretrained(written.converted)
    llava_fa.compress(written.converted, tmp_path / "expected", CONFIG, samples)
    same(tmp_path / "out", tmp_path / "expected")


def test_embeddings_and_a_budget(tmp_path):
    written = old.save_llava(tmp_path, "internlm2")
    for folder, out in ((written.folder, "out"), (written.converted, "expected")):
        llava_fa.compress(folder, tmp_path / out, CONFIG, budget=llava_fa.Budget(bits=2.75), embeddings=3)
    assert "model.language_model.embed_tokens.codes" in same(tmp_path / "out", tmp_path / "expected")


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    written = old.save_llava(tmp_path)
    seen = []

    def stop(progress):
        seen.append(progress.done)
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(written.folder, tmp_path / "out", CONFIG, progress=stop)
    seen.clear()
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG, progress=lambda progress: seen.append(progress.resumed))
    assert seen[-1] == 5
    llava_fa.compress(written.converted, tmp_path / "expected", CONFIG)
    same(tmp_path / "out", tmp_path / "expected")


def test_every_stored_tensor_is_accounted_for_once(written, tmp_path):
    report = llava_fa.compress(written.folder, tmp_path / "out", CONFIG)
    ledger = report.source_ledger
    files = [written.folder / "model.safetensors"]
    inside = any("vision_tower" in name for name in load_file(files[0]))
    if not inside:
        files.append(written.tower / "model.safetensors")
    assert ledger.nbytes == sum(file.stat().st_size for file in files)
    names = [name for file in files for name in load_file(file)]
    assert sorted(account.name for account in ledger.tensors) == sorted(names)
    fates = {account.name: (account.fate, account.why) for account in ledger.tensors}
    assert fates["model.layers.0.self_attn.rotary_emb.inv_freq"][0] == "dropped"
    if not inside:
        assert {account.file for account in ledger.tensors} == {"in/model.safetensors", "tower/model.safetensors"}
        assert fates["text_model.final_layer_norm.weight"][0] == "dropped"
    packed = [name for name, (fate, _) in fates.items() if fate == "packed"]
    assert any("mm_projector" in name for name in packed)
    assert any("vision_model" in name for name in packed)


def test_an_original_is_inspected(written):
    report = inspect_model(written.folder)
    assert report.path == str(written.folder)
    assert {"model.multi_modal_projector.linear_1", "model.vision_tower.encoder.layers.0.mlp.fc1"} <= {
        layer.name for layer in report.layers
    }
    assert "dropped" in {account.fate for account in report.ledger.tensors}
    left_out = sum(account.bytes for account in report.ledger.tensors if account.fate == "dropped")
    assert sum(spending(written.folder).values()) == report.compressed_bytes
    assert report.compressed_bytes == sum(account.bytes for account in report.ledger.tensors) - left_out


@pytest.mark.parametrize("name", ["llama", "mistral, next, inside", "qwen, one picture", "internlm2"])
def test_an_original_is_loaded(name, tmp_path):
    written = old.save_llava(tmp_path, **LLAVAS[name])
    model, processor = load(written.folder, device="cpu", dtype=torch.bfloat16)
    expected = written.model
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())
    processor.save_pretrained(tmp_path / "processor")
    expected_inputs = old.question(tmp_path / "processor", expected)
    with torch.no_grad():
        assert torch.equal(model(**expected_inputs).logits, expected(**expected_inputs).logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_internlm2_alone(bias, calibrated, tmp_path):
    written = old.save_internlm(tmp_path, bias=bias)
    samples = [[{"role": "user", "content": [{"type": "text", "text": f"what is {i}?"}]}] for i in range(3)]
    data = [[*one, {"role": "assistant", "content": [{"type": "text", "text": "a number"}]}] for one in samples]
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG, data if calibrated else None)
    for file in (tmp_path / "out").glob("tokenizer*"):
        (written.converted / file.name).write_bytes(file.read_bytes())
    llava_fa.compress(written.converted, tmp_path / "expected", CONFIG, data if calibrated else None)
    same(tmp_path / "out", tmp_path / "expected")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("what?").input_ids == old.tokenizer()("what?").input_ids
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu"])
def test_a_projector_of_one_matrix(kind, tmp_path):
    """What is not stored is the identity, and stays dense."""
    written = old.save_llava(tmp_path)
    state = load_file(written.folder / "model.safetensors")
    for part in ("weight", "bias"):
        del state[f"model.mm_projector.2.{part}"]
        if kind == "linear":
            state[f"model.mm_projector.{part}"] = state.pop(f"model.mm_projector.0.{part}")
    save_file(state, written.folder / "model.safetensors", {"format": "pt"})
    written.change(mm_projector_type=kind)
    report = llava_fa.compress(written.folder, tmp_path / "out", CONFIG)
    skipped = {one.name: one.reason for one in report.not_compressed}
    assert skipped["model.multi_modal_projector.linear_2"].startswith("nothing of it is stored")
    model, _ = load(written.folder, device="cpu", dtype=torch.bfloat16)
    projector, first = model.model.multi_modal_projector, written.model.model.multi_modal_projector.linear_1
    patches = torch.randn(5, 32).bfloat16()
    assert torch.equal(projector(patches), first(patches))
    packed, _ = load(tmp_path / "out", device="cpu", dtype=torch.float32)
    again = packed.model.multi_modal_projector
    assert torch.equal(again(patches.float()), again.linear_1(patches.float()))


def test_the_tower_is_given(tmp_path):
    written = old.save_llava(tmp_path)
    written.change(mm_vision_tower="openai/clip-vit-large-patch14-336")
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG, vision_tower=written.tower)
    llava_fa.compress(written.converted, tmp_path / "expected", CONFIG)
    same(tmp_path / "out", tmp_path / "expected")


@pytest.fixture
def llava(tmp_path):
    return old.save_llava(tmp_path)


def refused(folder, out, match, **options):
    with pytest.raises(FourierError, match=match) as caught:
        llava_fa.compress(folder, out, CONFIG, **options)
    assert not list(out.parent.glob("out*"))
    assert "llava-fa-" not in str(caught.value), "a folder that is gone is named"
    return caught.value


def test_a_tower_that_is_not_there(llava, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for named in ("openai/none-such", "/nowhere/clip"):
        llava.change(mm_vision_tower=named)
        error = refused(llava.folder, tmp_path / "out", "mm_vision_tower")
        assert named in error.what
        assert "--vision-tower" in error.remedy
    llava.change(mm_vision_tower=None)
    refused(llava.folder, tmp_path / "out", "names no vision tower")


def test_a_tower_of_another_size(llava, tmp_path):
    values = json.loads((llava.tower / "config.json").read_text())
    values["vision_config"]["hidden_size"] = 64
    (llava.tower / "config.json").write_text(json.dumps(values))
    refused(llava.folder, tmp_path / "out", "gives 64 numbers a patch, and mm_hidden_size of config.json is 32")
    llava.change(mm_hidden_size=None)
    refused(llava.folder, tmp_path / "out", "gives 64 numbers a patch, and the projector's input is 32")


def test_a_tower_that_is_none(llava, tmp_path):
    refused(llava.folder, tmp_path / "out", "the vision tower is a 'llava'", vision_tower=llava.folder)
    refused(llava.folder, tmp_path / "out", "the vision tower is a 'llava'", vision_tower=llava.converted)
    refused(llava.converted, tmp_path / "out", "has its own, or none", vision_tower=llava.tower)
    (llava.tower / "model.safetensors").unlink()
    refused(llava.folder, tmp_path / "out", "tower: there are no weights")
    (llava.tower / "pytorch_model.bin").write_bytes(b"")
    refused(llava.folder, tmp_path / "out", "only pickled weights")


def test_a_tower_without_an_image_processor(llava, tmp_path):
    (llava.tower / "preprocessor_config.json").rename(tmp_path / "kept.json")
    refused(llava.folder, tmp_path / "out", "no preprocessor_config.json")
    (tmp_path / "kept.json").rename(llava.folder / "preprocessor_config.json")
    llava_fa.compress(llava.folder, tmp_path / "out", CONFIG)


def test_a_layer_of_the_tower_is_missing(llava, tmp_path):
    state = load_file(llava.tower / "model.safetensors")
    del state["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(state, llava.tower / "model.safetensors")
    refused(llava.folder, tmp_path / "out", r"1 of \d+ tensors .*vision_tower.encoder.layers.1.mlp.fc1.weight")


@pytest.mark.parametrize("kind", ["mlp3x_gelu", "resampler", "identity", 7])
def test_projectors_that_transformers_does_not_have(kind, llava, tmp_path):
    llava.change(mm_projector_type=kind)
    refused(llava.folder, tmp_path / "out", "no projector of the type")


def test_a_projector_that_is_not_in_the_weights(llava, tmp_path):
    llava.change(mm_projector_type="linear")
    refused(llava.folder, tmp_path / "out", r"no model.mm_projector.\* in the weights")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"image_aspect_ratio": "anyres"}, "spatial_unpad, and the weights have no|merges them by 'flat'"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, "have no model.image_newline"),
        ({"image_aspect_ratio": "highres", "mm_patch_merge_type": "spatial_unpad"}, "cuts pictures up by 'highres'"),
        ({"vocab_size": 100}, r"\[260, 48\], and vocab_size of config.json is 100"),
        ({"num_attention_heads": 0}, "."),
        ({"hidden_size": "wide"}, "config.json makes no LlamaConfig"),
        ({"num_hidden_layers": 3}, "tensors of LlavaForConditionalGeneration are not in the weight files"),
        ({"num_key_value_heads": 4}, "config.json makes it"),
    ],
)
def test_a_config_that_does_not_fit(values, match, llava, tmp_path):
    llava.change(**values)
    refused(llava.folder, tmp_path / "out", match)


@pytest.mark.parametrize("pinpoints", [None, [], [[56]], "(1y1)", "no list", [[7, 7]], 5])
def test_sizes_that_are_none(pinpoints, tmp_path):
    written = old.save_llava(tmp_path, kind="LlavaNext")
    written.change(image_grid_pinpoints=pinpoints)
    refused(written.folder, tmp_path / "out", "image_grid_pinpoints")


@pytest.mark.parametrize(
    ("pinpoints", "grid"),
    [
        ("[(56, 28), (28, 84)]", [[28, 56], [84, 28]]),
        ("(1x1),...,(2x2)", [[28, 28], [56, 28], [28, 56], [56, 56]]),
    ],
)
def test_sizes_as_text(pinpoints, grid, tmp_path):
    written = old.save_llava(tmp_path, kind="LlavaNext")
    written.change(image_grid_pinpoints=pinpoints)
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert config.image_grid_pinpoints == grid
    assert processor.image_processor.image_grid_pinpoints == grid


def test_heads_that_do_not_fit(tmp_path):
    written = old.save_internlm(tmp_path)
    written.change(num_key_value_heads=4)
    refused(written.folder, tmp_path / "out", "wqkv.weight: it has 96 rows, and the heads of config.json make 144")


def test_a_tokenizer_of_another_vocabulary(llava, tmp_path):
    larger = old.tokenizer()
    larger.add_tokens([f"more{i}" for i in range(3)])
    larger.save_pretrained(llava.folder)
    refused(llava.folder, tmp_path / "out", "its tokenizer has 263 tokens, and the word embedding 260 rows")
    for file in llava.folder.glob("tokenizer*"):
        file.unlink()
    refused(llava.folder, tmp_path / "out", "its tokenizer cannot be loaded")


def test_a_tokenizer_that_has_the_tokens_is_not_given_more(tmp_path):
    """Nor does the vocabulary grow where rows are free."""
    written = old.save_llava(tmp_path, rows=old.ROWS)
    tokens = old.tokenizer(
        ("<unk>", "<s>", "</s>", "<image>"), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<s>"
    )
    assert len(tokens) == old.ROWS
    tokens.save_pretrained(written.folder)
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["image_token_index"] == 3
    assert stored["text_config"]["vocab_size"] == old.ROWS
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == old.ROWS


def test_pickled_weights_are_refused_with_what_to_do(llava, tmp_path):
    torch.save(load_file(llava.folder / "model.safetensors"), tmp_path / "saved.bin")
    (llava.folder / "model.safetensors").rename(llava.folder / "pytorch_model.bin")
    error = refused(llava.folder, tmp_path / "out", "only pickled weights")
    assert "where transformers does not read the folder, each file by `save_file(" in error.remedy
    save_file(torch.load(tmp_path / "saved.bin", weights_only=True), llava.folder / "model.safetensors")
    llava_fa.compress(llava.folder, tmp_path / "out", CONFIG)


def test_an_adapter_beside_it_is_refused(llava, tmp_path):
    (llava.folder / "adapter_config.json").write_text("{}")
    refused(llava.folder, tmp_path / "out", "an adapter lies beside weights in a format that peft does not read")


@pytest.mark.parametrize(
    ("language", "prompt"),
    [
        (
            "llama",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nwhat? ASSISTANT: a cat</s>"
            "USER: sure? ASSISTANT:",
        ),
        ("mistral", "[INST] <image>\nwhat? [/INST] a cat </s>[INST] sure? [/INST]"),
        (
            "qwen2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
            "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_conversations_are_written_as_in_training(language, prompt, tmp_path):
    written = old.save_llava(tmp_path, language)
    llava_fa.compress(written.folder, tmp_path / "out", CONFIG)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": "sure?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt


def test_the_tokenizer_tells_how_conversations_were_written():
    llama3 = old.tokenizer(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}]
    for language, tokenizer, prompt in (
        (
            "llama",
            llama3,
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nwhat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "internlm2",
            old.chatml(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("internlm2", old.tokenizer(), "Be brief. USER: what? ASSISTANT:"),
        ("mistral", old.tokenizer(), "[INST] Be brief.\nwhat? [/INST]"),
    ):
        template = chat_template(tokenizer, language)
        said = tokenizer.apply_chat_template(ask, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert said == prompt
    template = chat_template(llama3, "llama", marked=True)
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    said = llama3.apply_chat_template(shown, chat_template=template, tokenize=False)
    assert "user<|end_header_id|>\n\n<im_start><image><im_end>\nwhat?<|eot_id|>" in said
    assert said.startswith(
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    )


def test_pictures_are_padded_where_they_were_in_training(llava, tmp_path):
    wide = helpers.picture(0, 40).resize((80, 40))
    for aspect in ("pad", "square"):
        llava.change(image_aspect_ratio=aspect)
        llava_fa.compress(llava.folder, tmp_path / aspect, CONFIG)
        images = transformers.AutoProcessor.from_pretrained(tmp_path / aspect).image_processor
        pixels = images(wide, return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == (3, 28, 28)
        assert (pixels[:, 0].abs().max() < 0.05) == (aspect == "pad"), "a border of the mean colour"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"image_size": [28, 28]}, "as sides of pictures and patches"),
        ({"patch_size": 0}, "as sides of pictures and patches"),
        ({"hidden_size": "x"}, "makes no CLIPVisionConfig"),
    ],
)
def test_a_tower_with_a_config_that_cannot_be(values, match, llava, tmp_path):
    stored = json.loads((llava.tower / "config.json").read_text())
    stored["vision_config"] |= values
    (llava.tower / "config.json").write_text(json.dumps(stored))
    refused(llava.folder, tmp_path / "out", match)


def test_features_of_a_layer_that_the_tower_does_not_have(llava, tmp_path):
    for layer in (-5, "last"):
        llava.change(mm_vision_select_layer=layer)
        refused(llava.folder, tmp_path / "out", "mm_vision_select_layer")


def test_fewer_visual_tokens(llava, tmp_path):
    llava_fa.compress(llava.folder, tmp_path / "out", CONFIG, visual_tokens=4)
    model, processor = load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    inputs = processor(images=helpers.picture(), text="<image>\nwhat?", return_tensors="pt")
    assert (inputs["input_ids"] == old.ROWS).sum() == 4
    assert model.generate(**inputs.to(torch.bfloat16), max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_it_teaches_what_is_trained_back(llava, tmp_path, samples):
    request = CompressionRequest(model=llava.folder, config=CONFIG, calibration=samples)
    report = llava_fa.compress_and_recover(request, tmp_path / "out", steps=1)
    assert report.training is not None
    given = dataclasses.replace(request, vision_tower=llava.tower)
    with pytest.raises(FourierError, match="its vision tower is looked for where"):
        llava_fa.compress_and_recover(given, tmp_path / "other", steps=1)


def test_its_operations_are_counted(llava):
    counted, expected = (count_flops(read_model_config(folder), text=10) for folder in (llava.folder, llava.converted))
    assert counted == expected


def test_from_the_command_line(llava, tmp_path):
    llava.change(mm_vision_tower="gone/elsewhere")
    arguments = ["compress", str(llava.folder), str(tmp_path / "out"), "--bits", "4"]
    given = CliRunner().invoke(app, [*arguments, "--vision-tower", str(llava.tower)])
    assert given.exit_code == 0, given.output
    llava_fa.compress(llava.converted, tmp_path / "expected", FourierConfig(bits=4))
    same(tmp_path / "out", tmp_path / "expected")


def test_its_tokenizer_is_read_as_the_language_models(llava, tmp_path, monkeypatch):
    """Beside a LLaVA's config.json transformers reads a tokenizer.model by other rules, and splits words otherwise."""
    read, seen = transformers.AutoTokenizer.from_pretrained, []

    def look(folder, **options):
        seen.append(json.loads((folder / "config.json").read_text())["model_type"])
        return read(folder, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", look)
    llava_fa.compress(llava.folder, tmp_path / "out", CONFIG)
    assert seen == ["llama"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
