"""Passes side by side: in which order they run, that a part is entered once for all, how they end."""

import functools
import threading

import pytest
import torch
from torch import nn

from llava_fa.errors import FourierError
from llava_fa.hub.blocks import Unit, forward
from llava_fa.hub.course import capture, passes, survey
from llava_fa.hub.lockstep import Walk
from llava_fa.hub.shelf import Shelf
from llava_fa.hub.weights import Weights, parts_of

pytestmark = pytest.mark.timeout(60)


class Blocks(nn.Module):
    """Five blocks; a sample passes by some, runs through the first two several times, or fails between two."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.ran = []

    def forward(self, x, tiles=1, without=(), fails=-1, use_cache=False):
        for _ in range(int(tiles)):
            for layer in self.layers[:2]:
                x = layer(x)
        for index, layer in enumerate(self.layers[2:]):
            if index == fails:
                raise ValueError("no such token")
            if index not in without:
                x = layer(x.sin())
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Blocks()


def walked(model, inputs, rank=None, shelf=None):
    """Visits as (part, samples), in order; results by sample."""
    weights = Weights(model)
    found = []
    with torch.no_grad(), weights.gated(), Walk(rank or weights.rank, shelf) as walk:
        travellers = [walk.start(i, functools.partial(forward, model, x, i)) for i, x in enumerate(inputs)]
        while (front := walk.front()) is not None:
            path, arrivals = front
            found.append((path, [arrival.label for arrival in arrivals]))
            for arrival in arrivals:
                walk.answer(arrival, weights.forward(path))
    return found, [traveller.result for traveller in travellers]


def test_every_part_once_for_all_samples(model):
    inputs = [{"x": torch.randn(3, 4)} for _ in range(3)]
    visits, results = walked(model, inputs)
    assert visits == [(f"layers.{i}", [0, 1, 2]) for i in range(5)]
    for sample, result in zip(inputs, results, strict=True):
        assert torch.equal(result, model(**sample))
        assert not result.requires_grad


def test_those_that_pass_by_wait_for_the_others(model):
    inputs = [{"x": torch.randn(3, 4), "without": torch.tensor([0])}, {"x": torch.randn(3, 4)}]
    visits, results = walked(model, inputs)
    assert visits[2:] == [("layers.2", [1]), ("layers.3", [0, 1]), ("layers.4", [0, 1])]
    for sample, result in zip(inputs, results, strict=True):
        assert torch.equal(result, model(**sample))


def test_those_that_run_a_part_again_go_back_to_it(model):
    inputs = [{"x": torch.randn(3, 4), "tiles": torch.tensor(2)}, {"x": torch.randn(3, 4)}]
    visits, _ = walked(model, inputs)
    assert visits[:4] == [("layers.0", [0, 1]), ("layers.1", [0, 1]), ("layers.0", [0]), ("layers.1", [0])]
    assert visits[4:] == [(f"layers.{i}", [0, 1]) for i in (2, 3, 4)]


@pytest.mark.parametrize("fails", [0, 2])
def test_a_sample_that_fails_is_named_and_ends_all(model, fails):
    before = threading.active_count()
    inputs = [{"x": torch.randn(3, 4)}, {"x": torch.randn(3, 4), "fails": torch.tensor(fails)}]
    with pytest.raises(FourierError, match=r"sample 1.*no such token"):
        walked(model, inputs)
    with pytest.raises(FourierError, match=r"sample 0.*mat1"):  # in a part, which runs in another thread than the pass
        walked(model, [{"x": torch.randn(3, 5)}])
    assert threading.active_count() == before
    assert "forward" not in model.layers[0].__dict__


def test_an_interrupt_ends_all(model):
    before = threading.active_count()
    weights = Weights(model)
    interrupted = []

    def interrupt(*_):
        interrupted.append(1)
        raise KeyboardInterrupt

    def walk():
        with weights.gated(), Walk(weights.rank) as under_way:
            for i in range(2):
                under_way.start(i, functools.partial(forward, model, {"x": torch.randn(3, 4)}, i))
            under_way.answer(under_way.front()[1][0], interrupt)

    with pytest.raises(KeyboardInterrupt):
        walk()
    assert interrupted
    assert threading.active_count() == before


def test_threads_of_a_pass_do_not_change_those_of_the_process(model):
    threads = torch.get_num_threads()
    walked(model, [{"x": torch.randn(3, 4)}])
    assert torch.get_num_threads() == threads
    with torch.no_grad(), Walk({}) as walk:
        assert not walk.start(0, torch.is_grad_enabled).result
        assert walk.start(1, torch.get_num_threads).result == 1


@pytest.mark.parametrize("limit", [0, 100, None])
def test_what_waits_is_on_the_disk_beyond_a_limit(model, tmp_path, monkeypatch, limit):
    from llava_fa.hub import shelf as module

    monkeypatch.setattr(module, "_LEAST", 0)
    inputs = [{"x": torch.randn(3, 4)} for _ in range(3)]
    shelf, written = Shelf(limit, tmp_path / "hidden"), []
    true = shelf._written

    def write(x):
        assert x.numel() == 12
        written.append(1)
        return true(x)

    monkeypatch.setattr(shelf, "_written", write)
    _, results = walked(model, inputs, shelf=shelf)
    for sample, result in zip(inputs, results, strict=True):
        assert torch.equal(result, model(**sample))
    assert len(written) == {0: 15, 100: 5, None: 0}[limit]  # of three of 48 bytes each two stay
    assert not list(tmp_path.glob("hidden/*"))
    shelf.clear()
    assert not (tmp_path / "hidden").exists()


def test_parts_are_blocks_and_what_is_large(model):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm = nn.Embedding(1 << 15, 64, device="meta"), nn.LayerNorm(64)
            self.tower, self.projector = model, nn.Sequential(nn.Linear(4, 4))
            self.kinds = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4)})])  # no forward: what is in it is listed

    blocks = [f"tower.layers.{i}" for i in range(5)]
    assert list(parts_of(Whole())) == ["words", *blocks]
    assert list(parts_of(Whole(), ["projector", "kinds.0.a"])) == ["words", *blocks, "projector", "kinds.0.a"]


def test_a_course_is_in_the_order_of_execution(model):
    """Also where the first sample passes by a part, and the second runs others several times."""
    from llava_fa.hub.blocks import Unit

    units = [Unit(f"layers.{i}", layer, []) for i, layer in enumerate(model.layers)]
    inputs = [
        {"x": torch.randn(3, 4), "without": torch.tensor([1])},
        {"x": torch.randn(3, 4), "without": torch.tensor([2]), "tiles": torch.tensor(2)},
    ]
    with torch.no_grad(), Weights(model).gated():
        course = survey(model, units, inputs)
        assert course.order == [f"layers.{i}" for i in range(5)]
        assert [(len(group.units), group.repeated) for group in course.groups] == [(2, True), *[(1, False)] * 3]
        assert not course.idle
        course = survey(model, units, inputs[:1])
        assert [unit.path for unit in course.idle] == ["layers.3"]
        calls, hidden = capture(units[:2], model, inputs, ends=["layers.2"])
    assert [len(of) for of in calls] == [3, 3]
    assert len(hidden) == 3


def test_results_in_the_order_of_passes(model):
    assert passes(model, [lambda i=i: i for i in range(3)]) == [0, 1, 2]


class Stubborn(nn.Module):
    """Runs its last layer whatever happens to the first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, use_cache=False):
        try:
            return self.layers[0](x)
        finally:
            self.layers[1](x)


def test_a_pass_that_goes_on_when_it_is_to_end_ends():
    model = Stubborn()
    weights = Weights(model, ["layers.0", "layers.1"])
    with torch.no_grad(), weights.gated(), Walk(weights.rank) as walk:
        traveller = walk.start(0, functools.partial(forward, model, {"x": torch.randn(1, 4)}, 0))
    assert not traveller.is_alive()


def test_the_course_is_that_of_samples_with_pictures_wherever_they_are(model):
    """Here the first layers run several times on the last sample, which has the most numbers."""
    few = [{"x": torch.randn(1, 4), "without": torch.tensor([2])} for _ in range(20)]
    inputs = [*few, {"x": torch.randn(9, 4), "tiles": torch.tensor(3)}, *few]
    units = [Unit(f"layers.{index}", layer, []) for index, layer in enumerate(model.layers)]
    with torch.no_grad(), Weights.of(model, [unit.path for unit in units]).gated():
        course = survey(model, units, inputs)
    assert not course.idle
    assert [group.repeated for group in course.groups] == [True, False, False, False]
