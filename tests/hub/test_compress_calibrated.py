"""Calibrated compression: statistics are those of the inputs that the compressed layers before produce."""

import copy
from types import SimpleNamespace

import helpers
import pytest
import torch
from torch import nn
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import LinearAttentionLayer

import llava_fa
from llava_fa import FourierConfig, FourierError, FourierLinear
from llava_fa.hub import blocks as blockwise
from llava_fa.hub import calibrated as calibrated_blocks
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.course import Original, capture
from llava_fa.hub.inspect import inspect_model
from llava_fa.maths import metrics

VISION = (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",))
LANGUAGE = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def stages() -> list[list[str]]:
    """The order in which layers are compressed, written down by hand."""
    found = []
    for i in range(2):
        block = f"model.vision_tower.encoder.layers.{i}"
        found += [
            [f"{block}.{'mlp' if name.startswith('fc') else 'self_attn'}.{name}" for name in stage] for stage in VISION
        ]
    found += [["model.multi_modal_projector.linear_1"], ["model.multi_modal_projector.linear_2"]]
    for i in range(2):
        block = f"model.language_model.layers.{i}"
        for stage in LANGUAGE:
            mlp = stage[0] in ("gate_proj", "down_proj")
            found.append([f"{block}.{'mlp' if mlp else 'self_attn'}.{name}" for name in stage])
    return found


@pytest.mark.parametrize("target", ["outputs", "weights"])
def test_statistics_against_whole_forward_passes(tmp_path, samples, target):
    """The oracle runs both whole models from the pixels for every stage, one with all earlier stages compressed."""
    folder = helpers.save_llava(tmp_path / "in")
    config = FourierConfig(bits=2, refine_passes=0, target=target)
    report = llava_fa.compress(folder, tmp_path / "out", config, samples)
    reported = {layer.name: layer for layer in report.layers}
    compressed = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    original = copy.deepcopy(model)
    inputs = list(prepare(samples, AutoProcessor.from_pretrained(folder)))
    assert sorted(name for stage in stages() for name in stage) == sorted(reported)
    for stage in stages():
        given, known = inputs_of(model, stage, inputs), inputs_of(original, stage, inputs)
        for name in stage:
            x, before = given[name], known[name]
            weight, packed = original.get_submodule(name).weight.detach(), compressed.get_submodule(name)
            assert isinstance(packed, FourierLinear)
            moment, aim = x.T @ x / len(x), weight.double()
            if target == "outputs":  # ridge regression of W x on what the layer is given, around W
                ridge = 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
                aim = torch.linalg.solve(moment + ridge, (x.T @ before / len(x) + ridge) @ aim.T).T
            expected = metrics.output_error(aim.float(), packed.dequantize(), moment.float())
            assert reported[name].output_error == pytest.approx(expected, rel=2e-3), name
            assert reported[name].weight_error == pytest.approx(metrics.weight_error(weight, packed.dequantize()))
        with torch.no_grad():
            for name in stage:
                model.get_submodule(name).weight.copy_(compressed.get_submodule(name).dequantize())


def inputs_of(model, names, inputs) -> dict[str, torch.Tensor]:
    """All inputs of some layers, float64 [tokens, n], by whole forward passes."""
    gathered: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: gathered[name].append(args[0].flatten(0, -2).double())
        )
        for name in names
    ]
    with torch.no_grad():
        for sample in inputs:
            model(**sample)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in gathered.items()}


def test_making_up_for_earlier_errors_brings_the_answers_nearer(checkpoint, quick, samples, tmp_path):
    """Judged by the logits on the calibration samples themselves."""
    original = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = list(prepare(samples, AutoProcessor.from_pretrained(checkpoint)))
    distances = {}
    for target in ("outputs", "weights"):
        llava_fa.compress(checkpoint, tmp_path / target, quick.replace(target=target), samples)
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / target, dtype=torch.float32)
        with torch.no_grad():
            distances[target] = sum(float((model(**x).logits - original(**x).logits).square().sum()) for x in inputs)
    assert distances["outputs"] < 0.95 * distances["weights"]


