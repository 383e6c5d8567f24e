"""What belongs to blocks of weights in the `fragment` layout of qcompile/layouts.py, and weights: codes, with this.

How scales are applied is said in `gemm_fragment`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from qcompile.codegen.templates.fragment_weights import (
    BITS,
    BLOCK_M,
    BLOCK_N,
    BYTES,
    CHUNK,
    CHUNKS,
    COLUMNS,
    COMPUTE,
    CONSTRAINTS,
    EVEN_K,
    EVEN_N,
    GROUPS,
    HALF_WORDS,
    KT,
    NEGATIVE,
    NT,
    OFFSET,
    QUADS,
    RUN,
    SCALE_TYPE,
    SCALES,
    SUPER_COLUMNS,
    SUPER_GROUPS,
    SUPER_LAST,
    SUPERS,
    TILES_K,
    TILES_N,
    WORDS,
    ZERO_POINTS,
    ZERO_SLOTS,
    V,
    codes_of,
    decode_pair,
    decode_scale,
    each_of,
    extract,
    first_tile,
    four_bits,
    joined,
    place_of,
    quad_words,
    scale_words,
    words_of,
)


@triton.jit
def spread(first, second):
    """Of both groups of each word of `load_quads` a number, as one for each run of 16 columns."""
    each = tl.reshape(tl.join(first, second), (KT, NT, 128, 2 * QUADS, 1))
    return tl.reshape(tl.broadcast_to(each, (KT, NT, 128, 2 * QUADS, COLUMNS // 16)), (KT, NT, 128, V))


@triton.jit
def scales_of_rows(scales):
    """Scales of a chunk for both rows of each thread slot, which broadcast to [K tiles, N tiles, 128 threads, V].

    They are as `scale_words` makes them, or in float32 if codes are decoded without WORDS.
    """
    if QUADS == 0:
        return tl.reshape(scales[0], (1, NT, 128, 1)), tl.reshape(scales[1], (1, NT, 128, 1))
    elif WORDS != "":
        a0, a1, b0, b1 = quad_words(scales[0])
        return spread(a0, b0), spread(a1, b1)
    else:
        a0 = decode_scale((scales[0] & 0xFF).to(tl.uint8))
        a1 = decode_scale(((scales[0] >> 8) & 0xFF).to(tl.uint8))
        b0 = decode_scale(((scales[0] >> 16) & 0xFF).to(tl.uint8))
        b1 = decode_scale(((scales[0] >> 24) & 0xFF).to(tl.uint8))
        return spread(a0, b0), spread(a1, b1)


@triton.jit
def decode_words(planes, zeros, scales):
    """Weights [BLOCK_N, CHUNK] in COMPUTE (or float32), less zero points and, in fragments, times scales.

    zeros, scales: as `load_blocks` has them for a chunk, if there are such.
    """
    if WORDS != "":
        shape: tl.constexpr = (KT, NT, 128, V)
        words = words_of(planes) if BYTES else (planes[0],)
        if ZERO_SLOTS:
            for r in tl.static_range(2):
                bits = tl.reshape(zeros[r].to(tl.int32) * 0x10001 + NEGATIVE, (1, NT, 128, 1))
                bits = tl.broadcast_to(bits, shape)
                words = words + ((each_of(bits)[0],) if BYTES else (bits,))
        if SCALES == "fragments" and BYTES and QUADS > 0:
            words = words + each_of(scales[0])
        elif SCALES == "fragments":
            first, second = scales_of_rows(scales)
            first, second = tl.broadcast_to(first, shape), tl.broadcast_to(second, shape)
            words = words + ((each_of(first)[0], each_of(second)[0]) if BYTES else (first, second))
        found = tl.inline_asm_elementwise(WORDS, CONSTRAINTS, words, dtype=HALF_WORDS, is_pure=True, pack=1)
        if BYTES:
            low, high = joined(found, 0), joined(found, 1)
        else:
            a0, b0, a1, b1, a2, b2, a3, b3 = found
            low = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # s | r
            high = tl.join(tl.join(b0, b2), tl.join(b1, b3))
        low, high = low.to(COMPUTE, bitcast=True), high.to(COMPUTE, bitcast=True)
    else:
        if BITS == 8:
            pairs = extract(planes[0], 8)
        elif BITS == 4:
            pairs = four_bits(planes[0])
        else:
            pairs = codes_of(words_of(planes))
        low, high = decode_pair(pairs)
        if ZERO_SLOTS:
            zero = tl.reshape(tl.join(zeros[0], zeros[1]), (1, NT, 128, 1, 2)).to(low.dtype)
            low = tl.reshape(low, (KT, NT, 128, 2 * V, 2)) - zero
            high = tl.reshape(high, (KT, NT, 128, 2 * V, 2)) - zero
        if SCALES == "fragments":
            first, second = scales_of_rows(scales)
            scale = tl.expand_dims(tl.join(first, second), 4).to(low.dtype)
            low = tl.reshape(low, (KT, NT, 128, V, 2, 2)) * scale
            high = tl.reshape(high, (KT, NT, 128, V, 2, 2)) * scale
    # kt nt | w h l | v s r | b, with n = 64 nt + 16 w + 8 r + h and k = 64 kt + 16 v + 8 s + 2 l + b
    fields = tl.reshape(tl.join(low, high), (KT, NT, 4, 8, 4, V, 2, 2, 2))
    return tl.reshape(tl.permute(fields, (1, 2, 7, 3, 0, 5, 6, 4, 8)), (BLOCK_N, CHUNK))


@triton.jit
def offset_words(quads):
    """Offsets [BLOCK_N, CHUNK] in COMPUTE, UNIT times less, from words of `load_quads`."""
    a0, a1, b0, b1 = quad_words(quads)
    both = tl.join(spread(a0, b0), spread(a1, b1))
    if WORDS != "":
        APART_PTX: tl.constexpr = "mov.b32 {$0, $1}, $2;"
        low, high = tl.inline_asm_elementwise(
            APART_PTX, "=h,=h,r", [both], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
    fields = tl.reshape(tl.join(low, high), (KT, NT, 4, 8, 4, V, 1, 2, 2)).to(COMPUTE, bitcast=True)
    fields = tl.broadcast_to(fields, (KT, NT, 4, 8, 4, V, 2, 2, 2))
    return tl.reshape(tl.permute(fields, (1, 2, 7, 3, 0, 5, 6, 4, 8)), (BLOCK_N, CHUNK))


@triton.jit
def load_rows(values, rows, row_mask, block, COUNT: tl.constexpr):
    """What belongs to rows and to blocks of columns, from [N / 64, COUNT, 64]."""
    source = values + rows // 64 * (COUNT * 64) + rows % 64 + tl.minimum(block, COUNT - 1) * 64
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def load_slots(values, tile_n, block, COUNT: tl.constexpr):
    """The same for the two rows r = 0, 1 of each thread slot: [NT * 128] each."""
    tile, slot = place_of(tile_n, tl.arange(0, NT * 128), 128)
    rows = first_tile(tile_n) * 64 + tile * 64 + slot // 32 * 16 + slot % 32 // 4
    mask = rows < TILES_N * 64
    return load_rows(values, rows, mask, block, COUNT), load_rows(values, rows + 8, mask, block, COUNT)


@triton.jit
def load_blocked(values, rows, row_mask, block):
    """The same of scales or offsets, which may lie in fours."""
    if QUADS == 0:
        return load_rows(values, rows, row_mask, block, GROUPS)
    block = tl.minimum(block, GROUPS - 1)
    row = (rows % 64 // 16 * 8 + rows % 8) * QUADS
    tile = rows // 64 * TILES_K + block // (2 * QUADS)
    source = values + tile * (128 * QUADS) + (row + block // 2 % QUADS) * 4 + block % 2 * 2 + rows % 16 // 8
    if EVEN_N:
        return tl.load(source)
    return tl.load(source, mask=row_mask, other=0)


@triton.jit
def load_quads(scale, tile_n, tile_k):
    """Words of four scales, of two groups and in each two rows: int32 [K tiles, N tiles, 128 threads, QUADS]."""
    each = tl.arange(0, KT * NT * 128)[:, None]
    kt = each // (NT * 128)
    nt, slot = place_of(tile_n, each, 128)
    tile = first_tile(tile_n) + nt
    source = scale.to(tl.pointer_type(tl.int32)) + (tile * TILES_K + tile_k + kt) * (32 * QUADS)
    source += slot // 4 * QUADS + tl.arange(0, QUADS)[None, :]
    if EVEN_K and EVEN_N:
        words = tl.load(source)
    else:
        words = tl.load(source, mask=(tile_k + kt < TILES_K) & (tile < TILES_N), other=0)
    return tl.reshape(words, (KT, NT, 128, QUADS))


@triton.jit
def load_super(super_scale, rows, row_mask, k):
    """float32 scales above the scales (or offsets) of rows at columns k."""
    return load_rows(super_scale, rows, row_mask, k // SUPER_COLUMNS, SUPER_GROUPS).to(tl.float32)


@triton.jit
def load_scale(scale, super_scale, rows, row_mask, k):
    """float32 scales (or offsets) of rows at columns k, times what is above them unless that comes last."""
    values = decode_scale(load_blocked(scale, rows, row_mask, k // COLUMNS))
    if SUPER_GROUPS > 0 and not SUPER_LAST:
        values *= load_super(super_scale, rows, row_mask, k)
    return values


@triton.jit
def load_apart(scale, super_scale, tile_n, k):
    """float32 scales (or offsets) [BLOCK_N, BLOCK_M] of the groups of CHUNK columns from k, each in a column.

    A thread loads those that it multiplies, of two rows and two groups.
    """
    tile, slot = place_of(tile_n, tl.arange(0, NT * 128), 128)
    tile += first_tile(tile_n)
    rows = tile * 64 + slot // 32 * 16 + slot % 32 // 4
    mask, pair = tile < TILES_N, slot % 4
    if QUADS > 0:
        tile_k = tl.minimum(k // 64 + tl.minimum(pair // QUADS, 1), TILES_K - 1)
        source = scale.to(tl.pointer_type(tl.int32)) + (tile * TILES_K + tile_k) * (32 * QUADS)
        source += slot // 4 * QUADS + pair % QUADS
        words = tl.load(source) if EVEN_N else tl.load(source, mask=mask, other=0)
        a0 = decode_scale((words & 0xFF).to(tl.uint8))
        a1 = decode_scale((words >> 8 & 0xFF).to(tl.uint8))
        b0 = decode_scale((words >> 16 & 0xFF).to(tl.uint8))
        b1 = decode_scale((words >> 24 & 0xFF).to(tl.uint8))
    else:
        group = k // COLUMNS + 2 * pair
        a0 = decode_scale(load_rows(scale, rows, mask, group, GROUPS))
        a1 = decode_scale(load_rows(scale, rows + 8, mask, group, GROUPS))
        b0 = decode_scale(load_rows(scale, rows, mask, group + 1, GROUPS))
        b1 = decode_scale(load_rows(scale, rows + 8, mask, group + 1, GROUPS))
    if SUPER_GROUPS > 0 and not SUPER_LAST:
        first, second = load_super(super_scale, rows, mask, k), load_super(super_scale, rows + 8, mask, k)
        a0, a1, b0, b1 = a0 * first, a1 * second, b0 * first, b1 * second
    each = tl.reshape(tl.join(tl.join(a0, b0), tl.join(a1, b1)), (NT, 4, 8, 4, 2, 2))  # nt w h pair | group | r
    return tl.reshape(tl.permute(each, (0, 1, 5, 2, 3, 4)), (BLOCK_N, BLOCK_M))


@triton.jit
def load_blocks(scale, zero_point, offset, super_scale, super_offset, tile_n, n, row_mask, k):
    """What belongs to BLOCK_K columns from k, in a tuple: for each CHUNK its scales, then its offsets or its
    zero points' two slots.

    Scales in fragments are in two slots too, as float32 or as `scale_words` makes them; or as `load_quads` loads them,
    and then offsets, what is above scales, and above offsets.
    """
    found = ()
    for chunk in tl.static_range(CHUNKS):
        first = k + chunk * CHUNK
        if SCALES == "products":
            found = found + (load_scale(scale, super_scale, n, row_mask, first),)
            if OFFSET:
                found = found + (load_scale(offset, super_offset, n, row_mask, first),)
        if SCALES == "sums":
            found = found + (load_apart(scale, super_scale, tile_n, first),)
            if OFFSET:
                found = found + (load_apart(offset, super_offset, tile_n, first),)
        if SCALES == "fragments" and QUADS > 0:
            found = found + (load_quads(scale, tile_n, first // 64),)
            if OFFSET:
                found = found + (load_quads(offset, tile_n, first // 64),)
            if SUPERS:
                found = found + (load_super(super_scale, n, row_mask, first),)
            if SUPERS and OFFSET:
                found = found + (load_super(super_offset, n, row_mask, first),)
        elif SCALES == "fragments":
            r0, r1 = load_slots(scale, tile_n, first // COLUMNS, GROUPS)
            if WORDS != "":
                found = found + (scale_words(r0), scale_words(r1))
            else:
                found = found + (decode_scale(r0), decode_scale(r1))
        if ZERO_SLOTS:
            found = found + load_slots(zero_point, tile_n, first // COLUMNS, GROUPS)
    return found


@triton.jit
def scale_weights(weight, scale, zero_point, offset, super_scale, super_offset, n, row_mask, first_k):
    """Weights [BLOCK_N, CHUNK] less zero points, times scales, plus offsets."""
    k = first_k + RUN * tl.arange(0, CHUNK // RUN)[None, :]
    n, row_mask = n[:, None], row_mask[:, None]
    runs = tl.reshape(weight, (BLOCK_N, CHUNK // RUN, RUN)).to(SCALE_TYPE)
    if ZERO_POINTS:
        runs -= load_rows(zero_point, n, row_mask, k // COLUMNS, GROUPS).to(SCALE_TYPE)[:, :, None]
    runs *= load_scale(scale, super_scale, n, row_mask, k).to(SCALE_TYPE)[:, :, None]
    if OFFSET:
        runs += load_scale(offset, super_offset, n, row_mask, k)[:, :, None]
    return tl.reshape(runs, (BLOCK_N, CHUNK)).to(COMPUTE)
