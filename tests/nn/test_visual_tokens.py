"""Nested grids and FMVR on plain tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llava_fa
from llava_fa.nn.visual_tokens import (
    KINDS,
    FrequencyRestoration,
    Modulation,
    VisualTokens,
    nested_grids,
    pool,
)


@pytest.mark.parametrize(
    ("side", "counts"),
    [
        (24, (576, 144, 36, 9, 1)),
        (8, (64, 16, 4, 1)),
        (27, (729, 196, 49, 16, 4, 1)),
        (16, (256, 64, 16, 4, 1)),
        (1, (1,)),
    ],
)
def test_the_sets_of_the_papers_and_of_other_grids(side, counts):
    assert VisualTokens((side, side), 8).counts == counts


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_grid_ends_in_one_token_by_steps_that_shrink(height, width):
    grids = nested_grids((height, width))
    assert grids[0] == (height, width)
    assert grids[-1] == (1, 1)
    sizes = [h * w for h, w in grids]
    assert sizes == sorted(set(sizes), reverse=True)


def test_pooling_is_the_mean_of_the_cells():
    maps = torch.randn(2, 3, 24, 24)
    six = pool(maps, nested_grids((24, 24))[1:3])
    torch.testing.assert_close(six, maps.unflatten(2, (6, 4)).unflatten(4, (6, 4)).mean((3, 5)))
    one = pool(maps, nested_grids((24, 24))[1:])
    torch.testing.assert_close(one[..., 0, 0], maps.mean((2, 3)))


def literal_fmvr(x, average, maximum):
    """As design/paper.md writes it, one line a line."""

    def modulate(p, lo, hi):
        low, high, a, b = (p[name].view(1, -1, 1, 1) for name in ("low", "high", "a", "b"))
        out = lo * low + hi * (1 + high)
        return x * hi * a + x * b + out

    lo = x.mean((2, 3), keepdim=True)
    first = modulate(average, lo, x - lo) + x
    hi = torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)
    return x + first + modulate(maximum, x - hi, hi)


def test_restoration_is_the_papers():
    torch.manual_seed(0)
    module = FrequencyRestoration(5)
    parameters = []
    for branch in (module.average, module.maximum):
        for parameter in branch.parameters():
            torch.nn.init.normal_(parameter)
        parameters.append(dict(branch.named_parameters()))
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(module(x), literal_fmvr(x, *parameters))
    assert torch.equal(module(x.bfloat16()), module(x.bfloat16().float()).bfloat16())


def test_restoration_starts_as_the_identity_and_everything_learns():
    module, x = FrequencyRestoration(4), torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(module(x), x, rtol=0, atol=1e-6)
    (module(x) * torch.randn(1, 4, 3, 3)).sum().backward()
    assert len(list(module.parameters())) == 8
    assert all(parameter.grad.abs().min() > 0 for parameter in module.parameters())


def test_reset_brings_the_start_back():
    module = VisualTokens((4, 4), 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.reset_parameters()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert {type(m) for m in module.modules()} >= {Modulation}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [0, 1])
def test_as_many_tokens_come_out_as_asked(kind, extra):
    module = VisualTokens((8, 8), 6, kind)
    features = torch.randn(3, extra + 64, 6)
    for count in (64, 16, 4, 1):
        module.tokens = count
        out = module(features)
        assert out.shape == (3, extra + count, 6)
        assert torch.equal(out[:, :extra], features[:, :extra])
    module.tokens = 64
    assert torch.equal(module(features), features)


def test_freshly_attached_fmvr_is_pooling_and_can_be_switched_off():
    features = torch.randn(2, 64, 6)
    fmvr, plain = VisualTokens((8, 8), 6, "fmvr", 16), VisualTokens((8, 8), 6, "pooling", 16)
    torch.testing.assert_close(fmvr(features), plain(features))
    torch.nn.init.ones_(fmvr.restoration[0].average.b)
    assert (fmvr(features) - plain(features)).abs().max() > 0.1
    fmvr.restored = False
    assert torch.equal(fmvr(features), plain(features))


def test_a_number_the_grid_cannot_give_lists_those_it_can():
    with pytest.raises(llava_fa.FourierError, match=r"24×24 cannot give 100 .* 576, 144, 36, 9, 1"):
        VisualTokens((24, 24), 4, tokens=100)
    module = VisualTokens((8, 8), 4)
    with pytest.raises(llava_fa.FourierError, match="64, 16, 4, 1"):
        module.tokens = 0
    assert module.tokens == 64


def test_other_mistakes_are_named():
    with pytest.raises(llava_fa.FourierError, match="fmvr, pooling"):
        VisualTokens((8, 8), 4, "magic")
    with pytest.raises(llava_fa.FourierError, match="gives 60 tokens, too few for a grid of 8×8"):
        VisualTokens((8, 8), 4)(torch.randn(1, 60, 4))
