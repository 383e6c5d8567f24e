"""What both kernels of attention over a quantized cache are made of: constants, and steps over a block of the context.

Codes become values in registers, exactly: in float16, which is enough for 8 bits, whatever type queries have. bfloat16
queries are divided by a power of two for it. Scales of tokens multiply scores and weights; those of values are divided
by the greatest so far, so that weights with their scales are at most 2^15.

Or (COMPUTE float8e4nv) codes of FP8 are multiplied as they are, by queries that are divided by a 448th of their
greatest and by weights of at most 2^8, both rounded to E4M3. NVIDIA's matrix units add products of FP8 with fewer
digits than float32 has, so that each block's are added to those before outside of them (APART).

Matrix units want neighbouring tokens' values side by side, and memory has those of one token. Pairs of 16 bits are
turned on their way from shared memory to registers, bytes one by one: so values are decoded in the order in which they
lie, and turned afterwards (TURNED).

The block table of a paged cache says where the tokens of a sequence lie; it is read a turn ahead.

Vectors consist of pieces that are multiplied by themselves: what the lower and the higher halves of bytes hold, or
groups with scales of their own. Byte i of a vector holds number i, or numbers i and i + size / 2 of 4 bits.
Keys and values of 16 bits are multiplied as they are, and have no scales.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
BITS = tl.constexpr(8)
NATIVE = tl.constexpr(True)
SCALES = tl.constexpr("tensor")
GROUP_SIZE = tl.constexpr(0)
OFFSETS = tl.constexpr(False)
HEADS = tl.constexpr(8)
GROUP = tl.constexpr(4)
QUERIES = tl.constexpr(1)
KEY_SIZE = tl.constexpr(128)
VALUE_SIZE = tl.constexpr(128)
KEY_PIECES = tl.constexpr(1)
VALUE_PIECES = tl.constexpr(1)
SCALE = tl.constexpr(0.08838834764831845)
SOFTCAP = tl.constexpr(0.0)
MASK = tl.constexpr("none")
LENGTH = tl.constexpr(False)
START = tl.constexpr(False)
SEQUENCES = tl.constexpr(0)
PAGE = tl.constexpr(0)
CAUSAL = tl.constexpr(False)
WINDOW = tl.constexpr(0)
COMPUTE = tl.constexpr(tl.float16)
APART = tl.constexpr(False)
TURNED = tl.constexpr(False)
DIVIDE = tl.constexpr(True)
PRECISION = tl.constexpr("tf32x3")
ROWS = tl.constexpr(16)
BLOCK_K = tl.constexpr(128)
BLOCK_V = tl.constexpr(128)
BLOCK_T = tl.constexpr(64)
WAYS = tl.constexpr(1)
SPLIT = tl.constexpr(8)
LANES = tl.constexpr(False)
EARLY = tl.constexpr(True)
# </constants>

HALVES = tl.constexpr(2 if BITS.value == 4 else 1)
KEY_PIECE = tl.constexpr(KEY_SIZE.value // KEY_PIECES.value)
"""Numbers of a piece."""
VALUE_PIECE = tl.constexpr(VALUE_SIZE.value // VALUE_PIECES.value)
KEY_BYTES = tl.constexpr(KEY_SIZE.value * BITS.value // 8)
VALUE_BYTES = tl.constexpr(VALUE_SIZE.value * BITS.value // 8)
"""Of a vector."""
KEY_SCALED = tl.constexpr(KEY_SIZE.value // GROUP_SIZE.value if GROUP_SIZE.value else 1)
"""Scales of a vector."""
VALUE_SCALED = tl.constexpr(VALUE_SIZE.value // GROUP_SIZE.value if GROUP_SIZE.value else 1)
FP8 = tl.constexpr(COMPUTE.value == tl.float8e4nv)
SHIFT = tl.constexpr(15.0 if COMPUTE.value == tl.float16 else 8.0 if FP8.value else 0.0)
"""Weights are multiplied by two to its power: float16 then holds those from 2^-39 of the greatest on, E4M3 those from
2^-17 on."""
LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are multiplied by it, so that weights are powers of two."""
FACTOR = tl.constexpr(SCALE.value * (1.0 if SOFTCAP.value else LOG2E.value))
SCALES_AHEAD = tl.constexpr(GROUP_SIZE.value == 0 and QUERIES.value > 0)
"""Whether scales are held a turn ahead: those of groups are too many for it, and where there are many queries registers
are for results, and compilers copy scales to shared memory ahead."""
LIVE_ROWS = tl.constexpr(GROUP.value * QUERIES.value)
"""Rows that there are in kernels for few queries."""


