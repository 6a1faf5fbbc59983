"""A budget for a whole model: kept to the byte, better than uniform, resumable, readable, explained."""

import json
import signal

import helpers
import pytest
import torch
from test_compress_resume import die_at
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fa
from llava_fa import Budget, FourierConfig, FourierError
from llava_fa.hub import allocation, blocks, model_sensitivity
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.calibration_data import answer_start, prepare
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.plan import make_plan
from llava_fa.hub.source import open_source

CONFIG = FourierConfig(refine_passes=0)


@pytest.fixture(scope="module")
def settled(checkpoint, samples, tmp_path_factory):
    """(folder, report) of a calibrated compression to a budget."""
    out = tmp_path_factory.mktemp("settled") / "model"
    return out, llava_fa.compress(checkpoint, out, CONFIG, samples, budget=Budget(bits=3.6))


@pytest.fixture(scope="module")
def blind(checkpoint, tmp_path_factory):
    """(folder, report) without data."""
    out = tmp_path_factory.mktemp("blind") / "model"
    return out, llava_fa.compress(checkpoint, out, CONFIG, budget=Budget(bits=3.3))


def weight_files_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("name", "bits"), [("settled", 3.6), ("blind", 3.3)])
def test_a_budget_of_bits_is_kept_and_used(request, name, bits):
    _, report = request.getfixturevalue(name)
    assert bits - 0.05 < report.bits_per_weight <= bits
    assert report.bits == bits
    assert report.budget["predicted_loss"] <= report.budget["uniform_loss"]
    assert len({layer.bits_per_weight for layer in report.layers}) > 3


def test_a_size_is_kept_by_the_files_with_their_headers(checkpoint, tmp_path):
    size = 120_000
    report = llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, budget=Budget(size=size))
    assert 0.93 * size < weight_files_bytes(tmp_path / "out") <= size
    assert report.bits is None
    assert report.bits_per_weight < 4  # it was the budget that ended it
    assert report.budget["size"] == size


def test_the_model_loads_and_inspect_says_why(settled):
    folder, report = settled
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    widths = {layer.layout.code_bits for _, layer in model.named_modules() if hasattr(layer, "layout")}
    assert len(widths) > 3
    seen = inspect_model(folder)
    assert seen.budget == report.budget
    assert [layer.sensitivity for layer in seen.layers] == [layer.sensitivity for layer in report.layers]
    total = sum(layer.predicted_loss for layer in seen.layers)
    assert total == pytest.approx(report.budget["predicted_loss"])
    # `vision_feature_layer=-2`: nothing that the last vision block does reaches the answers
    last = [layer for layer in seen.layers if "encoder.layers.1." in layer.name]
    assert {layer.sensitivity for layer in last} == {0.0}
    assert {round(layer.bits_per_weight - 1, 0) for layer in last} == {1.0}  # 1 bit codes, 1 bit of scales
    assert max(layer.bits_per_weight for layer in seen.layers) > 4


def test_what_is_saved_again_keeps_the_budget(settled, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(settled[0])
    model.save_pretrained(tmp_path / "again")
    assert inspect_model(tmp_path / "again").budget == settled[1].budget


def test_it_answers_more_like_the_original_than_uniform(checkpoint, samples, tmp_path, settled):
    """At no more bytes than uniform 2 bits, calibrated on the same samples; measured, not predicted."""
    uniform = llava_fa.compress(checkpoint, tmp_path / "uniform", CONFIG.replace(bits=2), samples)
    budget = Budget(bits=uniform.bits_per_weight)
    mixed = llava_fa.compress(checkpoint, tmp_path / "mixed", CONFIG, samples, budget=budget)
    assert mixed.bits_per_weight <= uniform.bits_per_weight
    processor = AutoProcessor.from_pretrained(checkpoint)
    original = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)

    def divergence(folder):
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        total = 0.0
        with torch.no_grad():
            for seed in range(100, 104):  # unseen pictures
                inputs = helpers.inputs_for(processor, seed)
                p = original(**inputs).logits[0, 20:].log_softmax(-1)
                total += float((p.exp() * (p - model(**inputs).logits[0, 20:].log_softmax(-1))).sum(-1).mean())
        return total

    assert divergence(tmp_path / "mixed") < 0.8 * divergence(tmp_path / "uniform")


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("fsync", 1),  # the manifest
        ("fsync", 2),  # the dtype that the model runs in
        ("fsync", 3),  # the allocation is being written
        ("replace", 3),  # it has its name; no layer is compressed
        ("replace", 10),
        ("fsync", 32),  # the result's weights
    ],
)
def test_killed_under_a_budget(checkpoint, samples, settled, tmp_path, digest, monkeypatch, name, at):
    out = tmp_path / "out"
    run = (checkpoint, out, CONFIG, samples)
    monkeypatch.setattr(llava_fa, "compress", with_budget(Budget(bits=3.6)))
    assert die_at(name, at, *run) == signal.SIGKILL
    partial = tmp_path / "out.partial" / allocation.FILE
    settled_on = partial.read_text() if partial.exists() else None
    assert (settled_on is not None) == ((name, at) not in (("fsync", 1), ("fsync", 2), ("fsync", 3)))
    if settled_on is not None:  # what was settled is not measured again
        monkeypatch.setattr(allocation, "measure", None)
    llava_fa.compress(*run)
    assert digest(out) == digest(settled[0])


def with_budget(budget):
    compress = llava_fa.compress
    return lambda *args, **kwargs: compress(*args, budget=budget, **kwargs)


