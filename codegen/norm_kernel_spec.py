"""Everything that decides the source of the kernel that adds, normalizes and quantizes rows, as one value."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace

from qcompile.codegen.spec import launches_early
from qcompile.formats import FORMATS, IntegerFormat
from qcompile.norm_spec import NormSpec, decode_norm, largest_sum
from qcompile.powers import power_above

NORM_TEMPLATE = "norm_quantize"
WIDEST = 32768
"""Columns of a row that a program holds, filled up to a power of two of groups that are powers of two themselves."""


@dataclass(frozen=True, kw_only=True)
class NormTile:
    """How the work is cut: a program takes a row."""

    warps: int
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class NormKernelSpec:
    """The kernel for a norm.

    Attributes:
        norm: the encoded `NormSpec`, without the name of its group.
        x_dtype: torch's name of the rows' type.
        target: see `KernelSpec`.
        parts: processes whose rows are added.
    """

    norm: str
    x_dtype: str
    target: str
    tile: NormTile
    parts: int = 1
    template: str = NORM_TEMPLATE

    def constants(self) -> dict[str, object]:
        """Those of the template."""
        norm = decode_norm(self.norm)
        fmt = FORMATS[norm.number] if norm.number else None
        return {
            "K": norm.k,
            "COLUMNS": norm.columns,
            "COLUMNS_POWER": power_above(norm.columns),
            "GROUPS_POWER": power_above(-(-norm.k // norm.columns)),
            "NORM": norm.norm,
            "EPS": norm.eps,
            "WEIGHT": norm.weight,
            "EARLY": norm.early,
            "BIAS": norm.bias,
            "RESIDUAL": norm.residual,
            "KEEP_SUM": norm.keep_sum,
            "KEEP_NORM": norm.keep_norm,
            "PARTS": self.parts,
            "SHARE": largest_sum(self.parts) // 4,
            "QUANTIZED": fmt is not None,
            "ABSMAX": fmt.absmax if fmt else 1.0,
            "INTEGER": isinstance(fmt, IntegerFormat),
            "POWERS": norm.powers,
            "ABOVE_ONE": math.frexp(fmt.absmax)[1] - 1 if fmt else 0,
            "EARLY_LAUNCH": launches_early(self.target),
        }

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def held_columns(norm: NormSpec) -> int:
    """What a program holds of a row, and beyond its end."""
    return power_above(norm.columns) * power_above(-(-norm.k // norm.columns))


def norm_kernel_spec(norm: NormSpec, x_dtype: str, target: str, parts: int = 1) -> NormKernelSpec:
    """The kernel for a norm; a thread holds some 16 elements of the row."""
    warps = min(max(held_columns(norm) // 512, 1), 16)
    text = replace(norm, group="").encode()
    return NormKernelSpec(norm=text, x_dtype=x_dtype, target=target, tile=NormTile(warps=warps), parts=parts)


def decode_norm_kernel_spec(text: str) -> NormKernelSpec:
    """The inverse of `NormKernelSpec.encode`."""
    given = json.loads(text)
    return NormKernelSpec(**{**given, "tile": NormTile(**given["tile"])})
