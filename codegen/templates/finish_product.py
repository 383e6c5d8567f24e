"""y = epilogue(product [M, N] * x_scale * scale), in float32: what follows a product of torch's.

y is [M, N], or with GATED [M, N / 2]: the epilogue gets a column of the first half and one of the second, or with
PAIRED too, two neighbours.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# <constants>
N = tl.constexpr(256)
X_SCALE = tl.constexpr("token")
SCALED = tl.constexpr(True)
GATED = tl.constexpr(False)
PAIRED = tl.constexpr(False)
BLOCK_M = tl.constexpr(8)
BLOCK_N = tl.constexpr(256)
# </constants>

WIDTH_N = tl.constexpr(N.value // 2 if GATED.value else N.value)
"""Columns of the output."""


# <epilogue>
@triton.jit
def epilogue(value, second, bias, operand_0, n, offsets, mask):
    return value


# </epilogue>


@triton.jit
def load_product(product, x_scale, scale, m, n, mask, M):
    """Columns n of rows m, times their scales."""
    value = tl.load(product + m.to(tl.int64) * N + n, mask=mask, other=0).to(tl.float32)
    if X_SCALE == "tensor":
        value *= tl.load(x_scale)
    if X_SCALE == "token":
        value *= tl.load(x_scale + m, mask=m < M, other=0.0)
    if SCALED:
        value *= tl.load(scale + n, mask=n < N, other=0.0)
    return value


@triton.jit(do_not_specialize=["M"])
def kernel(product, x_scale, scale, bias, operand_0, y, bias_stride, M):
    """Grid: (ceil(M / BLOCK_M), ceil(WIDTH_N / BLOCK_N)).

    x_scale: float32 [M] or [1], by X_SCALE; scale: float32 [N] if SCALED; bias: [N], or of each row, if bias_stride is
    N and not 0. Pointers that the constants make needless are not read.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < WIDTH_N)
    offsets = m.to(tl.int64) * WIDTH_N + n
    bias += tl.minimum(m, M - 1).to(tl.int64) * bias_stride
    value = load_product(product, x_scale, scale, m, 2 * n if PAIRED else n, mask, M)
    second = value
    if GATED:
        second = load_product(product, x_scale, scale, m, 2 * n + 1 if PAIRED else n + WIDTH_N, mask, M)
    value = epilogue(value, second, bias, operand_0, n, offsets, mask)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)
