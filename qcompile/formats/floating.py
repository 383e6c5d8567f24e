"""Small floating point: a sign, an exponent and a mantissa.

8 bits: E4M3 and E5M2 of the OCP 8-bit floating point specification (OFP8, revision 1.0). 4 and 6 bits: E2M1, E2M3 and
E3M2 of the OCP microscaling specification (MX, version 1.0), which have neither infinities nor NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.expr import Value, bitcast, eq, where
from qcompile.formats.base import Format, register


@dataclass(frozen=True)
class FloatFormat(Format):
    """A sign, `exponent` bits and `mantissa` bits.

    Attributes:
        largest: finite value.
        dtype: torch's own type with these values, which 8-bit formats have.
    """

    exponent: int
    mantissa: int
    largest: float
    dtype: torch.dtype | None = None

    @property
    def absmax(self) -> float:
        return self.largest

    @property
    def native_dtype(self) -> torch.dtype | None:
        return self.dtype

    @property
    def _bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    def decode(self, code: Value) -> Value:
        """Move exponent and mantissa into a float32's fields, then correct the exponent's bias by a multiplication.

        The moved bits of a subnormal are a float32 subnormal, so the product is exact for those too.
        """
        sign_bit = 1 << (self.bits - 1)
        magnitude: Any = (code & (sign_bit - 1)) << (23 - self.mantissa)
        sign: Any = (code & sign_bit) << (32 - self.bits)
        value = bitcast(sign | magnitude, "f32") * float(2.0 ** (127 - self._bias))
        if self.dtype == torch.float8_e4m3fn:
            return where(eq(code & 0x7F, 0x7F), float("nan"), value)
        if self.dtype == torch.float8_e5m2:
            special = bitcast(sign | magnitude | 0x7F800000, "f32")  # infinity or NaN
            return where(eq(code & 0x7C, 0x7C), special, value)
        return value

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clamp(-self.absmax, self.absmax)
        if self.dtype is not None:
            return x.to(self.dtype).view(torch.uint8)
        x = torch.nan_to_num(x)
        # The lowest digit of a value is worth this much; subnormals share that of the least exponent.
        exponent = (torch.frexp(x).exponent - 1).clamp(min=1 - self._bias)
        digits = torch.ldexp(x.abs(), self.mantissa - exponent).round()
        carried = digits == 2 << self.mantissa
        digits = torch.where(carried, digits / 2, digits).to(torch.int32)
        exponent = exponent + carried
        normal = digits >= 1 << self.mantissa
        magnitude = torch.where(normal, digits + ((exponent + self._bias - 1) << self.mantissa), digits)
        return (magnitude | torch.signbit(x).int() << (self.bits - 1)).to(torch.uint8)


register(FloatFormat("fp8_e4m3", 8, exponent=4, mantissa=3, largest=448.0, dtype=torch.float8_e4m3fn))
register(FloatFormat("fp8_e5m2", 8, exponent=5, mantissa=2, largest=57344.0, dtype=torch.float8_e5m2))
register(FloatFormat("fp4_e2m1", 4, exponent=2, mantissa=1, largest=6.0))
register(FloatFormat("fp6_e2m3", 6, exponent=2, mantissa=3, largest=7.5))
register(FloatFormat("fp6_e3m2", 6, exponent=3, mantissa=2, largest=28.0))
