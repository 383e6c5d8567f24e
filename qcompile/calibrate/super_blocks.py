"""Scales that are integers under a scale of their super-block: the K types of GGUF, chosen with weighted errors.

As llama.cpp does with an importance matrix (`quantize_row_q4_K_impl` and its kin in
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c; Kawrakow 2024,
https://github.com/ggml-org/llama.cpp/pull/4861): blocks are fitted as if their scales were real numbers, these are
rounded to integers under the best of several super scales, and codes are chosen anew. Then super scales, and the
integers under them, are fitted to the codes by least squares where that is better.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.calibrate.fit import best_grid, fitted, pick
from qcompile.reference import Grid, blocks_of, choose_grid, largest_scale, to_integers
from qcompile.scheme import SCALE_DTYPES, WeightScheme

_ROUNDS = 2


def search_super_blocks(w: Tensor, weight: Tensor, scheme: WeightScheme, layer: str) -> Grid:
    """The grid of least weighted squared error that is found; in no super-block worse than that of the weights' range.

    Args:
        w: float32 [N, K], finite.
        weight: float32 [K], not negative: how much the squared error of each column counts.
        scheme: with super-blocks that divide K.

    Raises:
        LayerError: a super scale overflows its dtype.
    """
    best = choose_grid(w, scheme, None, layer)
    assert best.above is not None
    block = scheme.granularity.block_of(best.shape)
    per = best.scale.shape[1] // best.above.shape[1]

    def errors(grid: Grid) -> Tensor:
        """[rows, super-blocks, blocks]."""
        error = w - grid.decode(grid.encode(w))
        return blocks_of(error.square() * weight, block).sum((1, 3)).unflatten(1, (-1, per))

    def better(grid: Grid, than: Grid) -> Grid:
        where = errors(grid).sum(2) < errors(than).sum(2)
        return pick(where.repeat_interleave(per, 1), grid, than)

    grid = _rounded(w, weight, best, layer)
    for _ in range(_ROUNDS):
        grid = better(_refit_above(w, weight, grid), grid)
        other = _refit_integers(w, weight, grid)
        where = (errors(other) < errors(grid)).flatten(1)
        grid = _pick_integers(where, other, grid)
    return better(grid, best)


def _rounded(w: Tensor, weight: Tensor, plain: Grid, layer: str) -> Grid:
    """Blocks with the best real scales and offsets, then rounded to integers."""
    scheme = plain.scheme
    real = replace(scheme, scale_dtype="float32", super_scale=None)
    block = scheme.granularity.block_of(plain.shape)

    def errors(error: Tensor) -> Tensor:
        return blocks_of(error.square() * weight, block).sum((1, 3))

    ideal = best_grid(w, weight, real, None, layer, errors, signed=scheme.scale_dtype == "int8")
    step, shift = ideal.step, ideal.shift
    if shift is not None:  # offsets are negative integers
        plain_step, plain_shift = plain.step, plain.shift
        assert plain_shift is not None
        step, shift = torch.where(shift > 0, plain_step, step), torch.where(shift > 0, plain_shift, shift)
    values = scheme.format.decode(ideal.encode(w).to(torch.int32))
    assert isinstance(values, Tensor)
    assert plain.above is not None
    count = plain.above.shape[1]
    scale, above = _best_integers(step, errors(values), count, scheme)
    if shift is None:
        return replace(plain, scale=scale, above=above)
    offset, above_offset = _best_integers(-shift, errors(torch.ones_like(w)), count, scheme)
    return replace(plain, scale=scale, above=above, offset=offset, above_offset=-above_offset)


def _best_integers(values: Tensor, weight: Tensor, count: int, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Integers for values [rows, blocks], and what is above them [rows, count], of least weighted squared error."""
    runs, weight = values.unflatten(1, (count, -1)), weight.unflatten(1, (count, -1))
    top = runs.abs().amax(2)
    extreme = runs.gather(2, runs.abs().argmax(2, keepdim=True)).squeeze(2) if scheme.scale_dtype == "int8" else top
    farthest = -largest_scale(scheme) - 1 if scheme.scale_dtype == "int8" else largest_scale(scheme)
    least = torch.full_like(top, float("inf"))
    best = torch.zeros_like(top)
    for step in range(-9, 10):
        above = _stored(extreme / (farthest + step / 10), scheme)
        for again in (True, False):
            integers = to_integers(values, above, scheme).float().unflatten(1, (count, -1))
            error = (weight * (runs - integers * above[..., None]).square()).sum(2)
            where = error < least
            best, least = torch.where(where, above, best), torch.where(where, error, least)
            if again:
                fit = (weight * runs * integers).sum(2) / (weight * integers.square()).sum(2)
                above = torch.where(fit.isfinite(), _stored(fit, scheme), above)
    return to_integers(values, best, scheme), best


def _stored(above: Tensor, scheme: WeightScheme) -> Tensor:
    """float32, as super scales of a scheme are stored; what overflows there is its largest."""
    assert scheme.super_scale is not None
    dtype = SCALE_DTYPES[scheme.super_scale.dtype]
    top = torch.finfo(dtype).max
    return above.clamp(-top, top).to(dtype).float()


def _refit_above(w: Tensor, weight: Tensor, grid: Grid) -> Grid:
    """Super scales that fit the codes best."""
    assert grid.above is not None
    values = grid.scheme.format.decode(grid.encode(w).to(torch.int32))
    assert isinstance(values, Tensor)
    count = grid.above.shape[1]
    values = values * grid.every(grid.scale.float())

    def total(t: Tensor) -> Tensor:
        return (t * weight).unflatten(1, (count, -1)).sum(2)

    xq, qq = total(w * values), total(values.square())
    if grid.offset is None:
        return _with_above(grid, xq / qq, None)
    ones = grid.every(grid.offset.float())
    oo, qo, xo = total(ones.square()), total(values * ones), total(w * ones)
    determinant = qq * oo - qo * qo
    flat = determinant <= 1e-6 * qq * oo
    above = torch.where(flat, xq / qq, (oo * xq - qo * xo) / determinant)
    above_offset = torch.where(flat, 0.0, (qq * xo - qo * xq) / determinant)
    return _with_above(grid, above, above_offset)


def _with_above(grid: Grid, above: Tensor, above_offset: Tensor | None) -> Grid:
    """Other super scales, where they are finite."""
    assert grid.above is not None
    above = torch.where(above.isfinite(), _stored(above, grid.scheme), grid.above)
    if above_offset is not None:
        assert grid.above_offset is not None
        above_offset = torch.where(above_offset.isfinite(), _stored(above_offset, grid.scheme), grid.above_offset)
    return replace(grid, above=above, above_offset=above_offset)


def _refit_integers(w: Tensor, weight: Tensor, grid: Grid) -> Grid:
    """Integers nearest to what fits each block's codes best."""
    step, shift = fitted(w, weight, grid, grid.encode(w))
    assert grid.above is not None
    scale = torch.where(step.isfinite(), to_integers(step, grid.above, grid.scheme), grid.scale)
    if shift is None:
        return replace(grid, scale=scale)
    assert grid.above_offset is not None
    assert grid.offset is not None
    offset = torch.where(shift.isfinite(), to_integers(shift, grid.above_offset, grid.scheme), grid.offset)
    return replace(grid, scale=scale, offset=offset)


def _pick_integers(first_where: Tensor, first: Grid, second: Grid) -> Grid:
    """`pick` of grids with the same super scales."""
    same = replace(first, above=None, above_offset=None), replace(second, above=None, above_offset=None)
    return replace(pick(first_where, *same), above=second.above, above_offset=second.above_offset)
