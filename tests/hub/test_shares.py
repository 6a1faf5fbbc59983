"""Samples in several shares: whoever has which, the same sums, and the same model."""

import pytest
import torch

import llava_fa
from llava_fa.hub import shares
from llava_fa.hub.shares import split
from llava_fa.hub.sums import Blank, added
from llava_fa.hub.work_folder import WorkFolder
from llava_fa.solver.statistics import Drift, SecondMoment


def lengths(*tokens):
    return [{"input_ids": torch.zeros(1, count)} for count in tokens]


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        ([30] * 3, [3]),
        ([100] * 7, [1] * 7),
        ([50] * 8, [2] * 4),
        ([1, 1, 1, 400], [1, 1, 1, 1]),
        ([400, 1, 1, 1], [1, 1, 1, 1]),
        ([250], [1]),
    ],
)
def test_shares_are_consecutive_and_none_is_empty(monkeypatch, tokens, sizes):
    monkeypatch.setattr(shares, "SHARE", 100)
    found = split(lengths(*tokens))
    assert [len(samples) for samples in found.values()] == sizes
    assert [index for samples in found.values() for index in samples] == list(range(len(tokens)))
    assert list(found) == list(range(len(sizes)))


def test_there_are_no_more_shares_than_there_may_be(monkeypatch):
    monkeypatch.setattr(shares, "SHARE", 100)
    found = split(lengths(*[300] * 1000))
    assert len(found) == shares.MOST
    assert {len(samples) for samples in found.values()} == {15, 16}


def test_sums_of_shares_are_those_of_all(monkeypatch):
    """The moment, the drift and W D, with a share that nothing came to."""
    torch.manual_seed(0)
    n, weight = 600, torch.randn(8, 600)
    before = [torch.randn(rows, n) for rows in (5, 300, 0, 70)]
    given = [x + 0.1 * torch.randn_like(x) for x in before]

    def sums(parts, of):
        found = of.sums()
        for part in parts:
            found.add([given[part]], [before[part]])
        found.flush()
        return {"layer": found}

    for of in (
        Blank("layer", n, True),
        Blank("layer", n, True, weight, {"layer": slice(0, 8)}),
        Blank("layer", n, False),
    ):
        whole, apart = sums(range(4), of)["layer"], added(sums([part], of) for part in range(4))["layer"]
        assert whole.tokens == apart.tokens == 375
        one, other = whole.statistics(), apart.statistics()
        torch.testing.assert_close(one.moment, other.moment)
        assert (one.drift is None) == (other.drift is None) == (not of.follows)
        if one.drift is not None:
            torch.testing.assert_close(one.drift, other.drift, rtol=1e-4, atol=1e-6)


def test_without_a_drift_in_one_share_there_is_none():
    of = Blank("layer", 4, True)
    one, other = of.sums(), of.sums()
    one.add([torch.ones(2, 4)], [torch.ones(2, 4)])
    other.add([torch.ones(2, 4)], [torch.ones(3, 4)])
    one.flush(), other.flush()
    assert added([{"layer": one}, {"layer": other}])["layer"].statistics().drift is None


@pytest.mark.parametrize("kind", ["moment", "diagonal", "drift", "weighted"])
def test_statistics_are_merged_by_their_state(kind):
    made = {
        "moment": lambda: SecondMoment(520),
        "diagonal": lambda: SecondMoment(520, diagonal=True),
        "drift": lambda: Drift(520),
        "weighted": lambda: Drift(520, weight=torch.ones(3, 520)),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-4, 5, (2, 9, 520), generator=generator).float() for _ in range(2))  # exact sums
    whole, parts = made(), [made(), made()]
    for part, a, b in zip(parts, x, y, strict=True):
        for one in (whole, part):
            one.add(*((a,) if isinstance(one, SecondMoment) else (a, b)))
    parts[0].merge(*parts[1].state())
    assert parts[0].count == whole.count == 18
    assert torch.equal(parts[0].value(), whole.value())


def test_several_shares_streamed_are_several_in_memory(checkpoint, quick, samples, tmp_path, digest, monkeypatch):
    monkeypatch.setattr(shares, "SHARE", 60)
    llava_fa.compress(checkpoint, tmp_path / "memory", quick, samples)
    monkeypatch.setattr("llava_fa.hub.memory.Need.streams", lambda *_: True)
    llava_fa.compress(checkpoint, tmp_path / "streamed", quick, samples)
    assert digest(tmp_path / "memory") == digest(tmp_path / "streamed")


def test_several_shares_resume(checkpoint, quick, samples, tmp_path, digest, monkeypatch):
    monkeypatch.setattr(shares, "SHARE", 60)
    true = WorkFolder.save

    def failing(self, name, *rest):
        if len(list(self.parts.iterdir())) == 9:
            raise KeyboardInterrupt
        true(self, name, *rest)

    llava_fa.compress(checkpoint, tmp_path / "at_once", quick, samples)
    monkeypatch.setattr(WorkFolder, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, samples)
    monkeypatch.setattr(WorkFolder, "save", true)
    llava_fa.compress(checkpoint, tmp_path / "out", quick, samples)
    assert digest(tmp_path / "out") == digest(tmp_path / "at_once")
