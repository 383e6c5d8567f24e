"""What results must be, computed apart from qcompile: value tables, loops and float64, no shifts, no masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.packed import PackedWeight


def _integers(bits: int, signed: bool) -> list[float]:
    """Codes count up from the least value."""
    count = 2**bits
    least = -(count // 2) if signed else 0
    return [float(least + i) for i in range(count)]


def _small_float(exponent_bits: int, mantissa_bits: int, specials: str) -> list[float]:
    """All values in the order of codes: sign, exponent, mantissa, as OFP8 (OCP 8-bit floating point 1.0) defines them.

    Args:
        specials: "one_nan", where only the last mantissa of the last exponent is special (E4M3); "ieee", where all of
            the last exponent's are: infinity, then NaN (E5M2); or "none".
    """
    exponents, mantissas = 2**exponent_bits, 2**mantissa_bits
    bias = exponents // 2 - 1
    values = []
    for sign in (1.0, -1.0):
        for exponent in range(exponents):
            for mantissa in range(mantissas):
                fraction = mantissa / mantissas
                last = exponent == exponents - 1
                if specials == "ieee" and last:
                    value = math.inf if mantissa == 0 else math.nan
                elif specials == "one_nan" and last and mantissa == mantissas - 1:
                    value = math.nan
                elif exponent == 0:
                    value = fraction * 2.0 ** (1 - bias)
                else:
                    value = (1.0 + fraction) * 2.0 ** (exponent - bias)
                values.append(sign * value)
    return values


@functools.cache
def _tables() -> dict[str, list[float]]:
    tables = {
        "fp8_e4m3": _small_float(4, 3, "one_nan"),
        "fp8_e5m2": _small_float(5, 2, "ieee"),
    }
    for name, exponent, mantissa in (("fp4_e2m1", 2, 1), ("fp6_e2m3", 2, 3), ("fp6_e3m2", 3, 2)):
        tables[name] = _small_float(exponent, mantissa, "none")
    # The tables as QLoRA's paper, bitsandbytes' documentation and ggml's headers print them.
    positive = "0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434"
    negative = "0.6961928009986877 0.5250730514526367 0.39491748809814453 0.28444138169288635 0.18477343022823334"
    tables["nf4"] = [
        -1.0,
        *(-float(v) for v in negative.split()),
        -0.09105003625154495,
        0.0,
        *(float(v) for v in positive.split()),
        *(0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    twelfths = [torch.tensor(v / 12, dtype=torch.float32).item() for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    tables["fp4"] = twelfths + [-v for v in twelfths]
    tables["iq4_nl"] = [-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    for bits in range(2, 9):
        tables[f"int{bits}"] = _integers(bits, signed=True)
        tables[f"uint{bits}"] = _integers(bits, signed=False)
    return tables


def decode_values(format_name: str) -> Tensor:
    """The value of every code: float64 [2**bits]."""
    return torch.tensor(_tables()[format_name], dtype=torch.float64)


def nearest_code(format_name: str, value: float) -> int:
    """The code whose value is nearest, saturating; of two equally near ones the even code. Finds it by trying all."""
    best, best_distance = -1, math.inf
    finite = [v for v in _tables()[format_name] if math.isfinite(v)]
    clipped = min(max(value, min(finite)), max(finite))
    for code, candidate in enumerate(_tables()[format_name]):
        if not math.isfinite(candidate):
            continue
        distance = abs(candidate - clipped)
        if distance < best_distance or (distance == best_distance and code % 2 == 0 and best % 2 == 1):
            best, best_distance = code, distance
    return best


def nearest_values(format_name: str, x: Tensor) -> Tensor:
    """Each finite element of `x` rounded to the nearest value of the format, ties to even codes: float64, x's shape."""
    table = decode_values(format_name)
    codes = torch.arange(len(table))[table.isfinite()]
    values = table[codes]
    # Of a tie, argmin keeps the first, so list the even codes first.
    order = torch.argsort(codes % 2, stable=True)
    values = values[order]
    flat = x.to(torch.float64).flatten().clamp(values.min(), values.max())
    rounded = [values[(chunk[:, None] - values).abs().argmin(1)] for chunk in flat.split(4096)]
    return (torch.cat(rounded) if rounded else flat).reshape(x.shape)


