"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for a few queries and a quantized cache.

All queries that read a head of keys are rows of one product, so each byte of the cache is read once. Programs that
share a head (SPLIT) each take a part of the context; the last to arrive puts the parts together in their order, so
results do not depend on timing. Where sequences are of unequal length (SEQUENCES), their lengths tell each program
which one it serves: all take as many blocks of the context, and short sequences fewer programs. WAYS warps of a program
may each attend by themselves to their part of a block of the context, so that none waits for another's greatest score;
they are put together at the end.

Codes become values in registers, exactly: in float16, which is enough for 8 bits, whatever type queries have. bfloat16
queries are divided by a power of two for it. Scales of tokens multiply scores and weights; those of values are divided
by the greatest so far, so that weights with their scales are at most 2^15.

Or (COMPUTE float8e4nv) codes of FP8 are multiplied as they are, by queries that are divided by a 448th of their
greatest and by weights of at most 2^8, both rounded to E4M3. NVIDIA's matrix units add products of FP8 with fewer
digits than float32 has, so that each block's are added to those before outside of them (APART).

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
DIVIDE = tl.constexpr(True)
PRECISION = tl.constexpr("tf32x3")
ROWS = tl.constexpr(16)
BLOCK_K = tl.constexpr(128)
BLOCK_V = tl.constexpr(128)
BLOCK_T = tl.constexpr(64)
WAYS = tl.constexpr(1)
SPLIT = tl.constexpr(8)
EARLY = tl.constexpr(True)
# </constants>

