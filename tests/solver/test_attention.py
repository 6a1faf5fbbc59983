"""CASP's quantities: density, the bound it gives, factors that are optimal in the whitened norm."""

from __future__ import annotations

import math

import pytest
import torch
from attention_bound import attention_error_bound, logit_error_bound
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa import FourierError
from llava_fa.solver import attention


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment_of(n, seed=0):
    mix = random(n, n, seed=seed) * torch.logspace(0, -2, n, dtype=torch.float64)
    return mix @ mix.T


def test_density_by_counting():
    maps = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert attention.largest_entries(maps, 0.05).tolist() == [3, 4, 1]
    assert attention.largest_entries(maps, 0.2).tolist() == [2, 4, 1]
    assert attention.largest_entries(maps, 0.0).tolist() == [3, 4, 4]
    assert float(attention.attention_density(maps, epsilon=0.05)) == pytest.approx(8 / 12)
    heads = torch.stack([maps, maps.flip(1)])
    assert attention.attention_density(heads).tolist() == pytest.approx([8 / 12, 8 / 12])


def test_density_of_a_causal_map_is_a_share_of_what_it_may_see():
    causal = torch.tril(torch.ones(5, 5))
    uniform = causal / causal.sum(1, keepdim=True)
    assert float(attention.attention_density(uniform, causal.bool(), 0)) == 1
    assert float(attention.attention_density(torch.eye(5), causal.bool())) == pytest.approx(5 / 15)
    padded = uniform.clone()
    padded[:2] = 0  # rows of padding
    assert attention.largest_entries(padded, 0).tolist() == [0, 0, 3, 4, 5]


