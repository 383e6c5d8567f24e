"""The codes of one block of columns after another, by GPTQ: a generated kernel on GPUs, where it takes the format, else
plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.columns_spec import MOST_COLUMNS, ColumnsSpec
from qcompile.codegen.nearest import has_nearest
from qcompile.formats import Format
from qcompile.reference import Grid, leave_two_of_four
from qcompile.scheme import WeightScheme


class Columns:
    """What chooses the codes of columns of weights on one grid.

    Args:
        grid: of the whole weight [N, K].
        size: how many columns a call brings at most.

    Attributes:
        size: how many it may bring, a multiple of four for 2:4 sparse weights.
    """

    def __init__(self, grid: Grid, size: int) -> None:
        self.scheme, self.rows = grid.scheme, grid.shape[0]
        self.tall, self.wide = grid.scheme.granularity.block_of(grid.shape)
        self.stored = [
            None if t is None else t.t().float().contiguous() for t in (grid.step, grid.zero_point, grid.shift)
        ]  # step, zero point and shift, float32 [column blocks, strips]
        self.spec = kernel_for(grid.scheme, grid.scale.device)
        sparse = grid.scheme.sparsity is not None
        self.size = size + (-size % 4 if sparse else 0) if self.spec is None else min(size, self.spec.columns)

    def solve(self, own: Tensor, factor: Tensor, before: Tensor | None, places: Tensor, codes: Tensor) -> Tensor:
        """Write the codes of a block's columns.

        Args:
            own: float32 [columns, N], contiguous, of at most `size` columns; it may change.
            factor: float32 [columns, columns], the block's part of the inverse Hessian's factor.
            before: float32 [columns, N], the columns as they were, for 2:4 sparse weights.
            places: int64 [columns], where in the weight they are.
            codes: uint8 [columns, N], contiguous.

        Returns:
            what each column is off by over the factor's diagonal, float32 [columns, N].
        """
        blocks = places // self.wide
        if self.spec is not None:
            from qcompile.runtime import cache

            return launch(self.spec, cache.load(self.spec).kernel, own, factor, self.stored, blocks, self.tall, codes)
        errors = torch.empty_like(own)
        stored = [None if t is None else t[blocks].repeat_interleave(self.tall, 1)[:, : self.rows] for t in self.stored]
        _in_torch(own, factor, before, stored, codes, errors, self.scheme)
        return errors


def kernel_for(scheme: WeightScheme, device: torch.device) -> ColumnsSpec | None:
    """The kernel of a scheme's columns, where there is one."""
    if device.type != "cuda" or scheme.sparsity is not None or not has_nearest(scheme.format):
        return None
    from qcompile.runtime.gpu import target_of

    return columns_spec(scheme, target_of(device))


def columns_spec(scheme: WeightScheme, target: str) -> ColumnsSpec:
    return ColumnsSpec(
        number=scheme.format.name,
        zero_point=not scheme.symmetric and not scheme.offset,
        shift=scheme.offset,
        columns=MOST_COLUMNS,
        target=target,
    )


def launch(
    spec: ColumnsSpec,
    function: Any,
    own: Tensor,
    factor: Tensor,
    stored: Sequence[Tensor | None],
    blocks: Tensor,
    tall: int,
    codes: Tensor,
) -> Tensor:
    """Run `function`, that of `spec`'s module; see `Columns.solve`.

    Args:
        stored: step, zero point and shift, float32 [column blocks, strips of `tall` rows].
        blocks: the column block of each column.
    """
    from qcompile.runtime import launcher

    errors = torch.empty_like(own)
    columns, rows = own.shape
    step = stored[0]
    assert step is not None
    launcher.launch(
        function,
        (-(-rows // spec.tile.n),),
        own,
        factor.contiguous(),
        *(step if t is None else t for t in stored),
        blocks.to(torch.int32),
        codes,
        errors,
        rows,
        columns,
        step.shape[1],
        tall,
        num_warps=spec.tile.warps,
        num_stages=spec.tile.stages,
    )
    return errors


def _in_torch(
    own: Tensor,
    factor: Tensor,
    before: Tensor | None,
    stored: Sequence[Tensor | None],
    codes: Tensor,
    errors: Tensor,
    scheme: WeightScheme,
) -> None:
    """`Columns.solve`, with what is stored for each column and row, float32 [columns, N]."""
    for i in range(len(own)):
        wanted = own[i]
        if before is not None:
            if i % 4 == 0:
                four = slice(i, i + 4)
                left = _left(own[four].t(), before[four].t(), factor.diagonal()[four], scheme)
            wanted = wanted * left[:, i % 4]
        of_column = [None if t is None else t[i] for t in stored]
        _choose(own[i], wanted, of_column, factor[i, i], codes[i], errors[i], scheme.format)
        own[i:] -= factor[i, i:, None] * errors[i]


def _left(four: Tensor, before: Tensor, diagonal: Tensor, scheme: WeightScheme) -> Tensor:
    """Which of four columns [N, 4] stay: those without which the output errs most, of those that were not 0 before."""
    costs = (four / diagonal).abs().clamp(min=torch.finfo(torch.float32).tiny)
    return leave_two_of_four(costs.masked_fill(before == 0, 0.0), scheme) > 0


def _choose(
    column: Tensor,
    wanted: Tensor,
    stored: Sequence[Tensor | None],
    diagonal: Tensor,
    codes: Tensor,
    errors: Tensor,
    fmt: Format,
) -> None:
    """Write the codes nearest to what is wanted of a column [N], and what it is off by over the factor's diagonal."""
    step, zero_point, shift = stored
    assert step is not None
    scaled = (wanted if shift is None else wanted - shift) / step
    code = fmt.encode(scaled if zero_point is None else scaled + zero_point)
    value = fmt.decode(code.to(torch.int32))
    assert isinstance(value, Tensor)
    value = (value if zero_point is None else value - zero_point) * step
    codes.copy_(code)
    errors.copy_((column - (value if shift is None else value + shift)) / diagonal)
