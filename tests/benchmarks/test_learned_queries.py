"""The baseline of `benchmarks/visual_tokens.py`: it starts as the model it is attached to, and learns."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from llava_fa.hub import visual_tokens
from llava_fa.hub.loading import load
from llava_fa.hub.source import resolve_model
from llava_fa.nn.visual_tokens import nested_grids
from llava_fa.world.elastic import elastic_recipe
from llava_fa.world.packing import WorldBatches
from llava_fa.world.training import save_pretrained

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from learned_queries import (
    NOWHERE,
    LearnedQueries,
    QueryLearner,
    QueryTokens,
    coarse_to_fine,
    places,
    with_queries,
)


@pytest.fixture
def queries(monkeypatch):
    """`with_queries`, for one test."""
    for name in ("VisualTokens", "RETIRED"):
        monkeypatch.setattr(visual_tokens, name, getattr(visual_tokens, name))
    with_queries()


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (27, 27), (5, 3)])
def test_truncated_order_covers_the_picture(grid):
    order = coarse_to_fine(grid)
    assert sorted(order) == list(range(grid[0] * grid[1]))
    for height, width in nested_grids(grid):
        cells = {(i // grid[1] * height // grid[0], i % grid[1] * width // grid[1]) for i in order[: height * width]}
        assert len(cells) == height * width


def test_queries_start_from_the_grids_own_tokens_and_can_be_cut_anywhere():
    queries = LearnedQueries(6, (4, 4))
    tokens = torch.randn(2, 16, 6)
    assert torch.equal(queries(tokens, 16), tokens)
    assert torch.equal(queries(tokens, 7), tokens[:, sorted(queries.order[:7])])
    torch.nn.init.normal_(queries.o_proj.weight)
    out = queries(tokens, 7)
    changed = tokens.clone()
    changed[:, queries.order[-1]] += 1  # a patch that is not kept is still seen
    assert (queries(changed, 7) - out).abs().max() > 1e-4


@pytest.mark.parametrize("extra", [0, 1])
def test_as_many_tokens_come_out_as_asked(extra):
    module = QueryTokens((8, 8), 6, "queries")
    features = torch.randn(3, extra + 64, 6)
    for count in (64, 16, 4, 1):
        module.tokens = count
        out = module(features)
        assert out.shape == (3, extra + count, 6)
        assert torch.equal(out[:, :extra], features[:, :extra])
    module.tokens = 64
    assert torch.equal(module(features), features)


def test_cut_queries_are_looked_for_only_where_they_are():
    shown_by = places(QueryTokens((8, 8), 4, "queries"), 5)
    assert sorted(place for place in shown_by if place != NOWHERE) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("queries")
def test_one_step_reaches_everything_and_the_model_comes_back_from_its_folder(tmp_path):
    processor = AutoProcessor.from_pretrained(resolve_model("tiny"))
    learner = QueryLearner(processor, elastic_recipe("queries", 2), torch.device("cpu"))
    batch = WorldBatches(processor.tokenizer, split="train", seed=5, batch=8, text=60, start=0, stop=1)[0]
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    losses = learner.update(batch)
    assert sum(name.startswith("answer") for name in losses) == 4
    after = learner.model.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    # the tower's last norm is for the pooled output alone, and zero projections hide queries for one step
    hidden = ("post_layernorm", "queries.query_embed", "queries.q_proj", "queries.k_proj", "queries.v_proj")
    assert [name for name in still if not any(part in name for part in hidden)] == []
    save_pretrained(learner.model, processor, tmp_path)
    model, _ = load(tmp_path, "cpu", torch.float32, visual_tokens=4)
    module = visual_tokens.visual_tokens_of(model)
    assert (module.kind, module.tokens) == ("queries", 4)
    assert module.queries.o_proj.weight.abs().max() > 0
