"""Everything that decides the source of the kernel of GPTQ's columns, as one value."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

COLUMNS_TEMPLATE = "gptq_columns"
MOST_COLUMNS = 128
"""Columns that a program holds in registers."""


@dataclass(frozen=True, kw_only=True)
class ColumnsTile:
    """How the work is cut: a program takes all columns of `n` rows of the weight, in one warp, which waits for none."""

    n: int = 16
    warps: int = 1
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class ColumnsSpec:
    """The kernel of a block of columns; the weight's rows and how many columns there are, are its arguments.

    Attributes:
        number: name of the codes' format, one of those of `codegen.nearest.has_nearest`.
        zero_point, shift: whether there are zero points; whether something is added after the scale.
        columns: that a program holds, a power of two up to `MOST_COLUMNS`.
        target: see `KernelSpec`.
    """

    number: str
    zero_point: bool
    shift: bool
    columns: int
    target: str
    tile: ColumnsTile = ColumnsTile()
    template: str = COLUMNS_TEMPLATE

    def constants(self) -> dict[str, object]:
        """Those of the template."""
        return {
            "ZERO_POINT": self.zero_point,
            "SHIFT": self.shift,
            "BLOCK_K": self.columns,
            "BLOCK_N": self.tile.n,
        }

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def decode_columns_spec(text: str) -> ColumnsSpec:
    """The inverse of `ColumnsSpec.encode`."""
    given = json.loads(text)
    return ColumnsSpec(**{**given, "tile": ColumnsTile(**given["tile"])})
