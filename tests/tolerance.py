"""Every error bound of the tests, each with its derivation. No other file states a tolerance.

Two budgets, never mixed: *rounding* of a kernel against the float64 oracle of the very numbers it was given
(`gemm_bound`, `epilogue_bound`), and *quantization*, how far the codes may be from the original (`weight_bound`,
`activation_bound` element by element; `sqnr_floor` in the mean).

Notation: u is a type's unit roundoff, eta its least positive subnormal. Rounding x to nearest errs by at most
max(u |x|, eta / 2). `gamma(n) = n u / (1 - n u)` bounds the relative error of n roundings one after another
(N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests import oracle

U32 = 2.0**-24
ACCUMULATE_UNIT = 2.0**-23
"""Relative error of an addition in float32 that may truncate, as matrix units do: twice that of rounding to nearest."""

TF32X3_UNIT = 2.0**-20
"""Relative error of a float32 number times 1 by three TF32 products. TF32 keeps 11 digits: cutting x to that leaves a
rest of less than 2**-10 |x|, and cutting the rest in the same way loses less than 2**-10 of it. Both parts add exactly.
"""

PAIR_UNIT = 2.0**-15
"""Relative error of a weight, before it is rounded, whose scale S is the sum of two numbers of bfloat16, of 8 digits:
S less the first is 2**-8 |S| at most, so that rounding this to the second errs by 2**-16 |S|, and rounding the code
times the second by 2**-16 of the weight.
"""


def unit(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return float(torch.finfo(dtype).eps) / 2


def eta(dtype: torch.dtype) -> float:
    """The least positive subnormal."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps)