HALVES = tl.constexpr(2 if BITS.value == 4 else 1)
KEY_PIECE = tl.constexpr(KEY_SIZE.value // KEY_PIECES.value)
"""Numbers of a piece."""
VALUE_PIECE = tl.constexpr(VALUE_SIZE.value // VALUE_PIECES.value)
KEY_SCALED = tl.constexpr(KEY_PIECES.value if GROUP_SIZE.value else 1)
"""Scales of a vector."""
VALUE_SCALED = tl.constexpr(VALUE_PIECES.value if GROUP_SIZE.value else 1)
LIVE_ROWS = tl.constexpr(GROUP.value * QUERIES.value)
KEPT_ROWS = tl.constexpr(1 << (LIVE_ROWS.value - 1).bit_length())
TOPS = tl.constexpr(KEPT_ROWS.value * VALUE_PIECES.value * BLOCK_V.value)
PART = tl.constexpr(TOPS.value + 2 * KEPT_ROWS.value)
"""What a program leaves: sums of weighted values, then the greatest score and the sum of weights of each row."""
AT_ONCE = tl.constexpr(max(1, min(SPLIT.value, 8192 // (KEPT_ROWS.value * BLOCK_V.value))))
"""Parts that are read at once."""
LEAST = tl.constexpr(4)
"""Blocks of the context that a program of sequences of unequal length takes at least."""
FP8 = tl.constexpr(COMPUTE.value == tl.float8e4nv)
SHIFT = tl.constexpr(15.0 if COMPUTE.value == tl.float16 else 8.0 if FP8.value else 0.0)
"""Weights are multiplied by two to its power: float16 then holds those from 2^-39 of the greatest on, E4M3 those from
2^-17 on."""
LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are multiplied by it, so that weights are powers of two."""
FACTOR = tl.constexpr(SCALE.value * (1.0 if SOFTCAP.value else LOG2E.value))


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
def column(x):
    """x [..., n] as [..., n, 1]."""
    return tl.expand_dims(x, -1)


@triton.jit
def line(x):
    """x [..., n] as [..., 1, n]."""
    return tl.expand_dims(x, -2)


@triton.jit
def load_codes(codes, t, d, inside, WIDTH: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Stored elements d of vectors t, of which those that are not inside are 0."""
    if LIVE != BLOCK:
        inside = inside & (d < LIVE)
    return tl.load(codes + t.to(tl.int64) * WIDTH + d, mask=inside, other=0.0 if NATIVE else 0)


@triton.jit
def reach(length, start, exists, context):
    """Where what is attended to begins and ends, of one sequence or of those that exist."""
    begin, end = 0, context
    if SEQUENCES == 0:
        if START:
            begin = tl.maximum(tl.load(start), 0).to(tl.int32)
        if LENGTH:
            end = tl.minimum(tl.load(length), context).to(tl.int32)
    else:
        if START:
            begin = tl.maximum(tl.load(start, mask=exists, other=0), 0).to(tl.int32)
        if LENGTH:
            end = tl.minimum(tl.load(length, mask=exists, other=0), context).to(tl.int32)
    if WINDOW:
        begin = tl.maximum(begin, end - QUERIES + 1 - WINDOW)
    return begin, end


@triton.jit
def within(t, begin, end):
    """Which positions are attended to."""
    inside = t < end
    if START or WINDOW:
        inside = inside & (t >= begin)
    return inside


@triton.jit
def vectors_of(t, inside, head, block_table, block, end):
    """Where the tokens t of a block lie, in vectors."""
    if PAGE == 0:
        vector = t
    elif PAGE % BLOCK_T == 0:
        page = tl.load(block_table + block * BLOCK_T // PAGE, mask=block * BLOCK_T < end, other=0).to(tl.int64)
        vector = (page * HEADS + head) * PAGE + t % PAGE
    else:
        page = tl.load(block_table + t // PAGE, mask=inside, other=0).to(tl.int64)
        vector = (page * HEADS + head) * PAGE + t % PAGE
    return vector


@triton.jit
def load_scales(scales, t, inside, COUNT: tl.constexpr):
    """Of vectors t: the scales of their pieces, or of all of them, then offsets; () for scales of several tokens."""
    found = ()
    if SCALES == "token":
        STEP: tl.constexpr = COUNT * (2 if OFFSETS else 1)
        for place in tl.static_range(STEP):
            found = found + (tl.load(scales + t * STEP + place, mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def scales_ahead(scales, t, inside, COUNT: tl.constexpr):
    """`load_scales` a turn ahead; those of groups, which are too many to be held, are left to `attend`."""
    found = ()
    if not GROUP_SIZE:
        found = load_scales(scales, t, inside, COUNT)
    return found


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
def attend(
    t,
    vector,
    inside,
    queries,
    query_sums,
    key_factor,
    key_codes,
    value_codes,
    key_scale,
    value_scale,
    key_scales,
    value_scales,
    mask,
    places,
    live,
    last,
    top,
    total,
    sums,
    shifts,
    unit,
    MASKED: tl.constexpr,
):
    """Attend to positions t too, [BLOCK_T] or [WAYS, BLOCK_T / WAYS]: what `beginning` gives, anew.

    vector: where they lie. inside: which of them count. MASKED: whether some do not, or are hidden from some rows.
    """
    d = tl.arange(0, BLOCK_K)
    dv = tl.arange(0, BLOCK_V)
    if GROUP_SIZE:
        key_scales = load_scales(key_scale, vector, inside, KEY_SCALED)
    scores = line(t * 0).to(tl.float32)
    for number in tl.static_range(KEY_PIECES // HALVES):
        own = key_codes + number * KEY_PIECE
        codes = load_codes(own, line(vector), column(d), line(inside), KEY_SIZE // HALVES, KEY_PIECE, BLOCK_K)
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
    if GROUP_SIZE:
        value_scales = load_scales(value_scale, vector, inside, VALUE_SCALED)
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
        own = value_codes + number * VALUE_PIECE
        codes = load_codes(own, column(vector), dv[None, :], column(inside), VALUE_SIZE // HALVES, VALUE_PIECE, BLOCK_V)
        for half in tl.static_range(HALVES):
            factors = weights
            if GROUP_SIZE:
                factors = weights * line(value_scales[half * (VALUE_PIECES // HALVES) + number] * inverse)
            sofar = sums[half * (VALUE_PIECES // HALVES) + number] * column(rescale)
            parts = parts + (sofar + multiplied(factors.to(COMPUTE), values_of(codes, half)),)
    next_sums = ()
    for half in tl.static_range(HALVES):
        for number in tl.static_range(VALUE_PIECES // HALVES):
            next_sums = next_sums + (parts[number * HALVES + half],)
    return higher, total, next_sums, next_shifts, unit


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


@triton.jit(
    do_not_specialize=["sequences", "context", "length_step", "start_step", "mask_batch", "mask_head", "mask_query"]
)
def kernel(
    query,
    key_codes,
    key_scale,
    value_codes,
    value_scale,
    mask,
    length,
    start,
    block_table,
    y,
    partial,
    arrived,
    sequences,
    context,
    length_step,
    start_step,
    mask_batch,
    mask_head,
    mask_query,
):
    """Grid: (B * HEADS, SPLIT), or (HEADS * (B + SPLIT)) for sequences of unequal length, at most SEQUENCES.

    sequences: B. context: positions of the cache, or of a block table. length_step, start_step: between sequences, for
    unequal ones. mask_batch, mask_head, mask_query: steps between elements of the mask; those of one query lie side by
    side. partial: float32, PART a program, and arrived: int32, 0 for each head, and 0 again at the end; both only where
    several programs may share a head. Pointers that the constants make needless are not read.
    """
    if EARLY:  # this kernel may begin before the one before has ended, and the next before this one has
        PTX: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    if SEQUENCES == 0:
        pair = tl.program_id(0)
        split = tl.program_id(1)
        batch, head = pair // HEADS, pair % HEADS
        first_part = pair * SPLIT
        sharers = SPLIT
        begin, end = reach(length, start, True, context)
        share = (tl.maximum((end + BLOCK_T - 1) // BLOCK_T - begin // BLOCK_T, 0) + SPLIT - 1) // SPLIT
    else:
        every = tl.arange(0, SEQUENCES)
        exists = every < sequences
        begins, ends = reach(length + every * length_step, start + every * start_step, exists, context)
        counts = tl.where(exists, tl.maximum((ends + BLOCK_T - 1) // BLOCK_T - begins // BLOCK_T, 0), 0)
        share = tl.maximum((tl.sum(counts, 0) + SPLIT - 1) // SPLIT, LEAST)
        programs = tl.where(exists, tl.maximum((counts + share - 1) // share, 1), 0)
        program = tl.program_id(0) % (sequences + SPLIT)
        batch = tl.sum((tl.cumsum(programs, 0) <= program).to(tl.int32), 0)
        if batch >= sequences:
            return
        head = tl.program_id(0) // (sequences + SPLIT)
        pair = batch * HEADS + head
        split = program - tl.sum(tl.where(every < batch, programs, 0), 0)
        first_part = tl.program_id(0) - split
        sharers = tl.sum(tl.where(every == batch, programs, 0), 0)
        begin = tl.sum(tl.where(every == batch, begins, 0), 0)
        end = tl.sum(tl.where(every == batch, ends, 0), 0)
    row = tl.arange(0, ROWS)
    live = row < LIVE_ROWS
    dv = tl.arange(0, BLOCK_V)
    queries, query_sums, unit = queries_of(query + pair.to(tl.int64) * (LIVE_ROWS * KEY_SIZE), row * KEY_SIZE, live)
    if PAGE == 0:
        before = pair.to(tl.int64) * context
        key_codes += before * (KEY_SIZE // HALVES)
        value_codes += before * (VALUE_SIZE // HALVES)
    else:
        block_table += batch.to(tl.int64) * (context // PAGE)
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    places = row // QUERIES * mask_head + row % QUERIES * mask_query
    key_factor, value_factor = unit * FACTOR, 1.0
    if SCALES == "tensor" or SCALES == "head":
        own_scale = head if SCALES == "head" else 0
        key_factor = tl.load(key_scale + own_scale) * key_factor
        value_factor = tl.load(value_scale + own_scale)
    if SCALES == "token" and PAGE == 0:
        key_scale += before * (KEY_SCALED * (2 if OFFSETS else 1))
        value_scale += before * (VALUE_SCALED * (2 if OFFSETS else 1))
    last = end - QUERIES + row % QUERIES
    if WAYS == 1:
        token = tl.arange(0, BLOCK_T)
        top, total, sums, shifts, value_unit = beginning(tl.zeros((ROWS,), tl.float32))
    else:
        EACH: tl.constexpr = BLOCK_T // WAYS
        token = column(tl.arange(0, WAYS)) * EACH + tl.arange(0, EACH)[None, :]
        top, total, sums, shifts, value_unit = beginning(tl.zeros((WAYS, ROWS), tl.float32))
    first = begin // BLOCK_T + split * share
    # Scales and the block table are read a turn ahead.
    t = first * BLOCK_T + token
    inside = within(t, begin, end)
    vector = vectors_of(t, inside, head, block_table, first, end)
    key_scales = scales_ahead(key_scale, vector, inside, KEY_SCALED)
    value_scales = scales_ahead(value_scale, vector, inside, VALUE_SCALED)
    for block in tl.range(first, tl.minimum(first + share, (end + BLOCK_T - 1) // BLOCK_T)):
        ahead = t + BLOCK_T
        next_inside = within(ahead, begin, end)
        next_vector = vectors_of(ahead, next_inside, head, block_table, block + 1, end)
        next_key_scales = scales_ahead(key_scale, next_vector, next_inside, KEY_SCALED)
        next_value_scales = scales_ahead(value_scale, next_vector, next_inside, VALUE_SCALED)
        top, total, sums, shifts, value_unit = attend(
            t,
            vector,
            within(t, begin, end),
            queries,
            query_sums,
            key_factor,
            key_codes,
            value_codes,
            key_scale,
            value_scale,
            key_scales,
            value_scales,
            mask,
            places,
            live,
            last,
            top,
            total,
            sums,
            shifts,
            value_unit,
            True,
        )
        key_scales, value_scales, t, vector = next_key_scales, next_value_scales, ahead, next_vector
    if SCALES == "token":
        value_factor = value_unit
    sums = scaled(sums, value_factor, shifts)
    if WAYS > 1:
        highest = tl.max(top, 0)
        factor = tl.exp2(top - finite(highest)[None, :])
        merged = ()
        for piece in tl.static_range(VALUE_PIECES):
            merged = merged + (tl.sum(sums[piece] * column(factor), 0),)
        sums = merged
        total = tl.sum(total * factor, 0)
        top = highest
    y += pair.to(tl.int64) * (LIVE_ROWS * VALUE_SIZE)
    if sharers == 1:
        for piece in tl.static_range(VALUE_PIECES):
            finish(y, sums[piece], total, row * VALUE_SIZE, live, piece * VALUE_PIECE)
    else:
        partial += first_part.to(tl.int64) * PART
        own = partial + split * PART
        cells = row[:, None] * BLOCK_V + dv[None, :]
        for piece in tl.static_range(VALUE_PIECES):
            tl.store(own + piece * KEPT_ROWS * BLOCK_V + cells, sums[piece], mask=live[:, None], cache_modifier=".cg")
        tl.store(own + TOPS + row, top, mask=live, cache_modifier=".cg")
        tl.store(own + TOPS + KEPT_ROWS + row, total, mask=live, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its arrival
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu") == sharers - 1:
            kept = tl.arange(0, KEPT_ROWS)
            kept_live = (kept < LIVE_ROWS)[None, :]
            every_part = tl.arange(0, SPLIT)[:, None]
            known = kept_live & (every_part < sharers)
            ends_of_all = partial + every_part * PART + TOPS + kept[None, :]
            tops = tl.load(ends_of_all, mask=known, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(ends_of_all + KEPT_ROWS, mask=known, other=0.0, cache_modifier=".cg")
            best = finite(tl.max(tops, 0))
            whole = tl.sum(totals * tl.exp2(tops - best[None, :]), 0)
            numbers = kept[:, None] * BLOCK_V + dv[None, :]
            for piece in tl.static_range(VALUE_PIECES):
                added = tl.zeros((KEPT_ROWS, BLOCK_V), tl.float32)
                for some in tl.range(0, sharers, AT_ONCE):
                    other_part = some + tl.arange(0, AT_ONCE)[:, None]
                    theirs = partial + other_part * PART
                    known_now = kept_live & (other_part < sharers)
                    its_tops = tl.load(
                        theirs + TOPS + kept[None, :], mask=known_now, other=float("-inf"), cache_modifier=".cg"
                    )
                    its_sums = tl.load(
                        theirs[:, :, None] + piece * KEPT_ROWS * BLOCK_V + numbers[None, :, :],
                        mask=known_now[:, :, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    added += tl.sum(its_sums * tl.exp2(its_tops - best[None, :])[:, :, None], 0)
                finish(y, added, whole, kept * VALUE_SIZE, kept < LIVE_ROWS, piece * VALUE_PIECE)
            tl.store(arrived + pair, 0)
