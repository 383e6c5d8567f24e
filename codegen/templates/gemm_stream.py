"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) on Hopper, for weights in `fragment` layout, in Gluon.

As in `gemm_fragment`, the weight is the first operand of the product, y^T = weight x^T, and goes to the tensor cores
from registers. What differs is how it gets there, and how long programs run:

A program is two warp groups that go on without waiting for each other. Each has its own tiles of 64 rows of the weight,
decodes 64 columns of one while the tensor cores multiply those before, and waits for a product only when its registers
are to be written again. x, codes and scales come to shared memory by tensor copies, in a ring of STAGES stages of 128
columns: `full` says that a stage has arrived, `empty` that both groups are done with it. The first group sends for
stages AHEAD, once the other has left them. So x is read from the L2 cache, whose rate limits such products, once for
BLOCK_N rows of the weight.

Scales go where `gemm_fragment` has them ("total", "fragments" or "products"). With "products" a group waits for each
product of 64 columns when it has decoded the next one's weights, adds it to the sum, times its rows' scales, and begins
the next; the other group's products are under way meanwhile. With "pairs" weights are multiplied by scales that are
sums of two numbers of COMPUTE, offsets that are such sums too are added, and no product waits: `stream_rows`. With
SUPERS a tile's sums are in units of the scales above those of fragments, and are multiplied where these change, every
SUPER_COLUMNS.

Which tiles a program has, when it sends for what, and how a product ends: `stream_tiles`. With GATED a group's two
tiles are of the same rows in both halves of the weight, and the epilogue gets both.
"""

# mypy: ignore-errors
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,  # noqa: F401  (by load_block)
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
BITS = tl.constexpr(4)
SPARSE = tl.constexpr(False)
BYTES = tl.constexpr(False)
COLUMNS = tl.constexpr(128)
QUADS = tl.constexpr(0)
SCALES = tl.constexpr("fragments")
PAIRS = tl.constexpr(0)
OFFSET = tl.constexpr(False)
SCALE_BITS = tl.constexpr(16)
SUPER_COLUMNS = tl.constexpr(0)
SUPER_LAST = tl.constexpr(False)
SYMMETRIC = tl.constexpr(True)
COMPUTE = tl.constexpr(tl.bfloat16)
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(256)
STAGES = tl.constexpr(4)
WORDS = tl.constexpr("")
SCALE_WORDS = tl.constexpr("")
OFFSET_WORDS = tl.constexpr("")
NEGATIVE = tl.constexpr(0)
FACTOR = tl.constexpr(1.0)
SHARED = tl.constexpr(True)
GATED = tl.constexpr(False)
OPERANDS = tl.constexpr(False)
# </constants>

# <rows>
from qcompile.codegen.templates.stream_rows import (
    ALIKE,
    GROUPED,
    GROUPS,
    LINE_COLUMNS,
    LINE_LENGTH,
    PRODUCTS,
    ROW_BYTES,
    SUM_ROWS,
    SUMS,
    SUPERS,
    WHL,
    WHLV,
    load_rows,
    load_supers,
    no_supers,
    product_scales,
)

# </rows>
# <spread>
from qcompile.codegen.templates.stream_spread import decode_spread

# </spread>
# <tiles>
from qcompile.codegen.templates.stream_tiles import (
    HALVES,
    PER,
    ROWS,
    STEPS,
    WIDTH_N,
    begin,
    finish,
    load_block,
    place_of,
    send_next,
    steps_of_program,
)

# </tiles>

WIDTHS = tl.constexpr(
    (BITS.value // 2, 1) if SPARSE.value else tuple(width for width in (8, 4, 2, 1) if BITS.value & width)
)
"""Words that a thread has in each plane of a tile of 64 x 64 weights, which has as many lines of 128 words; if it is
sparse of codes, and of what says which columns are kept."""
PLANES = tl.constexpr(len(WIDTHS.value))
FIRSTS = tl.constexpr(tuple(sum(WIDTHS.value[:plane]) for plane in range(PLANES.value)))
"""How many planes there are, and the first line of each."""
STORED = tl.constexpr(sum(WIDTHS.value))
"""Bits that a weight takes in memory."""
SUPER_STEPS = tl.constexpr(max(1, SUPER_COLUMNS.value // 128))
"""Steps whose columns have the same scale above their scales."""
STAGE_BYTES = BLOCK_M * 256 + ROWS * (STORED * 1024 + ROW_BYTES)
"""Of a stage, but for scales above scales."""
ROW_WORDS = tl.constexpr(
    (4 + 4 * OFFSET.value + 2 * (not SYMMETRIC.value)) * (PAIRS.value if BYTES.value else 1)
    if PAIRS.value
    else QUADS.value * (1 + 4 * OFFSET.value) + SUPERS.value
    if BYTES.value and QUADS.value
    else 2 * (SCALES.value == "fragments") + 2 * (not SYMMETRIC.value)
)
CONSTRAINTS = tl.constexpr(
    "=h,=h,=h,=h,r"
    if BITS.value == 8
    else "=h," * (32 if BYTES.value else 8) + ",".join("r" * ((BITS.value if BYTES.value else 1) + ROW_WORDS.value))
)
"""Of WORDS: halves of words of weights from words of codes (BYTES: of all of 64 columns), with those of their rows."""
DECODED = tl.constexpr((tl.int16,) * (32 if BYTES.value else 8))

WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
"""Of weights [64, 64] in registers."""


def plane_layout(width):
    """Of a plane of a tile, [1, 1, width, 128]: each of 128 threads has its words, `layouts.FragmentLayout` says which.

    If they are sparse, neighbours have the same words, and `stream_spread` has the layouts.
    """
    own = width.bit_length() - 1
    bases = [[0, 0, 0, 1 << i] if i < 7 else [0, 0, 1 << (i - 7), 0] for i in range(7 + own)]
    return gl.DistributedLinearLayout(bases[:own], bases[own : own + 5], bases[own + 5 :], [], [1, 1, width, 128])


FIRST_PLANE = gl.constexpr(plane_layout(WIDTHS.value[0]))
SECOND_PLANE = gl.constexpr(plane_layout(WIDTHS.value[min(1, PLANES.value - 1)]))
THIRD_PLANE = gl.constexpr(plane_layout(WIDTHS.value[PLANES.value - 1]))


# <epilogue>
@triton.jit
def epilogue(value, second, bias, operand_0, n, offsets, mask):
    return value


# </epilogue>


@gluon.jit
def decode(ring, stage, half: gl.constexpr, tile: gl.constexpr, rows):
    """Weights [64, 64] from the words of half of a stage's tile in shared memory."""
    if SPARSE:
        weight = decode_spread(ring, stage, half, tile, rows)
    elif BYTES:
        weight = decode_bytes(ring, stage, half, tile, rows)
    else:
        weight = decode_words(ring, stage, half, tile, rows)
    return gl.convert_layout(weight, WEIGHTS, assert_trivial=True)


