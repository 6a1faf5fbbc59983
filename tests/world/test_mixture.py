"""A mixture of experts upcycled from the embedded model: what it begins as, its balance, its training."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoProcessor
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func
from typer.testing import CliRunner

import llava_fa
from llava_fa.cli.main import app
from llava_fa.hub.complete import loaded_model
from llava_fa.hub.source import resolve_model
from llava_fa.world.mixture import CHOSEN, MixtureLearner, balance_loss, mixture_recipe, upcycled
from llava_fa.world.packing import WorldBatches
from llava_fa.world.training import train


@pytest.fixture(scope="module")
def dense():
    return loaded_model(resolve_model("tiny"), dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(resolve_model("tiny"))


def batches(processor, count):
    return list(WorldBatches(processor.tokenizer, split="train", seed=5, batch=2, text=60, start=0, stop=count))


def test_every_expert_begins_with_half_of_what_is_not_shared(dense):
    """Neuron by neuron: shared and both halves of a pair are the dense MLP's, each once, but for those drawn anew."""
    mixture = upcycled(dense, 4, seed=3)
    for old, new in zip(dense.model.language_model.layers, mixture.model.language_model.layers, strict=True):
        gate, shared = old.mlp.gate_proj.weight, new.mlp.shared_expert
        neurons = {tuple(row[:4].tolist()): index for index, row in enumerate(gate)}
        common = [neurons[tuple(row[:4].tolist())] for row in shared.gate_proj.weight]
        torch.testing.assert_close(shared.down_proj.weight, 2 * old.mlp.down_proj.weight[:, common], rtol=0, atol=0)
        seen = []
        for up, down in zip(new.mlp.experts.gate_up_proj, new.mlp.experts.down_proj, strict=True):
            rows = [neurons.get(tuple(row[:4].tolist())) for row in up[: len(up) // 2]]
            kept = [place for place, row in enumerate(rows) if row is not None]
            assert len(kept) == len(rows) // 2
            own = [rows[place] for place in kept]
            torch.testing.assert_close(up[len(rows) :][kept], old.mlp.up_proj.weight[own], rtol=0, atol=0)
            torch.testing.assert_close(down[:, kept], 2 * old.mlp.down_proj.weight[:, own], rtol=0, atol=0)
            assert down.count_nonzero() == len(down) * len(kept)  # those drawn anew say nothing
            seen.append(set(own))
        assert not set(common) & set.union(*seen)
        assert not seen[0] & seen[1]
        assert not seen[2] & seen[3]
        assert seen[0] != seen[2]
    for name, value in dense.state_dict().items():
        if ".mlp." not in name or "vision" in name:
            assert torch.equal(mixture.state_dict()[name], value), name
    assert mixture.generation_config.eos_token_id == dense.generation_config.eos_token_id


def test_a_pair_of_experts_and_the_shared_one_are_the_dense_mlp(dense, monkeypatch):
    """Where nothing is drawn anew: a token whose router sees no difference gets what the dense MLP gives it."""
    monkeypatch.setattr("llava_fa.world.mixture.DRAWN_ANEW", 0.0)
    sparse = upcycled(dense, 2).model.language_model.layers[0].mlp
    torch.nn.init.zeros_(sparse.gate.weight)
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sparse(x), dense.model.language_model.layers[0].mlp(x), atol=1e-5, rtol=1e-4)


def test_the_start_knows_most_of_what_the_dense_model_knows(processor, dense):
    learner = MixtureLearner(processor, mixture_recipe(8, 10), torch.device("cpu"))
    batch = batches(processor, 1)[0]
    with torch.no_grad():
        start = learner.losses(batch)["answer"]
        learner.model = upcycled(dense, 8)
        for layer in learner.model.model.language_model.layers:
            layer.mlp.experts.down_proj.zero_()
        without = learner.losses(batch)["answer"]
    assert start < 0.5 * without


@pytest.mark.parametrize("padding", [0, 5])
def test_the_balance_loss_is_transformers_own_for_one_layer(padding):
    logits = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = torch.arange(24) < 24 - padding
    expected = load_balancing_loss_func((logits,), 6, CHOSEN, real[None]) / CHOSEN
    torch.testing.assert_close(balance_loss([logits], real).double(), expected.double(), atol=1e-6, rtol=1e-6)


def test_the_balance_loss_is_one_when_all_are_busy_and_more_when_one_is():
    even = functional.one_hot(torch.arange(12) % 4, 4) * 9.0 + functional.one_hot((torch.arange(12) + 1) % 4, 4) * 9.0
    busy = (functional.one_hot(torch.zeros(12, dtype=torch.int64), 4) * 9.0) + functional.one_hot(
        torch.ones(12, dtype=torch.int64), 4
    ) * 9.0
    everyone = torch.ones(12, dtype=torch.bool)
    assert balance_loss([even], everyone) == pytest.approx(1, abs=1e-3)
    assert balance_loss([busy], everyone) == pytest.approx(2, abs=1e-2)
    # the mean of layers, though the busy experts of the two are not the same
    assert balance_loss([busy, busy.flip(1)], everyone) == pytest.approx(2, abs=1e-2)


def test_a_few_steps_on_one_batch_lower_the_loss(processor):
    recipe = dataclasses.replace(mixture_recipe(4, 4), warmup_steps=2, language_scale=0.1)
    learner = MixtureLearner(processor, recipe, torch.device("cpu"))
    before = [parameter.clone() for parameter in learner.model.model.vision_tower.parameters()]
    router = learner.model.model.language_model.layers[0].mlp.gate.weight.clone()
    batch = batches(processor, 1)[0]
    totals = []
    for _ in range(4):
        with torch.no_grad():
            totals.append(float(learner.total(learner.losses(batch))))
        learner.update(batch)
    assert totals[-1] < 0.7 * totals[0]
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.model.vision_tower.parameters(), strict=True))
    assert not torch.equal(router, learner.model.model.language_model.layers[0].mlp.gate.weight)


@pytest.mark.slow
def test_the_command_trains_a_mixture_that_answers(tmp_path, monkeypatch):
    """``--experts`` reaches the model on disk, which transformers reads and `llava-fa eval` asks."""
    monkeypatch.setattr("llava_fa.world.mixture.PICTURES", 1)
    out = tmp_path / "run"
    result = CliRunner().invoke(
        app, ["world", "train", str(out), "--experts", "4", "--steps", "1", "--workers", "0", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["validation"]) >= {"attributes", "counting"}
    config = json.loads((out / "model" / "config.json").read_text())["text_config"]
    assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == ("qwen2_moe", 4, CHOSEN)
    scored = CliRunner().invoke(app, ["eval", str(out / "model"), "--limit", "9", "--json"])
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_come_in_pairs(dense, experts):
    with pytest.raises(llava_fa.FourierError, match="even number"):
        upcycled(dense, experts)


def test_a_mixture_is_not_upcycled_again(dense):
    with pytest.raises(llava_fa.FourierError, match="qwen2_moe"):
        upcycled(upcycled(dense, 2), 2)


def test_a_mixture_has_a_start(tmp_path):
    with pytest.raises(llava_fa.FourierError, match="upcycled"):
        train(tmp_path, dataclasses.replace(mixture_recipe(4, 2), start=None), workers=0)


def test_visual_tokens_and_experts_are_refused_together(tmp_path):
    args = ["world", "train", str(tmp_path / "x"), "--experts", "4", "--visual-tokens", "fmvr"]
    assert CliRunner().invoke(app, args).exit_code == 2
    assert not (tmp_path / "x").exists()
