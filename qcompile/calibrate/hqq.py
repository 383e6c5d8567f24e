"""HQQ: ranges that fit the bulk of the weights, outliers being taken for noise; needs no data.

Badri and Shaji 2023: "Half-Quadratic Quantization of Large Machine Learning Models"
(https://dropbox.github.io/hqq_blog/). The l_p norm of the error with p < 1 is minimized by half-quadratic splitting:
the error e is approximated by a sparse one, and the zero point (or offset) is the mean that is left over. Scales stay.
Lengths are in steps of the grid, so that the result does not depend on the weight's magnitude.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.calibrate.fit import pick
from qcompile.methods import HQQ
from qcompile.reference import Grid, blocks_of, choose_grid
from qcompile.scheme import WeightScheme

_BETA, _GROWTH = 10.0, 1.01
"""The penalty of the splitting at first, and its growth an iteration (the paper's beta and kappa)."""


def hqq_grid(w: Tensor, scheme: WeightScheme, settings: HQQ, above: Tensor | None, layer: str) -> Grid:
    """The grid for nearest codes. Each block has the best of all iterations', so none is worse than RTN's in the norm.

    Args:
        w: float32 [N, K], finite.
        scheme: asymmetric; its group divides K.
        above: the weight's super scale, float32 [].
        layer: named in errors.

    Raises:
        LayerError: a scale overflows its dtype.
    """
    best = grid = choose_grid(w, scheme, above, layer)
    block = scheme.granularity.block_of((w.shape[0], w.shape[1]))

    def norm(error: Tensor) -> Tensor:
        return blocks_of(error.abs() ** settings.norm, block).sum((1, 3))

    codes = grid.encode(w)
    least = norm(w - grid.decode(codes))
    beta = _BETA
    for _ in range(settings.iterations):
        error = (w - grid.decode(codes)) / grid.every(grid.step)
        grid = _refit(w, grid, codes, _shrink(error, beta, settings.norm))
        codes = grid.encode(w)
        errors = norm(w - grid.decode(codes))
        best = pick(errors < least, grid, best)
        least = torch.minimum(errors, least)
        beta *= _GROWTH
    return best


def _shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal step of the l_p norm: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    return x.sign() * (x.abs() - x.abs().clamp(min=1e-8) ** (norm - 1) / beta).clamp(min=0)


def _refit(w: Tensor, grid: Grid, codes: Tensor, outliers: Tensor) -> Grid:
    """The grid whose zero points or offsets fit the weights less what are taken for outliers, in steps."""
    scheme: WeightScheme = grid.scheme
    block = scheme.granularity.block_of(grid.shape)
    values = scheme.format.decode(codes.to(torch.int32))
    assert isinstance(values, Tensor)
    kept = w / grid.every(grid.step) - outliers  # in steps
    counts = blocks_of(torch.ones_like(w), block).sum((1, 3))
    if grid.zero_point is not None:
        zero = blocks_of(values - kept, block).sum((1, 3)) / counts
        return replace(grid, zero_point=scheme.format.encode(zero))
    assert grid.offset is not None
    offset = blocks_of(kept - values, block).sum((1, 3)) / counts * grid.step
    return replace(grid, offset=offset.to(grid.offset.dtype))
