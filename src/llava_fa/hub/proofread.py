"""Proofreading: answers that broke although every layer is as near to its original as it should be, and their mending.

A layer's output error is a mean over tokens. A saturated softmax minds no error up to the one that reaches the score of
another token, and then whatever uses it is lost: at 2 bits the embedded model may forget how to read prices, depending
on the random signs, and no statistic of any layer shows it (docs/results.md, "Draws"). The answers do. Where the
original was sure of a token and the compressed model is far from it, queries and keys of one attention module after the
other get their original weights for a moment; the module that mends most is compressed anew with other signs, in the
same bytes, until the answers hold.

Where nothing broke it costs no pass: answers are heard at the end of calibration's own (`Listener`). What was decided
is kept in the work folder before any part is replaced, so that a killed run ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from llava_fa.hub.blocks import Inputs, answer_logits, input_moments
from llava_fa.hub.course import passes
from llava_fa.hub.families import is_query_or_key, is_vision
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.report import Measurement
from llava_fa.hub.shares import split
from llava_fa.hub.streaming import Job, approximated
from llava_fa.hub.weights import Weights
from llava_fa.hub.work_folder import WorkFolder
from llava_fa.solver.statistics import SecondMoment

FILE = "proofread.json"
SURE, BROKEN = 0.5, 3.0
"""Probability that the original gave a token, at least, and nats of it lost, for the answer to count as broken."""
SAMPLES, MODULES, DRAWS = 8, 3, 6
"""Broken samples that are looked at, the worst first; modules mended at most; draws tried for each."""

_INFINITE = 1e4
"""Nats that stand for a probability of zero, so that costs stay comparable."""

NONE: Mapping[str, Callable[[], Tensor]] = MappingProxyType({})
Redrawn = dict[str, tuple[dict[str, Tensor], Measurement]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the original says at every token of the samples' answers: its likeliest token, log p, and where they begin.

    Tokens are teacher-forced: t is predicted from the sample up to t - 1.
    """

    inputs: Inputs
    starts: Sequence[int]
    tokens: list[Tensor]
    logs: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, inputs: Inputs, starts: Sequence[int]) -> Answers:
        """Read by the original model: one pass over the samples."""

        found = passes(model, [functools.partial(_likeliest, model, inputs, starts, i) for i in range(len(inputs))])
        return cls(inputs, starts, [tokens for tokens, _ in found], [logs for _, logs in found])

    @torch.no_grad()
    def lost(self, model: nn.Module, indices: Iterable[int]) -> dict[int, Tensor]:
        """Nats that each token the original was sure of has lost in this model: sample → float32 [tokens], ≥ 0."""
        every = list(indices)
        found = passes(model, [functools.partial(self.loss, model, index) for index in every])
        return dict(zip(every, found, strict=True))

    def loss(self, model: nn.Module, index: int) -> Tensor:
        """`lost` of one sample, in one pass."""
        now = _log_probabilities(model, self.inputs, self.starts, index)
        there = now.gather(-1, self.tokens[index][:, None])[:, 0]
        sure = self.logs[index] > math.log(SURE)
        lost = torch.where(sure, self.logs[index] - there, 0.0).clamp_min(0)
        return lost.nan_to_num(nan=0.0, posinf=_INFINITE)  # float16 overflows: nothing to compare


class Listener:
    """What is said while samples pass through the original model and through what it becomes (`course.Hear`).

    So nobody need read the answers before, nor those of the compressed model once more.

    Args:
        inputs: prepared samples.
        starts: where their answers begin.
    """

    def __init__(self, inputs: Inputs, starts: Sequence[int]) -> None:
        nothing = torch.empty(0)
        self.answers = Answers(inputs, starts, [nothing] * len(inputs), [nothing] * len(inputs))
        self.lost: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, index: int, original: bool) -> None:
        """Take a sample through one of the two."""
        answers = self.answers
        if original:
            said = _likeliest(model, answers.inputs, answers.starts, index)
            answers.tokens[index], answers.logs[index] = said
        else:
            self.lost[index] = answers.loss(model, index)

    def reader(self, model: nn.Module) -> Here:
        """Of the compressed model, which has been heard."""
        return Here(model, self.answers, self.lost or None)


class Reader(Protocol):
    """The compressed model, as it is read.

    Attributes:
        count: how many samples there are.
    """

    count: int

    def lost(self, indices: Iterable[int], values: Mapping[str, Callable[[], Tensor]] = NONE) -> dict[int, Tensor]:
        """`Answers.lost` of some samples, where meanwhile some parameters are what these give."""

    def moments(self, layers: Sequence[PlannedLayer]) -> dict[str, SecondMoment]:
        """Second moments of the inputs of each layer over all samples."""

    def keep(self, values: Mapping[str, Callable[[], Tensor]]) -> None:
        """From here on these parameters are what these give."""


class Here:
    """A `Reader` in this process.

    Args:
        model: computes with the compressed weights.
        answers: the original's.
        lost: `Answers.lost` of all samples as the model is, where that is known.
    """

    def __init__(self, model: nn.Module, answers: Answers, lost: dict[int, Tensor] | None = None) -> None:
        self.model, self.answers, self.count = model, answers, len(answers.inputs)
        self._lost = lost

    def lost(self, indices: Iterable[int], values: Mapping[str, Callable[[], Tensor]] = NONE) -> dict[int, Tensor]:
        """See `Reader`."""
        if self._lost is not None and not values:
            return {index: self._lost[index] for index in indices}
        with Weights.of(self.model).swapped(values):
            return self.answers.lost(self.model, indices)

    def moments(self, layers: Sequence[PlannedLayer]) -> dict[str, SecondMoment]:
        """See `Reader`; added share by share."""
        total: dict[str, SecondMoment] = {}
        for samples in split(self.answers.inputs).values():
            for name, moment in moments(self.model, self.answers, layers, samples).items():
                if name in total:
                    total[name].merge(*moment.state())
                else:
                    total[name] = moment
        return total

    def keep(self, values: Mapping[str, Callable[[], Tensor]]) -> None:
        """See `Reader`."""
        self._lost = None
        for name, value in values.items():
            Weights.of(self.model).set(name, value)


