"""Everything that is done to a matrix stays on the device of that matrix."""

import pytest
import torch
from elsewhere import DEVICE, Elsewhere

from llava_fa import FourierConfig, approximate, native
from llava_fa.solver import check
from llava_fa.solver.check import fitting_checks
from llava_fa.solver.drift import corrected_weight

CONFIGS = {
    "rings": FourierConfig(bits=2, codes="rings"),
    "rings, rank": FourierConfig(bits=2, codes="rings", rank=4),
    "trellis": FourierConfig(bits=2, codes="trellis"),
    "paper": FourierConfig(method="paper", amplitude_bits=2, phase_bits=2, rank=4),
}


def layer(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return torch.randn(m, n, generator=generator), x.T @ x / len(x)


@pytest.fixture(autouse=True)
def pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on another device runs here, too: the same bits can be asked for."""
    monkeypatch.setenv(native.SWITCH, "off")


def test_the_device_of_these_tests_tells_tensors_apart():
    with Elsewhere():
        there = torch.ones(3).to(DEVICE)
        assert there.new_zeros(2).device == (there * 2).device == DEVICE
        there[0] = 5
        assert there.cpu().tolist() == [5, 1, 1]
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)


@pytest.mark.parametrize("given", ["nothing", "diagonal", "moment"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_approximated_where_it_is(name, given):
    weight, moment = layer(20, 36)
    known = {"nothing": None, "diagonal": moment.diagonal().contiguous(), "moment": moment}[given]
    expected = approximate(weight, CONFIGS[name], known)
    with Elsewhere():
        found = approximate(weight.to(DEVICE), CONFIGS[name], None if known is None else known.to(DEVICE))
        assert {tensor.device for tensor in found.tensors.values()} == {DEVICE}
        for key, tensor in found.tensors.items():
            assert torch.equal(tensor.cpu(), expected.tensors[key]), key
        assert torch.equal(found.dequantize().cpu(), expected.dequantize())
    assert (found.weight_error, found.output_error) == (expected.weight_error, expected.output_error)


def test_the_doctor_compares_what_is_fitted_there_with_the_cpus(monkeypatch):
    with Elsewhere():
        checks = list(fitting_checks(DEVICE))
        assert [(row["error"], row["ok"]) for row in checks] == [(0.0, True)] * 4
        other = approximate(layer(20, 36)[0], CONFIGS["rings"])
        wrong = {DEVICE: lambda *_: other, torch.device("cpu"): approximate}
        monkeypatch.setattr(check, "approximate", lambda weight, *rest: wrong[weight.device](weight, *rest))
        assert not any(row["ok"] for row in fitting_checks(DEVICE))


@pytest.mark.parametrize("shape", [(5, 8), (9, 8)])
def test_drift_is_made_up_for_where_the_weight_is(shape):
    weight, moment = layer(*shape)
    drift = 0.1 * moment + 0.01
    expected = corrected_weight(weight, moment, drift)
    with Elsewhere():
        found = corrected_weight(weight.to(DEVICE), moment.to(DEVICE), drift.to(DEVICE))
        assert found.device == DEVICE
        assert torch.equal(found.cpu(), expected)
