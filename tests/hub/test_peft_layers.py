"""peft on compressed models: adapters go in, are trained, saved and loaded back, or are refused whole."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from transformers import AutoModel, LlavaForConditionalGeneration

import llava_fa
from llava_fa import Casp, FourierConfig, FourierError
from llava_fa.nn.factored_linear import FactoredLinear, packed_layers
from llava_fa.nn.fourier_embedding import FourierEmbedding

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "best": {"config": FourierConfig(bits=2, rank=2, refine_passes=0, iterations=1)},
    "trellis": {"config": FourierConfig(bits=2, codes="trellis")},
    "paper": {"config": FourierConfig(method="paper", bits=2.5)},
    "factored": {"config": FourierConfig(bits=2, refine_passes=0), "casp": Casp(keep=0.5)},
    "embeddings": {"config": FourierConfig(bits=2, refine_passes=0), "embeddings": 2},
    "tied": {"config": FourierConfig(bits=2, refine_passes=0), "embeddings": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Kind → folder of a compressed model."""
    made = {}

    def make(kind="best"):
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            model = helpers.random_llava(tied=kind == "tied")
            llava_fa.compress(helpers.save_llava(place / "plain", model=model), place / "packed", **KINDS[kind])
            made[kind] = place / "packed"
        return made[kind]

    return make


@pytest.fixture(scope="module")
def inputs():
    return dict(helpers.inputs_for(helpers.processor()))


def load(place):
    return LlavaForConditionalGeneration.from_pretrained(place)


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def fit(model, inputs, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(model, adapter="default"):
    """Names of the modules that carry an adapter, as they were before."""
    carriers = {name for name, module in model.named_modules() if adapter in getattr(module, "lora_A", {})}
    return {name.removeprefix("base_model.model.") for name in carriers}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_back(folder, inputs, tmp_path, kind):
    model = peft.get_peft_model(load(folder(kind)), lora(target_modules="all-linear"))
    before = logits(model, inputs)
    assert torch.equal(before, logits(load(folder(kind)), inputs))  # it begins with nothing
    losses = fit(model, inputs)
    assert losses[-1] < losses[0]
    after = logits(model, inputs)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder(kind)), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, inputs), after)
    assert fit(again, inputs) == fit(model, inputs)  # and goes on as if nothing had been between
    with again.disable_adapter():
        assert torch.equal(logits(again, inputs), before)
    assert torch.equal(logits(again.unload(), inputs), before)


def test_by_transformers_own_functions(folder, inputs, tmp_path):
    model = load(folder())
    model.add_adapter(lora())
    fit(model, inputs)
    after = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = load(folder())
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again, inputs), after)
    assert torch.equal(logits(load(tmp_path), inputs), after)  # the folder names its base


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_every_packed_layer_but_embeddings(folder, kind):
    model = load(folder(kind))
    layers = dict(packed_layers(model))
    words = {name for name, layer in layers.items() if isinstance(layer, FourierEmbedding)}
    wanted = set(layers) - words - {"lm_head"}
    assert len(wanted) == 28
    assert kind != "factored" or any(isinstance(layers[name], FactoredLinear) for name in wanted)
    model = peft.get_peft_model(model, lora(target_modules="all-linear"))
    assert adapted(model) == wanted
    model.add_adapter("second", lora(target_modules="all-linear", r=2))
    assert adapted(model, "second") == wanted


def test_all_linear_takes_dense_layers_too(folder, tmp_path):
    llava_fa.compress(
        helpers.save_llava(tmp_path / "plain"), tmp_path / "packed", FourierConfig(bits=2, skip=["vision_tower"])
    )
    model = peft.get_peft_model(load(tmp_path / "packed"), lora(target_modules="all-linear"))
    assert len(adapted(model)) == 28
    assert any("vision_tower" in name for name in adapted(model))


def test_a_model_without_its_head(folder):
    model = peft.get_peft_model(AutoModel.from_pretrained(folder()), lora(target_modules="all-linear"))
    assert len(adapted(model)) == 28


