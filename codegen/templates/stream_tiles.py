"""Which tiles the programs of a stream have, when they send for what, and how their products end.

For `gemm_stream` and `gemm_stream_rows8`, whose programs are two warp groups that do not wait for each other. Stages of
a ring in shared memory hold a step, 128 columns, of a tile's operands: the first group sends for stages AHEAD, once the
other has left them.

As often as there are tiles for all programs, each takes one whole; then the steps of the tiles that are left, one tile
after another, are shared evenly by the first `sharers` programs. Of a shared tile each leaves its part in memory, and
the last to arrive adds all in their order, so that results do not depend on timing.
"""

# mypy: ignore-errors
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

N = tl.constexpr(256)
K = tl.constexpr(256)
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(256)
STAGES = tl.constexpr(4)
SHARED = tl.constexpr(True)
GATED = tl.constexpr(False)
OPERANDS = tl.constexpr(False)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M.value, 16]))


@triton.jit
def epilogue(value, second, bias, operand_0, n, offsets, mask):
    return value


@gluon.jit
def scaled(sums, scales, n, m, M):
    return sums


@gluon.jit
def send_weights(inputs, ring, tile_n, step, stage, there):
    pass


@gluon.jit
def send_x(inputs, ring, first_m, step, stage, there):
    pass


STEPS = (K + 127) // 128
"""Of a tile, of 128 columns each."""
ROWS = BLOCK_N // 64
"""Tiles of 64 rows that a program has; a group has `PER`."""
PER = ROWS // 2
HALVES = tl.constexpr(2 if GATED.value else 1)
WIDTH_N = N // HALVES
TILES_N = (WIDTH_N + 64 * ROWS // HALVES - 1) // (64 * ROWS // HALVES)
"""Programs' tiles across the output."""
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""As it is called from Triton 3.8 on, and was before."""
BAND = tl.constexpr(2048 // BLOCK_M.value)
"""Tiles of M that come before the next of N: programs at work share weights and x in the L2 cache."""
AHEAD = STAGES - 1
OUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
"""In which outputs [64, BLOCK_M] are stored, eight neighbours a thread."""
WIDTH = tl.constexpr(64 * (1 if GATED.value else BLOCK_N.value // 128))
AT_ONCE = tl.constexpr(min(4096 // WIDTH.value, BLOCK_M.value))
"""Columns of the output that a group has, and of how many rows its parts are added at once."""
PARTS = gl.constexpr(gl.BlockedLayout([4, 1], [WIDTH.value // 4, 128 // WIDTH.value], [1, 4], [0, 1]))


@gluon.jit
def shared_tiles(tiles_m):
    """How often all programs take a tile whole, and how many steps the tiles have that are left."""
    tiles, programs = TILES_N * tiles_m, gl.num_programs(0)
    return tiles // programs, tiles % programs * STEPS


@gluon.jit
def first_shared(program, steps, sharers):
    """The first of the shared steps that a program has; where those of the next begin, its end."""
    return gl.minimum(program, sharers) * steps // sharers


@gluon.jit
def steps_of_program(tiles_m, sharers):
    """How many steps a program has, and how many of these, the first, are of tiles that it has whole."""
    whole, shared = shared_tiles(tiles_m)
    begun = first_shared(gl.program_id(0), shared, sharers)
    return whole * STEPS + first_shared(gl.program_id(0) + 1, shared, sharers) - begun, whole * STEPS


@gluon.jit
def corner_of(tile, tiles_m):
    """A tile's place across and down the output."""
    band, within = tile // (BAND * TILES_N), tile % (BAND * TILES_N)
    height = gl.minimum(tiles_m - band * BAND, BAND)
    return within // height, band * BAND + within % height


@gluon.jit
def place_of(i, tiles_m, sharers):
    """Of a program's step `i`: the tile, the first of its tiles of 64 rows, its first row of x, and the tile's step."""
    whole, steps = shared_tiles(tiles_m)
    programs = gl.num_programs(0)
    shared = first_shared(gl.program_id(0), steps, sharers) + i - whole * STEPS
    tile = gl.where(i < whole * STEPS, i // STEPS * programs + gl.program_id(0), whole * programs + shared // STEPS)
    step = gl.where(i < whole * STEPS, i % STEPS, shared % STEPS)
    across, down = corner_of(tile, tiles_m)
    return tile, across * (ROWS // HALVES), down * BLOCK_M, step


@gluon.jit
def sharers_of(tile, tiles_m, sharers):
    """A shared tile's number among these, the programs that have its first and its last step, and the first's slot."""
    whole, steps = shared_tiles(tiles_m)
    number = tile - whole * gl.num_programs(0)
    least = ((number * STEPS + 1) * sharers - 1) // steps
    most = ((number * STEPS + STEPS) * sharers - 1) // steps
    return number, least, most, 2 * least + gl.where(first_shared(least, steps, sharers) < number * STEPS, 1, 0)


@gluon.jit
def begin(inputs, ring, steps, tiles_m, sharers):
    """Send for the first stages: for weights at once, for x when the kernels before have written all they write.

    The result says of the last what `place_of` does, but the tile.
    """
    for i in gl.static_range(AHEAD):
        _, tile_n, _, step = place_of(i, tiles_m, sharers)
        send_weights(inputs, ring, tile_n, step, i, i < steps)
    PTX: gl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for i in gl.static_range(AHEAD):
        _, _, first_m, step = place_of(i, tiles_m, sharers)
        send_x(inputs, ring, first_m, step, i, i < steps)
    place = place_of(AHEAD - 1, tiles_m, sharers)
    return place[1], place[2], place[3]


@gluon.jit
def send_next(inputs, ring, now, steps, tiles_m, sharers, tile_n, first_m, step):
    """At step `now` of all that a program has, send for step now + AHEAD, when both groups have left its stage.

    It comes after the step that tile_n, first_m and step say; the result says the same of it.
    """
    i = now + AHEAD
    step += 1
    if step == STEPS:
        place = place_of(i, tiles_m, sharers)
        tile_n, first_m, step = place[1], place[2], place[3]
    stage, there = i % STAGES, i < steps
    mbarrier.wait(ring[1].index(stage), (i // STAGES - 1) & 1, pred=there & (i >= STAGES))
    send_weights(inputs, ring, tile_n, step, stage, there)
    send_x(inputs, ring, first_m, step, stage, there)
    return tile_n, first_m, step


@gluon.jit
def finish_whole(value, second, outputs, row, first_m, M):
    """The epilogue of sums of 64 columns of the output from `row`; with GATED, of sums of both halves.

    Sums that operands are loaded for, and others when they are rounded, go to where neighbours are a thread's.
    """
    scales, bias, operand_0, y = outputs
    LAYOUT: gl.constexpr = OUT if OPERANDS else SUMS
    value, second = gl.convert_layout(value, LAYOUT), gl.convert_layout(second, LAYOUT)
    m = first_m + gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT)), 0)
    n = row + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    offsets, mask = m.to(gl.int64) * WIDTH_N + n, (m < M) & (n < WIDTH_N)
    value, second = scaled(value, scales, n, m, M), scaled(second, scales, n + (WIDTH_N if GATED else 0), m, M)
    value = epilogue(value, second, bias, operand_0, n, offsets, mask)
    value = gl.convert_layout(value.to(y.dtype.element_ty), OUT)
    m = first_m + gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT)), 0)
    n = row + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, OUT)), 1)
    gl.store(y + m.to(gl.int64) * WIDTH_N + n, value, mask=(m < M) & (n < WIDTH_N))


