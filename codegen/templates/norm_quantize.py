"""A norm of rows [M, K], and the codes and scales of each group of its columns, with one read of the rows.

A program has a row in registers: as groups of columns, whose squares are summed over all and whose maxima are each
group's own. What is computed is what `qcompile.norms.plain` says.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
K = tl.constexpr(256)
COLUMNS = tl.constexpr(128)
GROUPS_POWER = tl.constexpr(2)
CENTERED = tl.constexpr(False)
EPS = tl.constexpr(1e-6)
WEIGHT = tl.constexpr("plain")
EARLY = tl.constexpr(False)
BIAS = tl.constexpr(False)
RESIDUAL = tl.constexpr(False)
KEEP_SUM = tl.constexpr(False)
KEEP_NORM = tl.constexpr(False)
ABSMAX = tl.constexpr(448.0)
INTEGER = tl.constexpr(False)
POWERS = tl.constexpr(False)
ABOVE_ONE = tl.constexpr(8)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
WHOLE = tl.constexpr(K.value == GROUPS_POWER.value * COLUMNS.value)


@triton.jit
def total(values):
    """The sum of all."""
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def magnitudes(values):
    """Of each group the greatest; NaN if it holds one, whose bits are more than those of infinity."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(top):
    """The scale of a group whose greatest magnitude is `top`."""
    if POWERS:
        exponent = (top.to(tl.int32, bitcast=True) >> 23) - ABOVE_ONE
        power = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
        finite = tl.where(top == 0, 1.0, power)
        return tl.where(top < float("inf"), finite, top)
    else:
        scale = tl.div_rn(top, ABSMAX)
        return tl.where(scale == 0, 1.0, scale)


@triton.jit
def kernel(x, residual, weight, bias, codes, scale, sum, norm):
    """Grid: (M,). Pointers that the constants make needless are not used."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POWER)
    k = group[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = tl.full((GROUPS_POWER, COLUMNS), True, tl.int1) if WHOLE else k < K
    place = row * K + k
    held = tl.load(x + place, mask=there, other=0.0)
    if RESIDUAL:
        held = (held.to(tl.float32) + tl.load(residual + place, mask=there, other=0.0).to(tl.float32)).to(held.dtype)
    if KEEP_SUM:
        tl.store(sum + place, held, mask=there)
    value = held.to(tl.float32)
    if CENTERED:
        value = tl.where(there, value - total(value) / K, 0.0)
    value *= tl.rsqrt(total(value * value) / K + EPS)
    if EARLY:
        value = value.to(held.dtype).to(tl.float32)
    if WEIGHT != "":
        factor = tl.load(weight + k, mask=there, other=0.0).to(tl.float32)
        if WEIGHT == "one more":
            factor += 1.0
        value *= factor
    if BIAS:
        value += tl.load(bias + k, mask=there, other=0.0).to(tl.float32)
    result = value.to(held.dtype)
    if KEEP_NORM:
        tl.store(norm + place, result, mask=there)
    value = result.to(tl.float32)
    scales = scale_of(magnitudes(value))
    tl.store(scale + row * GROUPS + group, scales, mask=group < GROUPS)
    value = value / scales[:, None]
    if INTEGER:
        # The sum's last place is 1, so it is rounded to an integer, half to even.
        value = tl.clamp((value + 12582912.0) - 12582912.0, -ABSMAX - 0.5, ABSMAX - 0.5)
    else:
        value = tl.clamp(value, -ABSMAX, ABSMAX)
    tl.store(codes + place, value.to(codes.dtype.element_ty), mask=there)