@gluon.jit
def decode_words(ring, stage, half: gl.constexpr, tile: gl.constexpr, rows):
    """The same as they are decoded word by word, of dense codes of 4 or 8 bits."""
    words = ring[3][0].index(stage).slice(tile, 1, 0).slice(half, 1, 1).load(FIRST_PLANE)
    if BITS == 8:
        words = words.reshape(4, 8, 4, 4, 2)
        a0, b0, a1, b1 = gl.inline_asm_elementwise(
            WORDS, CONSTRAINTS, [words], dtype=(gl.int16, gl.int16, gl.int16, gl.int16), is_pure=True, pack=1
        )
        low, high = gl.join(a0, a1), gl.join(b0, b1)
    else:
        words = gl.convert_layout(words.reshape(4, 8, 4, 4), WHLV, assert_trivial=True)
        a0, b0, a1, b1, a2, b2, a3, b3 = gl.inline_asm_elementwise(
            WORDS, CONSTRAINTS, (words,) + rows, dtype=DECODED, is_pure=True, pack=1
        )
        low, high = gl.join(gl.join(a0, a2), gl.join(a1, a3)), gl.join(gl.join(b0, b2), gl.join(b1, b3))
    return in_order(low, high)


@gluon.jit
def in_order(low, high):
    """Weights [64, 64] from both halves of words, [w, h, l, and then v, s, r]."""
    # w h l v | s r | b, with n = 16 w + 8 r + h and k = 16 v + 8 s + 2 l + b
    fields = gl.join(low.to(COMPUTE, bitcast=True), high.to(COMPUTE, bitcast=True)).reshape(4, 8, 4, 4, 2, 2, 2)
    return gl.permute(fields, (0, 5, 1, 3, 4, 2, 6)).reshape(64, 64)


