import pytest
import torch

from llava_fa import FourierError
from llava_fa.solver import statistics
from llava_fa.solver.statistics import Drift, SecondMoment


def test_any_split_gives_the_same_moment():
    x = torch.randn(2, 3000, 6, generator=torch.Generator().manual_seed(0))
    whole, pieces, diagonal = SecondMoment(6), SecondMoment(6), SecondMoment(6, diagonal=True)
    whole.add(x)
    for piece in x.reshape(-1, 6).split(700):
        pieces.add(piece)
        diagonal.add(piece)
    flat = x.reshape(-1, 6).double()
    exact = (flat.T @ flat / 6000).float()
    assert torch.allclose(whole.value(), exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(pieces.value(), exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(diagonal.value(), exact.diagonal(), rtol=1e-5)
    assert torch.equal(whole.value(), whole.value().T)
    assert whole.count == pieces.count == 6000


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_a_few_rows_at_a_time_give_the_same(rows, monkeypatch):
    x, seen = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(statistics, "_ROWS", rows)
    moment, drift = SecondMoment(7), Drift(7)
    moment.add(seen)
    drift.add(x, seen)
    assert torch.equal(moment.value(), moment.value().T)
    assert torch.allclose(moment.value(), seen.T @ seen / 50, rtol=1e-5, atol=1e-6)
    assert torch.allclose(drift.value(), (x - seen).T @ seen / 50, rtol=1e-5, atol=1e-6)


def test_many_samples_lose_nothing():
    """A float32 accumulator would stop growing at 2²⁴ ones."""
    moment = SecondMoment(1, diagonal=True)
    moment._sum += 2.0**25
    moment.count = 2**25
    for _ in range(16):
        moment.add(torch.ones(1, 1))
    assert float(moment._sum) == 2.0**25 + 16


def test_half_precision_is_accepted():
    moment = SecondMoment(2)
    moment.add(torch.tensor([[300.0, 1.0]], dtype=torch.float16))
    assert moment.value()[0, 0] == 90000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("diagonal", [True, False])
def test_non_finite_inputs_name_the_layer(bad, diagonal):
    moment = SecondMoment(3, name="language_model.layers.4.mlp.down_proj", diagonal=diagonal)
    x = torch.zeros(2, 3)
    x[1, 2] = bad
    with pytest.raises(FourierError, match=r"^language_model\.layers\.4\.mlp\.down_proj: .*NaN or infinite"):
        moment.add(x)


def test_wrong_width_and_nothing_seen():
    with pytest.raises(FourierError, match=r"up: inputs of shape \(2, 4\). Expected \[\.\.\., 3\]"):
        SecondMoment(3, name="up").add(torch.zeros(2, 4))
    with pytest.raises(FourierError, match="up: no input reached this layer"):
        SecondMoment(3, name="up").value()


def test_the_sums_can_be_given_up(monkeypatch):
    monkeypatch.setattr(statistics, "_ROWS", 3)
    moment = SecondMoment(7)
    moment.add(torch.randn(20, 7, generator=torch.Generator().manual_seed(0)))
    kept = moment.value()
    assert torch.equal(moment.value(spend=True), kept)
    assert not moment._panels
