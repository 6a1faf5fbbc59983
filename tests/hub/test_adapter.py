"""An adapter beside the weights of a model: merged when it is compressed or asked, and never left out."""

import shutil
import sys
import warnings

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.cli.main import app
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.loading import load

CONFIG = FourierConfig(bits=4, refine_passes=0)


@pytest.fixture
def folders(tmp_path):
    """A model with a LoRA beside its weights; the same model merged by peft."""
    peft = pytest.importorskip("peft")
    model = helpers.random_llava()
    target = helpers.save_llava(tmp_path / "in", model=model)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of names that transformers has given up
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "adapter")
        helpers.save_llava(tmp_path / "merged", model=adapted.merge_and_unload())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "adapter" / name, target / name)
    return target, tmp_path / "merged"


def tensors(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_it_is_merged_before_the_model_is_compressed(folders, tmp_path):
    stages = []
    llava_fa.compress(folders[0], tmp_path / "out", CONFIG, progress=lambda now: stages.append(now.stage))
    llava_fa.compress(folders[1], tmp_path / "expected", CONFIG)
    ours, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert stages[0] == "merging the adapter"
    assert not list(tmp_path.glob("out.*"))
    assert not list((tmp_path / "out").glob("*adapter*"))
    assert not (tmp_path / "out" / "merged.json").exists()


def test_a_killed_run_goes_on_with_what_was_merged(folders, tmp_path):
    def stop(now):
        if now.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(folders[0], tmp_path / "out", CONFIG, progress=stop)
    assert (tmp_path / "out.merged" / "model.safetensors").exists()
    resumed = []
    llava_fa.compress(folders[0], tmp_path / "out", CONFIG, progress=lambda now: resumed.append(now.resumed))
    assert resumed[-1] == 3
    llava_fa.compress(folders[1], tmp_path / "expected", CONFIG)
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[-100_000:] == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()[-100_000:]


def test_a_folder_of_the_users_is_in_the_way_and_stays(folders, tmp_path):
    (tmp_path / "out.merged").mkdir()
    (tmp_path / "out.merged" / "mine.txt").write_text("precious")
    with pytest.raises(FourierError, match="in the way of merging"):
        llava_fa.compress(folders[0], tmp_path / "out", CONFIG)
    llava_fa.compress(folders[1], tmp_path / "out", CONFIG)  # nothing to be merged
    assert (tmp_path / "out.merged" / "mine.txt").read_text() == "precious"


def test_it_takes_part_in_the_answers(folders):
    (ours, processor), (expected, _) = (load(folder, "cpu", torch.float32) for folder in folders)
    inputs = helpers.inputs_for(processor)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, expected(**inputs).logits)


def test_what_no_module_has_is_kept_when_it_is_merged(folders, tmp_path):
    path = folders[0] / "model.safetensors"
    save_file({**load_file(path), "mtp.weight": torch.ones(32, 48)}, path, metadata={"format": "pt"})
    report = llava_fa.compress(folders[0], tmp_path / "out", CONFIG)
    assert torch.equal(tensors(tmp_path / "out")["mtp.weight"], torch.ones(32, 48))
    lines = [account.fate for account in report.source_ledger.tensors if account.name == "mtp.weight"]
    assert lines == ["kept"]


def test_beside_packed_weights_it_stays_in_the_models_own_layers(folders, tmp_path):
    """So that everything that looks into a model of this class still can."""
    from peft import PeftModel

    target = tmp_path / "packed"
    llava_fa.compress(folders[1], target, CONFIG)
    plain, processor = load(target, "cpu", torch.float32)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folders[0] / name, target / name)
    model = load(target, "cpu", torch.float32)[0]
    assert type(model) is type(plain)
    inputs = helpers.inputs_for(processor)
    with torch.no_grad():
        without = plain(**inputs).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = PeftModel.from_pretrained(plain, target).eval()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert not torch.allclose(expected, without)


def test_a_prompt_beside_packed_weights_is_refused(folders, tmp_path):
    import peft

    llava_fa.compress(folders[1], tmp_path / "packed", CONFIG)
    model, _ = load(tmp_path / "packed", "cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=48, num_layers=2, num_attention_heads=4
        )
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "packed")
    with pytest.raises(FourierError, match="cannot be kept beside packed weights"):
        load(tmp_path / "packed", "cpu", torch.float32)


def test_inspect_tells_of_it(folders, tmp_path):
    llava_fa.compress(folders[1], tmp_path / "packed", CONFIG)
    shutil.copyfile(folders[0] / "adapter_model.safetensors", tmp_path / "packed" / "adapter_model.safetensors")
    for folder in (folders[0], tmp_path / "packed"):
        assert list(inspect_model(folder).ledger.unread) == ["adapter_model.safetensors"]
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
    assert "beside the weights: adapter_model.safetensors" in shown
    assert "(an adapter: it takes part in answers)" in shown


def test_without_peft_it_is_refused(tmp_path, monkeypatch):
    folder = helpers.save_llava(tmp_path / "in")
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    for use in (lambda: llava_fa.compress(folder, tmp_path / "out", CONFIG), lambda: load(folder)):
        with pytest.raises(
            FourierError, match=r"adapter lies beside the weights, and the package peft.*`pip install p"
        ):
            use()
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_of_the_folder_itself(folders, tmp_path):
    path = folders[0] / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if "linear_1.weight" not in key}
    save_file(kept, path, metadata={"format": "pt"})
    for use in (lambda: llava_fa.compress(folders[0], tmp_path / "out", CONFIG), lambda: load(folders[0])):
        with pytest.raises(FourierError, match="1 of 70 tensors") as missing:
            use()
        assert missing.value.where == str(folders[0])


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FourierError, match="this is a LoRA adapter, not a model"):
        llava_fa.compress(tmp_path, tmp_path / "out", CONFIG)