@gluon.jit
def each_of(words):
    """Of a thread's words of a plane, [1, 1, width, 128], a tuple of [w, h, l]."""
    WIDTH: gl.constexpr = words.shape[2]
    found = ()
    if WIDTH == 1:
        found = (words.reshape(4, 8, 4),)
    elif WIDTH == 2:
        found = words.reshape(4, 8, 4, 2).split()
    else:
        even, odd = words.reshape(4, 8, 4, 2, 2).split()
        a, c = even.split()
        b, d = odd.split()
        found = (a, b, c, d)
    return found


@gluon.jit
def of_runs(fields, FIRST: gl.constexpr):
    """Fields FIRST + 8 v of the runs v of 16 columns, in the last two dimensions."""
    return gl.join(gl.join(fields[FIRST], fields[FIRST + 16]), gl.join(fields[FIRST + 8], fields[FIRST + 24]))


@gluon.jit
def joined(fields, B: gl.constexpr):
    """Of fields 8 v + 4 r + 2 s + b those of one b, [w, h, l, and then v, s, r]."""
    first = gl.join(of_runs(fields, B), of_runs(fields, B + 2))
    return gl.join(first, gl.join(of_runs(fields, B + 4), of_runs(fields, B + 6)))


@gluon.jit
def decode_bytes(ring, stage, half: gl.constexpr, tile: gl.constexpr, rows):
    """As `decode_words`, of integers of less than 8 bits, all that a thread has at once."""
    planes = ring[3]
    words = each_of(planes[0].index(stage).slice(tile, 1, 0).slice(half, 1, 1).load(FIRST_PLANE))
    if PLANES > 1:
        words = words + each_of(planes[1].index(stage).slice(tile, 1, 0).slice(half, 1, 1).load(SECOND_PLANE))
    if PLANES > 2:
        words = words + each_of(planes[2].index(stage).slice(tile, 1, 0).slice(half, 1, 1).load(THIRD_PLANE))
    given = ()
    for i in gl.static_range(BITS):
        given = given + (gl.convert_layout(words[i], WHL, assert_trivial=True),)
    fields = gl.inline_asm_elementwise(WORDS, CONSTRAINTS, given + rows, dtype=DECODED, is_pure=True, pack=1)
    return in_order(joined(fields, 0), joined(fields, 1))


