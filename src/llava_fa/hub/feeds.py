"""Which normalisation feeds which linear layer: what is known of a layer's inputs without any data.

After RMSNorm (no offset) every input has E[x_j²] = γ_j², up to one common factor; after LayerNorm γ_j² + β_j².
That is the diagonal second moment which data-free compression uses. Which norm feeds a layer is seen, not known by
name: a stand-in of the model runs (`dry_run`) on made-up inputs (`made_up`), every norm in it returns numbers that are
its own, one for each channel, and layers recognise them in their inputs. Moving numbers about (views, joined patches,
windows, chosen tokens) leaves them as they are, and one factor for a whole token leaves their ratios; anything else
does not, and then there is no feed.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub import dry_run, made_up
from llava_fa.hub.architecture import quiet_transformers
from llava_fa.hub.conversion import Stored
from llava_fa.nn.experts import Experts
from llava_fa.nn.patches import inputs_of
from llava_fa.nn.surgery import elsewhere, tied_to, twins

_ROWS = 64
"""Of a layer's input at most about so many tokens are looked at, evenly spaced."""
_TOLERANCE = 1e-5
"""Of a mark, relative: float32 after a factor or two."""
_DEEP, _LAYERS = 3, 8
"""So many calls of one function that fail after so many layers have run, and no more are tried: shapes that are refused
cost nothing, towers that run to no end do."""
_FEATURES = ("get_image_features", "get_video_features", "get_audio_features")
"""What transformers calls the way from pixels or sound to the language model."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """The norm in front of a linear layer: names of its tensors, and how its weight is to be read."""

    norm: str
    weight: str
    bias: str | None
    plus_one: bool
    """Gemma stores γ - 1."""

    def second_moment(self, tensors: Mapping[str, Tensor], inputs: int) -> Tensor:
        """E[x_j²] of the linear layer's inputs, float32 [inputs], up to a common factor.

        A norm narrower than the layer feeds it several positions, heads or groups side by side: the diagonal repeats.
        """
        gamma = tensors[self.weight].float()
        if not torch.isfinite(gamma).all():
            raise FourierError("the weight holds NaN or Inf", remedy="The checkpoint is damaged", where=self.norm)
        power = (gamma + 1 if self.plus_one else gamma).square()
        if self.bias is not None:
            power = power + tensors[self.bias].float().square()
        return power.repeat(inputs // power.numel())

    def read_second_moment(self, entry: Callable[[str], Stored | None], inputs: int) -> Tensor | None:
        """The same from a checkpoint, ``entry`` finding a tensor by its name; None where one is missing."""
        entries = {name: entry(name) for name in (self.weight, self.bias) if name is not None}
        tensors = {name: stored.read() for name, stored in entries.items() if stored is not None}
        return self.second_moment(tensors, inputs) if len(tensors) == len(entries) else None


@dataclasses.dataclass(frozen=True)
class Feeds:
    """What was seen of every module with a matrix: linear layers, and others that multiply their first argument."""

    seen: Mapping[str, Feed | None]
    """Name of a module that ran → the norm that alone produces its inputs, or None."""
    unseen: tuple[str, ...]
    """Linear layers that did not run, since nothing made up reached them: nothing is known of their inputs."""
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name of a module of experts → k / E, the share of all tokens that each is sent if all are equally busy."""

    def of(self, name: str) -> Feed | None:
        """The norm that alone produces the inputs of a module, or None where there is none, or none is known."""
        return self.seen.get(name)

    def share(self, name: str) -> float:
        """The share of all tokens that come to a layer: less than 1 for an expert's."""
        module = name.rpartition(".")[0].rpartition(".")[0]
        return self.shares.get(module, 1.0)

    def of_embedding(self, model: nn.Module, name: str) -> Feed | None:
        """The norm in front of the output embedding ``name``, or of the one tied to the word embedding ``name``.

        None for a word embedding that is only looked up.
        """
        places = [name, *(key.rpartition(".")[0] for key in tied_to(model, name))]
        return next((self.of(place) for place in places if isinstance(model.get_submodule(place), nn.Linear)), None)


def observe(model: nn.Module) -> Feeds:
    """See which norm feeds which layer. Never fails: what cannot be run is not seen.

    Args:
        model: on any device, meta included; of transformers, or a module whose parts are (others are not run). Nothing
            of it is changed, and nothing of its size is allocated.
    """
    double, norms = dry_run.stand_in(model), _one_where_tied(model, find_norms(model))
    with warnings.catch_warnings(), quiet_transformers(), dry_run.without_arithmetic() as mode:
        warnings.simplefilter("ignore")
        with mode.paused():
            watch = _Watch(double, norms, mode)
        watch.run(double, "", ())
    seen = {**_siblings(model, watch.seen), **watch.seen}
    pairs = twins(model)
    for name in seen:  # what is one layer in two places has one feed if it is the same in both
        other = elsewhere(name, pairs) if pairs else None
        if other in seen and seen[other] != seen[name]:
            seen[other] = None
    return Feeds(seen, tuple(name for name in watch.unseen(double, "") if name not in seen), watch.shares)


