"""The generator of the shipped points (benchmarks/point_tables.py), with less of everything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llava_fa.maths import _codebook_table, _trellis_table, codebook, polar
from llava_fa.maths.trellis import STEP, Trellis, sums, trellis_points

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import point_tables
from test_trellis import gaussian
from trellis_paths import decode


@pytest.mark.parametrize("code_bits", range(2, 9))
def test_points_survive_their_text(code_bits):
    points = polar.ring_codebook(code_bits)
    assert torch.equal(codebook.decode(point_tables.encode_points(points)), points)


def test_reflections_are_the_shipped_ones():
    points = polar.ring_codebook(point_tables.QUADRANT_BITS)
    assert torch.equal(point_tables.reflected(points[:64]), points)


def test_optimal_rings_of_sixteen_points_are_one_six_nine():
    rings = point_tables.optimal_rings(16)
    assert [k for k, _ in rings] == [1, 6, 9]
    assert sum(k for k, _ in point_tables.optimal_rings(64)) == 64


@pytest.mark.parametrize("code_bits", [2, 4])
def test_generator_reproduces_the_table(code_bits):
    """Bits may differ where a platform sums otherwise; the quantiser may not."""
    made = point_tables.generate_rings(code_bits, rounds=(60, 1))
    judge = codebook.quadrature(1 << 17)
    shipped = codebook.per_real_mse(polar.ring_codebook(code_bits), judge.float())
    assert codebook.per_real_mse(made, judge.float()) == pytest.approx(shipped, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("code_bits", range(2, 9))
def test_generator_reproduces_the_table_exactly(code_bits):
    assert torch.allclose(point_tables.generate_rings(code_bits), polar.ring_codebook(code_bits), atol=0.02)


@pytest.mark.parametrize("code_bits", [2, 5])
def test_fitted_tables_are_nearly_as_good_with_less(code_bits):
    """The generator, from fewer starts, on fewer rows."""
    tables = point_tables.generate_trellis(code_bits, stages=((16, 6, 1), (64, 12, 1)), seeds=1)
    target, mse = gaussian(512, 32, seed=7), {}
    for name, points in (
        ("made", sums(tables.double() * STEP, code_bits)),
        ("shipped", trellis_points(code_bits)),
    ):
        code = Trellis(points, code_bits)
        mse[name] = (target - decode(code, code.encode(target))).square().mean()
    assert mse["shipped"] * 0.99 < mse["made"] < mse["shipped"] * 1.05


@pytest.mark.parametrize(("kind", "table"), [("rings", _codebook_table), ("trellis", _trellis_table)])
def test_tables_are_written_as_the_generators_would(kind, table):
    made = point_tables.table_module(point_tables.HEADS[kind], table.TABLE)
    written = Path(table.__file__).read_text(encoding="utf-8")
    assert written.split("TABLE")[0].strip() == made.split("TABLE")[0].strip()
    assert "".join(written.split()) == "".join(made.split())  # ruff joins short lines


@pytest.mark.slow
@pytest.mark.parametrize("code_bits", [8])
def test_the_generator_makes_the_shipped_tables(code_bits):
    made = sums(point_tables.generate_trellis(code_bits).double() * STEP, code_bits)
    assert (made - trellis_points(code_bits)).abs().max() <= 2 * STEP
