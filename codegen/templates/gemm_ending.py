"""The end of a product whose programs each sum a part of K, for the templates of linears and of experts.

Programs that share an output tile (SPLIT) leave their parts in memory; the last to arrive adds them in their order, so
results do not depend on timing, and does what else there is: `finish`, which each template has its own.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

BLOCK_M = tl.constexpr(16)
BLOCK_N = tl.constexpr(64)
SPLIT = tl.constexpr(1)


@triton.jit
def finish(total, scale, x_scale, bias, operand_0, y, first_m, first_n, M):
    pass


@triton.jit
def finish_parts(accumulator, scale, x_scale, bias, operand_0, y, partial, arrived, tile, split, first_m, first_n, M):
    """`finish` with the sum of the parts of all programs of output tile `tile`, in the last that arrives."""
    if SPLIT == 1:
        finish(accumulator, scale, x_scale, bias, operand_0, y, first_m, first_n, M)
    else:
        m = tl.arange(0, BLOCK_M)
        place = tl.arange(0, BLOCK_N)[:, None] + m[None, :] * BLOCK_N
        partial += tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + place
        there = (first_m + m < M)[None, :]
        tl.store(partial + split * (BLOCK_M * BLOCK_N), accumulator, mask=there, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its arrival
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            total = tl.load(partial, mask=there, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                part = partial + other * (BLOCK_M * BLOCK_N)
                total += tl.load(part, mask=there, other=0.0, cache_modifier=".cg")
            finish(total, scale, x_scale, bias, operand_0, y, first_m, first_n, M)
            tl.store(arrived + tile, 0)