# <decode>
@triton.jit
def values_of(codes, HALF: tl.constexpr):
    """Bytes' values in COMPUTE: of their lower (HALF 0) or higher (1) four bits, or of all eight."""
    return codes.to(COMPUTE)


# </decode>


@triton.jit
def multiplied(left, right):
    product = tl.dot(left, right, input_precision=PRECISION)
    if APART:  # which keeps additions that follow out of the matrix units
        MOVE: tl.constexpr = "mov.b32 $0, $1;"
        product = tl.inline_asm_elementwise(MOVE, "=f,f", [product], dtype=tl.float32, is_pure=True, pack=1)
    return product


@triton.jit
def decoded(codes, HALF: tl.constexpr):
    """`values_of` codes, turned afterwards: compilers turn codes unless there is something they cannot see into."""
    values = values_of(codes, HALF)
    if TURNED:
        MOVE: tl.constexpr = "mov.b32 $0, $1;"
        values = tl.inline_asm_elementwise(MOVE, "=r,r", [values], dtype=tl.float16, is_pure=False, pack=2)
    return values


@triton.jit
def column(x):
    """x [..., n] as [..., n, 1]."""
    return tl.expand_dims(x, -1)


@triton.jit
def line(x):
    """x [..., n] as [..., 1, n]."""
    return tl.expand_dims(x, -2)


