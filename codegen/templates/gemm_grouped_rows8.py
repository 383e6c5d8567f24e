"""y [S, N] = epilogue(x [S, K] @ weight [e, N, K]^T) for rows sorted by expert e, 8-bit weights in the `rows8` layout.

One launch for all experts, as in `gemm_grouped`; the product and its end are those of `gemm_rows8`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <experts>
from qcompile.codegen.templates.gemm_grouped import EXPERTS, find_tile

# </experts>
# <rows8>
from qcompile.codegen.templates.gemm_rows8 import (
    BLOCK_M,
    BLOCK_WIDTH,
    GROUPS,
    ROWS,
    SPLIT,
    K,
    N,
    finish_parts,
    multiply,
)

# </rows8>

STACKED = (N + 63) // 64 * 64
"""Rows of the stack that an expert takes."""


@triton.jit
def kernel(x, x_scale, codes, scale, bias, operand_0, y, partial, arrived, offsets):
    """Grid: (tiles, ceil(N / BLOCK_N) * SPLIT), with as many tiles of BLOCK_M rows as any choice of experts may need.

    offsets: int32 [EXPERTS + 1], where the rows of each expert begin and the last end. The rest is as in
    `gemm_rows8`.
    """
    split, block_n = tl.program_id(1) % SPLIT, tl.program_id(1) // SPLIT
    expert, tile = find_tile(offsets, tl.program_id(0))
    if expert >= EXPERTS:
        return
    first_m = tl.load(offsets + expert) + tile * BLOCK_M
    end_m = tl.load(offsets + expert + 1)
    first_n = block_n * BLOCK_WIDTH
    scale += expert * (STACKED // ROWS * GROUPS)
    accumulator = multiply(
        x + first_m.to(tl.int64) * K,
        x_scale + first_m * GROUPS,
        codes + expert.to(tl.int64) * (STACKED * K),
        scale,
        first_n,
        split,
        first_m + tl.arange(0, BLOCK_M) < end_m,
    )
    bias += expert * N
    tile = block_n * tl.num_programs(0) + tl.program_id(0)
    finish_parts(
        accumulator, scale, x_scale, bias, operand_0, y, partial, arrived, tile, split, first_m, first_n, end_m
    )
