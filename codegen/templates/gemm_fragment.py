"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) for weights in the `fragment` layout of qcompile/layouts.py.

The weight is the first operand of the product, y^T = weight x^T: its codes go from memory to registers, are decoded
there, and enter the tensor cores from registers. Programs that share an output tile (SPLIT) each sum a part of K; the
last to arrive adds the parts in their order, so results do not depend on timing.

`accumulator = tl.dot(weight, x, accumulator)` and `accumulator += tl.dot(weight, x)` must not occur in the loop: with
the first operand in registers, Triton 3.6 overwrites operands of products in flight. Every product is multiplied by a
factor that is unknown at compile time before it is added.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
BITS = tl.constexpr(4)
SYMMETRIC = tl.constexpr(True)
COLUMNS = tl.constexpr(128)
X_SCALE = tl.constexpr("")
COMPUTE = tl.constexpr(tl.bfloat16)
PRECISION = tl.constexpr("tf32x3")
BLOCK_M = tl.constexpr(16)
BLOCK_N = tl.constexpr(64)
BLOCK_K = tl.constexpr(128)
CHUNK = tl.constexpr(128)
SPLIT = tl.constexpr(1)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
SCALE_WEIGHTS = tl.constexpr(GROUPS.value > 1 and COLUMNS.value % 64 != 0)
"""Scales of blocks narrower than a product multiply the weights, others the product."""
TILES_K = (K + 63) // 64
TILES_N = (N + 63) // 64
K_PER_SPLIT = ((K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)) * BLOCK_K
EVEN_K = K_PER_SPLIT * SPLIT == K
EVEN_N = TILES_N % (BLOCK_N // 64) == 0


# <decode>
@triton.jit
def decode_pair(pair):
    """Codes in the two halves of an int32, as values: low half, high half."""
    biased = pair | 0x43004300  # 128 + code in bfloat16
    low = biased.to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0
    high = (biased >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0
    return low, high


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
def load_plane(codes, tile_n, tile_k, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """Bits LOW to LOW + WIDTH of codes, in the low bits of both halves: int32 [K tiles, N tiles, 128 threads, 16]."""
    KT: tl.constexpr = CHUNK // 64
    NT: tl.constexpr = BLOCK_N // 64
    index = tl.arange(0, KT * NT * 128 * WIDTH)
    kt = index // (NT * 128 * WIDTH)
    nt = index // (128 * WIDTH) % NT
    source = codes + (nt * TILES_K + kt) * (128 * BITS) + 128 * LOW + index % (128 * WIDTH)
    if EVEN_K and EVEN_N:
        words = tl.load(source)
    else:
        words = tl.load(source, mask=(tile_k + kt < TILES_K) & (tile_n + nt < TILES_N), other=0)
    fields = tl.reshape(words, (KT, NT, 128, WIDTH))
    fields = tl.join(fields, fields >> 8)
    if WIDTH <= 4:
        fields = tl.join(fields, fields >> 4)
    if WIDTH <= 2:
        fields = tl.join(fields, fields >> 2)
    if WIDTH <= 1:
        fields = tl.join(fields, fields >> 1)
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    return tl.reshape(fields, (KT, NT, 128, 16)) & MASK


@triton.jit
def load_weight(codes, tile_n, tile_k):
    """Decoded weights COMPUTE [BLOCK_N, CHUNK], before zero points and scales."""
    codes += (tile_n.to(tl.int64) * TILES_K + tile_k) * (128 * BITS)
    if BITS == 8:
        pairs = load_plane(codes, tile_n, tile_k, 0, 8)
    elif BITS & 4:
        pairs = load_plane(codes, tile_n, tile_k, 0, 4)
        if BITS & 2:
            pairs |= load_plane(codes, tile_n, tile_k, 4, 2) << 4
    else:
        pairs = load_plane(codes, tile_n, tile_k, 0, 2)
    if BITS & 1:
        pairs |= load_plane(codes, tile_n, tile_k, BITS - 1, 1) << (BITS - 1)
    low, high = decode_pair(pairs)
    # kt nt | w h l | v s r | b, with n = 64 nt + 16 w + 8 r + h and k = 64 kt + 16 v + 8 s + 2 l + b
    fields = tl.reshape(tl.join(low, high), (CHUNK // 64, BLOCK_N // 64, 4, 8, 4, 4, 2, 2, 2))
    return tl.reshape(tl.permute(fields, (1, 2, 7, 3, 0, 5, 6, 4, 8)), (BLOCK_N, CHUNK))


@triton.jit
def load_rows(values, rows, row_mask, group):
    """What belongs to each row of a tile, from [N / 64, GROUPS, 64]."""
    source = values + rows // 64 * (GROUPS * 64) + rows % 64 + tl.minimum(group, GROUPS - 1) * 64
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def finish(total, x_scale, bias, operand_0, y, first_m, first_n, M):
    m = first_m + tl.arange(0, BLOCK_M)[None, :]
    n = first_n + tl.arange(0, BLOCK_N)[:, None]
    if X_SCALE == "tensor":
        total *= tl.load(x_scale)
    if X_SCALE == "token":
        total *= tl.load(x_scale + m, mask=m < M, other=0.0)
    mask = (m < M) & (n < N)
    offsets = m.to(tl.int64) * N + n
    value = epilogue(total, bias, operand_0, n, offsets, mask)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def kernel(x, x_scale, codes, scale, zero_point, bias, operand_0, y, partial, arrived, M):
    """Grid: (ceil(N / BLOCK_N), ceil(M / BLOCK_M), SPLIT).

    Pointers that the constants make needless are not read. partial: float32, BLOCK_M * BLOCK_N a program, and arrived:
    int32, 0 for each output tile; both only for SPLIT > 1.
    """
    first_n = tl.program_id(0) * BLOCK_N
    first_m = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    row_mask = n < TILES_N * 64
    token = first_m + m < M
    x += first_m.to(tl.int64) * K
    x_scale_rows = x_scale + (first_m + m) * GROUPS
    one = (scale.to(tl.int64) != 0).to(tl.float32)  # M may be a constant: Inductor makes one of it where it is 1
    if GROUPS == 1:
        factor = load_rows(scale, n, row_mask, 0).to(tl.float32)[:, None]
        if X_SCALE == "group":
            factor = factor * tl.load(x_scale_rows, mask=token, other=0.0)[None, :]
        if not SYMMETRIC:
            zero = load_rows(zero_point, n, row_mask, 0).to(COMPUTE)[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, K_PER_SPLIT, BLOCK_K):
        for part in tl.static_range(BLOCK_K // CHUNK):
            first_k = split * K_PER_SPLIT + step + part * CHUNK
            weight = load_weight(codes, tl.program_id(0) * (BLOCK_N // 64), first_k // 64)
            k = first_k + tl.arange(0, CHUNK)
            x_mask = token[None, :]
            if not EVEN_K:
                x_mask = x_mask & (k < K)[:, None]
            columns = decode_x(tl.load(x + m[None, :] * K + k[:, None], mask=x_mask, other=0.0))
            if SCALE_WEIGHTS:
                group = (first_k + 16 * tl.arange(0, CHUNK // 16)) // COLUMNS
                blocks = tl.reshape(weight, (BLOCK_N, CHUNK // 16, 16)).to(tl.float32)
                if not SYMMETRIC:
                    zeros = load_rows(zero_point, n[:, None], row_mask[:, None], group[None, :])
                    blocks -= zeros.to(tl.float32)[:, :, None]
                scales = load_rows(scale, n[:, None], row_mask[:, None], group[None, :])
                blocks *= scales.to(tl.float32)[:, :, None]
                weight = tl.reshape(blocks, (BLOCK_N, CHUNK)).to(COMPUTE)
                if X_SCALE == "group":
                    group_x = tl.minimum(group, GROUPS - 1)
                    s = tl.load(x_scale_rows[None, :] + group_x[:, None], mask=token[None, :], other=0.0)
                    scaled = tl.reshape(columns, (CHUNK // 16, 16, BLOCK_M)).to(tl.float32) * s[:, None, :]
                    columns = tl.reshape(scaled, (CHUNK, BLOCK_M)).to(COMPUTE)
                accumulator += tl.dot(weight, columns, input_precision=PRECISION) * one
            elif GROUPS == 1:
                if not SYMMETRIC:
                    weight = weight - zero
                accumulator += tl.dot(weight, columns, input_precision=PRECISION) * factor
            else:
                group = first_k // COLUMNS
                if not SYMMETRIC:
                    weight = weight - load_rows(zero_point, n, row_mask, group).to(COMPUTE)[:, None]
                each = load_rows(scale, n, row_mask, group).to(tl.float32)[:, None]
                if X_SCALE == "group":
                    s = tl.load(x_scale_rows + tl.minimum(group, GROUPS - 1), mask=token, other=0.0)
                    each = each * s[None, :]
                accumulator += tl.dot(weight, columns, input_precision=PRECISION) * each
    if SPLIT == 1:
        finish(accumulator, x_scale, bias, operand_0, y, first_m, first_n, M)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        place = tl.arange(0, BLOCK_N)[:, None] + m[None, :] * BLOCK_N
        partial += tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + place
        tl.store(partial + split * (BLOCK_M * BLOCK_N), accumulator, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its arrival
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            total = tl.load(partial, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(partial + other * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
            finish(total, x_scale, bias, operand_0, y, first_m, first_n, M)
