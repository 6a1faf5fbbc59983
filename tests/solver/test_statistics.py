import pytest
import torch

from llava_fa import FourierError
from llava_fa.solver.statistics import SecondMoment


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