def _likeliest(model: nn.Module, inputs: Inputs, starts: Sequence[int], index: int) -> tuple[Tensor, Tensor]:
    """The likeliest token at every place of an answer, and log p."""
    values, indices = _log_probabilities(model, inputs, starts, index).max(-1)
    return indices, values


def _log_probabilities(model: nn.Module, inputs: Inputs, starts: Sequence[int], index: int) -> Tensor:
    return answer_logits(model, inputs, starts, index).float().log_softmax(-1).cpu()


def _cost(lost: dict[int, Tensor]) -> float:
    """Nats beyond the first of every token: small losses are what compression is; large ones count."""
    return sum(float((one - 1).clamp_min(0).sum()) for one in lost.values())


def settle(work: WorkFolder) -> bool:
    """Whether the work folder's model is proofread; what an interrupted run had decided is carried out."""
    redrawn = work.read_json(FILE)
    for name in redrawn or ():
        if _again(name) in work:
            work.replace(name, _again(name))
    return redrawn is not None


def _again(name: str) -> str:
    return f"{name}.again"


@torch.no_grad()
def proofread(job: Job, reader: Reader) -> None:
    """Find broken answers, and draw the queries and keys that broke them anew.

    Args:
        job: with a part for every layer; those of redrawn layers are replaced.
        reader: of the compressed model; it is left with the weights that are stored.
    """
    redrawn: Redrawn = {}
    modules = _modules(job.plan)
    for _ in range(MODULES):
        job.tell("proofreading")
        lost = reader.lost(range(reader.count))
        worst_first = sorted(lost, key=lambda index: -_worst(lost[index]))
        broken = [index for index in worst_first if _worst(lost[index]) > BROKEN][:SAMPLES]
        before = _cost({index: lost[index] for index in broken})
        costs = {}
        for name, layers in modules.items() if broken else ():
            job.tell("proofreading", name)
            costs[name] = _cost(reader.lost(broken, {f"{layer.name}.weight": layer.read for layer in layers}))
        name = min(costs, key=costs.__getitem__, default="")
        if not costs or 2 * costs[name] > before:
            break  # nothing broke, or no single module is to blame
        redrawn |= _redraw(job, reader, modules.pop(name), broken, (before, _cost(lost)))
    for name, (tensors, measurement) in redrawn.items():
        job.work.save(_again(name), tensors, measurement)
    job.work.write_json(FILE, list(redrawn))
    settle(job.work)


def _worst(lost: Tensor) -> float:
    return float(lost.max()) if len(lost) else 0.0


def _modules(plan: Plan) -> dict[str, list[PlannedLayer]]:
    """Attention modules of the language model → their query and key projections, where these are single matrices."""
    modules: dict[str, list[PlannedLayer]] = {}
    for layer in plan.layers:
        if is_query_or_key(layer.name) and not is_vision(layer.name) and not layer.config.inner_rank:
            modules.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return modules


def moments(
    model: nn.Module, answers: Answers, layers: Sequence[PlannedLayer], samples: Iterable[int]
) -> dict[str, SecondMoment]:
    """Second moments of the inputs of each layer; those of cross-attention have not one input but two."""
    with input_moments({layer.name: model.get_submodule(layer.name) for layer in layers}) as found:
        given = model, answers.inputs, answers.starts
        passes(model, [functools.partial(_log_probabilities, *given, index) for index in samples])
    return found


def _redraw(
    job: Job,
    reader: Reader,
    layers: list[PlannedLayer],
    broken: list[int],
    before: tuple[float, float],
) -> Redrawn:
    """The layers with the signs, of a few draws, that mend the most; nothing where none helps all samples together.

    ``before``: cost of the broken samples, and of all.
    """
    found = reader.moments(layers)
    least = before[0]
    best: dict[str, Callable[[], Tensor]] = {}
    redrawn: Redrawn = {}
    for draw in range(1, DRAWS + 1):
        candidates: Redrawn = {}
        values: dict[str, Callable[[], Tensor]] = {}
        for layer in layers:
            job.tell("proofreading", layer.name)
            seed = layer.config.seed + draw
            note = f"drawn anew with seed {seed}: with the first the answers to {len(broken)} samples broke"
            again = dataclasses.replace(layer, config=layer.config.replace(seed=seed))
            seen = found[layer.name]
            result, measurement = approximated(
                again, job.plan, seen.value(), notes=(note,), tokens=seen.count, device=job.device
            )
            candidates[layer.name] = result.tensors, measurement
            values[f"{layer.name}.weight"] = result.dequantize
        cost = _cost(reader.lost(broken, values))
        if cost < least:
            least, best, redrawn = cost, values, candidates
        if 4 * cost < before[0]:
            break
    if not best or _cost(reader.lost(range(reader.count), best)) >= before[1]:
        return {}
    reader.keep(best)
    return redrawn
