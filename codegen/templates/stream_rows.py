"""What belongs to rows of a weight and groups of its columns, for `gemm_stream`: scales, offsets, zero points.

They are in lines of 64 rows in shared memory, or of words of four scales; a thread takes those of its two rows, r = 0
and 1, as words that the PTX of `word_decoders` and `field_decoders` takes.
"""

# mypy: ignore-errors
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qcompile.codegen.templates.stream_spread import for_all_words

SPARSE = tl.constexpr(False)
BYTES = tl.constexpr(False)
COLUMNS = tl.constexpr(128)
QUADS = tl.constexpr(0)
SCALES = tl.constexpr("fragments")
PAIRS = tl.constexpr(0)
OFFSET = tl.constexpr(False)
SCALE_BITS = tl.constexpr(16)
SUPER_COLUMNS = tl.constexpr(0)
SYMMETRIC = tl.constexpr(True)
COMPUTE = tl.constexpr(tl.bfloat16)
BLOCK_M = tl.constexpr(64)
SCALE_WORDS = tl.constexpr("")
OFFSET_WORDS = tl.constexpr("")
NEGATIVE = tl.constexpr(0)
FACTOR = tl.constexpr(1.0)

GROUPED = tl.constexpr(SCALES.value != "total")
"""Whether rows have scales of groups of columns; else one, which multiplies the sum."""
PRODUCTS = tl.constexpr(SCALES.value == "products")
"""Whether these multiply products of 64 columns, before they are added; else weights."""
LINE_COLUMNS = tl.constexpr(64 if QUADS.value else COLUMNS.value)
LINE_LENGTH = tl.constexpr(32 * QUADS.value if QUADS.value else 64)
"""Columns whose scales lie together for 64 rows, and how many there are, or words of four."""
GROUPS = tl.constexpr(max(1, 128 // LINE_COLUMNS.value))
ALIKE = tl.constexpr(max(1, 2 // GROUPS.value))
IN_HALF = tl.constexpr(max(1, GROUPS.value // 2))
"""Lines of scales in a step, halves of it that have the same, and lines that a half has."""
SUPERS = tl.constexpr(SUPER_COLUMNS.value > 0)
"""Whether scales (and offsets) are multiplied by those above, of which there is a line for SUPER_COLUMNS."""
SCALE_BYTES = tl.constexpr(LINE_LENGTH.value * (4 if QUADS.value else SCALE_BITS.value // 8) * (1 + OFFSET.value))
ROW_BYTES = tl.constexpr(GROUPS.value * (SCALE_BYTES.value + 64 * (not SYMMETRIC.value)) if GROUPED.value else 0)
"""Of scales, offsets and zero points of 64 rows and 128 columns, of what there is of these."""
RUNS = tl.constexpr(PAIRS.value if PAIRS.value else 2 * QUADS.value)
"""Groups of 64 columns whose scales are spread over the runs of 16 that have them."""
FOUR_WORDS = tl.constexpr((tl.int32,) * 4)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M.value, 16]))
"""Layout of sums [64, BLOCK_M]."""
WHLV = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2]],
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        [[1, 0, 0, 0], [2, 0, 0, 0]],
        [],
        [4, 8, 4, 4],
    )
)
"""The four words of each thread as [warps w, h, l, words v]."""
WHL = gl.constexpr(gl.SliceLayout(3, WHLV.value))
WH = gl.constexpr(gl.SliceLayout(2, WHL.value))
"""One of each thread, and of what belongs to rows w and h."""
SLOTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 8]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[0, 0, 16], [0, 0, 32]],
        [],
        [1, 1, 64],
    )
)
"""What belongs to 64 rows: a thread has its two, r = 0 and 1."""
SUM_ROWS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
QUAD_SLOTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1]] if QUADS.value == 2 else [],
        [[0, 0, 0], [0, 0, 0], [0, 0, QUADS.value], [0, 0, 2 * QUADS.value], [0, 0, 4 * QUADS.value]],
        [[0, 0, 8 * QUADS.value], [0, 0, 16 * QUADS.value]],
        [],
        [1, 1, LINE_LENGTH.value],
    )
)
"""Words of four scales of 64 rows: a thread has those of its two."""


