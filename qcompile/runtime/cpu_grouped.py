"""Products with stacks of experts on CPUs: a loop over the experts that have rows."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.runtime import cpu
from qcompile.stacks import expert, padded_rows


def grouped_gemm(x: Tensor, x_scale: Tensor | None, offsets: Tensor, weight: list[Tensor], spec: LinearSpec) -> Tensor:
    """Rows `offsets[e]` to `offsets[e + 1]` of x [S, K] times the weight of expert e: float32 [S, N].

    Args:
        x: floating point (see `cpu.product`), or 8-bit codes if `x_scale` is given: [S, 1], [S, groups] or [].
        weight: the stack's tensors.
        spec: of one expert's linear.
    """
    bounds = offsets.tolist()
    shape = ((len(bounds) - 1) * padded_rows(spec.out_features), spec.in_features)
    stacked = PackedWeight.from_tensors(weight, shape, spec.scheme.weight, spec.layout)
    y = torch.zeros(x.shape[0], spec.out_features, dtype=torch.float32)
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        scale = x_scale if x_scale is None or x_scale.dim() == 0 else x_scale[start:end]
        own = expert(stacked, index, spec.out_features)
        y[start:end] = cpu.product(x[start:end], scale, list(own.tensors), spec)
    return y
