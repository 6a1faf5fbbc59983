"""The recipe's loss over all scales of visual tokens."""

import pytest
import torch
from transformers import AutoProcessor

import llava_fa
from llava_fa.hub.loading import load
from llava_fa.hub.source import resolve_model
from llava_fa.hub.visual_tokens import attach_visual_tokens, visual_tokens_of
from llava_fa.nn.visual_tokens import VisualTokens
from llava_fa.world.elastic import ElasticLearner, cells, shared_out, shortened
from llava_fa.world.packing import PREFIX, WorldBatches
from llava_fa.world.recipe import Recipe
from llava_fa.world.training import train

RECIPE = Recipe(
    vision_steps=0,
    language_steps=2,
    cooldown_steps=1,
    frozen_steps=0,
    language_batch=8,
    wordy_batch=0,
    text_tokens=60,
    start="tiny",
    visual_tokens="fmvr",
)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(resolve_model("tiny"))


def batch_of(processor, pictures=8, **more):
    return WorldBatches(processor.tokenizer, split="train", seed=5, batch=pictures, text=60, start=0, stop=1, **more)[0]


def test_some_pictures_are_full_of_writing_and_asked_about(processor):
    """Every third of them; at other places in the next batch, so that no scale of `shared_out` gets them all."""
    plain, more = (batch_of(processor, 9, tasks=("reading",), written=written) for written in (0, 3))
    written = (plain["pixels"] != more["pixels"]).flatten(1).any(1)
    assert written.nonzero().flatten().tolist() == [0, 3, 6]
    assert more["character"][::3].count_nonzero() > 2 * plain["character"][::3].count_nonzero()
    assert (more["segment"][::3].amax(1) >= 2).all()


def test_inner_scales_get_more_pictures():
    assert shared_out(8, 4) == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert sorted(i for share in shared_out(13, 4) for i in share) == list(range(13))
    with pytest.raises(llava_fa.FourierError, match="batch of 8 or more"):
        shared_out(7, 4)


def test_shortened_sequences_point_at_the_same_things(processor):
    batch = batch_of(processor)
    tokens = VisualTokens((8, 8), 4)
    short = shortened(batch, 16, cells(tokens, 16))
    assert short["ids"].shape[1] == batch["ids"].shape[1] - 48
    assert torch.equal(short["ids"][:, 17:], batch["ids"][:, PREFIX:])
    asked = short["segment"] > 0
    assert torch.equal(short["position"][asked], batch["position"][batch["segment"] > 0] - 48)
    text = batch["look_from"] >= PREFIX
    assert torch.equal(short["look_from"][text], batch["look_from"][text] - 48)
    for target in (1, 2, 9, 10):  # the first cell's four patches
        assert set(short["look_to"][batch["look_to"] == target].tolist()) <= {1}
    assert set(short["look_to"][batch["look_to"] == 64].tolist()) <= {16}
    for same in (-1, 0):
        assert torch.equal(short["look_to"] == same, batch["look_to"] == same)


def test_a_scale_sees_what_the_model_would_be_given(processor):
    """The packed answer at a scale has the loss that the model itself gives to that question."""
    learner = ElasticLearner(processor, RECIPE, torch.device("cpu"))
    learner.autocast = False
    learner.model.eval()
    for parameter in learner.tokens.restoration.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(processor, 1)
    with torch.no_grad():
        reduced = learner.tokens(learner._patches(batch["pixels"]), 4)
        short = shortened(batch, 4, cells(learner.tokens, 4))
        hidden = learner._answer_states(reduced, short)[0]
        first = (short["segment"][0] == 1).nonzero()[:, 0]
        packed = learner.model.lm_head(hidden[first])
        learner.tokens.tokens = 4
        ids = torch.cat([short["ids"][:, :5], short["ids"][:, first]], 1)
        pixels = (batch["pixels"].float() / 255 - 0.5) / 0.25
        alone = learner.model(input_ids=ids, pixel_values=pixels).logits[0, 5:]
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-3)


def test_one_step_reaches_everything(processor):
    learner = ElasticLearner(processor, RECIPE, torch.device("cpu"))
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    losses = learner.update(batch_of(processor))
    assert sum(name.startswith("answer") for name in losses) == 4
    after = learner.model.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    # the tower's last norm is for the pooled output alone, and a single token is its own mean and maximum
    hidden = ("post_layernorm", "restoration.2.average.high", "restoration.2.average.a", "restoration.2.maximum.low")
    assert [name for name in still if not any(part in name for part in hidden)] == []


def test_trained_saved_and_answering(tmp_path):
    train(tmp_path, RECIPE, workers=0, save_every=1, check_every=100, check_batches=0)
    model, processor = load(tmp_path / "model", "cpu", visual_tokens=4)
    assert visual_tokens_of(model).kind == "fmvr"
    assert visual_tokens_of(model).restoration[0].maximum.low.abs().max() > 0
    assert processor.patch_size == 48


def test_needs_a_trained_model(processor):
    with pytest.raises(llava_fa.FourierError, match="on questions only"):
        ElasticLearner(processor, Recipe(visual_tokens="fmvr"), torch.device("cpu"))


def test_plain_pooling_of_the_embedded_model_runs():
    model, processor = load("tiny", "cpu", torch.float32)
    attach_visual_tokens(model, processor, 16, "pooling")
    from llava_fa.eval.runner import evaluate_world

    result = evaluate_world(model, processor, limit=9, elastic=True)
    assert set(result["visual_tokens"]) == {"mean_tokens", "tokens_spent", "flops_share", "enough"}
    assert result["visual_tokens"]["tokens_spent"] > result["visual_tokens"]["mean_tokens"]
