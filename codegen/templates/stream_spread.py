"""Decoding of 2:4 sparse weights, in the layout `fragment24`, to dense ones: for `gemm_stream`.

What goes through memory stays sparse; tensor cores multiply dense weights, whose operands are registers anyway. Of four
neighbouring columns two threads have two each, and both need the codes that the four keep: they read the same words,
and each takes its own by byte permutations (`word_decoders.spread_assembly`), some five instructions for two weights.
"""

# mypy: ignore-errors
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BITS = tl.constexpr(4)
COMPUTE = tl.constexpr(tl.bfloat16)
SCALES = tl.constexpr("fragments")
WORDS = tl.constexpr("")

# <decoding>
TABLES = tl.constexpr((0, 0, 0, 0))
# </decoding>

# TABLES: of `word_decoders.spread_tables`, those of threads that have the first two of four columns, then the others.
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2]],
        [[0, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 0, 32]],
        [[0, 0, 0, 64], [0, 0, 1, 0]],
        [],
        [1, 1, 2, 128],
    )
    if BITS.value == 4
    else gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4]],
        [[0, 0, 0, 0], [0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 0, 32], [0, 0, 0, 64]],
        [[0, 0, 1, 0], [0, 0, 2, 0]],
        [],
        [1, 1, 4, 128],
    )
)
"""The words of codes of a tile of 64 x 64 that threads read, [w h p s v]; for 4 bits s and halves u of columns."""
PLACES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 0, 16]],
        [[0, 0, 0, 32], [0, 0, 0, 64]],
        [],
        [1, 1, 1, 128],
    )
)
"""The words that say which columns are kept, [w h v]."""
LANES = gl.constexpr(gl.DistributedLinearLayout([], [[1], [2], [0], [0], [0]], [[0], [0]], [], [4]))
OPERANDS_OF_WORDS = tl.constexpr(
    ",".join(["=&h"] * (16 if BITS.value == 4 else 8) + ["r"] * (8 if BITS.value == 4 else 7))
    + ",r,r" * (SCALES.value == "fragments")
)
HALF_WORDS = tl.constexpr((tl.int16,) * (16 if BITS.value == 4 else 8))
PIECES = tl.constexpr(2 if BITS.value == 4 else 4)
"""Runs of columns, of 32 or 16, that are decoded apart."""
SPREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 1]] if BITS.value == 4 else [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2]],
        [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]],
        [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]],
        [],
        [4, 8, 2, 2, PIECES.value],
    )
)
"""What is decoded, [warps w, h, pairs of threads p, threads e of a pair, pieces]."""


@gluon.jit
def for_all_words(rows):
    """What belongs to rows w and h, for all that threads decode of them."""
    return gl.convert_layout(rows.reshape(4, 8, 1, 1, 1), SPREAD, assert_trivial=True)


@gluon.jit
def decode_spread(ring, stage, half: gl.constexpr, tile: gl.constexpr, rows):
    """Weights [64, 64] from the words of half of a stage's tile in shared memory."""
    codes = ring[3][0].index(stage).slice(tile, 1, 0).slice(half, 1, 1).load(CODES)
    places = ring[3][1].index(stage).slice(tile, 1, 0).slice(half, 1, 1).load(PLACES)
    first, second = gl.permute(codes.reshape(4, 8, 2, 1, 2, PIECES), (0, 1, 2, 3, 5, 4)).split()
    first = gl.convert_layout(first, SPREAD, assert_trivial=True)
    second = gl.convert_layout(second, SPREAD, assert_trivial=True)
    lane = gl.convert_layout(gl.arange(0, 4, LANES).reshape(1, 1, 2, 2, 1), SPREAD, assert_trivial=True)
    tables = (
        gl.where(lane % 2 == 0, TABLES[0], TABLES[2]),
        gl.where(lane % 2 == 0, TABLES[1], TABLES[3]),
    )
    if BITS == 4:
        # A thread's columns of 16 are at bits 2 l of each byte; those of the 16 after come to bits 4 of it.
        even, odd = places.reshape(4, 8, 1, 1, 2, 2).split()
        even = gl.convert_layout(even, SPREAD, assert_trivial=True)
        odd = gl.convert_layout(odd, SPREAD, assert_trivial=True)
        a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5, a6, b6, a7, b7 = gl.inline_asm_elementwise(
            WORDS,
            OPERANDS_OF_WORDS,
            (first, second, even, odd, 2 * lane, 2 * lane + 28) + tables + rows,
            dtype=HALF_WORDS,
            is_pure=True,
            pack=1,
        )
        low = gl.join(gl.join(gl.join(a0, a4), gl.join(a2, a6)), gl.join(gl.join(a1, a5), gl.join(a3, a7)))
        high = gl.join(gl.join(gl.join(b0, b4), gl.join(b2, b6)), gl.join(gl.join(b1, b5), gl.join(b3, b7)))
        # w h p e u | s t r | b, with n = 16 w + 8 r + h and k = 32 u + 16 t + 8 s + 4 p + 2 e + b
        fields = gl.join(low.to(COMPUTE, bitcast=True), high.to(COMPUTE, bitcast=True))
        return gl.permute(fields, (0, 7, 1, 4, 6, 5, 2, 3, 8)).reshape(64, 64)
    else:
        # Those of the second row come to bits 4 of the first row's bytes.
        places = gl.convert_layout(places.reshape(4, 8, 1, 1, 4), SPREAD, assert_trivial=True)
        a0, b0, a1, b1, a2, b2, a3, b3 = gl.inline_asm_elementwise(
            WORDS,
            OPERANDS_OF_WORDS,
            (first, second, places, 2 * lane, 2 * lane + 12) + tables + rows,
            dtype=HALF_WORDS,
            is_pure=True,
            pack=1,
        )
        low, high = gl.join(gl.join(a0, a2), gl.join(a1, a3)), gl.join(gl.join(b0, b2), gl.join(b1, b3))
        # w h p e v | s r | b, with k = 16 v + 8 s + 4 p + 2 e + b
        fields = gl.join(low.to(COMPUTE, bitcast=True), high.to(COMPUTE, bitcast=True))
        return gl.permute(fields, (0, 6, 1, 4, 5, 2, 3, 7)).reshape(64, 64)
