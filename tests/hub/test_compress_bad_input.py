"""Every bad input has an error of its own: where, what, and what to do; and leaves nothing behind."""

import json
import shutil

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.hub import source as sources
from llava_fa.hub.loading import load
from llava_fa.hub.processor import load_processor

VICTIM = "language_model.model.layers.1.mlp.up_proj.weight"  # as saved; the module is model.language_model.layers…
NAME = "model.language_model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the checkpoint to spoil, all weights in one file."""
    target = tmp_path / "in"
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors.update(load_file(path))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fails(folder, tmp_path, message, config=None, **more):
    with pytest.raises(FourierError, match=message):
        llava_fa.compress(folder, tmp_path / "out", config or FourierConfig(bits=2, refine_passes=0), **more)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path):
    fails(tmp_path / "nothing", tmp_path, r"nothing: no such folder\. Give `tiny`, a model folder, or a hub id")
    fails("./nothing", tmp_path, "no such folder")


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    fails(tmp_path / "model.safetensors", tmp_path, "this is a file. Give the folder")


def test_a_hub_id_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fails(
        "someone/some-llava",
        tmp_path,
        r"someone/some-llava: .*hub could not be reached.*or give a local folder",
    )


def test_the_embedded_model_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.llava_fa, "__file__", str(tmp_path / "__init__.py"))
    fails("tiny", tmp_path, "the embedded model is not in this installation.*llava-fa world train")


def test_a_folder_without_config(tmp_path):
    (tmp_path / "in").mkdir()
    fails(tmp_path / "in", tmp_path, r"there is no config\.json: this is not a model folder")


def test_a_damaged_config(folder, tmp_path):
    (folder / "config.json").write_text('{"architectures": [')
    fails(folder, tmp_path, r"config\.json: it is not JSON")
    (folder / "config.json").write_text("[]")
    fails(folder, tmp_path, "it is not a JSON object")


def test_a_model_that_writes_no_text(tmp_path):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "in")
    fails(tmp_path / "in", tmp_path, "Qwen2ForSequenceClassification is not a model that writes text. Give a vision")


