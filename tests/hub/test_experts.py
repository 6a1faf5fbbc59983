"""Mixtures of experts: every expert's matrix is a layer, in whatever arrangement it is stored."""

import copy
import dataclasses
import itertools
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.longcat_flash import modeling_longcat_flash
from transformers.models.muse_spark import modeling_muse_spark

import llava_fa
from llava_fa import Budget, FourierConfig, FourierError, FourierLinear
from llava_fa.hub import allocation, blocks
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.calibrated import compress_calibrated
from llava_fa.hub.conversion import Converted
from llava_fa.hub.course import capture
from llava_fa.hub.plan import make_plan
from llava_fa.hub.source import open_source
from llava_fa.hub.streaming import Job, assemble
from llava_fa.hub.work_folder import WorkFolder
from llava_fa.nn.experts import Experts, fuse, is_fused_experts, unfuse
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.surgery import replace_module
from llava_fa.nn.trainable import make_packed, make_trainable

CONFIG = FourierConfig(bits=4, refine_passes=0)
IMAGE = 1
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {"num_heads": 2, "depth": 2, "patch_size": 7, "hidden_size": 32, "intermediate_size": 48}


def qwen3_vl_moe():
    """[experts, m, n]; transposed on the hub."""
    config = transformers.Qwen3VLMoeConfig(
        vision_config={**VISION, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config={
            **TEXT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0},
        },
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config), 2 * 2 * 4


def square():
    """The same with matrices that would fit both ways."""
    model, count = qwen3_vl_moe()
    config = model.config
    config.text_config.moe_intermediate_size = config.text_config.hidden_size // 2
    return transformers.Qwen3VLMoeForConditionalGeneration(config), count


def mixtral():
    """One tensor for each expert and matrix on the hub."""
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), 2 * 2 * 4


def gpt_oss():
    """Transposed, up and gate in turns, with biases."""
    config = transformers.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config), 2 * 2 * 4


def llama4():
    """Transposed, every expert given its tokens in order, a shared expert beside them."""
    text = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1]}
    config = transformers.Llama4TextConfig(**text, attention_chunk_size=16, layer_types=["full_attention"] * 2)
    return transformers.Llama4ForCausalLM(config), 2 * 4


@pytest.fixture(params=[qwen3_vl_moe, square, mixtral, gpt_oss, llama4])
def subject(request, tmp_path):
    """(folder, model in float32, matrices of experts)."""
    torch.manual_seed(0)
    model, count = request.param()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "in")
    return tmp_path / "in", load(tmp_path / "in", type(model)), count


def load(folder, kind, **options):
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model):
    ids = torch.arange(5, 25)[None]
    return model(input_ids=ids, use_cache=False).logits


def test_they_compute_as_transformers_do(subject):
    _, model, count = subject
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    names = unfuse(model)
    assert names
    assert (
        sum(isinstance(module, torch.nn.Linear) for name, module in model.named_modules() if ".experts." in name)
        == count
    )
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    fuse(model)
    assert not any(isinstance(module, Experts) for module in model.modules())
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_their_matrices_are_views(subject):
    _, model, _ = subject
    fused = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    places = {name: {p.untyped_storage().data_ptr() for p in module.parameters()} for name, module in fused.items()}
    unfuse(model)
    for name, held in places.items():
        assert {p.untyped_storage().data_ptr() for p in model.get_submodule(name).parameters()} <= held


