"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for many queries and a quantized cache.

A program takes ROWS rows, which are all query heads of a head of keys for some tokens, and goes over the context as
FlashAttention does (T. Dao, 2023): codes are decoded in registers, block by block, and never written. Where positions
alone say what is attended to, blocks that no row attends to are left out, and only those that some do not attend to are
masked. Where a few tokens of few sequences attend to a long context, programs share it (SPLIT), and the last to arrive
puts their parts together in their order. Everything else is said in `attention` and `attention_parts`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_T,
    CAUSAL,
    EARLY,
    GROUP,
    HEADS,
    KEY_SIZE,
    LENGTH,
    MASK,
    ROWS,
    SCALES,
    SPLIT,
    START,
    VALUE_PIECE,
    VALUE_PIECES,
    VALUE_SIZE,
    WINDOW,
    attend_to,
    beginning,
    cache_of,
    factors_of,
    finish,
    look_up,
    queries_of,
    row_of,
    scaled,
)

# </attention>
# <parts>
from qcompile.codegen.templates.attention_parts import PART, leave_part, put_together

# </parts>


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
    row, live = row_of(tile * ROWS + tl.arange(0, ROWS), tokens)
    query += pair.to(tl.int64) * GROUP * tokens * KEY_SIZE
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    key_factor, value_factor = factors_of(head, key_scale, value_scale)
    cache = cache_of(pair, batch, key_codes, key_scale, value_codes, value_scale, block_table, context)
    begin, end = 0, context
    if START:
        begin = tl.maximum(tl.load(start + batch * start_step), 0).to(tl.int32)
    if LENGTH:
        end = tl.minimum(tl.load(length + batch * length_step), context).to(tl.int32)
    before = end - tokens  # positions before the queries' own, if those are known
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
    queries, query_sums, unit = queries_of(query, row * KEY_SIZE, live)
    places = row // tokens * mask_head + row % tokens * mask_query
    rows = (queries, query_sums, unit * key_factor, mask, places, live, before + row % tokens)
    token = tl.arange(0, BLOCK_T)
    sofar = beginning(tl.zeros((ROWS,), tl.float32))
    ahead = look_up(first * BLOCK_T + token, token, first, head, begin, end, cache)
    sofar, ahead = attend_to(first, seen, token, head, begin, end, cache, rows, sofar, ahead, False)
    sofar, ahead = attend_to(seen, blocks, token, head, begin, end, cache, rows, sofar, ahead, True)
    top, total, sums, shifts, value_unit = sofar
    if SCALES == "token":
        value_factor = value_unit
    sums = scaled(sums, value_factor, shifts)
    y += pair.to(tl.int64) * GROUP * tokens * VALUE_SIZE
    if SPLIT == 1:
        for piece in tl.static_range(VALUE_PIECES):
            finish(y, sums[piece], total, row * VALUE_SIZE, live, piece * VALUE_PIECE)
    else:
        sharers = tl.num_programs(0) * pair + tile
        partial += sharers.to(tl.int64) * (SPLIT * PART)
        leave_part(partial + tl.program_id(2) * PART, top, total, sums)
        put_together(y, partial, arrived + sharers, SPLIT, tile * ROWS, tokens)
