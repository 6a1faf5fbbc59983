"""What runs on the GPU, in Triton: the transform and the low-rank part's first half, and the product with the codes.

Codes come in the order of `kernels.words`: [m, WORDS, units]. The transformed inputs z come in the same units, by 16:
z[TERMS, batch, blocks, CODES, 2, 16] holds, of coefficient (16 block + i) CODES + j, the real (0) or imaginary part (1)
of T (x / s). So what belongs to code j of the units of a tile lies side by side, whatever the bits of a code: shifts
and offsets are compile-time constants, and nothing is interleaved or transposed in registers.

A point is one 32-bit word, two bf16 numbers. They are exact in a bf16 tensor-core product; z is, as TERMS bf16 numbers
whose sum it is: 1 for bf16 inputs (z is rounded as a bf16 layer's input is), 2 for f16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address(table, which, FIELD: tl.constexpr, like):
    """A tensor of weight `which` of a group (`kernels.triton.Group`); `like` is of its dtype."""
    return tl.multiple_of(tl.load(table + which * 9 + FIELD).to(like.dtype), 16)


@triton.jit
def place(unit, CODES: tl.constexpr):
    """Where code 0 of a unit has its real part, within z of one term and input."""
    return unit // 16 * (32 * CODES) + unit % 16


@triton.jit
def store_terms(z, at, value, mask, step, TERMS: tl.constexpr):
    """value → z[at] as float32, or as TERMS bf16 numbers a `step` apart."""
    if z.dtype.element_ty == tl.float32:
        tl.store(z + at, value, mask=mask)
    else:
        for term in tl.static_range(TERMS):
            part = value.to(tl.bfloat16)
            tl.store(z + at + term * step, part, mask=mask)
            value = value - part.to(tl.float32)


@triton.jit
def times_right(x, right, right_scale, left_scale, low, n, row, q, rank, SCALED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Entry q of (scales · right x) of one row, into low."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        value = tl.load(x + row * n + i, mask=i < n, other=0.0).to(tl.float32)
        total += value * tl.load(right + q * n + i, mask=i < n, other=0).to(tl.float32)
    out = tl.sum(total, axis=0)
    if SCALED:
        out = out * tl.load(right_scale + q).to(tl.float32) * tl.load(left_scale + q).to(tl.float32)
    tl.store(low + row * rank + q, out)


@triton.jit
def transform_kernel(
    x,
    input_scale,
    signs,
    first,
    second,
    twiddle,
    z,
    right,
    right_scale,
    left_scale,
    low,
    chosen,
    table,
    n,
    N1,
    N2,
    blocks,
    rank,
    batch,
    CODES: tl.constexpr,
    TERMS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK1: tl.constexpr,
    BLOCK2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (k1, b): X[k1 + N1 k2] for all k2 of row b, N = N1 N2, X the DFT of σ x / s, by two sums

        Y[n2] = Σ_n1 (σ x / s)[n1 N2 + n2] w1[k1, n1],     X[k1 + N1 k2] = Σ_n2 Y[n2] twiddle[k1, n2] w2[n2, k2]

    written as packed coefficients into z. Programs k1 ≥ N1: entry k1 - N1 of (scales · right x), into low.
    GROUPED: row b is for weight chosen[b] of a group, or for none if that is -1.
    """
    k1 = tl.program_id(0)
    row = tl.program_id(1)
    if GROUPED:
        which = tl.load(chosen + row)
        if which < 0:
            return
        input_scale = address(table, which, 2, input_scale)
        signs = address(table, which, 3, signs)
        right = address(table, which, 5, right)
        left_scale = address(table, which, 6, left_scale)
        right_scale = address(table, which, 7, right_scale)
    if k1 < N1:
        size = N1 * N2
        half = size // 2
        n2 = tl.arange(0, BLOCK2)
        real = tl.zeros([BLOCK1, BLOCK2], tl.float32)
        imag = tl.zeros([BLOCK1, BLOCK2], tl.float32)
        for start in range(0, N1, BLOCK1):
            n1 = start + tl.arange(0, BLOCK1)
            i = n1[:, None] * N2 + n2[None, :]
            inside = (n1 < N1)[:, None] & (n2 < N2)[None, :] & (i < n)
            value = tl.load(x + row * n + i, mask=inside, other=0.0).to(tl.float32)
            value = value / tl.load(input_scale + i, mask=inside, other=1.0).to(tl.float32)
            minus = (tl.load(signs + (i >> 3), mask=inside, other=0).to(tl.int32) >> (i & 7)) & 1
            value = tl.where(minus == 1, -value, value)
            w = first + k1 * N1 + n1
            real += value * tl.load(w, mask=n1 < N1, other=0.0)[:, None]
            imag += value * tl.load(w + N1 * N1, mask=n1 < N1, other=0.0)[:, None]
        re = tl.sum(real, axis=0)
        im = tl.sum(imag, axis=0)
        turn = twiddle + k1 * N2 + n2
        turn_re = tl.load(turn, mask=n2 < N2, other=0.0)
        turn_im = tl.load(turn + size, mask=n2 < N2, other=0.0)
        turned_re = (re * turn_re - im * turn_im)[:, None]
        turned_im = (re * turn_im + im * turn_re)[:, None]
        numbers = blocks * (32 * CODES)
        for start in range(0, N2 // 2 + 1, BLOCK_K):
            k2 = start + tl.arange(0, BLOCK_K)
            root = second + n2[:, None] * N2 + k2[None, :]
            known = (n2 < N2)[:, None] & (k2 < N2)[None, :]
            w_re = tl.load(root, mask=known, other=0.0)
            w_im = tl.load(root + N2 * N2, mask=known, other=0.0)
            out_re = tl.sum(turned_re * w_re - turned_im * w_im, axis=0)
            out_im = tl.sum(turned_re * w_im + turned_im * w_re, axis=0)
            f = k1 + N1 * k2
            # Packed order: (X_0, X_{N/2}), then pairs; X_0 and X_{N/2} without the √2 of the table.
            edge = (f == 0) | (f == half)
            out_re = tl.where(edge, out_re * 0.7071067811865476, out_re)
            p = tl.where(f == half, 0, f)
            at = row * numbers + place(p // CODES, CODES) + p % CODES * 32
            store_terms(z, at + tl.where(f == half, 16, 0), out_re, (k2 < N2) & (f <= half), batch * numbers, TERMS)
            store_terms(z, at + 16, out_im, (k2 < N2) & (f < half) & (f > 0), batch * numbers, TERMS)
        if k1 == 0:  # what pads the last blocks, less than two of them, 16 units of 32 codes each at most
            after = half + tl.arange(0, 1024)
            there = row * numbers + place(after // CODES, CODES) + after % CODES * 32
            nothing = tl.zeros([1024], tl.float32)
            store_terms(z, there, nothing, after < blocks * (16 * CODES), batch * numbers, TERMS)
            store_terms(z, there + 16, nothing, after < blocks * (16 * CODES), batch * numbers, TERMS)
    else:
        times_right(x, right, right_scale, left_scale, low, n, row, k1 - N1, rank, SCALED, BLOCK_N)


@triton.jit
def load_high(at, start, mask, BITS: tl.constexpr, WINDOW: tl.constexpr):
    """The first word of the next unit, into which trellis codes reach."""
    if WINDOW > BITS:  # noqa: SIM108
        high = tl.load(at + start + 1, mask=mask, other=0)
    else:
        high = tl.zeros(at.shape, tl.int32)  # no code reaches there
    return high


@triton.jit
def look_up(points, low, high, SHIFT: tl.constexpr, WINDOW: tl.constexpr):
    """The point, two bf16 numbers in one word, whose number is WINDOW bits from bit SHIFT of low on, and on in high."""
    if SHIFT + WINDOW <= 32:
        code = (low >> SHIFT) & ((1 << WINDOW) - 1)
    else:
        code = ((low >> SHIFT) & ((1 << (32 - SHIFT)) - 1)) | ((high << (32 - SHIFT)) & ((1 << WINDOW) - 1))
    return tl.load(points + code)


@triton.jit
def look_up_at(points, at, mask, mask_next, units, j, WORDS: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr):
    """The same for a code known at run time: its words are read again, but a unit of 32 codes need not be unrolled."""
    bit = tl.zeros([1, 1], tl.int32) + j * BITS
    v = bit // 32
    shift = bit % 32
    low = tl.load(at + v * units, mask=mask, other=0).to(tl.uint32, bitcast=True)
    last = v + 1 == WORDS
    inside = (last & mask_next) | ((v + 1 < WORDS) & mask)
    wanted = inside & (shift + WINDOW > 32)
    high = tl.load(at + tl.where(last, 1, (v + 1) * units), mask=wanted, other=0).to(tl.uint32, bitcast=True)
    code = ((low >> shift) | ((high << 1) << (31 - shift))) & ((1 << WINDOW) - 1)
    return tl.load(points + code.to(tl.int32))


@triton.jit
def part_of(point, IMAG: tl.constexpr, kind: tl.constexpr):
    """The real or imaginary number of a point, as bf16 or float32."""
    if kind == tl.float32:
        return ((point & -65536) if IMAG else (point << 16)).to(tl.float32, bitcast=True)
    else:
        return ((point >> 16) if IMAG else point).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def vector_kernel(
    y,
    codes,
    points,
    z,
    row_scale,
    left,
    low,
    bias,
    chosen,
    table,
    m,
    quads,
    rank,
    numbers,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = row_scale · (points[codes] z) + left low + bias of BLOCK_M rows, for one x; z float32, sums in float32.

    GROUPED: program (tile, b) is for row b of x, so many numbers in z, and weight chosen[b], or nothing if that is -1.
    """
    if GROUPED:
        row = tl.program_id(1)
        which = tl.load(chosen + row)
        if which < 0:
            return
        codes = address(table, which, 0, codes)
        row_scale = address(table, which, 1, row_scale)
        left = address(table, which, 4, left)
        bias = address(table, which, 8, bias)
        y += row * m
        z += row * numbers
        low += row * rank
    units = quads * 4
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    u = tl.arange(0, BLOCK_U)
    at = codes + rows[:, None] * (WORDS * units) + u[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
    ahead = tl.load(at, mask=(rows < m)[:, None] & (u < units)[None, :], other=0)
    for start in range(0, units, BLOCK_U):
        word = ahead
        if WORDS == 1:
            ahead = tl.load(
                at + start + BLOCK_U, mask=(rows < m)[:, None] & (start + BLOCK_U + u < units)[None, :], other=0
            )
        mask_u = start + u < units
        here = z + place(start + u, CODES)
        mask = (rows < m)[:, None] & mask_u[None, :]
        mask_next = (rows < m)[:, None] & (start + u + 1 < units)[None, :]
        if WORDS == 1:
            high = load_high(at, start, mask_next, BITS, WINDOW)
            for j in tl.static_range(CODES):
                point = look_up(points, word, high, j * BITS, WINDOW)
                for part in tl.static_range(2):
                    other = tl.load(here + (32 * j + 16 * part), mask=mask_u, other=0.0)[None, :]
                    total += part_of(point, part, tl.float32) * other
        else:
            for j in range(CODES):
                point = look_up_at(points, at + start, mask, mask_next, units, j, WORDS, BITS, WINDOW)
                for part in tl.static_range(2):
                    other = tl.load(here + (32 * j + 16 * part), mask=mask_u, other=0.0)[None, :]
                    total += part_of(point, part, tl.float32) * other
    out = tl.sum(total, axis=1) * tl.load(row_scale + rows, mask=rows < m, other=0.0).to(tl.float32)
    if LOW_RANK:
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mask = (rows < m)[:, None] & (r < rank)[None, :]
            factor = tl.load(left + rows[:, None] * rank + r[None, :], mask=mask, other=0).to(tl.float32)
            part += factor * tl.load(low + r, mask=r < rank, other=0.0)[None, :]
        out += tl.sum(part, axis=1)
    if HAS_BIAS:
        out += tl.load(bias + rows, mask=rows < m, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < m)


@triton.jit
def multiply(total, weight, z, at, mask, step, TERMS: tl.constexpr):
    """total + weight · (Σ terms of z); in float32 without tensor cores, whose sums are less exact."""
    for term in tl.static_range(TERMS):
        other = tl.load(z + at + term * step, mask=mask, other=0.0)
        total = tl.dot(weight, other, total, input_precision="ieee")
    return total


@triton.jit
def matrix_kernel(
    y,
    codes,
    points,
    z,
    row_scale,
    left,
    low,
    bias,
    m,
    quads,
    rank,
    batch,
    blocks,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    TERMS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The same for BLOCK_M rows and BLOCK_B inputs: tiles of points, decoded in registers, into tl.dot."""
    units = quads * 4
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, BLOCK_U)
    kind: tl.constexpr = z.dtype.element_ty
    at = codes + rows[:, None] * (WORDS * units) + u[None, :]
    numbers = blocks * (32 * CODES)
    total = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
    ahead = tl.load(at, mask=(rows < m)[:, None] & (u < units)[None, :], other=0)
    for start in range(0, units, BLOCK_U):
        word = ahead
        if WORDS == 1:
            ahead = tl.load(
                at + start + BLOCK_U, mask=(rows < m)[:, None] & (start + BLOCK_U + u < units)[None, :], other=0
            )
        mask = (rows < m)[:, None] & (start + u < units)[None, :]
        mask_next = (rows < m)[:, None] & (start + u + 1 < units)[None, :]
        z_at = b[None, :] * numbers + place(start + u, CODES)[:, None]
        z_mask = (b < batch)[None, :] & (start + u < units)[:, None]
        if WORDS == 1:
            high = load_high(at, start, mask_next, BITS, WINDOW)
            for j in tl.static_range(CODES):
                point = look_up(points, word, high, j * BITS, WINDOW)
                for part in tl.static_range(2):
                    weight = part_of(point, part, kind)
                    total = multiply(total, weight, z, z_at + (32 * j + 16 * part), z_mask, batch * numbers, TERMS)
        else:
            for j in range(CODES):
                point = look_up_at(points, at + start, mask, mask_next, units, j, WORDS, BITS, WINDOW)
                for part in tl.static_range(2):
                    weight = part_of(point, part, kind)
                    total = multiply(total, weight, z, z_at + (32 * j + 16 * part), z_mask, batch * numbers, TERMS)
    total = total * tl.load(row_scale + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    if LOW_RANK:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mask = (rows < m)[:, None] & (r < rank)[None, :]
            factor = tl.load(left + rows[:, None] * rank + r[None, :], mask=mask, other=0).to(tl.float32)
            mask = (b < batch)[None, :] & (r < rank)[:, None]
            part = tl.load(low + b[None, :] * rank + r[:, None], mask=mask, other=0.0)
            if kind == tl.float32:
                total = tl.dot(factor, part, total, input_precision="ieee")
            else:  # the factor is exact in bf16, its input as two of them nearly
                rounded = part.to(tl.bfloat16)
                rest = (part - rounded.to(tl.float32)).to(tl.bfloat16)
                total = tl.dot(factor.to(tl.bfloat16), rounded, total)
                total = tl.dot(factor.to(tl.bfloat16), rest, total)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    mask = (rows < m)[:, None] & (b < batch)[None, :]
    tl.store(y + b[None, :] * m + rows[:, None], total.to(y.dtype.element_ty), mask=mask)
