"""The loss: masked, zero for one's own teacher, the same from a cache."""

import helpers
import pytest
import torch

from llava_fa import FourierError
from llava_fa.train.loss import IGNORED, ModelTeacher, RecoveryLoss, Targets, answers, divergence


@pytest.fixture(scope="module")
def models():
    return helpers.random_llava(0), helpers.random_llava(1)


@pytest.fixture(scope="module")
def batch():
    inputs = dict(helpers.inputs_for(helpers.processor()))
    ids = inputs["input_ids"].repeat(2, 1)
    labels = torch.full_like(ids, IGNORED)
    labels[0, -3:], labels[1, -6:-1] = ids[0, -3:], ids[1, -6:-1]
    pixels = torch.cat([inputs["pixel_values"], -inputs["pixel_values"]])
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_cross_entropy_is_that_of_transformers(models, batch):
    found = RecoveryLoss(None, cross_entropy=1.0)(models[0], batch)
    torch.testing.assert_close(found["loss"], models[0](**batch).loss)
    assert set(found) == {"loss", "cross_entropy"}


def test_a_model_is_its_own_best_teacher(models, batch):
    loss = RecoveryLoss(ModelTeacher(models[0]), hidden=1.0)
    own, other = loss(models[0], batch), loss(models[1], batch)
    assert own["divergence"] == pytest.approx(0, abs=1e-6)
    assert own["hidden"] == pytest.approx(0, abs=1e-6)
    assert other["divergence"] > 0.01
    assert other["hidden"] > 0.1
    assert own["loss"] == pytest.approx(0.2 * own["cross_entropy"].item(), abs=1e-5)


def test_divergence_is_that_of_its_definition(models, batch):
    p, labels, _ = answers(models[0], batch)
    q = answers(models[1], batch)[0]
    assert labels.tolist() == batch["labels"][batch["labels"] != IGNORED].tolist()
    for temperature in (1.0, 2.0):
        log_p, log_q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
        expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        torch.testing.assert_close(divergence(q, Targets(p.log_softmax(-1)), temperature), expected)


def test_the_likeliest_tokens_and_the_rest(models, batch):
    p, q = (answers(model, batch)[0].log_softmax(-1) for model in models)
    exact = divergence(q, Targets(p))
    all_of_it = p.topk(p.shape[-1], -1)
    torch.testing.assert_close(divergence(q, Targets(*all_of_it)), exact, atol=1e-4, rtol=1e-3)
    few = p.topk(8, -1)
    assert 0 < divergence(q, Targets(*few)) < exact  # joining outcomes only loses
    cached = {**batch, "teacher_log_p": few.values, "teacher_ids": few.indices}
    found = RecoveryLoss(None)(models[1], cached)["divergence"]
    torch.testing.assert_close(found, divergence(q, Targets(*few)))


def test_what_cannot_be_compared(models, batch):
    logits = torch.zeros(2, 5)
    with pytest.raises(FourierError, match="vocabulary of 4, the student of 5"):
        divergence(logits, Targets(torch.zeros(2, 4)))
    with pytest.raises(FourierError, match="no answer"):
        answers(models[0], {**batch, "labels": torch.full_like(batch["labels"], IGNORED)})


def test_certainty_is_no_nan():
    certain = torch.tensor([[0.0, float("-inf"), float("-inf")]])
    assert divergence(torch.zeros(1, 3), Targets(certain)).item() == pytest.approx(torch.tensor(3.0).log().item())