def test_what_is_no_attention_map():
    with pytest.raises(FourierError, match="epsilon is 1"):
        attention.largest_entries(torch.eye(2), 1)
    with pytest.raises(FourierError, match="negative or non-finite entries"):
        attention.attention_density(-torch.eye(2))
    with pytest.raises(FourierError, match=r"a mask \[3, 3\] for attention maps \[2, 2\]"):
        attention.attention_density(torch.eye(2), torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(FourierError, match="density 2"):
        attention_error_bound(2.0, 0.1, (3, 9))


def rotate(x, angle_step=0.7):
    """Rotary embedding: pairs (j, j + d/2) of row i turned by i times the pair's frequency."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * angle_step ** torch.arange(half, dtype=x.dtype)
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()], dim=-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 24),
    sharpness=st.floats(0.05, 30),
    error=st.floats(1e-4, 2),
    epsilon=st.floats(0, 0.3),
    causal=st.booleans(),
)
def test_the_bound_holds(seed, rows, sharpness, error, epsilon, causal):
    """Measured from compressed q and k, through the rotary embedding, to the map: never more than the bound."""
    n, d = 12, 8
    x = random(rows, n, seed=seed)
    w_q, w_k = random(d, n, seed=seed + 1), random(d, n, seed=seed + 2)
    e_q, e_k = error * random(d, n, seed=seed + 3) / n, error * random(d, n, seed=seed + 4) / n
    scaling = sharpness / n / math.sqrt(d)
    q, k, q_error, k_error = x @ w_q.T, x @ w_k.T, x @ e_q.T, x @ e_k.T
    allowed = torch.ones(rows, rows, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed

    def maps(q, k):
        logits = scaling * rotate(q) @ rotate(k).T
        return logits, logits.masked_fill(~allowed, -torch.inf).softmax(-1)

    (z, s), (z_hat, s_hat) = maps(q, k), maps(q + q_error, k + k_error)
    delta = logit_error_bound(q, k, q_error, k_error, scaling)
    assert float((z_hat - z).abs().max()) <= delta * (1 + 1e-9)
    density = float(attention.attention_density(s, allowed, epsilon))
    shape = (rows, int(allowed.sum()))
    assert float((s_hat - s).norm()) <= attention_error_bound(density, delta, shape, epsilon) * (1 + 1e-9)
    # the sparser, the less can go wrong; and no error, no bound
    assert attention_error_bound(density / 2, delta, shape, epsilon) <= attention_error_bound(
        density, delta, shape, epsilon
    )
    assert attention_error_bound(density, 0.0, shape, epsilon) == 0


def test_the_bound_is_met():
    """Two entries change places, logits moved by ∓Δ: no smaller constant would do."""
    delta = 0.3
    before = torch.tensor([[delta / 2, -delta / 2]], dtype=torch.float64).softmax(-1)
    measured = float((before.flip(1) - before).norm())
    assert measured == pytest.approx(attention_error_bound(1.0, delta, (1, 2), 0.0), rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 16), (8, 16), (16, 16)])  # k_proj of grouped-query attention is wide
@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_factors_are_optimal_in_the_whitened_norm(shape, kind):
    m, n = shape
    weight, moment = random(m, n), moment_of(n)
    if kind == "diagonal":
        moment = torch.diag(moment.diagonal())
    if kind == "none":
        moment = torch.eye(n, dtype=torch.float64)
    given = {"full": moment, "diagonal": moment.diagonal(), "none": None}[kind]
    left, right = attention.whitened_factors(weight.float(), 4, None if given is None else given.float(), damping=1e-9)
    error = weight - left.double() @ right.double()
    measured = float(((error @ moment) * error).sum())
    values, vectors = torch.linalg.eigh(moment)
    symmetric_root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # another root: the optimum does not know which
    best = float(torch.linalg.svdvals(weight @ symmetric_root)[4:].square().sum())
    assert measured == pytest.approx(best, rel=1e-3)
    plain = torch.linalg.svd(weight, full_matrices=False)
    cut = weight - plain.U[:, :4] * plain.S[:4] @ plain.Vh[:4]
    assert kind == "none" or measured < 0.9 * float(((cut @ moment) * cut).sum())


def test_both_factors_have_their_share():
    """‖l_j‖² = S_j of the whitened weight: neither factor is left with all of the spectrum."""
    weight, moment = random(12, 16), moment_of(16)
    left, right = attention.whitened_factors(weight.float(), 4, moment.float(), damping=1e-6)
    root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(16))
    values = torch.linalg.svdvals(weight @ root)[:4]
    assert left.square().sum(0).tolist() == pytest.approx(values.tolist(), rel=1e-3)
    shared = (right.double() @ moment @ right.double().T).diagonal()
    assert shared.tolist() == pytest.approx(values.tolist(), rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_the_left_factor_is_refitted_to_the_right_one_that_is_stored(kind):
    weight, moment = random(10, 12).float(), moment_of(12).float()
    given = {"full": moment, "diagonal": moment.diagonal(), "none": None}[kind]
    _, right = attention.whitened_factors(weight, 4, given)
    right = right + 0.3 * random(*right.shape, seed=9).float()  # what codes do to it
    left = attention.refit_left(weight, right, given, damping=1e-12)
    whole = {"full": moment, "diagonal": torch.diag(moment.diagonal()), "none": torch.eye(12)}[kind]
    gradient = (weight - left @ right) @ whole @ right.T
    assert float(gradient.norm()) < 1e-3 * float((weight @ whole @ right.T).norm())
    assert not attention.refit_left(weight, torch.zeros(4, 12), given).any()


def test_widths():
    assert attention.inner_rank((256, 256), 0.25) == 32
    assert attention.inner_rank((128, 256), 0.25) == 20  # 21.3: even
    assert attention.inner_rank((20, 16), 0.01) == 2
    assert attention.inner_rank((17, 17), 1.0) == 8
    with pytest.raises(FourierError, match=r"a share of 1\.5"):
        attention.inner_rank((20, 16), 1.5)
    with pytest.raises(FourierError, match="3 is an odd number of factors"):
        attention.whitened_factors(torch.randn(8, 8), 3, None)
    with pytest.raises(FourierError, match="above min"):
        attention.whitened_factors(torch.randn(8, 8), 10, None)