@gluon.jit
def words_of(halves):
    """16-bit numbers of rows w and h in both halves of words, for all that a thread decodes of these rows."""
    if SPARSE:
        halves = for_all_words(halves)
    else:
        halves = gl.expand_dims(gl.convert_layout(halves, WH, assert_trivial=True), 2)
        if not BYTES:
            halves = gl.expand_dims(halves, 3)
    return (halves.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001


@gluon.jit
def two_rows(values):
    """Of what belongs to 64 rows, that of rows r = 0 and r = 1 of threads."""
    return gl.permute(values.load(SLOTS).reshape(4, 2, 8), (0, 2, 1)).split()


@gluon.jit
def runs_of(first, second):
    """Of both groups of words of four scales a number, as one for each run of 16 columns that a thread decodes."""
    each = gl.join(first, second).reshape(4, 8, 1, RUNS)
    if RUNS == 2:
        each = gl.join(each, each).reshape(4, 8, 1, 4)
    return gl.convert_layout(each, WHLV, assert_trivial=True)


@gluon.jit
def quad_rows(quads, supers):
    """Scales of both rows of threads from words of four."""
    words = (quads.load(QUAD_SLOTS).reshape(4, 8, QUADS),)
    if SUPERS:
        words = words + (gl.convert_layout(gl.expand_dims(supers[0], 2), words[0].type.layout, assert_trivial=True),)
    a0, a1, b0, b1 = gl.inline_asm_elementwise(
        SCALE_WORDS,
        "=r,=r,=r,=r,r" + (",r" if SUPERS else ""),
        words,
        dtype=FOUR_WORDS,
        is_pure=True,
        pack=1,
    )
    return runs_of(a0, b0), runs_of(a1, b1)


@gluon.jit
def of_rows(word):
    """What belongs to rows w and h, for what a thread decodes at once."""
    return gl.expand_dims(gl.convert_layout(word, WH, assert_trivial=True), 2)


@gluon.jit
def pairs_of(lines, ASSEMBLY: gl.constexpr):
    """Of a line of scales (or offsets) of both rows the pairs of numbers that they are, each twice in a word."""
    KIND: gl.constexpr = "=r,=r,r" if SCALE_BITS == 32 else "=r,=r,h"
    found = ()
    values = two_rows(lines)
    for r in gl.static_range(2):
        high, low = gl.inline_asm_elementwise(
            ASSEMBLY, KIND, [values[r]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        found = found + (high, low)
    return found


@gluon.jit
def pairs_of_group(lines, stage, row, group: gl.constexpr, ASSEMBLY: gl.constexpr):
    """Pairs of 64 columns' scales (or offsets), of one group after another, of both rows."""
    found = ()
    for i in gl.static_range(IN_HALF):
        found = found + pairs_of(lines.index(stage).slice(row, 1, 0).slice(group + i, 1, 1), ASSEMBLY)
    return found


@gluon.jit
def each_quad(quads):
    """Words of four of threads' rows, one after another."""
    words, found = quads.load(QUAD_SLOTS), ()
    if QUADS == 1:
        found = (gl.convert_layout(words.reshape(4, 8), WH, assert_trivial=True),)
    else:
        first, second = words.reshape(4, 8, 2).split()
        first, second = (
            gl.convert_layout(first, WH, assert_trivial=True),
            gl.convert_layout(second, WH, assert_trivial=True),
        )
        found = (first, second)
    return found


@gluon.jit
def super_rows(above, stage, row):
    """float32 scales above scales (or offsets) of rows r = 0 and r = 1 of threads."""
    first, second = two_rows(above.index(stage).slice(row, 1, 0))
    first = gl.convert_layout(first.to(gl.float32), WH, assert_trivial=True)
    return first, gl.convert_layout(second.to(gl.float32), WH, assert_trivial=True)


@gluon.jit
def load_supers(ring, stage, row, unit):
    """What `load_rows` takes of a step's scales above, the unit before in units of the step's, and this.

    A tile's sums are in units of rows' scales above, or of 1 where these are 0. `load_rows` takes a mask of the scales
    that are multiplied by others than 0, and what is above offsets in these units.
    """
    _, _, above, _, above_offsets = ring[4:]
    first, second = super_rows(above, stage, row)
    found = (gl.where(first == 0.0, 0, 0x00FF00FF) | gl.where(second == 0.0, 0, -0x00FF0100),)
    if OFFSET:
        a, b = super_rows(above_offsets, stage, row)
        a = a * (1.0 / FACTOR) / gl.where(first == 0.0, 1.0, first)
        b = b * (1.0 / FACTOR) / gl.where(second == 0.0, 1.0, second)
        found = found + (a, b)
    values = above.index(stage).slice(row, 1, 0).load(SLOTS).reshape(64)
    values = gl.convert_layout(values, SUM_ROWS, assert_trivial=True).to(gl.float32)
    own = gl.where(values == 0.0, 1.0, values)
    return found, unit / own, own


@gluon.jit
def no_supers():
    """What takes the place of `load_supers` before the first."""
    found = ()
    if SUPERS:
        found = (gl.zeros((4, 8), gl.int32, WH),)
        if OFFSET:
            found = found + (gl.zeros((4, 8), gl.float32, WH), gl.zeros((4, 8), gl.float32, WH))
    return found


@gluon.jit
def load_quads(ring, stage, row, group: gl.constexpr, supers):
    """Words of four scales, the mask of `supers`, and pairs of offsets, as `field_decoders` has PTX that takes them."""
    found = each_quad(ring[4].index(stage).slice(row, 1, 0).slice(group, 1, 1))
    if SUPERS:
        found = found + (supers[0],)
    if OFFSET:
        quads = each_quad(ring[7].index(stage).slice(row, 1, 0).slice(group, 1, 1))
        for i in gl.static_range(QUADS):
            found = found + gl.inline_asm_elementwise(
                OFFSET_WORDS,
                "=r,=r,=r,=r,r,r,r",
                (quads[i], supers[1], supers[2]),
                dtype=FOUR_WORDS,
                is_pure=True,
                pack=1,
            )
    words = ()
    for i in gl.static_range(len(found)):
        words = words + (gl.expand_dims(found[i], 2),)
    return words


@gluon.jit
def load_zeros(zeros, stage, row, group: gl.constexpr):
    """Zero points of both rows, as `word_decoders` has PTX that takes them."""
    first, second = two_rows(zeros.index(stage).slice(row, 1, 0).slice(group, 1, 1))
    first, second = words_of(first.to(gl.int16)), words_of(second.to(gl.int16))
    return (first + NEGATIVE, second + NEGATIVE)


@gluon.jit
def load_pairs(ring, stage, row, group: gl.constexpr):
    """With PAIRS what `field_decoders` has PTX for: zero points, then pairs of scales, then of offsets."""
    scales, zeros, offsets = ring[4], ring[5], ring[7]
    found = ()
    if not SYMMETRIC:
        for i in gl.static_range(IN_HALF):
            found = found + load_zeros(zeros, stage, row, group + i)
    pairs = pairs_of_group(scales, stage, row, group, SCALE_WORDS)
    if OFFSET:
        pairs = pairs + pairs_of_group(offsets, stage, row, group, OFFSET_WORDS)
    if BYTES:
        for i in gl.static_range(len(pairs)):
            found = found + (of_rows(pairs[i]),)
    else:
        for i in gl.static_range(4):
            if PAIRS == 1:
                found = found + (gl.expand_dims(of_rows(pairs[i]), 3),)
            elif PAIRS == 2:
                found = found + (runs_of(pairs[i], pairs[4 + i]),)
            else:
                each = gl.join(gl.join(pairs[i], pairs[8 + i]), gl.join(pairs[4 + i], pairs[12 + i]))
                found = found + (gl.convert_layout(each.reshape(4, 8, 1, 4), WHLV, assert_trivial=True),)
    return found


@gluon.jit
def load_rows(ring, stage, row, group: gl.constexpr, supers):
    """What `decode` takes of a tile's rows, if there are: zero points, and scales of groups unless PRODUCTS.

    They are as `word_decoders` and `field_decoders` have PTX that takes them. supers: of `load_supers`.
    """
    scales, zeros = ring[4], ring[5]
    found = ()
    if PAIRS:
        found = load_pairs(ring, stage, row, group)
    elif QUADS > 0 and BYTES:
        found = load_quads(ring, stage, row, group, supers)
    elif QUADS > 0 and not PRODUCTS:
        found = quad_rows(scales.index(stage).slice(row, 1, 0).slice(group, 1, 1), supers)
    elif GROUPED:
        if not SYMMETRIC:
            found = load_zeros(zeros, stage, row, group)
        if not PRODUCTS:
            first, second = two_rows(scales.index(stage).slice(row, 1, 0).slice(group, 1, 1))
            found = found + (words_of(first.to(COMPUTE)), words_of(second.to(COMPUTE)))
    return found


@gluon.jit
def product_scales(ring, stage, row, group: gl.constexpr):
    """With PRODUCTS the scales of a group of a tile's rows, [64, 1]."""
    if PRODUCTS:
        values = ring[4].index(stage).slice(row, 1, 0).slice(group, 1, 1).load(SLOTS).reshape(64)
        return gl.expand_dims(gl.convert_layout(values, SUM_ROWS, assert_trivial=True).to(gl.float32), 1)
    else:
        return gl.zeros((64, 1), gl.float32, SUMS)
