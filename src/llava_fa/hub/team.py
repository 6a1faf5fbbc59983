"""Who works at one calibration: this process alone, or workers that have some shares of the samples each.

The samples are split into shares that depend on the samples alone. Sums over them are made share by share and added in
the order of shares, whoever has which: the result is the same for any number of workers, and for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llava_fa.hub.plan import PlannedLayer
from llava_fa.hub.shares import Shares
from llava_fa.hub.streaming import Job
from llava_fa.hub.sums import Blank, Sums, added


class Route(NamedTuple):
    """What of a model a calibration goes through, as names: the same for all who take part.

    Attributes:
        order: parts in the order in which they run.
        groups: of units that are visited, and whether each runs several times on a sample.
        done: those behind the last that has something to compress.
        idle: units that no sample reaches.
        follows: whether the original model is run beside.
    """

    order: list[str]
    groups: list[tuple[list[str], bool]]
    done: list[list[str]]
    idle: list[str]
    follows: bool


class Total(NamedTuple):
    """Sums over all samples, by the name of a layer.

    Attributes:
        tokens: how many came to it.
        drop: gives up its sums, which nobody will take.
        take: its sums, once; None where no sample comes there.
    """

    tokens: dict[str, int]
    drop: Callable[[str], object]
    take: Callable[[str], Sums | None]


class Team(Protocol):
    """What a calibration needs of those who have other shares.

    Attributes:
        shares: those of this process.
    """

    shares: Shares

    def together(self, key: str, own: Mapping[int, Any]) -> dict[int, Any]:
        """Something of every share, in their order.

        Args:
            key: of this word, the same for all.
            own: of this process's shares.
        """

    def missing(self, layers: Sequence[PlannedLayer]) -> list[PlannedLayer]:
        """Those of the layers that have no part yet."""

    def total(self, key: str, word: str, blanks: Mapping[str, Blank], make: Callable[[int], dict[str, Sums]]) -> Total:
        """Sums over all samples.

        Args:
            key: of the layers that they are for, as of `fit`.
            word: for which of the sums that are for these.
            blanks: what they begin as, by the name of a layer.
            make: sums of one of this process's shares; nothing where the share has no inputs.
        """

    def fit(
        self,
        key: str,
        groups: Sequence[Sequence[PlannedLayer]],
        statistics: Callable[[PlannedLayer], Any],
        fit: Callable[[PlannedLayer, Any], None],
    ) -> None:
        """Have all layers of these fitted that have no part yet; they have one when this returns.

        Args:
            key: of these layers, the same for all.
            groups: layers that share an input.
            statistics: of the first layer of a group.
            fit: makes a layer's part of that.
        """

    def fetch(self, layers: Iterable[PlannedLayer]) -> None:
        """Have the parts of these layers at hand."""


class Alone:
    """This process has all samples.

    Args:
        job: in which layers are fitted.
        shares: of the samples.
    """

    def __init__(self, job: Job | None, shares: Shares) -> None:
        self.job, self.shares = job, shares

    def together(self, key: str, own: Mapping[int, Any]) -> dict[int, Any]:
        """See `Team`."""
        return dict(own)

    def missing(self, layers: Sequence[PlannedLayer]) -> list[PlannedLayer]:
        """See `Team`."""
        return self.job.missing(layers)

    def total(self, key: str, word: str, blanks: Mapping[str, Blank], make: Callable[[int], dict[str, Sums]]) -> Total:
        """See `Team`."""
        total = added(map(make, self.shares))

        def take(name: str) -> Sums | None:
            return total.pop(name, None)

        return Total({name: sums.tokens for name, sums in total.items()}, take, take)

    def fit(
        self,
        key: str,
        groups: Sequence[Sequence[PlannedLayer]],
        statistics: Callable[[PlannedLayer], Any],
        fit: Callable[[PlannedLayer, Any], None],
    ) -> None:
        """See `Team`."""
        read = [statistics(group[0]) for group in groups]
        missing = [self.job.missing(group) for group in groups]  # once: asking waits for what is being written
        self.job.overlap.expect([layer for group in missing for layer in group])
        for group, known in zip(missing, read, strict=True):
            for layer in group:
                fit(layer, known)

    def fetch(self, layers: Iterable[PlannedLayer]) -> None:
        """They are in the work folder."""
