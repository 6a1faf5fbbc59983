"""`llava_fa.approximate`: one weight matrix in, its stored form and its errors out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.maths import metrics
from llava_fa.maths.lowrank import check_rank
from llava_fa.solver.approximation import Approximation
from llava_fa.solver.best import solve_best
from llava_fa.solver.factored import solve_factored
from llava_fa.solver.paper import solve_paper
from llava_fa.solver.scratch import Away


def approximate(
    weight: Tensor,
    config: FourierConfig,
    second_moment: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    original: Callable[[], Tensor] | None = None,
) -> Approximation:
    """Approximate W [m, n] (out × in, any float dtype) as `config` says.

    Args:
        weight: W, finite, 2-D; all is done on its device.
        second_moment: H = E(x xᵀ) [n, n] of the layer's inputs; or its diagonal [n] (for instance γ² of the
            norm layer in front); or None. How much of it is used is `config.calibration`'s business; the
            output error is measured under all of it.
        input_scale: method `best` only: s [n] > 0 to use instead of the one the calibration would choose, so
            that layers that share an input can share its transform. Rounded to bf16.
        original: where W stands for another matrix [m, n] (`solver.drift`), gives that one: the weight error is
            against it. Asked for once all else is done.

    Returns:
        An `Approximation`. A zero matrix decodes to exact zeros, with error 0.

    Raises:
        FourierError: anything wrong with an argument; the message does not know the layer's name, the caller
            adds it with `FourierError.at`.
    """
    values = checked_weight(weight)
    m, n = values.shape
    check_rank(max(config.rank, config.inner_rank), (m, n // 2 + 1 if config.method == "paper" else n))
    moment = None if second_moment is None else _checked_moment(second_moment.to(values.device), n)
    usable = usable_moment(config, moment)
    notes: tuple[str, ...] = ()
    output_error = None
    if moment is not None and not bool(moment.any()):
        notes, output_error = ("the second moment is all zero and was ignored",), 0.0
        moment = usable = None
    if config.method == "paper" and input_scale is not None:
        raise FourierError("method 'paper' has no input_scale", remedy="Leave it out, or use method='best'")
    scales = None if input_scale is None else _checked_scale(input_scale.to(values.device), n)
    unit = _unit(_largest(values))
    scaled = values if unit == 1 else values / unit
    if config.method == "paper":
        tensors, history, more = solve_paper(scaled, config, usable)
    else:
        with Away(usable) as away:
            if config.inner_rank:
                tensors, history, more = solve_factored(scaled, config, usable, scales)
            else:
                tensors, history, more = solve_best(scaled, config, usable, scales, away.now)
    for name in ("r_max", "row_scale", "left.row_scale", "left_scale" if "left_scale" in tensors else "left"):
        if name in tensors:
            tensors[name] = tensors[name] * unit
    result = Approximation(
        method=config.method,
        shape=(m, n),
        config=config,
        tensors=tensors,
        weight_error=math.nan,
        output_error=output_error,
        history=tuple(unit * value for value in history),
        notes=notes + more,
    )
    return _measured(result, values, unit, moment, original)


def _measured(
    result: Approximation,
    values: Tensor,
    unit: float,
    moment: Tensor | None,
    original: Callable[[], Tensor] | None,
) -> Approximation:
    """The result with its errors, which are the same in every unit."""
    decoded = result.dequantize()
    if not math.isfinite(_largest(decoded)):
        raise FourierError(
            "the approximation overflows float32", remedy=f"The largest weight is {unit:g}: rescale the layer"
        )
    scaled, decoded = (values, decoded) if unit == 1 else (values / unit, decoded / unit)
    out = result.output_error if moment is None else metrics.output_error(scaled, decoded, moment)
    if original is not None:
        scaled = original() if unit == 1 else original().to(torch.float32) / unit
    return dataclasses.replace(result, weight_error=metrics.weight_error(scaled, decoded), output_error=out)


def checked_weight(weight: Tensor) -> Tensor:
    """The weight in float32; `FourierError` unless it is a finite matrix."""
    if weight.ndim != 2:
        raise FourierError(f"the weight has shape {tuple(weight.shape)}", remedy="Give a matrix, out × in")
    if weight.numel() == 0:
        raise FourierError(f"the weight has shape {tuple(weight.shape)}", remedy="Give a matrix with entries")
    if not weight.dtype.is_floating_point:
        raise FourierError(f"the weight is {weight.dtype}", remedy="Give a floating-point matrix, not an encoded one")
    values = weight.detach().to(torch.float32)
    if not math.isfinite(_largest(values)):
        bad = int((~torch.isfinite(values)).sum())
        raise FourierError(f"the weight has {bad} NaN or infinite values", remedy="Repair the checkpoint")
    return values


def _checked_moment(moment: Tensor, n: int) -> Tensor:
    if tuple(moment.shape) not in ((n,), (n, n)):
        raise FourierError(
            f"the second moment has shape {tuple(moment.shape)}",
            remedy=f"Give [{n}, {n}], or its diagonal [{n}]",
        )
    if not moment.dtype.is_floating_point:
        raise FourierError(f"the second moment is {moment.dtype}", remedy="Give floating-point values")
    values = moment.detach().to(torch.float32)
    largest = _largest(values)
    if not math.isfinite(largest):
        raise FourierError("the second moment has NaN or infinite values", remedy="Look at the calibration data")
    diagonal = values if values.ndim == 1 else values.diagonal()
    if bool((diagonal < 0).any()):
        raise FourierError("the second moment has a negative diagonal", remedy="Give E[x xᵀ] of the layer's inputs")
    if values.ndim == 2 and _asymmetry(values) > 1e-3 * largest:
        raise FourierError("the second moment is not symmetric", remedy="Give E[x xᵀ] of the layer's inputs")
    unit = _unit(float(diagonal.mean()))
    return values if unit == 1 else values / unit


def _checked_scale(scale: Tensor, n: int) -> Tensor:
    values = scale.detach().to(torch.bfloat16).to(torch.float32)
    if tuple(values.shape) != (n,) or not bool((torch.isfinite(values) & (values > 0)).all()):
        raise FourierError("input_scale is not a vector of positive numbers", remedy=f"Give [{n}] values above zero")
    return values


def usable_moment(config: FourierConfig, moment: Tensor | None) -> Tensor | None:
    """The part of the statistic that the configuration allows the solver to see."""
    if config.calibration == "feedback" and (moment is None or moment.ndim == 1):
        raise FourierError(
            "calibration 'feedback' needs the whole second moment [n, n]",
            remedy="Give calibration data, or use calibration='auto'",
        )
    if config.calibration == "none" or moment is None:
        return None
    if config.method == "best" and config.calibration == "diagonal" and moment.ndim == 2:
        return moment.diagonal().contiguous()
    return moment


def _largest(values: Tensor) -> float:
    """max |x|, NaN where any value is, without a copy."""
    low, high = map(float, torch.aminmax(values))
    return math.nan if math.isnan(low) else max(-low, high)


def _unit(size: float) -> float:
    """What to divide values of this size by so that their squares stay inside float32: 1 in all ordinary
    cases.

    A power of two, so that nothing is rounded.
    """
    return 1.0 if size == 0 or 2.0**-20 <= size <= 2.0**20 else 2.0 ** math.floor(math.log2(size))


def _asymmetry(moment: Tensor) -> float:
    """max |H - Hᵀ|, in row blocks from the diagonal on."""
    starts = range(0, moment.shape[0], 512)
    return max(float((moment[i : i + 512, i:] - moment[i:, i : i + 512].T).abs().max()) for i in starts)
