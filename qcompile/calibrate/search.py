"""The range of each block, searched for the least error: clipping a few large weights leaves finer steps to the rest.

Without data it is the squared error of the weights, as OCTAV (Sakr et al. 2022, arXiv:2206.06501) and LLM libraries
minimize it; with data, that error weighted by the inputs' mean squares (the importance matrix of llama.cpp,
https://github.com/ggml-org/llama.cpp/pull/4861), or the error of each block's part of the output (the clipping of AWQ,
Lin et al. 2023, arXiv:2306.00978, section 3.2 and its code).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.calibrate.fit import best_grid
from qcompile.calibrate.ranges import searched
from qcompile.calibrate.super_blocks import search_super_blocks
from qcompile.reference import Grid, blocks_of, choose_grid
from qcompile.scheme import WeightScheme

_WIDEST = 512
"""Columns of a block up to which the error of its part of the output is computed; of wider ones the inputs' mean
squares weight it."""


def search_grid(
    w: Tensor, scheme: WeightScheme, above: Tensor | None, layer: str, clip: str, gram: Tensor | None
) -> Grid:
    """The best of several grids, block by block (super-block by super-block); of equals that of the weights' own range.

    Args:
        w: float32 [N, K], finite.
        above: the weight's super scale, float32 [].
        clip: of `qcompile.methods.CLIPS`. For super-blocks "output" is "importance".
        gram: float32 [K, K], the mean of x x^T over inputs; for "importance" and "output".

    Raises:
        LayerError: a scale overflows its dtype.
    """
    if clip == "none":
        return choose_grid(w, scheme, above, layer)
    weight = torch.ones_like(w[0]) if clip == "mse" else _diagonal(gram)
    if scheme.has_super_blocks:
        return search_super_blocks(w, weight, scheme, layer)
    if clip != "output" or not scheme.granularity.is_group:
        choose_grid(w, scheme, above, layer)  # refuses scales that overflow
        if (grid := searched(w, weight, scheme)) is not None:
            return grid
    return best_grid(w, weight, scheme, above, layer, lambda error: block_errors(error, scheme, clip, gram))


def _diagonal(gram: Tensor | None) -> Tensor:
    assert gram is not None
    return gram.diagonal()


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
