"""Affine integers of 2 to 8 bits. Signed ones are stored with an offset of half their range (offset binary)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.expr import Value, cast
from qcompile.formats.base import Format, register


@dataclass(frozen=True)
class IntegerFormat(Format):
    """`int4` holds -8 .. 7 as codes 0 .. 15; `uint4` holds 0 .. 15 and goes with a zero point."""

    signed: bool

    @property
    def offset(self) -> int:
        """What is subtracted from a code: half the range if signed, else 0."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def absmax(self) -> float:
        """Half the number of steps, so that the whole range is used: 7.5 for 4 bits, 127.5 for 8."""
        return (2**self.bits - 1) / 2

    @property
    def native_dtype(self) -> torch.dtype | None:
        return torch.int8 if self.bits == 8 and self.signed else None

    def decode(self, code: Value) -> Value:
        return cast(code, "f32") - float(self.offset)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        lowest = -self.offset
        x = torch.nan_to_num(x, nan=0.0)
        return (x.round().clamp(lowest, lowest + 2**self.bits - 1) + self.offset).to(torch.uint8)


for _bits in range(2, 9):
    register(IntegerFormat(f"int{_bits}", _bits, signed=True))
    register(IntegerFormat(f"uint{_bits}", _bits, signed=False))