@pytest.mark.usefixtures("exact_activations")
def test_each_is_a_layer_of_its_own(subject, tmp_path):
    folder, model, count = subject
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == count
    assert report.source_ledger.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert report.ledger.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    small = load(tmp_path / "out", type(model))
    unfuse(model)
    expected, packed = dict(model.named_parameters()), dict(packed_layers(small))
    for name, layer in packed.items():
        weight = expected.pop(f"{name}.weight")
        assert (layer.dequantize() - weight).norm() < 0.15 * weight.norm(), name
    rest = dict(small.named_parameters())
    assert all(torch.equal(rest[name], parameter) for name, parameter in expected.items())
    ours = logits(small)
    small.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again", type(model))), ours)
    plain = small.dequantize()
    torch.testing.assert_close(logits(plain), ours, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_all_have_the_norm_in_front_of_those_that_were_seen(subject):
    folder, _, count = subject
    source = open_source(folder)
    plan = make_plan(empty_model(folder, len(source.entries)), source, CONFIG)
    first = [layer for layer in plan.layers if ".experts.gate_up." in layer.name]
    assert len(first) == count // 2
    assert all(layer.feed is not None and layer.feed.norm.endswith("post_attention_layernorm") for layer in first)
    assert not plan.unseen


def test_one_is_read_alone(subject):
    """Memory holds one expert, however they are stored."""
    folder, model, count = subject
    source = open_source(folder)
    plan = make_plan(empty_model(folder, len(source.entries)), source, CONFIG)
    experts = [layer for layer in plan.layers if ".experts." in layer.name]
    unfuse(model)
    assert len(experts) == count
    for layer in experts:
        assert isinstance(layer.weight, Converted)
        assert layer.weight.alone is not None
        assert torch.equal(layer.weight.read().float(), model.get_submodule(layer.name).weight)


@pytest.mark.parametrize("pattern", ["*.experts.down.*", "*.experts.gate_up.1", "*.experts.*"])
def test_some_may_stay(subject, tmp_path, pattern):
    folder, model, count = subject
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG.replace(skip=(pattern,)))
    assert sum(".experts." in layer.name for layer in report.layers) < count
    small = load(tmp_path / "out", type(model))
    unfuse(model)
    unfuse(small)
    skipped = [
        name for name, module in small.named_modules() if ".experts." in name and type(module) is torch.nn.Linear
    ]
    assert skipped
    for name in skipped:
        assert torch.equal(small.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_budget_knows_them(subject, tmp_path):
    folder, model, _ = subject
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG, budget=Budget(bits=6))
    assert report.bits_per_weight <= 6
    load(tmp_path / "out", type(model))


def test_one_that_received_no_token_is_fitted_to_those_of_the_others(subject, tmp_path):
    """And says so; the others are fitted to the tokens that the router sent them, mostly."""
    folder, model, count = subject
    source = open_source(folder)
    plan = make_plan(empty_model(folder, len(source.entries)), source, CONFIG)
    inputs = [{"input_ids": torch.tensor([[5]])}]  # a token chooses two of four experts at most
    with WorkFolder(tmp_path / "out", {}) as work:
        job = Job(plan, work, lambda _: None)
        unfuse(model)
        compress_calibrated(job, model, inputs)
        told = {layer.name: work.measurement(layer.name) for layer in plan.layers if ".experts." in layer.name}
        assemble(plan, CONFIG, work)
    assert {measured.tokens for measured in told.values()} == {0, 1}
    assert 0 < sum(measured.tokens for measured in told.values()) < count
    for measured in told.values():
        assert measured.output_error is not None
        assert any("fitted to those of the experts beside it" in note for note in measured.notes) != measured.tokens
    load(tmp_path / "out", type(model))


def test_generation_and_gradients(subject, tmp_path):
    folder, model, _ = subject
    llava_fa.compress(folder, tmp_path / "out", CONFIG)
    small = load(tmp_path / "out", type(model))
    ids = torch.arange(5, 25)[None]
    assert small.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 20
    x = small.get_input_embeddings()(ids).detach().requires_grad_()
    small(inputs_embeds=x, use_cache=False).logits.sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_same_matrices_of_all_experts_are_one_stage(subject, monkeypatch):
    """The block runs twice for them, not twice an expert; or in portions, with the same result."""
    folder, model, _ = subject
    source = open_source(folder)
    plan = make_plan(empty_model(folder, len(source.entries)), source, CONFIG)
    unfuse(model)
    inputs = [{"input_ids": torch.arange(5, 25)[None]}]
    units = blocks.find_units(model, plan.layers)
    mixed = next(unit for unit in units if any(".experts." in layer.name for layer in unit.layers))
    calls, hidden = capture([mixed], model, inputs)

    def stages():
        found = blocks.stages(mixed, calls[0], hidden)
        names = [sorted({layer.name for group in stage for layer in group}) for stage in found]
        return [stage for stage in names if ".experts." in stage[0]]

    whole = stages()
    assert len(whole) == 2
    assert all(".gate_up." in name for name in whole[0])
    assert all(".down." in name for name in whole[1])
    monkeypatch.setattr(blocks, "_STAGE_BYTES", 16 * 32**2 * 2)
    assert len(stages()) > 2
    assert {name for stage in stages() for name in stage} == {name for stage in whole for name in stage}


@pytest.fixture
def packed(subject, tmp_path):
    """A model with packed experts, in float32, and its `Experts`."""
    folder, model, _ = subject
    llava_fa.compress(folder, tmp_path / "out", CONFIG)
    small = load(tmp_path / "out", type(model))
    return small, [module for module in small.modules() if isinstance(module, Experts)]


