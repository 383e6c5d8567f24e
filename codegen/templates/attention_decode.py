"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for a few queries and a quantized cache.

All queries that read a head of keys are rows of one product, so each byte of the cache is read once. Programs that
share a head (SPLIT) each take a part of the context; the last to arrive puts the parts together in their order, so
results do not depend on timing. Codes become values in registers; scales multiply scores and weights, not the values.

Of a paged cache the block table of each sequence says where its tokens lie. Where sequences are of unequal length
(SEQUENCES), each program is told its own by their lengths: all of them take as many blocks of the context, and short
sequences fewer programs.

Where a byte holds two codes, its low half is of the first half of a vector: both halves are attended to by themselves.
Keys and values of 16 bits are multiplied as they are, and have no scales.
Products are multiplied by a factor that is unknown at compile time before they are added (see `gemm_fragment`).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
BITS = tl.constexpr(8)
NATIVE = tl.constexpr(True)
SCALES = tl.constexpr("tensor")
HEADS = tl.constexpr(8)
GROUP = tl.constexpr(4)
QUERIES = tl.constexpr(1)
KEY_SIZE = tl.constexpr(128)
VALUE_SIZE = tl.constexpr(128)
SCALE = tl.constexpr(0.08838834764831845)
SOFTCAP = tl.constexpr(0.0)
MASK = tl.constexpr("none")
LENGTH = tl.constexpr(False)
START = tl.constexpr(False)
SEQUENCES = tl.constexpr(0)
PAGE = tl.constexpr(0)
COMPUTE = tl.constexpr(tl.bfloat16)
WEIGHTS = tl.constexpr(tl.bfloat16)
PRECISION = tl.constexpr("tf32x3")
ROWS = tl.constexpr(16)
BLOCK_D = tl.constexpr(128)
BLOCK_V = tl.constexpr(128)
BLOCK_T = tl.constexpr(64)
SPLIT = tl.constexpr(8)
EARLY = tl.constexpr(True)
# </constants>

