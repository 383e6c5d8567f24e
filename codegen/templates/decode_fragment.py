"""W [N, K] in a 16-bit type from weights in the `fragment` layout: each code is read once, each element written once.

Codes are decoded and scaled by the functions of `fragment_scales`, in the order of `reference.dequantize`, and rounded
once, to W's type.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <weights>
from qcompile.codegen.templates.fragment_scales import decode_words, scale_weights
from qcompile.codegen.templates.fragment_weights import (
    BLOCK_N,
    CHUNK,
    TILES_N,
    K,
    N,
    load_words,
)

# </weights>


@triton.jit
def kernel(codes, scale, zero_point, offset, super_scale, super_offset, weight):
    """Grid: (ceil(K / CHUNK), ceil(N / BLOCK_N)).

    Pointers that the constants make needless are not read.
    """
    first_k = tl.program_id(0) * CHUNK
    tile_n = tl.program_id(1) * (BLOCK_N // 64)
    n = tile_n * 64 + tl.arange(0, BLOCK_N)
    k = first_k + tl.arange(0, CHUNK)
    values = decode_words(load_words(codes, tile_n, first_k // 64), (), ())
    values = scale_weights(values, scale, zero_point, offset, super_scale, super_offset, n, n < TILES_N * 64, first_k)
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(weight + place, values.to(weight.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
