"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for a few queries and a quantized cache.

All queries that read a head of keys are rows of one product, so each byte of the cache is read once. Programs that
share a head (SPLIT) each take a part of the context; the last to arrive puts the parts together in their order, so
results do not depend on timing. Where sequences are of unequal length (SEQUENCES), their lengths tell each program
which one it serves: all take as many blocks of the context, and short sequences fewer programs. WAYS warps of a program
may each attend by themselves to their part of a block of the context, so that none waits for another's greatest score;
they are put together at the end.

A kernel may begin before the one before it has ended: until then it only sends the first of its keys and values to the
L2 cache.

Everything else is said in `attention`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_T,
    BLOCK_V,
    EARLY,
    FACTOR,
    GROUP,
    HALVES,
    HEADS,
    KEY_BYTES,
    KEY_SCALED,
    KEY_SIZE,
    LANES,
    LENGTH,
    OFFSETS,
    PAGE,
    QUERIES,
    ROWS,
    SCALES,
    SEQUENCES,
    SPLIT,
    START,
    VALUE_BYTES,
    VALUE_PIECE,
    VALUE_PIECES,
    VALUE_SCALED,
    VALUE_SIZE,
    WAYS,
    WINDOW,
    attend,
    beginning,
    column,
    finish,
    finite,
    pages_of,
    queries_of,
    scaled,
    scales_ahead,
    vectors_of,
    within,
)

# </attention>
# <lanes>
from qcompile.codegen.templates.attention_lanes import attend_in_lanes, sum_of_ways

# </lanes>

