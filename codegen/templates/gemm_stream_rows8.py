"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) on Hopper, for int8 weights in rows and activations alike, in Gluon.

As in `gemm_rows8`, the weight is the first operand of the product, y^T = weight x^T; as in `gemm_stream`, a program is
two warp groups that go on without waiting for each other, here with operands that tensor cores take from shared memory
as they are. Each group has its own tiles of 64 rows of the weight, and shares x with the other. Tensor copies bring
both in a ring of STAGES stages of 128 columns: `full` says that a stage has arrived, `empty` that both groups are done
with it. Which tiles a program has, when it sends for what, and how a product ends: `stream_tiles`.

Sums are of int32, exactly. With GATED a group's two tiles are of the same rows in both halves of the weight, and the
epilogue gets both.
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
    warpgroup_mma_wait,
)

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
SCALE_ROWS = tl.constexpr(1)
X_SCALE = tl.constexpr("token")
BLOCK_M = tl.constexpr(128)
BLOCK_N = tl.constexpr(256)
STAGES = tl.constexpr(4)
SHARED = tl.constexpr(True)
GATED = tl.constexpr(False)
OPERANDS = tl.constexpr(False)
# </constants>

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M.value, 32]))
"""Layout of sums [64, BLOCK_M] in registers."""

# <tiles>
from qcompile.codegen.templates.stream_tiles import (
    HALVES,
    PER,
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

BYTES = 128 * (BLOCK_M + BLOCK_N)
"""Of a stage."""


# <epilogue>
@triton.jit
def epilogue(value, second, bias, operand_0, n, offsets, mask):
    return value


# </epilogue>


@gluon.jit
def send_weights(inputs, ring, tile_n, step, stage, there):
    """Begin to copy a step's codes to a stage, if it is `there`."""
    full, _, _, codes = ring
    mbarrier.expect(full.index(stage), BYTES, pred=there)
    PART: gl.constexpr = BLOCK_N // HALVES
    for half in gl.static_range(HALVES):
        into = codes.index(stage).slice(half * PART, PART, 0)
        place = [64 * tile_n + half * WIDTH_N, step * 128]
        load_block(inputs[1], place, full.index(stage), into, pred=there)


@gluon.jit
def send_x(inputs, ring, first_m, step, stage, there):
    """Begin to copy a step's columns of x to a stage."""
    full, _, xs, _ = ring
    load_block(inputs[0], [first_m, step * 128], full.index(stage), xs.index(stage), pred=there)


@gluon.jit
def scaled(sums, scales, n, m, M):
    """Sums of rows n of the weight and m of x, times their scales."""
    scale, x_scale = scales
    sums *= gl.load(scale + n // SCALE_ROWS, mask=n < N, other=0.0).to(gl.float32)
    if X_SCALE == "token":
        return sums * gl.load(x_scale + m, mask=m < M, other=0.0)
    else:
        return sums * gl.load(x_scale)


@gluon.jit
def work(inputs, ring, outputs, partial, arrived, tiles_m, sharers, M, GROUP: gl.constexpr):
    """All that warp group GROUP does."""
    full, empty, xs, codes = ring
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
        sum0 = gl.zeros((64, BLOCK_M), gl.int32, SUMS)
        sum1 = sum0
        for now in range(i, i + length):
            stage = now % STAGES
            mbarrier.wait(full.index(stage), (now // STAGES) & 1)
            columns = xs.index(stage).permute((1, 0))
            first = codes.index(stage).slice(64 * FIRST, 64, 0)
            sum0 = warpgroup_mma(first, columns, sum0, is_async=True)
            if PER == 2:
                second = codes.index(stage).slice(64 * SECOND, 64, 0)
                sum1 = warpgroup_mma(second, columns, sum1, is_async=True)
                sum0, sum1 = warpgroup_mma_wait(2, deps=[sum0, sum1])
            else:
                sum0 = warpgroup_mma_wait(1, deps=[sum0])
            mbarrier.arrive(empty.index((now + STAGES - 1) % STAGES), pred=now > 0)  # its products are done
            if GROUP == 0:
                sent_n, sent_m, sent = send_next(inputs, ring, now, steps, tiles_m, sharers, sent_n, sent_m, sent)
        done0, done1 = warpgroup_mma_wait(0, deps=[sum0, sum1])
        done0, done1 = done0.to(gl.float32), done1.to(gl.float32)
        finish(done0, done1, outputs, partial, arrived, tile, length, later, tiles_m, sharers, M, GROUP)
        i += length


@gluon.jit(do_not_specialize=["sharers", "M"])
def kernel(x, codes, x_scale, scale, bias, operand_0, y, partial, arrived, sharers, M):
    """Grid: any number of programs, at least `sharers`, of which each has a step at least if tiles are left to share.

    x, codes: descriptors of [M, K] and [N, K], by blocks of 128 columns, BLOCK_M and BLOCK_N / HALVES rows. x_scale,
    scale: float32 [M] or [1]; [N / SCALE_ROWS]. What the constants make needless is not read. partial: float32, two of
    BLOCK_M * BLOCK_N a sharer; arrived: int32, 0 for both groups of each shared tile, and 0 again at the end.
    """
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, 128], x.layout)
    code_ring = gl.allocate_shared_memory(codes.dtype, [STAGES, BLOCK_N, 128], codes.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles_m = gl.cdiv(M, BLOCK_M)
    inputs, outputs = (x, codes), ((scale, x_scale), bias, operand_0, y)
    ring = (full, empty, xs, code_ring)
    gl.warp_specialize(
        [
            (work, (inputs, ring, outputs, partial, arrived, tiles_m, sharers, M, 0)),
            (work, (inputs, ring, outputs, partial, arrived, tiles_m, sharers, M, 1)),
        ],
        [4],
        [256],
    )
