"""The solver's searches on a GPU: each job of `native` as one launch of the Triton kernel that it is for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# Rows of a program, which is one warp, and columns that it corrects at a time.
_TILES = {"Greedy": (16, 16), "Refine": (16, 16), "Beam": (8, 16), "TrellisBeam": (1, 16)}
# Paths of a row, columns of a block, and continuations of a path, at most; all for `triton_trellis_kernels`.
_PATHS, _BLOCK, _SLOTS = 32, 32, 8
_KEPT = 4
# Warps to a row's 2^L windows; bytes of what the Viterbi search keeps to trace back, at a time.
_VITERBI_WARPS, _HISTORY = 8, 1 << 30
# Stages: loops carry what the next step needs, so that there is nothing to fetch ahead.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def trellis_row_bytes() -> int:
    """What `triton_trellis_kernels.trellis_beam_kernel` keeps of every row between two blocks."""
    return 4 * _PATHS * (3 * _BLOCK + 2)


def run(job: Any) -> None:
    """Launch the kernel for a job whose tensors are on a GPU; as `native.call` they are passed as they lie there."""
    device = job[0].device
    guard: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        _LAUNCHES[type(job).__name__](job)


def programs(rows: int, each: int) -> tuple[int]:
    """The grid for so many rows of the weight."""
    return (-(-rows // each),)


def _search(search: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = search.cells, search.candidates, search.points, search.half_norm
    return tensors, {"REACH": search.reach, "WIDTH": search.width, "SIZE": search.size, "SIDE": search.side}


def _tile(kind: str) -> dict[str, int]:
    rows, chunk = _TILES[kind]
    return {"ROWS": rows, "CHUNK": chunk, "num_warps": 1}


def _greedy(job: Any) -> None:
    from llava_fa.triton_search_kernels import greedy_kernel

    (tables, numbers), tile = _search(job.search), _tile("Greedy")
    arguments = job.target, job.base, job.unit, *tables, job.codes, job.columns, job.rows
    greedy_kernel[programs(job.rows, tile["ROWS"])](*arguments, **numbers, **tile, **OPTIONS)


def _refine(job: Any) -> None:
    from llava_fa.triton_search_kernels import refine_kernel

    (tables, numbers), tile = _search(job.search), _tile("Refine")
    tensors = job.error, job.gradient, job.moment, job.inverse, *tables, job.codes, job.changed
    refine_kernel[programs(job.rows, tile["ROWS"])](*tensors, job.columns, job.rows, **numbers, **tile, **OPTIONS)


def _beam(job: Any) -> None:
    from llava_fa.triton_search_kernels import beam_kernel

    (tables, numbers), tile = _search(job.search), _tile("Beam")
    aim = torch.empty(job.columns, job.rows, _KEPT, device=job.target.device)
    past = torch.empty(job.columns // 2, job.rows, _KEPT, dtype=torch.int32, device=job.target.device)
    tensors = job.target, job.base, job.unit, job.metric, job.tried, job.numbers, *tables, job.codes, aim, past
    numbers |= {"KEPT": _KEPT, "TRIED": job.tried.shape[1]}
    beam_kernel[programs(job.rows, tile["ROWS"])](*tensors, job.columns, job.rows, **numbers, **tile, **OPTIONS)


def _trellis_beam(job: Any) -> None:
    from llava_fa.triton_trellis_kernels import trellis_beam_kernel

    tile = _tile("TrellisBeam")
    memory = job.paths.view(torch.int32)
    tensors = job.target, job.base, job.unit, job.metric, job.points, job.lists, job.first, memory, job.states
    numbers = job.start, job.columns, job.size, job.rows, job.ahead, job.reach
    trellis_beam_kernel[programs(job.rows, tile["ROWS"])](
        *tensors,
        *numbers,
        BITS=job.code_bits,
        SIDE=job.side,
        TRIED=job.tried,
        TRIED_FIRST=job.tried_first,
        SLOTS=_SLOTS,
        PATHS=_PATHS,
        BLOCK=_BLOCK,
        **tile,
        **OPTIONS,
    )


def _viterbi(job: Any) -> None:
    from llava_fa.triton_trellis_kernels import viterbi_kernel

    groups, branches = 1 << job.state_bits - job.code_bits, 1 << job.code_bits
    batch = min(job.rows, max(1, _HISTORY // (job.steps * groups)))
    before = torch.empty(batch, 2, groups, device=job.target.device)
    winners = torch.empty(batch, job.steps, groups, dtype=torch.uint8, device=job.target.device)
    tensors = job.target, job.table, before, winners, job.states
    constants = {"BRANCHES": branches, "GROUPS": groups, "BITS": job.code_bits, "num_warps": _VITERBI_WARPS}
    for first in range(0, job.rows, batch):
        count = min(batch, job.rows - first)
        viterbi_kernel[(count,)](*tensors, first, job.steps, job.rows, **constants, **OPTIONS)


_LAUNCHES = {
    "Greedy": _greedy,
    "Refine": _refine,
    "Beam": _beam,
    "TrellisBeam": _trellis_beam,
    "Viterbi": _viterbi,
}
