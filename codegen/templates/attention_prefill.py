"""y [B, Hq, Q, Dv] = softmax(query [B, Hq, Q, D] key^T + mask) value for many queries and a quantized cache.

A program takes ROWS rows, which are all query heads of a head of keys for some tokens, and goes over the context as
FlashAttention does (T. Dao, 2023): codes are decoded in registers, block by block, and never written. Where positions
alone say what is attended to, blocks that no row attends to are left out, and only those that some do not attend to are
masked. Everything else is said in `attention_decode`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention_decode import (
    BLOCK_T,
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
    ROWS,
    SCALES,
    VALUE_PIECE,
    VALUE_PIECES,
    VALUE_SCALED,
    VALUE_SIZE,
    WINDOW,
    attend,
    beginning,
    finish,
    load_scales,
    queries_of,
    scaled,
)

# </attention>


@triton.jit(do_not_specialize=["context", "tokens", "mask_batch", "mask_head", "mask_query"])
def kernel(
    query,
    key_codes,
    key_scale,
    value_codes,
    value_scale,
    mask,
    length,
    y,
    context,
    tokens,
    mask_batch,
    mask_head,
    mask_query,
):
    """Grid: (ceil(GROUP * tokens / ROWS), B * HEADS).

    tokens: Q. The others are as in `attention_decode`.
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
    vectors = pair.to(tl.int64) * context
    key_codes += vectors * (KEY_SIZE // HALVES)
    value_codes += vectors * (VALUE_SIZE // HALVES)
    mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * GROUP * mask_head
    places = row // tokens * mask_head + row % tokens * mask_query
    key_factor, value_factor = unit * FACTOR, 1.0
    if SCALES == "tensor" or SCALES == "head":
        own_scale = head if SCALES == "head" else 0
        key_factor = tl.load(key_scale + own_scale) * key_factor
        value_factor = tl.load(value_scale + own_scale)
    if SCALES == "token":
        key_scale += vectors * (KEY_SCALED * (2 if OFFSETS else 1))
        value_scale += vectors * (VALUE_SCALED * (2 if OFFSETS else 1))
    reach = context
    if LENGTH:
        reach = tl.load(length).to(tl.int32)
    end = tl.minimum(reach, context)
    before = reach - tokens  # positions before the queries' own, if those are known
    last = before + row % tokens
    first_token = tile * ROWS // GROUP
    final_token = tl.minimum(((tile + 1) * ROWS - 1) // GROUP, tokens - 1)
    begin, seen, stop = 0, 0, end
    if CAUSAL:
        stop = tl.minimum(before + final_token + 1, end)
        if WINDOW:
            begin = tl.maximum(before + first_token + 1 - WINDOW, 0) // BLOCK_T
    if MASK == "none" and not WINDOW:  # how many blocks all rows attend to
        seen = end // BLOCK_T
        if CAUSAL:
            seen = tl.minimum(tl.maximum(before + first_token + 1, 0), end) // BLOCK_T
    blocks = tl.maximum(stop + BLOCK_T - 1, 0) // BLOCK_T
    top, total, sums, shifts, value_unit = beginning(tl.zeros((ROWS,), tl.float32))
    # Scales are read a turn ahead.
    t = begin * BLOCK_T + tl.arange(0, BLOCK_T)
    key_scales = load_scales(key_scale, t, end, KEY_SCALED)
    value_scales = load_scales(value_scale, t, end, VALUE_SCALED)
    for hidden in tl.static_range(2):
        for _ in tl.range(seen if hidden else begin, blocks if hidden else seen):
            ahead = t + BLOCK_T
            next_key_scales = load_scales(key_scale, ahead, end, KEY_SCALED)
            next_value_scales = load_scales(value_scale, ahead, end, VALUE_SCALED)
            top, total, sums, shifts, value_unit = attend(
                t,
                end,
                queries,
                query_sums,
                key_factor,
                key_codes,
                value_codes,
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
            key_scales, value_scales, t = next_key_scales, next_value_scales, ahead
    if SCALES == "token":
        value_factor = value_unit
    sums = scaled(sums, value_factor, shifts)
    for piece in tl.static_range(VALUE_PIECES):
        place = y + rows * VALUE_SIZE
        finish(place, sums[piece], total, row * VALUE_SIZE, live, piece * VALUE_PIECE)
