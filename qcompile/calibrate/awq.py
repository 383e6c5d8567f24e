"""AWQ: columns of the weight that large inputs meet are enlarged before rounding, and the inputs made smaller.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023: "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", arXiv:2306.00978. Scales are s = mean|x|^a, or mean|x|^a / mean|w|^(1-a) as its code has
them too, with the a of a grid whose rounded weights make the output's mean square error least. With H the mean of x x^T
that error is tr(E H E^T), so no activations are kept. The clipping of the paper is `RTN(clip="output")`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcompile.calibrate.gptq import hessian_error
from qcompile.calibrate.statistics import InputStatistics
from qcompile.reference import blocks_of, choose_grid, expand_blocks, leave_two_of_four, super_scale
from qcompile.scheme import WeightScheme


def awq_scales(
    statistics: InputStatistics,
    weights: Sequence[Tensor],
    schemes: Sequence[WeightScheme | None],
    grid: int,
    shared: Callable[[Tensor], Tensor],
    layer: str,
) -> Tensor:
    """What inputs are divided by, float32 [K], positive; all 1 where nothing is better.

    Args:
        weights: of the linears that read the input, floating point [N_i, K].
        schemes: what they are rounded to; None is not at all.
        grid: how many exponents are tried.
        shared: makes scales equal that must be.

    Raises:
        LayerError: a scale that overflows its dtype.
    """
    hessian = statistics.hessian
    quantized = [(w.float(), scheme) for w, scheme in zip(weights, schemes, strict=True) if scheme is not None]
    one = torch.ones_like(statistics.absmax)

    def loss(scale: Tensor) -> float:
        total = 0.0
        for w, scheme in quantized:
            scaled = leave_two_of_four(w * scale, scheme)
            rounded = choose_grid(scaled, scheme, super_scale([scaled], scheme, layer), layer)
            error = w - rounded.decode(rounded.encode(scaled)) / scale
            total += hessian_error(error, hessian).sum().item()
        return total

    best, least = one, loss(one)
    relative = [relative_columns(w, scheme) for w, scheme in quantized]
    for candidate in _candidates(statistics.absmean, relative, grid):
        scale = shared(candidate)
        if (error := loss(scale)) < least:
            best, least = scale, error
    return best


def relative_columns(w: Tensor, scheme: WeightScheme) -> Tensor:
    """Magnitudes of a weight [N, K] over the greatest of their block."""
    shape = (w.shape[0], w.shape[1])
    top = blocks_of(w.abs(), scheme.granularity.block_of(shape)).amax((1, 3)).clamp(min=1e-12)
    return w.abs() / expand_blocks(top, scheme.granularity, shape)


def _candidates(inputs: Tensor, relative: Sequence[Tensor], grid: int) -> list[Tensor]:
    live = inputs > 0
    if not relative or not bool(live.any()):
        return []
    columns = torch.cat(list(relative)).mean(0)
    found = []
    for step in range(1, grid):
        a = step / grid
        found += [inputs**a, inputs**a / columns.clamp(min=1e-4) ** (1 - a)]
    return [_centered(torch.where(live, scale.clamp(min=1e-4), 1.0), live) for scale in found]


def _centered(scale: Tensor, live: Tensor) -> Tensor:
    """Over the geometric mean of the extremes, as the paper's code has it; 1 for dead channels."""
    within = scale[live]
    return torch.where(live, scale / (within.amax() * within.amin()).sqrt(), 1.0)
