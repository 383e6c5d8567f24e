"""Weights in the `fragment` layout of qcompile/layouts.py: constants, loads of codes and of scales, and decoding.

For the templates that multiply by such weights and the one that writes them out. How scales are applied is said in
`gemm_fragment`.
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
QUADS = tl.constexpr(0)
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
BYTES = tl.constexpr(False)
NEGATIVE = tl.constexpr(0)
FACTOR = tl.constexpr(1.0)
UNIT = tl.constexpr(1.0)
GATED = tl.constexpr(False)
PAIRED = tl.constexpr(False)
SPLIT = tl.constexpr(1)
SLAB = tl.constexpr(False)
CORES = tl.constexpr(False)
OVERLAP = tl.constexpr(False)
EARLY = tl.constexpr(True)
HOPPER = tl.constexpr(True)
MMA_SYNC = tl.constexpr(False)
# </constants>

GROUPS = (K + COLUMNS - 1) // COLUMNS
SUPER_GROUPS = tl.constexpr(0 if SUPER_COLUMNS.value == 0 else -(-K.value // SUPER_COLUMNS.value))
ZERO_POINTS = tl.constexpr(not SYMMETRIC.value and not OFFSET.value)
ZERO_SLOTS = tl.constexpr(2 if ZERO_POINTS.value and SCALES.value != "weights" else 0)
SUPERS = tl.constexpr(SCALES.value == "fragments" and SUPER_COLUMNS.value > 0 and not SUPER_LAST.value)
"""Whether products of weights in fragments are multiplied by what is above their scales."""
APART = tl.constexpr(SUPERS.value or (SCALES.value == "fragments" and OFFSET.value))
"""Whether each of these products is added to the sum by itself."""
SCALE_SLOTS = tl.constexpr(
    {
        "products": 1 + OFFSET.value,
        "fragments": (1 if QUADS.value else 2) + OFFSET.value + SUPERS.value * (1 + OFFSET.value),
    }.get(SCALES.value, 0)
)
"""Tensors of zero points, and of scales and offsets, that each chunk has."""
TILES_K = (K + 63) // 64
TILES_N = (N + 63) // 64
SCALE_COUNT = tl.constexpr(TILES_K.value * 2 * QUADS.value if QUADS.value else GROUPS.value)
"""Scales of a row, with those of columns beyond K where they lie in fours."""
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
HIGH = tl.constexpr((1 << 15) + (1 << (BITS.value - 1)))
"""Moves bits 1 and 17 to the lowest bits of the first two fields of a word's high half."""
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
_WORDS_IN = BITS.value if BYTES.value else 1
_SCALES_IN = 0 if SCALES.value != "fragments" else QUADS.value if BYTES.value and QUADS.value else 2
CONSTRAINTS = tl.constexpr(
    "=h," * (32 if BYTES.value else 8) + ",".join("r" * (_WORDS_IN + ZERO_SLOTS.value + _SCALES_IN))
)
"""Of WORDS: halves of words of weights from words of codes, with what their rows' weights are less and times."""
HALF_WORDS = tl.constexpr((tl.int16,) * (32 if BYTES.value else 8))
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
def quad_words(quads):
    """What `scale_words` makes of the four bytes of words, UNIT times less."""
    return (
        scale_words((quads & 0xFF).to(tl.uint8)),
        scale_words((quads >> 8 & 0xFF).to(tl.uint8)),
        scale_words((quads >> 16 & 0xFF).to(tl.uint8)),
        scale_words((quads >> 24 & 0xFF).to(tl.uint8)),
    )


@triton.jit
def four_bits(words):
    """The codes of words of 4-bit ones, as `decode_pair` takes them: [K tiles, N tiles, 128 threads, pairs]."""
    return extract(words, 4)