def test_another_budget_is_other_work(checkpoint, tmp_path):
    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, budget=Budget(bits=3.3), progress=stop)
    with pytest.raises(FourierError, match=r"another budget\.bits is there"):
        llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, budget=Budget(bits=3.4))
    with pytest.raises(FourierError, match="another budget is there"):
        llava_fa.compress(checkpoint, tmp_path / "out", CONFIG)


def test_too_small_a_budget_is_said_with_the_least(checkpoint, tmp_path):
    with pytest.raises(FourierError, match=r"the budget is 1\.2 bits per weight, and (\d\.\d+) is the least") as error:
        llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, budget=Budget(bits=1.2))
    least = float(str(error.value).split(" is the least")[0].split()[-1])
    report = llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, fresh=True, budget=Budget(bits=least + 0.001))
    assert report.bits_per_weight == pytest.approx(least, abs=0.002)
    with pytest.raises(
        FourierError, match=r"the budget is 90\.0 kB, and 1\d\d\.\d kB is the least that this model takes"
    ):
        llava_fa.compress(checkpoint, tmp_path / "other", CONFIG, budget=Budget(size="90kB"))
    with pytest.raises(FourierError, match="a budget is for method 'best', not 'paper'"):
        llava_fa.compress(checkpoint, tmp_path / "other", FourierConfig(method="paper"), budget=Budget(bits=3))


def test_bits_is_the_most_and_rank_is_an_offer(checkpoint, tmp_path):
    config = CONFIG.replace(bits=2.5, rank=2, iterations=1)
    report = llava_fa.compress(checkpoint, tmp_path / "out", config, budget=Budget(bits=12))
    assert {layer.rank for layer in report.layers} <= {0, 2}
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    assert {layer["code_bits"] for layer in layers.values()} == {5}
    tight = llava_fa.compress(checkpoint, tmp_path / "tight", config, budget=Budget(bits=2.6))
    assert 0 in {layer.rank for layer in tight.layers}


def test_trellis_codes_are_options(checkpoint, tmp_path):
    config = CONFIG.replace(codes="auto", only=("*.mlp",))
    report = llava_fa.compress(checkpoint, tmp_path / "out", config, budget=Budget(bits=40))
    assert {layer.codes for layer in report.layers} == {"rings", "trellis"}  # 32 and 48 inputs: rings alone
    assert {layer.shape[1] for layer in report.layers if layer.codes == "trellis"} == {64, 96}
    # the tables of points, 16 KB each, count: a budget that they would break leaves them out
    tight = llava_fa.compress(checkpoint, tmp_path / "tight", config, budget=Budget(bits=4))
    assert {layer.codes for layer in tight.layers} == {"rings"}
    assert 3.9 < tight.bits_per_weight <= 4
    trellis = llava_fa.compress(checkpoint, tmp_path / "all", config.replace(codes="trellis"), budget=Budget(bits=9))
    assert {layer.codes for layer in trellis.layers} == {"trellis"}
    assert trellis.bits_per_weight <= 9


def test_the_fisher_information_predicts_a_small_error(checkpoint, samples):
    """One error matrix of known covariance in one layer, the same for all tokens: KL ≈ ½ Σ G_i E[e_i²]."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    inputs = list(prepare(samples, processor))
    answers = [answer_start(sample, x, processor) for sample, x in zip(samples, inputs, strict=True)]
    assert [len(x["input_ids"][0]) - start for x, start in zip(inputs, answers, strict=True)] == [10, 10, 10]
    name = "model.language_model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    directions = torch.randn(layer.in_features, 24, generator=torch.Generator().manual_seed(1)) / 10
    runs = [model_sensitivity.fisher(model, {name: directions}, inputs, answers, seed)[name] for seed in range(8)]
    found = torch.stack(runs).mean(0)
    assert all(parameter.requires_grad for parameter in model.parameters())  # left as it was

    @torch.no_grad()
    def logs():
        return [
            (blocks.forward(model, x, 0).logits[0, start - 1 : -1] / model_sensitivity.TEMPERATURE).log_softmax(-1)
            for x, start in zip(inputs, answers, strict=True)
        ]

    original, power = logs(), 1e-4
    torch.manual_seed(0)
    weight, divergences = layer.weight.detach().clone(), []
    for _ in range(60):
        with torch.no_grad():
            layer.weight.copy_(weight + power**0.5 * torch.randn(len(weight), 24) @ directions.T)
        divergences += [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(original, logs(), strict=True)]
    measured = sum(divergences) / len(divergences)
    assert 0.5 * power * float(found.sum()) == pytest.approx(measured, rel=0.25)


def test_queries_and_keys_keep_what_the_budget_buys_for_all(settled):
    """Their sensitivity says next to nothing of where an attention breaks."""
    both = [layer for layer in settled[1].layers if layer.name.endswith(("q_proj", "k_proj"))]
    rows = [layer.bits_per_weight for layer in both if layer.sensitivity]
    assert (len(both), len(rows)) == (8, 6)
    assert min(rows) > 3.5  # settled under 3.6 bits: 3.5 of codes, and scales
    assert min(layer.bits_per_weight for layer in settled[1].layers) < 3.5


def test_a_layer_that_nothing_reaches_has_no_sensitivity(checkpoint, samples):
    source = open_source(checkpoint)
    plan = make_plan(empty_model(source.folder, len(source.entries)), source, CONFIG)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    inputs = [
        {key: value for key, value in x.items() if key != "pixel_values"} for x in prepare(samples[:1], processor)
    ]
    inputs[0]["input_ids"] = inputs[0]["input_ids"].clamp(min=2)  # no image token
    found = allocation.measure(plan, CONFIG, model, inputs, [5], lambda _: None)
    assert all(
        ([values[1:] for values in of] == [(0.0, 0.0)]) == ("language_model" not in name) for name, of in found.items()
    )
