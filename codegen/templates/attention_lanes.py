"""Attention of up to eight queries to FP8 keys and values that go from memory to registers: for `attention_decode`.

Each warp attends by itself to 16 tokens at a time, by mma.sync, which multiplies 16 rows of 16 columns by 16 rows of 8
columns. For that thread 4 g + c has, in registers,

    of the first operand, rows g and g + 8, columns 2 c and 2 c + 1, and those 8 behind: four words of two;
    of the second, column g, the same of its rows: two words;
    of the sums, rows g and g + 8, columns 2 c and 2 c + 1.

Scores are keys, a row a token, by queries, a column each; results are values, a column a token, by weights, a column a
query. In which order elements of a key are multiplied, and which row has which of a value, does not matter: so a thread
has neighbouring bytes of a token, and loads 16 at once. Of values, bytes of neighbouring tokens are put together before
they are decoded, and movmatrix makes second operands of weights.

Each tensor here has an element a thread, [THREADS], which makes it one register of all threads.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_T,
    CAUSAL,
    DIVIDE,
    GROUP,
    HEADS,
    KEY_SIZE,
    LOG2E,
    MASK,
    PAGE,
    QUERIES,
    SHIFT,
    SOFTCAP,
    VALUE_SIZE,
    WAYS,
    WINDOW,
    finite,
    within,
)

# </attention>

# <lanes>
STAGES = tl.constexpr(2)
CONVERT = tl.constexpr("cvt.rn.f16x2.e4m3x2")
# </lanes>

THREADS = tl.constexpr(32 * WAYS.value)
LIVE = tl.constexpr(GROUP.value * QUERIES.value)
"""Queries that there are, of eight."""
AHEAD = tl.constexpr(STAGES.value - 1)
"""Steps whose keys and values are loaded before they are needed."""
KEY_WORDS = tl.constexpr(KEY_SIZE.value // 16)
VALUE_WORDS = tl.constexpr(VALUE_SIZE.value // 32)
"""That a thread has of a token."""
TILES = tl.constexpr(VALUE_SIZE.value // 16)
"""Of 16 elements of values."""
MULTIPLY = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {a, b, c, d}, {$4, $5}, {$6, $7, $8, $9}; }"
)
KEYS = tl.constexpr(
    "{ .reg .b16 l, h; .reg .b32 a, b, c, d; "
    f"mov.b32 {{l, h}}, $10; {CONVERT.value} a, l; {CONVERT.value} c, h; "
    f"mov.b32 {{l, h}}, $11; {CONVERT.value} b, l; {CONVERT.value} d, h; " + MULTIPLY.value
)
VALUES = tl.constexpr(
    "{ .reg .b16 l, h; .reg .b32 p, a, b, c, d; "
    f"prmt.b32 p, $10, $11, SELECTOR; mov.b32 {{l, h}}, p; {CONVERT.value} a, l; {CONVERT.value} b, h; "
    f"prmt.b32 p, $12, $13, SELECTOR; mov.b32 {{l, h}}, p; {CONVERT.value} c, l; {CONVERT.value} d, h; "
    + MULTIPLY.value
)
LOWER, HIGHER = (tl.constexpr(VALUES.value.replace("SELECTOR", each)) for each in ("0x5140", "0x7362"))
"""PTX of products with the first and the last two bytes of words."""
OPERANDS = tl.constexpr("=f,=f,=f,=f,r,r,f,f,f,f,r,r")
PACK = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
WEIGHTS = tl.constexpr("{ .reg .b32 p; cvt.rn.f16x2.f32 p, $2, $1; movmatrix.sync.aligned.m8n8.trans.b16 $0, p; }")


# <registers>
from qcompile.codegen.templates.sparse_cores import joined, unjoined

# </registers>


@triton.jit
def packed(first, second):
    """Two numbers in float16, in a word."""
    return tl.inline_asm_elementwise(PACK, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def across(value, DISTANCE: tl.constexpr):
    """What the thread has whose lane differs in one bit."""
    PTX: tl.constexpr = f"shfl.sync.bfly.b32 $0, $1, {DISTANCE}, 0x1f, 0xffffffff;"
    return tl.inline_asm_elementwise(PTX, "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def of_lane(value, lane):
    """What another thread of the warp has."""
    PTX: tl.constexpr = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
    return tl.inline_asm_elementwise(PTX, "=f,f,r", [value, lane], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def begun():
    """Loads that stand before this call begin before what stands behind it: compilers save registers otherwise."""
    PTX: tl.constexpr = "bar.warp.sync 0xffffffff; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_words(codes, vector, inside, place, SIZE: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr):
    """COUNT words of each thread's vector from `place` on, in runs of four, the next STEP words behind."""
    RUN: tl.constexpr = min(COUNT, 4)
    own = codes + vector * (SIZE // 4) + place
    found = ()
    for run in tl.static_range(COUNT // RUN):
        source = own[:, None] + (run * STEP + tl.arange(0, RUN)[None, :])
        found += unjoined(tl.load(source, mask=inside[:, None], other=0), RUN)
    return found


@triton.jit
def load_tokens(key_codes, value_codes, page, head, t, g, c, begin, end):
    """A thread's words of the 16 tokens from t: of keys of g and g + 8, of values of 2 c, 2 c + 1 and 8 behind."""
    base = 0
    if PAGE:
        base = (page.to(tl.int64) * HEADS + head) * PAGE - t // PAGE * PAGE
    keys, values = (), ()
    for i in tl.static_range(2):
        token = t + g + 8 * i
        inside = within(token, begin, end)
        keys += (load_words(key_codes, base + token, inside, 4 * c, KEY_SIZE, KEY_WORDS, 16),)
    for i in tl.static_range(4):
        token = t + 2 * c + (i % 2 + 8 * (i // 2))
        inside = within(token, begin, end)
        values += (load_words(value_codes, base + token, inside, VALUE_WORDS * g, VALUE_SIZE, VALUE_WORDS, 0),)
    return keys, values


@triton.jit
def numbers_of(word):
    """Both bfloat16 numbers of a word, in float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def load_queries(query, g, c):
    """Words of two elements of query g, in the order of keys' words, in float16; and what they are divided by.

    That is a power of two, for bfloat16 (DIVIDE).
    """
    query = query.to(tl.pointer_type(tl.int32), bitcast=True)
    live = g < LIVE
    words = ()
    for run in tl.static_range(KEY_SIZE // 64):
        words += load_words(query, g, live, 32 * run + 8 * c, 2 * KEY_SIZE, 8, 4)
    unit = g.to(tl.float32) * 0.0 + 1.0
    if DIVIDE:
        greatest = unit * 0.0
        for i in tl.static_range(KEY_SIZE // 8):
            first, second = numbers_of(words[i])
            greatest = tl.maximum(greatest, tl.maximum(tl.abs(first), tl.abs(second)))
        greatest = tl.maximum(greatest, across(greatest, 1))
        greatest = tl.maximum(greatest, across(greatest, 2))
        unit = (greatest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit == 0.0, 1.0, unit)
        found = ()
        for i in tl.static_range(KEY_SIZE // 8):
            first, second = numbers_of(words[i])
            found += (packed(first / unit, second / unit),)
        words = found
    return words, unit


@triton.jit
def add_scores(sums, queries, first, second):
    """Scores of tokens g and g + 8 by queries 2 c and 2 c + 1, with a word of each token's key."""
    return tl.inline_asm_elementwise(
        KEYS,
        OPERANDS,
        queries + sums + (first, second),
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def scores_of(keys, queries):
    """`add_scores` of all words: even and odd ones by themselves, so that no product waits for the one before."""
    zero = tl.zeros((THREADS,), tl.float32)
    even, odd = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for i in tl.static_range(0, KEY_WORDS, 2):
        p, q, r, s = add_scores(even, queries[2 * i : 2 * i + 2], keys[0][i], keys[1][i])
        even = (p, q, r, s)
        p, q, r, s = add_scores(odd, queries[2 * i + 2 : 2 * i + 4], keys[0][i + 1], keys[1][i + 1])
        odd = (p, q, r, s)
    return even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]


@triton.jit
def shown(score, factor, token, inside, mask, place, row, end):
    """A score as `attention.attend` and `attention.masked` make it, of a token and a row."""
    score *= factor
    if SOFTCAP != 0.0:
        score = (SOFTCAP * LOG2E) * (2.0 * tl.sigmoid(score * (2.0 / SOFTCAP)) - 1.0)
    allowed = inside
    if CAUSAL:
        last = end - QUERIES + row % QUERIES
        allowed = allowed & (token <= last)
        if WINDOW:
            allowed = allowed & (token > last - WINDOW)
    if MASK != "none":
        allowed = allowed & (row < LIVE)
        given = tl.load(mask + place + token, mask=allowed, other=0)
        if MASK == "boolean":
            allowed = allowed & (given != 0)
        else:
            least = tl.maximum(given.to(tl.float32) * LOG2E, -3e38)  # what is finite stays so
            score += tl.where(given == float("-inf"), float("-inf"), least)
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def greatest_of(first, second):
    """Of two tokens' scores of a query, in all threads that have scores of it."""
    found = tl.maximum(first, second)
    found = tl.maximum(found, across(found, 4))
    found = tl.maximum(found, across(found, 8))
    return tl.maximum(found, across(found, 16))


@triton.jit
def add_tile(sofar, values, weights, rescale, WORD: tl.constexpr, PTX: tl.constexpr):
    """Sums of 16 elements of values, two of a thread by two queries, rescaled, with 16 tokens' weighted values."""
    sofar = (sofar[0] * rescale[0], sofar[1] * rescale[1], sofar[2] * rescale[0], sofar[3] * rescale[1])
    return tl.inline_asm_elementwise(
        PTX,
        OPERANDS + ",r,r",
        weights + sofar + (values[0][WORD], values[1][WORD], values[2][WORD], values[3][WORD]),
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def add_values(sums, values, weights, rescale):
    """`add_tile` of all tiles."""
    found = ()
    for word in tl.static_range(VALUE_WORDS):
        for half in tl.static_range(2):
            p, q, r, s = add_tile(sums[2 * word + half], values, weights, rescale, word, HIGHER if half else LOWER)
            found += ((p, q, r, s),)
    return found


@triton.jit
def turned(first, second):
    """Weights of a token for two queries as the second operand has them."""
    return tl.inline_asm_elementwise(WEIGHTS, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def attend_in_lanes(first, stop, head, begin, end, cache, query, key_factor, mask, mask_head, mask_query):
    """Attend to blocks of the context from `first` until `stop`: the greatest scores, sums of weights, and of values.

    They are [WAYS, 8], [WAYS, 8] and [WAYS, 8, VALUE_SIZE]; arguments are those of `attend_to` and `attention_decode`.
    """
    key_codes, _, value_codes, _, block_table = cache
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    g, c = lane // 4, lane % 4
    key_codes = key_codes.to(tl.pointer_type(tl.int32), bitcast=True)
    value_codes = value_codes.to(tl.pointer_type(tl.int32), bitcast=True)
    t = first * BLOCK_T + warp * 16
    page = page_of(block_table, t, end)
    ahead = ()
    for step in tl.static_range(AHEAD):
        next_page = page_of(block_table, t + (step + 1) * BLOCK_T, end)
        ahead += (load_tokens(key_codes, value_codes, page, head, t + step * BLOCK_T, g, c, begin, end),)
        page = next_page
    begun()
    queries, unit = load_queries(query, g, c)
    factors = (of_lane(unit, 8 * c) * key_factor, of_lane(unit, 8 * c + 4) * key_factor)
    rows = (2 * c, 2 * c + 1)
    places = (
        rows[0] // QUERIES * mask_head + rows[0] % QUERIES * mask_query,
        rows[1] // QUERIES * mask_head + rows[1] % QUERIES * mask_query,
    )
    zero = tl.zeros((THREADS,), tl.float32)
    tops, totals, sums = (zero + float("-inf"), zero + float("-inf")), (zero, zero), ()
    for _ in tl.static_range(TILES):
        sums += ((zero, zero, zero, zero),)
    for _ in tl.range(first, stop, num_stages=1):
        next_page = page_of(block_table, t + (AHEAD + 1) * BLOCK_T, end)
        following = load_tokens(key_codes, value_codes, page, head, t + AHEAD * BLOCK_T, g, c, begin, end)
        begun()
        keys, values = ahead[0][0], ahead[0][1]
        found = scores_of(keys, queries)
        one, two = t + g, t + g + 8
        one_inside, two_inside = within(one, begin, end), within(two, begin, end)
        weights, rescale = (), ()
        next_tops, next_totals = (), ()
        for i in tl.static_range(2):
            near = shown(found[i], factors[i], one, one_inside, mask, places[i], rows[i], end)
            far = shown(found[2 + i], factors[i], two, two_inside, mask, places[i], rows[i], end)
            higher = tl.maximum(tops[i], greatest_of(near, far))
            base = finite(higher)
            near, far = tl.exp2(near - (base - SHIFT)), tl.exp2(far - (base - SHIFT))
            smaller = tl.exp2(tops[i] - base)
            next_tops += (higher,)
            next_totals += (totals[i] * smaller + (near + far),)
            rescale += (smaller,)
            weights += (near, far)
        tops, totals = next_tops, next_totals
        words = (turned(weights[0], weights[2]), turned(weights[1], weights[3]))
        sums = add_values(sums, values, words, rescale)
        ahead = ahead[1:] + (following,)
        page = next_page
        t += BLOCK_T
    top = tl.reshape(joined(tops, 2), (WAYS, 8, 8))
    total = tl.reshape(joined(totals, 2), (WAYS, 8, 8))
    every = ()
    for i in tl.static_range(TILES):
        every += sums[i]
    # way | g c | tile r e: query 2 c + e, and of each g's share of elements that of 2 tile + r
    parts = tl.reshape(joined(every, 4 * TILES), (WAYS, 8, 4, TILES, 2, 2))
    parts = tl.reshape(tl.permute(parts, (0, 2, 5, 1, 3, 4)), (WAYS, 8, VALUE_SIZE))
    return tl.max(top, 1), tl.sum(total, 1), parts


@triton.jit
def sum_of_ways(parts, COUNT: tl.constexpr):
    """The sum of COUNT parts [COUNT, rows, columns], half by half: a reduction by Triton would exchange more."""
    if COUNT == 1:
        return tl.reshape(parts, (parts.shape[1], parts.shape[2]))
    else:
        halves = tl.reshape(parts, (2, COUNT // 2, parts.shape[1], parts.shape[2]))
        first, second = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        return sum_of_ways(first + second, COUNT // 2)


@triton.jit
def page_of(block_table, t, end):
    """The page of the 16 tokens from t."""
    if PAGE == 0:
        return 0
    else:
        return tl.load(block_table + t // PAGE, mask=t < end, other=0)
