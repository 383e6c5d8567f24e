"""A norm of rows [M, K], or the rows themselves, as codes and scales of each group of columns, with one read of them.

A program has a row in registers: as groups of columns, whose squares are summed over all and whose maxima are each
group's own. What is computed is what `qcompile.norms.plain` says. The kernel behind this one may begin, but not before
all kernels before are done: one that waits for this one alone finds their results.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
K = tl.constexpr(256)
COLUMNS = tl.constexpr(128)
COLUMNS_POWER = tl.constexpr(128)
GROUPS_POWER = tl.constexpr(2)
NORM = tl.constexpr("rms")
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
EARLY_LAUNCH = tl.constexpr(True)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
WHOLE = tl.constexpr(K.value == GROUPS_POWER.value * COLUMNS_POWER.value)


@triton.jit
def wait_for_inputs():
    """Until the kernels before have written all they write; those after may begin then."""
    if EARLY_LAUNCH:
        PTX: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


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
def normalized(held, weight, bias, k, there):
    """The norm of a row, in the row's type."""
    value = held.to(tl.float32)
    if NORM == "layer":
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
    return value.to(held.dtype)


@triton.jit
def kernel(x, residual, weight, bias, codes, scale, sum, norm):
    """Grid: (M,). Pointers that the constants make needless are not used."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POWER)
    k = group[:, None] * COLUMNS + tl.arange(0, COLUMNS_POWER)[None, :]
    there = tl.full((GROUPS_POWER, COLUMNS_POWER), True, tl.int1) if WHOLE else k < K
    place = row * K + k
    wait_for_inputs()
    held = tl.load(x + place, mask=there, other=0.0)
    if RESIDUAL:
        held = (held.to(tl.float32) + tl.load(residual + place, mask=there, other=0.0).to(tl.float32)).to(held.dtype)
    if KEEP_SUM:
        tl.store(sum + place, held, mask=there)
    result = held
    if NORM != "":
        result = normalized(held, weight, bias, k, there)
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
