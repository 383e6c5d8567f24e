"""The product of 2:4 sparse weights, in the layout `fragment24`, on sparse tensor cores: for `gemm_fragment`.

One instruction of a warp, mma.sp, multiplies 16 rows of 32 columns, of which 16 are kept, by 8 rows of x. For that
thread 4 h + l has, in registers,

    of the weight, rows h and h + 8, what is kept of columns 4 l to 4 l + 3, and of those 16 behind: four words of two;
    of x, row h, columns 2 l and 2 l + 1, and those 8, 16 and 24 behind: four words;
    of the sums, rows h and h + 8 of the weight and 2 l and 2 l + 1 of x.

A word of 4-bit codes is the first of these, not yet decoded. Two of four neighbours say which columns are kept, for
both rows and 16 columns each, so one word a thread says it for 64 columns. From this follows where `fragment24` has
a code.

Each tensor here has an element a thread, [THREADS], which makes it one register of all threads. A warp has BLOCKS
blocks of 16 rows; warps with the same rows have other columns of a turn, and their sums are added at the end.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <weights>
from qcompile.codegen.templates.fragment_weights import (
    BITS,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CHUNK,
    COLUMNS,
    GROUPS,
    HALVES,
    K_PER_SPLIT,
    NT,
    SCALES,
    STORED,
    TILES_K,
    TILES_N,
    K,
    decode_scale,
    first_tile,
    place_of,
)

# </weights>

# <cores>
WARPS = tl.constexpr(4)
STAGES = tl.constexpr(1)
KEPT = tl.constexpr("")
MULTIPLY = tl.constexpr("")
# </cores>

# KEPT: PTX from a thread's codes of 32 columns to four words of two weights. MULTIPLY: mma.sp, but for which threads
# say what is kept.
THREADS = tl.constexpr(32 * WARPS.value)
BLOCKS = tl.constexpr(4)
ACROSS = tl.constexpr(BLOCK_N.value // 64)
ALONG = tl.constexpr(WARPS.value // ACROSS.value)
"""Warps that have other rows, and that have other columns."""
TILES = BLOCK_K // (64 * ALONG)
"""Tiles of 64 columns that a warp has in a turn."""
TOKENS = BLOCK_M // 8
OWN = tl.constexpr(BITS.value // 2)
"""Blocks of 8 rows of x; and words of codes that a thread has of 64 columns."""
CHUNK_TILES = tl.constexpr(TILES.value if SCALES.value == "total" else CHUNK.value // 64)
PARTS = TILES // CHUNK_TILES
"""Tiles that have their scales in common, and how many times there are so many."""
RUN_WORDS = tl.constexpr(8)
"""Words of a row of x that follow each other in shared memory, before those of the next row.

Eight rows are read at once, 16 bytes of each, so more words in a run would be more of them in the same banks; fewer
would be half of the 32 bytes that come from the L2 cache at least.
"""
KEPT_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * (OWN.value // 2))
MULTIPLY_OPERANDS = tl.constexpr("=f,=f,=f,=f" + ",r" * 8 + ",f" * 4 + ",r")
ORDERED = tl.constexpr(
    # Four bits say which of four columns are kept; what tensor cores take are the first's number and the second's.
    "{ .reg .b32 u, d, p, q; shr.b32 u, $1, 1; shl.b32 d, $1, 1; lop3.b32 p, $1, u, 0x44444444, 0x8e; "
    "lop3.b32 q, $1, d, 0x88888888, 0xa9; lop3.b32 $0, p, q, 0x55555555, 0xe4; }"
)


@triton.jit
def unjoined(value, COUNT: tl.constexpr):
    """The columns of [THREADS, COUNT], a tensor each. What is split first is in neighbouring registers."""
    if COUNT == 1:
        return (tl.reshape(value, (THREADS,)),)
    else:
        first, second = tl.split(tl.reshape(value, (THREADS, COUNT // 2, 2)))
        even, odd = unjoined(first, COUNT // 2), unjoined(second, COUNT // 2)
        found = ()
        for i in tl.static_range(COUNT // 2):
            found += (even[i], odd[i])
        return found


@triton.jit
def joined(values, COUNT: tl.constexpr):
    """The inverse of `unjoined`."""
    if COUNT == 1:
        return tl.reshape(values[0], (THREADS, 1))
    else:
        first, second = joined(values[::2], COUNT // 2), joined(values[1::2], COUNT // 2)
        return tl.reshape(tl.join(first, second), (THREADS, COUNT))


@triton.jit
def block_ahead(block, ROWS: tl.constexpr, TILE: tl.constexpr):
    """How far a warp's block of 16 rows lies behind its first: ROWS a block, TILE a tile of 64 rows."""
    if HALVES and NT == 1:
        return block // 2 * (TILES_N // 2) * TILE + block % 2 * ROWS
    else:
        return block * ROWS


