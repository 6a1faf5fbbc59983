"""Products by bf16 matrix instructions, held to float64 and to PyTorch's float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa import native
from llava_fa.maths import products

WORST = 2.0**-14
"""Of a product, beside the norms of what is multiplied: three parts of 2^-16 are left out, and float32 adds its own."""


@pytest.fixture
def _tiles(monkeypatch):
    if not native.multiplies(torch.zeros(1)):
        pytest.skip("this CPU has no bf16 matrix instructions: tests/kernels/test_builds.py emulates them")
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "_SIDE", 1)


def matrix(rows: int, columns: int, seed: int, layout: str = "rows", exact: bool = False) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16().float() if exact else x
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "part":
        whole = torch.full((rows + 3, columns + 5), torch.nan)
        whole[1 : rows + 1, 2 : columns + 2] = x
        return whole[1 : rows + 1, 2 : columns + 2]
    if layout == "apart":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


layouts = st.sampled_from(["rows", "columns", "part", "apart"])


@pytest.mark.usefixtures("_tiles")
@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 140), st.integers(1, 140), st.integers(1, 140), layouts, layouts, st.booleans(), st.booleans(),
    st.sampled_from([-1, 0, 1]),
)  # fmt: skip
def test_is_the_product_to_its_bound(m, n, k, of_a, of_b, exact_a, exact_b, sign):
    a, b = matrix(m, k, 0, of_a, exact_a), matrix(k, n, 1, of_b, exact_b)
    room = matrix(m, n, 2, "part")
    before = room.clone()
    if sign:
        found = products.add_product(room, a, b, sign)
        expected = before.double() + sign * (a.double() @ b.double())
        assert found.data_ptr() == room.data_ptr()
    else:
        found = products.product(a, b)
        expected = a.double() @ b.double()
    bound = a.double().abs() @ b.double().abs() * (2.0**-22 * k**0.5 if exact_a and exact_b else WORST)
    assert bool(((found - expected).abs() <= bound + 2.0**-22 * before.abs()).all())


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("shape", [(4200, 70, 40), (40, 70, 4200), (70, 2100, 130), (33, 1025, 129)])
def test_is_made_of_parts_where_it_is_large(shape):
    m, k, n = shape
    a, b = matrix(m, k, 0), matrix(k, n, 1)
    torch.testing.assert_close(products.product(a, b), a @ b, rtol=0, atol=4e-5 * k**0.5)


@pytest.mark.usefixtures("_tiles")
def test_a_rough_one_is_that_of_what_is_rounded_to_bf16():
    a, b, c = matrix(100, 200, 0), matrix(200, 90, 1, "columns"), matrix(100, 90, 2)
    rounded = a.bfloat16().float(), b.bfloat16().float()
    assert torch.equal(products.product(a, b, rough=True), products.product(*rounded))
    assert torch.equal(
        products.add_product(c.clone(), a, b, -1, rough=True), products.add_product(c.clone(), *rounded, -1)
    )


@pytest.mark.usefixtures("_tiles")
def test_threads_change_nothing():
    a, b = matrix(300, 1100, 0), matrix(1100, 90, 1)
    alone = products.product(a, b)
    torch.set_num_threads(3)
    try:
        assert torch.equal(products.product(a, b), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("_tiles")
def test_rows_and_columns_do_not_depend_on_those_beside_them():
    a, b = matrix(100, 200, 0), matrix(200, 100, 1)
    b[:, 50:] = b[:, 50:].bfloat16().float()
    whole = products.product(a, b)
    assert torch.equal(products.product(a[32:64], b), whole[32:64])
    assert torch.equal(products.product(a, b[:, 50:]), whole[:, 50:])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_vanish(value):
    a, b = matrix(40, 50, 0), matrix(50, 60, 1)
    a[7, 11] = value
    found = products.product(a, b)
    assert not torch.isfinite(found[7]).any()
    assert torch.isfinite(found[torch.arange(40) != 7]).all()
    a = a.view(torch.int32).clone()
    a[7, 11] = 0x7FFFFFFF  # a NaN that rounds up to a zero, as bits
    assert torch.isnan(products.product(a.view(torch.float32), b)[7]).all()


def test_small_ones_and_other_dtypes_are_pytorchs():
    a, b = matrix(40, 50, 0), matrix(50, 60, 1)
    assert torch.equal(products.product(a, b), a @ b)
    assert torch.equal(products.product(a.double(), b.double()), a.double() @ b.double())
    c = matrix(40, 60, 2)
    assert torch.equal(products.add_product(c.clone(), a, b, -1), torch.addmm(c, a, b, alpha=-1))


def test_without_the_library_it_is_pytorchs():
    a, b = matrix(40, 50, 0), matrix(50, 60, 1)
    with native.using("off"):
        assert torch.equal(products.product(a, b), a @ b)
