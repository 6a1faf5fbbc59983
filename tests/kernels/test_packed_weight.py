"""A packed weight as one value: its orders, and its rows (a shard)."""

from __future__ import annotations

import pytest
import torch
from packed_layers import LAYOUTS, best, layout_id, paper, random_weight, trellis

from llava_fa import FourierError
from llava_fa.kernels import definition, run
from llava_fa.kernels.packed import best_weight, order_of, paper_weight, take_rows

ORDERS = ("stored", "interleaved", "words")
BEST = [layout for layout in LAYOUTS if layout.method == "best"]


@pytest.mark.parametrize("layout", BEST, ids=layout_id)
def test_every_order_is_the_same_weight(layout):
    weight = random_weight(layout)
    for first in ORDERS:
        for then in ORDERS:
            arranged = weight.arranged(first).arranged(then)
            assert order_of(arranged.codes) == then
            assert torch.equal(arranged.arranged("stored").codes, weight.codes)


def test_buffers_keep_the_order():
    buffers = {}
    weight = random_weight(best(20, 40, 4))._replace(buffers=buffers)
    arranged = weight.arranged("interleaved")
    assert buffers["codes"] is arranged.codes
    assert arranged.arranged("interleaved") is arranged


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_the_ops_get_all_of_it(layout):
    weight = random_weight(layout)
    again = (best_weight if layout.method == "best" else paper_weight)(*weight.flat())
    assert torch.equal(definition.dense(again), definition.dense(weight))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "layout", [best(40, 34, 4), best(37, 20, 3, rank=2), trellis(50, 66, 5, rank=3)], ids=layout_id
)
def test_rows_are_a_weight_of_their_own(layout, order):
    weight = random_weight(layout)
    rows = torch.tensor([0, 17, 16, layout.out_features - 1, 17])
    part = take_rows(weight.arranged(order), rows)
    assert order_of(part.codes) == "stored"
    torch.testing.assert_close(definition.dense(part), definition.dense(weight)[rows], rtol=0, atol=1e-12)
    x = torch.randn(2, layout.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run.linear(x, part), run.linear(x, weight)[:, rows])


@pytest.mark.parametrize("bad", [40, 47, 48])
@pytest.mark.parametrize("order", ORDERS)
def test_a_row_outside_is_an_error(bad, order):
    with pytest.raises(IndexError):
        take_rows(random_weight(best(40, 34, 4)).arranged(order), torch.tensor([bad]))


@pytest.mark.parametrize("layout", [best(8, 16), paper(8, 16)], ids=layout_id)
def test_the_door_refuses_what_is_no_input(layout):
    weight = random_weight(layout)
    for wrong in (torch.randn(2, 15), torch.ones(2, 16, dtype=torch.long)):
        with pytest.raises(FourierError, match=r"a packed layer got torch\.\w+ \[2, 1[56]\].*floating \[\.\.\., 16\]"):
            run.linear(wrong, weight)
