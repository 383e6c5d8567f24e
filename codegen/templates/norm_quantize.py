"""Sums of rows [M, K], their norm, and its codes and scales for each group of columns, with one read of the rows.

A program has a row in registers: as groups of columns, whose squares are summed over all and whose maxima are each
group's own. What is computed is what `qcompile.norms.plain` says. The kernel behind this one may begin, but not before
all kernels before are done: one that waits for this one alone finds their results.

With PARTS, rows are first added over as many GPUs, in two steps without a barrier. A program writes its row into the
memory of each, 4 bytes beside the number of the call, which 8 bytes carry as one. Then it waits until all rows with its
number are in its own memory. There are two such memories, used in turns: a GPU that has got the rows of a call knows
that the others have begun it, and so have read those of the call before the last.
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
PARTS = tl.constexpr(1)
SHARE = tl.constexpr(65536)
QUANTIZED = tl.constexpr(True)
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
def in_steps(values, scales):
    """Rows of values / scales, rounded as IEEE 754 says, with one division for each scale.

    An inverse that is rounded correctly, and what a quotient leaves of the value, give the next quotient; of the second
    one the last place is right (P. Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990).
    Where scales are tiny both are multiplied by a power of two: the inverse is finite then, and what is left exact.
    """
    factor = tl.where(scales < 2.0**-60, 2.0**64, 1.0)
    scales = scales * factor
    inverse = tl.div_rn(1.0, scales)[:, None]
    values, less = values * factor[:, None], -scales[:, None]
    found = values * inverse
    for _ in tl.static_range(2):
        found = tl.fma(tl.fma(found, less, values), inverse, found)
    return found


@triton.jit
def normalized(held, weight, bias, there):
    """The norm of a row, in the row's type."""
    value = held.to(tl.float32)
    if NORM == "layer":
        value = tl.where(there, value - total(value) / K, 0.0)
    value *= tl.rsqrt(total(value * value) / K + EPS)
    if EARLY:
        value = value.to(held.dtype).to(tl.float32)
    if WEIGHT != "":
        value *= weight.to(tl.float32) + (1.0 if WEIGHT == "one more" else 0.0)
    if BIAS:
        value += bias.to(tl.float32)
    return value.to(held.dtype)


@triton.jit
def quantize(result, codes, scale, row, place, there):
    """Write the codes of a row, and the scales of its groups."""
    group = tl.arange(0, GROUPS_POWER)
    value = result.to(tl.float32)
    scales = scale_of(magnitudes(value))
    tl.store(scale + row * GROUPS + group, scales, mask=group < GROUPS)
    value = in_steps(value, scales)
    if INTEGER:
        # The sum's last place is 1, so it is rounded to an integer, half to even.
        value = tl.clamp((value + 12582912.0) - 12582912.0, -ABSMAX - 0.5, ABSMAX - 0.5)
    else:
        value = tl.clamp(value, -ABSMAX, ABSMAX)
    tl.store(codes + place, value.to(codes.dtype.element_ty), mask=there)


@triton.jit
def values_of(words, dtype: tl.constexpr):
    """The float32 values of words of 4 bytes, one or two in each."""
    if dtype == tl.float32:
        values = words.to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.uint16).to(dtype, bitcast=True)
        high = (words >> 16).to(tl.uint16).to(dtype, bitcast=True)
        values = tl.interleave(low, high).to(tl.float32)
    return values


@triton.jit
def is_missing(arrived, call, there):
    """Whether any of the words has not come yet."""
    others = there & ((arrived >> 32).to(tl.int32) != call)
    return tl.max(tl.max(others.to(tl.int32), 1), 0) != 0


@triton.jit
def added(x, mine, peers, calls, rank):
    """The program's row of x of all GPUs, added in float32 in the order of their ranks."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    EACH: tl.constexpr = 4 // (dtype.primitive_bitwidth // 8)
    word = tl.arange(0, GROUPS_POWER)[:, None] * (COLUMNS // EACH) + tl.arange(0, COLUMNS_POWER // EACH)[None, :]
    there = word < K // EACH
    call = tl.load(calls) + 1
    place = row * (K // EACH) + word
    words = tl.load(x.to(tl.pointer_type(tl.int32)) + place, mask=there, other=0)
    sent = (call.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    place += (call & 1) * (PARTS * SHARE)
    for other in tl.static_range(PARTS):
        theirs = tl.multiple_of(tl.load(peers + other).to(tl.pointer_type(tl.int64)), 16)
        tl.store(theirs + rank * SHARE + place, sent, mask=there)
    total = tl.zeros((GROUPS_POWER, COLUMNS_POWER), tl.float32)
    for other in tl.static_range(PARTS):
        arrived = tl.load(mine + other * SHARE + place, mask=there, other=0, volatile=True)
        while is_missing(arrived, call, there):
            arrived = tl.load(mine + other * SHARE + place, mask=there, other=0, volatile=True)
        total += values_of(arrived.to(tl.int32), dtype)
    # The last program to have read the number of calls counts this one.
    if tl.num_programs(0) == 1:
        tl.store(calls, call)
    elif tl.atomic_add(calls + 1, 1) == tl.num_programs(0) - 1:
        tl.store(calls + 1, 0)
        tl.store(calls, call)
    return total.to(dtype)


@triton.jit(do_not_specialize=["rank"])
def kernel(x, residual, weight, bias, codes, scale, sum, norm, mine, peers, calls, rank):
    """Grid: (M,). Pointers that the constants make needless are not used.

    mine: int64 [2, PARTS, SHARE], which the other GPUs write; peers: int64 [PARTS], the addresses of all of these.
    calls: int32 [2], how many calls were before, and how many programs have read that.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POWER)
    k = group[:, None] * COLUMNS + tl.arange(0, COLUMNS_POWER)[None, :]
    there = tl.full((GROUPS_POWER, COLUMNS_POWER), True, tl.int1) if WHOLE else k < K
    place = row * K + k
    # Parameters are loaded before anything is waited for.
    if WEIGHT != "":
        weight = tl.load(weight + k, mask=there, other=0.0)
    if BIAS:
        bias = tl.load(bias + k, mask=there, other=0.0)
    wait_for_inputs()
    if RESIDUAL:
        residual = tl.load(residual + place, mask=there, other=0.0)
    held = added(x, mine, peers, calls, rank) if PARTS > 1 else tl.load(x + place, mask=there, other=0.0)
    if RESIDUAL:
        held = (held.to(tl.float32) + residual.to(tl.float32)).to(held.dtype)
    if KEEP_SUM:
        tl.store(sum + place, held, mask=there)
    result = held
    if NORM != "":
        result = normalized(held, weight, bias, there)
    if KEEP_NORM:
        tl.store(norm + place, result, mask=there)
    if QUANTIZED:
        quantize(result, codes, scale, row, place, there)