def given(module, tokens):
    """Arguments of its forward: a token that no expert has among them, and one that has one twice."""
    width = module.lists["down_proj"][0].out_features
    if module.ordered:
        x = torch.randn(module.count, tokens, width)
        x[torch.rand(x.shape[:2]) < 0.7] = 0
        return (x.view(-1, width),)
    index = torch.randint(0, module.count, (tokens, 2))
    index[1:2] = module.count
    return torch.randn(tokens, width), index, torch.rand(tokens, 2)


@torch.no_grad()
def test_in_one_call_as_one_by_one(packed):
    for module in packed[1]:
        for tokens in (1, 7):
            arguments = given(module, tokens)
            together = module(*arguments)
            heard = []
            for layer in [layer for linears in module.lists.values() for layer in linears]:
                layer.register_forward_hook(lambda *_, heard=heard: heard.append(1))
            torch.testing.assert_close(module(*arguments), together, rtol=1e-6, atol=1e-6)
            assert heard or (module.ordered and not arguments[0].any())


@torch.no_grad()
def test_a_long_prompt_goes_in_parts(packed, monkeypatch):
    for module in packed[1]:
        arguments = given(module, 50)
        whole = module(*arguments)
        monkeypatch.setattr("llava_fa.nn.routed._PAIRS", 20)
        torch.testing.assert_close(module(*arguments), whole)


@torch.no_grad()
def test_one_graph_whichever_are_chosen(packed):
    torch._dynamo.reset()
    model, modules = packed
    for module in modules:
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for tokens in (1, 5, 9):
            arguments = given(module, tokens)
            assert torch.equal(compiled(*arguments), module(*arguments))
    arguments, twin = given(modules[0], 5), copy.deepcopy(modules[0])
    expected = twin(*arguments)
    del modules, module, compiled, model
    packed[1].clear()
    assert torch.equal(torch.compile(twin, fullgraph=True, backend="eager")(*arguments), expected)


def muse_spark_config():
    sizes = {"num_local_experts": 4, "moe_hidden_size": 32, "moe_intermediate_size": 24}
    return types.SimpleNamespace(**sizes, hidden_act="silu", post_norm_eps=1e-5, _experts_implementation="eager")


def muse_spark():
    """A norm behind every expert."""
    return modeling_muse_spark.MuseSparkExperts(muse_spark_config()), 2 * 4, 4


def longcat_flash():
    """Experts that give back what they are given."""
    config = types.SimpleNamespace(
        expert_ffn_hidden_size=24, hidden_size=32, n_routed_experts=4, zero_expert_num=2, hidden_act="silu"
    )
    return modeling_longcat_flash.LongcatFlashExperts(config), 6 + 4, 6


@pytest.mark.parametrize("make", [muse_spark, longcat_flash])
def test_modules_of_their_own_keep_their_forward(make):
    torch.manual_seed(0)
    fused, count, choices = make()
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, index, weights = torch.randn(9, 32), torch.randint(0, choices, (9, 2)), torch.rand(9, 2)
    expected, state = fused(x, index, weights), {key: value.clone() for key, value in fused.state_dict().items()}
    model = torch.nn.ModuleDict({"experts": fused})
    assert unfuse(model) == ["experts"]
    module = model["experts"]
    torch.testing.assert_close(copy.deepcopy(module)(x, index, weights), expected)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in module.modules()) == count
    for name, linear in [pair for pair in module.named_modules() if isinstance(pair[1], torch.nn.Linear)]:
        replace_module(module, name, FourierLinear.from_linear(linear, FourierConfig(bits=4)))
    assert module(x, index, weights).sub(expected).norm() < 0.3 * expected.norm()
    for name, layer in packed_layers(module):
        replace_module(module, name, layer.to_plain())
    fuse(model)
    after = model["experts"].state_dict()
    assert after.keys() == state.keys()
    assert all((after[key] - state[key]).norm() <= 0.15 * state[key].norm() for key in state)
    torch.testing.assert_close(model["experts"](x, index, weights), module(x, index, weights))


