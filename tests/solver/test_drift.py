"""The weight that makes up for what earlier layers have spoilt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa.errors import FourierError
from llava_fa.solver.drift import corrected_weight
from llava_fa.solver.statistics import Drift, SecondMoment


def pairs(n: int, count: int, seed: int, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator, dtype=torch.float64)
    given = 0.8 * x + 0.3 * torch.randn(count, n, generator=generator, dtype=torch.float64)
    return torch.randn(rows or n + 1, n, generator=generator, dtype=torch.float64), x, given


@given(st.integers(1, 12), st.integers(1, 40), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_it_is_the_minimiser(n, count, damping, seed, data):
    """No neighbour has a smaller loss, E‖W x - V x̂‖² + δ‖V - W‖², computed from the samples in float64."""
    weight, x, seen = pairs(n, count, seed, rows=data.draw(st.integers(1, n + 1)))
    moment, drift = seen.T @ seen / count, (x - seen).T @ seen / count
    found = corrected_weight(weight, moment.float(), drift.float(), damping).double()
    delta = damping * moment.diagonal().mean()

    def loss(v: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T - seen @ v.T).square().sum() / count + delta * (v - weight).square().sum()

    for step in torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64):
        assert loss(found) <= loss(found + 0.1 * step)
    assert loss(found) <= loss(weight) * (1 + 1e-5)


def test_without_drift_or_inputs_it_is_the_weight():
    weight = torch.randn(3, 4)
    zero = torch.zeros(4, 4)
    assert torch.equal(corrected_weight(weight, torch.eye(4), zero), weight)
    assert torch.equal(corrected_weight(weight, zero, zero), weight)


def test_a_known_drift_is_undone():
    """Where x̂ = x / 2 always, W* = 2 W as the damping vanishes."""
    weight, x, _ = pairs(5, 200, 0)
    seen = x / 2
    drift = ((x - seen).T @ seen / 200).float()
    found = corrected_weight(weight, (seen.T @ seen / 200).float(), drift, 1e-6)
    torch.testing.assert_close(found, 2 * weight.float(), rtol=1e-4, atol=1e-4)


def test_drift_adds_up_over_dtypes_and_slices():
    x, seen = torch.randn(3, 5000, 6), torch.randn(3, 5000, 6)
    drift = Drift(6)
    drift.add(x[:1], seen[:1])
    drift.add(x[1:].half(), seen[1:].half())
    before, after = (torch.cat([v[:1].double(), v[1:].half().double()]).flatten(0, 1) for v in (x, seen))
    torch.testing.assert_close(drift.value(), ((before - after).T @ after / 15000).float(), rtol=1e-4, atol=1e-5)


def test_bad_inputs_name_the_layer():
    drift = Drift(2, name="block.fc1")
    with pytest.raises(FourierError, match=r"block\.fc1"):
        drift.value()
    with pytest.raises(FourierError, match=r"block\.fc1.*original model"):
        drift.add(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    moment = SecondMoment(2)
    moment.add(torch.ones(1, 2))
    assert corrected_weight(torch.eye(2), moment.value(), torch.full((2, 2), 0.5)).isfinite().all()


def test_through_the_weight_it_is_the_same():
    """Of a weight with fewer rows than columns, W D is enough."""
    generator = torch.Generator().manual_seed(0)
    weight, x, seen = (torch.randn(size, 12, generator=generator) for size in (5, 300, 300))
    moment, whole, through = SecondMoment(12), Drift(12), Drift(12, weight=weight)
    moment.add(seen)
    for drift in (whole, through):
        drift.add(x, seen)
    torch.testing.assert_close(through.value(), weight @ whole.value(), rtol=1e-4, atol=1e-5)
    found = corrected_weight(weight, moment.value(), through.value())
    assert not torch.equal(found, weight)
    torch.testing.assert_close(found, corrected_weight(weight, moment.value(), whole.value()), rtol=1e-4, atol=1e-5)


def test_inputs_a_thousand_times_as_large_as_others_cost_no_precision():
    """Against float64, in the norm of the outputs: what float32 loses is far below what any code does."""
    n, count = 96, 400
    weight, x, seen = pairs(n, count, 1)
    scale = torch.ones(n, dtype=torch.float64)
    scale[[3, 50]] = 1e3
    x, seen = x * scale, seen * scale
    moment, drift = seen.T @ seen / count, (x - seen).T @ seen / count
    delta = 0.1 * moment.diagonal().mean()
    change = weight @ drift @ torch.linalg.inv(moment + delta * torch.eye(n))
    found = corrected_weight(weight, moment.float(), drift.float()).double() - weight.float().double()
    assert torch.linalg.matrix_norm((found - change) @ seen.T) < 1e-5 * torch.linalg.matrix_norm(weight @ seen.T)
