"""Attention of up to eight queries to keys and values that go from memory to registers: for `attention_decode`.

Each warp attends by itself to 16 tokens at a time, by mma.sync, which multiplies 16 rows of 16 columns by 16 rows of 8
columns. For that thread 4 g + c has, in registers,

    of the first operand, rows g and g + 8, columns 2 c and 2 c + 1, and those 8 behind: four words of two;
    of the second, column g, the same of its rows: two words;
    of the sums, rows g and g + 8, columns 2 c and 2 c + 1.

Scores are keys, a row a token, by queries, a column each; results are values, a column a token, by weights, a column a
query. In which order elements of a key are multiplied, and which row has which of a value, does not matter: so a thread
has neighbouring bytes of a token, and loads 16 at once. Of values, bytes of two tokens are put together before they are
decoded, and movmatrix makes second operands of weights. Which row has which token does not matter either: `token_of`.

Codes of four bits are decoded exactly: a number whose last bits they replace, less that number and what the format
subtracts. Scales stay outside of products with keys, one product or more for each group that has one; those of values
multiply weights. What has a scale of its own is therefore spread over all threads of a row, which have as many bytes of
it. Offsets of keys are multiplied by sums of queries, of which bfloat16 holds three parts.

Each tensor here has an element a thread, [THREADS], which makes it one register of all threads.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_T,
    CAUSAL,
    GROUP_SIZE,
    HALVES,
    KEY_SCALED,
    LOG2E,
    MASK,
    OFFSETS,
    QUERIES,
    SCALES,
    SHIFT,
    SOFTCAP,
    VALUE_SCALED,
    VALUE_SIZE,
    WAYS,
    WINDOW,
    finite,
    within,
)

# </attention>
# <words>
from qcompile.codegen.templates.attention_lane_words import (
    GROUP_WORDS,
    KEY_WORDS,
    LIVE,
    THREADS,
    VALUE_RUN,
    VALUE_WORDS,
    across,
    load_keys,
    load_queries,
    load_values,
    of_lane,
    offset_factors,
    page_of,
    scale_of,
    token_of,
)
from qcompile.codegen.templates.sparse_cores import joined

# </words>

# <lanes>
STAGES = tl.constexpr(2)
FIRST, LAST = tl.constexpr("0x5140"), tl.constexpr("0x7362")
LOWER_KEYS = tl.constexpr(
    "mov.b32 {l, h}, $10; cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 c, h; "
    "mov.b32 {l, h}, $11; cvt.rn.f16x2.e4m3x2 b, l; cvt.rn.f16x2.e4m3x2 d, h; "
)
HIGHER_KEYS = tl.constexpr("")
LOWER_VALUES = tl.constexpr(
    "prmt.b32 p, $10, $11, SELECTOR; mov.b32 {l, h}, p; cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h; "
    "prmt.b32 p, $12, $13, SELECTOR; mov.b32 {l, h}, p; cvt.rn.f16x2.e4m3x2 c, l; cvt.rn.f16x2.e4m3x2 d, h; "
)
HIGHER_VALUES = tl.constexpr("")
# </lanes>

# FIRST, LAST: what puts the first and the last two bytes of two words together. Keys' and values' PTX: from a word of
# each of two or four tokens to a first operand, of whole bytes or their lower halves, and of their higher halves.
AHEAD = tl.constexpr(max(1, STAGES.value - 1))
"""Steps whose keys and values are loaded before they are needed: of one stage as soon as registers are free."""
TILES = tl.constexpr(VALUE_SIZE.value // 16)
"""Of 16 elements of values."""
REGISTERS = tl.constexpr("{ .reg .b16 l, h; .reg .b32 p, s, z, a, b, c, d; ")
MULTIPLY = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {a, b, c, d}, {$4, $5}, {$6, $7, $8, $9}; }"
)
KEYS, MORE_KEYS = (
    tl.constexpr(REGISTERS.value + decode.value + MULTIPLY.value) for decode in (LOWER_KEYS, HIGHER_KEYS)
)
VALUES, MORE_VALUES, LAST_VALUES, MORE_LAST_VALUES = (
    tl.constexpr(REGISTERS.value + decode.value.replace("SELECTOR", pair.value) + MULTIPLY.value)
    for pair in (FIRST, LAST)
    for decode in (LOWER_VALUES, HIGHER_VALUES)
)
"""PTX of products with the first and the last two bytes of words, or with their higher halves."""
OPERANDS = tl.constexpr("=f,=f,=f,=f,r,r,f,f,f,f,r,r")
OFFSET_PRODUCT = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$10, $11, $12, $13}, {$4, $5}, "
    "{$6, $7, $8, $9};"
)
LOGARITHM = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")
WEIGHTS = tl.constexpr("{ .reg .b32 p; cvt.rn.f16x2.f32 p, $2, $1; movmatrix.sync.aligned.m8n8.trans.b16 $0, p; }")


@triton.jit
def begun():
    """Loads that stand before this call begin before what stands behind it: compilers save registers otherwise."""
    PTX: tl.constexpr = "bar.warp.sync 0xffffffff; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def add_offsets(sums, factors, near, far):
    """Offsets of keys times sums of queries: where sums of products begin.

    near, far: for each factor a word of each token, of two groups' offsets, or of a scale and an offset.
    """
    for i in tl.static_range(0, len(factors), 2):
        p, q, r, s = tl.inline_asm_elementwise(
            OFFSET_PRODUCT,
            OPERANDS + ",r,r",
            factors[i : i + 2] + sums + (near[i], far[i], near[i + 1], far[i + 1]),
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        sums = (p, q, r, s)
    return sums


@triton.jit
def add_scores(sums, queries, first, second, HALF: tl.constexpr):
    """Scores of two tokens by queries 2 c and 2 c + 1, with a word of each token's key, or halves of its bytes."""
    return tl.inline_asm_elementwise(
        MORE_KEYS if HALF else KEYS,
        OPERANDS,
        queries + sums + (first, second),
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def add_words(
    sums, keys, queries, HALF: tl.constexpr, BEGIN: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr = 1
):
    """`add_scores` of COUNT words from BEGIN on, STEP apart."""
    for i in tl.static_range(BEGIN, BEGIN + COUNT * STEP, STEP):
        own = queries[2 * (HALF * KEY_WORDS + i) : 2 * (HALF * KEY_WORDS + i) + 2]
        p, q, r, s = add_scores(sums, own, keys[0][i], keys[1][i], HALF)
        sums = (p, q, r, s)
    return sums


@triton.jit
def scores_of(keys, scales, queries, factors):
    """Scores of both tokens by both queries.

    Products of even and odd words, of both halves of bytes, or of groups add up by themselves, so that none waits for
    the one before.
    """
    zero = tl.zeros((THREADS,), tl.float32)
    zeros, none = (zero, zero, zero, zero), tl.zeros((THREADS,), tl.int32)
    if GROUP_SIZE:
        EACH: tl.constexpr = GROUP_SIZE // 16
        OFFSETS_FROM: tl.constexpr = KEY_SCALED // 2
        found = add_offsets(zeros, factors, scales[0][OFFSETS_FROM:] + (none,), scales[1][OFFSETS_FROM:] + (none,))
        for half in tl.static_range(2):
            for part in tl.static_range(KEY_SCALED // 2):
                own = add_words(zeros, keys, queries, half, part * EACH, EACH)
                near = scale_of(scales[0], half * (KEY_SCALED // 2) + part)
                far = scale_of(scales[1], half * (KEY_SCALED // 2) + part)
                found = scaled_sums(found, own, near, far)
    else:
        if HALVES == 2:
            even = add_words(zeros, keys, queries, 0, 0, KEY_WORDS)
            odd = add_words(zeros, keys, queries, 1, 0, KEY_WORDS)
        else:
            even = add_words(zeros, keys, queries, 0, 0, KEY_WORDS // 2, 2)
            odd = add_words(zeros, keys, queries, 0, 1, KEY_WORDS // 2, 2)
        found = (even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3])
        if SCALES == "token":
            moved = add_offsets(zeros, factors, scales[0] + (none,), scales[1] + (none,))
            found = scaled_sums(moved, found, scale_of(scales[0], 0), scale_of(scales[1], 0))
    return found


@triton.jit
def scaled_sums(sums, more, near, far):
    """Sums, and more of two tokens with their scales."""
    return sums[0] + more[0] * near, sums[1] + more[1] * near, sums[2] + more[2] * far, sums[3] + more[3] * far


@triton.jit
def magnitude_of(words):
    """The binary logarithm of the greatest scale of a token's value; at least -90, so that weights stay finite."""
    greatest = scale_of(words, 0)
    for group in tl.static_range(1, VALUE_SCALED):
        greatest = tl.maximum(greatest, scale_of(words, group))
    power = tl.inline_asm_elementwise(LOGARITHM, "=f,f", [greatest], dtype=tl.float32, is_pure=True, pack=1)
    return tl.maximum(power, -90.0)


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
def add_values(sums, values, scales, weights, rescale):
    """`add_tile` of all tiles: of words, of the halves of their bytes, of two bytes."""
    operands = ()
    for group in tl.static_range(VALUE_SCALED):
        if SCALES == "token":
            near, far = scale_of(scales[0], group), scale_of(scales[1], group)
            operands += ((turned(weights[0] * near, weights[2] * near), turned(weights[1] * far, weights[3] * far)),)
        else:
            operands += ((turned(weights[0], weights[2]), turned(weights[1], weights[3])),)
    found = ()
    for part in tl.static_range(VALUE_WORDS // GROUP_WORDS):
        for word in tl.static_range(part * GROUP_WORDS, (part + 1) * GROUP_WORDS):
            for half in tl.static_range(HALVES):
                own = operands[half * (VALUE_SCALED // 2) + part]
                both = sums[2 * (HALVES * word + half) : 2 * (HALVES * word + half) + 2]
                p, q, r, s = add_tile(both[0], values, own, rescale, word, MORE_VALUES if half else VALUES)
                found += ((p, q, r, s),)
                p, q, r, s = add_tile(both[1], values, own, rescale, word, MORE_LAST_VALUES if half else LAST_VALUES)
                found += ((p, q, r, s),)
    return found


@triton.jit
def add_shifts(sums, shifts):
    """Sums of values with those of their offsets, which are still each thread's own."""
    whole = ()
    for group in tl.static_range(VALUE_SCALED):
        for i in tl.static_range(2):
            shift = shifts[group][i]
            shift += across(shift, 4)
            shift += across(shift, 8)
            whole += (shift + across(shift, 16),)
    found = ()
    for part in tl.static_range(VALUE_WORDS // GROUP_WORDS):
        for word in tl.static_range(part * GROUP_WORDS, (part + 1) * GROUP_WORDS):
            for half in tl.static_range(HALVES):
                first = whole[2 * (half * (VALUE_SCALED // 2) + part)]
                second = whole[2 * (half * (VALUE_SCALED // 2) + part) + 1]
                for last in tl.static_range(2):
                    own = sums[2 * (HALVES * word + half) + last]
                    found += ((own[0] + first, own[1] + second, own[2] + first, own[3] + second),)
    return found


@triton.jit
def turned(first, second):
    """Weights of a token for two queries as the second operand has them."""
    return tl.inline_asm_elementwise(WEIGHTS, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def attend_in_lanes(first, stop, head, begin, end, cache, query, key_factor, mask, mask_head, mask_query):
    """Attend to blocks of the context from `first` until `stop`: the greatest scores, sums of weights, and of values.

    They are [WAYS, 8], [WAYS, 8] and [WAYS, 8, VALUE_SIZE]; arguments are those of `attend_to` and `attention_decode`.
    Where tokens have scales, scores are compared after those of values have multiplied their weights.
    """
    key_codes, key_scale, value_codes, value_scale, block_table = cache
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    g, c = lane // 4, lane % 4
    key_codes = key_codes.to(tl.pointer_type(tl.int32), bitcast=True)
    value_codes = value_codes.to(tl.pointer_type(tl.int32), bitcast=True)
    key_scale = key_scale.to(tl.pointer_type(tl.int32), bitcast=True)
    value_scale = value_scale.to(tl.pointer_type(tl.int32), bitcast=True)
    cache = (key_codes, key_scale, value_codes, value_scale, block_table)
    t = first * BLOCK_T + warp * 16
    page = page_of(block_table, t, end)
    limit = tl.minimum(end, stop * BLOCK_T)
    keys_ahead, values_ahead = (), ()
    for step in tl.static_range(AHEAD):
        next_page = page_of(block_table, t + (step + 1) * BLOCK_T, end)
        keys_ahead += (load_keys(cache, page, head, t + step * BLOCK_T, g, c, begin, limit),)
        values_ahead += (load_values(cache, page, head, t + step * BLOCK_T, g, c, begin, limit),)
        page = next_page
    begun()
    queries, unit, query_sums = load_queries(query, g, c)
    offsets = offset_factors(query_sums, c)
    factors = (of_lane(unit, 8 * c) * key_factor, of_lane(unit, 8 * c + 4) * key_factor)
    rows = (2 * c, 2 * c + 1)
    places = (
        rows[0] // QUERIES * mask_head + rows[0] % QUERIES * mask_query,
        rows[1] // QUERIES * mask_head + rows[1] % QUERIES * mask_query,
    )
    zero = tl.zeros((THREADS,), tl.float32)
    tops, totals, sums, shifts = (zero + float("-inf"), zero + float("-inf")), (zero, zero), (), ()
    for _ in tl.static_range(TILES):
        sums += ((zero, zero, zero, zero),)
    for _ in tl.static_range(VALUE_SCALED if OFFSETS else 0):
        shifts += ((zero, zero),)
    for _ in tl.range(first, stop, num_stages=1):
        next_page = page_of(block_table, t + (AHEAD + 1) * BLOCK_T, end)
        if STAGES > 1:
            keys_ahead += (load_keys(cache, page, head, t + AHEAD * BLOCK_T, g, c, begin, limit),)
            values_ahead += (load_values(cache, page, head, t + AHEAD * BLOCK_T, g, c, begin, limit),)
            begun()
        found = scores_of(keys_ahead[0][0], keys_ahead[0][1], queries, offsets)
        if STAGES == 1:
            keys_ahead += (load_keys(cache, page, head, t + BLOCK_T, g, c, begin, limit),)
            begun()
        values, value_scales = values_ahead[0]
        one, two = t + token_of(g), t + token_of(g) + 8
        one_inside, two_inside = within(one, begin, limit), within(two, begin, limit)
        if SCALES == "token":
            near_power, far_power = magnitude_of(value_scales[0]), magnitude_of(value_scales[1])
        weights, rescale = (), ()
        next_tops, next_totals = (), ()
        for i in tl.static_range(2):
            near = shown(found[i], factors[i], one, one_inside, mask, places[i], rows[i], end)
            far = shown(found[2 + i], factors[i], two, two_inside, mask, places[i], rows[i], end)
            compared = (near + near_power, far + far_power) if SCALES == "token" else (near, far)
            higher = tl.maximum(tops[i], greatest_of(compared[0], compared[1]))
            base = finite(higher)
            near, far = tl.exp2(near - (base - SHIFT)), tl.exp2(far - (base - SHIFT))
            smaller = tl.exp2(tops[i] - base)
            next_tops += (higher,)
            next_totals += (totals[i] * smaller + (near + far),)
            rescale += (smaller,)
            weights += (near, far)
        tops, totals = next_tops, next_totals
        next_shifts = ()
        for group in tl.static_range(VALUE_SCALED if OFFSETS else 0):
            near, far = scale_of(value_scales[0], VALUE_SCALED + group), scale_of(value_scales[1], VALUE_SCALED + group)
            next_shifts += (
                (
                    shifts[group][0] * rescale[0] + weights[0] * near + weights[1] * far,
                    shifts[group][1] * rescale[1] + weights[2] * near + weights[3] * far,
                ),
            )
        shifts = next_shifts
        sums = add_values(sums, values, value_scales, weights, rescale)
        if STAGES == 1:
            values_ahead += (load_values(cache, page, head, t + BLOCK_T, g, c, begin, limit),)
            begun()
        keys_ahead, values_ahead = keys_ahead[1:], values_ahead[1:]
        page = next_page
        t += BLOCK_T
    top = tl.reshape(joined(tops, 2), (WAYS, 8, 8))
    total = tl.reshape(joined(totals, 2), (WAYS, 8, 8))
    every = ()
    if OFFSETS:
        sums = add_shifts(sums, shifts)
    for i in tl.static_range(TILES):
        every += sums[i]
    # way | g c | run word half, two elements of two of a word's, e: query 2 c + e
    RUNS: tl.constexpr = VALUE_WORDS // VALUE_RUN
    parts = tl.reshape(joined(every, 4 * TILES), (WAYS, 8, 4, RUNS, VALUE_RUN, HALVES, 4, 2))
    parts = tl.reshape(tl.permute(parts, (0, 2, 7, 5, 3, 1, 4, 6)), (WAYS, 8, VALUE_SIZE))
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
