"""Scales and offsets that fit a block's weights best: several ranges are tried, and after each what fits its codes.

What fits given codes is found by least squares, as llama.cpp does (`make_qx_quants` and `make_qkx3_quants` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.reference import Grid, blocks_of, choose_grid
from qcompile.scheme import SCALE_DTYPES, WeightScheme

SHRINKS = (1.0, 1.075, *(1 - step / 20 for step in range(1, 14)))  # down to 0.35
_POWERS = (1.0, 2.0, 0.5)  # scales that are powers of two
FULL = (1.1, 1.06, 1.03, 1.0, 0.97, 0.94, 0.9)
"""Of ranges whose largest weight, with its sign, becomes the code that is farthest from 0."""
_FROM_LOWEST = (1.06, 1.045, 1.03, 1.015, 0.985, 0.97, 0.955, 0.94)
"""Of ranges that begin at the lowest weight."""

Errors = Callable[[Tensor], Tensor]
"""From a weight's error, float32 [N, K], to what is minimized in each block."""


def best_grid(
    w: Tensor,
    weight: Tensor,
    scheme: WeightScheme,
    above: Tensor | None,
    layer: str,
    errors: Errors,
    *,
    signed: bool = False,
) -> Grid:
    """The best of several grids, block by block; of equals that of the weights' own range.

    Args:
        w: float32 [N, K], finite.
        weight: float32 [K], of squared errors where scales are fitted.
        above: the weight's super scale, float32 [].
        signed: scales may be negative.

    Raises:
        LayerError: a scale overflows its dtype.
    """
    best = choose_grid(w, scheme, above, layer)
    codes = best.encode(w)
    least = errors(w - best.decode(codes))
    for grid in _candidates(w, scheme, above, layer, signed):
        codes = grid.encode(w)
        for again in (True, False):
            found = errors(w - grid.decode(codes))
            best = pick(found < least, grid, best)
            least = torch.minimum(found, least)
            if not again or scheme.scale_dtype == "float8_e8m0fnu":
                break
            grid = refit(w, weight, grid, codes, signed)
            codes = grid.encode(w)
    return best


def _candidates(w: Tensor, scheme: WeightScheme, above: Tensor | None, layer: str, signed: bool) -> Iterator[Grid]:
    for shrink in _POWERS if scheme.scale_dtype == "float8_e8m0fnu" else SHRINKS:
        yield choose_grid(w, scheme, above, layer, shrink)
    if scheme.symmetric and scheme.scale_dtype != "float8_e8m0fnu":
        plain = choose_grid(w, scheme, above, layer)
        blocks = blocks_of(w, scheme.granularity.block_of(plain.shape))
        lowest, highest = blocks.amin((1, 3)), blocks.amax((1, 3))
        values = scheme.format.decode(torch.arange(2**scheme.format.bits, device=w.device, dtype=torch.int32))
        assert isinstance(values, Tensor)
        step = torch.where(-lowest > highest, lowest, highest) / values[values.abs().argmax()]
        for shrink in FULL:
            yield _with_step(plain, step * shrink, None, signed)
    if scheme.offset:
        plain = choose_grid(w, scheme, above, layer)
        for shrink in _FROM_LOWEST:
            yield _with_step(plain, plain.step * shrink, plain.shift, signed)


def refit(w: Tensor, weight: Tensor, grid: Grid, codes: Tensor, signed: bool) -> Grid:
    """The grid whose scales (and offsets) fit given codes best, in weighted squares; zero points stay.

    A block keeps its own where there is no best, or it cannot be stored.

    Args:
        weight: float32 [K].
        codes: uint8 [N, K].
    """
    return _with_step(grid, *fitted(w, weight, grid, codes), signed)


def fitted(w: Tensor, weight: Tensor, grid: Grid, codes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Step and shift, float32 of the scale's shape, NaN where there are none: see `refit`."""
    values = grid.scheme.format.decode(codes.to(torch.int32))
    assert isinstance(values, Tensor)
    if grid.zero_point is not None:
        values = values - grid.every(grid.zero_point.float())
    block = grid.scheme.granularity.block_of(grid.shape)

    def total(t: Tensor) -> Tensor:
        return blocks_of(t, block).sum((1, 3))

    weighted = values * weight
    xq, qq = total(weighted * w), total(weighted * values)
    if grid.offset is None:
        return xq / qq, None
    ones, x, q = total(weight.expand_as(w)), total(w * weight), total(weighted)
    determinant = ones * qq - q * q
    determinant = determinant.masked_fill(determinant <= 1e-6 * ones * qq, float("nan"))
    return (ones * xq - x * q) / determinant, (qq * x - q * xq) / determinant


def _with_step(grid: Grid, step: Tensor, shift: Tensor | None, signed: bool) -> Grid:
    """A grid with other steps (and shifts) where they can be stored."""
    dtype = SCALE_DTYPES[grid.scheme.scale_dtype]
    if grid.above is not None:  # devices differ in what they make of a number beyond the type's largest
        largest = torch.finfo(dtype).max
        step = (step / grid.above).clamp(-largest, largest)
    scale = step.to(dtype)
    stored = scale.float()
    usable = stored.isfinite() & ((stored != 0) if signed else (stored > 0))
    offset = grid.offset
    if shift is not None:
        offset = shift.to(dtype)
        usable &= offset.float().isfinite()
    return pick(usable, replace(grid, scale=scale, offset=offset), grid)


def pick(first_where: Tensor, first: Grid, second: Grid) -> Grid:
    """A grid that has the scales of one where a bool of their shape says so, else of the other.

    Of grids with super-blocks it is the same for all blocks of one.
    """

    def chosen(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None or a.dim() == 0:
            return b
        where = first_where
        if a.shape != where.shape:  # of super-blocks
            where = where[:, :: where.shape[1] // a.shape[1]]
        if a.element_size() == 1:  # where has no kernel for float8
            return torch.where(where, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)
        return torch.where(where, a, b)

    scale = chosen(first.scale, second.scale)
    assert scale is not None
    return replace(
        second,
        scale=scale,
        zero_point=chosen(first.zero_point, second.zero_point),
        offset=chosen(first.offset, second.offset),
        above=chosen(first.above, second.above),
        above_offset=chosen(first.above_offset, second.above_offset),
    )
