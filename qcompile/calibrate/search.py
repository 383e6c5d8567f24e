"""The range of each block, searched for the least error: clipping a few large weights leaves finer steps to the rest.

Without data it is the squared error of the weights, as OCTAV (Sakr et al. 2022, arXiv:2206.06501) and LLM libraries
minimize it; with data, that error weighted by the inputs' mean squares (the importance matrix of llama.cpp,
https://github.com/ggml-org/llama.cpp/pull/4861), or the error of each block's part of the output (the clipping of AWQ,
Lin et al. 2023, arXiv:2306.00978, section 3.2 and its code).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.reference import Grid, blocks_of, choose_grid
from qcompile.scheme import WeightScheme

_SHRINKS = (1.0, 1.075, *(1 - step / 20 for step in range(1, 14)))  # down to 0.35
_POWERS = (1.0, 2.0, 0.5)  # scales that are powers of two
_WIDEST = 512
"""Columns of a block up to which the error of its part of the output is computed; of wider ones the inputs' mean
squares weight it."""


def search_grid(
    w: Tensor, scheme: WeightScheme, above: Tensor | None, layer: str, clip: str, gram: Tensor | None
) -> Grid:
    """The best of several grids, block by block; of equals that of the weights' own range.

    Args:
        w: float32 [N, K], finite.
        above: the weight's super scale, float32 [].
        clip: of `qcompile.methods.CLIPS`.
        gram: float32 [K, K], the mean of x x^T over inputs; for "importance" and "output".

    Raises:
        LayerError: a scale overflows its dtype.
    """
    best = choose_grid(w, scheme, above, layer)
    if clip == "none":
        return best
    least = block_errors(w - best.decode(best.encode(w)), scheme, clip, gram)
    shrinks = _POWERS if scheme.scale_dtype == "float8_e8m0fnu" else _SHRINKS
    for shrink in shrinks[1:]:
        grid = choose_grid(w, scheme, above, layer, shrink)
        errors = block_errors(w - grid.decode(grid.encode(w)), scheme, clip, gram)
        best = pick(errors < least, grid, best)
        least = torch.minimum(errors, least)
    return best


def block_errors(error: Tensor, scheme: WeightScheme, clip: str, gram: Tensor | None) -> Tensor:
    """What `clip` minimizes, for each block: float32 [row blocks, column blocks].

    Args:
        error: of the weights, float32 [N, K].
    """
    shape = (error.shape[0], error.shape[1])
    block = scheme.granularity.block_of(shape)
    if clip == "mse":
        return blocks_of(error.square(), block).sum((1, 3))
    assert gram is not None
    if clip == "output" and block[1] <= _WIDEST and shape[1] % block[1] == 0:
        parts = error.unflatten(1, (-1, block[1]))  # [N, column blocks, C]
        count = parts.shape[1]
        own = gram.unflatten(0, (count, -1)).unflatten(2, (count, -1)).diagonal(dim1=0, dim2=2)  # [C, C, column blocks]
        products = torch.bmm(parts.transpose(0, 1), own.permute(2, 0, 1)).transpose(0, 1)
        per_row = (products * parts).sum(-1)
        return blocks_of(per_row, (block[0], 1)).sum((1, 3))
    return blocks_of(error.square() * gram.diagonal(), block).sum((1, 3))


def pick(first_where: Tensor, first: Grid, second: Grid) -> Grid:
    """The grid of two of one scheme whose blocks are those of the first where a mask [row blocks, column blocks] says.

    Their super scale is the same.
    """

    def chosen(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        if a.element_size() == 1:  # where has no kernel for float8
            return torch.where(first_where, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)
        return torch.where(first_where, a, b)

    scale = chosen(first.scale, second.scale)
    assert scale is not None
    return replace(
        second,
        scale=scale,
        zero_point=chosen(first.zero_point, second.zero_point),
        offset=chosen(first.offset, second.offset),
    )