HALVES = tl.constexpr(2 if BITS.value == 4 else 1)
KEY_WIDTH = tl.constexpr(KEY_SIZE.value // HALVES.value)
"""Stored elements of a key, which are bytes or 16-bit numbers."""
VALUE_WIDTH = tl.constexpr(VALUE_SIZE.value // HALVES.value)
LIVE_ROWS = tl.constexpr(GROUP.value * QUERIES.value)
LEAST = tl.constexpr(4)
"""Blocks of the context that a program of sequences of unequal length takes at least."""
PART = tl.constexpr(ROWS.value * (HALVES.value * BLOCK_V.value + 2))
"""What a program leaves: sums of weighted values, then the greatest score and the sum of weights of each row."""


# <decode>
@triton.jit
def decode(code):
    return code.to(tl.float32)


# </decode>


@triton.jit
def values_of(codes, DTYPE: tl.constexpr):
    """Of bytes with one code each."""
    return codes.to(DTYPE) if NATIVE else decode(codes.to(tl.int32)).to(DTYPE)


@triton.jit
def load_codes(codes, vector, d, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes of vectors, of which those that are not inside are 0."""
    if WIDTH != BLOCK:
        inside = inside & (d < WIDTH)
    return tl.load(codes + vector.to(tl.int64) * WIDTH + d, mask=inside, other=0.0 if NATIVE else 0)


@triton.jit
def vectors(t, inside, head, block_table, block):
    """Which vectors of a head of keys tokens t are, that are inside and of one block."""
    if PAGE == 0:
        vector = t
    elif PAGE % BLOCK_T == 0:
        page = tl.load(block_table + block * BLOCK_T // PAGE).to(tl.int64)
        vector = (page * HEADS + head) * PAGE + t % PAGE
    else:
        page = tl.load(block_table + t // PAGE, mask=inside, other=0).to(tl.int64)
        vector = (page * HEADS + head) * PAGE + t % PAGE
    return vector


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
    return begin, end


@triton.jit
def masked(scores, mask, row, t, inside, mask_head, mask_query):
    """Scores [ROWS, BLOCK_T], -inf where nothing is attended to."""
    allowed = inside[None, :]
    if MASK != "none":
        offsets = row // QUERIES * mask_head + row % QUERIES * mask_query
        allowed = allowed & (row < LIVE_ROWS)[:, None]
        given = tl.load(mask + offsets[:, None] + t[None, :], mask=allowed, other=0)
        if MASK == "boolean":
            allowed = allowed & (given != 0)
        else:
            scores += given.to(tl.float32)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def finite(top):
    """Something to subtract from scores of which `top` is the greatest."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def finish(y, sums, sums_high, total, row):
    """Store weighted means; zeros where nothing is attended to."""
    d = tl.arange(0, BLOCK_V)
    total = tl.where(total == 0.0, 1.0, total)[:, None]
    stored = (row < LIVE_ROWS)[:, None] & (d < VALUE_WIDTH)[None, :]
    y += row[:, None] * VALUE_SIZE + d[None, :]
    tl.store(y, (sums / total).to(y.dtype.element_ty), mask=stored)
    if HALVES == 2:
        tl.store(y + VALUE_WIDTH, (sums_high / total).to(y.dtype.element_ty), mask=stored)


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
        parts = SPLIT
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
        parts = tl.sum(tl.where(every == batch, programs, 0), 0)
        begin = tl.sum(tl.where(every == batch, begins, 0), 0)
        end = tl.sum(tl.where(every == batch, ends, 0), 0)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    query += pair.to(tl.int64) * (LIVE_ROWS * KEY_SIZE) + row[:, None] * KEY_SIZE + d[None, :]
    wanted = (row < LIVE_ROWS)[:, None] & (d < KEY_WIDTH)[None, :]
    rows = tl.load(query, mask=wanted, other=0.0)
    if HALVES == 2:
        rows_high = tl.load(query + KEY_WIDTH, mask=wanted, other=0.0)
    if PAGE == 0:
        before = pair.to(tl.int64) * context
        key_codes += before * KEY_WIDTH
        value_codes += before * VALUE_WIDTH
    else:
        block_table += batch.to(tl.int64) * (context // PAGE)
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    if SCALES == "token":
        if PAGE == 0:
            key_scale += before
            value_scale += before
        key_factor = SCALE
        value_factor = (key_scale.to(tl.int64) != 0).to(tl.float32)  # 1, which no compiler knows
    elif SCALES == "none":
        key_factor = SCALE
        value_factor = (key_codes.to(tl.int64) != 0).to(tl.float32)  # the same
    else:
        own_scale = head if SCALES == "head" else 0
        key_factor = tl.load(key_scale + own_scale) * SCALE
        value_factor = tl.load(value_scale + own_scale)
    blocks = (end + BLOCK_T - 1) // BLOCK_T
    first = begin // BLOCK_T + split * share
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_V), tl.float32)
    sums_high = sums
    for block in tl.range(first, tl.minimum(first + share, blocks)):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t >= begin) & (t < end)
        vector = vectors(t, inside, head, block_table, block)
        codes = load_codes(key_codes, vector[None, :], d[:, None], inside[None, :], KEY_WIDTH, BLOCK_D)
        if HALVES == 1:
            scores = tl.dot(rows, values_of(codes, COMPUTE), input_precision=PRECISION)
        else:
            scores = tl.dot(rows, values_of(codes & 15, COMPUTE), input_precision=PRECISION)
            scores += tl.dot(rows_high, values_of(codes >> 4, COMPUTE), input_precision=PRECISION)
        scores *= key_factor
        if SCALES == "token":
            scores *= tl.load(key_scale + vector, mask=inside, other=0.0)[None, :]
        if SOFTCAP != 0.0:
            scores = SOFTCAP * (2.0 * tl.sigmoid(scores * (2.0 / SOFTCAP)) - 1.0)
        scores = masked(scores, mask, row, t, inside, mask_head, mask_query)
        higher = tl.maximum(top, tl.max(scores, 1))
        base = finite(higher)
        weights = tl.exp(scores - base[:, None])
        rescale = tl.exp(top - base)
        top = higher
        total = total * rescale + tl.sum(weights, 1)
        if SCALES == "token":
            weights *= tl.load(value_scale + vector, mask=inside, other=0.0)[None, :]
        weights = weights.to(WEIGHTS)
        codes = load_codes(value_codes, vector[:, None], dv[None, :], inside[:, None], VALUE_WIDTH, BLOCK_V)
        if HALVES == 1:
            part = tl.dot(weights, values_of(codes, WEIGHTS), input_precision=PRECISION)
        else:
            part = tl.dot(weights, values_of(codes & 15, WEIGHTS), input_precision=PRECISION)
            part_high = tl.dot(weights, values_of(codes >> 4, WEIGHTS), input_precision=PRECISION)
            sums_high = sums_high * rescale[:, None] + part_high * value_factor
        sums = sums * rescale[:, None] + part * value_factor
    y += pair.to(tl.int64) * (LIVE_ROWS * VALUE_SIZE)
    if parts == 1:
        finish(y, sums, sums_high, total, row)
    else:
        place = row[:, None] * BLOCK_V + dv[None, :]
        partial += first_part.to(tl.int64) * PART
        own = partial + split * PART
        tl.store(own + place, sums, cache_modifier=".cg")
        if HALVES == 2:
            tl.store(own + ROWS * BLOCK_V + place, sums_high, cache_modifier=".cg")
        tl.store(own + ROWS * HALVES * BLOCK_V + row, top, cache_modifier=".cg")
        tl.store(own + ROWS * (HALVES * BLOCK_V + 1) + row, total, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its arrival
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu") == parts - 1:
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, BLOCK_V), tl.float32)
            sums_high = sums
            for other in tl.range(0, parts):
                given = partial + other * PART
                its_top = tl.load(given + ROWS * HALVES * BLOCK_V + row, cache_modifier=".cg")
                higher = tl.maximum(top, its_top)
                base = finite(higher)
                rescale, its_rescale = tl.exp(top - base), tl.exp(its_top - base)
                top = higher
                its_total = tl.load(given + ROWS * (HALVES * BLOCK_V + 1) + row, cache_modifier=".cg")
                total = total * rescale + its_total * its_rescale
                part = tl.load(given + place, cache_modifier=".cg")
                sums = sums * rescale[:, None] + part * its_rescale[:, None]
                if HALVES == 2:
                    part = tl.load(given + ROWS * BLOCK_V + place, cache_modifier=".cg")
                    sums_high = sums_high * rescale[:, None] + part * its_rescale[:, None]
            finish(y, sums, sums_high, total, row)
            tl.store(arrived + pair, 0)
