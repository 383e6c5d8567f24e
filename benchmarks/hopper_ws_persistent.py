"""Gluon, warp specialized, persistent: programs share all steps of all tiles evenly."""
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait)
SHIFT = 40
def _bf(e): return ((e + 127) << 7) * 0x10001
# S0 = s 2^(133-SHIFT), S1 = s 2^(129-SHIFT), C = -8 s 2^-SHIFT
SCALE_ASM = gl.constexpr("{ .reg .b32 d, e, k; mov.b32 d, {$4, $4}; mov.b32 e, {$5, $5};"
    f" mov.b32 k, {_bf(133 - SHIFT):#x}; mul.rn.bf16x2 $0, d, k; mov.b32 k, {_bf(129 - SHIFT):#x}; mul.rn.bf16x2 $1, e, k;"
    f" mov.b32 k, {_bf(3 - SHIFT) | 0x80008000:#x}; mul.rn.bf16x2 $2, d, k; mul.rn.bf16x2 $3, e, k; }}")
WORD_ASM = gl.constexpr("{ .reg .b32 w, t0, t1, t2, t3; shr.b32 w, $8, 8;"
    " and.b32 t0, $8, 0x000f000f; and.b32 t1, $8, 0x00f000f0; and.b32 t2, w, 0x000f000f; and.b32 t3, w, 0x00f000f0;"
    " fma.rn.bf16x2 t0, t0, $9, $11; fma.rn.bf16x2 t1, t1, $10, $12; fma.rn.bf16x2 t2, t2, $9, $11; fma.rn.bf16x2 t3, t3, $10, $12;"
    " mov.b32 {$0, $1}, t0; mov.b32 {$2, $3}, t1; mov.b32 {$4, $5}, t2; mov.b32 {$6, $7}, t3; }")
UNSHIFT = gl.constexpr(float(2.0 ** SHIFT))

# w h l v
WHLV = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 0, 1], [0, 0, 0, 2]], [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
    [[1, 0, 0, 0], [2, 0, 0, 0]], [], [4, 8, 4, 4]))
WH = gl.constexpr(gl.SliceLayout(2, gl.SliceLayout(3, WHLV.value)))
# one tile of 64 x 64: [1, 2, 256] words
WORDS = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [0, 0, 2]], [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 0, 64]], [[0, 0, 128], [0, 1, 0]], [], [1, 2, 256]))
ROWS = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 8]], [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]], [[0, 0, 16], [0, 0, 32]], [], [1, 1, 64]))




@gluon.jit
def scale_words(smem):
    s = smem.load(ROWS)
    s0, s1 = gl.permute(s.reshape(4, 2, 8), (0, 2, 1)).split()
    s0 = gl.convert_layout(s0, WH, assert_trivial=True).to(gl.int16, bitcast=True)
    s1 = gl.convert_layout(s1, WH, assert_trivial=True).to(gl.int16, bitcast=True)
    return gl.inline_asm_elementwise(SCALE_ASM, "=r,=r,=r,=r,h,h", [s0, s1],
                                     dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def wide(s):
    return gl.expand_dims(gl.expand_dims(s, 2), 3)


@gluon.jit
def decode(smem, s0, s1, c0, c1, A: gl.constexpr):
    words = gl.convert_layout(smem.load(WORDS).reshape(4, 8, 4, 4), WHLV, assert_trivial=True)
    a0, b0, a1, b1, a2, b2, a3, b3 = gl.inline_asm_elementwise(
        WORD_ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r", [words, s0, s1, c0, c1],
        dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16), is_pure=True, pack=1)
    low = gl.join(gl.join(a0, a2), gl.join(a1, a3)).to(gl.bfloat16, bitcast=True)
    high = gl.join(gl.join(b0, b2), gl.join(b1, b3)).to(gl.bfloat16, bitcast=True)
    fields = gl.join(low, high)  # w h l v s r b
    weight = gl.permute(fields, (0, 5, 1, 3, 4, 2, 6)).reshape(64, 64)
    return gl.convert_layout(weight, A, assert_trivial=True)


@gluon.jit
def send_weights(codes_desc, scale_desc, ws, ss, full, tile_n, step, stage, there, RT: gl.constexpr, BM: gl.constexpr):
    BYTES: gl.constexpr = BM * 128 * 2 + RT * 4096 + RT * 128
    mbarrier.expect(full.index(stage), BYTES, pred=there)
    tma.async_copy_global_to_shared(codes_desc, [tile_n, step * 4, 0], full.index(stage), ws.index(stage), pred=there)
    tma.async_copy_global_to_shared(scale_desc, [tile_n, step, 0], full.index(stage), ss.index(stage), pred=there)


