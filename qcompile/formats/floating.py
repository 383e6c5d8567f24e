"""8-bit floating point: E4M3 and E5M2 of the OCP 8-bit floating point specification (OFP8, revision 1.0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.expr import Value, bitcast, eq, where
from qcompile.formats.base import Format, register


@dataclass(frozen=True)
class FloatFormat(Format):
    """A sign, `exponent` bits and `mantissa` bits; E4M3 has no infinities and one NaN a sign (`fn`)."""

    exponent: int
    mantissa: int
    dtype: torch.dtype

    @property
    def absmax(self) -> float:
        return float(torch.finfo(self.dtype).max)

    @property
    def exact_dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def native_dtype(self) -> torch.dtype | None:
        return self.dtype

    def decode(self, code: Value) -> Value:
        """Move exponent and mantissa into a float32's fields, then correct the exponent's bias by a multiplication.

        The moved bits of a subnormal are a float32 subnormal, so the product is exact for those too.
        """
        magnitude: Any = (code & 0x7F) << (23 - self.mantissa)
        sign: Any = (code & 0x80) << 24
        bias = 127 - (2 ** (self.exponent - 1) - 1)
        value = bitcast(sign | magnitude, "f32") * float(2.0**bias)
        if self.dtype == torch.float8_e4m3fn:
            return where(eq(code & 0x7F, 0x7F), float("nan"), value)
        special = bitcast(sign | magnitude | 0x7F800000, "f32")  # infinity or NaN
        return where(eq(code & 0x7C, 0x7C), special, value)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        limit = self.absmax
        return x.clamp(-limit, limit).to(self.dtype).view(torch.uint8)


register(FloatFormat("fp8_e4m3", 8, exponent=4, mantissa=3, dtype=torch.float8_e4m3fn))
register(FloatFormat("fp8_e5m2", 8, exponent=5, mantissa=2, dtype=torch.float8_e5m2))