def gamma(count: int, roundoff: float = ACCUMULATE_UNIT) -> float:
    """n u / (1 - n u)."""
    assert count * roundoff < 1
    return count * roundoff / (1 - count * roundoff)


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Greatest error of rounding |x| to `dtype`."""
    return (x.abs() * unit(dtype)).clamp(min=eta(dtype) / 2)


def gemm_bound(
    x: Tensor,
    weight: Tensor,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype = torch.float32,
    *,
    block: int | None = None,
    accumulate_unit: float = ACCUMULATE_UNIT,
    scale_unit: float = 0.0,
    units: int = 0,
) -> Tensor:
    """Greatest error of a kernel's `x @ weight.T` against the float64 product of the same x and weight: float64 [M, N].

    With x' = x + dx and w' = w + dw the inputs as multiplied, and S = sum_k |x'| |w'|:

        |error| <= sum_k (|dx| |w'| + |x| |dw|) + gamma(d) S, then output rounding u_out |y| + eta_out / 2

    * dx: the actual rounding of x to `compute_dtype`; 0 where it is exact.
    * dw: dequantizing in float32 takes at most 3 roundings (subtract, multiply, and one for a second association of the
      scale), then one to `compute_dtype`: |dw| <= u_c |w| + gamma32(3) |w| + eta_c / 2. A kernel that multiplies codes
      exactly and applies the scale to partial sums makes 2 roundings more a term, counted in d.
    * d: additions on the longest way from a product to the sum. K in any order; with summation in blocks of b,
      b + ceil(K / b). 3 more for the product (not exact in float32 when the inputs are float32) and the scales.

    Args:
        x, weight: [M, K], [N, K]; the weight as the oracle dequantized it.
        compute_dtype: of the operands of the multiplication.
        block: terms that are summed before their sum is added to the rest, if the kernel does that.
        accumulate_unit: relative error of one addition. 2**-13 for Hopper's FP8 matrix unit, which keeps 14 bits.
        scale_unit: relative error of a weight beyond dw: `PAIR_UNIT` where scales are pairs of bfloat16.
        units: how often sums are multiplied by a quotient, if they are in units that change: a division within 2 units
            in the last place, and a product, which are less than 3 additions more in d.
    """
    x, weight = x.to(torch.float64).cpu().flatten(0, -2), weight.to(torch.float64).cpu()
    rounded_x = x.to(compute_dtype).to(torch.float64)
    dx = (rounded_x - x).abs()
    dw = weight.abs() * (unit(compute_dtype) + gamma(3, U32) + scale_unit) + eta(compute_dtype) / 2
    w_magnitude = weight.abs() + dw
    inner = x.shape[1]
    depth = 3 + 3 * units + (inner if block is None else block + math.ceil(inner / block))
    total = dx @ w_magnitude.T + x.abs() @ dw.T
    total += gamma(depth, accumulate_unit) * (rounded_x.abs() @ w_magnitude.T)
    y = (x @ weight.T).abs()
    total += inner * 2.0**-52 * (x.abs() @ weight.abs().T)  # the oracle's own rounding
    return total + unit(out_dtype) * (y + total) + eta(out_dtype) / 2


def offset_bound(
    x: Tensor, scaled: Tensor, offset: Tensor, rounded: torch.dtype = torch.float32, *, pairs: bool = False
) -> Tensor:
    """What a product errs by beyond `gemm_bound` if weights are `scaled` + `offset`: float64 [M, N].

    The two may cancel, so their roundings in float32 (two of each: a scale of scales, and the product with the code;
    one of the sum) are relative to their own magnitudes: sum_k |x| gamma32(3) (|scaled| + |offset|). A kernel that
    rounds `scaled` to a narrower type, whose unit is u, and sums both by themselves in float32 adds
    sum_k |x| u |scaled| + gamma(K + 3) sum_k |x| (|scaled| + |offset|).

    Args:
        x, scaled, offset: [M, K], [N, K], [N, K].
        rounded: the type to which `scaled` is rounded.
        pairs: whether scales and offsets are sums of two numbers of bfloat16, so that each part errs by `PAIR_UNIT`,
            and their sum is rounded twice: with the greater numbers, and when the rest is added.
    """
    twice = unit(torch.bfloat16) * (x.abs().to(torch.float64) @ (scaled + offset).abs().to(torch.float64).T)
    x, scaled, offset = (part.to(torch.float64).abs() for part in (x, scaled, offset))
    bound = gamma(3, U32) * (x @ (scaled + offset).T)
    if pairs:
        bound += twice + PAIR_UNIT * (x @ (scaled + offset).T)
    if rounded != torch.float32:
        bound += unit(rounded) * (x @ scaled.T) + gamma(x.shape[1] + 3) * (x @ (scaled + offset).T)
    return bound


SLOPE = {
    "relu": 1.0,
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "silu": 1.1,
    "tanh": 1.0,
    "sigmoid": 0.25,
    "swish": 1.1,
    "shifted": 1.0,
}
"""Greatest |derivative|: gelu 1.12890 at sqrt(2), gelu_tanh 1.12898, silu 1.09984 at 2.39936, and so has
swish, t sigmoid(c t), at c times that."""

FUNCTION_ERROR = 16 * U32
"""Absolute error of erf, tanh or sigmoid in float32, all of range 1: 4 u for the function in the libraries at hand
(2 ulp on CUDA), up to 4 u when tanh is made of a sigmoid, and 8 u for the argument: its relative error of 6 u at most,
times max |z f'(z)| < 1.
"""


def epilogue_bound(
    product: Tensor,
    bound: Tensor,
    bias: Tensor | None = None,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`bound`, the error of `product`, through the steps in float32 and rounding to `out_dtype`: float64 [M, N].

    * adding t: the error stays, plus rounding u32 (|y + t| + error);
    * multiplying by t: the error times |t|, plus rounding u32 |y t|;
    * a function f: the error times max |f'|, plus evaluation: FUNCTION_ERROR for tanh, sigmoid and
      `oracle.GPT_OSS`'s sum, of at most 8, FUNCTION_ERROR |y| for gelu, silu and swish (y times a function of range 1),
      nothing for relu;
    * a gate a b of columns that err by d and e: |a| e + |b| d + d e, plus rounding u32 (|a b| + that);
    * storing codes: the quotient y / s errs by the error over s, and by 4 u32 for a division within 2 units in the last
      place; bringing it into the range moves no two numbers apart; then rounding to the format.

    Args:
        product: float64 [M, N], exact.
        bound: its greatest error, `gemm_bound` with `out_dtype` float32.
    """
    y, error = product.to(torch.float64).cpu(), bound.clone()
    waiting = [o.to(torch.float64).cpu() for o in operands]
    functions = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "swish": lambda t: t.clamp(max=7) * torch.sigmoid(1.702 * t.clamp(max=7)),
        "shifted": lambda t: t.clamp(-7, 7) + 1,
    }

    def apply(step: str, y: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        evaluation = FUNCTION_ERROR * (
            torch.ones_like(y) if step in ("tanh", "sigmoid", "shifted") else y.abs() + error
        )
        return functions[step](y), SLOPE[step] * error + (0 if step == "relu" else evaluation)

    for step in steps:
        if step in ("bias", "add"):
            y = y + (bias.to(torch.float64).cpu() if step == "bias" and bias is not None else waiting.pop(0))
            error = error + U32 * (y.abs() + error)
        elif step == "mul":
            operand = waiting.pop(0)
            y, error = y * operand, error * operand.abs()
            error = error + U32 * (y.abs() + error) + eta(torch.float32) / 2
        elif "*" in step:
            columns = oracle.gate_columns(y, step), oracle.gate_columns(error, step)
            parts = zip(oracle.gate_functions(step), *columns, strict=True)
            (a, d), (b, e) = (apply(name, part, of_part) if name else (part, of_part) for name, part, of_part in parts)
            y, error = a * b, a.abs() * e + b.abs() * d + d * e
            error = error + U32 * (y.abs() + error) + eta(torch.float32) / 2
        elif step.startswith("to_"):
            scale = waiting.pop(0)
            quotient = oracle.epilogue(y, steps=(step,), operands=(scale,))
            error = error / scale + 4 * U32 * ((y / scale).abs() + error / scale)
            if step == "to_int8":
                return error + 0.5
            return error + rounding(
                quotient.abs() + error, getattr(torch, {"to_fp8_e4m3": "float8_e4m3fn"}.get(step, "float8_e5m2"))
            )
        else:
            y, error = apply(step, y, error)
    return error + rounding(y.abs() + error, out_dtype)


def float_bound(reference: Tensor, reassociations: int, dtype: torch.dtype, magnitude: Tensor | None = None) -> Tensor:
    """Greatest difference of two evaluations in `dtype` of one expression of nonnegative `magnitude`, float64.

    Two sums of n terms in different orders differ by at most 2 gamma(n) sum |terms|.

    Args:
        reference: the result, and its magnitude unless that is given.
        reassociations: n.
        magnitude: the sum of the absolute terms.
    """
    size = (reference if magnitude is None else magnitude).to(torch.float64).abs()
    return 2 * gamma(reassociations, unit(dtype)) * size + eta(dtype)


def attention_bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    scores: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    compute_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
    query_step: float = 0.0,
    query_unit: float = 0.0,
    weight_step: float | None = None,
    weighted: Tensor | None = None,
    accumulate_unit: float = ACCUMULATE_UNIT,
    magnitudes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Greatest error of softmax(query key^T) value against float64 for the same keys: float64 [B, Hq, Q, Dv].

    * A score errs by e: `gemm_bound` of its product times the scale, and where queries are rounded to multiples of a
      part of their greatest element (`query_step` is half that part), that times sum |k|; where their elements are
      rounded with the unit roundoff `query_unit`, that times sum |q| |k|; gamma32(5) |s| for the scales and the factor
      that makes exp a power of two; for a soft cap c, whose slope is at most 1, FUNCTION_ERROR c and gamma32(3) |s|
      more; u32 (|s| + e) where a mask is added. (A finite mask that leaves no weight is like -inf.)
    * A weight is exp(s) / sum exp(s). If all scores err by at most E, it errs by a factor of at most exp(2 E).
    * exp in float32: 4 u32 (|s - max| + 2), for numerator and denominator. Sums are rescaled when the greatest score so
      far changes; along T / 16 + 64 blocks and splits these factors add up to 4 u32 (R + 2 blocks), R the range of
      scores that have weight.
    * Weights are rounded to `weight_dtype`, of which the greatest is 1 and the sum at least that, so that what is
      subnormal loses at most `weight_step`, eta_w / 2 unless given, of the sum; values are dequantized with 3
      roundings; both sums take T + blocks additions. With an `accumulate_unit` of their own, products add up in blocks
      of at most 128 tokens, and those in float32.

    So |error| <= (exp(2 E) (1 + exp parts)^2 (1 + u_w) (1 + gamma32(3)) / (1 - gamma(T + blocks))^2 - 1) sum p |v|,
    and eta_w / 2 sum |v|, then rounding.

    Args:
        key, value: float64 as the oracle dequantized them; weights, scores: the oracle's.
        magnitudes: what roundings in keys and values are relative to, if not to themselves: sums of the magnitudes of
            parts that are multiplied apart.
        weighted: what `weight_step` is a part of, if not values: those of codes times the greatest scale, where scales
            multiply weights.
        accumulate_unit: see `gemm_bound`.
    """
    key_magnitude, value_magnitude = (key.abs(), value.abs()) if magnitudes is None else magnitudes
    query, key, value = (t.to(torch.float64).cpu() for t in (query, key, value))
    batch, heads, context, _ = key.shape
    rows = query.unflatten(1, (heads, -1)).flatten(2, 3)
    pairs = zip(rows.flatten(0, 1), key_magnitude.flatten(0, 1), strict=True)
    products = torch.stack([gemm_bound(q, k, compute_dtype, accumulate_unit=accumulate_unit) for q, k in pairs])
    products = products.unflatten(0, (batch, heads))
    step = rows.abs().amax(-1, keepdim=True) * query_step
    products = products + step * key_magnitude.sum(-1)[:, :, None] + query_unit * (rows.abs() @ key_magnitude.mT)
    products = products.reshape(scores.shape)
    live = weights > 0
    s = scores.where(live, torch.zeros_like(scores))
    raw = (rows @ key.mT).reshape(scores.shape).abs() * abs(scale)
    error = products * abs(scale) + gamma(5, U32) * raw
    if softcap:
        error = error + softcap * FUNCTION_ERROR + gamma(3, U32) * softcap
    error = error + U32 * (s.abs() + raw + error)
    worst = error.where(live, torch.zeros_like(error)).amax(-1, keepdim=True)
    top = s.where(live, torch.full_like(s, -math.inf)).amax(-1, keepdim=True)
    spread = (top - s).where(live, torch.zeros_like(s)).amax(-1, keepdim=True)
    blocks = context / 16 + 64
    evaluated = 1 + 4 * U32 * (2 * spread + 2 + 2 * blocks)
    sums = (1 - gamma(int(context + blocks))) ** 2
    if accumulate_unit != ACCUMULATE_UNIT:
        sums *= 1 - gamma(min(context, 128), accumulate_unit)
    factor = torch.exp(2 * worst) * evaluated**2 * (1 + unit(weight_dtype)) * (1 + gamma(3, U32)) / sums - 1
    group = query.shape[1] // heads
    spread_heads = torch.arange(query.shape[1]) // group
    total = weights @ value_magnitude[:, spread_heads]
    result = (weights @ value[:, spread_heads]).abs()
    weight_step = eta(weight_dtype) / 2 if weight_step is None else weight_step
    weighted = value_magnitude if weighted is None else weighted
    bound = factor * total + weight_step * (live.to(torch.float64) @ weighted[:, spread_heads])
    return bound + rounding(result + bound, out_dtype)


def scale_bound(spread: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """How far a stored scale may be from the exact one: its division in float32, then its rounding; float64."""
    exact = spread.to(torch.float64)
    return gamma(2, U32) * exact + rounding(exact, scale_dtype)


def weight_bound(values: Tensor, weight: Tensor, scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Greatest distance of a weight to its nearest code, element by element: float64 of weight's shape.

    Within the range of the format half the gap between the values around it. The greatest element of a block is at the
    format's reach R (half of greatest minus least) times the exact scale, so it may lie outside by half a step
    (integers, whose least and greatest value differ in magnitude by one step), and by what the scale lost in rounding,
    R times `scale_bound`. The division by the scale and the product in float32 add 2 u32 of what is divided, at most
    2 R steps.

    Args:
        values: the format's values, float64 (`oracle.decode_values`).
        weight: the original.
        scale: the stored scale of each element, of weight's shape; not 0.
    """
    finite = values[values.isfinite()].unique()
    reach = (finite.max() - finite.min()).item() / 2
    scale = scale.to(torch.float64)
    position = weight.to(torch.float64) / scale
    above = torch.searchsorted(finite, position.contiguous()).clamp(1, len(finite) - 1)
    gap = finite[above] - finite[above - 1]
    outside = reach * scale_bound(scale, scale_dtype)
    return scale * (gap / 2 + 2 * reach * gamma(4, U32)) + 2 * outside


def activation_bound(values: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Greatest distance of an activation to its nearest code with a dynamic float32 scale; see `weight_bound`."""
    return weight_bound(values, x, scale, torch.float32)


def sqnr(original: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(sum x^2 / sum (x - q)^2)."""
    original, quantized = original.to(torch.float64).cpu(), quantized.to(torch.float64).cpu()
    noise = (original - quantized).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(original.square().sum().item() / noise)


def crest_squared(count: int) -> float:
    """Bound on E[max_i x_i^2] of `count` standard normal numbers: 2 ln n + 2.

    P(x^2 > t) <= exp(-t / 2), so E[max] <= t0 + integral from t0 of n exp(-t / 2), least at t0 = 2 ln n.
    """
    return 2 * math.log(count) + 2


def uniform_sqnr_floor(bits: int, block: int) -> float:
    """Least SQNR in dB of Gaussian weights in `bits`-bit integers with a scale for each `block` of them.

    The step is D = max|x| / ((2^b - 1) / 2), its noise D^2 / 12 (B. Widrow, 1956: for Gaussians it holds within a
    percent up to D = 2 sigma), and E[max^2] <= crest_squared(block), so with c^2 the crest factor's square

        SQNR >= 10 log10(3 (2^b - 1)^2 / c^2) = about 6.02 b + 4.77 - 10 log10(c^2)

    less 0.3 dB for scales in 16 bits and for what is clipped at the range's end. An asymmetric range, greatest minus
    least, is at most twice the greatest magnitude, so the floor holds for it too, less its zero point's rounding, which
    is among the 0.3 dB.
    """
    return 10 * math.log10(3 * (2**bits - 1) ** 2 / crest_squared(block)) - 0.3


def float_sqnr_floor(mantissa_bits: int) -> float:
    """Least SQNR in dB of numbers in a floating format with m mantissa bits, its subnormals aside.

    In [2^e, 2^(e+1)) the step is 2^(e-m), the noise 4^(e-m) / 12, and a square at least 4^e: SQNR >= 10.79 + 6.02 m dB,
    less 0.3 dB for 16-bit scales and subnormals.
    """
    return 10 * math.log10(12 * 4.0**mantissa_bits) - 0.3


_MANTISSAS = {"fp8_e4m3": 3, "fp8_e5m2": 2}


def table_sqnr_floor(values: Tensor, block: int) -> float:
    """Least SQNR in dB of Gaussian weights rounded to the nearest of `values`, scaled to reach the greatest.

    The expected noise of a Gaussian whose deviation is the greatest value over the crest factor, by numerical
    integration; less 0.3 dB for 16-bit scales, and 0.3 for the spread of the greatest magnitude about its mean.
    """
    sigma = values.abs().max().item() / math.sqrt(crest_squared(block))
    x = torch.linspace(-6 * sigma, 6 * sigma, 20001, dtype=torch.float64).clamp(values.min(), values.max())
    density = torch.exp(-((x / sigma) ** 2) / 2)
    noise = (x[:, None] - values).abs().amin(1).square()
    return 10 * math.log10(sigma**2 * density.sum().item() / (density * noise).sum().item()) - 0.6


def sqnr_floor(format_name: str, block: int) -> float:
    """Least SQNR in dB of Gaussian weights, rounded to nearest, with a scale for each `block` weights."""
    if format_name in _MANTISSAS:
        return float_sqnr_floor(_MANTISSAS[format_name])
    if "int" not in format_name:
        return table_sqnr_floor(oracle.decode_values(format_name), block)
    bits = int(format_name.removeprefix("u").removeprefix("int"))
    return uniform_sqnr_floor(bits, block)


def rewrite_sqnr_floor(depth: int, inner: int) -> float:
    """Least SQNR in dB between two float32 evaluations of a program of `depth` operators with sums of `inner` terms.

    An operator errs relative to its result by at most gamma32(inner) in norm, on each side, so by 2 gamma32(inner)
    between the two; to first order the relative errors of `depth` operators in a row add up. Cancellation of whole
    values (a - a) would break this and does not arise from random weights.
    """
    return -20 * math.log10(depth * 2 * gamma(inner, U32))


def rounded_sqnr_floor(depth: int, dtype: torch.dtype) -> float:
    """Least SQNR in dB between two evaluations of a program whose `depth` operators in a row round to `dtype`.

    Roundings are taken as independent, of mean zero and variance u^2 / 3 relative to what is rounded, on both sides, so
    that their powers add. A product of two tensors passes on both's, which doubles them at most. A quarter more in norm
    is for chance.
    """
    return -10 * math.log10(depth * 2 * 2 * unit(dtype) ** 2 / 3) - 20 * math.log10(1.25)


def chain_sqnr_floor(floor: float, depth: int) -> float:
    """Least SQNR in dB of a program whose `depth` layers in a row each have `floor`.

    Their errors are independent, so that powers add; products of two tensors double them at most.
    """
    return floor - 10 * math.log10(2 * depth)


def half_sqnr_floor(depth: int) -> float:
    """Least SQNR in dB where one side looks `depth` functions in a row up in float16, the other computes them.

    The input is rounded to float16 and so is the output; a function like GELU passes relative errors on at most
    doubled, in norm: 3 units of roundoff a function.
    """
    return -20 * math.log10(depth * 3 * unit(torch.float16))


def product_sqnr_floor(weight_floor: float, activation_floor: float = math.inf) -> float:
    """Least SQNR in dB of `x @ w.T`: independent noises of mean zero, whose powers add; less 0.5 dB for chance."""
    return -10 * math.log10(10 ** (-weight_floor / 10) + 10 ** (-activation_floor / 10)) - 0.5


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element within its bound; the message names the worst one."""
    actual, expected = actual.detach().to(torch.float64).cpu(), expected.to(torch.float64).cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    bound = bound.reshape(expected.shape)
    excess = (actual - expected).abs() - bound
    excess = torch.where(actual == expected, torch.full_like(excess, -1.0), excess)
    if excess.numel() and not bool((excess <= 0).all()):
        flat = int(excess.nan_to_num(math.inf).argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape))
        raise AssertionError(
            f"at {where}: {actual[where].item()!r}, expected {expected[where].item()!r} "
            f"within {bound[where].item():.3g}; {int((~(excess <= 0)).sum())} of {excess.numel()} outside"
        )


def quadratic_bound(error: Tensor, hessian: Tensor) -> Tensor:
    """How far sum_rows e H e^T in float32 may be from the exact sum: float64 [].

    Two products of K terms and a sum over the elements of a row, each in any order, then one over the rows:
    gamma(2 K + N + 3) of the sum of magnitudes. The error e itself is one subtraction of numbers that are near each
    other, whose relative error of U32 (twice, since e stands twice) is in the 3.
    """
    rows, columns = error.shape
    magnitude = ((error.abs() @ hessian.abs()) * error.abs()).sum()
    return gamma(2 * columns + rows + 3) * magnitude


def inverse_bound(matrix: Tensor) -> float:
    """Greatest element of |A^-1 A - 1| where a positive definite A [K, K] was inverted and factored in float32.

    Two Cholesky factorizations and an inversion, each with a backward error of at most gamma(K + 1) K |A| in norm
    (N. J. Higham, Accuracy and Stability, 2nd edition, theorems 10.3 and 14.1), times the condition number.
    """
    size = matrix.shape[0]
    return 3 * size * gamma(size + 1) * float(torch.linalg.cond(matrix))
