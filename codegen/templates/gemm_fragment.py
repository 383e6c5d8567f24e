"""y [M, N] = epilogue(x [M, K] @ weight [N, K]^T) for weights in the `fragment` layout of qcompile/layouts.py.

The weight is the first operand of the product, y^T = weight x^T: its codes go from memory to registers, are decoded
there, and enter the tensor cores from registers. Programs that share an output tile (SPLIT) each sum a part of K, which
`gemm_ending` adds.

With GATED a program multiplies by rows of both halves of the weight, and the epilogue gets both: its tiles of 64 rows
(or if it has one only, that tile's halves) are those of output columns in the first half of the weight, then the same
of the second. With PAIRED too, rows that are neighbours in the weight make a column of the output.

A kernel may begin before the one before it has ended: until then it only sends its first weights to the L2 cache. SLAB
programs then load all their weights before they multiply, others go on in a pipelined loop.

Where scales go (SCALES):

    "total"      one scale a row: it multiplies the sum.
    "products"   each product of CHUNK columns is multiplied in float32 before it is added; so is the sum of as many
                 of x, by the offset.
    "sums"       as "products", for one row of x: its operand has BLOCK_M columns, in each the elements of one group of
                 CHUNK columns and zeros else, so that a product is the sums of groups side by side. They are added at
                 the end.
    "fragments"  weights are multiplied in COMPUTE, in which their scales are exact, as the tensor cores' operands. Each
                 product of CHUNK columns is multiplied by what is above scales (SUPERS), and with offsets added to the
                 product of these, as they are, times what is above them.
    "weights"    the general way, for narrow blocks, and for offsets and many rows: weights are multiplied in float32,
                 where the offset is added too, so that it cancels nothing that was rounded; or in COMPUTE where that is
                 exact.

One scale above all of a row's multiplies the sum (SUPER_LAST) where weights fit without it, unless a row has one scale.

With the first operand in registers, a product that is still under way reads registers, and Triton 3.6 lets it run into
the next turn of the loop, where they are overwritten. So the sum is `settled` at the end of a turn: all products in it
are done. With OVERLAP a turn is of two chunks, each with registers of its own: Triton waits for the first product
before what follows it, and the second is under way while the next turn decodes its first chunk. `in_order` keeps that
decoding in its place.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <weights>
from qcompile.codegen.templates.fragment_scales import (
    decode_words,
    load_blocks,
    load_scale,
    load_super,
    offset_words,
    scale_weights,
)
from qcompile.codegen.templates.fragment_weights import (
    APART,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    BLOCK_WIDTH,
    CHUNK,
    COLUMNS,
    COMPUTE,
    CORES,
    EARLY,
    EVEN_K,
    FACTOR,
    GROUP_M,
    GROUPS,
    HALVES,
    HOPPER,
    K_PER_SPLIT,
    LOADED,
    MMA_SYNC,
    NT,
    OFFSET,
    OVERLAP,
    PAIRED,
    PIECES,
    PLANES,
    PRECISION,
    PREFETCH,
    RUN,
    SCALE_SLOTS,
    SCALES,
    SLAB,
    SPLIT,
    SUPER_LAST,
    SUPERS,
    TILES_N,
    UNIT,
    WIDTH_N,
    X_SCALE,
    ZERO_SLOTS,
    K,
    N,
    decode_x,
    first_tile,
    load_words,
    pieces,
    place_of,
    prefetch,
)

# </weights>
# <sparse>
from qcompile.codegen.templates.sparse_cores import multiply_kept

# </sparse>


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
def settled(sum):
    """The same sum, when all products in it are done."""
    if HOPPER:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [sum], dtype=tl.float32, is_pure=True, pack=1)
    return sum


@triton.jit
def operand(weight):
    """The same weights, where warps multiply by what is in their registers.

    Triton takes what is joined for loaded at half the width, has threads hold twice as many neighbours to load them
    faster, and so exchanges all weights between threads. It does not see what is behind this.
    """
    if MMA_SYNC:
        KEEP: tl.constexpr = "mov.b32 $0, $1;"
        return tl.inline_asm_elementwise(KEEP, "=r,r", [weight], dtype=weight.dtype, is_pure=False, pack=2)
    return weight


@triton.jit
def in_order(planes):
    """The same planes; what is made of them is not made before what stands before this call."""
    KEEP: tl.constexpr = "mov.b32 $0, $1;"
    found = ()
    for plane in tl.static_range(PLANES):
        words = tl.inline_asm_elementwise(KEEP, "=r,r", [planes[plane]], dtype=tl.int32, is_pure=False, pack=1)
        found = found + (words,)
    return found


@triton.jit
def load_columns(x, x_scale_rows, token, first_k):
    """Activations [CHUNK, BLOCK_M] in COMPUTE, times the scales of their groups unless those multiply products."""
    m = tl.arange(0, BLOCK_M)
    k = first_k + tl.arange(0, CHUNK)
    if SCALES == "sums":
        mask, source = m[None, :] == (tl.arange(0, CHUNK) // RUN)[:, None], x + k[:, None]
    else:
        mask, source = token[None, :], x + m[None, :] * K + k[:, None]
    if not EVEN_K:
        mask = mask & (k < K)[:, None]
    columns = decode_x(tl.load(source, mask=mask, other=0.0))
    if X_SCALE == "group" and SCALES != "products" and GROUPS > 1:
        runs = first_k + RUN * tl.arange(0, CHUNK // RUN)[:, None]
        source = x_scale_rows[None, :] + tl.minimum(runs // COLUMNS, GROUPS - 1)
        scales = tl.load(source, mask=token[None, :], other=0.0)
        scaled = tl.reshape(columns, (CHUNK // RUN, RUN, BLOCK_M)).to(tl.float32) * scales[:, None, :]
        columns = tl.reshape(scaled, (CHUNK, BLOCK_M)).to(COMPUTE)
    return columns


@triton.jit
def add_product(accumulator, planes, columns, blocks, x_scale_rows, token, chunk: tl.constexpr, first_k):
    """The sum with the product of CHUNK columns, number `chunk` of those that `blocks` belongs to."""
    first: tl.constexpr = chunk * (SCALE_SLOTS + ZERO_SLOTS)
    zeros: tl.constexpr = first + SCALE_SLOTS
    if OVERLAP:
        planes = in_order(planes)
    weight = operand(decode_words(planes, blocks[zeros : zeros + ZERO_SLOTS], blocks[first:zeros]))
    if SCALES == "products" or SCALES == "sums":
        each, more = blocks[first], blocks[first + SCALE_SLOTS - 1]
        if SCALES == "products":
            each, more = each[:, None], more[:, None]
        if X_SCALE == "group":
            group = tl.minimum(first_k // COLUMNS, GROUPS - 1)
            of_tokens = tl.load(x_scale_rows + group, mask=token, other=0.0)[None, :]
            each, more = each * of_tokens, more * of_tokens
        accumulator += tl.dot(weight, columns, input_precision=PRECISION) * each
        if OFFSET:
            ones = tl.full((BLOCK_N, CHUNK), 1.0 / FACTOR, weight.dtype)  # as much less as weights are
            accumulator += tl.dot(ones, columns, input_precision=PRECISION) * more
        return accumulator
    if APART:
        product = tl.dot(weight, columns, input_precision=PRECISION)
        if SUPERS:
            product *= blocks[first + 1 + OFFSET][:, None]
        accumulator += product
        if OFFSET:
            more = tl.dot(operand(offset_words(blocks[first + 1])), columns, input_precision=PRECISION)
            if SUPERS:
                more *= (blocks[first + 3] * (UNIT / FACTOR))[:, None]
            else:
                more *= UNIT / FACTOR
            accumulator += more
        return accumulator
    return tl.dot(weight, columns, accumulator, input_precision=PRECISION)


@triton.jit
def multiply(x, x_scale, codes, scale, zero_point, offset, super_scale, super_offset, tile_n, first_k, token, rows):
    """float32 [BLOCK_N, BLOCK_M]: K_PER_SPLIT columns from first_k of the weights of NT tiles from tile_n, times x.

    x and x_scale point to the first row of x and of its scales; token says which of BLOCK_M rows there are, rows how
    many.
    """
    tile, n = place_of(tile_n, tl.arange(0, BLOCK_N), 64)
    n += (first_tile(tile_n) + tile) * 64
    row_mask = n < TILES_N * 64
    x_scale_rows = x_scale + tl.arange(0, BLOCK_M) * GROUPS
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if EARLY and PREFETCH > 0:
        prefetch(codes, tile_n, first_k // 64)
    wait_for_inputs()
    if CORES:
        accumulator = multiply_kept(x, codes, scale, tile_n, first_k, rows)
    elif SLAB:
        words = ()
        for step in tl.static_range(0, K_PER_SPLIT, LOADED):
            words = words + pieces(load_words(codes, tile_n, (first_k + step) // 64))
        blocks = ()
        for step in tl.static_range(0, K_PER_SPLIT, BLOCK_K):
            k = first_k + step
            blocks += load_blocks(scale, zero_point, offset, super_scale, super_offset, tile_n, n, row_mask, k)
        columns = ()
        for step in tl.static_range(0, K_PER_SPLIT, CHUNK):
            columns = columns + (load_columns(x, x_scale_rows, token, first_k + step),)
        for i in tl.static_range(K_PER_SPLIT // CHUNK):
            k = first_k + i * CHUNK
            accumulator = add_product(accumulator, words[i], columns[i], blocks, x_scale_rows, token, i, k)
    else:
        blocks = load_blocks(scale, zero_point, offset, super_scale, super_offset, tile_n, n, row_mask, first_k)
        for step in tl.range(0, K_PER_SPLIT, BLOCK_K):
            # Small loads are not pipelined, so what belongs to the next turn is loaded in this one.
            next_k = first_k + tl.minimum(step + BLOCK_K, K_PER_SPLIT - BLOCK_K)
            next_blocks = load_blocks(scale, zero_point, offset, super_scale, super_offset, tile_n, n, row_mask, next_k)
            for part in tl.static_range(BLOCK_K // LOADED):
                k = first_k + step + part * LOADED
                planes = pieces(load_words(codes, tile_n, k // 64))
                for piece in tl.static_range(PIECES):
                    columns = load_columns(x, x_scale_rows, token, k + piece * CHUNK)
                    if SCALES == "weights":
                        weight = decode_words(planes[piece], (), ())
                        weight = scale_weights(
                            weight, scale, zero_point, offset, super_scale, super_offset, n, row_mask, k + piece * CHUNK
                        )
                        accumulator = tl.dot(operand(weight), columns, accumulator, input_precision=PRECISION)
                    else:
                        accumulator = add_product(
                            accumulator,
                            planes[piece],
                            columns,
                            blocks,
                            x_scale_rows,
                            token,
                            part * PIECES + piece,
                            k + piece * CHUNK,
                        )
            if SCALES != "products" and SCALES != "sums" and not APART and not OVERLAP:
                accumulator = settled(accumulator)
            blocks = next_blocks
    if FACTOR != 1.0:
        accumulator *= FACTOR
    if SCALES == "total":
        accumulator *= load_scale(scale, super_scale, n, row_mask, 0)[:, None]
        if X_SCALE == "group":
            accumulator *= tl.load(x_scale_rows, mask=token, other=0.0)[None, :]
    if SUPER_LAST:
        accumulator *= load_super(super_scale, n, row_mask, 0)[:, None]
    if SCALES == "sums":
        accumulator = tl.where(tl.arange(0, BLOCK_M)[None, :] == 0, tl.sum(accumulator, 1)[:, None], 0.0)
    return accumulator


@triton.jit
def finish(total, scale, x_scale, bias, operand_0, y, first_m, first_n, M):
    m = first_m + tl.arange(0, BLOCK_M)[None, :]
    n = first_n + tl.arange(0, BLOCK_WIDTH)[:, None]
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
def kernel(
    x, x_scale, codes, scale, zero_point, offset, super_scale, super_offset, bias, operand_0, y, partial, arrived, M
):
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
    block_n = within // height
    m = tl.arange(0, BLOCK_M)
    accumulator = multiply(
        x + first_m.to(tl.int64) * K,
        x_scale + first_m * GROUPS,
        codes,
        scale,
        zero_point,
        offset,
        super_scale,
        super_offset,
        block_n * NT,
        split * K_PER_SPLIT,
        first_m + m < M,
        M - first_m,
    )
    first_n = block_n * BLOCK_WIDTH
    finish_parts(accumulator, scale, x_scale, bias, operand_0, y, partial, arrived, tile, split, first_m, first_n, M)