@triton.jit
def codes_of(words):
    """Codes of 64 columns from a thread's words, as `decode_pair` takes them: [K tiles, N tiles, 128 threads, 16]."""
    return tl.zeros((KT, NT, 128, 16), tl.int32)


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
    place = (nt * TILES_K + kt) * (128 * STORED) + 128 * LOW + word
    if BYTES and MMA_SYNC:
        # A thread loads its own words of each plane, or weights would be exchanged: `gemm_fragment.operand`.
        place = tl.max_contiguous(place, WIDTH)
    source = codes + place
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
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    return tl.reshape(fields, (words.shape[0], NT, 128, words.shape[3] * 16 // WIDTH)) & MASK


@triton.jit
def load_shared(codes, tile_n, tile_k, FIRST: tl.constexpr, STEP: tl.constexpr, THREADS: tl.constexpr):
    """Four words that THREADS neighbours have alike, one set of them STEP words behind the other: [.., 128 threads, 4].

    FIRST: the place of the first set in a tile of 64 x 64 weights.
    """
    SETS: tl.constexpr = 128 // THREADS
    each = tl.arange(0, KT * NT * SETS)[:, None]
    kt = each // (NT * SETS)
    nt, place = place_of(tile_n, each, SETS)
    source = codes + (nt * TILES_K + kt) * (128 * STORED) + FIRST + place * STEP
    source += tl.arange(0, 4)[None, :]
    if EVEN_K and EVEN_N:
        words = tl.load(source)
    else:
        words = tl.load(source, mask=(tile_k + kt < TILES_K) & (first_tile(tile_n) + nt < TILES_N), other=0)
    words = tl.broadcast_to(tl.reshape(words, (KT, NT, SETS, 1, 4)), (KT, NT, SETS, THREADS, 4))
    return tl.reshape(words, (KT, NT, 128, 4))


@triton.jit
def turned(words):
    """Words with their halves exchanged."""
    return (words << 16) | ((words >> 16) & 0xFFFF)


@triton.jit
def own_fields(places):
    """The fields of a thread's own columns that are kept, all their bits set: [.., BITS] words."""
    lane = tl.reshape(tl.arange(0, 128) % 4, (1, 1, 128, 1))
    own = (places >> (lane // 2 * 4 + lane % 2 * 2)) & 0x03030303  # r at bit 16, s at 8, b at 1
    if BITS == 8:
        own = tl.reshape(tl.join(own, own >> 8) & 0x00030003, (KT, NT, 128, 8))
    low = (own | (own >> (16 - BITS))) & 0xFFFF
    high = (own * HIGH) & -0x10000
    return ((low | high) & ONES) * FIELD


@triton.jit
def load_sparse(codes, tile_n, tile_k):
    """The plane of 2:4 sparse codes, in full: [K tiles, N tiles, 128 threads, BITS]."""
    first = load_shared(codes, tile_n, tile_k, 0, BITS, 2)
    if BITS == 8:
        kept = tl.reshape(tl.join(first, load_shared(codes, tile_n, tile_k, 4, BITS, 2)), (KT, NT, 128, 8))
    else:
        first, second = tl.split(tl.permute(tl.reshape(first, (KT, NT, 128, 2, 2)), (0, 1, 2, 4, 3)))
        kept = (first & 0xFF00FF) | ((second & 0xFF00FF) << 8)
        kept = tl.reshape(tl.join(kept, ((first >> 8) & 0xFF00FF) | (second & -0xFF0100)), (KT, NT, 128, 4))
    own = own_fields(load_shared(codes, tile_n, tile_k, 64 * BITS, 4, 4))
    # If a thread keeps both columns, each code is in its half; if one, in that half which is the thread's.
    even = tl.reshape(tl.arange(0, 128) % 2 == 0, (1, 1, 128, 1))
    in_place = turned(own) | tl.where(even, 0xFFFF, -0x10000)
    return (own & ((kept & in_place) | (turned(kept) & ~in_place))) | (ZERO_CODES & ~own)


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
def each_of(words):
    """Of [.., 128 threads, up to 4] a tuple of [.., 128 threads]."""
    COUNT: tl.constexpr = words.shape[3]
    if COUNT == 1:
        return (tl.reshape(words, (KT, NT, 128)),)
    elif COUNT == 2:
        return tl.split(words)
    else:
        even, odd = tl.split(tl.reshape(words, (KT, NT, 128, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def words_of(planes):
    """A thread's words of 64 columns, in a tuple."""
    found = ()
    for plane in tl.static_range(PLANES):
        found = found + each_of(planes[plane])
    return found


@triton.jit
def of_runs(fields, FIRST: tl.constexpr):
    """Fields FIRST + 8 v of the runs v of 16 columns, in the last two dimensions."""
    return tl.join(tl.join(fields[FIRST], fields[FIRST + 16]), tl.join(fields[FIRST + 8], fields[FIRST + 24]))


@triton.jit
def joined(fields, B: tl.constexpr):
    """Of fields 8 v + 4 r + 2 s + b those of one b: [K tiles, N tiles, 128 threads, v, s, r]."""
    first = tl.join(of_runs(fields, B), of_runs(fields, B + 2))
    second = tl.join(of_runs(fields, B + 4), of_runs(fields, B + 6))
    return tl.reshape(tl.join(first, second), (KT, NT, 128, V, 2, 2))


@triton.jit
def half_words(value):
    """16-bit numbers in both halves of words."""
    return (value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def spread(first, second):
    """Of both groups of each word of `load_quads` a number, as one for each run of 16 columns."""
    each = tl.reshape(tl.join(first, second), (KT, NT, 128, 2 * QUADS, 1))
    return tl.reshape(tl.broadcast_to(each, (KT, NT, 128, 2 * QUADS, COLUMNS // 16)), (KT, NT, 128, V))


@triton.jit
def scales_of_rows(scales):
    """Scales of a chunk for both rows of each thread slot, which broadcast to [K tiles, N tiles, 128 threads, V].

    They are as `scale_words` makes them, or in float32 if codes are decoded without WORDS.
    """
    if QUADS == 0:
        return tl.reshape(scales[0], (1, NT, 128, 1)), tl.reshape(scales[1], (1, NT, 128, 1))
    elif WORDS != "":
        a0, a1, b0, b1 = quad_words(scales[0])
        return spread(a0, b0), spread(a1, b1)
    else:
        a0 = decode_scale((scales[0] & 0xFF).to(tl.uint8))
        a1 = decode_scale(((scales[0] >> 8) & 0xFF).to(tl.uint8))
        b0 = decode_scale(((scales[0] >> 16) & 0xFF).to(tl.uint8))
        b1 = decode_scale(((scales[0] >> 24) & 0xFF).to(tl.uint8))
        return spread(a0, b0), spread(a1, b1)


@triton.jit
def decode_words(planes, zeros, scales):
    """Weights [BLOCK_N, CHUNK] in COMPUTE (or float32), less zero points and, in fragments, times scales.

    zeros, scales: as `load_blocks` has them for a chunk, if there are such.
    """
    if WORDS != "":
        shape: tl.constexpr = (KT, NT, 128, V)
        words = words_of(planes) if BYTES else (planes[0],)
        if ZERO_SLOTS:
            for r in tl.static_range(2):
                bits = tl.reshape(zeros[r].to(tl.int32) * 0x10001 + NEGATIVE, (1, NT, 128, 1))
                bits = tl.broadcast_to(bits, shape)
                words = words + ((each_of(bits)[0],) if BYTES else (bits,))
        if SCALES == "fragments" and BYTES and QUADS > 0:
            words = words + each_of(scales[0])
        elif SCALES == "fragments":
            first, second = scales_of_rows(scales)
            first, second = tl.broadcast_to(first, shape), tl.broadcast_to(second, shape)
            words = words + ((each_of(first)[0], each_of(second)[0]) if BYTES else (first, second))
        found = tl.inline_asm_elementwise(WORDS, CONSTRAINTS, words, dtype=HALF_WORDS, is_pure=True, pack=1)
        if BYTES:
            low, high = joined(found, 0), joined(found, 1)
        else:
            a0, b0, a1, b1, a2, b2, a3, b3 = found
            low = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # s | r
            high = tl.join(tl.join(b0, b2), tl.join(b1, b3))
        low, high = low.to(COMPUTE, bitcast=True), high.to(COMPUTE, bitcast=True)
    else:
        if BITS == 8:
            pairs = extract(planes[0], 8)
        elif BITS == 4:
            pairs = four_bits(planes[0])
        else:
            pairs = codes_of(words_of(planes))
        low, high = decode_pair(pairs)
        if ZERO_SLOTS:
            zero = tl.reshape(tl.join(zeros[0], zeros[1]), (1, NT, 128, 1, 2)).to(low.dtype)
            low = tl.reshape(low, (KT, NT, 128, 2 * V, 2)) - zero
            high = tl.reshape(high, (KT, NT, 128, 2 * V, 2)) - zero
        if SCALES == "fragments":
            first, second = scales_of_rows(scales)
            scale = tl.expand_dims(tl.join(first, second), 4).to(low.dtype)
            low = tl.reshape(low, (KT, NT, 128, V, 2, 2)) * scale
            high = tl.reshape(high, (KT, NT, 128, V, 2, 2)) * scale
    # kt nt | w h l | v s r | b, with n = 64 nt + 16 w + 8 r + h and k = 64 kt + 16 v + 8 s + 2 l + b
    fields = tl.reshape(tl.join(low, high), (KT, NT, 4, 8, 4, V, 2, 2, 2))
    return tl.reshape(tl.permute(fields, (1, 2, 7, 3, 0, 5, 6, 4, 8)), (BLOCK_N, CHUNK))


@triton.jit
def offset_words(quads):
    """Offsets [BLOCK_N, CHUNK] in COMPUTE, UNIT times less, from words of `load_quads`."""
    a0, a1, b0, b1 = quad_words(quads)
    both = tl.join(spread(a0, b0), spread(a1, b1))
    if WORDS != "":
        APART_PTX: tl.constexpr = "mov.b32 {$0, $1}, $2;"
        low, high = tl.inline_asm_elementwise(
            APART_PTX, "=h,=h,r", [both], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
    fields = tl.reshape(tl.join(low, high), (KT, NT, 4, 8, 4, V, 1, 2, 2)).to(COMPUTE, bitcast=True)
    fields = tl.broadcast_to(fields, (KT, NT, 4, 8, 4, V, 2, 2, 2))
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
def load_blocked(values, rows, row_mask, block):
    """The same of scales or offsets, which may lie in fours."""
    if QUADS == 0:
        return load_rows(values, rows, row_mask, block, GROUPS)
    block = tl.minimum(block, GROUPS - 1)
    row = (rows % 64 // 16 * 8 + rows % 8) * QUADS
    tile = rows // 64 * TILES_K + block // (2 * QUADS)
    source = values + tile * (128 * QUADS) + (row + block // 2 % QUADS) * 4 + block % 2 * 2 + rows % 16 // 8
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def load_quads(scale, tile_n, tile_k):
    """Words of four scales, of two groups and in each two rows: int32 [K tiles, N tiles, 128 threads, QUADS]."""
    each = tl.arange(0, KT * NT * 128)[:, None]
    kt = each // (NT * 128)
    nt, slot = place_of(tile_n, each, 128)
    tile = first_tile(tile_n) + nt
    source = scale.to(tl.pointer_type(tl.int32)) + (tile * TILES_K + tile_k + kt) * (32 * QUADS)
    source += slot // 4 * QUADS + tl.arange(0, QUADS)[None, :]
    if EVEN_K and EVEN_N:
        words = tl.load(source)
    else:
        words = tl.load(source, mask=(tile_k + kt < TILES_K) & (tile < TILES_N), other=0)
    return tl.reshape(words, (KT, NT, 128, QUADS))


@triton.jit
def load_super(super_scale, rows, row_mask, k):
    """float32 scales above the scales (or offsets) of rows at columns k."""
    return load_rows(super_scale, rows, row_mask, k // SUPER_COLUMNS, SUPER_GROUPS).to(tl.float32)


@triton.jit
def load_scale(scale, super_scale, rows, row_mask, k):
    """float32 scales (or offsets) of rows at columns k, times what is above them unless that comes last."""
    values = decode_scale(load_blocked(scale, rows, row_mask, k // COLUMNS))
    if SUPER_GROUPS > 0 and not SUPER_LAST:
        values *= load_super(super_scale, rows, row_mask, k)
    return values


@triton.jit
def load_blocks(scale, zero_point, offset, super_scale, super_offset, tile_n, n, row_mask, k):
    """What belongs to BLOCK_K columns from k, in a tuple: for each CHUNK its scales, then its offsets or its
    zero points' two slots.

    Scales in fragments are in two slots too, as float32 or as `scale_words` makes them; or as `load_quads` loads them,
    and then offsets, what is above scales, and above offsets.
    """
    found = ()
    for chunk in tl.static_range(CHUNKS):
        first = k + chunk * CHUNK
        if SCALES == "products":
            found = found + (load_scale(scale, super_scale, n, row_mask, first),)
            if OFFSET:
                found = found + (load_scale(offset, super_offset, n, row_mask, first),)
        if SCALES == "fragments" and QUADS > 0:
            found = found + (load_quads(scale, tile_n, first // 64),)
            if OFFSET:
                found = found + (load_quads(offset, tile_n, first // 64),)
            if SUPERS:
                found = found + (load_super(super_scale, n, row_mask, first),)
            if SUPERS and OFFSET:
                found = found + (load_super(super_offset, n, row_mask, first),)
        elif SCALES == "fragments":
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