@gluon.jit
def send_weights(inputs, ring, tile_n, step, stage, there):
    """Begin to copy a step's codes, scales and zero points to a stage, if it is `there`."""
    _, planes, scale, zero_point, above, offset, above_offset = inputs
    full, _, _, plane_rings, scale_ring, zero_ring, above_ring, offset_ring, above_offset_ring = ring
    ABOVE_BYTES: gl.constexpr = ROWS * 8 * above.dtype.primitive_bitwidth * SUPERS * (1 + OFFSET)
    mbarrier.expect(full.index(stage), STAGE_BYTES + ABOVE_BYTES, pred=there)
    group = step * 128 // LINE_COLUMNS
    PART: gl.constexpr = ROWS // HALVES
    for half in gl.static_range(HALVES):
        row = tile_n + half * (WIDTH_N // 64)
        for plane in gl.static_range(PLANES):
            into = plane_rings[plane].index(stage).slice(half * PART, PART, 0)
            place = [row, 2 * step, FIRSTS[plane], 0]
            load_block(planes[plane], place, full.index(stage), into, pred=there)
        if GROUPED:
            into = scale_ring.index(stage).slice(half * PART, PART, 0)
            load_block(scale, [row, group, 0], full.index(stage), into, pred=there)
        if GROUPED and not SYMMETRIC:
            into = zero_ring.index(stage).slice(half * PART, PART, 0)
            load_block(zero_point, [row, group, 0], full.index(stage), into, pred=there)
        if SUPERS:
            into = above_ring.index(stage).slice(half * PART, PART, 0)
            place = [row, step * 128 // SUPER_COLUMNS, 0]
            load_block(above, place, full.index(stage), into, pred=there)
            if OFFSET:
                into = above_offset_ring.index(stage).slice(half * PART, PART, 0)
                load_block(above_offset, place, full.index(stage), into, pred=there)
        if OFFSET:
            into = offset_ring.index(stage).slice(half * PART, PART, 0)
            load_block(offset, [row, group, 0], full.index(stage), into, pred=there)


@gluon.jit
def send_x(inputs, ring, first_m, step, stage, there):
    """Begin to copy a step's columns of x to a stage."""
    full, _, xs = ring[:3]
    load_block(inputs[0], [first_m, step * 128], full.index(stage), xs.index(stage), pred=there)


@gluon.jit
def scaled(sums, row_scale, n, m, M):
    """Sums of rows n of the weight, times what multiplies sums."""
    if GROUPED and not SUPER_LAST:
        return sums * FACTOR
    return sums * (gl.load(row_scale + n, mask=n < N, other=0.0).to(gl.float32) * FACTOR)


@gluon.jit
def nothing():
    """Sums before the first product is added."""
    zeros = gl.zeros((64, BLOCK_M), gl.float32, SUMS)
    if PRODUCTS:
        return zeros
    else:
        return warpgroup_mma_init(zeros)


@gluon.jit
def in_units(sum0, sum1, ratio0, ratio1, held, changed):
    """With SUPERS sums in other units if these have changed, when their products are done."""
    if SUPERS and changed:
        sum0, sum1, _ = warpgroup_mma_wait(0, deps=[sum0, sum1, held])
        sum0 = warpgroup_mma_init(sum0 * gl.expand_dims(ratio0, 1))
        sum1 = warpgroup_mma_init(sum1 * gl.expand_dims(ratio1, 1) if PER == 2 else sum1)
    return sum0, sum1


@gluon.jit
def add_last(sum, product, scales, held):
    """With PRODUCTS the sum with the last product, when it is done, times its scales; and that product."""
    if PRODUCTS:
        product, _ = warpgroup_mma_wait(0, deps=[product, held])
        sum += product * scales
    return sum, product


@gluon.jit
def multiply(weight, columns, sum, product, held):
    """Begin to add a product to the sum, or with PRODUCTS to make one, and wait for those before."""
    if PRODUCTS:
        product = warpgroup_mma(weight, columns, product, use_acc=False, is_async=True)
    else:
        sum = warpgroup_mma(weight, columns, sum, is_async=True)
        warpgroup_mma_wait(1, deps=[held])
    return sum, product


@gluon.jit
def work(inputs, ring, outputs, partial, arrived, tiles_m, sharers, M, GROUP: gl.constexpr):
    """All that warp group GROUP does."""
    full, empty, xs = ring[:3]
    FIRST: gl.constexpr = GROUP if GATED else GROUP * PER
    SECOND: gl.constexpr = FIRST + (2 if GATED else 1)
    steps, whole = steps_of_program(tiles_m, sharers)
    if GROUP == 0:
        sent_n, sent_m, sent = begin(inputs, ring, steps, tiles_m, sharers)
    i = 0
    while i < steps:
        place = place_of(i, tiles_m, sharers)
        tile, step = place[0], place[3]
        length = gl.minimum(STEPS - step, steps - i)
        later = ((i > whole) & (step == 0)).to(gl.int32)
        sum0, sum1 = nothing(), nothing()
        held = gl.zeros((64, 64), COMPUTE, WEIGHTS)  # by the product that is under way
        product = warpgroup_mma_init(gl.zeros((64, BLOCK_M), gl.float32, SUMS))
        scales = gl.zeros((64, 1), gl.float32, SUMS)
        unit0, unit1 = gl.full((64,), 1.0, gl.float32, SUM_ROWS), gl.full((64,), 1.0, gl.float32, SUM_ROWS)
        ratio0, ratio1 = unit0, unit1
        supers0, supers1 = no_supers(), no_supers()
        for now in range(i, i + length):
            stage = now % STAGES
            mbarrier.wait(full.index(stage), (now // STAGES) & 1)
            changed = (now == i) | ((step + now - i) % SUPER_STEPS == 0)
            if SUPERS and changed:
                supers0, ratio0, unit0 = load_supers(ring, stage, FIRST, unit0)
                if PER == 2:
                    supers1, ratio1, unit1 = load_supers(ring, stage, SECOND, unit1)
            for half in gl.static_range(2):
                if half % ALIKE == 0:
                    rows0 = load_rows(ring, stage, FIRST, half * GROUPS // 2, supers0)
                    scales0 = product_scales(ring, stage, FIRST, half * GROUPS // 2)
                    if PER == 2:
                        rows1 = load_rows(ring, stage, SECOND, half * GROUPS // 2, supers1)
                        scales1 = product_scales(ring, stage, SECOND, half * GROUPS // 2)
                columns = xs.index(stage).slice(64 * half, 64, 1).permute((1, 0))
                weight = decode(ring, stage, half, FIRST, rows0)
                if PER == 2:
                    sum1, product = add_last(sum1, product, scales, held)
                else:
                    sum0, product = add_last(sum0, product, scales, held)
                if half == 0:
                    sum0, sum1 = in_units(sum0, sum1, ratio0, ratio1, held, changed)
                sum0, product = multiply(weight, columns, sum0, product, held)
                held, scales = weight, scales0
                if half == 0:  # products of the step before are done
                    mbarrier.arrive(empty.index((now + STAGES - 1) % STAGES), pred=now > 0)
                elif GROUP == 0:
                    sent_n, sent_m, sent = send_next(inputs, ring, now, steps, tiles_m, sharers, sent_n, sent_m, sent)
                if PER == 2:
                    weight = decode(ring, stage, half, SECOND, rows1)
                    sum0, product = add_last(sum0, product, scales, held)
                    sum1, product = multiply(weight, columns, sum1, product, held)
                    held, scales = weight, scales1
        if PER == 2:
            sum1, product = add_last(sum1, product, scales, held)
        else:
            sum0, product = add_last(sum0, product, scales, held)
        done0, done1 = warpgroup_mma_wait(0, deps=[sum0, sum1])
        if SUPERS:
            done0, done1 = done0 * gl.expand_dims(unit0, 1), done1 * gl.expand_dims(unit1, 1)
        finish(done0, done1, outputs, partial, arrived, tile, length, later, tiles_m, sharers, M, GROUP)
        i += length


@gluon.jit(do_not_specialize=["sharers", "M"])
def kernel(
    x,
    codes,
    second,
    third,
    scale,
    zero_point,
    above,
    offset,
    above_offset,
    row_scale,
    bias,
    operand_0,
    y,
    partial,
    arrived,
    sharers,
    M,
):
    """Grid: any number of programs, at least `sharers`, of which each has a step at least if tiles are left to share.

    x, planes of codes, scale, zero_point: descriptors of [M, K], of [N / 64, K / 64, STORED, 128] words, of [N / 64,
    groups, 64] and of as many zero points, by blocks of [BLOCK_M, 128], [R, 2, WIDTHS[plane], 128] and twice [R,
    GROUPS, 64], with R = ROWS / HALVES. With QUADS scale is of [N / 64, K / 64, 32 * QUADS] words of four, by blocks
    of [R, 2, 32 * QUADS]. row_scale: [N], the only scales or with SUPER_LAST those above. What the constants make
    needless is not read. partial: float32, two of BLOCK_M * BLOCK_N a sharer; arrived: int32, 0 for both groups of each
    shared tile, and 0 again at the end.
    """
    xs = gl.allocate_shared_memory(COMPUTE, [STAGES, BLOCK_M, 128], x.layout)
    planes = (codes, second, third)
    plane_rings = ()
    for plane in gl.static_range(PLANES):
        ring_of_plane = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 2, WIDTHS[plane], 128], planes[plane].layout)
        plane_rings = plane_rings + (ring_of_plane,)
    scale_ring = xs
    if GROUPED:
        scale_ring = gl.allocate_shared_memory(scale.dtype, [STAGES, ROWS, GROUPS, LINE_LENGTH], scale.layout)
    zero_ring = xs
    if GROUPED and not SYMMETRIC:
        zero_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, ROWS, GROUPS, 64], zero_point.layout)
    above_ring, offset_ring, above_offset_ring = xs, xs, xs
    if SUPERS:
        above_ring = gl.allocate_shared_memory(above.dtype, [STAGES, ROWS, 1, 64], above.layout)
    if OFFSET:
        offset_ring = gl.allocate_shared_memory(offset.dtype, [STAGES, ROWS, GROUPS, LINE_LENGTH], offset.layout)
    if SUPERS and OFFSET:
        above_offset_ring = gl.allocate_shared_memory(above.dtype, [STAGES, ROWS, 1, 64], above_offset.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles_m = gl.cdiv(M, BLOCK_M)
    inputs, outputs = (x, planes, scale, zero_point, above, offset, above_offset), (row_scale, bias, operand_0, y)
    ring = (full, empty, xs, plane_rings, scale_ring, zero_ring, above_ring, offset_ring, above_offset_ring)
    gl.warp_specialize(
        [
            (work, (inputs, ring, outputs, partial, arrived, tiles_m, sharers, M, 0)),
            (work, (inputs, ring, outputs, partial, arrived, tiles_m, sharers, M, 1)),
        ],
        [4],
        [256],
    )
