"""Everything that decides the source of the kernel that searches ranges of groups, as one value."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

RANGES_TEMPLATE = "search_ranges"
WIDEST = 512
"""Columns of a group that a program holds."""


@dataclass(frozen=True, kw_only=True)
class RangesTile:
    """How the work is cut: a program takes a group of `rows` rows of the weight."""

    rows: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class RangesSpec:
    """The kernel for weights of a format; the weight's shape is its argument.

    Attributes:
        number: name of the codes' format, one of those of `codegen.nearest.has_nearest`.
        absmax, steps: what a group's largest magnitude becomes; the steps between its least and its greatest number.
        farthest: the format's value of the greatest magnitude.
        of_zeros: the scale of a group of zeros.
        zero_point: whether there are zero points.
        scale_dtype: "float32", "bfloat16" or "float16".
        columns: of a group, a power of two up to `WIDEST`.
        target: see `KernelSpec`.
    """

    number: str
    absmax: float
    steps: float
    farthest: float
    of_zeros: float
    zero_point: bool
    scale_dtype: str
    columns: int
    target: str
    tile: RangesTile
    template: str = RANGES_TEMPLATE

    def constants(self) -> dict[str, object]:
        """Those of the template."""
        return {
            "ABSMAX": self.absmax,
            "STEPS": self.steps,
            "FARTHEST": self.farthest,
            "OF_ZEROS": self.of_zeros,
            "ZERO_POINT": self.zero_point,
            "SCALE": f"tl.{self.scale_dtype}",
            "COLUMNS": self.columns,
            "ROWS": self.tile.rows,
        }

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def decode_ranges_spec(text: str) -> RangesSpec:
    """The inverse of `RangesSpec.encode`."""
    given = json.loads(text)
    return RangesSpec(**{**given, "tile": RangesTile(**given["tile"])})