def test_a_model_type_that_transformers_does_not_know(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava_qwen"}))
    fails(folder, tmp_path, r"transformers [\d.]+ cannot read config.json .*llava_qwen.*llava-hf")


def test_the_code_of_a_checkpoint_is_never_offered(folder, tmp_path, monkeypatch):
    """Not even asked for: who types y would run it."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(_) or "n")
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoProcessor": "code.Processor"}}
    (folder / "code.py").write_text("raise RuntimeError('it ran')")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "of_its_own", **code}))
    fails(folder, tmp_path, r"transformers [\d.]+ cannot read config.json .*contains custom code")
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**processor, "processor_class": "Its", **code}))
    with pytest.raises(FourierError, match=r"its processor cannot be loaded .*contains custom code"):
        load_processor(folder)
    assert not asked


def test_a_config_transformers_cannot_use(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, tmp_path, r"transformers [\d.]+ cannot read config.json .*hidden_size")


def test_only_pickled_weights(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(
        folder,
        tmp_path,
        r"only pickled weights \(pytorch_model\.bin\).*convert to safetensors once: .*save_pretr",
    )


def test_no_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    fails(folder, tmp_path, "there are no weights: neither model.safetensors nor")


def test_an_adapter(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    fails(folder, tmp_path, "this is a LoRA adapter, not a model. Merge it first")


def test_a_shard_missing(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "in")
    (tmp_path / "in" / "model-00002-of-00006.safetensors").unlink()
    fails(tmp_path / "in", tmp_path, "the index names model-00002-of-00006.safetensors, which is not there")


def test_a_damaged_index(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "in")
    (tmp_path / "in" / "model.safetensors.index.json").write_text("{}")
    fails(tmp_path / "in", tmp_path, "it is not a checkpoint index")


@pytest.mark.parametrize("keep", [-100, -1, 3000, 5, 0])
def test_a_checkpoint_cut_short(folder, tmp_path, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    fails(folder, tmp_path, r"model\.safetensors: the file is cut short: .*Copy or download it again")


def test_weights_that_are_no_safetensors(folder, tmp_path):
    (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{not json at all....}" * 9)
    fails(folder, tmp_path, "its header is not that of a safetensors file")


def test_weights_of_another_model(folder, tmp_path):
    save_file({"something.else": torch.zeros(3)}, folder / "model.safetensors")
    fails(folder, tmp_path, "only 0 of 70 tensors of LlavaForConditionalGeneration are in the weight files")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_data", [False, True])
def test_nan_and_inf_name_the_layer(folder, tmp_path, samples, value, with_data):
    # down_proj of the last layer, so that with data the activations of all other layers stay finite
    key = VICTIM.replace("up_proj", "down_proj")
    spoil(folder, lambda tensors: tensors[key][3].fill_(value))
    only = FourierConfig(bits=2, refine_passes=0, only=(key.removesuffix(".weight"),))
    name = NAME.replace("up_proj", "down_proj")
    fails(folder, tmp_path, rf"{name}: the weight has 96 NaN or infinite values", only,
          calibration=samples if with_data else None)  # fmt: skip


def test_a_zero_matrix_stays_zero(folder, tmp_path):
    spoil(folder, lambda tensors: tensors[VICTIM].zero_())
    report = llava_fa.compress(folder, tmp_path / "out", FourierConfig(bits=2, refine_passes=0))
    assert next(layer.weight_error for layer in report.layers if layer.name == NAME) == 0
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not model.get_submodule(NAME).dequantize().any()


def test_a_rank_too_large_names_the_layer(folder, tmp_path):
    config = FourierConfig(bits=2, rank=25)
    message = r"layers\.0\.self_attn\.k_proj: rank 25 is larger than min\(24, 48\).*at most 24, or skip"
    fails(folder, tmp_path, message, config)
    assert not (tmp_path / "out.partial").exists()  # said before any work


def test_a_weight_of_another_shape(folder, tmp_path):
    spoil(folder, lambda tensors: tensors.update({VICTIM: torch.zeros(90, 48, dtype=torch.bfloat16)}))
    fails(folder, tmp_path, rf"{NAME}\.weight: what is stored is \[90, 48\], and config\.json makes it \[96, 48\]")


def test_a_weight_of_integers(folder, tmp_path):
    spoil(folder, lambda tensors: tensors.update({VICTIM: torch.zeros(96, 48, dtype=torch.int8)}))
    fails(folder, tmp_path, rf"{NAME}\.weight: what is stored is I8.*Give a float16, bfloat16 or float32")
    with pytest.raises(FourierError, match="what is stored is I8"):  # and not taken for weights
        load(folder)


@pytest.mark.parametrize(
    "lost",
    [
        VICTIM,
        "multi_modal_projector.linear_1.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm",
    ],
)
def test_a_missing_tensor_is_an_error(folder, tmp_path, lost):
    def lose(tensors):
        for key in [key for key in tensors if key.startswith(lost)]:
            del tensors[key]

    spoil(folder, lose)
    fails(folder, tmp_path, r"1 of 70 tensors of Llava.* are not in the weight files: model\..*Copy or download it")


def test_an_already_compressed_model(compressed, tmp_path):
    fails(compressed[0], tmp_path, "this model is already compressed by llava-fa. Give the original")


def test_a_model_quantised_by_others(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, tmp_path, r"already quantised \(awq\). Give the original float checkpoint")


def test_feedback_without_data_and_data_without_use(folder, tmp_path, samples):
    fails(folder, tmp_path, "'feedback' needs samples", FourierConfig(calibration="feedback"))
    fails(folder, tmp_path, "calibration is 'none'", FourierConfig(calibration="none"), calibration=samples)


def test_no_samples_and_no_processor(folder, tmp_path):
    fails(folder, tmp_path, "there are no calibration samples", calibration=[])
    (folder / "processor_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    fails(folder, tmp_path, "its processor cannot be loaded", calibration=[(helpers.picture(), "q", "a")])


def test_a_sample_that_cannot_be_read(folder, tmp_path):
    good = (helpers.picture(), "q", "a")
    (tmp_path / "bad.png").write_bytes(b"this is no picture")
    fails(
        folder,
        tmp_path,
        r"calibration sample 1: image .*bad\.png cannot be read",
        calibration=[good, (tmp_path / "bad.png", "q", "a")],
    )
    fails(
        folder,
        tmp_path,
        r"calibration sample 1: image .*none\.png does not exist",
        calibration=[good, (tmp_path / "none.png", "q", "a")],
    )
    fails(folder, tmp_path, r"calibration sample 0: it is str, not", calibration=["a text"])


def test_a_sample_the_model_refuses(folder, tmp_path):
    words = [{"role": "user", "content": "one <image> mark and no picture"}]
    fails(folder, tmp_path, r"calibration sample 0: the model.*(fails on|refuses) it", calibration=[words])


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", r"there is no cuda:99 here \(\d+ GPUs seen\)"), ("gpu", "'gpu' is not a device")],
)
def test_an_unknown_device(folder, tmp_path, samples, device, message):
    fails(folder, tmp_path, message, calibration=samples, device=device)


def test_a_model_in_memory(tmp_path):
    fails(torch.nn.Linear(2, 2), tmp_path, "the model is a Linear. Give a folder")


def test_a_device_out_of_memory(folder, tmp_path, samples, monkeypatch):
    """Said with the way out, whether the whole model or one block was running, or its answers were read."""
    from llava_fa.hub import blocks, course, proofread

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for owner, name in ((blocks.Call, "run"), (course, "first_of"), (proofread, "proofread")):
        with monkeypatch.context() as context:
            context.setattr(owner, name, fail)
            fails(
                folder,
                tmp_path,
                "cpu: the device ran out of memory.*--device cpu goes on",
                calibration=samples,
            )
