"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) for 8-bit weights in rows, int8 or fp8, and activations alike.

The weight is the first operand, y^T = weight x^T, so that few tokens still fill the tensor cores. Scales: a weight's
per tensor, channel or block, an activation's per tensor, token or group. int8 products without blocks are summed in
int32, exactly. All others are added in float32 after each BLOCK_K columns, times the scales of their blocks; that is
also what keeps fp8 sums accurate on Hopper, whose tensor cores add fp8 products with few bits.

With GATED a program multiplies by rows of both halves of the weight, first those of output columns in the first half,
then the same of the second, and the epilogue gets both. With PAIRED too, rows that are neighbours in the weight make a
column of the output.

Programs that share an output tile (SPLIT) each sum a part of K, which `gemm_ending` adds. A kernel may begin before the
one before it has ended: it has sent its first weights to the L2 cache when it waits for its activations.
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
GATED = tl.constexpr(False)
PAIRED = tl.constexpr(False)
SPLIT = tl.constexpr(1)
EARLY = tl.constexpr(True)
NVIDIA = tl.constexpr(True)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
STEPS_PER_GROUP = (COLUMNS + BLOCK_K - 1) // BLOCK_K
STEPS = (GROUPS * STEPS_PER_GROUP + SPLIT - 1) // SPLIT
EVEN_K = tl.constexpr(
    COLUMNS.value % BLOCK_K.value == 0
    and K.value % COLUMNS.value == 0
    and GROUPS.value * STEPS_PER_GROUP.value % SPLIT.value == 0
)
HALVES = tl.constexpr(GATED.value and not PAIRED.value)
ONE_BLOCK = tl.constexpr(ROWS.value % BLOCK_N.value == 0 and not HALVES.value)
"""Whether all rows of a program are in one block of weights."""
WIDTH_N = tl.constexpr(N.value // 2 if GATED.value else N.value)
BLOCK_WIDTH = tl.constexpr(BLOCK_N.value // 2 if GATED.value else BLOCK_N.value)
"""Columns of the output, and of a program's."""
GROUP_M = tl.constexpr(8)
"""Tiles of M that neighbouring programs take before the next tile of N, so that they share weights in the L2 cache."""
PREFETCH = tl.constexpr(256 if EVEN_K.value and K.value % 256 == 0 else 0)
"""Bytes of each row's first weights that are sent to the L2 cache."""


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
def epilogue(value, second, bias, operand_0, n, offsets, mask):
    return value


# </epilogue>


@triton.jit
def wait_for_inputs():
    """Until the kernels before have written all they write; those after may begin then."""
    if EARLY:
        PTX: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def settled(product):
    """The same product: it is added to others outside of the tensor cores."""
    if NVIDIA:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [product], dtype=tl.float32, is_pure=True, pack=1)
    return product


@triton.jit
def rows_from():
    """A program's rows of the weight, less its first, `first_row`: [BLOCK_N]."""
    i = tl.arange(0, BLOCK_N)
    if HALVES:
        return i % BLOCK_WIDTH + i // BLOCK_WIDTH * WIDTH_N
    else:
        return i


@triton.jit
def first_row(first_n):
    """The first row of a program whose first column of the output is `first_n`."""
    return 2 * first_n if PAIRED else first_n


@triton.jit
def columns_of(i):
    """The columns of step i, and where the block of columns that they belong to ends."""
    if GROUPS == 1:
        return i * BLOCK_K + tl.arange(0, BLOCK_K), K
    else:
        group = i // STEPS_PER_GROUP
        k = group * COLUMNS + i % STEPS_PER_GROUP * BLOCK_K + tl.arange(0, BLOCK_K)
        return k, tl.minimum(group * COLUMNS + COLUMNS, K)


@triton.jit
def load_factors(scale_rows, x_scale_rows, row, token, i):
    """Scales of step i's block: of rows [BLOCK_N], or one for all, and of tokens [BLOCK_M] if there are such."""
    group = tl.minimum(i // STEPS_PER_GROUP, GROUPS - 1)
    if ONE_BLOCK:
        of_rows = decode_scale(tl.load(scale_rows + group))
    else:
        of_rows = decode_scale(tl.load(scale_rows + group, mask=row, other=0))
    if X_SCALE == "group":
        return of_rows, tl.load(x_scale_rows + group, mask=token, other=0.0)
    else:
        return of_rows, of_rows


@triton.jit
def multiply(x, x_scale, codes, scale, first_n, split, token):
    """float32 [BLOCK_N, BLOCK_M]: part `split` of the columns of the rows for output columns from `first_n`, times x.

    x and x_scale point to the first row of x and of its scales; token says which of BLOCK_M rows there are.
    """
    m = tl.arange(0, BLOCK_M)
    n = rows_from()
    first = first_row(first_n)
    row = first + n < N
    x += m[None, :] * K
    scale_rows = scale + (first if ONE_BLOCK else first + n) // ROWS * GROUPS
    x_scale_rows = x_scale + m * GROUPS
    if EARLY and PREFETCH > 0:
        PTX: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], 256; mov.b32 $0, 0;"
        first_k = tl.minimum(split * STEPS * BLOCK_K, K - PREFETCH)
        address = codes + tl.minimum(first + n, N - 1).to(tl.int64) * K + first_k
        tl.inline_asm_elementwise(PTX, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)
    codes += first.to(tl.int64) * K + n[:, None] * K
    wait_for_inputs()
    if GROUPS > 1:
        factors = load_factors(scale_rows, x_scale_rows, row, token, split * STEPS)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    for step in tl.range(0, STEPS):
        i = split * STEPS + step
        k, end = columns_of(i)
        w_mask, x_mask = row[:, None], token[None, :]
        if not EVEN_K:
            w_mask = w_mask & (k < end)[None, :]
            x_mask = x_mask & (k < end)[:, None]
        weight = decode_weight(tl.load(codes + k[None, :], mask=w_mask, other=0.0))
        columns = decode_x(tl.load(x + k[:, None], mask=x_mask, other=0.0))
        if INTEGER:
            accumulator = tl.dot(weight, columns, accumulator, out_dtype=tl.int32)
        elif GROUPS == 1:
            accumulator += settled(tl.dot(weight, columns, input_precision=PRECISION).to(tl.float32))
        else:
            # Small loads are not pipelined, so what belongs to the next turn is loaded in this one.
            following = load_factors(scale_rows, x_scale_rows, row, token, i + 1)
            factor = factors[0]
            if not ONE_BLOCK:
                factor = factor[:, None]
            if X_SCALE == "group":
                factor = factor * factors[1][None, :]
            accumulator += tl.dot(weight, columns, input_precision=PRECISION).to(tl.float32) * factor
            factors = following
    return accumulator.to(tl.float32)


@triton.jit
def finish(total, scale, x_scale, bias, operand_0, y, first_m, first_n, M):
    m = first_m + tl.arange(0, BLOCK_M)[None, :]
    n = first_n + tl.arange(0, BLOCK_WIDTH)[:, None]
    if GROUPS == 1:
        rows = first_row(first_n) + rows_from()[:, None]
        total *= decode_scale(tl.load(scale + rows // ROWS, mask=rows < N, other=0))
        if X_SCALE == "group":
            total *= tl.load(x_scale + m, mask=m < M, other=0.0)
    if X_SCALE == "tensor":
        total *= tl.load(x_scale)
    if X_SCALE == "token":
        total *= tl.load(x_scale + m, mask=m < M, other=0.0)
    first, second = total, total
    if HALVES:
        first, second = tl.split(tl.permute(tl.reshape(total, (2, BLOCK_WIDTH, BLOCK_M)), (1, 2, 0)))
    if PAIRED:
        first, second = tl.split(tl.permute(tl.reshape(total, (BLOCK_WIDTH, 2, BLOCK_M)), (0, 2, 1)))
    mask = (m < M) & (n < WIDTH_N)
    offsets = m.to(tl.int64) * WIDTH_N + n
    value = epilogue(first, second, bias, operand_0, n, offsets, mask)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


# <ending>
from qcompile.codegen.templates.gemm_ending import finish_parts

# </ending>


@triton.jit(do_not_specialize=["M"])
def kernel(x, x_scale, codes, scale, bias, operand_0, y, partial, arrived, M):
    """Grid: (ceil(N / BLOCK_N) * ceil(M / BLOCK_M) * SPLIT,).

    Pointers that the constants make needless are not read. partial: float32, BLOCK_M * BLOCK_N a program, and arrived:
    int32, 0 for each output tile, and 0 again at the end; both only for SPLIT > 1.
    """
    split, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    tiles_m = tl.cdiv(M, BLOCK_M)
    ACROSS: tl.constexpr = GROUP_M * ((N + BLOCK_N - 1) // BLOCK_N)
    band, within = tile // ACROSS, tile % ACROSS
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    first_m = (band * GROUP_M + within % height) * BLOCK_M
    first_n = within // height * BLOCK_WIDTH
    m = tl.arange(0, BLOCK_M)
    accumulator = multiply(
        x + first_m.to(tl.int64) * K,
        x_scale + first_m * GROUPS,
        codes,
        scale,
        first_n,
        split,
        first_m + m < M,
    )
    finish_parts(accumulator, scale, x_scale, bias, operand_0, y, partial, arrived, tile, split, first_m, first_n, M)