@triton.jit
def load_kept(codes, places):
    """Of each of a warp's tiles, for each of its blocks: a thread's words of codes, and its words of places."""
    found = ()
    for tile in tl.static_range(TILES):
        words, kept = (), ()
        for block in tl.static_range(BLOCKS):
            ahead = tile * (128 * STORED) + block_ahead(block, 16 * BITS, TILES_K * 128 * STORED)
            words += (unjoined(tl.load(codes[:, None] + (ahead + tl.arange(0, OWN)[None, :])), OWN),)
            ahead = tile * (128 * STORED) + block_ahead(block, 32, TILES_K * 128 * STORED)
            kept += (tl.load(places + ahead),)
        found += ((words, kept),)
    return found


@triton.jit
def load_x(x, there):
    """BLOCK_K columns of x as each thread takes them: of each of a warp's tiles a tuple of words."""
    chunk = tl.arange(0, BLOCK_K // (2 * RUN_WORDS))[:, None, None] * RUN_WORDS
    words = tl.load(x + (chunk + tl.arange(0, RUN_WORDS)[None, None, :]), mask=there, other=0)
    COUNT: tl.constexpr = 8 * TOKENS * TILES
    parts = tl.reshape(words, (ALONG, TILES, 2, 16 // RUN_WORDS, TOKENS, 8, RUN_WORDS // 4, 4))
    parts = tl.reshape(tl.permute(parts, (0, 5, 7, 1, 2, 4, 3, 6)), (ALONG, 1, 32, COUNT))
    every = unjoined(tl.reshape(tl.broadcast_to(parts, (ALONG, ACROSS, 32, COUNT)), (THREADS, COUNT)), COUNT)
    found = ()
    for tile in tl.static_range(TILES):
        found += (every[8 * TOKENS * tile : 8 * TOKENS * (tile + 1)],)
    return found


@triton.jit
def load_scales(scale, own_k, k):
    """For each chunk of a turn from column k, and each block, the scales of both rows that a thread has."""
    found = ()
    for chunk in tl.static_range(PARTS):
        group = tl.minimum((own_k + k + chunk * (64 * CHUNK_TILES)) // COLUMNS, GROUPS - 1)
        scales = ()
        for block in tl.static_range(BLOCKS):
            source = scale + group * 64 + block_ahead(block, 16, GROUPS * 64)
            scales += ((tl.load(source), tl.load(source + 8)),)
        found += (scales,)
    return found


@triton.jit
def no_sums():
    """Zeros: for each block of tokens, and each of rows, the four sums of a thread."""
    zero = tl.zeros((THREADS,), tl.float32)
    found = ()
    for _ in tl.static_range(TOKENS):
        sums = ()
        for _ in tl.static_range(BLOCKS):
            sums += ((zero, zero, zero, zero),)
        found += (sums,)
    return found


@triton.jit
def multiply_token(sums, kept, columns, places, SECOND: tl.constexpr):
    """The sums of a block of tokens with the products of 32 columns."""
    PTX: tl.constexpr = MULTIPLY + ("0x1;" if SECOND else "0x0;")
    found = ()
    for block in tl.static_range(BLOCKS):
        a, b, c, d = tl.inline_asm_elementwise(
            PTX,
            MULTIPLY_OPERANDS,
            kept[block] + columns + sums[block] + (places[block],),
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        found += ((a, b, c, d),)
    return found


@triton.jit
def decode_kept(words, SECOND: tl.constexpr):
    """What is kept of each block of rows in the first or second 32 columns: four words of two weights."""
    found = ()
    for block in tl.static_range(BLOCKS):
        a, b, c, d = tl.inline_asm_elementwise(
            KEPT,
            KEPT_OPERANDS,
            words[block][OWN // 2 :] if SECOND else words[block][: OWN // 2],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        found += ((a, b, c, d),)
    return found


@triton.jit
def multiply_tile(sums, tile, columns):
    """All sums with the products of 64 columns."""
    places = ()
    for block in tl.static_range(BLOCKS):
        places += (tl.inline_asm_elementwise(ORDERED, "=r,r", [tile[1][block]], dtype=tl.int32, is_pure=True, pack=1),)
    for u in tl.static_range(2):
        kept = decode_kept(tile[0], u == 1)
        found = ()
        for t in tl.static_range(TOKENS):
            words = columns[4 * (TOKENS * u + t) : 4 * (TOKENS * u + t + 1)]
            found += (multiply_token(sums[t], kept, words, places, u == 1),)
        sums = found
    return sums


@triton.jit
def scaled(sums, parts, scales):
    """The sums of a block of tokens with parts times the scales of their rows."""
    found = ()
    for block in tl.static_range(BLOCKS):
        first, second = decode_scale(scales[block][0]), decode_scale(scales[block][1])
        a, b = sums[block][0] + parts[block][0] * first, sums[block][1] + parts[block][1] * first
        c, d = sums[block][2] + parts[block][2] * second, sums[block][3] + parts[block][3] * second
        found += ((a, b, c, d),)
    return found


@triton.jit
def multiply_chunk(sums, tiles, columns, scales, chunk: tl.constexpr):
    """All sums with the products of columns that have their scales in common."""
    parts = sums
    if SCALES == "products":
        parts = no_sums()
    for tile in tl.static_range(chunk * CHUNK_TILES, (chunk + 1) * CHUNK_TILES):
        parts = multiply_tile(parts, tiles[tile], columns[tile])
    if SCALES == "products":
        found = ()
        for t in tl.static_range(TOKENS):
            found += (scaled(sums[t], parts[t], scales[chunk]),)
        parts = found
    return parts


@triton.jit
def added(parts, COUNT: tl.constexpr):
    """The sum of COUNT parts that follow each other in the first dimension.

    A reduction by Triton would store and load with all threads of a warp in one bank of shared memory.
    """
    if COUNT == 1:
        return parts
    else:
        halves = tl.reshape(parts, (2, parts.shape[0] // 2, parts.shape[1]))
        first, second = tl.split(tl.permute(halves, (1, 2, 0)))
        return added(first + second, COUNT // 2)


@triton.jit
def multiply_kept(x, codes, scale, tile_n, first_k, rows):
    """float32 [BLOCK_N, BLOCK_M], as `multiply` of `gemm_fragment`; rows: how many rows of x there are."""
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    tile, block = place_of(tile_n, warp % ACROSS * BLOCKS, 4)
    tile = (first_tile(tile_n) + tile).to(tl.int64)
    own_k = warp // ACROSS * (64 * TILES)
    codes += tile * (TILES_K * 128 * STORED) + own_k // 64 * (128 * STORED)
    places = codes + 64 * BITS + block * 32 + lane
    codes += block * (16 * BITS) + (lane // 4 * 4 + lane % 2 * 2 + lane % 4 // 2) * OWN
    scale += tile * (GROUPS * 64) + block * 16 + lane // 4
    m = tl.arange(0, BLOCK_M)[None, :, None]
    x = x.to(tl.pointer_type(tl.int32), bitcast=True) + m * (K // 2)
    sums, scales = no_sums(), ()
    if SCALES == "products":
        scales = load_scales(scale, own_k, first_k)
    for step in tl.range(0, K_PER_SPLIT, BLOCK_K, num_stages=STAGES):
        k = first_k + step
        # Small loads are not pipelined, so what belongs to the next turn is loaded in this one.
        later = scales
        if SCALES == "products":
            later = load_scales(scale, own_k, first_k + tl.minimum(step + BLOCK_K, K_PER_SPLIT - BLOCK_K))
        tiles = load_kept(codes + k // 64 * (128 * STORED), places + k // 64 * (128 * STORED))
        columns = load_x(x + k // 2, m < rows)
        for chunk in tl.static_range(PARTS):
            sums = multiply_chunk(sums, tiles, columns, scales, chunk)
        scales = later
    every = ()
    for t in tl.static_range(TOKENS):
        for block in tl.static_range(BLOCKS):
            every += sums[t][block]
    total = added(joined(every, 4 * TOKENS * BLOCKS), ALONG)
    # n | h l | token block r c, with n = 16 block + 8 r + h and m = 8 token + 2 l + c
    total = tl.reshape(total, (ACROSS, 8, 4, TOKENS, BLOCKS, 2, 2))
    return tl.reshape(tl.permute(total, (0, 4, 5, 1, 3, 2, 6)), (BLOCK_N, BLOCK_M))
