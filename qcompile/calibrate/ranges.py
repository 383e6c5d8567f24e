"""The search of ranges (`qcompile.calibrate.fit`) by one generated kernel, on GPUs and where it takes the scheme."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.calibrate.fit import FULL, SHRINKS
from qcompile.codegen.nearest import has_nearest
from qcompile.codegen.ranges_spec import WIDEST, RangesSpec, RangesTile
from qcompile.reference import Grid
from qcompile.scheme import FLOAT_SCALES, SCALE_DTYPES, WeightScheme


def searched(w: Tensor, weight: Tensor, scheme: WeightScheme) -> Grid | None:
    """The grid of `best_grid` for errors that are weighted squares; None where there is no kernel.

    Args:
        w: float32 [N, K], finite.
        weight: float32 [K], of squared errors.
    """
    spec = kernel_for(scheme, (w.shape[0], w.shape[1]), w.device)
    if spec is None:
        return None
    from qcompile.runtime import cache

    return launch(spec, cache.load(spec).kernel, w, weight, scheme)


def kernel_for(scheme: WeightScheme, shape: tuple[int, int], device: torch.device) -> RangesSpec | None:
    """The kernel of a scheme: for scales of groups that are stored as floats, with zero points or without."""
    size = scheme.granularity.columns
    grouped = scheme.granularity.is_group and 16 <= size <= WIDEST and size & (size - 1) == 0 and shape[1] % size == 0
    plain = scheme.scale_dtype in FLOAT_SCALES and scheme.super_scale is None and not scheme.offset
    if device.type != "cuda" or not grouped or not plain or not has_nearest(scheme.format):
        return None
    from qcompile.runtime.gpu import target_of

    return ranges_spec(scheme, target_of(device))


def ranges_spec(scheme: WeightScheme, target: str) -> RangesSpec:
    """The kernel of a scheme that has one."""
    values = scheme.format.decode(torch.arange(2**scheme.format.bits, dtype=torch.int32))
    assert isinstance(values, Tensor)
    columns = scheme.granularity.columns
    return RangesSpec(
        number=scheme.format.name,
        absmax=scheme.format.absmax,
        steps=float(2**scheme.format.bits - 1),
        farthest=values[values.abs().argmax()].item(),
        of_zeros=float((values == 0).any()),
        zero_point=not scheme.symmetric,
        scale_dtype=scheme.scale_dtype,
        columns=columns,
        target=target,
        tile=RangesTile(rows=max(1, 1024 // columns)),
    )


def launch(spec: RangesSpec, function: Any, w: Tensor, weight: Tensor, scheme: WeightScheme) -> Grid:
    """Run `function`, that of `spec`'s module; see `searched`."""
    from qcompile.runtime import launcher

    rows, groups = scheme.granularity.scale_shape((w.shape[0], w.shape[1]))
    shares = torch.tensor([*SHRINKS, *(() if spec.zero_point else FULL)], device=w.device)
    scale = w.new_empty(rows, groups)
    zero_point = torch.empty(rows, groups, dtype=torch.uint8, device=w.device)
    launcher.launch(
        function,
        (-(-rows // spec.tile.rows), groups),
        w.contiguous(),
        weight.contiguous(),
        shares,
        scale,
        zero_point,
        rows,
        groups,
        len(SHRINKS),
        len(shares),
        num_warps=spec.tile.warps,
        num_stages=spec.tile.stages,
    )
    return Grid(
        scheme=scheme,
        shape=(w.shape[0], w.shape[1]),
        scale=scale.to(SCALE_DTYPES[scheme.scale_dtype]),
        zero_point=zero_point if spec.zero_point else None,
    )