def _one_where_tied(model: nn.Module, norms: dict[str, Feed]) -> dict[str, Feed]:
    """The same, a norm that is tied to another as that one, under whose name its tensors are stored."""
    rules = getattr(model, "all_tied_weights_keys", None) or {}
    others = {name: rules.get(feed.weight, "").rpartition(".")[0] for name, feed in norms.items()}
    return {name: norms.get(others[name], feed) for name, feed in norms.items()}


def _siblings(model: nn.Module, seen: Mapping[str, Feed | None]) -> dict[str, Feed | None]:
    """What experts are given that no made-up token chose: the same as those beside them."""
    found: dict[str, Feed | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for own, linears in module.own.items():
                names = [f"{path}.{own}.{index}" for index in range(len(linears))]
                known = [seen[name] for name in names if name in seen]
                found |= dict.fromkeys(names, known[0]) if known else {}
    return found


class _Watch:
    """A stand-in at work: marks what norms return, reads what layers are given."""

    def __init__(self, model: nn.Module, norms: Mapping[str, Feed], mode: dry_run.DryRun) -> None:
        self._mode = mode
        self.seen: dict[str, Feed | None] = {}
        self.shares: dict[str, float] = {}
        self.calls = 0
        self._marks = _Marks()
        self._finished: set[int] = set()
        for name, module in model.named_modules():
            if name in norms:
                module.register_forward_hook(
                    self._mark(self._marks.new(norms[name], module.weight.numel())), with_kwargs=True
                )
            elif any(own.dim() > 1 for own in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._read(name), with_kwargs=True)
            if isinstance(module, Experts) and not module.ordered:
                module.register_forward_pre_hook(self._count(name), with_kwargs=True)
            module.register_forward_hook(lambda module, *_: self._finished.add(id(module)))

    def _mark(self, mark: Tensor) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or sum(1 for _ in _floats(args, kwargs)) > 1:
                return None  # a gate has been multiplied in
            with self._mode.paused():
                return self._marks.on(output, mark, module)

        return hook

    def _read(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls += 1
            inputs = next(_floats(args, kwargs), None)
            feed = None
            # Products that are left out refuse no width.
            if inputs is not None and inputs.dim() > 1 and inputs.shape[-1] == _width(module, inputs.shape[-1]):
                with self._mode.paused():
                    feed = self._marks.read(inputs_of(module, inputs))
            self.seen[name] = feed if self.seen.get(name, feed) == feed else None

        return hook

    def _count(self, name: str) -> Callable[..., None]:
        def hook(experts: nn.Module, args: Any, kwargs: Any) -> None:
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            self.shares[name] = index.shape[-1] / experts.count

        return hook

    def unseen(self, part: nn.Module, place: str) -> list[str]:
        """Linear layers in a part of the model that have not run."""
        names = [_join(place, name) for name, module in part.named_modules() if type(module) is nn.Linear]
        return [name for name in names if name not in self.seen]

    def run(self, part: nn.Module, place: str, done: tuple[str, ...]) -> None:
        """Run a part of the model until all linear layers in it have run, the outermost modules that can be run first.

        Args:
            place: its name.
            done: functions that a module around it has, and that have run to their end.
        """
        from transformers import PreTrainedModel

        if not self.unseen(part, place):
            return
        runs = isinstance(part, PreTrainedModel)
        if runs and id(part) not in self._finished:
            self._try(part, place, part.forward, made_up.words(part.forward, part.config))
        for name in _FEATURES:
            if runs and hasattr(part, name) and name not in done:
                function = getattr(part, name)
                if self._try(part, place, function, made_up.pictures_and_sounds(function, part.config)):
                    done = (*done, name)
        for name, child in part.named_children():
            self.run(child, _join(place, name), done)
        if runs and not done:
            self._try(part, place, part.forward, made_up.pictures_and_sounds(part.forward, part.config))

    def _try(
        self, part: nn.Module, place: str, function: Callable[..., Any], calls: Iterable[Mapping[str, Any]]
    ) -> bool:
        """Whether one of the calls came to its end; the first that does is the last."""
        deep = 0
        for arguments in calls:
            before = self.calls
            if deep == _DEEP or not self.unseen(part, place):
                return False
            try:
                function(**arguments)
            except Exception:  # whatever a model raises at what it cannot take; what ran has been seen
                deep += self.calls - before >= _LAYERS
            else:
                return True
        return False


class _Marks:
    """Numbers by which the outputs of norms are known: of every norm, one vector over its channels.

    An output is its norm's vector times ±1, drawn element by element: sums and averages over tokens are then unlike any
    vector, and so is whatever treats signs differently.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._signs = torch.randint(0, 2, ((1 << 20) + 7,), generator=self._generator) * 2.0 - 1
        self._vectors: list[tuple[float, int, Tensor, Feed]] = []
        """Ratio of a vector's first two numbers, by which it is looked up; a tie-break; the vector; the norm."""

    def new(self, feed: Feed, width: int) -> Tensor:
        """The vector of a norm."""
        vector = 1 + torch.rand(width, generator=self._generator)
        if width > 1:
            bisect.insort(self._vectors, (float(vector[1] / vector[0]), len(self._vectors), vector, feed))
        return vector

    def on(self, output: Tensor, vector: Tensor, norm: nn.Module) -> Tensor | None:
        """An output's stand-in, None where the channels cannot be told from the rest."""
        last = itertools.accumulate(reversed(output.shape), lambda one, other: one * other)
        axes = next((axes for axes, size in enumerate(last, 1) if size == vector.numel()), None)
        if output.dim() > 2 and output.shape[1] == vector.numel() and (axes is None or isinstance(norm, nn.GroupNorm)):
            channels = vector.view(-1, *[1] * (output.dim() - 2))
        elif axes is not None:
            channels = vector.view(output.shape[-axes:])
        else:
            return None
        count = output.numel()
        if count > len(self._signs):
            self._signs = self._signs.repeat(-(-count // len(self._signs)))
        return self._signs[:count].view(output.shape) * channels

    def read(self, inputs: Tensor) -> Feed | None:
        """The norm whose marks are in every token of a layer's input, side by side where it is narrower."""
        width = inputs.shape[-1]
        if width < 2 or inputs.stride(-1) == 0:
            return None
        rows = inputs.reshape(-1, width)
        rows = rows[:: max(1, len(rows) // _ROWS)].abs()
        rows = rows[rows.amax(1) > 0] if rows.numel() else rows  # all zero: padding
        if not len(rows):
            return None
        rows = rows / rows[:, :1]  # but for a factor that a whole token has in common
        if not torch.isfinite(rows).all():
            return None
        ratio = float(rows[0, 1])
        near = bisect.bisect_left(self._vectors, (ratio * (1 - _TOLERANCE),))
        for first, _, vector, feed in self._vectors[near:]:
            if first > ratio * (1 + _TOLERANCE):
                break
            if width % vector.numel() == 0:
                expected = (vector / vector[0]).repeat(width // vector.numel())
                if torch.allclose(rows, expected.expand_as(rows), rtol=_TOLERANCE, atol=0):
                    return feed
        return None


def _floats(args: Any, kwargs: Any) -> Any:
    return (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())


def _width(module: nn.Module, given: int) -> int:
    """Inputs that a linear layer takes; of what does not say, as many as it is given."""
    return module.in_features if isinstance(module, nn.Linear) else given


def _join(place: str, name: str) -> str:
    return f"{place}.{name}".strip(".")


def find_norms(model: nn.Module) -> dict[str, Feed]:
    """The modules of a model that normalise and then scale by a weight of one number per channel, by name."""
    known: dict[Any, bool | None] = {}
    norms = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or weight.dim() != 1 or not set(own) <= {"weight", "bias"} or any(module.children()):
            continue
        kind = (type(module), weight.numel(), bias is None, module.extra_repr())
        if kind not in known:
            known[kind] = _adds_one(module)
        plus_one = known[kind]
        if plus_one is not None:
            norms[name] = Feed(name, f"{name}.weight", f"{name}.bias" if bias is not None else None, plus_one)
    return norms


@torch.no_grad()
def _adds_one(norm: nn.Module) -> bool | None:
    """Whether the norm scales by 1 + weight: tried out, since a dozen classes do and most do not.

    None when the module is no norm: its output does not vanish with γ, or is not x / |x| with γ = 1.
    """
    probe = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    for buffer in probe.buffers():
        buffer.zero_()
    line = torch.linspace(-1, 1, probe.weight.numel()).roll(1)  # type: ignore[union-attr,operator]
    for x in (line[None], line[None, :, None, None]):  # channels last; channels of a picture
        power = []
        for gamma in (0.0, 1.0):
            for parameter in probe.parameters():
                parameter.zero_()
            probe.weight.fill_(gamma)  # type: ignore[union-attr,operator]
            try:
                power.append(float(probe(x).square().mean()))
            except Exception:  # it wants more than x, or another x: no norm that is known
                break
        for plus_one in (False, True):
            expected = [(gamma + plus_one) ** 2 for gamma in (0.0, 1.0)]
            if len(power) == 2 and all(abs(one - other) < 0.05 for one, other in zip(power, expected, strict=True)):
                return plus_one
    return None