@triton.jit
def pages_of(block_table, t, inside, block, end):
    """The page of a block of tokens t, or of each of them if a block may be in several."""
    if PAGE == 0:
        return 0
    elif PAGE % BLOCK_T == 0:
        return tl.load(block_table + block * BLOCK_T // PAGE, mask=block * BLOCK_T < end, other=0)
    else:
        return tl.load(block_table + t // PAGE, mask=inside, other=0)


@triton.jit
def vectors_of(page, t, token, block, head):
    """Where a block's tokens t lie, in vectors: a first and what to add, in one page the same for all blocks."""
    if PAGE == 0:
        return 0, t.to(tl.int64)
    elif PAGE % BLOCK_T == 0:
        first = (page.to(tl.int64) * HEADS + head) * PAGE + block * BLOCK_T % PAGE
        return first, token.to(tl.int64)
    else:
        return 0, (page.to(tl.int64) * HEADS + head) * PAGE + t % PAGE


@triton.jit
def load_codes(codes, t, d, inside, WIDTH: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Stored elements d of vectors t, of which those that are not inside are 0."""
    if LIVE != BLOCK:
        inside = inside & (d < LIVE)
    return tl.load(codes + t * WIDTH + d, mask=inside, other=0.0 if NATIVE else 0)


@triton.jit
def load_scales(scales, vectors, inside, COUNT: tl.constexpr):
    """Of vectors: the scales of their pieces, or of all of them, then offsets; () for scales of several tokens."""
    found = ()
    if SCALES == "token" and OFFSETS and COUNT == 1:  # both are a word
        words = scales.to(tl.pointer_type(tl.int32), bitcast=True) + vectors[0]
        word = tl.load(words + vectors[1], mask=inside, other=0)
        found = ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
    elif SCALES == "token":
        STEP: tl.constexpr = COUNT * (2 if OFFSETS else 1)
        own = scales + vectors[0] * STEP
        for place in tl.static_range(STEP):
            found = found + (tl.load(own + (vectors[1] * STEP + place), mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def scales_ahead(scales, vectors, inside, COUNT: tl.constexpr):
    """`load_scales` a turn ahead, unless that is left to `attend`."""
    found = ()
    if SCALES_AHEAD:
        found = load_scales(scales, vectors, inside, COUNT)
    return found


@triton.jit
def within(t, begin, end):
    """Which positions are attended to."""
    inside = t < end
    if START or WINDOW:
        inside = inside & (t >= begin)
    return inside


@triton.jit
def masked(scores, mask, places, live, last, t, inside):
    """Scores, -inf where nothing is attended to.

    places: of the mask's elements for position 0 and each row; live: which rows there are; last: their own positions.
    """
    allowed = line(inside)
    if CAUSAL:
        allowed = allowed & (line(t) <= column(last))
        if WINDOW:
            allowed = allowed & (line(t) > column(last - WINDOW))
    if MASK != "none":
        allowed = allowed & column(live)
        given = tl.load(mask + column(places) + line(t), mask=allowed, other=0)
        if MASK == "boolean":
            allowed = allowed & (given != 0)
        else:
            least = tl.maximum(given.to(tl.float32) * LOG2E, -3e38)  # what is finite stays so
            scores += tl.where(given == float("-inf"), float("-inf"), least)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def finite(top):
    """Something to subtract from scores of which `top` is the greatest."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def row_of(cell, tokens):
    """Which row of a pair's queries, and whether there is one: in their order, or that of tokens for many queries."""
    live = cell < tokens * GROUP
    if QUERIES == 0:
        cell = tl.where(live, cell % GROUP * tokens + cell // GROUP, 0)
    return cell, live


@triton.jit
def queries_of(query, places, live):
    """Rows' pieces in COMPUTE, divided by units; the units; sums of the pieces' elements, where scales have offsets.

    places: of the rows' first elements; live: which rows there are.
    """
    d = tl.arange(0, BLOCK_K)
    wanted = column(live) & (d < KEY_PIECE)[None, :]
    asked = ()
    greatest = live.to(tl.float32) * 0.0
    for piece in tl.static_range(KEY_PIECES):
        part = tl.load(query + column(places) + piece * KEY_PIECE + d[None, :], mask=wanted, other=0.0)
        asked = asked + (part,)
        greatest = tl.maximum(greatest, tl.max(tl.abs(part.to(tl.float32)), 1))
    unit = greatest * 0.0 + 1.0
    if FP8:
        unit = tl.maximum(greatest * (1.0 / 448.0), 1e-30)
    elif DIVIDE:  # by a power of two
        unit = (greatest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit == 0.0, 1.0, unit)
    queries, query_sums = (), ()
    for piece in tl.static_range(KEY_PIECES):
        scaled = asked[piece]
        if DIVIDE:
            scaled = scaled.to(tl.float32) / column(unit)
        scaled = scaled.to(COMPUTE)
        if OFFSETS:
            query_sums = query_sums + (tl.sum(scaled.to(tl.float32), 1),)
        if WAYS > 1:
            scaled = tl.broadcast_to(scaled[None, :, :], (WAYS, ROWS, BLOCK_K))
        queries = queries + (scaled,)
    return queries, query_sums, unit


@triton.jit
def cache_of(pair, batch, key_codes, key_scale, value_codes, value_scale, block_table, context):
    """Where a pair's keys and values, their scales and the block table begin."""
    if PAGE == 0:
        before = pair.to(tl.int64) * context
        key_codes += before * (KEY_SIZE // HALVES)
        value_codes += before * (VALUE_SIZE // HALVES)
        if SCALES == "token":
            key_scale += before * (KEY_SCALED * (2 if OFFSETS else 1))
            value_scale += before * (VALUE_SCALED * (2 if OFFSETS else 1))
    else:
        block_table += batch.to(tl.int64) * (context // PAGE)
    return key_codes, key_scale, value_codes, value_scale, block_table


@triton.jit
def factors_of(head, key_scale, value_scale):
    """What multiplies all scores and all values of a head."""
    key_factor, value_factor = FACTOR * 1.0, 1.0
    if SCALES == "tensor" or SCALES == "head":
        own_scale = head if SCALES == "head" else 0
        key_factor = tl.load(key_scale + own_scale) * key_factor
        value_factor = tl.load(value_scale + own_scale)
    return key_factor, value_factor


@triton.jit
def beginning(shape_of):
    """Nothing attended to yet, for rows like `shape_of`: the greatest score, sums of weights, of values and of offsets.

    Sums of values are multiples of the unit, which is the greatest of their scales: the last of what is returned.
    """
    total = shape_of * 0.0
    sums, shifts = (), ()
    for _ in tl.static_range(VALUE_PIECES):
        sums = sums + (column(total) + tl.zeros((BLOCK_V,), tl.float32),)
    if OFFSETS:
        for _ in tl.static_range(VALUE_SCALED):
            shifts = shifts + (total,)
    return total + float("-inf"), total, sums, shifts, tl.max(tl.zeros((16,), tl.float32), 0)


@triton.jit
def attend(t, vectors, inside, cache, scales, rows, sofar, MASKED: tl.constexpr):
    """Attend to positions t too, [BLOCK_T] or [WAYS, BLOCK_T / WAYS]: what `beginning` gives, anew.

    vectors: where they lie. inside: which of them count. scales: see `look_up`. MASKED: whether some positions do not
    count, or are hidden from some rows. The others are those of `attend_to`.
    """
    key_codes, key_scale, value_codes, value_scale, _ = cache
    key_scales, value_scales = scales
    queries, query_sums, key_factor, mask, places, live, last = rows
    top, total, sums, shifts, unit = sofar
    d = tl.arange(0, BLOCK_K)
    dv = tl.arange(0, BLOCK_V)
    if not SCALES_AHEAD:
        key_scales = load_scales(key_scale, vectors, inside, KEY_SCALED)
    scores = line(t * 0).to(tl.float32)
    for number in tl.static_range(KEY_PIECES // HALVES):
        own = key_codes + (vectors[0] * (KEY_SIZE // HALVES) + number * KEY_PIECE)
        codes = load_codes(own, line(vectors[1]), column(d), line(inside), KEY_SIZE // HALVES, KEY_PIECE, BLOCK_K)
        for half in tl.static_range(HALVES):
            rows = queries[half * (KEY_PIECES // HALVES) + number]
            product = multiplied(rows, values_of(codes, half))
            if GROUP_SIZE:
                product *= line(key_scales[half * (KEY_PIECES // HALVES) + number])
            scores += product
    if GROUP_SIZE and OFFSETS:
        for piece in tl.static_range(KEY_PIECES):
            scores += column(query_sums[piece]) * line(key_scales[KEY_PIECES + piece])
    if SCALES == "token" and not GROUP_SIZE:
        scores *= line(key_scales[0])
        if OFFSETS:
            for piece in tl.static_range(KEY_PIECES):
                scores += column(query_sums[piece]) * line(key_scales[1])
    scores *= column(key_factor)
    if SOFTCAP != 0.0:
        scores = (SOFTCAP * LOG2E) * (2.0 * tl.sigmoid(scores * (2.0 / SOFTCAP)) - 1.0)
    if MASKED:
        scores = masked(scores, mask, places, live, last, t, inside)
    higher = tl.maximum(top, tl.max(scores, -1))
    base = finite(higher)
    weights = tl.exp2(scores - column(base - SHIFT))
    rescale = tl.exp2(top - base)
    total = total * rescale + tl.sum(weights, -1)
    if not SCALES_AHEAD:
        value_scales = load_scales(value_scale, vectors, inside, VALUE_SCALED)
    next_shifts = ()
    if OFFSETS:
        for piece in tl.static_range(VALUE_SCALED):
            moves = weights * line(value_scales[VALUE_SCALED + piece])
            next_shifts = next_shifts + (shifts[piece] * rescale + tl.sum(moves, -1),)
    if SCALES == "token":
        greatest = unit
        for piece in tl.static_range(VALUE_SCALED):
            greatest = tl.maximum(greatest, tl.max(tl.reshape(value_scales[piece], (BLOCK_T,)), 0))
        greatest = tl.where(greatest == 0.0, 1.0, greatest)
        rescale *= unit / greatest
        inverse = 1.0 / greatest
        unit = greatest
        if not GROUP_SIZE:
            weights *= line(value_scales[0] * inverse)
    # In the order of bytes; sums are in the order of numbers.
    parts = ()
    for number in tl.static_range(VALUE_PIECES // HALVES):
        own = value_codes + (vectors[0] * (VALUE_SIZE // HALVES) + number * VALUE_PIECE)
        t = column(vectors[1])
        codes = load_codes(own, t, dv[None, :], column(inside), VALUE_SIZE // HALVES, VALUE_PIECE, BLOCK_V)
        for half in tl.static_range(HALVES):
            factors = weights
            if GROUP_SIZE:
                factors = weights * line(value_scales[half * (VALUE_PIECES // HALVES) + number] * inverse)
            sofar = sums[half * (VALUE_PIECES // HALVES) + number] * column(rescale)
            parts = parts + (sofar + multiplied(factors.to(COMPUTE), decoded(codes, half)),)
    next_sums = ()
    for half in tl.static_range(HALVES):
        for number in tl.static_range(VALUE_PIECES // HALVES):
            next_sums = next_sums + (parts[number * HALVES + half],)
    return higher, total, next_sums, next_shifts, unit


@triton.jit
def look_up(t, token, block, head, begin, end, cache):
    """The page of a block, and scales of its keys and values."""
    _, key_scale, _, value_scale, block_table = cache
    inside = within(t, begin, end)
    page = pages_of(block_table, t, inside, block, end)
    vectors = vectors_of(page, t, token, block, head)
    scales = (
        scales_ahead(key_scale, vectors, inside, KEY_SCALED),
        scales_ahead(value_scale, vectors, inside, VALUE_SCALED),
    )
    return page, scales


@triton.jit
def attend_to(first, stop, token, head, begin, end, cache, rows, sofar, ahead, MASKED: tl.constexpr):
    """Attend to blocks of the context from `first` until `stop` too: what `beginning` gives, and `ahead`, anew.

    token: positions in a block. begin, end: which positions count. cache: see `cache_of`. rows: their queries, as
    `queries_of` gives them, what multiplies scores; the mask, and `masked`'s arguments for it. ahead: what `look_up`
    gives of the first block.
    """
    page, scales = ahead
    t = first * BLOCK_T + token
    for block in tl.range(first, stop):
        next_page, next_scales = look_up(t + BLOCK_T, token, block + 1, head, begin, end, cache)
        vectors = vectors_of(page, t, token, block, head)
        sofar = attend(t, vectors, within(t, begin, end), cache, scales, rows, sofar, MASKED)
        page, scales, t = next_page, next_scales, t + BLOCK_T
    return sofar, (page, scales)


@triton.jit
def scaled(sums, factor, shifts):
    """Sums times what all values have in common, and with the sums of offsets, which all values of a piece share."""
    found = ()
    for piece in tl.static_range(VALUE_PIECES):
        own = sums[piece] * factor
        if OFFSETS:
            own += column(shifts[piece if GROUP_SIZE else 0])
        found = found + (own,)
    return found


@triton.jit
def finish(y, sums, total, places, live, first: tl.constexpr):
    """Store weighted means of a piece; zeros where nothing is attended to."""
    d = tl.arange(0, BLOCK_V)
    mean = sums / column(tl.where(total == 0.0, 1.0, total))
    stored = column(live) & (d < VALUE_PIECE)[None, :]
    tl.store(y + column(places) + first + d[None, :], mean.to(y.dtype.element_ty), mask=stored)
