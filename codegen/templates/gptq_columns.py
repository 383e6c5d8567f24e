"""GPTQ's columns [K, N] of a block, one after the other: codes [K, N], and errors [K, N] over the factor's diagonal.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1, for the columns of one block. A program takes all of them for some
rows of the weight, in registers: it chooses the codes of a column, and takes what the column is off by from those that
come after it. Rows know nothing of each other.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
ZERO_POINT = tl.constexpr(False)
SHIFT = tl.constexpr(False)
BLOCK_K = tl.constexpr(128)
BLOCK_N = tl.constexpr(16)
# </constants>


# <nearest>
@triton.jit
def nearest(x):
    """The nearest code, int32, and its value, of float32 x; NaN is taken for 0."""
    value = tl.minimum(tl.maximum(x, -8.0), 7.0)
    value = (value + 12582912.0) - 12582912.0
    return (value + 8.0).to(tl.int32), value


# </nearest>


@triton.jit
def kernel(own, factor, step, zero_point, shift, places, codes, errors, N, columns, strips, tall):
    """Grid: (ceil(N / BLOCK_N),).

    own: float32 [columns, N]; factor: float32 [columns, columns], upper triangular.
    step, zero_point, shift: float32 [column blocks, strips], of `tall` rows each; places: int32 [columns], the column
    block of each. Pointers that the constants make needless are not read.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows, there = n < N, k < columns
    strip = n // tall
    left = tl.load(own + k[:, None] * N + n[None, :], mask=there[:, None] & rows[None, :], other=0.0)
    for i in range(columns):
        column = tl.sum(tl.where((k == i)[:, None], left, 0.0), 0)
        at = tl.load(places + i) * strips + strip
        size = tl.load(step + at, mask=rows, other=1.0)
        wanted = column
        if SHIFT:
            low = tl.load(shift + at, mask=rows, other=0.0)
            wanted = wanted - low
        wanted = tl.div_rn(wanted, size)
        if ZERO_POINT:
            zero = tl.load(zero_point + at, mask=rows, other=0.0)
            wanted = wanted + zero
        code, value = nearest(wanted)
        if ZERO_POINT:
            value = value - zero
        value = value * size
        if SHIFT:
            value = value + low
        error = tl.div_rn(column - value, tl.load(factor + i * columns + i))
        tl.store(codes + i * N + n, code.to(tl.uint8), mask=rows)
        tl.store(errors + i * N + n, error, mask=rows)
        carried = tl.load(factor + i * columns + k, mask=there, other=0.0)
        left = left - carried[:, None] * error[None, :]
