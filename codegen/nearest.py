"""A format's `encode` as Triton's source: the code nearest to a number, and that code's value."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence

import torch

from qcompile.formats import FloatFormat, Format, IntegerFormat, TableFormat

_HEAD = '''@triton.jit
def nearest(x):
    """The nearest code, int32, and its value, of float32 x; NaN is taken for 0."""
'''


def has_nearest(fmt: Format) -> bool:
    """Whether `nearest` prints a format: integers, and formats of few enough values to compare with each."""
    return isinstance(fmt, (IntegerFormat, TableFormat)) or (isinstance(fmt, FloatFormat) and fmt.dtype is None)


def nearest(fmt: Format) -> str:
    """A Triton function `nearest` that chooses codes as `Format.encode` does; of two zeros, the positive one."""
    lines = ["x = tl.where(x == x, x, 0.0)"]
    if isinstance(fmt, IntegerFormat):
        least = float(-fmt.offset)
        lines.append(f"value = tl.minimum(tl.maximum(x, {least!r}), {least + 2**fmt.bits - 1!r})")
        # The sum's last place is 1, so it is rounded to an integer, half to even.
        lines += [
            "value = (value + 12582912.0) - 12582912.0",
            f"return (value + {float(fmt.offset)!r}).to(tl.int32), value",
        ]
        return _function(lines)
    if isinstance(fmt, TableFormat):
        return _function(
            [*lines, *_compare("x", sorted((v, c) for c, v in enumerate(fmt.values))), "return code, value"]
        )
    assert has_nearest(fmt)
    sign = 1 << (fmt.bits - 1)
    magnitudes = fmt.decode(torch.arange(sign, dtype=torch.int32))
    assert isinstance(magnitudes, torch.Tensor)
    lines += [*_compare("tl.abs(x)", [(value, code) for code, value in enumerate(magnitudes.tolist())])]
    lines.append(f"return tl.where(x < 0, code + {sign}, code), tl.where(x < 0, -value, value)")
    return _function(lines)


def _function(lines: Sequence[str]) -> str:
    return _HEAD + "".join(f"    {line}\n" for line in lines)


def _compare(x: str, ordered: Sequence[tuple[float, int]]) -> list[str]:
    """Lines that find `code` and `value` among some, ordered by value: of a tie that with the even code."""
    value, code = ordered[0]
    lines = [f"size = {x}", f"code = tl.full(x.shape, {code}, tl.int32)"]
    lines.append(f"value = tl.full(x.shape, {value!r}, tl.float32)")
    for (low, odd), (high, code) in itertools.pairwise(ordered):
        middle = (low + high) / 2
        if odd % 2:
            middle = math.nextafter(middle, -math.inf)
        lines.append(f"above = size > {_rounded_down(middle)!r}")
        lines += [f"code = tl.where(above, {code}, code)", f"value = tl.where(above, {high!r}, value)"]
    return lines


def _rounded_down(value: float) -> float:
    """The greatest float32 that is not greater: float32 numbers are above both or above none."""
    (near,) = struct.unpack("<f", struct.pack("<f", value))
    if near <= value:
        return float(near)
    (bits,) = struct.unpack("<i", struct.pack("<f", near))
    (below,) = struct.unpack("<f", struct.pack("<i", bits - 1 if near > 0 else bits + 1))
    return float(below)
