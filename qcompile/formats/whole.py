"""Formats whose numbers are integers of 8 bits, or halves of such: what products of integers are made of."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats.base import FORMATS
from qcompile.formats.integer import IntegerFormat


@dataclass(frozen=True)
class WholeNumbers:
    """How codes stand for numbers: (entry - bias) * step. Entries, 0 to 255, are codes or what a table has for them."""

    bias: int
    step: float
    table: tuple[int, ...] | None = None


@functools.cache
def whole_numbers(name: str) -> WholeNumbers | None:
    """Of a format by its name; None if its numbers are others, or a code has more than 4 bits and is no integer."""
    fmt = FORMATS[name]
    if isinstance(fmt, IntegerFormat):
        return WholeNumbers(fmt.offset, 1.0)
    if fmt.bits > 4:
        return None
    values = fmt.decode(torch.arange(16, dtype=torch.int32) % (1 << fmt.bits))
    assert isinstance(values, Tensor)
    for step in (1.0, 0.5):
        whole = (values / step).round()
        bias = int(-whole.min())
        if torch.equal(whole * step, values) and int(whole.max()) + bias < 256:
            return WholeNumbers(bias, step, tuple((whole.int() + bias).tolist()))
    return None
