"""Searches through trellis codes on a GPU, in Triton: viterbi.inl and trellis_beam.inl of csrc for the same arguments.

As in `triton_search_kernels` a program has some rows to itself, and what it remembers of them lies in global memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llava_fa.triton_search_kernels import least_keys, push


@triton.jit
def viterbi_kernel(
    target,
    table,
    before,
    winners,
    states,
    first,
    steps,
    rows,
    BRANCHES: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
):
    """A row of `maths.trellis.Trellis.encode`, of those from `first` on.

    As csrc/viterbi.inl it keeps, of every group of windows, the low bits of the best: winners [·, steps, GROUPS]
    bytes. before [·, 2, GROUPS]: the least costs of a path into each group, of the last step and this one in turn.
    """
    place = tl.program_id(0).to(tl.int64)
    row = first + place
    group = tl.arange(0, GROUPS)
    window = group[:, None] * BRANCHES + tl.arange(0, BRANCHES)[None, :]
    re_weight = tl.load(table + 3 * window)
    im_weight = tl.load(table + 3 * window + 1)
    norm = tl.load(table + 3 * window + 2)
    costs = before + place * (2 * GROUPS)
    least = tl.zeros([GROUPS], tl.float32)
    tl.store(costs + group, least)
    best = winners + place * steps * GROUPS
    tl.debug_barrier()
    for t in range(0, steps):
        aim = target + (row * 0 + 2 * t) * rows + row  # 64 bits
        cost = tl.load(costs + (t & 1) * GROUPS + (window & (GROUPS - 1))) + norm
        cost += re_weight * tl.load(aim) + im_weight * tl.load(aim + rows)
        least, low = tl.min(cost, axis=1, return_indices=True)
        tl.store(best + t * GROUPS + group, low.to(tl.uint8))
        # Costs are sums over all coefficients so far: kept small, so that float32 keeps their differences.
        if t % 16 == 15:
            least -= tl.min(least, axis=0)
        tl.store(costs + (1 - (t & 1)) * GROUPS + group, least)
        tl.debug_barrier()
    at = tl.argmin(least, axis=0).to(tl.int32)
    for i in range(0, steps):
        t = steps - 1 - i
        found = at << BITS | tl.load(best + t * GROUPS + at).to(tl.int32)
        tl.store(states + (row * 0 + t) * rows + row, found)
        at = found & (GROUPS - 1)


@triton.jit
def point_of(points, window):
    """Re and im of a window's point, two bf16 numbers in one int."""
    both = tl.load(points + window)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def settle(target, states, points, past, row, here, rows, first, pairs, path, PATHS: tl.constexpr):
    """The windows of a block that begins at pair `first`, and its errors, from a path of its last step back."""
    for i in range(0, pairs):
        pair = pairs - 1 - i
        word = tl.load(past + pair * PATHS + path, mask=here, other=0)
        path = word >> 16
        window = word & 0xFFFF
        re, im = point_of(points, window)
        tl.store(states + (first + pair).to(tl.int64) * rows + row, window, mask=here)
        at = target + 2 * (first + pair).to(tl.int64) * rows + row
        tl.store(at, tl.load(at, mask=here, other=0.0) - re, mask=here)
        tl.store(at + rows, tl.load(at + rows, mask=here, other=0.0) - im, mask=here)


@triton.jit
def begin_block(own, base, row, here, there, start, columns, ahead, rows, PATHS: tl.constexpr, BLOCK: tl.constexpr):
    """Aims of the columns of a block, and nothing yet for those of the next."""
    for c in range(0, ahead):
        value = there.to(tl.float32) * 0.0
        if c < columns:
            value += tl.load(base + c * rows + row, mask=here, other=0.0)[:, None]
            if start > 0:
                value += tl.load(own + (BLOCK + c) * PATHS, mask=there, other=0.0)
        tl.store(own + c * PATHS, value, mask=there)
    tl.debug_barrier()