@gluon.jit
def place(step, tiles_m, STEPS: gl.constexpr, RT: gl.constexpr, BM: gl.constexpr):
    """Of a step: the first tile of 64 rows, the first row of x, and the step in the tile."""
    tile = step // STEPS
    return tile // tiles_m * RT, tile % tiles_m * BM, step % STEPS


@gluon.jit
def send_x(x_desc, xs, full, first_m, step, stage, there):
    tma.async_copy_global_to_shared(x_desc, [first_m, step * 128], full.index(stage), xs.index(stage), pred=there)


@gluon.jit
def begin(x_desc, codes_desc, scale_desc, xs, ws, ss, full, first, last, tiles_m,
          STEPS: gl.constexpr, RT: gl.constexpr, BM: gl.constexpr, AHEAD: gl.constexpr, EARLY: gl.constexpr):
    for i in gl.static_range(AHEAD):
        tile_n, first_m, k = place(first + i, tiles_m, STEPS, RT, BM)
        send_weights(codes_desc, scale_desc, ws, ss, full, tile_n, k, i, first + i < last, RT, BM)
    if EARLY:
        gl.inline_asm_elementwise("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for i in gl.static_range(AHEAD):
        tile_n, first_m, k = place(first + i, tiles_m, STEPS, RT, BM)
        send_x(x_desc, xs, full, first_m, k, i, first + i < last)


@gluon.jit
def refill(x_desc, codes_desc, scale_desc, xs, ws, ss, full, empty, first, last, step, tiles_m,
           STEPS: gl.constexpr, RT: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr):
    to = step + AHEAD - first
    stage = to % STAGES
    there = step + AHEAD < last
    tile_n, first_m, k = place(step + AHEAD, tiles_m, STEPS, RT, BM)
    mbarrier.wait(empty.index(stage), (to // STAGES - 1) & 1, pred=there & (to >= STAGES))
    send_weights(codes_desc, scale_desc, ws, ss, full, tile_n, k, stage, there, RT, BM)
    send_x(x_desc, xs, full, first_m, k, stage, there)


@gluon.jit
def finish(acc, y, partial, arrived, tile, begun, ended, first, total, tile_n, first_m, M,
           RT: gl.constexpr, ROW: gl.constexpr, N: gl.constexpr, BM: gl.constexpr, STEPS: gl.constexpr, MMA: gl.constexpr):
    """A tile of 64 rows, number ROW of a program's, whose steps from `begun` to `ended` this program has summed."""
    row = (tile_n + ROW) * 64
    if ended - begun == STEPS:
        put(acc, y, row, first_m, M, N, BM)
    else:
        programs = gl.num_programs(0)
        m = gl.arange(0, BM, gl.SliceLayout(0, MMA))
        n = gl.arange(0, 64, gl.SliceLayout(1, MMA))
        places = partial + (ROW * (64 * BM) + gl.expand_dims(n, 1) * BM + gl.expand_dims(m, 0))
        SLOT: gl.constexpr = RT * 64 * BM
        start = tile * STEPS
        own = 2 * gl.program_id(0) + (begun > first).to(gl.int32)
        gl.store(places + own.to(gl.int64) * SLOT, acc, cache_modifier=".cg")
        tl.debug_barrier()
        # Programs that share the tile.
        least = ((start + 1) * programs - 1) // total
        most = ((start + STEPS) * programs - 1) // total
        counter = arrived + tile * RT + ROW
        if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == most - least:
            slot = 2 * least + (least * total // programs < start).to(gl.int32)
            acc = gl.load(places + slot.to(gl.int64) * SLOT, cache_modifier=".cg")
            for other in range(least + 1, most + 1):
                acc += gl.load(places + (2 * other).to(gl.int64) * SLOT, cache_modifier=".cg")
            gl.store(counter, 0)
            put(acc, y, row, first_m, M, N, BM)


@gluon.jit
def put(acc, y, row, first_m, M, N: gl.constexpr, BM: gl.constexpr):
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    out = gl.convert_layout((acc * UNSHIFT).to(gl.bfloat16), OUT)
    m = first_m + gl.arange(0, BM, gl.SliceLayout(0, OUT))
    n = row + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    gl.store(y + gl.expand_dims(m, 0).to(gl.int64) * N + gl.expand_dims(n, 1), out, mask=gl.expand_dims(m < M, 0))


@gluon.jit
def consume(x_desc, codes_desc, scale_desc, y, partial, arrived, xs, ws, ss, full, empty, first, last, total, tiles_m, M,
            WG: gl.constexpr, PER: gl.constexpr, RT: gl.constexpr, N: gl.constexpr, BM: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, EARLY: gl.constexpr):
    if WG == 0:
        begin(x_desc, codes_desc, scale_desc, xs, ws, ss, full, first, last, tiles_m, STEPS, RT, BM, AHEAD, EARLY)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    for tile in range(first // STEPS, (last + STEPS - 1) // STEPS):
        begun = gl.maximum(first, tile * STEPS)
        ended = gl.minimum(last, tile * STEPS + STEPS)
        acc0 = warpgroup_mma_init(gl.zeros((64, BM), gl.float32, MMA))
        acc1 = warpgroup_mma_init(gl.zeros((64, BM), gl.float32, MMA))
        held = gl.zeros((64, 64), gl.bfloat16, A)
        for step in range(begun, ended):
            i = step - first
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            x = xs.index(stage)
            w = ws.index(stage)
            s = ss.index(stage)
            s00, s01, c00, c01 = scale_words(s.slice(WG * PER, 1, 0))
            s00, s01, c00, c01 = wide(s00), wide(s01), wide(c00), wide(c01)
            if PER == 2:
                s10, s11, c10, c11 = scale_words(s.slice(WG * PER + 1, 1, 0))
                s10, s11, c10, c11 = wide(s10), wide(s11), wide(c10), wide(c11)
            for kt in gl.static_range(2):
                b = x.slice(kt * 64, 64, 1).permute((1, 0))
                a = decode(w.slice(WG * PER, 1, 0).slice(kt * 2, 2, 1), s00, s01, c00, c01, A)
                acc0 = warpgroup_mma(a, b, acc0, is_async=True)
                warpgroup_mma_wait(1, deps=[held])
                held = a
                if kt == 0:
                    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=i > 0)
                if kt == 1:
                    if WG == 0:
                        refill(x_desc, codes_desc, scale_desc, xs, ws, ss, full, empty, first, last, step, tiles_m, STEPS, RT, BM, STAGES, AHEAD)
                if PER == 2:
                    a = decode(w.slice(WG * PER + 1, 1, 0).slice(kt * 2, 2, 1), s10, s11, c10, c11, A)
                    acc1 = warpgroup_mma(a, b, acc1, is_async=True)
                    warpgroup_mma_wait(1, deps=[held])
                    held = a
        tile_n = tile // tiles_m * RT
        first_m = tile % tiles_m * BM
        sum0, sum1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        finish(sum0, y, partial, arrived, tile, begun, ended, first, total, tile_n, first_m, M, RT, WG * PER, N, BM, STEPS, MMA)
        if PER == 2:
            finish(sum1, y, partial, arrived, tile, begun, ended, first, total, tile_n, first_m, M, RT, WG * PER + 1, N, BM, STEPS, MMA)


@gluon.jit(do_not_specialize=["M"])
def kernel(x_desc, codes_desc, scale_desc, y, partial, arrived, M,
           N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, RT: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
           AHEAD: gl.constexpr, EARLY: gl.constexpr):
    PER: gl.constexpr = RT // WGS
    STEPS: gl.constexpr = K // 128
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, 128], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, RT, 4, 256], codes_desc.layout)
    ss = gl.allocate_shared_memory(gl.bfloat16, [STAGES, RT, 1, 64], scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WGS)
    fence_async_shared()
    tiles_m = gl.cdiv(M, BM)
    TILES_N: gl.constexpr = (N + 64 * RT - 1) // (64 * RT)
    total = TILES_N * STEPS * tiles_m
    first = gl.program_id(0) * total // gl.num_programs(0)
    last = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    if WGS == 1:
        consume(x_desc, codes_desc, scale_desc, y, partial, arrived, xs, ws, ss, full, empty, first, last, total, tiles_m, M, 0, PER, RT, N, BM, STEPS, STAGES, AHEAD, EARLY)
    if WGS == 2:
        gl.warp_specialize([
            (consume, (x_desc, codes_desc, scale_desc, y, partial, arrived, xs, ws, ss, full, empty, first, last, total, tiles_m, M, 0, PER, RT, N, BM, STEPS, STAGES, AHEAD, EARLY)),
            (consume, (x_desc, codes_desc, scale_desc, y, partial, arrived, xs, ws, ss, full, empty, first, last, total, tiles_m, M, 1, PER, RT, N, BM, STEPS, STAGES, AHEAD, EARLY)),
        ], [4, ], [256, ])
