"""y [S, N] = epilogue(x [S, K] @ weight [e, N, K]^T) for rows sorted by expert e, weights in the `fragment` layout.

One launch for all experts: a program finds the expert and the rows of its tile from the offsets of the experts' rows,
and multiplies as `gemm_fragment` does, whose decoding and epilogue it has. What that file says of adding products holds
here too: each is multiplied by a factor that is unknown at compile time before it is added.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <fragment>
from qcompile.codegen.templates.gemm_fragment import (
    BITS,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CHUNK,
    COLUMNS,
    COMPUTE,
    EVEN_K,
    EVEN_N,
    GROUPS,
    K_PER_SPLIT,
    PRECISION,
    SYMMETRIC,
    TILES_K,
    TILES_N,
    X_SCALE,
    K,
    N,
    decode_x,
    finish,
    load_weight,
)

# </fragment>

# <experts>
EXPERTS = tl.constexpr(4)
EXPERTS_POWER = tl.constexpr(4)
OFFSET = tl.constexpr(False)
SUPER_COLUMNS = tl.constexpr(0)
# </experts>

PER_WEIGHT = tl.constexpr(OFFSET.value or (GROUPS.value > 1 and COLUMNS.value % 64 != 0))
"""Scales multiply the weights, not the product: where blocks are narrower than a product, or have offsets."""
SUPER_GROUPS = tl.constexpr(0 if SUPER_COLUMNS.value == 0 else -(-K.value // SUPER_COLUMNS.value))


# <scales>
@triton.jit
def decode_scale(value):
    """From the stored type to float32."""
    return value.to(tl.float32)


# </scales>


@triton.jit
def find_tile(offsets, tile):
    """The expert of a tile of rows, and which of the expert's tiles it is; EXPERTS or more past the last tile."""
    e = tl.arange(0, EXPERTS_POWER)
    start = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    end = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0)
    last = tl.cumsum((end - start + (BLOCK_M - 1)) // BLOCK_M, 0)
    before = last <= tile
    return tl.sum(before.to(tl.int32), 0), tile - tl.max(tl.where(before, last, 0), 0)


@triton.jit
def load_blocks(values, n, row_mask, block, COUNT: tl.constexpr):
    """What belongs to rows and blocks of columns, from [N / 64, COUNT, 64]."""
    source = values + n // 64 * (COUNT * 64) + n % 64 + tl.minimum(block, COUNT - 1) * 64
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def load_scale(scale, super_scale, n, row_mask, k):
    """float32 scales (or offsets) of rows n at columns k."""
    values = decode_scale(load_blocks(scale, n, row_mask, k // COLUMNS, GROUPS))
    if SUPER_GROUPS > 0:
        values *= load_blocks(super_scale, n, row_mask, k // SUPER_COLUMNS, SUPER_GROUPS).to(tl.float32)
    return values


@triton.jit
def kernel(x, x_scale, codes, scale, zero_point, offset, super_scale, super_offset, bias, operand_0, y, offsets):
    """Grid: (tiles, ceil(N / BLOCK_N)), with as many tiles of BLOCK_M rows as any choice of experts may need.

    offsets: int32 [EXPERTS + 1], where the rows of each expert begin and the last end. Pointers that the constants make
    needless are not read.
    """
    expert, part_m = find_tile(offsets, tl.program_id(0))
    if expert >= EXPERTS:
        return
    first_m = tl.load(offsets + expert) + part_m * BLOCK_M
    end_m = tl.load(offsets + expert + 1)
    first_n = tl.program_id(1) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    row_mask = n < TILES_N * 64
    token = first_m + m < end_m
    x += first_m.to(tl.int64) * K
    x_scale_rows = x_scale + (first_m + m) * GROUPS
    rows = expert.to(tl.int64) * (TILES_N * 64)
    codes += expert.to(tl.int64) * (TILES_N * TILES_K * 128 * BITS)
    scale += rows * GROUPS
    zero_point += rows * GROUPS
    offset += rows * GROUPS
    super_scale += rows * SUPER_GROUPS
    super_offset += rows * SUPER_GROUPS
    one = (scale.to(tl.int64) != 0).to(tl.float32)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, K_PER_SPLIT, BLOCK_K):
        for part in tl.static_range(BLOCK_K // CHUNK):
            first_k = step + part * CHUNK
            weight = load_weight(codes, tl.program_id(1) * (BLOCK_N // 64), first_k // 64)
            k = first_k + tl.arange(0, CHUNK)
            x_mask = token[None, :]
            if not EVEN_K:
                x_mask = x_mask & (k < K)[:, None]
            columns = decode_x(tl.load(x + m[None, :] * K + k[:, None], mask=x_mask, other=0.0))
            factor = one
            if PER_WEIGHT:
                runs = first_k + 16 * tl.arange(0, CHUNK // 16)
                at, mask, run = n[:, None], row_mask[:, None], runs[None, :]
                blocks = tl.reshape(weight, (BLOCK_N, CHUNK // 16, 16)).to(tl.float32)
                if not SYMMETRIC and not OFFSET:
                    zeros = load_blocks(zero_point, at, mask, run // COLUMNS, GROUPS)
                    blocks -= zeros.to(tl.float32)[:, :, None]
                blocks *= load_scale(scale, super_scale, at, mask, run)[:, :, None]
                if OFFSET:
                    blocks += load_scale(offset, super_offset, at, mask, run)[:, :, None]
                weight = tl.reshape(blocks, (BLOCK_N, CHUNK)).to(COMPUTE)
                if X_SCALE == "group":
                    group = tl.minimum(runs // COLUMNS, GROUPS - 1)
                    s = tl.load(x_scale_rows[None, :] + group[:, None], mask=token[None, :], other=0.0)
                    scaled = tl.reshape(columns, (CHUNK // 16, 16, BLOCK_M)).to(tl.float32) * s[:, None, :]
                    columns = tl.reshape(scaled, (CHUNK, BLOCK_M)).to(COMPUTE)
            else:
                if not SYMMETRIC:
                    zeros = load_blocks(zero_point, n, row_mask, first_k // COLUMNS, GROUPS)
                    weight = weight - zeros.to(COMPUTE)[:, None]
                if GROUPS > 1:
                    factor = load_scale(scale, super_scale, n, row_mask, first_k)[:, None]
                    if X_SCALE == "group":
                        group = tl.minimum(first_k // COLUMNS, GROUPS - 1)
                        factor = factor * tl.load(x_scale_rows + group, mask=token, other=0.0)[None, :]
            accumulator += tl.dot(weight, columns, input_precision=PRECISION) * factor
    if GROUPS == 1 and not PER_WEIGHT:
        accumulator *= load_scale(scale, super_scale, n, row_mask, 0)[:, None]
        if X_SCALE == "group":
            accumulator *= tl.load(x_scale_rows, mask=token, other=0.0)[None, :]
    finish(accumulator, x_scale, bias + expert * N, operand_0, y, first_m, first_n, end_m)
