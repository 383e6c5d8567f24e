"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for a few queries and a quantized cache.

All queries that read a head of keys are rows of one product, so each byte of the cache is read once. Programs that
share a head (SPLIT) each take a part of the context; the last to arrive puts the parts together in their order, so
results do not depend on timing. Where sequences are of unequal length (SEQUENCES), their lengths tell each program
which one it serves: all take as many blocks of the context, and short sequences fewer programs. WAYS warps of a program
may each attend by themselves to their part of a block of the context, so that none waits for another's greatest score;
they are put together at the end.

A kernel may begin before the one before it has ended: until then it only sends the first of its keys and values to the
L2 cache.

Everything else is said in `attention` and `attention_parts`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_T,
    EARLY,
    GROUP,
    HALVES,
    HEADS,
    KEY_BYTES,
    KEY_SIZE,
    LANES,
    LENGTH,
    LIVE_ROWS,
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
    VALUE_SIZE,
    WAYS,
    WINDOW,
    attend_to,
    beginning,
    cache_of,
    column,
    factors_of,
    finish,
    finite,
    look_up,
    queries_of,
    row_of,
    scaled,
)

# </attention>
# <lanes>
from qcompile.codegen.templates.attention_lanes import attend_in_lanes, sum_of_ways

# </lanes>
# <parts>
from qcompile.codegen.templates.attention_parts import PART, leave_part, put_together

# </parts>

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
    row, live = row_of(tl.arange(0, ROWS), QUERIES)
    query += pair.to(tl.int64) * (LIVE_ROWS * KEY_SIZE)
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    key_factor, value_factor = factors_of(head, key_scale, value_scale)
    cache = cache_of(pair, batch, key_codes, key_scale, value_codes, value_scale, block_table, context)
    first = begin // BLOCK_T + split * share
    stop = tl.minimum(first + share, (end + BLOCK_T - 1) // BLOCK_T)
    if LANES:
        top, total, sums = attend_in_lanes(
            first, stop, head, begin, end, cache, query, key_factor, mask, mask_head, mask_query
        )
        sums = (sums * value_factor,)
    else:
        queries, query_sums, unit = queries_of(query, row * KEY_SIZE, live)
        places = row // QUERIES * mask_head + row % QUERIES * mask_query
        rows = (queries, query_sums, unit * key_factor, mask, places, live, end - QUERIES + row % QUERIES)
        if WAYS == 1:
            token = tl.arange(0, BLOCK_T)
            sofar = beginning(tl.zeros((ROWS,), tl.float32))
        else:
            EACH: tl.constexpr = BLOCK_T // WAYS
            token = column(tl.arange(0, WAYS)) * EACH + tl.arange(0, EACH)[None, :]
            sofar = beginning(tl.zeros((WAYS, ROWS), tl.float32))
        ahead = look_up(first * BLOCK_T + token, token, first, head, begin, end, cache)
        sofar, _ = attend_to(first, stop, token, head, begin, end, cache, rows, sofar, ahead, True)
        top, total, sums, shifts, value_unit = sofar
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
        leave_part(partial + split * PART, top, total, sums)
        put_together(y, partial, arrived + pair, sharers, 0, QUERIES)