@gluon.jit
def add_parts(parts, slot, least, most):
    """The sum of what the programs from `least` to `most` left, each in its first slot, but `least` in `slot`.

    Four are loaded at a time.
    """
    total = gl.load(parts + slot.to(gl.int64) * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    for first in range(least + 1, most + 1, 4):
        found = ()
        for i in gl.static_range(4):
            part = parts + (2 * (first + i)).to(gl.int64) * (BLOCK_N * BLOCK_M)
            found = found + (gl.load(part, mask=first + i <= most, other=0.0, cache_modifier=".cg"),)
        for i in gl.static_range(4):
            total += found[i]
    return total


@gluon.jit
def finish_parts(partial, slot, least, most, outputs, row, first_m, M):
    """The epilogue of sums of parts of all columns that a group has, of AT_ONCE rows after another."""
    scales, bias, operand_0, y = outputs
    n = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(1, PARTS)), 1)
    for chunk in range(BLOCK_M // AT_ONCE):
        m = chunk * AT_ONCE + gl.expand_dims(gl.arange(0, AT_ONCE, gl.SliceLayout(0, PARTS)), 0)
        parts = partial + m * BLOCK_N + n
        value = add_parts(parts, slot, least, most)
        second = value
        if GATED:
            second = add_parts(parts + 64, slot, least, most)
        m += first_m
        offsets, mask = m.to(gl.int64) * WIDTH_N + row + n, (m < M) & (row + n < WIDTH_N)
        value = scaled(value, scales, row + n, m, M)
        second = scaled(second, scales, row + n + (WIDTH_N if GATED else 0), m, M)
        value = epilogue(value, second, bias, operand_0, row + n, offsets, mask)
        gl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@gluon.jit
def leave_part(partial, program_slot, sum0, sum1):
    """Store a group's sums, [BLOCK_M, BLOCK_N] in a slot."""
    m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS)), 0)
    n = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, SUMS)), 1)
    part = partial + program_slot.to(gl.int64) * (BLOCK_N * BLOCK_M) + m * BLOCK_N + n
    gl.store(part, sum0, cache_modifier=".cg")
    if PER == 2:
        gl.store(part + 64, sum1, cache_modifier=".cg")


@gluon.jit
def finish(sum0, sum1, outputs, partial, arrived, tile, length, later, tiles_m, sharers, M, GROUP: gl.constexpr):
    """The end of a group's sums of `length` steps of a tile.

    later: 1 if the program has had steps of another shared tile, else 0.
    """
    across, down = corner_of(tile, tiles_m)
    row = across * (64 * ROWS // HALVES) + GROUP * WIDTH
    first_m = down * BLOCK_M
    if length == STEPS:
        finish_whole(sum0, sum1, outputs, row, first_m, M)
        if WIDTH == 128:
            finish_whole(sum1, sum1, outputs, row + 64, first_m, M)
    elif SHARED:
        partial += GROUP * (64 * PER)
        leave_part(partial, 2 * gl.program_id(0) + later, sum0, sum1)
        tl.debug_barrier()  # all stores of this group come before its arrival
        number, least, most, slot = sharers_of(tile, tiles_m, sharers)
        arrived += 2 * number + GROUP
        if gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == most - least:
            gl.store(arrived, 0)
            finish_parts(partial, slot, least, most, outputs, row, first_m, M)
