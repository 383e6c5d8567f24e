"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) for 8-bit weights in rows, int8 or fp8, and activations alike.

Scaled products: a weight's scale per tensor, channel or block, an activation's per tensor, token or group. int8
products without blocks are summed in int32, exactly. All others are added in float32 after each BLOCK_K columns, times
their scales; that is also what keeps fp8 sums accurate on Hopper, whose tensor cores add fp8 products with few bits.

Programs that share an output tile (SPLIT) each sum a part of K; the last to arrive adds the parts in their order.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(256)
X_SCALE = tl.constexpr("token")
INTEGER = tl.constexpr(True)
PRECISION = tl.constexpr("tf32x3")
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(64)
BLOCK_K = tl.constexpr(128)
SPLIT = tl.constexpr(1)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
STEPS_PER_GROUP = (COLUMNS + BLOCK_K - 1) // BLOCK_K
STEPS = (GROUPS * STEPS_PER_GROUP + SPLIT - 1) // SPLIT
EVEN_K = tl.constexpr(
    COLUMNS.value % BLOCK_K.value == 0
    and K.value % COLUMNS.value == 0
    and GROUPS.value * STEPS_PER_GROUP.value % SPLIT.value == 0
)
GROUP_M = tl.constexpr(8)
"""Tiles of M that neighbouring programs take before the next tile of N, so that they share weights in the L2 cache."""


# <decode>
@triton.jit
def decode_scale(value):
    """From the stored type to float32."""
    return value.to(tl.float32)


@triton.jit
def decode_weight(codes):
    """From the stored type to what is multiplied."""
    return codes


@triton.jit
def decode_x(x):
    return x


# </decode>


# <epilogue>
@triton.jit
def epilogue(value, bias, operand_0, n, offsets, mask):
    return value


# </epilogue>


@triton.jit
def finish(total, scale, x_scale, bias, operand_0, y, first_m, first_n, M):
    m = first_m + tl.arange(0, BLOCK_M)[:, None]
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    if GROUPS == 1:
        total *= decode_scale(tl.load(scale + n // ROWS, mask=n < N, other=0))
        if X_SCALE == "group":
            total *= tl.load(x_scale + m, mask=m < M, other=0.0)
    if X_SCALE == "tensor":
        total *= tl.load(x_scale)
    if X_SCALE == "token":
        total *= tl.load(x_scale + m, mask=m < M, other=0.0)
    mask = (m < M) & (n < N)
    offsets = m.to(tl.int64) * N + n
    value = epilogue(total, bias, operand_0, n, offsets, mask)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def kernel(x, x_scale, codes, scale, bias, operand_0, y, partial, arrived, M):
    """Grid: (ceil(N / BLOCK_N) * ceil(M / BLOCK_M), 1, SPLIT).

    Pointers that the constants make needless are not read. partial: float32, BLOCK_M * BLOCK_N a program, and arrived:
    int32, 0 for each output tile; both only for SPLIT > 1.
    """
    tile = tl.program_id(0)
    split = tl.program_id(2)
    tiles_m = tl.cdiv(M, BLOCK_M)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    band = tile // (GROUP_M * TILES_N)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * TILES_N)
    first_m = (band * GROUP_M + within % height) * BLOCK_M
    first_n = within // height * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    token = first_m + m < M
    row = first_n + n < N
    x += first_m.to(tl.int64) * K + m[:, None] * K
    codes += first_n.to(tl.int64) * K + n[None, :] * K
    scale_rows = scale + (first_n + n) // ROWS * GROUPS
    x_scale_rows = x_scale + (first_m + m) * GROUPS
    one = (scale.to(tl.int64) != 0).to(tl.float32)  # M may be a constant: Inductor makes one of it where it is 1
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for step in tl.range(0, STEPS):
        i = split * STEPS + step
        if GROUPS == 1:
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            end = K
        else:
            group = i // STEPS_PER_GROUP
            k = group * COLUMNS + i % STEPS_PER_GROUP * BLOCK_K + tl.arange(0, BLOCK_K)
            end = tl.minimum(group * COLUMNS + COLUMNS, K)
        x_mask = token[:, None]
        w_mask = row[None, :]
        if not EVEN_K:
            x_mask = x_mask & (k < end)[None, :]
            w_mask = w_mask & (k < end)[:, None]
        left = decode_x(tl.load(x + k[None, :], mask=x_mask, other=0.0))
        right = decode_weight(tl.load(codes + k[:, None], mask=w_mask, other=0.0))
        if INTEGER:
            accumulator = tl.dot(left, right, accumulator, out_dtype=tl.int32)
        elif GROUPS == 1:
            accumulator += tl.dot(left, right, input_precision=PRECISION).to(tl.float32) * one
        else:
            group = tl.minimum(group, GROUPS - 1)
            factor = decode_scale(tl.load(scale_rows + group, mask=row, other=0))[None, :]
            if X_SCALE == "group":
                factor = factor * tl.load(x_scale_rows + group, mask=token, other=0.0)[:, None]
            accumulator += tl.dot(left, right, input_precision=PRECISION).to(tl.float32) * factor
    accumulator = accumulator.to(tl.float32)
    if SPLIT == 1:
        finish(accumulator, scale, x_scale, bias, operand_0, y, first_m, first_n, M)
    else:
        partial += tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + m[:, None] * BLOCK_N + n[None, :]
        tl.store(partial + split * (BLOCK_M * BLOCK_N), accumulator, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its arrival
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            total = tl.load(partial, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(partial + other * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
            finish(total, scale, x_scale, bias, operand_0, y, first_m, first_n, M)
