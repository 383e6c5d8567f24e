"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for many queries and a quantized cache.

A program takes ROWS rows, which are all query heads of a head of keys for some tokens, and goes over the context as
FlashAttention does (T. Dao, 2023): codes are decoded in registers, block by block, and never written. Where positions
alone say what is attended to, blocks that no row attends to are left out, and only those that some do not attend to are
masked. Where a few tokens of few sequences attend to a long context, programs share it (SPLIT), and the last to arrive
puts their parts together in their order. Everything else is said in `attention`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_T,
    BLOCK_V,
    CAUSAL,
    EARLY,
    FACTOR,
    GROUP,
    HALVES,
    HEADS,
    KEY_SCALED,
    KEY_SIZE,
    LENGTH,
    MASK,
    OFFSETS,
    PAGE,
    ROWS,
    SCALES,
    SPLIT,
    START,
    VALUE_PIECE,
    VALUE_PIECES,
    VALUE_SCALED,
    VALUE_SIZE,
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
)

# </attention>

SUMS = tl.constexpr(VALUE_PIECES.value * ROWS.value * BLOCK_V.value)
PART = tl.constexpr(SUMS.value + 2 * ROWS.value)
"""What a program leaves: sums of weighted values, then the greatest score and the sum of weights of each row."""


@triton.jit(
    do_not_specialize=["context", "tokens", "length_step", "start_step", "mask_batch", "mask_head", "mask_query"]
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
    context,
    tokens,
    length_step,
    start_step,
    mask_batch,
    mask_head,
    mask_query,
):
    """Grid: (ceil(GROUP * tokens / ROWS), B * HEADS, SPLIT).

    tokens: Q. partial: float32, PART a program, and arrived: int32, 0 for each tile of a head, and 0 again at the end;
    both only with SPLIT. The others are as in `attention_decode`.
    """
    if EARLY:  # this kernel may begin before the one before has ended, and the next before this one has
        PTX: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that attend to most begin first
    pair = tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    cell = tile * ROWS + tl.arange(0, ROWS)
    live = cell < tokens * GROUP
    row = tl.where(live, cell % GROUP * tokens + cell // GROUP, 0)
    rows = pair.to(tl.int64) * GROUP * tokens
    queries, query_sums, unit = queries_of(query + rows * KEY_SIZE, row * KEY_SIZE, live)
    if PAGE == 0:
        skipped = pair.to(tl.int64) * context
        key_codes += skipped * (KEY_SIZE // HALVES)
        value_codes += skipped * (VALUE_SIZE // HALVES)
        if SCALES == "token":
            key_scale += skipped * (KEY_SCALED * (2 if OFFSETS else 1))
            value_scale += skipped * (VALUE_SCALED * (2 if OFFSETS else 1))
    else:
        block_table += batch.to(tl.int64) * (context // PAGE)
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    places = row // tokens * mask_head + row % tokens * mask_query
    key_factor, value_factor = unit * FACTOR, 1.0
    if SCALES == "tensor" or SCALES == "head":
        own_scale = head if SCALES == "head" else 0
        key_factor = tl.load(key_scale + own_scale) * key_factor
        value_factor = tl.load(value_scale + own_scale)
    begin, end = 0, context
    if START:
        begin = tl.maximum(tl.load(start + batch * start_step), 0).to(tl.int32)
    if LENGTH:
        end = tl.minimum(tl.load(length + batch * length_step), context).to(tl.int32)
    before = end - tokens  # positions before the queries' own, if those are known
    last = before + row % tokens
    first_token = tile * ROWS // GROUP
    final_token = tl.minimum(((tile + 1) * ROWS - 1) // GROUP, tokens - 1)
    stop = end
    if CAUSAL:
        stop = before + final_token + 1
        if WINDOW:
            begin = tl.maximum(begin, before + first_token + 1 - WINDOW)
    first = begin // BLOCK_T
    seen = first
    if MASK == "none" and not WINDOW and not START:  # up to which block all rows attend to all
        seen = end // BLOCK_T
        if CAUSAL:
            seen = tl.maximum(before + first_token + 1, 0) // BLOCK_T
    blocks = (tl.maximum(stop, 0) + BLOCK_T - 1) // BLOCK_T
    if SPLIT > 1:
        share = (tl.maximum(blocks - first, 0) + SPLIT - 1) // SPLIT
        first += tl.program_id(2) * share
        blocks = tl.minimum(first + share, blocks)
        seen = tl.maximum(tl.minimum(seen, blocks), first)
    token = tl.arange(0, BLOCK_T)
    top, total, sums, shifts, value_unit = beginning(tl.zeros((ROWS,), tl.float32))
    # Scales and the block table are read a turn ahead.
    t = first * BLOCK_T + token
    inside = (t >= begin) & (t < end)
    page = pages_of(block_table, t, inside, first, end)
    vectors = vectors_of(page, t, token, first, head)
    key_scales = scales_ahead(key_scale, vectors, inside, KEY_SCALED)
    value_scales = scales_ahead(value_scale, vectors, inside, VALUE_SCALED)
    for hidden in tl.static_range(2):
        for block in tl.range(seen if hidden else first, blocks if hidden else seen):
            ahead = t + BLOCK_T
            next_inside = (ahead >= begin) & (ahead < end)
            next_page = pages_of(block_table, ahead, next_inside, block + 1, end)
            next_vectors = vectors_of(next_page, ahead, token, block + 1, head)
            next_key_scales = scales_ahead(key_scale, next_vectors, next_inside, KEY_SCALED)
            next_value_scales = scales_ahead(value_scale, next_vectors, next_inside, VALUE_SCALED)
            top, total, sums, shifts, value_unit = attend(
                t,
                vectors_of(page, t, token, block, head),
                (t >= begin) & (t < end),
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
                hidden == 1,
            )
            key_scales, value_scales, t, page = next_key_scales, next_value_scales, ahead, next_page
    if SCALES == "token":
        value_factor = value_unit
    sums = scaled(sums, value_factor, shifts)
    y += rows * VALUE_SIZE
    if SPLIT == 1:
        for piece in tl.static_range(VALUE_PIECES):
            finish(y, sums[piece], total, row * VALUE_SIZE, live, piece * VALUE_PIECE)
    else:
        sharers = tl.num_programs(0) * pair + tile
        partial += sharers.to(tl.int64) * (SPLIT * PART)
        own = partial + tl.program_id(2) * PART
        place = tl.arange(0, ROWS)
        cells = column(place) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        for piece in tl.static_range(VALUE_PIECES):
            tl.store(own + piece * ROWS * BLOCK_V + cells, sums[piece], cache_modifier=".cg")
        tl.store(own + SUMS + place, top, cache_modifier=".cg")
        tl.store(own + SUMS + ROWS + place, total, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its arrival
        if tl.atomic_add(arrived + sharers, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            best = top
            for part in tl.range(SPLIT):
                best = tl.maximum(best, tl.load(partial + part * PART + SUMS + place, cache_modifier=".cg"))
            best = finite(best)
            whole = total * 0.0
            for part in tl.range(SPLIT):
                ends = partial + part * PART + SUMS + place
                factor = tl.exp2(tl.load(ends, cache_modifier=".cg") - best)
                whole += tl.load(ends + ROWS, cache_modifier=".cg") * factor
            for piece in tl.static_range(VALUE_PIECES):
                added = sums[piece] * 0.0
                for part in tl.range(SPLIT):
                    theirs = partial + part * PART
                    factor = tl.exp2(tl.load(theirs + SUMS + place, cache_modifier=".cg") - best)
                    its_sums = tl.load(theirs + piece * ROWS * BLOCK_V + cells, cache_modifier=".cg")
                    added += its_sums * column(factor)
                finish(y, added, whole, row * VALUE_SIZE, live, piece * VALUE_PIECE)
            tl.store(arrived + sharers, 0)