def test_a_forward_that_does_something_else_with_a_matrix_says_so():
    class OddExperts(modeling_muse_spark.MuseSparkExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states @ self.gate_up_proj[0]

    odd = torch.nn.ModuleDict({"experts": OddExperts(muse_spark_config())})
    unfuse(odd)
    with pytest.raises(FourierError, match="Leave them out with --skip"):
        odd["experts"](torch.randn(2, 32), None, None)


def test_scales_of_the_chosen_are_trained(packed):
    small, modules = packed
    make_trainable(small)
    ids = torch.arange(5, 25)[None]
    optimizer = torch.optim.SGD([p for name, p in small.named_parameters() if name.endswith("_gain")], lr=1.0)
    before = small(input_ids=ids, labels=ids, use_cache=False).loss
    before.backward()
    gains = [layer.row_gain.grad for module in modules for linears in module.own.values() for layer in linears]
    assert any(gain is not None and gain.abs().sum() > 0 for gain in gains)
    optimizer.step()
    after = small(input_ids=ids, labels=ids, use_cache=False).loss
    assert after < before
    make_packed(small)
    stored = small(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(stored, after, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("exact_activations")
def test_compressed_while_they_are_loaded(subject, tmp_path):
    folder, model, count = subject
    config = FourierConfig(bits=4, calibration="none", refine_passes=0, skip=["*.experts.down.1"])
    llava_fa.compress(folder, tmp_path / "out", config)
    other, ours = load(tmp_path / "out", type(model)), load(folder, type(model), quantization_config=config)
    packed, expected = dict(packed_layers(ours)), dict(packed_layers(other))
    assert packed.keys() == expected.keys()
    assert sum(".experts." in name for name in packed) == count * 7 // 8
    for name, layer in packed.items():
        assert torch.equal(layer.dequantize(), expected[name].dequantize()), name
    assert torch.equal(logits(ours), logits(other))
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", type(model))), logits(other))
    small = FourierConfig(bits=3, only=["*.self_attn.*"])
    assert not any(isinstance(m, Experts) for m in load(folder, type(model), quantization_config=small).modules())


def alike(tmp_path):
    """A mixture whose experts all have the same matrices and are chosen one a token: they differ by use alone."""
    torch.manual_seed(2)
    config = transformers.MixtralConfig(**{**TEXT, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=1)
    model = transformers.MixtralForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    mixed = model.model.layers[0].mlp
    for stack in (mixed.experts.gate_up_proj, mixed.experts.down_proj):
        stack.data[:] = stack.data[:1].clone()
    mixed.gate.weight.data *= torch.tensor([1.0, 0.5, 0.2, 0.05])[:, None]
    model.save_pretrained(tmp_path / "in")
    return tmp_path / "in", load(tmp_path / "in", type(model))


def test_what_an_experts_error_costs_is_how_often_it_is_chosen(tmp_path):
    """Measured by gradients: a rare expert's are few. Nothing else tells experts that are all alike apart."""
    folder, model = alike(tmp_path)
    source = open_source(folder)
    plan = make_plan(empty_model(folder, len(source.entries)), source, CONFIG.replace(only=("*.experts.*",)))
    unfuse(model)
    given = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: given.append(args[1].flatten()))
    inputs = [{"input_ids": torch.randint(5, 60, (1, 24))} for _ in range(12)]
    with torch.no_grad():
        for sample in inputs:
            model(**sample)
    uses = torch.cat(given).bincount(minlength=4).tolist()
    predictions = allocation.measure(plan, CONFIG, model, inputs, [4] * len(inputs), lambda _: None)
    settled = allocation.spend(plan, CONFIG, Budget(bits=3.5), predictions, allocation.NATS)
    layers = {layer.name: layer for layer in settled.layers}
    compared = 0
    for kind in ("gate_up", "down"):
        own = [layers[f"model.layers.0.mlp.experts.{kind}.{index}"] for index in range(4)]
        for rare, often in itertools.permutations(range(4), 2):
            if uses[rare] * 3 < uses[often]:
                compared += 1
                assert own[rare].sensitivity < 0.6 * own[often].sensitivity, (kind, uses)
                assert own[rare].config.bits <= own[often].config.bits
        assert len({layer.config.bits for layer in own}) > 1
    assert compared >= 4


def test_without_data_an_expert_counts_as_often_as_the_router_can_choose_it(tmp_path):
    """k of E: known from the model's own shapes. What all tokens pass through counts whole."""
    folder, _ = alike(tmp_path)
    source = open_source(folder)
    plan = make_plan(empty_model(folder, len(source.entries)), source, CONFIG)
    shares = {layer.name: layer.share for layer in plan.layers}
    assert {share for name, share in shares.items() if ".experts." in name} == {0.25}
    assert {share for name, share in shares.items() if ".experts." not in name} == {1.0}
    predictions = allocation.estimate(plan, CONFIG, lambda _: None)
    whole = dataclasses.replace(plan, layers=tuple(dataclasses.replace(layer, share=1.0) for layer in plan.layers))
    for name, [of] in allocation.estimate(whole, CONFIG, lambda _: None).items():
        assert predictions[name][0].slope == pytest.approx(shares[name] * of.slope)
