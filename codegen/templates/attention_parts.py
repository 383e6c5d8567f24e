"""How programs that share a head's context put their results together, in both kernels of attention.

Each leaves its part in memory, and the last to arrive adds all of them in their order, so that results do not depend on
timing. What a thread has of all parts are the same elements, so that adding them is its own affair.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    BLOCK_V,
    LIVE_ROWS,
    QUERIES,
    ROWS,
    SPLIT,
    VALUE_PIECE,
    VALUE_PIECES,
    VALUE_SIZE,
    finish,
    finite,
    row_of,
)

# </attention>

STORED_ROWS = tl.constexpr(LIVE_ROWS.value if QUERIES.value else ROWS.value)
KEPT_ROWS = tl.constexpr(1 << (LIVE_ROWS.value - 1).bit_length() if QUERIES.value else ROWS.value)
"""Rows of a part, and how many there is room for: a power of two."""
TOPS = tl.constexpr(KEPT_ROWS.value * VALUE_PIECES.value * BLOCK_V.value)
PART = tl.constexpr(TOPS.value + 2 * KEPT_ROWS.value)
"""What a program leaves: sums of weighted values, then the greatest score and the sum of weights of each row."""
MOST = tl.constexpr(8192 if VALUE_PIECES.value <= 2 and VALUE_SIZE.value <= 128 else 3584)
"""Numbers of several parts that registers hold beside the rest."""
AT_ONCE = tl.constexpr(max(1, min(SPLIT.value, MOST.value // TOPS.value)))
"""Parts that are read at once,"""
ADDED_ROWS = tl.constexpr(
    KEPT_ROWS.value if QUERIES.value else min(ROWS.value, 1 << ((8192 * ROWS.value // TOPS.value).bit_length() - 1))
)
"""and of how many of their rows."""


@triton.jit
def leave_part(part, top, total, sums):
    """Store a part."""
    row = tl.arange(0, ROWS)
    live = row < STORED_ROWS
    cells = row[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    for piece in tl.static_range(VALUE_PIECES):
        own = part + piece * KEPT_ROWS * BLOCK_V
        tl.store(own + cells, sums[piece], mask=live[:, None], cache_modifier=".cg")
    tl.store(part + TOPS + row, top, mask=live, cache_modifier=".cg")
    tl.store(part + TOPS + KEPT_ROWS + row, total, mask=live, cache_modifier=".cg")


@triton.jit
def load_parts(partial, first, sharers, row):
    """Some rows of parts from `first` on: the greatest scores, sums of weights, and pieces of sums of values."""
    cells = row[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    found = ()
    for i in tl.static_range(AT_ONCE):
        part = partial + (first + i) * PART
        known = row < STORED_ROWS
        if AT_ONCE > 1:
            known = known & (first + i < sharers)
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


@triton.jit
def put_together(y, partial, arrived, sharers, cell, tokens):
    """After `leave_part`, by the last program of its sharers: the results of all of their parts in their order.

    cell: the first of a program's; see `row_of`.
    """
    tl.debug_barrier()  # all stores of this program come before its arrival
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == sharers - 1:
        for first in tl.range(0, KEPT_ROWS, ADDED_ROWS):
            place = first + tl.arange(0, ADDED_ROWS)
            row, live = row_of(cell + place, tokens)
            best = tl.zeros((ADDED_ROWS,), tl.float32) + float("-inf")
            whole = tl.zeros((ADDED_ROWS,), tl.float32)
            added = ()
            for _ in tl.static_range(VALUE_PIECES):
                added += (tl.zeros((ADDED_ROWS, BLOCK_V), tl.float32),)
            for some in tl.range(0, sharers, AT_ONCE):
                best, whole, added = add_parts(best, whole, added, load_parts(partial, some, sharers, place))
            for piece in tl.static_range(VALUE_PIECES):
                finish(y, added[piece], whole, row * VALUE_SIZE, live, piece * VALUE_PIECE)
        tl.store(arrived, 0)
