"""Formats whose 16 values are listed: codebooks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.expr import Value, lookup
from qcompile.formats.base import Format, register


@dataclass(frozen=True)
class TableFormat(Format):
    """Code c stands for `values[c]`.

    Attributes:
        values: 2**bits numbers that float32 holds exactly.
    """

    values: tuple[float, ...]

    @property
    def absmax(self) -> float:
        return max(map(abs, self.values))

    @property
    def native_dtype(self) -> torch.dtype | None:
        return None

    def decode(self, code: Value) -> Value:
        return lookup(code, self.values)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        ordered, codes = torch.tensor(self.values, dtype=torch.float64, device=x.device).sort(stable=True)
        middles = (ordered[1:] + ordered[:-1]) / 2
        below = middles.nextafter(torch.full_like(middles, -torch.inf))
        middles = torch.where(codes[:-1] % 2 == 1, below, middles)  # of a tie the even code
        return codes.to(torch.uint8)[torch.bucketize(torch.nan_to_num(x.double()).contiguous(), middles)]


def _float32(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
register(TableFormat("nf4", 4, values=_NF4))
# bitsandbytes' 4-bit float: E2M1 with another order of exponents, in units of its largest value.
register(TableFormat("fp4", 4, values=_float32((*_FP4, *(-value for value in _FP4)))))
# The non-linear 4-bit codebook of GGML's IQ4_NL and IQ4_XS.
register(TableFormat("iq4_nl", 4, values=tuple(map(float, _IQ4))))
