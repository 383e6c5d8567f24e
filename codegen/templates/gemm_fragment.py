"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) for weights in the `fragment` layout of qcompile/layouts.py.

The weight is the first operand of the product, y^T = weight x^T: its codes go from memory to registers, are decoded
there, and enter the tensor cores from registers. Programs that share an output tile (SPLIT) each sum a part of K; the
last to arrive adds the parts in their order, so results do not depend on timing.

`accumulator = tl.dot(weight, x, accumulator)` and `accumulator += tl.dot(weight, x)` must not occur in the loop: with
the first operand in registers, Triton 3.6 overwrites operands of products in flight. Every product is multiplied by a
factor that is unknown at compile time before it is added.

Scales of blocks that span a product multiply it in float32. Scales of narrower blocks, and all that have offsets,
multiply the weights: in float32, where the offset is added too, so that it cancels nothing that was rounded; or in
COMPUTE where that is exact. One scale above all of a row's may multiply the products then (SUPER_LAST).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
BITS = tl.constexpr(4)
SYMMETRIC = tl.constexpr(True)
OFFSET = tl.constexpr(False)
COLUMNS = tl.constexpr(128)
SUPER_COLUMNS = tl.constexpr(0)
X_SCALE = tl.constexpr("")
COMPUTE = tl.constexpr(tl.bfloat16)
PRECISION = tl.constexpr("tf32x3")
BLOCK_M = tl.constexpr(16)
BLOCK_N = tl.constexpr(64)
BLOCK_K = tl.constexpr(128)
CHUNK = tl.constexpr(128)
RUN = tl.constexpr(128)
SCALE_TYPE = tl.constexpr(tl.float32)
SUPER_LAST = tl.constexpr(False)
LOOKUP = tl.constexpr("")
SPLIT = tl.constexpr(1)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
SUPER_GROUPS = tl.constexpr(0 if SUPER_COLUMNS.value == 0 else -(-K.value // SUPER_COLUMNS.value))
ZERO_POINTS = tl.constexpr(not SYMMETRIC.value and not OFFSET.value)
SCALE_WEIGHTS = tl.constexpr(OFFSET.value or RUN.value < 64)
"""Scales multiply the weights, else products of CHUNK columns. A scale and what is above it are of RUN columns."""
ONE_SCALE = tl.constexpr(GROUPS.value == 1 and SUPER_GROUPS.value <= 1)
TILES_K = (K + 63) // 64
TILES_N = (N + 63) // 64
K_PER_SPLIT = ((K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)) * BLOCK_K
EVEN_K = K_PER_SPLIT * SPLIT == K
EVEN_N = TILES_N % (BLOCK_N // 64) == 0


# <decode>
@triton.jit
def decode_scale(value):
    """From the stored type to float32."""
    return value.to(tl.float32)


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
def look_up(words):
    """The 16-bit values of a word's eight 4-bit codes as pairs: four int32 tensors, of fields 0 to 3 of both halves."""
    return tl.inline_asm_elementwise(
        LOOKUP,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_plane(codes, tile_n, tile_k, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """Bits LOW to LOW + WIDTH of codes, in the low bits of both halves: int32 [K tiles, N tiles, 128 threads, 16].

    With LOOKUP, values instead of codes.
    """
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
    if LOOKUP != "":
        first, second, third, fourth = look_up(fields)
        return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (KT, NT, 128, 16))
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
    """Decoded weights [BLOCK_N, CHUNK], before zero points and scales."""
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
def load_rows(values, rows, row_mask, block, COUNT: tl.constexpr):
    """What belongs to rows and to blocks of columns, from [N / 64, COUNT, 64]."""
    source = values + rows // 64 * (COUNT * 64) + rows % 64 + tl.minimum(block, COUNT - 1) * 64
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def load_super(super_scale, rows, row_mask, k):
    """float32 scales above the scales (or offsets) of rows at columns k."""
    return load_rows(super_scale, rows, row_mask, k // SUPER_COLUMNS, SUPER_GROUPS).to(tl.float32)


@triton.jit
def load_scale(scale, super_scale, rows, row_mask, k):
    """float32 scales (or offsets) of rows at columns k, times what is above them unless that comes last."""
    values = decode_scale(load_rows(scale, rows, row_mask, k // COLUMNS, GROUPS))
    if SUPER_GROUPS > 0 and not SUPER_LAST:
        values *= load_super(super_scale, rows, row_mask, k)
    return values


@triton.jit
def scale_weights(weight, scale, zero_point, offset, super_scale, super_offset, n, row_mask, first_k):
    """Weights [BLOCK_N, CHUNK] less zero points, times scales, plus offsets."""
    k = first_k + RUN * tl.arange(0, CHUNK // RUN)[None, :]
    n, row_mask = n[:, None], row_mask[:, None]
    runs = tl.reshape(weight, (BLOCK_N, CHUNK // RUN, RUN)).to(SCALE_TYPE)
    if ZERO_POINTS:
        runs -= load_rows(zero_point, n, row_mask, k // COLUMNS, GROUPS).to(SCALE_TYPE)[:, :, None]
    runs *= load_scale(scale, super_scale, n, row_mask, k).to(SCALE_TYPE)[:, :, None]
    if OFFSET:
        runs += load_scale(offset, super_offset, n, row_mask, k)[:, :, None]
    return tl.reshape(runs, (BLOCK_N, CHUNK)).to(COMPUTE)


@triton.jit
def scale_columns(columns, x_scale_rows, token, first_k):
    """Activations [CHUNK, BLOCK_M] times the scales of their groups."""
    k = first_k + RUN * tl.arange(0, CHUNK // RUN)[:, None]
    source = x_scale_rows[None, :] + tl.minimum(k // COLUMNS, GROUPS - 1)
    scales = tl.load(source, mask=token[None, :], other=0.0)
    runs = tl.reshape(columns, (CHUNK // RUN, RUN, BLOCK_M)).to(tl.float32) * scales[:, None, :]
    return tl.reshape(runs, (CHUNK, BLOCK_M)).to(COMPUTE)


@triton.jit
def multiply(x, x_scale, codes, scale, zero_point, offset, super_scale, super_offset, tile_n, first_k, token):
    """float32 [BLOCK_N, BLOCK_M]: K_PER_SPLIT columns from first_k of the weights of N tiles from tile_n, times x.

    x and x_scale point to the first row of x and of its scales; token says which of BLOCK_M rows there are.
    """
    m = tl.arange(0, BLOCK_M)
    n = tile_n * 64 + tl.arange(0, BLOCK_N)
    row_mask = n < TILES_N * 64
    x_scale_rows = x_scale + m * GROUPS
    factor = (scale.to(tl.int64) != 0).to(tl.float32)  # 1; M may be a constant: Inductor makes one of it where it is 1
    if SUPER_LAST:
        factor = load_super(super_scale, n, row_mask, 0)[:, None]
    if ONE_SCALE and not SCALE_WEIGHTS:
        factor = load_scale(scale, super_scale, n, row_mask, 0)[:, None]
        if X_SCALE == "group":
            factor = factor * tl.load(x_scale_rows, mask=token, other=0.0)[None, :]
        if ZERO_POINTS:
            zero = load_rows(zero_point, n, row_mask, 0, 1).to(COMPUTE)[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, K_PER_SPLIT, BLOCK_K):
        for part in tl.static_range(BLOCK_K // CHUNK):
            chunk_k = first_k + step + part * CHUNK
            weight = load_weight(codes, tile_n, chunk_k // 64)
            k = chunk_k + tl.arange(0, CHUNK)
            x_mask = token[None, :]
            if not EVEN_K:
                x_mask = x_mask & (k < K)[:, None]
            columns = decode_x(tl.load(x + m[None, :] * K + k[:, None], mask=x_mask, other=0.0))
            if SCALE_WEIGHTS:
                weight = scale_weights(
                    weight, scale, zero_point, offset, super_scale, super_offset, n, row_mask, chunk_k
                )
                if X_SCALE == "group":
                    columns = scale_columns(columns, x_scale_rows, token, chunk_k)
                accumulator += tl.dot(weight, columns, input_precision=PRECISION) * factor
            elif ONE_SCALE:
                if ZERO_POINTS:
                    weight = weight - zero
                accumulator += tl.dot(weight, columns, input_precision=PRECISION) * factor
            else:
                if ZERO_POINTS:
                    zeros = load_rows(zero_point, n, row_mask, chunk_k // COLUMNS, GROUPS)
                    weight = weight - zeros.to(COMPUTE)[:, None]
                each = load_scale(scale, super_scale, n, row_mask, chunk_k)[:, None]
                if X_SCALE == "group":
                    group = tl.minimum(chunk_k // COLUMNS, GROUPS - 1)
                    each = each * tl.load(x_scale_rows + group, mask=token, other=0.0)[None, :]
                accumulator += tl.dot(weight, columns, input_precision=PRECISION) * each
    return accumulator


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
def kernel(
    x, x_scale, codes, scale, zero_point, offset, super_scale, super_offset, bias, operand_0, y, partial, arrived, M
):
    """Grid: (ceil(N / BLOCK_N), ceil(M / BLOCK_M), SPLIT).

    Pointers that the constants make needless are not read. partial: float32, BLOCK_M * BLOCK_N a program, and arrived:
    int32, 0 for each output tile; both only for SPLIT > 1.
    """
    first_n = tl.program_id(0) * BLOCK_N
    first_m = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    x += first_m.to(tl.int64) * K
    x_scale_rows = x_scale + first_m * GROUPS
    tile_n, first_k, token = tl.program_id(0) * (BLOCK_N // 64), split * K_PER_SPLIT, first_m + m < M
    accumulator = multiply(
        x, x_scale_rows, codes, scale, zero_point, offset, super_scale, super_offset, tile_n, first_k, token
    )
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