LIVE_ROWS = tl.constexpr(GROUP.value * QUERIES.value)
KEPT_ROWS = tl.constexpr(1 << (LIVE_ROWS.value - 1).bit_length())
TOPS = tl.constexpr(KEPT_ROWS.value * VALUE_PIECES.value * BLOCK_V.value)
PART = tl.constexpr(TOPS.value + 2 * KEPT_ROWS.value)
"""What a program leaves: sums of weighted values, then the greatest score and the sum of weights of each row."""
HELD = tl.constexpr(8192 if VALUE_PIECES.value <= 2 and VALUE_SIZE.value <= 128 else 3584)
"""Numbers of parts that registers hold beside the rest."""
AT_ONCE = tl.constexpr(max(1, min(SPLIT.value, HELD.value // TOPS.value)))
"""Parts that are read at once."""
LEAST = tl.constexpr(4)
"""Blocks of the context that a program of sequences of unequal length takes at least."""
SENT = tl.constexpr(2 * BLOCK_T.value)
"""Tokens whose keys and values are sent to the L2 cache."""


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
def share_of(begin, end):
    """Blocks of the context that each of a pair's programs has."""
    return (tl.maximum((end + BLOCK_T - 1) // BLOCK_T - begin // BLOCK_T, 0) + SPLIT - 1) // SPLIT


@triton.jit
def send(codes, vector, count, SIZE: tl.constexpr, BYTES: tl.constexpr):
    """Send `count` vectors of 16 bytes and more to the L2 cache, by one thread and in whole 16 bytes."""
    PTX: tl.constexpr = """{
        .reg .pred first;
        .reg .b32 thread;
        mov.b32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
    }"""
    if BYTES >= 16:
        address = (codes + vector * SIZE).to(tl.int64) & -16
        size = count * BYTES & -16
        tl.inline_asm_elementwise(PTX, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def send_first(key_codes, value_codes, length, start, pair, split, context):
    """Send a program's first keys and values. Lengths that are not written yet make them others of the same cache."""
    begin, end = reach(length, start, True, context)
    share = share_of(begin, end)
    first = (begin // BLOCK_T + split * share) * BLOCK_T
    count = tl.minimum(tl.minimum(share * BLOCK_T, SENT), end - first)
    if (count > 0) & (first >= 0):
        vector = pair.to(tl.int64) * context + first
        send(key_codes, vector, count, KEY_SIZE // HALVES, KEY_BYTES)
        send(value_codes, vector, count, VALUE_SIZE // HALVES, VALUE_BYTES)


@triton.jit
def load_parts(partial, first, sharers):
    """Of parts from `first` on, one after another: the greatest scores, sums of weights, and pieces of sums of values.

    What each thread has of all of them are the same elements, so that adding parts is its own affair.
    """
    row = tl.arange(0, KEPT_ROWS)
    live = row < LIVE_ROWS
    cells = row[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    found = ()
    for i in tl.static_range(AT_ONCE):
        part = partial + (first + i) * PART
        known = live & (first + i < sharers)
        top = tl.load(part + TOPS + row, mask=known, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(part + TOPS + KEPT_ROWS + row, mask=known, other=0.0, cache_modifier=".cg")
        sums = ()
        for piece in tl.static_range(VALUE_PIECES):
            source = part + piece * KEPT_ROWS * BLOCK_V + cells
            sums += (tl.load(source, mask=known[:, None], other=0.0, cache_modifier=".cg"),)
        found += ((top, total, sums),)
    return found


@triton.jit
def add_parts(best, whole, sums, parts):
    """The greatest scores, sums of weights, and pieces of sums of values, of `parts` too."""
    higher = best
    for i in tl.static_range(AT_ONCE):
        higher = tl.maximum(higher, parts[i][0])
    base = finite(higher)
    smaller = tl.exp2(best - base)
    whole *= smaller
    added = ()
    for piece in tl.static_range(VALUE_PIECES):
        added += (sums[piece] * smaller[:, None],)
    for i in tl.static_range(AT_ONCE):
        factor = tl.exp2(parts[i][0] - base)
        whole += parts[i][1] * factor
        more = ()
        for piece in tl.static_range(VALUE_PIECES):
            more += (added[piece] + parts[i][2][piece] * factor[:, None],)
        added = more
    return higher, whole, added


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
    if EARLY:  # the kernel after this one may begin when all its programs have
        if SEQUENCES == 0 and PAGE == 0:
            send_first(key_codes, value_codes, length, start, tl.program_id(0), tl.program_id(1), context)
        PTX: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    if SEQUENCES == 0:
        pair = tl.program_id(0)
        split = tl.program_id(1)
        batch, head = pair // HEADS, pair % HEADS
        first_part = pair * SPLIT
        sharers = SPLIT
        begin, end = reach(length, start, True, context)
        share = share_of(begin, end)
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
    query += pair.to(tl.int64) * (LIVE_ROWS * KEY_SIZE)
    if PAGE == 0:
        before = pair.to(tl.int64) * context
        key_codes += before * (KEY_SIZE // HALVES)
        value_codes += before * (VALUE_SIZE // HALVES)
    else:
        block_table += batch.to(tl.int64) * (context // PAGE)
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    key_factor, value_factor = FACTOR * 1.0, 1.0
    if SCALES == "tensor" or SCALES == "head":
        own_scale = head if SCALES == "head" else 0
        key_factor = tl.load(key_scale + own_scale) * key_factor
        value_factor = tl.load(value_scale + own_scale)
    first = begin // BLOCK_T + split * share
    stop = tl.minimum(first + share, (end + BLOCK_T - 1) // BLOCK_T)
    if LANES:
        top, total, sums = attend_in_lanes(
            query,
            key_codes,
            value_codes,
            block_table,
            mask,
            mask_head,
            mask_query,
            head,
            begin,
            end,
            first,
            stop,
            key_factor,
        )
        sums, shifts = (sums,), ()
    else:
        queries, query_sums, unit = queries_of(query, row * KEY_SIZE, live)
        key_factor = unit * key_factor
        places = row // QUERIES * mask_head + row % QUERIES * mask_query
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
        # Scales and the block table are read a turn ahead.
        t = first * BLOCK_T + token
        inside = within(t, begin, end)
        page = pages_of(block_table, t, inside, first, end)
        vectors = vectors_of(page, t, token, first, head)
        key_scales = scales_ahead(key_scale, vectors, inside, KEY_SCALED)
        value_scales = scales_ahead(value_scale, vectors, inside, VALUE_SCALED)
        for block in tl.range(first, stop):
            ahead = t + BLOCK_T
            next_inside = within(ahead, begin, end)
            next_page = pages_of(block_table, ahead, next_inside, block + 1, end)
            next_vectors = vectors_of(next_page, ahead, token, block + 1, head)
            next_key_scales = scales_ahead(key_scale, next_vectors, next_inside, KEY_SCALED)
            next_value_scales = scales_ahead(value_scale, next_vectors, next_inside, VALUE_SCALED)
            top, total, sums, shifts, value_unit = attend(
                t,
                vectors_of(page, t, token, block, head),
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
            key_scales, value_scales, t, page = next_key_scales, next_value_scales, ahead, next_page
    if SCALES == "token":
        value_factor = value_unit
    sums = scaled(sums, value_factor, shifts)
    if WAYS > 1 or LANES:
        highest = tl.max(top, 0)
        factor = tl.exp2(top - finite(highest)[None, :])
        merged = ()
        for piece in tl.static_range(VALUE_PIECES):
            each = sums[piece] * column(factor)
            merged = merged + (sum_of_ways(each, WAYS) if LANES else tl.sum(each, 0),)
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
            best = tl.zeros((KEPT_ROWS,), tl.float32) + float("-inf")
            whole = tl.zeros((KEPT_ROWS,), tl.float32)
            added = ()
            for _ in tl.static_range(VALUE_PIECES):
                added += (tl.zeros((KEPT_ROWS, BLOCK_V), tl.float32),)
            for some in tl.range(0, sharers, AT_ONCE):
                best, whole, added = add_parts(best, whole, added, load_parts(partial, some, sharers))
            kept = tl.arange(0, KEPT_ROWS)
            for piece in tl.static_range(VALUE_PIECES):
                finish(y, added[piece], whole, kept * VALUE_SIZE, kept < LIVE_ROWS, piece * VALUE_PIECE)
            tl.store(arrived + pair, 0)
