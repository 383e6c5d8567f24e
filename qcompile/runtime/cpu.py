"""Quantized products on CPUs, from the best kernels that torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation


def product(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, zero_point: Tensor | None, parsed: LinearSpec, spec: str
) -> Tensor:
    """x [M, K] (8-bit codes if `x_scale` is given) times the packed weight: [M, N] in float32 or x's dtype."""
    if x_scale is not None:
        assert parsed.scheme.activation is not None
        x = dequantize_activation(x, x_scale, parsed.scheme.activation)
    return torch.ops.qcompile.gemm_cpu(x, codes, scale, zero_point, spec)


def gemm(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: LinearSpec) -> Tensor:
    """x [M, K] times the packed weight: float32 [M, N]."""
    packed = PackedWeight(codes, scale, zero_point, spec.shape, spec.scheme.weight, spec.layout)
    weight = dequantize(LAYOUTS[spec.layout].unpack(packed))
    return torch.mm(x.to(torch.float32), weight.t())