def test_where_the_original_routes_other_tokens_there_is_no_drift():
    """As many inputs as in the original model, or the layer is fitted to its weights."""
    linear = nn.Linear(4, 4)
    layer = SimpleNamespace(name="layers.0", shape=(4, 4))
    unit = blockwise.Unit("layers.0", linear, [layer])
    call = blockwise.Call(torch.empty(0), (), {}, None)
    x = [torch.randn(1, 3, 4), torch.randn(1, 3, 4)]
    other = [x[0] + 1, torch.randn(1, 2, 4)]
    with torch.no_grad():
        [same] = calibrated_blocks.gather(
            unit, [[layer]], [call] * 2, x, Original(unit.copy(), [call] * 2, [v + 1 for v in x])
        )
        [routed] = calibrated_blocks.gather(unit, [[layer]], [call] * 2, x, Original(unit.copy(), [call] * 2, other))
    tokens = torch.cat(x, 1)[0]
    torch.testing.assert_close(same.drift, torch.ones(4, 6) @ tokens / 6)
    assert routed.drift is None
    torch.testing.assert_close(routed.moment, tokens.T @ tokens / 6)


def test_data_helps(checkpoint, compressed, calibrated, samples):
    """On its own samples, the calibrated model is nearer to the original than the one made without data."""
    original = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = list(prepare(samples, AutoProcessor.from_pretrained(checkpoint)))

    def distance(folder):
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return sum(float((model(**x).logits - original(**x).logits).norm()) for x in inputs)

    assert distance(calibrated[0]) < 0.9 * distance(compressed[0])


def test_deterministic_and_order_of_bytes(checkpoint, quick, samples, calibrated, tmp_path, digest):
    llava_fa.compress(checkpoint, tmp_path / "out", quick, iter(samples))
    assert digest(tmp_path / "out") == digest(calibrated[0])


@pytest.mark.parametrize(
    "config",
    [
        FourierConfig(bits=2, calibration="diagonal", refine_passes=0),
        FourierConfig(method="paper", bits=2, rank=2, iterations=2),
    ],
)
def test_other_uses_of_the_statistics(checkpoint, tmp_path, samples, config):
    report = llava_fa.compress(checkpoint, tmp_path / "out", config, samples[:1])
    assert all(layer.output_error is not None and layer.output_error > 0 for layer in report.layers)


def test_units_are_blocks_and_what_stands_alone(checkpoint):
    from llava_fa.hub.architecture import empty_model
    from llava_fa.hub.plan import make_plan
    from llava_fa.hub.source import open_source

    source = open_source(checkpoint)
    model = empty_model(source.folder, len(source.entries))
    units = blockwise.find_units(model, make_plan(model, source, FourierConfig()).layers)
    assert [unit.path for unit in units] == [
        "model.vision_tower.encoder.layers.0",
        "model.vision_tower.encoder.layers.1",
        "model.multi_modal_projector",
        "model.language_model.layers.0",
        "model.language_model.layers.1",
    ]


def test_a_layer_that_data_never_reaches_is_compressed_without_and_said(checkpoint, quick, tmp_path):
    """A text-only sample does not reach the vision tower."""
    sample = [{"role": "user", "content": "no picture here"}]
    report = llava_fa.compress(checkpoint, tmp_path / "out", quick, [sample])
    for layer in report.layers:
        reached = "language_model" in layer.name
        assert (layer.output_error is not None) == reached, layer.name
        assert layer.notes == (() if reached else ("no calibration input reached it; compressed without data",))
        assert (layer.tokens > 0) == reached
    assert len({layer.tokens for layer in report.layers}) == 2


