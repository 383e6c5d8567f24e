"""Sums of rows, their norm and its quantization, each or none, without tensors, as one hashable value and string."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from qcompile import spec_text
from qcompile.fingerprint import fingerprint
from qcompile.formats import get_format
from qcompile.powers import power_above
from qcompile.scheme import WHOLE, ActivationScheme, Granularity


def largest_sum(parts: int) -> int:
    """Bytes of rows that so many GPUs add in the kernel of a norm; of more, NCCL sends each fewer times.

    2 MB of two GPUs and 512 KB of four, which take less time than NCCL there (`docs/tensor_parallel.md`).
    """
    return (8 << 20) // power_above(parts) ** 2


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """What becomes of rows: sums, a norm, and codes with a scale for each row or group; each may be missing.

    Attributes:
        k: columns of a row.
        group: name of the process group over whose GPUs the rows are added first; "" if they are whole.
        norm: "rms"; "layer", which subtracts the mean first; or "" for rows that are taken as they are.
        eps: what is added to the mean of squares.
        weight: "" if there is none, "plain" for a factor, "one more" for 1 plus it.
        early: whether rows are rounded to their type before they are multiplied by the weight, and after it again.
        bias: whether there is one.
        residual: whether a second tensor is added to the rows first.
        keep_sum, keep_norm: whether what is normalized, and the norm in the rows' type, are results too.
        number: name of the codes' format; "" if nothing is quantized.
        columns: of a group; `k` for a scale a row.
        powers: whether scales are powers of two.
    """

    k: int
    number: str
    columns: int
    powers: bool
    group: str = ""
    norm: str = ""
    eps: float = 0.0
    weight: str = ""
    early: bool = False
    bias: bool = False
    residual: bool = False
    keep_sum: bool = False
    keep_norm: bool = False

    @property
    def activation(self) -> ActivationScheme:
        """How what the norm gives is quantized, if it is."""
        whole = self.columns == self.k
        return ActivationScheme(
            format=get_format(self.number),
            granularity=Granularity.channel() if whole else Granularity.group(self.columns),
            scale_dtype="float8_e8m0fnu" if self.powers else "float32",
        )

    def encode(self) -> str:
        """The string that stands for this in a graph; see `LinearSpec.encode`."""
        return spec_text.write({**dataclasses.asdict(self), "code": fingerprint()})


@functools.lru_cache(maxsize=1024)
def quantization(activation: ActivationScheme, k: int) -> NormSpec | None:
    """The spec, with no norm, of rows of K columns that `activation` says how to quantize.

    None if scales are static, of more than a row, or go with zero points.
    """
    granularity = activation.granularity
    if not (activation.dynamic and activation.symmetric and granularity.rows == 1):
        return None
    columns = k if granularity.columns == WHOLE else granularity.columns
    powers = activation.scale_dtype == "float8_e8m0fnu"
    return NormSpec(k=k, number=activation.format.name, columns=min(columns, k), powers=powers)


@functools.lru_cache(maxsize=1024)
def decode_norm(text: str) -> NormSpec:
    """The inverse of `NormSpec.encode`.

    Raises:
        ValueError, TypeError: a text that is none.
    """
    given = spec_text.read(text)
    given.pop("code", None)
    return NormSpec(**given)
