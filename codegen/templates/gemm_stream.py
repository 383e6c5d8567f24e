"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) on Hopper, for 4-bit weights in the `fragment` layout, in Gluon.

As in `gemm_fragment`, the weight is the first operand of the product, y^T = weight x^T, and goes to the tensor cores
from registers. What differs is how it gets there, and how long programs run:

A program is two warp groups that go on without waiting for each other. Each has its own tiles of 64 rows of the weight,
decodes 64 columns of one while the tensor cores multiply those before, and waits for a product only when its registers
are to be written again. x, codes and scales come to shared memory by tensor copies, in a ring of STAGES stages of 128
columns: `full` says that a stage has arrived, `empty` that both groups are done with it. The first group sends for
stages AHEAD, once the other has left them. So x is read from the L2 cache, whose rate limits such products, once for
BLOCK_N rows of the weight.

There are as many programs as multiprocessors. All steps of all tiles, one tile after another, are divided evenly among
them: a program ends one tile, computes some whole, and begins another. Of a tile that several share, each leaves its
part in memory, and the last to arrive adds them in their order, so that results do not depend on timing.

With GATED a group's two tiles are of the same rows in both halves of the weight, and the epilogue gets both.
"""

# mypy: ignore-errors
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
COLUMNS = tl.constexpr(128)
SYMMETRIC = tl.constexpr(True)
COMPUTE = tl.constexpr(tl.bfloat16)
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(256)
STAGES = tl.constexpr(4)
WORDS = tl.constexpr("")
NEGATIVE = tl.constexpr(0)
FACTOR = tl.constexpr(1.0)
GATED = tl.constexpr(False)
# </constants>

STEPS = (K + 127) // 128
"""Of a tile, of 128 columns each."""
ROWS = BLOCK_N // 64
"""Tiles of 64 rows that a program has; a group has `PER`."""
PER = ROWS // 2
GROUPS = tl.constexpr(max(1, 128 // COLUMNS.value))
"""Scales of a row in a step: those of halves of it, or one."""
HALVES = tl.constexpr(2 if GATED.value else 1)
WIDTH_N = N // HALVES
TILES_N = (WIDTH_N + 64 * ROWS // HALVES - 1) // (64 * ROWS // HALVES)
"""Programs' tiles across the output."""
AHEAD = tl.constexpr(STAGES.value - (1 if STAGES.value < 4 else 2))
BYTES = BLOCK_M * 256 + ROWS * (4096 + GROUPS * (128 if SYMMETRIC else 192))
"""Of a stage."""
CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r" + (",r,r,r,r" if not SYMMETRIC.value else ",r,r"))

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M.value, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
"""Layouts of sums [64, BLOCK_M] and of weights [64, 64] in registers."""
TILE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2]],
        [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 0, 64]],
        [[0, 0, 128], [0, 1, 0]],
        [],
        [1, 2, 256],
    )
)
"""The words of a tile of 64 x 64: each of 128 threads has its four, as `layouts.FragmentLayout` has them."""
WHLV = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2]],
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        [[1, 0, 0, 0], [2, 0, 0, 0]],
        [],
        [4, 8, 4, 4],
    )
)
"""The same as [warps w, h, l, words v], and of what belongs to rows w and h."""
WH = gl.constexpr(gl.SliceLayout(2, gl.SliceLayout(3, WHLV.value)))
SLOTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 8]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[0, 0, 16], [0, 0, 32]],
        [],
        [1, 1, 64],
    )
)
"""What belongs to 64 rows: a thread has its two, r = 0 and 1."""
OUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
"""In which outputs [64, BLOCK_M] are stored, eight neighbours a thread."""


# <epilogue>
@triton.jit
def epilogue(value, second, bias, operand_0, n, offsets, mask):
    return value


# </epilogue>


