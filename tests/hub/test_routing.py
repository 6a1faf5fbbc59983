"""The second moments and drifts of experts: the router's choice followed, and steadied by tokens in turn."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional

from llava_fa.hub import blocks, calibrated
from llava_fa.hub.calibrated import gather, in_turn_sums
from llava_fa.hub.course import Original, capture
from llava_fa.hub.routing import experts_of, followed, in_turn
from llava_fa.nn.experts import Experts, unfuse

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
EXPERTS = 4
BLOCK = "model.layers.0"
MIXED = {"routed": f"{BLOCK}.mlp.experts", "ordered": f"{BLOCK}.feed_forward.experts"}


def routed():
    config = transformers.MixtralConfig(**TEXT, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def ordered():
    """Llama 4: every expert is given all tokens, those that are not its own as zeros."""
    config = transformers.Llama4TextConfig(
        **TEXT, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=EXPERTS, num_experts_per_tok=1,
        moe_layers=[0], attention_chunk_size=16, layer_types=["full_attention"],
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


class Walk:
    """A block of a mixture whose earlier layers were compressed, here made noisy; and the original one beside it."""

    def __init__(self, kind):
        torch.manual_seed(0)
        model = {"routed": routed, "ordered": ordered}[kind]().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        unfuse(model)
        self.noisy = copy.deepcopy(model)
        attention = self.noisy.get_submodule(f"{BLOCK}.self_attn.o_proj")
        attention.weight.data += 0.6 * torch.randn_like(attention.weight)
        ids = torch.randint(5, 60, (3, 1, 20))
        inputs = [{"input_ids": one} for one in ids]
        self.path = MIXED[kind]
        self.x = {name: self._given(of, inputs) for name, of in (("given", self.noisy), ("original", model))}
        self.unit = self._unit(self.noisy)
        self.calls, self.hidden = capture([self.unit], self.noisy, inputs)
        self.calls = self.calls[0]
        self.original = self._original(model, inputs)

    def _original(self, model, inputs):
        unit = self._unit(model)
        [calls], hidden = capture([unit], model, inputs)
        return Original(unit, calls, hidden)

    def _unit(self, model):
        experts = model.get_submodule(self.path)
        layers = [
            SimpleNamespace(name=f"{self.path}.{kind}.{i}", shape=tuple(linear.weight.shape), read=linear.weight.detach)
            for kind in ("gate_up", "down")
            for i, linear in enumerate(getattr(experts, kind))
        ]
        return blocks.Unit(BLOCK, model.get_submodule(BLOCK), layers)

    def _given(self, model, inputs):
        """The arguments of the experts over whole passes: hidden states, and where routed the choice."""
        seen = []
        hook = model.get_submodule(self.path).register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            for sample in inputs:
                model(**sample)
        hook.remove()
        return [[args[i] for args in seen] for i in range(min(2, len(seen[0])))]

    def stage(self, kind):
        return [[layer] for layer in self.unit.layers if f".{kind}." in layer.name]

    def gather(self, kind):
        with torch.no_grad():
            return gather(self.unit, self.stage(kind), self.calls, self.hidden, self.original)


def moments(x, before):
    x, before = x.double(), before.double()
    return x.T @ x, (before - x).T @ x


@pytest.mark.parametrize("kind", ["gate_up", "down"])
def test_in_turn_they_are_those_of_all_tokens(kind, monkeypatch):
    """In float64, of what whole passes give the experts."""
    monkeypatch.setattr(calibrated, "_SHOWN", 100)  # every expert is shown every token
    walk = Walk("routed")
    given, original = (torch.cat(walk.x[name][0]) for name in ("given", "original"))
    layers = [layer for [layer] in walk.stage(kind)]
    with torch.no_grad():
        sums = in_turn_sums(walk.unit, layers, walk.calls, walk.hidden, walk.original)
    for expert, layer in enumerate(layers):
        inputs = [given, original]
        if kind == "down":
            weight = walk.noisy.get_submodule(walk.path).gate_up[expert].weight
            halves = [(x @ weight.T).chunk(2, -1) for x in inputs]
            inputs = [(functional.silu(gate) * up).detach() for gate, up in halves]
        found = sums[layer.name].statistics()
        assert found.tokens == 0
        expected = [total / len(given) for total in moments(*inputs)]
        if kind == "down":  # fewer rows than columns: W D
            expected[1] = layer.read() @ expected[1]
        torch.testing.assert_close(found.moment.double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.drift.double(), expected[1], rtol=1e-4, atol=1e-5)


def test_the_original_follows_the_choice_of_the_compressed_block():
    walk = Walk("routed")
    given, original = (torch.cat(walk.x[name][0]) for name in ("given", "original"))
    chosen = torch.cat(walk.x["given"][1])
    assert (chosen != torch.cat(walk.x["original"][1])).any()
    for expert, found in enumerate(walk.gather("gate_up")):
        own = (chosen == expert).any(1)
        assert 0 < own.sum() < len(own)
        assert found.tokens == own.sum()
        moment, drift = (total / own.sum() for total in moments(given[own], original[own]))
        torch.testing.assert_close(found.moment.double(), moment, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.drift.double(), drift, rtol=1e-4, atol=1e-5)


def test_experts_given_their_tokens_in_order_follow_where_the_original_has_them_too():
    walk = Walk("ordered")
    stacked = [
        torch.cat([x.view(EXPERTS, -1, x.shape[-1]) for x in walk.x[name][0]], 1) for name in ("given", "original")
    ]
    followed_, missed = 0, 0
    for expert, found in enumerate(walk.gather("gate_up")):
        given, original = (x[expert] for x in stacked)
        own = given.any(1)
        assert found.tokens == own.sum()
        if not own.any():
            continue
        mine = given[own]
        torch.testing.assert_close(found.moment.double(), mine.T @ mine / len(mine), rtol=1e-4, atol=1e-5)
        if original[own].any(1).all():
            followed_ += 1
            drift = (original[own] - mine).T @ mine / len(mine)
            torch.testing.assert_close(found.drift.double(), drift, rtol=1e-4, atol=1e-5)
        else:
            missed += 1
            assert found.drift is None
    assert missed
    assert followed_ + missed >= 2


@pytest.mark.parametrize("kind", ["routed", "ordered"])
@pytest.mark.parametrize("each", [1, 3, EXPERTS])
def test_in_turn_every_token_goes_to_so_many_experts_evenly(kind, each):
    """Of tokens the same in a copy of the unit; and nothing of it stays."""
    walk = Walk(kind)
    layers = [group[0] for group in walk.stage("gate_up")]
    rows = [[], []]
    with torch.no_grad():
        before = list(blocks.replay(walk.unit, walk.calls, walk.hidden, layers))
        for index, (unit, hidden) in enumerate(((walk.unit, walk.hidden), (walk.original.unit, walk.original.hidden))):
            with in_turn(unit, each):
                for run in blocks.replay(unit, walk.calls, hidden, layers):
                    rows[index].append([sum(len(x) for x in run[layer.name]) for layer in layers])
        after = list(blocks.replay(walk.unit, walk.calls, walk.hidden, layers))
    counts = torch.tensor(rows[0])
    assert counts.sum() == 60 * each
    assert counts.sum(0).min() >= 0.5 * 60 * each / EXPERTS
    assert rows[0] == rows[1]
    for one, other in zip(before, after, strict=True):
        for name, inputs in one.items():
            assert [x.tolist() for x in inputs] == [x.tolist() for x in other[name]]


def test_what_is_no_expert_is_as_it_was():
    walk = Walk("routed")
    gate = SimpleNamespace(name=f"{BLOCK}.self_attn.q_proj", shape=(16, 16))
    assert experts_of(walk.unit, gate.name) is None
    assert isinstance(experts_of(walk.unit, f"{walk.path}.down.3"), Experts)
    with torch.no_grad():
        [found] = gather(walk.unit, [[gate]], walk.calls, walk.hidden)
        [runs] = zip(
            *(run[gate.name] for run in blocks.replay(walk.unit, walk.calls, walk.hidden, [gate])), strict=True
        )
    x = torch.cat(runs)
    torch.testing.assert_close(found.moment.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_a_unit_that_follows_none_runs_as_it_does():
    walk = Walk("routed")
    with torch.no_grad():
        plain = walk.calls[0].run(walk.unit.module, walk.hidden[0])
        with followed(walk.unit, None):
            torch.testing.assert_close(walk.calls[0].run(walk.unit.module, walk.hidden[0]), plain)
