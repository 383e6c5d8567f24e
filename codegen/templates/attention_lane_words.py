"""Which words of keys, values, scales and queries each thread of `attention_lanes` has, and where they come from.

Thread 4 g + c of a warp has, of the 16 tokens of a step, the keys and all scales of rows g and g + 8, and the values of
rows 2 c, 2 c + 1 and those 8 behind. Four threads share a key, and eight a value; of what has a scale of its own each
has as many bytes.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <attention>
from qcompile.codegen.templates.attention import (
    DIVIDE,
    GROUP,
    GROUP_SIZE,
    HALVES,
    HEADS,
    KEY_BYTES,
    KEY_SCALED,
    KEY_SIZE,
    OFFSETS,
    PAGE,
    QUERIES,
    SCALES,
    VALUE_BYTES,
    VALUE_SCALED,
    VALUE_SIZE,
    WAYS,
    within,
)

# </attention>
# <registers>
from qcompile.codegen.templates.sparse_cores import unjoined

# </registers>

THREADS = tl.constexpr(32 * WAYS.value)
LIVE = tl.constexpr(GROUP.value * QUERIES.value)
"""Queries that there are, of eight."""
KEY_WORDS = tl.constexpr(KEY_SIZE.value // (16 * HALVES.value))
VALUE_WORDS = tl.constexpr(VALUE_SIZE.value // (32 * HALVES.value))
"""That a thread has of a token,"""
KEY_RUN = tl.constexpr(min(KEY_WORDS.value, 4, GROUP_SIZE.value // 16 or 4))
VALUE_RUN = tl.constexpr(min(VALUE_WORDS.value, 4, GROUP_SIZE.value // 32 or 4))
"""and how many of them lie side by side."""
GROUP_WORDS = tl.constexpr(GROUP_SIZE.value // 32 or VALUE_WORDS.value)
"""Words of values, each with those of seven threads, that share scales."""
COMPACT = tl.constexpr(GROUP_SIZE.value > 0 or OFFSETS.value)
"""Whether scales and offsets are bfloat16, not float32."""
KEY_SCALES = tl.constexpr(KEY_SCALED.value * (1 + OFFSETS.value) // (1 + COMPACT.value))
VALUE_SCALES = tl.constexpr(VALUE_SCALED.value * (1 + OFFSETS.value) // (1 + COMPACT.value))
"""Words of a token's scales and offsets."""
PACK = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")


