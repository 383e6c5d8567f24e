"""y [S, N] = epilogue(x [S, K] @ weight [e, N, K]^T) for rows sorted by expert e, weights in the `fragment` layout.

One launch for all experts: a program finds the expert and the rows of its tile from the offsets of the experts' rows;
the product and its end are those of `gemm_fragment`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <fragment>
from qcompile.codegen.templates.fragment_weights import (
    BLOCK_M,
    BLOCK_N,
    BLOCK_WIDTH,
    GROUPS,
    K_PER_SPLIT,
    SCALE_COUNT,
    SPLIT,
    STORED,
    SUPER_GROUPS,
    TILES_K,
    TILES_N,
    K,
    N,
)
from qcompile.codegen.templates.gemm_fragment import finish_parts, multiply

# </fragment>

# <experts>
EXPERTS = tl.constexpr(4)
EXPERTS_POWER = tl.constexpr(4)


@triton.jit
def find_tile(offsets, tile):
    """The expert of a tile of rows, and which of the expert's tiles it is; EXPERTS or more past the last tile."""
    e = tl.arange(0, EXPERTS_POWER)
    start = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    end = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0)
    last = tl.cumsum((end - start + (BLOCK_M - 1)) // BLOCK_M, 0)
    before = last <= tile
    return tl.sum(before.to(tl.int32), 0), tile - tl.max(tl.where(before, last, 0), 0)


# </experts>


@triton.jit
def kernel(
    x,
    x_scale,
    codes,
    scale,
    zero_point,
    offset,
    super_scale,
    super_offset,
    bias,
    operand_0,
    y,
    partial,
    arrived,
    offsets,
):
    """Grid: (tiles, ceil(N / BLOCK_N) * SPLIT), with as many tiles of BLOCK_M rows as any choice of experts may need.

    offsets: int32 [EXPERTS + 1], where the rows of each expert begin and the last end. The rest is as in
    `gemm_fragment`.
    """
    split, block_n = tl.program_id(1) % SPLIT, tl.program_id(1) // SPLIT
    expert, tile = find_tile(offsets, tl.program_id(0))
    if expert >= EXPERTS:
        return
    first_m = tl.load(offsets + expert) + tile * BLOCK_M
    end_m = tl.load(offsets + expert + 1)
    rows = expert.to(tl.int64) * (TILES_N * 64)
    accumulator = multiply(
        x + first_m.to(tl.int64) * K,
        x_scale + first_m * GROUPS,
        codes + expert.to(tl.int64) * (TILES_N * TILES_K * 128 * STORED),
        scale + rows * SCALE_COUNT,
        zero_point + rows * GROUPS,
        offset + rows * SCALE_COUNT,
        super_scale + rows * SUPER_GROUPS,
        super_offset + rows * SUPER_GROUPS,
        block_n * (BLOCK_N // 64),
        split * K_PER_SPLIT,
        first_m + tl.arange(0, BLOCK_M) < end_m,
        end_m - first_m,
    )
    bias += expert * N
    tile = block_n * tl.num_programs(0) + tl.program_id(0)
    first_n = block_n * BLOCK_WIDTH
    finish_parts(
        accumulator, scale, x_scale, bias, operand_0, y, partial, arrived, tile, split, first_m, first_n, end_m
    )
