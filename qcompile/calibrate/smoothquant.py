"""SmoothQuant: outlier channels of the input are made smaller, and the weight's columns larger.

Xiao, Lin, Seznec, Wu, Demouth, Han 2023: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", arXiv:2211.10438, equation 4: s_j = max|X_j|^a / max|W_j|^(1-a).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.calibrate.statistics import InputStatistics


def smooth_scales(statistics: InputStatistics, weights: Sequence[Tensor], strength: float) -> Tensor:
    """What inputs are divided by, float32 [K], positive. Channels that never were other than 0 keep 1.

    Args:
        weights: of the linears that read the input, [N_i, K].
        strength: a.
    """
    inputs = statistics.absmax
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    live = (inputs > 0) & (columns > 0)
    scale = inputs.clamp(min=1e-12) ** strength / columns.clamp(min=1e-12) ** (1 - strength)
    scale = torch.where(live, scale, 1.0)
    return scale.clamp(1e-5, 1e5)