@gluon.jit
def words_of(halves):
    """16-bit numbers of rows w and h in both halves of words, for all l and v of them."""
    halves = gl.convert_layout(halves, WH, assert_trivial=True)
    words = (halves.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001
    return gl.expand_dims(gl.expand_dims(words, 2), 3)


@gluon.jit
def two_rows(values):
    """Of what belongs to 64 rows, that of rows r = 0 and r = 1 of threads."""
    return gl.permute(values.load(SLOTS).reshape(4, 2, 8), (0, 2, 1)).split()


@gluon.jit
def load_rows(ring, stage, row, group: gl.constexpr):
    """Zero points, if there are, and scales of a tile's rows, as `decoders.word_assembly` takes them."""
    scales, zeros = ring[2], ring[3]
    first, second = two_rows(scales.index(stage).slice(row, 1, 0).slice(group, 1, 1))
    found = (words_of(first.to(COMPUTE)), words_of(second.to(COMPUTE)))
    if not SYMMETRIC:
        first, second = two_rows(zeros.index(stage).slice(row, 1, 0).slice(group, 1, 1))
        first, second = words_of(first.to(gl.int16)), words_of(second.to(gl.int16))
        found = (first + NEGATIVE, second + NEGATIVE) + found
    return found


@gluon.jit
def decode(codes, rows):
    """Weights [64, 64] from a tile's words in shared memory."""
    words = gl.convert_layout(codes.load(TILE).reshape(4, 8, 4, 4), WHLV, assert_trivial=True)
    a0, b0, a1, b1, a2, b2, a3, b3 = gl.inline_asm_elementwise(
        WORDS,
        CONSTRAINTS,
        (words,) + rows,
        dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16),
        is_pure=True,
        pack=1,
    )
    low = gl.join(gl.join(a0, a2), gl.join(a1, a3)).to(COMPUTE, bitcast=True)  # s | r
    high = gl.join(gl.join(b0, b2), gl.join(b1, b3)).to(COMPUTE, bitcast=True)
    # w h l v | s r | b, with n = 16 w + 8 r + h and k = 16 v + 8 s + 2 l + b
    weight = gl.permute(gl.join(low, high), (0, 5, 1, 3, 4, 2, 6)).reshape(64, 64)
    return gl.convert_layout(weight, WEIGHTS, assert_trivial=True)


@gluon.jit
def place_of(step, tiles_m):
    """Of a step of all: its tile's first tile of 64 rows, its first row of x, and which of the tile's steps it is."""
    tile = step // STEPS
    return tile // tiles_m * (ROWS // HALVES), tile % tiles_m * BLOCK_M, step % STEPS


@gluon.jit
def send_weights(inputs, ring, tile_n, step, stage, there):
    """Begin to copy a step's codes, scales and zero points to a stage, if it is `there`."""
    x, codes, scale, zero_point = inputs
    _, codes_ring, scale_ring, zero_ring, full, _ = ring
    mbarrier.expect(full.index(stage), BYTES, pred=there)
    group = step * 128 // COLUMNS
    PART: gl.constexpr = ROWS // HALVES
    for half in gl.static_range(HALVES):
        row = tile_n + half * (WIDTH_N // 64)
        into = codes_ring.index(stage).slice(half * PART, PART, 0)
        tma.async_copy_global_to_shared(codes, [row, step * 4, 0], full.index(stage), into, pred=there)
        into = scale_ring.index(stage).slice(half * PART, PART, 0)
        tma.async_copy_global_to_shared(scale, [row, group, 0], full.index(stage), into, pred=there)
        if not SYMMETRIC:
            into = zero_ring.index(stage).slice(half * PART, PART, 0)
            tma.async_copy_global_to_shared(zero_point, [row, group, 0], full.index(stage), into, pred=there)


@gluon.jit
def send_x(inputs, ring, first_m, step, stage, there):
    """Begin to copy a step's columns of x to a stage."""
    full = ring[4]
    tma.async_copy_global_to_shared(
        inputs[0], [first_m, step * 128], full.index(stage), ring[0].index(stage), pred=there
    )


@gluon.jit
def begin(inputs, ring, first, last, tiles_m):
    """Send for the first stages: for weights at once, for x when the kernels before have written all they write."""
    for i in gl.static_range(AHEAD):
        tile_n, first_m, step = place_of(first + i, tiles_m)
        send_weights(inputs, ring, tile_n, step, i, first + i < last)
    PTX: gl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for i in gl.static_range(AHEAD):
        tile_n, first_m, step = place_of(first + i, tiles_m)
        send_x(inputs, ring, first_m, step, i, first + i < last)


@gluon.jit
def send_next(inputs, ring, first, last, now, tiles_m):
    """At step `now`, send for step now + AHEAD, when both groups have left its stage."""
    i = now + AHEAD - first
    stage = i % STAGES
    there = now + AHEAD < last
    tile_n, first_m, step = place_of(now + AHEAD, tiles_m)
    mbarrier.wait(ring[5].index(stage), (i // STAGES - 1) & 1, pred=there & (i >= STAGES))
    send_weights(inputs, ring, tile_n, step, stage, there)
    send_x(inputs, ring, first_m, step, stage, there)


@gluon.jit
def put(value, second, outputs, row, first_m, M):
    """The epilogue of sums of 64 columns of the output from `row`; with GATED, of sums of both halves."""
    bias, operand_0, y = outputs
    m = first_m + gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS)), 0)
    n = row + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, SUMS)), 1)
    mask = (m < M) & (n < WIDTH_N)
    offsets = m.to(gl.int64) * WIDTH_N + n
    value = epilogue(value * FACTOR, second * FACTOR, bias, operand_0, n, offsets, mask)
    value = gl.convert_layout(value.to(y.dtype.element_ty), OUT)
    m = first_m + gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT)), 0)
    n = row + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, OUT)), 1)
    gl.store(y + m.to(gl.int64) * WIDTH_N + n, value, mask=(m < M) & (n < WIDTH_N))


