"""One budget: never worse than uniform, and the best there is, by brute force."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa import FourierConfig, FourierError
from llava_fa.solver.budget import Option, allocate, stored

CONFIGS = [FourierConfig(bits=bits) for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4)]


@st.composite
def problems(draw, shared=False):
    """Options of a few layers, not always convex or sorted, and a budget from nothing to everything."""
    size, loss = st.integers(0, 40), st.integers(0, 60).map(float)
    rows = []
    kinds = [("", 0), ("book a", 3), ("book b", 11), ("book c", 7)]
    for _ in range(draw(st.integers(1, 5))):
        row = []
        for config in CONFIGS[: draw(st.integers(1, 4))]:
            kind = kinds[CONFIGS.index(config)] if shared else kinds[0]
            row.append(Option(config, draw(size), draw(loss), *kind))
        rows.append(row)
    return rows, draw(st.integers(0, 120))


def brute_force(rows, budget):
    """(loss, bytes) of the best choice; None where nothing fits."""
    every = itertools.product(*(range(len(row)) for row in rows))
    fitting = [choice for choice in every if stored(rows, choice) <= budget]
    return min(((sum(row[k].loss for row, k in zip(rows, c, strict=True))) for c in fitting), default=None)


@settings(deadline=None, max_examples=400)
@given(problems())
def test_nothing_is_better(problem):
    rows, budget = problem
    best = brute_force(rows, budget)
    if best is None:
        with pytest.raises(FourierError, match=r"the budget is \d+ bytes, and the least that the layers take is \d+"):
            allocate(rows, budget)
        return
    found = allocate(rows, budget)
    assert found.loss == best
    assert found.loss == sum(row[k].loss for row, k in zip(rows, found.choice, strict=True))
    assert found.nbytes == stored(rows, found.choice) <= budget


@settings(deadline=None, max_examples=300)
@given(problems(shared=True))
def test_never_worse_than_uniform_where_options_share_bytes(problem):
    rows, budget = problem
    uniform = [
        [next(k for k, option in enumerate(row) if option.config == config) for row in rows]
        for config in CONFIGS
        if all(any(option.config == config for option in row) for row in rows)
    ]
    losses = [
        sum(row[k].loss for row, k in zip(rows, choice, strict=True))
        for choice in uniform
        if stored(rows, choice) <= budget
    ]
    try:
        found = allocate(rows, budget)
    except FourierError:
        assert not losses
        return
    assert found.nbytes == stored(rows, found.choice) <= budget
    assert found.loss <= min(losses, default=math.inf) == found.uniform


def model(layers=200, seed=0):
    """Layers of a transformer's sizes with sensitivities over four orders of magnitude."""
    rng = random.Random(seed)
    rows = []
    for _ in range(layers):
        numel, factor = rng.choice([4096 * 4096, 4096 * 1024, 4096 * 11008]), math.exp(rng.gauss(0, 2))
        rows.append([Option(c, round(numel * c.bits / 8) + 4 * 4096, factor * 4**-c.bits) for c in CONFIGS])
    return rows


def test_a_large_model_is_solved_to_the_bound():
    rows = model()
    total = sum(row[2].nbytes for row in rows)  # 2 bits everywhere
    found = allocate(rows, total)
    assert found.nbytes <= total
    assert found.loss < 0.75 * found.uniform
    # no byte price explains a better loss: the dual bound, computed here by itself
    bound = max(
        sum(min(o.loss + price * o.nbytes for o in row) for row in rows) - price * total
        for price in (math.exp(x / 50) for x in range(-1100, -700))
    )
    assert bound <= found.loss < 1.001 * bound


def test_one_configuration_for_all_unless_another_choice_saves_the_margin():
    rows = model()
    total = sum(row[2].nbytes for row in rows)
    found = allocate(rows, total)
    saved = 1 - found.loss / found.uniform
    assert allocate(rows, total, margin=saved - 1e-6) == found
    even = allocate(rows, total, margin=saved + 1e-6)
    assert set(even.choice) == {2}
    assert even.loss == found.uniform == even.uniform
    # where it leaves bytes unspent, they are spent
    more = allocate(rows, round(1.05 * total), margin=0.9)
    assert more.loss < even.loss
    assert more.nbytes > total


def test_more_budget_is_never_worse():
    rows = model(40, seed=1)
    low, high = (sum(row[k].nbytes for row in rows) for k in (0, -1))
    losses = [allocate(rows, low + (high - low) * step // 20).loss for step in range(21)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == sum(row[-1].loss for row in rows)


def test_a_layer_without_any_effect_gets_the_least():
    rows = model(6, seed=2)
    rows[3] = [Option(o.config, o.nbytes, 0.0) for o in rows[3]]
    found = allocate(rows, sum(row[3].nbytes for row in rows))
    assert found.choice[3] == 0


def test_what_is_no_option_is_said():
    with pytest.raises(FourierError, match="a layer has no options"):
        allocate([[]], 10)
    with pytest.raises(FourierError, match="a loss of nan"):
        allocate([[Option(CONFIGS[0], 1, math.nan)]], 10)