@triton.jit
def continuations(
    lists,
    first,
    points,
    metric,
    re,
    im,
    cost,
    window,
    there,
    number,
    at,
    REACH,
    BITS: tl.constexpr,
    SIDE: tl.constexpr,
    TRIED: tl.constexpr,
    TRIED_FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Keys [rows, paths, SLOTS] of what can follow `window` at coefficient `at` / 2: cost, window, number."""
    scale = SIDE / (2 * REACH)
    row = tl.minimum(tl.maximum((re + REACH) * scale, 0.0), SIDE - 1.0).to(tl.int32)
    column = tl.minimum(tl.maximum((im + REACH) * scale, 0.0), SIDE - 1.0).to(tl.int32)
    cell = row * SIDE + column
    slot = number % SLOTS
    listed = ((window >> BITS) * (SIDE * SIDE) + cell)[:, :, None] * TRIED + slot
    follows = there[:, :, None] & (slot < TRIED) & (at + number * 0 > 0)
    begins = there[:, :, None] & (number < TRIED_FIRST) & (at + number * 0 == 0)
    next = tl.load(lists + listed, mask=follows, other=0)
    next += tl.load(first + cell[:, :, None] * TRIED_FIRST + number, mask=begins, other=0)
    next = next.to(tl.int32)
    p_re, p_im = point_of(points, next)
    x = re[:, :, None] - p_re
    y = im[:, :, None] - p_im
    total = x * (tl.load(metric) * x + 2 * tl.load(metric + 1) * y)
    total = tl.maximum(total + (tl.load(metric + 2) * (y * y) + cost[:, :, None]), 0.0)
    total = tl.where(follows | begins, total, float("inf"))
    return total.to(tl.int32, bitcast=True).to(tl.int64) << 32 | (next << 8 | number).to(tl.int64)


@triton.jit
def trellis_beam_kernel(
    target,
    base,
    unit,
    metric,
    points,
    lists,
    first,
    memory,
    states,
    start,
    columns,
    size,
    rows,
    ahead,
    REACH,
    BITS: tl.constexpr,
    SIDE: tl.constexpr,
    TRIED: tl.constexpr,
    TRIED_FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
    PATHS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block of `solver.trellis_beam`, errors pushed forward, as csrc/trellis_beam.inl.

    Of every row `memory` has, as 32-bit words: aim [2 BLOCK, PATHS], what each path corrects the columns of this block
    and the next to (between two blocks: by); the paths' costs and windows [PATHS] each; and past [2, BLOCK / 2, PATHS],
    by the parity of a block its steps' windows and, above 16 bits, the paths that they continue. A path that is not
    there costs infinity. Continuation s of path p is number p SLOTS + s; at the first coefficient all of them are one
    path's.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    path = tl.arange(0, PATHS)[None, :]
    there = here[:, None] & (path >= 0)
    COST: tl.constexpr = 2 * BLOCK * PATHS
    PAST: tl.constexpr = COST + 2 * PATHS
    words = memory + row.to(tl.int64) * (PAST + BLOCK * PATHS)
    past = words + PAST + start // BLOCK % 2 * (BLOCK // 2 * PATHS)
    own = (words[:, None] + path).to(tl.pointer_type(tl.float32))
    aims = words.to(tl.pointer_type(tl.float32))
    cost = tl.zeros([ROWS, PATHS], tl.float32)
    window = tl.zeros([ROWS, PATHS], tl.int32)
    if start > 0:
        cost = tl.load(own + COST, mask=there, other=0.0)
        window = tl.load(words[:, None] + COST + PATHS + path, mask=there, other=0)
    begin_block(own, base, row, here, there, start, columns, ahead, rows, PATHS, BLOCK)
    number = path[:, :, None] * SLOTS + tl.arange(0, SLOTS)[None, None, :]
    for c in range(0, columns, 2):
        re = tl.load(own + c * PATHS, mask=there, other=0.0)
        im = tl.load(own + (c + 1) * PATHS, mask=there, other=0.0)
        tables = metric + c // 2 * 3
        key = continuations(
            lists, first, points, tables, re, im, cost, window, there, number, start + c, REACH, BITS, SIDE, TRIED,
            TRIED_FIRST, SLOTS,
        )  # fmt: skip
        chosen = least_keys(tl.reshape(key, [ROWS, PATHS * SLOTS]), path, PATHS)
        cost = (chosen >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        low = chosen.to(tl.int32)
        window = low >> 8
        parent = tl.where(start + c + path * 0 == 0, 0, (low & 255) // SLOTS)
        tl.store(past[:, None] + c // 2 * PATHS + path, window | parent << 16, mask=there)
        p_re, p_im = point_of(points, window)
        at = target + (start + c).to(tl.int64) * rows + row
        e_re = tl.load(at, mask=here, other=0.0)[:, None] - p_re
        e_im = tl.load(at + rows, mask=here, other=0.0)[:, None] - p_im
        push(aims[:, None], PATHS, path, parent, unit + c * ahead, e_re, e_im, there, c + 2, ahead, CHUNK)
    pairs = columns // 2
    origin = path + tl.zeros([ROWS, PATHS], tl.int32)  # which path of the block before each continues
    for i in range(0, pairs):
        origin = tl.load(past[:, None] + (pairs - 1 - i) * PATHS + origin, mask=there, other=0) >> 16
    best = tl.argmin(cost, axis=1).to(tl.int32)
    root = tl.sum(tl.where(path == best[:, None], origin, 0), axis=1)
    if start > 0:
        before = words + PAST + (start // BLOCK + 1) % 2 * (BLOCK // 2 * PATHS)
        settle(target, states, points, before, row, here, rows, (start - BLOCK) // 2, BLOCK // 2, root, PATHS)
    if start + columns == size:
        settle(target, states, points, past, row, here, rows, start // 2, pairs, best, PATHS)
    spent = tl.where(here, tl.min(cost, axis=1), 0.0)
    # Paths that differ before this block contradict what has just been settled.
    cost = tl.where((start + path * 0 == 0) | (origin == root[:, None]), cost - spent[:, None], float("inf"))
    tl.store(own + COST, cost, mask=there)
    tl.store(words[:, None] + COST + PATHS + path, window, mask=there)
