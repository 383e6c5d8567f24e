"""Codes in the `fragment` layout of qcompile/layouts.py: constants, loads of words, and what decodes them.

For the templates that multiply by such weights and the one that writes them out. `fragment_scales` makes weights of
what is here, with their scales.
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
        "sums": 1 + OFFSET.value,
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
