"""`FourierConfig`: every choice of a compression, frozen, versioned, checked, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from llava_fa.bounds import COUNT, is_number, real, whole
from llava_fa.errors import FourierError, explained, shown

Method = Literal["best", "paper"]
Calibration = Literal["auto", "none", "diagonal", "feedback"]
FactorDtype = Literal["int8", "bf16"]
Target = Literal["outputs", "weights"]
Codes = Literal["rings", "trellis"]
CodesChoice = Literal["rings", "trellis", "auto"]

QUANT_METHOD = "llava_fa"
CONFIG_VERSION = 1
MIN_BITS, MAX_BITS = 1.0, 4.0
MAX_SEED = 2**62
"""Layers are drawn anew with seeds above the given one, and torch takes 64 bits."""
TRELLIS_INPUTS = 64
"""``codes="auto"``: layers with at least this many inputs get trellis codes. At equal distortion these save 0.19 to
0.30 bits a weight (log4 of the two MSEs, docs/results.md) and spend up to 10 / n on the start of each row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierConfig:
    """How one weight matrix, or every matrix of a model, is approximated.

    Args:
        method: ``"best"``: y = Ŵ T(x / s) + L1 (L2 x), one DFT along the input axis, optimal codes, error
            feedback (docs/method.md). ``"paper"``: Algorithms 1-3 of LLaVA-FA (arXiv 2602.00135), literally.
        bits: nominal bits per weight of the codes, 1 to 4 in steps of one half. One complex coefficient stands
            for two weights, so its code has ``2 * bits`` bits. Under a `Budget` the most that a layer may get.
        codes: ``best`` only. ``"rings"``: every coefficient has a code of its own (ring codebook). ``"trellis"``: a
            row is one codeword of overlapping codes (`maths.trellis`): at the same bits 5 to 12 % less output error
            with error feedback, 15 to 20 % less without; two to three times the time to find them. To decode, 1.2 (4
            bits) to 1.9 times (2 bits) the time on CPUs with AVX-512 VNNI, several times on others. ``"auto"``:
            trellis for every layer with at least 64 inputs.
        rank: rank of the low-rank part; 0 leaves it out.
        inner_rank: ``best`` only. f > 0 (even): W is stored as a product L R of two narrow matrices, [m, f] and [f, n],
            each with codes of its own (CASP's factors; `solver.factored`); then there is no low-rank part beside.
        amplitude_bits, phase_bits: ``paper`` only, bits of |coefficient| and of its angle; by default they share
            ``2 * bits``, the phase taking the odd one. Their sum decides; ``bits`` is then (sum / 2).
        calibration: how much of a layer's second moment is used. ``"none"``: nothing. ``"diagonal"``: its diagonal
            (``best``: input scales before the transform; ``paper``: ODC weights in the frequency domain).
            ``"feedback"``: the diagonal, then error feedback on the whole transformed matrix (``best`` only).
            ``"auto"``: the most that the method and the given statistic allow.
        target: ``best`` with error feedback on calibration samples: what a layer is to give from the inputs that the
            compressed layers before it produce. ``"outputs"``: what the original layer gave in the original model
            (`solver.drift`). ``"weights"``: what the original layer would give from these inputs. ``paper`` knows
            weights only.
        factor_dtype: storage of the low-rank factors; ``paper`` keeps complex bf16 factors.
        iterations: ``paper``: T of Algorithm 1. ``best``: alternations between factors and codes when rank > 0.
        refine_passes: rings: passes of coordinate descent after error feedback.
        damping: added to the second moment's diagonal before its Cholesky, as a share of the mean diagonal.
        seed: of the random signs in front of the transform.
        skip, only: patterns on module names (``fnmatch``; a plain name also covers everything below it) that keep
            layers out of, or restrict, the compression of a model. One that matches nothing is an error.

    Raises:
        FourierError: for every invalid value or combination, with the reason.
    """

    quant_method: ClassVar[str] = QUANT_METHOD
    """The name transformers knows this format by."""

    method: Method = "best"
    bits: float = 4.0
    codes: CodesChoice = "rings"
    rank: int = 0
    inner_rank: int = 0
    amplitude_bits: int | None = None
    phase_bits: int | None = None
    calibration: Calibration = "auto"
    target: Target | None = None
    factor_dtype: FactorDtype | None = None
    iterations: int = 10
    refine_passes: int = 2
    damping: float = 0.01
    seed: int = 0
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(Method))
        _one_of("calibration", self.calibration, get_args(Calibration))
        _one_of("codes", self.codes, get_args(CodesChoice))
        whole("rank", self.rank, 0, COUNT, "Give 0 for no low-rank part, or a positive rank")
        whole("inner_rank", self.inner_rank, 0, COUNT, "Give 0 for one matrix, or an even width")
        whole("iterations", self.iterations, 1, COUNT)
        whole("refine_passes", self.refine_passes, 0, COUNT)
        whole("seed", self.seed, -MAX_SEED, MAX_SEED)
        real("damping", self.damping, 0, 1, above=True, remedy="Give a share of the mean diagonal in (0, 1]")
        for name in ("skip", "only"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if self.inner_rank % 2:
            raise FourierError(f"inner_rank is {self.inner_rank}", remedy="Give 0 for one matrix, or an even width")
        if self.inner_rank and (self.rank or self.method == "paper"):
            raise FourierError(
                "inner_rank is for method 'best' without a low-rank part", remedy="Leave inner_rank out, or rank"
            )
        (self._check_paper if self.method == "paper" else self._check_best)()
        object.__setattr__(self, "bits", _bits(self.bits))
        for name, allowed, best, paper, why in (
            ("target", Target, "outputs", "weights", "approximates weights"),
            ("factor_dtype", FactorDtype, "int8", "bf16", "keeps its complex factors in bf16"),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, paper if self.method == "paper" else best)
            _one_of(name, getattr(self, name), get_args(allowed))
            if self.method == "paper" and getattr(self, name) != paper:
                raise FourierError(f"method 'paper' {why}", remedy=f"Leave {name} out, or use method='best'")

    def _check_paper(self) -> None:
        if self.codes != "rings":
            raise FourierError(
                f"codes {self.codes!r} belong to method 'best'; 'paper' has a grid of its own",
                remedy="Leave codes out, or use method='best'",
            )
        if self.calibration == "feedback":
            raise FourierError(
                "method 'paper' has no error feedback",
                remedy="Use calibration='diagonal' (ODC), or method='best'",
            )
        given = (self.amplitude_bits, self.phase_bits)
        if None not in given:
            for name in ("amplitude_bits", "phase_bits"):
                whole(name, getattr(self, name), 1, 8)
            object.__setattr__(self, "bits", (self.amplitude_bits + self.phase_bits) / 2)  # type: ignore[operator]
        elif given != (None, None):
            raise FourierError("amplitude_bits and phase_bits come together", remedy="Give both, or give bits alone")
        else:
            code_bits = round(2 * _bits(self.bits))
            if not 2 <= code_bits <= 16:
                raise FourierError(f"bits is {self.bits}", remedy="Give 1 to 8 for method 'paper', in steps of 0.5")
            object.__setattr__(self, "amplitude_bits", code_bits // 2)
            object.__setattr__(self, "phase_bits", code_bits - code_bits // 2)

    def _check_best(self) -> None:
        if self.amplitude_bits is not None or self.phase_bits is not None:
            raise FourierError(
                "amplitude_bits and phase_bits belong to method 'paper'",
                remedy="Give bits, or use method='paper'; 'best' shares a codebook of 2^(2 bits) points between both",
            )
        if not MIN_BITS <= _bits(self.bits) <= MAX_BITS:
            raise FourierError(f"bits is {self.bits}", remedy=f"Give {MIN_BITS:g} to {MAX_BITS:g} in steps of 0.5")

    @property
    def code_bits(self) -> int:
        """Bits of one complex coefficient's code: ``2 * bits``."""
        return round(2 * self.bits)

    def codes_for(self, in_features: int) -> Codes:
        """What a layer with this many inputs gets: `codes`, with ``"auto"`` decided."""
        if self.codes == "auto":
            return "trellis" if in_features >= TRELLIS_INPUTS else "rings"
        return self.codes

    @property
    def follows_outputs(self) -> bool:
        """Whether a calibrated layer makes up for the errors of the layers before it."""
        return self.target == "outputs" and self.calibration in ("auto", "feedback")

    def replace(self, **changes: Any) -> FourierConfig:
        """A copy with some fields changed, checked again; changing ``bits`` re-derives the paper's two numbers."""
        if "bits" in changes:
            changes = {"amplitude_bits": None, "phase_bits": None, **changes}
        if "method" in changes:
            own = {"amplitude_bits": None, "phase_bits": None, "factor_dtype": None, "target": None, "codes": "rings"}
            changes = {**own, "inner_rank": 0, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the version and transformers' ``quant_method``."""
        fields = dataclasses.asdict(self)
        fields["skip"], fields["only"] = list(self.skip), list(self.only)
        target = "weights" if self.method == "paper" else "outputs"
        for name, old in (("codes", "rings"), ("inner_rank", 0), ("target", target)):  # as written before it was there
            if fields[name] == old:
                del fields[name]
        return {"quant_method": QUANT_METHOD, "config_version": CONFIG_VERSION, **fields}

    def to_json(self) -> str:
        """`to_dict` as JSON text; `from_json` is its inverse."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FourierConfig:
        """The inverse of `to_dict`. An unknown field or version is an error, never ignored."""
        values = dict(values)
        method = values.pop("quant_method", QUANT_METHOD)
        version = values.pop("config_version", CONFIG_VERSION)
        if method != QUANT_METHOD:
            raise FourierError(f"quant_method is {method!r}, not {QUANT_METHOD!r}", remedy="Give a LLaVA-FA config")
        if version != CONFIG_VERSION:
            raise FourierError(
                f"config_version is {version!r}; this package reads {CONFIG_VERSION}",
                remedy="Update llava-fa",
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise FourierError(
                f"unknown config field {', '.join(unknown)}", remedy=f"Known are {', '.join(sorted(known))}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> FourierConfig:
        """Read what `to_json` wrote."""
        remedy = "Give what FourierConfig.to_json wrote"
        with explained("the config is not JSON", remedy=remedy, kinds=(json.JSONDecodeError,), words=str):
            values = json.loads(text)
        if not isinstance(values, dict):
            raise FourierError("the config is not a JSON object", remedy=remedy)
        return cls.from_dict(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a whole model may take; `llava_fa.compress` then chooses every layer's bits. Give one of the two.

    Args:
        bits: stored bits per weight of the compressed layers together, every byte counted: codes, scales, signs,
            factors, codebooks.
        size: bytes of the weight files, what is not compressed included; a number, or text such as ``"1.1GB"``
            (powers of ten; KiB, MiB, GiB are powers of two).

    Raises:
        FourierError: none or both given; bits that are not above 0 and at most 16, as weights have; bytes that are not
            positive, or do not fit into 64 bits.
    """

    bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size is None):
            raise FourierError("a budget is either bits or a size", remedy="Give one of the two")
        if self.size is not None:
            object.__setattr__(self, "size", size_of(self.size, "a budget"))
            return
        if not (is_number(self.bits) and 0 < self.bits <= 64):  # type: ignore[operator]
            raise FourierError(f"a budget of {shown(self.bits)} bits per weight", remedy="Give a number such as 2.25")

    def to_dict(self) -> dict[str, Any]:
        """``{"bits": b}`` or ``{"size": bytes}``."""
        return {"bits": self.bits} if self.size is None else {"size": self.size}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Casp:
    """Query and key projections as two narrow factors, after CASP (arXiv 2503.05936); see docs/method.md.

    Args:
        keep: share of a projection's numbers that its two factors have. Every query and key projection of the
            language model is factored; what that saves the budget spends on all layers. The paper keeps a quarter.

    Raises:
        FourierError: a share that is not above 0 and at most 1.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        real("keep", self.keep, 0, 1, above=True, remedy="Give a share above 0 and at most 1, such as 0.25")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the ``auto`` of versions in which a budget could choose what is factored."""
        return {"keep": self.keep, "auto": False}


_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def size_of(value: Any, what: str) -> int:
    """Bytes, given as a number or as text such as ``"1.1GB"``.

    Raises:
        FourierError: neither, or not a positive number of 63 bits; ``what`` it is of.
    """
    text = value if isinstance(value, str) else repr(value) if is_number(value) else ""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
    if match is not None and match[2].upper() in _UNITS:
        count = float(match[1]) * _UNITS[match[2].upper()]  # too many digits are an infinity
        if 1 <= count < 2**63:
            return int(count)
    raise FourierError(f"{what} of size {shown(value)}", remedy="Give bytes, or text such as 950MB or 1.1GB")


def format_size(count: float) -> str:
    """Bytes for people, powers of ten: 512 B, 3.4 MB, 1.25 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise FourierError(f"{name} is {shown(value)}", remedy=f"Choose one of {', '.join(map(str, allowed))}")


def _bits(value: Any) -> float:
    if not is_number(value) or not 0 < value <= 16 or 2 * value != round(2 * value):
        raise FourierError(f"bits is {shown(value)}", remedy=f"Give {MIN_BITS:g} to {MAX_BITS:g} in steps of 0.5")
    return float(value)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise FourierError(f"{name} is {shown(value)}", remedy="Give a list of patterns, such as ['vision_tower']")
    return tuple(value)