@triton.jit
def packed(first, second):
    """Two numbers in float16, in a word."""
    return tl.inline_asm_elementwise(PACK, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def across(value, DISTANCE: tl.constexpr):
    """What the thread has whose lane differs in one bit."""
    PTX: tl.constexpr = f"shfl.sync.bfly.b32 $0, $1, {DISTANCE}, 0x1f, 0xffffffff;"
    return tl.inline_asm_elementwise(PTX, "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def of_lane(value, lane):
    """What another thread of the warp has."""
    PTX: tl.constexpr = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
    return tl.inline_asm_elementwise(PTX, "=f,f,r", [value, lane], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def page_of(block_table, t, end):
    """The page of the 16 tokens from t."""
    if PAGE == 0:
        return 0
    else:
        return tl.load(block_table + t // PAGE, mask=t < end, other=0)


@triton.jit
def token_of(row):
    """Which of eight tokens a row has: threads with neighbouring c then load values of neighbouring tokens."""
    return row // 2 + row % 2 * 4


@triton.jit
def load_words(
    codes, vector, inside, place, SIZE: tl.constexpr, COUNT: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr
):
    """COUNT words of each thread's vector of SIZE bytes from `place` on, in runs of RUN, the next STEP words behind."""
    own = codes + vector * (SIZE // 4) + place
    found = ()
    for run in tl.static_range(COUNT // RUN):
        source = own[:, None] + (run * STEP + tl.arange(0, RUN)[None, :])
        found += unjoined(tl.load(source, mask=inside[:, None], other=0), RUN)
    return found


@triton.jit
def load_scale_words(scales, vector, inside, COUNT: tl.constexpr):
    """All of a token."""
    RUN: tl.constexpr = min(COUNT, 4)
    return load_words(scales, vector, inside, 0, 4 * COUNT, COUNT, RUN, RUN)


@triton.jit
def vectors_from(page, head, t):
    """What, added to positions of the 16 tokens from t, gives where they lie."""
    if PAGE == 0:
        return 0
    else:
        return (page.to(tl.int64) * HEADS + head) * PAGE - t // PAGE * PAGE


@triton.jit
def load_keys(cache, page, head, t, g, c, begin, end):
    """A thread's words of keys of the 16 tokens from t, of rows g and g + 8, and all of their scales."""
    key_codes, key_scale, _, _, _ = cache
    base = vectors_from(page, head, t)
    keys, scales = (), ()
    for i in tl.static_range(2):
        token = t + token_of(g) + 8 * i
        inside, vector = within(token, begin, end), base + token
        keys += (load_words(key_codes, vector, inside, KEY_RUN * c, KEY_BYTES, KEY_WORDS, KEY_RUN, 4 * KEY_RUN),)
        if SCALES == "token":
            scales += (load_scale_words(key_scale, vector, inside, KEY_SCALES),)
    return keys, scales


@triton.jit
def load_values(cache, page, head, t, g, c, begin, end):
    """A thread's words of values, of its four rows, and all scales of rows g and g + 8."""
    _, _, value_codes, value_scale, _ = cache
    base = vectors_from(page, head, t)
    values, scales = (), ()
    for i in tl.static_range(2 if SCALES == "token" else 0):
        token = t + token_of(g) + 8 * i
        scales += (load_scale_words(value_scale, base + token, within(token, begin, end), VALUE_SCALES),)
    for i in tl.static_range(4):
        token = t + c + (i % 2 * 4 + i // 2 * 8)
        inside, place = within(token, begin, end), VALUE_RUN * g
        own = load_words(value_codes, base + token, inside, place, VALUE_BYTES, VALUE_WORDS, VALUE_RUN, 8 * VALUE_RUN)
        values += (own,)
    return values, scales


@triton.jit
def bfloat16_of(word):
    """Both bfloat16 numbers of a word, in float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def numbers_of(word):
    """Both numbers of a word of queries, in float32."""
    if DIVIDE:
        return bfloat16_of(word)
    else:
        first, second = word.to(tl.int16), (word >> 16).to(tl.int16)
        return first.to(tl.float16, bitcast=True).to(tl.float32), second.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_queries(query, g, c):
    """Elements of query g as words of two in float16, in the order of keys' words; what they are divided by; sums.

    They are divided by a power of two, for bfloat16 (DIVIDE). Sums, where scales have offsets, are of what shares one.
    """
    query = query.to(tl.pointer_type(tl.int32), bitcast=True)
    live = g < LIVE
    words = ()
    for half in tl.static_range(HALVES):
        for run in tl.static_range(KEY_WORDS // KEY_RUN):
            place = 2 * KEY_RUN * c + (half * (KEY_SIZE // 4) + 8 * KEY_RUN * run)
            words += load_words(query, g, live, place, 2 * KEY_SIZE, 2 * KEY_RUN, min(2 * KEY_RUN, 4), 4)
    unit = g.to(tl.float32) * 0.0 + 1.0
    numbers = ()
    for i in tl.static_range(KEY_SIZE // 8):
        numbers += numbers_of(words[i])
    if DIVIDE:
        greatest = unit * 0.0
        for i in tl.static_range(KEY_SIZE // 4):
            greatest = tl.maximum(greatest, tl.abs(numbers[i]))
        greatest = tl.maximum(greatest, across(greatest, 1))
        greatest = tl.maximum(greatest, across(greatest, 2))
        unit = (greatest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit == 0.0, 1.0, unit)
        found = ()
        for i in tl.static_range(KEY_SIZE // 4):
            found += (numbers[i] / unit,)
        numbers = found
    packs, sums = (), ()
    for i in tl.static_range(0, KEY_SIZE // 4, 4):  # of halves of bytes every other one is in a word
        packs += (packed(numbers[i], numbers[i + HALVES]), packed(numbers[i + 3 - HALVES], numbers[i + 3]))
    SHARED: tl.constexpr = KEY_SIZE // (4 * KEY_SCALED)
    for group in tl.static_range(KEY_SCALED if OFFSETS else 0):
        total = unit * 0.0
        for i in tl.static_range(SHARED):
            total += numbers[group * SHARED + i]
        total += across(total, 1)
        sums += (total + across(total, 2),)
    return packs, unit, sums


@triton.jit
def parts_of(number, c):
    """Eight digits of a float32 number for each of three threads, as the bits of bfloat16 in the higher half."""
    first = number.to(tl.int32, bitcast=True) & -65536
    rest = number - first.to(tl.float32, bitcast=True)
    second = rest.to(tl.int32, bitcast=True) & -65536
    third = (rest - second.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) & -65536
    return tl.where(c == 0, first, tl.where(c == 1, second, tl.where(c == 2, third, 0)))


@triton.jit
def offset_factors(sums, c):
    """Second operands that multiply words of offsets, or of a scale and an offset, by sums of queries."""
    found = ()
    if OFFSETS:
        if GROUP_SIZE:
            for i in tl.static_range(0, KEY_SCALED, 2):
                found += (((parts_of(sums[i], c) >> 16) & 0xFFFF) | parts_of(sums[i + 1], c),)
        else:
            found += (parts_of(sums[0], c),)
        if len(found) % 2 == 1:
            found += (c * 0,)
    return found


@triton.jit
def scale_of(words, PLACE: tl.constexpr):
    """A scale or an offset of a token, in float32."""
    if COMPACT:
        return bfloat16_of(words[PLACE // 2])[PLACE % 2]
    else:
        return words[PLACE].to(tl.float32, bitcast=True)
