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
    "products"   each product of CHUNK columns is multiplied in float32 before it is added.
    "fragments"  weights are multiplied in COMPUTE, in which their scales are exact, as the tensor cores' operands.
    "weights"    the general way, for narrow blocks of all sorts and for offsets: weights are multiplied in float32,
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

# <constants>
N = tl.constexpr(256)
K = tl.constexpr(256)
BITS = tl.constexpr(4)
SPARSE = tl.constexpr(False)
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
SCALES = tl.constexpr("products")
SCALE_TYPE = tl.constexpr(tl.float32)
SUPER_LAST = tl.constexpr(False)
WORDS = tl.constexpr("")
NEGATIVE = tl.constexpr(0)
GATED = tl.constexpr(False)
PAIRED = tl.constexpr(False)
SPLIT = tl.constexpr(1)
SLAB = tl.constexpr(False)
OVERLAP = tl.constexpr(False)
EARLY = tl.constexpr(True)
HOPPER = tl.constexpr(True)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
SUPER_GROUPS = tl.constexpr(0 if SUPER_COLUMNS.value == 0 else -(-K.value // SUPER_COLUMNS.value))
ZERO_POINTS = tl.constexpr(not SYMMETRIC.value and not OFFSET.value)
ZERO_SLOTS = tl.constexpr(2 if ZERO_POINTS.value and SCALES.value != "weights" else 0)
SCALE_SLOTS = tl.constexpr(2 if SCALES.value == "fragments" else 1 if SCALES.value == "products" else 0)
"""Tensors of zero points and of scales that each chunk has."""
TILES_K = (K + 63) // 64
TILES_N = (N + 63) // 64
K_PER_SPLIT = ((K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)) * BLOCK_K
EVEN_K = K_PER_SPLIT * SPLIT == K
EVEN_N = TILES_N % (BLOCK_N // 64) == 0
STORED = tl.constexpr(BITS.value // 2 + 1 if SPARSE.value else BITS.value)
"""Bits that a weight takes in memory."""
FIELD = tl.constexpr((1 << BITS.value) - 1)
ONES = tl.constexpr(((1 << 32) - 1) // FIELD.value)
"""A field of BITS bits, and the lowest bit of each field of a word."""
ZERO_CODES = tl.constexpr((ONES.value << (BITS.value - 1)) - (1 << 32))
"""The code of 0 in each field."""
HALVES = tl.constexpr(GATED.value and not PAIRED.value)
WIDTH_N = tl.constexpr(N.value // 2 if GATED.value else N.value)
BLOCK_WIDTH = tl.constexpr(BLOCK_N.value // 2 if GATED.value else BLOCK_N.value)
"""Columns of the output, and of a program's."""
LOADED = tl.constexpr(max(64, CHUNK.value))
"""Columns whose codes are loaded at once; CHUNK of them are multiplied at once."""
PIECES = LOADED // CHUNK
PLANES = tl.constexpr(1 if BITS.value == 8 else (BITS.value & 1) + (BITS.value >> 1 & 1) + (BITS.value >> 2))
CHUNKS = BLOCK_K // CHUNK
NT = BLOCK_N // 64
KT = tl.constexpr(max(1, CHUNK.value // 64))
V = tl.constexpr(min(4, CHUNK.value // 16))
"""A chunk is of KT tiles of 64 columns, of V runs of 16 each."""
GROUP_M = tl.constexpr(8)
"""Tiles of M that neighbouring programs take before the next tile of N, so that they share weights in the L2 cache."""
CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r" + ",r" * (ZERO_SLOTS.value + 2 * (SCALES.value == "fragments")))
"""Of WORDS: halves of four words from a word, with what its rows' weights are less and times."""
PREFETCH = tl.constexpr(min(128, K_PER_SPLIT.value // 64 * 4 * STORED.value // 16 * 16))
"""Bytes that each of 128 threads sends to the L2 cache for each tile of 64 rows; a multiple of 16."""
PREFETCH_PTX = tl.constexpr(f"cp.async.bulk.prefetch.L2.global [$1], {PREFETCH.value}; mov.b32 $0, 0;")


# <decode>
@triton.jit
def decode_scale(value):
    """From the stored type to float32."""
    return value.to(tl.float32)


@triton.jit
def scale_words(value):
    """From the stored type to COMPUTE, in both halves of words."""
    return half_words(decode_scale(value).to(COMPUTE))


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
def in_order(planes):
    """The same planes; what is made of them is not made before what stands before this call."""
    KEEP: tl.constexpr = "mov.b32 $0, $1;"
    found = ()
    for plane in tl.static_range(PLANES):
        words = tl.inline_asm_elementwise(KEEP, "=r,r", [planes[plane]], dtype=tl.int32, is_pure=False, pack=1)
        found = found + (words,)
    return found


@triton.jit
def first_tile(tile_n):
    """The tile of the weight's rows that holds the first of a program's, whose tiles are counted from `tile_n`."""
    return tile_n // 2 if HALVES else tile_n


@triton.jit
def place_of(tile_n, index, SIZE: tl.constexpr):
    """For element `index` of a program's tiles, of SIZE elements each: its tile, from the first, and place in it."""
    if HALVES:
        if NT == 1:
            HALF: tl.constexpr = SIZE // 2
            return index // HALF % 2 * (TILES_N // 2), index % HALF + tile_n % 2 * HALF
        else:
            nt = index // SIZE % NT
            return nt % (NT // 2) + nt // (NT // 2) * (TILES_N // 2), index % SIZE
    else:
        return index // SIZE % NT, index % SIZE


@triton.jit
def prefetch(codes, tile_n, tile_k):
    """Send the first codes of each tile of 64 rows to the L2 cache, from column tile `tile_k`."""
    tile, slot = place_of(tile_n, tl.arange(0, NT * 128), 128)
    place = tile_k * (128 * STORED) + slot * (PREFETCH // 4)
    place = tl.minimum(place, TILES_K * (128 * STORED) - PREFETCH // 4)
    row = tl.minimum(first_tile(tile_n) + tile, TILES_N - 1).to(tl.int64) * (TILES_K * (128 * STORED))
    address = codes + row + place
    tl.inline_asm_elementwise(PREFETCH_PTX, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_plane(codes, tile_n, tile_k, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """Words that hold bits LOW to LOW + WIDTH of codes: int32 [K tiles, N tiles, 128 threads, WIDTH]."""
    index = tl.arange(0, KT * NT * 128 * WIDTH)
    kt = index // (NT * 128 * WIDTH)
    nt, word = place_of(tile_n, index, 128 * WIDTH)
    source = codes + (nt * TILES_K + kt) * (128 * STORED) + 128 * LOW + word
    if EVEN_K and EVEN_N:
        words = tl.load(source)
    else:
        words = tl.load(source, mask=(tile_k + kt < TILES_K) & (first_tile(tile_n) + nt < TILES_N), other=0)
    return tl.reshape(words, (KT, NT, 128, WIDTH))


@triton.jit
def extract(words, WIDTH: tl.constexpr):
    """The fields of words, in the low bits of both halves: int32 [K tiles, N tiles, 128 threads, fields]."""
    fields = tl.join(words, words >> 8)
    if WIDTH <= 4:
        fields = tl.join(fields, fields >> 4)
    if WIDTH <= 2:
        fields = tl.join(fields, fields >> 2)
    if WIDTH <= 1:
        fields = tl.join(fields, fields >> 1)
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    return tl.reshape(fields, (words.shape[0], NT, 128, words.shape[3] * 16 // WIDTH)) & MASK


@triton.jit
def load_pairs(codes, tile_n, tile_k, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """As `load_plane`, of WIDTH words of which both threads of a pair load the same; one fetches them from memory."""
    thread = tl.arange(0, KT * NT * 128)[:, None]
    kt = thread // (NT * 128)
    nt, place = place_of(tile_n, thread, 128)
    source = codes + (nt * TILES_K + kt) * (128 * STORED) + 64 * LOW + place // 2 * WIDTH
    source += tl.arange(0, WIDTH)[None, :]
    if EVEN_K and EVEN_N:
        words = tl.load(source)
    else:
        words = tl.load(source, mask=(tile_k + kt < TILES_K) & (first_tile(tile_n) + nt < TILES_N), other=0)
    return tl.reshape(words, (KT, NT, 128, WIDTH))


@triton.jit
def turned(words):
    """Words with their halves exchanged."""
    return (words << 16) | ((words >> 16) & 0xFFFF)


@triton.jit
def whole_fields(bits):
    """For each word q the fields whose bit q is set in `bits` [K tiles, N tiles, 128 threads]: [.., BITS] words."""
    q = tl.reshape(tl.arange(0, BITS), (1, 1, 1, BITS))
    return ((tl.expand_dims(bits, 3) >> q) & ONES) * FIELD


@triton.jit
def load_sparse(codes, tile_n, tile_k):
    """The plane of 2:4 sparse codes, in full: [K tiles, N tiles, 128 threads, BITS]."""
    kept = load_pairs(codes, tile_n, tile_k, 0, 4)
    if BITS == 8:
        both = tl.join(kept, load_pairs(codes, tile_n, tile_k, 4, 4))
        kept = tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (KT, NT, 128, 8))
    first, second = tl.split(load_pairs(codes, tile_n, tile_k, BITS, 2))
    even = tl.reshape(tl.arange(0, 128) % 2 == 0, (1, 1, 128))
    own = tl.where(even, first, second)
    # A thread's code is in its own column's half if it keeps both columns, or that half is the thread's.
    in_place = own & (turned(own) | tl.where(even, 0xFFFF, -0x10000))
    across = whole_fields(own & ~in_place)
    in_place = whole_fields(in_place)
    words = (kept & in_place) | (ZERO_CODES & ~in_place)
    return (turned(kept) & across) | (words & ~across)


@triton.jit
def load_words(codes, tile_n, tile_k):
    """The planes of LOADED columns of codes."""
    codes += (first_tile(tile_n).to(tl.int64) * TILES_K + tile_k) * (128 * STORED)
    planes = ()
    if SPARSE:
        planes = planes + (load_sparse(codes, tile_n, tile_k),)
    else:
        if BITS == 8:
            planes = planes + (load_plane(codes, tile_n, tile_k, 0, 8),)
        if BITS & 4:
            planes = planes + (load_plane(codes, tile_n, tile_k, 0, 4),)
        if BITS & 2:
            planes = planes + (load_plane(codes, tile_n, tile_k, BITS & 4, 2),)
        if BITS & 1:
            planes = planes + (load_plane(codes, tile_n, tile_k, BITS - 1, 1),)
    return planes


@triton.jit
def halves(words):
    """The words of the first and of the second half of columns."""
    parts = tl.reshape(words, (1, NT, 128, 2, words.shape[3] // 2))
    return tl.split(tl.permute(parts, (0, 1, 2, 4, 3)))


@triton.jit
def pieces(planes):
    """Planes of LOADED columns as a tuple of planes of CHUNK columns each; only one plane can be divided."""
    found = (planes,)
    if PIECES > 1:
        first, second = halves(planes[0])
        found = ((first,), (second,))
        if PIECES > 2:
            a, b = halves(first)
            c, d = halves(second)
            found = ((a,), (b,), (c,), (d,))
    return found


@triton.jit
def half_words(value):
    """16-bit numbers in both halves of words."""
    return (value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def decode_words(planes, zeros, scales):
    """Weights [BLOCK_N, CHUNK] in COMPUTE (or float32), less zero points and, in fragments, times scales.

    zeros, scales: for both rows of each thread slot, [NT * 128] each, if there are such; scales as `scale_words` or as
        float32.
    """
    if WORDS != "":
        shape: tl.constexpr = (KT, NT, 128, V)
        words = (planes[0],)
        if ZERO_SLOTS:
            for r in tl.static_range(2):
                bits = zeros[r].to(tl.int32) * 0x10001 + NEGATIVE
                words = words + (tl.broadcast_to(tl.reshape(bits, (1, NT, 128, 1)), shape),)
        if SCALES == "fragments":
            for r in tl.static_range(2):
                words = words + (tl.broadcast_to(tl.reshape(scales[r], (1, NT, 128, 1)), shape),)
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            WORDS,
            CONSTRAINTS,
            words,
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        low = tl.join(tl.join(a0, a2), tl.join(a1, a3)).to(COMPUTE, bitcast=True)  # s | r
        high = tl.join(tl.join(b0, b2), tl.join(b1, b3)).to(COMPUTE, bitcast=True)
    else:
        if BITS == 8:
            pairs = extract(planes[0], 8)
        elif BITS & 4:
            pairs = extract(planes[0], 4)
            if BITS & 2:
                pairs |= extract(planes[1], 2) << 4
        else:
            pairs = extract(planes[0], 2)
        if BITS & 1:
            pairs |= extract(planes[-1], 1) << (BITS - 1)
        low, high = decode_pair(pairs)
        if ZERO_SLOTS:
            zero = tl.reshape(tl.join(zeros[0], zeros[1]), (1, NT, 128, 1, 2)).to(low.dtype)
            low = tl.reshape(low, (KT, NT, 128, 2 * V, 2)) - zero
            high = tl.reshape(high, (KT, NT, 128, 2 * V, 2)) - zero
        if SCALES == "fragments":
            scale = tl.reshape(tl.join(scales[0], scales[1]), (1, NT, 128, 1, 2)).to(low.dtype)
            low = tl.reshape(low, (KT, NT, 128, 2 * V, 2)) * scale
            high = tl.reshape(high, (KT, NT, 128, 2 * V, 2)) * scale
    # kt nt | w h l | v s r | b, with n = 64 nt + 16 w + 8 r + h and k = 64 kt + 16 v + 8 s + 2 l + b
    fields = tl.reshape(tl.join(low, high), (KT, NT, 4, 8, 4, V, 2, 2, 2))
    return tl.reshape(tl.permute(fields, (1, 2, 7, 3, 0, 5, 6, 4, 8)), (BLOCK_N, CHUNK))


@triton.jit
def load_rows(values, rows, row_mask, block, COUNT: tl.constexpr):
    """What belongs to rows and to blocks of columns, from [N / 64, COUNT, 64]."""
    source = values + rows // 64 * (COUNT * 64) + rows % 64 + tl.minimum(block, COUNT - 1) * 64
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def load_slots(values, tile_n, block, COUNT: tl.constexpr):
    """The same for the two rows r = 0, 1 of each thread slot: [NT * 128] each."""
    tile, slot = place_of(tile_n, tl.arange(0, NT * 128), 128)
    rows = first_tile(tile_n) * 64 + tile * 64 + slot // 32 * 16 + slot % 32 // 4
    mask = rows < TILES_N * 64
    return load_rows(values, rows, mask, block, COUNT), load_rows(values, rows + 8, mask, block, COUNT)


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
def load_blocks(scale, zero_point, super_scale, tile_n, n, row_mask, k):
    """What belongs to BLOCK_K columns from k, in a tuple: for each CHUNK its scale, and its zero points' two slots."""
    found = ()
    for chunk in tl.static_range(CHUNKS):
        first = k + chunk * CHUNK
        if SCALES == "products":
            found = found + (load_scale(scale, super_scale, n, row_mask, first),)
        if SCALES == "fragments":
            r0, r1 = load_slots(scale, tile_n, first // COLUMNS, GROUPS)
            if WORDS != "":
                found = found + (scale_words(r0), scale_words(r1))
            else:
                found = found + (decode_scale(r0), decode_scale(r1))
        if ZERO_SLOTS:
            found = found + load_slots(zero_point, tile_n, first // COLUMNS, GROUPS)
    return found


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
def load_columns(x, x_scale_rows, token, first_k):
    """Activations [CHUNK, BLOCK_M] in COMPUTE, times the scales of their groups unless those multiply products."""
    m = tl.arange(0, BLOCK_M)
    k = first_k + tl.arange(0, CHUNK)
    mask = token[None, :]
    if not EVEN_K:
        mask = mask & (k < K)[:, None]
    columns = decode_x(tl.load(x + m[None, :] * K + k[:, None], mask=mask, other=0.0))
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
    weight = decode_words(planes, blocks[zeros : zeros + ZERO_SLOTS], blocks[first:zeros])
    if SCALES == "products":
        each = blocks[first][:, None]
        if X_SCALE == "group":
            group = tl.minimum(first_k // COLUMNS, GROUPS - 1)
            each = each * tl.load(x_scale_rows + group, mask=token, other=0.0)[None, :]
        return accumulator + tl.dot(weight, columns, input_precision=PRECISION) * each
    return tl.dot(weight, columns, accumulator, input_precision=PRECISION)


@triton.jit
def multiply(x, x_scale, codes, scale, zero_point, offset, super_scale, super_offset, tile_n, first_k, token):
    """float32 [BLOCK_N, BLOCK_M]: K_PER_SPLIT columns from first_k of the weights of NT tiles from tile_n, times x.

    x and x_scale point to the first row of x and of its scales; token says which of BLOCK_M rows there are.
    """
    tile, n = place_of(tile_n, tl.arange(0, BLOCK_N), 64)
    n += (first_tile(tile_n) + tile) * 64
    row_mask = n < TILES_N * 64
    x_scale_rows = x_scale + tl.arange(0, BLOCK_M) * GROUPS
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if EARLY and PREFETCH > 0:
        prefetch(codes, tile_n, first_k // 64)
    wait_for_inputs()
    if SLAB:
        words = ()
        for step in tl.static_range(0, K_PER_SPLIT, LOADED):
            words = words + pieces(load_words(codes, tile_n, (first_k + step) // 64))
        blocks = ()
        for step in tl.static_range(0, K_PER_SPLIT, BLOCK_K):
            blocks = blocks + load_blocks(scale, zero_point, super_scale, tile_n, n, row_mask, first_k + step)
        columns = ()
        for step in tl.static_range(0, K_PER_SPLIT, CHUNK):
            columns = columns + (load_columns(x, x_scale_rows, token, first_k + step),)
        for i in tl.static_range(K_PER_SPLIT // CHUNK):
            k = first_k + i * CHUNK
            accumulator = add_product(accumulator, words[i], columns[i], blocks, x_scale_rows, token, i, k)
    else:
        blocks = load_blocks(scale, zero_point, super_scale, tile_n, n, row_mask, first_k)
        for step in tl.range(0, K_PER_SPLIT, BLOCK_K):
            # Small loads are not pipelined, so what belongs to the next turn is loaded in this one.
            next_k = first_k + tl.minimum(step + BLOCK_K, K_PER_SPLIT - BLOCK_K)
            next_blocks = load_blocks(scale, zero_point, super_scale, tile_n, n, row_mask, next_k)
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
                        accumulator = tl.dot(weight, columns, accumulator, input_precision=PRECISION)
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
            if SCALES != "products" and not OVERLAP:
                accumulator = settled(accumulator)
            blocks = next_blocks
    if SCALES == "total":
        accumulator *= load_scale(scale, super_scale, n, row_mask, 0)[:, None]
        if X_SCALE == "group":
            accumulator *= tl.load(x_scale_rows, mask=token, other=0.0)[None, :]
    if SUPER_LAST:
        accumulator *= load_super(super_scale, n, row_mask, 0)[:, None]
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
    )
    first_n = block_n * BLOCK_WIDTH
    finish_parts(accumulator, scale, x_scale, bias, operand_0, y, partial, arrived, tile, split, first_m, first_n, M)