def expand(per_block: Tensor, granularity: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A value per block, [row blocks, column blocks], at every element of `shape`: float64. -1 is the whole extent."""
    rows, columns = granularity
    row_index = [0 if rows == -1 else i // rows for i in range(shape[0])]
    column_index = [0 if columns == -1 else j // columns for j in range(shape[1])]
    values = per_block.to(torch.float64)
    return values[torch.tensor(row_index, dtype=torch.long)][:, torch.tensor(column_index, dtype=torch.long)]


def dequantize(packed: PackedWeight) -> Tensor:
    """`(value of code - zero point) * scale`, or `value of code * scale + offset`, in float64: [N, K].

    Args:
        packed: in the logical layout. Its tensors alone are read, and its codes unpacked, by code of qcompile.
    """
    scheme, shape = packed.scheme, packed.shape
    block = (scheme.granularity.rows, scheme.granularity.columns)
    above = (1, -1 if scheme.super_scale is None else scheme.super_scale.columns)

    def everywhere(per_block: Tensor, per_super_block: Tensor | None) -> Tensor:
        values = expand(per_block.cpu(), block, shape)
        return values if per_super_block is None else values * expand(per_super_block.cpu(), above, shape)

    values = decode_values(scheme.format.name)[packed.unpack_codes().to(torch.long).cpu()]
    if packed.zero_point is not None:
        values = values - expand(packed.zero_point.cpu(), block, shape)
    values = values * everywhere(packed.scale, packed.super_scale)
    if packed.offset is not None:
        values = values + everywhere(packed.offset, packed.super_offset)
    if packed.perm is None:
        return values
    restored = torch.empty_like(values)
    for column, feature in enumerate(packed.perm.tolist()):
        restored[:, feature] = values[:, column]
    return restored


_FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "swish": lambda t: t.clamp(max=7) / (1 + torch.exp(-1.702 * t.clamp(max=7))),
    "shifted": lambda t: t.clamp(-7, 7) + 1,
}

GPT_OSS = "(min(max(b,-7.0),7.0)+1.0)*(min(a,7.0)*sigmoid(min(a,7.0)*1.702))"
"""The gate of gpt-oss: `shifted` of b times `swish` of a."""


def gate_functions(step: str) -> tuple[str, str]:
    """The names of the functions of a and b, "" if there is none: ("silu", "") of "silu(a)*b"."""
    if step.endswith(GPT_OSS):
        return "swish", "shifted"
    first, second = step.removeprefix("pairs ").split("*")
    return first[: -len("(a)")], second[: -len("(b)")]


def gate_columns(y: Tensor, step: str) -> tuple[Tensor, Tensor]:
    """The columns that are a and those that are b: the halves of [..., N], or after "pairs" every other."""
    first, second = (y[..., ::2], y[..., 1::2]) if step.startswith("pairs ") else torch.chunk(y, 2, -1)
    return first, second


def gate_factors(y: Tensor, step: str) -> tuple[Tensor, Tensor]:
    """The factors that a gate multiplies, from [..., N]."""
    names, parts = gate_functions(step), gate_columns(y.to(torch.float64), step)
    first, second = (_FUNCTIONS[name](part) if name else part for name, part in zip(names, parts, strict=True))
    return first, second


def epilogue(
    product: Tensor, bias: Tensor | None = None, steps: Sequence[str] = (), operands: Sequence[Tensor] = ()
) -> Tensor:
    """The steps of `qcompile.linear_spec.LinearSpec` in float64; "mul" and "add" take the next operand.

    "f(a)*b" and the like multiply the two halves of the columns, one of them through a function, or after "pairs"
    every two neighbours; "to_int8" and the like
    divide by the next operand, and bring the quotient within the format's range, unrounded.
    """
    y = product.to(torch.float64)
    waiting = [o.to(torch.float64).cpu() for o in operands]
    for step in steps:
        if step == "bias":
            assert bias is not None
            y = y + bias.to(torch.float64).cpu()
        elif step == "mul":
            y = y * waiting.pop(0)
        elif step == "add":
            y = y + waiting.pop(0)
        elif "*" in step:
            a, b = gate_factors(y, step)
            y = a * b
        elif step.startswith("to_"):
            values = decode_values(step.removeprefix("to_"))
            finite = values[values.isfinite()]
            y = (y / waiting.pop(0)).clamp(finite.min(), finite.max())
        else:
            y = _FUNCTIONS[step](y)
    assert not waiting, "operands left over"
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    steps: Sequence[str] | None = None,
    operands: Sequence[Tensor] = (),
) -> Tensor:
    """x [..., K] times weight [N, K] transposed, then the steps: float64 [..., N].

    Args:
        steps: None means the bias where there is one.
    """
    if steps is None:
        steps = () if bias is None else ("bias",)
    product = F.linear(x.to(torch.float64).cpu(), weight.to(torch.float64).cpu())
    return epilogue(product, bias, steps, operands)


def quantize_activation(
    x: Tensor, format_name: str, granularity: tuple[int, int], static_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Activations [M, K] rounded to a format, in float64.

    Args:
        granularity: (-1, -1) per tensor, (1, -1) per token, (1, C) per group of C columns of a token.
        static_scale: instead of max|x| / (half the distance from the least to the greatest value).

    Returns:
        the value of each code [M, K] and the scale of each element [M, K]; their product is the dequantized input.
    """
    values = decode_values(format_name)
    finite = values[values.isfinite()]
    reach = (finite.max() - finite.min()).item() / 2
    x = x.to(torch.float64).cpu()
    rows, columns = granularity
    scale = torch.empty_like(x)
    for i in range(x.shape[0]):
        for start in range(0, x.shape[1], x.shape[1] if columns == -1 else columns):
            stop = x.shape[1] if columns == -1 else start + columns
            part = x if rows == -1 else x[i, start:stop]
            top = part.abs().max().item()
            scale[i, start:stop] = static_scale if static_scale is not None else (top / reach or 1.0)
    return nearest_values(format_name, x / scale), scale


def kv_values(codes: Tensor, scale: Tensor, format_name: str, head_dim: int, offsets: bool = False) -> Tensor:
    """Keys or values [B, H, T, D] of a cache's bytes [B, H, T, width], in float64.

    Args:
        scale: [], [H], [B, H, T], or those of groups, and then their offsets if there are any, [B, H, T, n].
    """
    scaled, offset = kv_parts(codes, scale, format_name, head_dim, offsets)
    return scaled + offset


def kv_parts(
    codes: Tensor, scale: Tensor, format_name: str, head_dim: int, offsets: bool = False
) -> tuple[Tensor, Tensor]:
    """The two parts that `kv_values` adds up: codes' values times scales, and offsets."""
    if codes.is_floating_point():  # not quantized
        return codes.to(torch.float64).cpu(), torch.zeros(codes.shape, dtype=torch.float64)
    width = codes.shape[-1]
    table = decode_values(format_name)
    if width == head_dim:
        values = table[codes.long().cpu()]
    else:
        low, high = codes.long().cpu() % 16, codes.long().cpu() // 16
        values = table[torch.cat([low, high], -1)]
    scale = scale.to(torch.float64).cpu()
    if scale.dim() == 4:
        groups = scale.shape[-1] // (2 if offsets else 1)
        each = [part.repeat_interleave(head_dim // groups, -1) for part in scale.split(groups, -1)]
        return values * each[0], each[1] if offsets else torch.zeros_like(values)
    each_scale = {0: lambda: scale, 1: lambda: scale[:, None, None], 3: lambda: scale[..., None]}[scale.dim()]()
    return values * each_scale, torch.zeros_like(values)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    length: int | None = None,
    causal: bool = False,
    window: int = 0,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(query key^T) value in float64, head by head.

    Args:
        query: [B, Hq, Q, D]; key, value: [B, H, T, D] and [B, H, T, Dv]; query head h reads head h // (Hq / H).
        mask: boolean (True: attended) or added, broadcast to [B, Hq, Q, T].
        length, start: positions from `length` on and before `start` are not attended to.
        causal, window: query i stands at position length - Q + i, and attends to the last `window` up to it, or to all.

    Returns:
        the result [B, Hq, Q, Dv], zeros where nothing is attended to; the weights and the scores [B, Hq, Q, T].
    """
    query, key, value = (t.to(torch.float64).cpu() for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    heads = torch.arange(query.shape[1]) // group
    scores = query @ key[:, heads].mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed &= mask.cpu()
    elif mask is not None:
        added = mask.to(torch.float64).cpu()
        scores, allowed = scores + added, allowed & (added != -math.inf)
    position = torch.arange(key.shape[2])
    inside = (position >= start) & (position < (key.shape[2] if length is None else length))
    allowed = allowed & inside
    if causal:
        for i in range(query.shape[2]):
            own = (key.shape[2] if length is None else length) - query.shape[2] + i
            allowed[:, :, i, max(own + 1, 0) :] = False
            if window:
                allowed[:, :, i, : max(own - window + 1, 0)] = False
    scores = scores.where(allowed, torch.tensor(-math.inf, dtype=torch.float64))
    weights = torch.softmax(scores, -1).where(allowed.any(-1, keepdim=True), torch.zeros((), dtype=torch.float64))
    kept = value[:, :, inside]
    return weights[..., inside] @ kept[:, heads], weights, scores
