"""The scale (and zero point) of each group of a weight [N, K] under which its codes err least, in weighted squares.

What `calibrate.fit.best_grid` tries, for a group in registers: several shares of the group's range, and of its number
of the greatest magnitude, and after each the scale that fits its codes best.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
ABSMAX = tl.constexpr(7.5)
STEPS = tl.constexpr(15.0)
FARTHEST = tl.constexpr(-8.0)
OF_ZEROS = tl.constexpr(1.0)
ZERO_POINT = tl.constexpr(False)
SCALE = tl.constexpr(tl.bfloat16)
COLUMNS = tl.constexpr(128)
ROWS = tl.constexpr(16)
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
def stored(step):
    """A scale as it is stored."""
    return step.to(SCALE).to(tl.float32)


@triton.jit
def chosen(x, weight, size, zero):
    """The values of the nearest codes, and the error of each row."""
    wanted = tl.div_rn(x, tl.broadcast_to(size[:, None], x.shape))
    if ZERO_POINT:
        wanted = wanted + zero[:, None]
    _, value = nearest(wanted)
    if ZERO_POINT:
        value = value - zero[:, None]
    off = x - value * size[:, None]
    return value, tl.sum(off * off * weight[None, :], 1)


@triton.jit
def kernel(w, weight, shares, scale, zero_point, N, groups, ranges, count):
    """Grid: (ceil(N / ROWS), groups).

    w: float32 [N, groups * COLUMNS]; weight: float32 [groups * COLUMNS]; shares: float32 [count], of the range the
    first `ranges`, beginning with 1, and of the greatest number the others, which zero points have none of. scale:
    float32 [N, groups], numbers of the type that is stored; zero_point: uint8 [N, groups], where there are any.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    k = group * COLUMNS + tl.arange(0, COLUMNS)
    there = row < N
    x = tl.load(w + row.to(tl.int64)[:, None] * (groups * COLUMNS) + k[None, :], mask=there[:, None], other=0.0)
    importance = tl.load(weight + k)
    low, high = tl.min(x, 1), tl.max(x, 1)
    extreme = tl.div_rn(tl.where(-low > high, low, high), tl.full([ROWS], FARTHEST, tl.float32))
    if ZERO_POINT:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    top = tl.maximum(-low, high)
    steps, absmax = tl.full([ROWS], STEPS, tl.float32), tl.full([ROWS], ABSMAX, tl.float32)
    best = tl.zeros([ROWS], tl.float32)
    best_zero = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.float32)
    least = tl.full([ROWS], float("inf"), tl.float32)
    for i in range(count):
        share = tl.load(shares + i)
        zero = best_zero
        if ZERO_POINT:
            step = tl.div_rn(high * share, steps) - tl.div_rn(low * share, steps)
        else:
            step = tl.div_rn(top * share, absmax)
        size = stored(step)
        size = tl.where(size == 0, OF_ZEROS, size)
        if ZERO_POINT:
            _, zero = nearest(tl.div_rn(-(low * share), size))
        else:
            plain = tl.where(i == 0, size, plain)
            other = stored(extreme * share)
            other = tl.where((other > 0) & (other < float("inf")), other, plain)
            size = tl.where(i < ranges, size, other)
        value, error = chosen(x, importance, size, zero)
        better = (error < least) | (i == 0)
        best, best_zero = tl.where(better, size, best), tl.where(better, zero, best_zero)
        least = tl.where(better, error, least)
        weighted = value * importance[None, :]
        fitted = stored(tl.div_rn(tl.sum(weighted * x, 1), tl.sum(weighted * value, 1)))
        size = tl.where((fitted > 0) & (fitted < float("inf")), fitted, size)
        value, error = chosen(x, importance, size, zero)
        better = error < least
        best, best_zero = tl.where(better, size, best), tl.where(better, zero, best_zero)
        least = tl.where(better, error, least)
    at = row.to(tl.int64) * groups + group
    tl.store(scale + at, best, mask=there)
    if ZERO_POINT:
        tl.store(zero_point + at, best_zero.to(tl.uint8), mask=there)
