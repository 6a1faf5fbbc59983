"""Searches through ring codes on a GPU, in Triton: greedy.inl, refine.inl and beam.inl of csrc for the same arguments.

A program, one warp, has some rows of the weight to itself for all columns of a block: programs never wait for one
another. What a row remembers from column to column lies in global memory, a few kilobytes that stay in the first-level
cache; barriers stand between writing it and reading it back from other threads. The cheapest hypotheses are found by
one key of 64 bits each: a cost's bits, which keep its order as it is not negative, then whose it is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(
    cells,
    candidates,
    points,
    half_norm,
    re,
    im,
    here,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    REACH,
):
    """The nearest codes of re + i im, of any shape, where they are `here`, as `maths.nearest` finds them."""
    scale = SIDE / (2 * REACH)
    row = tl.floor((re + REACH) * scale)
    column = tl.floor((im + REACH) * scale)
    inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    at = tl.where(inside, row * SIDE + column, 0.0).to(tl.int32)
    code = tl.load(cells + at, mask=here & inside, other=0)
    mixed = code < 0
    if tl.max(mixed.to(tl.int32)) > 0:
        listed = candidates + (-1 - code) * WIDTH
        highest = re * 0.0 - float("inf")
        best = code * 0
        for i in range(WIDTH):
            number = tl.load(listed + i, mask=mixed, other=0)
            score = tl.load(points + 2 * number) * re + tl.load(points + 2 * number + 1) * im
            score -= tl.load(half_norm + number)
            best = tl.where(score > highest, number, best)
            highest = tl.maximum(score, highest)
        code = tl.where(mixed, best, code)
    far = here & (inside == 0)
    if tl.max(far.to(tl.int32)) > 0:
        highest = re * 0.0 - float("inf")
        best = code * 0
        for i in range(SIZE):
            score = tl.load(points + 2 * i) * re + tl.load(points + 2 * i + 1) * im - tl.load(half_norm + i)
            best = tl.where(score > highest, i, best)
            highest = tl.maximum(score, highest)
        code = tl.where(far, best, code)
    return code


@triton.jit
def pulled(errors, weights, step, aim, c, rows, row, here, CHUNK: tl.constexpr):
    """aim + Σ_{j<c} weights[j · step] errors[j], of some rows."""
    for start in range(0, c, CHUNK):
        j = start + tl.arange(0, CHUNK)
        before = tl.load(errors + j[:, None] * rows + row[None, :], mask=(j < c)[:, None] & here[None, :], other=0.0)
        aim += tl.sum(before * tl.load(weights + j * step, mask=j < c, other=0.0)[:, None], axis=0)
    return aim


@triton.jit
def greedy_kernel(
    error,
    base,
    unit,
    cells,
    candidates,
    points,
    half_norm,
    codes,
    columns,
    rows,
    REACH,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block of `solver.feedback.round_with_feedback`: `error` is the block's targets, and becomes its errors."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    for c in range(0, columns, 2):
        re = tl.load(base + c * rows + row, mask=here, other=0.0)
        im = tl.load(base + (c + 1) * rows + row, mask=here, other=0.0)
        re = pulled(error, unit + c, columns, re, c, rows, row, here, CHUNK)
        im = pulled(error, unit + c + 1, columns, im, c, rows, row, here, CHUNK)
        code = nearest(cells, candidates, points, half_norm, re, im, here, WIDTH, SIZE, SIDE, REACH)
        tl.store(codes + c // 2 * rows + row, code, mask=here)
        for part in tl.static_range(2):
            own = error + (c + part) * rows + row
            tl.store(own, tl.load(own, mask=here, other=0.0) - tl.load(points + 2 * code + part), mask=here)
        tl.debug_barrier()


@triton.jit
def quadratic(x, y, a, b, d):
    """xᵀ (a b; b d) x."""
    return x * (a * x + b * y) + y * (b * x + d * y)


@triton.jit
def refine_kernel(
    error,
    gradient,
    moment,
    inverse,
    cells,
    candidates,
    points,
    half_norm,
    codes,
    changed,
    columns,
    rows,
    REACH,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block of `solver.feedback.refine`. Of the gradient what has been read gives room to how far errors moved."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    count = tl.zeros([ROWS], tl.int32)
    for c in range(0, columns, 2):
        metric = moment + c * columns
        g = tl.load(gradient + c * rows + row, mask=here, other=0.0)
        h = tl.load(gradient + (c + 1) * rows + row, mask=here, other=0.0)
        g = pulled(gradient, metric, 1, g, c, rows, row, here, CHUNK)
        h = pulled(gradient, metric + columns, 1, h, c, rows, row, here, CHUNK)
        own = inverse + 2 * c
        x = tl.load(own) * g + tl.load(own + 1) * h
        y = tl.load(own + 2) * g + tl.load(own + 3) * h
        old = tl.load(codes + c // 2 * rows + row, mask=here, other=0)
        old_re = tl.load(points + 2 * old)
        old_im = tl.load(points + 2 * old + 1)
        re = old_re + x
        im = old_im + y
        code = nearest(cells, candidates, points, half_norm, re, im, here, WIDTH, SIZE, SIDE, REACH)
        new_re = tl.load(points + 2 * code)
        new_im = tl.load(points + 2 * code + 1)
        a = tl.load(metric + c)
        b = tl.load(metric + c + 1)
        d = tl.load(metric + columns + c + 1)
        better = quadratic(re - new_re, im - new_im, a, b, d) < quadratic(x, y, a, b, d)
        better = better & (code != old) & here  # the same code can look better by rounding alone, for ever
        count += better.to(tl.int32)
        at = error + c * rows + row
        tl.debug_barrier()
        tl.store(codes + c // 2 * rows + row, code, mask=better)
        tl.store(at, tl.load(at, mask=better, other=0.0) + (old_re - new_re), mask=better)
        tl.store(at + rows, tl.load(at + rows, mask=better, other=0.0) + (old_im - new_im), mask=better)
        tl.store(gradient + c * rows + row, tl.where(better, old_re - new_re, 0.0), mask=here)
        tl.store(gradient + (c + 1) * rows + row, tl.where(better, old_im - new_im, 0.0), mask=here)
        tl.debug_barrier()
    tl.store(changed + row, count, mask=here)


@triton.jit
def least_keys(key, kept, KEPT: tl.constexpr):
    """The KEPT least of every row of keys, which all differ, in order; `kept` [1, KEPT] is 0, 1, …"""
    least = tl.min(key, axis=1)[:, None]
    chosen = tl.where(kept == 0, least, 0)
    for i in range(1, KEPT):
        key = tl.where(key == least, 0x7FFFFFFFFFFFFFFF, key)
        least = tl.min(key, axis=1)[:, None]
        chosen = tl.where(kept == i, least, chosen)
    return chosen


@triton.jit
def push(lines, step, kept, parent, weights, e_re, e_im, there, begin, end, CHUNK: tl.constexpr):
    """Corrects the columns from `begin` to before `end` for the errors that hypotheses have just made, from what their
    parents corrected them to.

    Args:
        lines: [rows, 1], where each row's hypotheses of column 0 stand; those of a column are `step` further on.
        weights: two rows of M, `end` apart.
    """
    for start in range(begin, end, CHUNK):
        later = start + tl.arange(0, CHUNK)
        column = lines[None, :, :] + later[:, None, None] * step
        mask = (later < end)[:, None, None] & there[None, :, :]
        value = tl.load(column + parent[None, :, :], mask=mask, other=0.0)
        value += tl.load(weights + later, mask=later < end, other=0.0)[:, None, None] * e_re[None, :, :]
        value += tl.load(weights + end + later, mask=later < end, other=0.0)[:, None, None] * e_im[None, :, :]
        tl.debug_barrier()
        tl.store(column + kept[None, :, :], value, mask=mask)
    tl.debug_barrier()


@triton.jit
def beam_kernel(
    error,
    base,
    unit,
    metric,
    tried,
    numbers,
    cells,
    candidates,
    points,
    half_norm,
    codes,
    aim,
    past,
    columns,
    rows,
    REACH,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    KEPT: tl.constexpr,
    TRIED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block of `solver.beam`. Errors are pushed forward: a hypothesis is what it corrects its columns to, aim
    [columns, rows, KEPT]; past [columns / 2, rows, KEPT] has its code and, above 16 bits, the hypothesis it continues.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    line = row[:, None] * KEPT
    kept = tl.arange(0, KEPT)[None, :]
    own = line + kept
    there = here[:, None] & (kept >= 0)
    step = rows * KEPT
    for c in range(0, columns):
        value = tl.load(base + c * rows + row, mask=here, other=0.0)
        tl.store(aim + c * step + own, value[:, None] + tl.zeros([ROWS, KEPT], tl.float32), mask=there)
    cost = tl.where(kept == 0, 0.0, 1e30) + tl.zeros([ROWS, KEPT], tl.float32)  # a block starts with one hypothesis
    number = tl.zeros([ROWS, KEPT], tl.int32)
    branch = tl.arange(0, TRIED)[None, None, :]
    flat = kept[:, :, None] * TRIED + branch
    tl.debug_barrier()
    for c in range(0, columns, 2):
        re = tl.load(aim + c * step + own, mask=there, other=0.0)
        im = tl.load(aim + (c + 1) * step + own, mask=there, other=0.0)
        first = nearest(cells, candidates, points, half_norm, re, im, there, WIDTH, SIZE, SIDE, REACH)
        near = first[:, :, None] * TRIED + branch
        x = re[:, :, None] - tl.load(tried + 2 * near)
        y = im[:, :, None] - tl.load(tried + 2 * near + 1)
        root = metric + c // 2 * 3
        u = tl.load(root) * x
        v = tl.load(root + 1) * x + tl.load(root + 2) * y
        total = u * u + (v * v + cost[:, :, None])
        key = total.to(tl.int32, bitcast=True).to(tl.int64) << 32
        key = key | (tl.load(numbers + near) << 8 | flat).to(tl.int64)
        chosen = least_keys(tl.reshape(key, [ROWS, KEPT * TRIED]), kept, KEPT)
        cost = (chosen >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        low = chosen.to(tl.int32)
        number = low >> 8
        parent = (low & 255) // TRIED
        tl.store(past + c // 2 * step + own, number | parent << 16, mask=there)
        target = error + c * rows + row
        e_re = tl.load(target, mask=here, other=0.0)[:, None] - tl.load(points + 2 * number)
        e_im = tl.load(target + rows, mask=here, other=0.0)[:, None] - tl.load(points + 2 * number + 1)
        weights = unit + c * columns
        push(aim + line, step, kept, parent, weights, e_re, e_im, there, c + 2, columns, CHUNK)
    path = tl.argmin(cost, axis=1).to(tl.int32)
    for i in range(0, columns // 2):
        pair = columns // 2 - 1 - i
        word = tl.load(past + pair * step + row * KEPT + path, mask=here, other=0)
        path = word >> 16
        code = word & 0xFFFF
        tl.store(codes + pair * rows + row, code, mask=here)
        for part in tl.static_range(2):
            target = error + (2 * pair + part) * rows + row
            tl.store(target, tl.load(target, mask=here, other=0.0) - tl.load(points + 2 * code + part), mask=here)