@gluon.jit
def add_parts(parts, slot, least, most):
    """The sum of what the programs from `least` to `most` left, each first in its first slot, but `least` in `slot`."""
    SLOT: gl.constexpr = BLOCK_N * BLOCK_M
    total = gl.load(parts + slot.to(gl.int64) * SLOT, cache_modifier=".cg")
    for other in range(least + 1, most + 1):
        total += gl.load(parts + (2 * other).to(gl.int64) * SLOT, cache_modifier=".cg")
    return total


@gluon.jit
def finish(sum0, sum1, outputs, partial, arrived, tile, begun, ended, first, total, tiles_m, M, GROUP: gl.constexpr):
    """The end of a group's tiles of 64 rows, of which this program has summed the steps from `begun` to `ended`."""
    row = tile // tiles_m * (64 * ROWS // HALVES) + GROUP * (64 * PER // HALVES)
    first_m = tile % tiles_m * BLOCK_M
    if ended - begun == STEPS:
        put(sum0, sum1, outputs, row, first_m, M)
        if PER // HALVES == 2:
            put(sum1, sum1, outputs, row + 64, first_m, M)
    else:
        programs = gl.num_programs(0)
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
        n = gl.arange(0, 64, gl.SliceLayout(1, SUMS)) + GROUP * (64 * PER)
        parts = partial + gl.expand_dims(n, 1) * BLOCK_M + gl.expand_dims(m, 0)
        own = parts + (2 * gl.program_id(0) + (begun > first)).to(gl.int64) * (BLOCK_N * BLOCK_M)
        gl.store(own, sum0, cache_modifier=".cg")
        if PER == 2:
            gl.store(own + 64 * BLOCK_M, sum1, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this group come before its arrival
        start = tile * STEPS
        least = ((start + 1) * programs - 1) // total  # the programs that have the tile's first and last step
        most = ((start + STEPS) * programs - 1) // total
        if gl.atomic_add(arrived + 2 * tile + GROUP, 1, sem="acq_rel", scope="gpu") == most - least:
            gl.store(arrived + 2 * tile + GROUP, 0)
            slot = 2 * least + (least * total // programs < start)
            whole = add_parts(parts, slot, least, most)
            if GATED:
                put(whole, add_parts(parts + 64 * BLOCK_M, slot, least, most), outputs, row, first_m, M)
            else:
                put(whole, whole, outputs, row, first_m, M)
                if PER == 2:
                    whole = add_parts(parts + 64 * BLOCK_M, slot, least, most)
                    put(whole, whole, outputs, row + 64, first_m, M)


@gluon.jit
def work(inputs, ring, outputs, partial, arrived, first, last, total, tiles_m, M, GROUP: gl.constexpr):
    """All that warp group GROUP does: steps `first` to `last` of all."""
    xs, codes, _, _, full, empty = ring
    FIRST: gl.constexpr = GROUP if GATED else GROUP * PER
    SECOND: gl.constexpr = FIRST + (2 if GATED else 1)
    if GROUP == 0:
        begin(inputs, ring, first, last, tiles_m)
    for tile in range(first // STEPS, (last + STEPS - 1) // STEPS):
        begun = gl.maximum(first, tile * STEPS)
        ended = gl.minimum(last, tile * STEPS + STEPS)
        sum0 = warpgroup_mma_init(gl.zeros((64, BLOCK_M), gl.float32, SUMS))
        sum1 = warpgroup_mma_init(gl.zeros((64, BLOCK_M), gl.float32, SUMS))
        held = gl.zeros((64, 64), COMPUTE, WEIGHTS)  # by the product that is under way
        for now in range(begun, ended):
            i = now - first
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            for half in gl.static_range(2):
                if half % (2 // GROUPS) == 0:
                    rows0 = load_rows(ring, stage, FIRST, half * GROUPS // 2)
                    if PER == 2:
                        rows1 = load_rows(ring, stage, SECOND, half * GROUPS // 2)
                words = codes.index(stage).slice(2 * half, 2, 1)
                columns = xs.index(stage).slice(64 * half, 64, 1).permute((1, 0))
                weight = decode(words.slice(FIRST, 1, 0), rows0)
                sum0 = warpgroup_mma(weight, columns, sum0, is_async=True)
                warpgroup_mma_wait(1, deps=[held])
                held = weight
                if half == 0:  # products of the step before are done
                    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=i > 0)
                elif GROUP == 0:
                    send_next(inputs, ring, first, last, now, tiles_m)
                if PER == 2:
                    weight = decode(words.slice(SECOND, 1, 0), rows1)
                    sum1 = warpgroup_mma(weight, columns, sum1, is_async=True)
                    warpgroup_mma_wait(1, deps=[held])
                    held = weight
        done0, done1 = warpgroup_mma_wait(0, deps=[sum0, sum1])
        finish(done0, done1, outputs, partial, arrived, tile, begun, ended, first, total, tiles_m, M, GROUP)


@gluon.jit(do_not_specialize=["M"])
def kernel(x, codes, scale, zero_point, bias, operand_0, y, partial, arrived, M):
    """Grid: at most as many programs as there are steps.

    x, codes, scale, zero_point: descriptors of [M, K], of [N / 64, K / 16, 256] words and of [N / 64, groups, 64], by
    blocks of [BLOCK_M, 128], [R, 4, 256] and [R, GROUPS, 64], with R = ROWS / HALVES. partial: float32, two of BLOCK_M *
    BLOCK_N a program; arrived: int32, 0 for both groups of each tile, and 0 again at the end.
    """
    xs = gl.allocate_shared_memory(COMPUTE, [STAGES, BLOCK_M, 128], x.layout)
    code_ring = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 4, 256], codes.layout)
    scale_ring = gl.allocate_shared_memory(scale.dtype, [STAGES, ROWS, GROUPS, 64], scale.layout)
    if SYMMETRIC:
        zero_ring = scale_ring
    else:
        zero_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, ROWS, GROUPS, 64], zero_point.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles_m = gl.cdiv(M, BLOCK_M)
    total = TILES_N * STEPS * tiles_m
    first = gl.program_id(0) * total // gl.num_programs(0)
    last = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    inputs, outputs = (x, codes, scale, zero_point), (bias, operand_0, y)
    ring = (xs, code_ring, scale_ring, zero_ring, full, empty)
    gl.warp_specialize(
        [
            (work, (inputs, ring, outputs, partial, arrived, first, last, total, tiles_m, M, 0)),
            (work, (inputs, ring, outputs, partial, arrived, first, last, total, tiles_m, M, 1)),
        ],
        [4],
        [256],
    )
