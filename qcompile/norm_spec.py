"""A norm and the quantization of what it gives, without their tensors, as one hashable value and one string."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from qcompile import spec_text
from qcompile.fingerprint import fingerprint
from qcompile.formats import get_format
from qcompile.scheme import ActivationScheme, Granularity


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A norm of rows and the quantization of what it gives.

    Attributes:
        k: columns of a row.
        centered: whether the mean is subtracted first: LayerNorm, else RMSNorm.
        eps: what is added to the mean of squares.
        weight: "" if there is none, "plain" for a factor, "one more" for 1 plus it.
        early: whether rows are rounded to their type before they are multiplied by the weight, and after it again.
        bias: whether there is one.
        residual: whether a second tensor is added to the rows first.
        keep_sum, keep_norm: whether that sum, and the norm in the rows' type, are results too.
        number: name of the codes' format.
        columns: of a group.
        powers: whether scales are powers of two.
    """

    k: int
    centered: bool
    eps: float
    weight: str
    early: bool
    bias: bool
    residual: bool
    keep_sum: bool
    keep_norm: bool
    number: str
    columns: int
    powers: bool

    @property
    def activation(self) -> ActivationScheme:
        """How what the norm gives is quantized."""
        return ActivationScheme(
            format=get_format(self.number),
            granularity=Granularity.group(self.columns),
            scale_dtype="float8_e8m0fnu" if self.powers else "float32",
        )

    def encode(self) -> str:
        """The string that stands for this in a graph; see `LinearSpec.encode`."""
        return spec_text.write({**dataclasses.asdict(self), "code": fingerprint()})


@functools.lru_cache(maxsize=1024)
def decode_norm(text: str) -> NormSpec:
    """The inverse of `NormSpec.encode`.

    Raises:
        ValueError, TypeError: a text that is none.
    """
    given = spec_text.read(text)
    given.pop("code", None)
    return NormSpec(**given)