def test_a_pattern_does_not_reach_inside_of_a_layer(folder):
    model = peft.get_peft_model(load(folder("factored")), lora(target_modules=r".*language_model.*[qk]_proj.*"))
    assert sorted(name.rpartition(".")[2] for name in adapted(model)) == ["k_proj", "k_proj", "q_proj", "q_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_variants(folder, inputs, tmp_path, options):
    if options.get("init_lora_weights") == "mica" and not hasattr(peft.tuners.lora.Linear, "mica_init"):
        pytest.skip("this peft has no MiCA")
    model = peft.get_peft_model(load(folder()), lora(**options))
    torch.testing.assert_close(logits(model, inputs), logits(load(folder()), inputs), rtol=1e-4, atol=1e-5)
    fit(model, inputs)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder()), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", ["embeddings", "tied"])
def test_a_packed_output_embedding_as_target(folder, inputs, tmp_path, kind):
    model = peft.get_peft_model(load(folder(kind)), lora(target_modules=["lm_head"]))
    assert adapted(model) == {"lm_head"}
    fit(model, inputs)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder(kind)), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("best", lora(init_lora_weights="pissa"), "q_proj: init_lora_weights='pissa' changes the weight below"),
        ("best", lora(init_lora_weights="olora"), "q_proj: init_lora_weights='olora' changes the weight below"),
        ("best", lora(use_qalora=True), "q_proj: use_qalora is a variant of LoRA that packed layers do not know"),
        ("best", lora(modules_to_save=["multi_modal_projector"]), r"linear_1: modules_to_save .* Give it to target_m"),
        ("tied", lora(modules_to_save=["embed_tokens"]), r"embed_tokens: modules_to_save .* Leave it out"),
        ("tied", lora(trainable_token_indices=[1]), "embed_tokens: trainable_token_indices needs a word embedding"),
        ("embeddings", lora(target_modules=["embed_tokens"]), "embed_tokens: a packed word embedding takes no"),
        ("best", peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), "IA3 adapters do not know packed"),
        ("best", peft.LoHaConfig(target_modules="all-linear"), "LOHA adapters do not know packed"),
        ("best", peft.AdaLoraConfig(target_modules=TARGETS, total_step=9), "ADALORA adapters do not know packed"),
    ],
)
def test_what_packed_layers_cannot_do_is_refused_whole(folder, inputs, kind, config, message):
    model = load(folder(kind))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(FourierError, match=message):
        peft.get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model, inputs), logits(load(folder(kind)), inputs))


def test_kinds_of_adapter_that_leave_packed_layers_alone(folder, inputs):
    model = peft.get_peft_model(load(folder()), lora(target_modules=["lm_head"], init_lora_weights="pissa"))
    torch.testing.assert_close(logits(model, inputs), logits(load(folder()), inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_before_dense_layers_are_merged(folder, inputs, merge):
    model = peft.get_peft_model(load(folder()), lora(target_modules=["embed_tokens", *TARGETS]))
    fit(model, inputs)
    before = logits(model, inputs)
    with pytest.raises(FourierError, match="an adapter cannot be merged into packed codes"):
        getattr(model, merge)()
    assert torch.equal(logits(model, inputs), before)
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


def test_adapters_of_dense_layers_still_merge(folder, inputs):
    model = peft.get_peft_model(load(folder()), lora(target_modules=["lm_head"]))
    fit(model, inputs)
    before = logits(model, inputs)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), before)


@pytest.mark.usefixtures("exact_activations")
def test_into_a_dequantised_model_an_adapter_merges(folder, inputs, tmp_path):
    model = peft.get_peft_model(load(folder()), lora())
    fit(model, inputs)
    model.save_pretrained(tmp_path)
    plain = load(folder())
    plain.dequantize()
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)


def test_no_weight_is_decoded_to_lay_an_adapter_on_it(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr("llava_fa.nn.packed_linear.dequantize", lambda *_: decoded.append(1))
    peft.get_peft_model(load(folder()), lora(target_modules="all-linear"))
    assert not decoded


def test_copies_keep_their_adapters(folder, inputs):
    model = peft.get_peft_model(load(folder()), lora())
    fit(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(model, inputs))


def test_models_without_packed_layers_are_none_of_our_business(inputs):
    from llava_fa.hub.peft_layers import LoraPackedLinear, install

    install()  # again
    model = peft.get_peft_model(helpers.random_llava(), lora(init_lora_weights="olora"))
    fit(model, inputs)
    assert not any(isinstance(module, LoraPackedLinear) for module in model.modules())
    before = logits(model, inputs)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), before, rtol=1e-4, atol=1e-5)