def test_layers_tell_how_many_tokens_they_saw(checkpoint, quick, samples, calibrated, tmp_path):
    """As many as the samples have, of the folder too; none are told of without data."""
    inputs = list(prepare(samples, AutoProcessor.from_pretrained(checkpoint)))
    words = sum(sample["input_ids"].numel() for sample in inputs)
    patches = sum(sample["pixel_values"].shape[0] for sample in inputs)
    for layer in calibrated[1].layers:
        tower = layer.tokens / patches
        assert layer.tokens == words if "language_model" in layer.name else tower == int(tower) > 1
    seen = inspect_model(calibrated[0])
    assert [layer.tokens for layer in seen.layers] == [layer.tokens for layer in calibrated[1].layers]
    assert all(layer.tokens is None for layer in llava_fa.compress(checkpoint, tmp_path / "out", quick).layers)
    assert not (tmp_path / "out" / "calibration.json").exists()
    for wrong in ("[1]", '{"tokens": {"a": -1}}', '{"tokens": {"a": true}}', "{"):
        (tmp_path / "out" / "calibration.json").write_text(wrong)
        with pytest.raises(FourierError, match=r"calibration\.json.*Remove it"):
            inspect_model(tmp_path / "out")


def test_several_calls_of_a_block_per_sample(samples):
    """A block that the model runs twice on each sample (as towers run image tiles) sees both inputs."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x, use_cache=False):
            for row in x:
                for layer in self.layers:
                    row = layer(row)
            return row

    model = Twice()
    inputs = [{"x": torch.randn(2, 3, 4)} for _ in range(3)]
    units = [blockwise.Unit(f"layers.{i}", model.layers[i], []) for i in range(2)]
    with torch.no_grad():
        calls, hidden = capture(units, model, inputs)
    assert [len(of) for of in calls] == [6, 6]
    assert torch.equal(torch.stack(hidden), torch.cat([sample["x"] for sample in inputs]))


class Passing(nn.Module):
    """Three layers, of which a sample passes by those that it names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, without=(), twice=None, use_cache=False):
        for index, layer in enumerate(self.layers):
            for _ in range(0 if index in without else 2 if index == twice else 1):
                x = layer(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("passed_by", [0, 1, 2])
def test_a_block_that_some_samples_pass_by(passed_by):
    """As layers that attend to pictures are passed by where there is text alone: the blocks around still meet."""
    model = Passing()
    x = torch.randn(3, 2, 4)
    inputs = [{"x": x[0]}, {"x": x[1], "without": torch.tensor([passed_by])}, {"x": x[2]}]
    units = [blockwise.Unit(f"layers.{i}", model.layers[i], []) for i in range(3)]
    calls, hidden = capture(units, model, inputs)
    assert [[call is not None for call in of] for of in calls] == [
        [index != 1 or unit != passed_by for index in range(3)] for unit in range(3)
    ]
    for index, unit in enumerate(units):
        _, met = blockwise.running(calls[index], hidden)
        assert len(met) == (2 if index == passed_by else 3)
        blockwise.advance(unit, calls[index], hidden)
    for got, sample in zip(hidden, inputs, strict=True):
        assert torch.equal(got, model(**sample))


def test_a_block_that_a_sample_runs_more_often_than_others_is_named():
    model = Passing()
    units = [blockwise.Unit(f"layers.{i}", layer, []) for i, layer in enumerate(model.layers)]
    inputs = [{"x": torch.randn(2, 4)}, {"x": torch.randn(2, 4), "twice": torch.tensor(1)}]
    with torch.no_grad(), pytest.raises(FourierError, match="runs 1 times on it") as error:
        capture(units, model, inputs)
    assert "sample 1" in str(error.value)


class Attending(nn.Module):
    """A layer that attends to what the cache holds for it, and adds itself."""

    def __init__(self, index):
        super().__init__()
        self.layer_idx, self.linear = index, nn.Linear(4, 4)

    def forward(self, x, past_key_values=None):
        key = self.linear(x)[None, None]
        keys = key if past_key_values is None else past_key_values.update(key, key, self.layer_idx)[0]
        return x + keys.sum((0, 1, 2))


class ThenActing(nn.Module):
    """Two layers that read, and two with the same places in the cache that act on what these have read."""

    def __init__(self):
        super().__init__()
        self.reading, self.acting = (nn.ModuleList(Attending(i) for i in range(2)) for _ in range(2))

    def forward(self, x, actions, use_cache=False):
        cache = DynamicCache()
        for layer in self.reading:
            x = layer(x, past_key_values=cache)
        for layer in self.acting:
            actions = layer(actions, past_key_values=cache)
        return actions


@torch.no_grad()
def test_a_block_that_attends_to_what_others_left_in_the_cache():
    """As an action expert does to the language model: however often it runs, what was there before it runs stays."""
    model = ThenActing()
    inputs = [{"x": torch.randn(3, 4), "actions": torch.randn(2, 4)} for _ in range(2)]
    units = [blockwise.Unit(f"acting.{i}", model.acting[i], []) for i in range(2)]
    calls, hidden = capture(units, model, inputs)
    alone = [blockwise.Unit(f"reading.{i}", model.reading[i], []) for i in range(2)]
    assert all(call.kwargs["past_key_values"] is None for of in capture(alone, model, inputs)[0] for call in of)
    state = LinearAttentionLayer()
    assert not blockwise._filled(state)
    state.has_previous_state[0] = True
    assert blockwise._filled(state)
    for _ in range(2):  # a block runs once a stage
        again = list(hidden)
        for unit, own in zip(units, calls, strict=True):
            blockwise.advance(unit, own, again)
        for got, sample in zip(again, inputs, strict=True):
            assert torch.equal(got, model(**sample))


def test_the_loaded_model_does_not_leak_into_the_weights(checkpoint, calibrated, quick, samples, tmp_path):
    """The weights come from the checkpoint: float16 ones run in bf16, and are compressed as they are."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float16)
    half = helpers.save_llava(tmp_path / "in", model=copy.deepcopy(model), dtype=torch.float16)
    report = llava_fa.compress(half, tmp_path / "out", quick, samples[:1])
    assert report.bits_per_weight == pytest.approx(calibrated[1].bits_per_weight)


def test_a_block_is_run_no_further_than_it_must_be(samples):
    """Inputs of the first of two layers: the second runs in the first call only, to learn that once is enough."""
    runs = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.one(x)
            runs.append(len(runs))
            return self.two(y)

    layer = SimpleNamespace(name="blocks.0.one", shape=(4, 4))
    unit = blockwise.Unit("blocks.0", Block(), [layer])
    hidden = [torch.randn(1, 3, 4) for _ in range(4)]
    found = list(blockwise.replay(unit, [blockwise.Call(torch.empty(0), (), {}, None)] * 4, hidden, [layer]))
    assert len(runs) == 1
    for seen, x in zip(found, hidden, strict=True):
        assert torch.equal(seen[layer.name][0], x[0])


def test_the_running_dtype_is_chosen_once(checkpoint, quick, samples, tmp_path, monkeypatch):
    """float32 where the CPU emulates 16-bit floats; what an interrupted run chose is kept."""
    from llava_fa.hub import calibrated_model as module
    from llava_fa.hub.architecture import empty_model
    from llava_fa.hub.plan import make_plan
    from llava_fa.hub.source import open_source
    from llava_fa.hub.work_folder import WorkFolder

    source = open_source(helpers.save_llava(tmp_path / "in", dtype=torch.bfloat16))
    plan = make_plan(empty_model(source.folder, len(source.entries)), source, quick)
    cpu = torch.device("cpu")
    for fast, expected in ((torch.float32, "float32"), (torch.bfloat16, "auto")):
        monkeypatch.setattr(module, "fast_dtype", lambda _, fast=fast: fast)
        with WorkFolder(tmp_path / expected, {}) as work:
            assert module.running_dtype(plan, cpu, work) == expected
            monkeypatch.setattr(module, "fast_dtype", lambda _: None)
            assert module.running_dtype(plan, cpu, work) == expected
            assert module.running_dtype(plan, torch.device("meta"), work) == expected
