"""Layers that turn their inputs, and activations of 4 bits, on a GPU: eager, and compiled with CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from qcompile.linears import quantized_linear
from qcompile.scheme_config import parse_scheme
from tests import tolerance

pytestmark = pytest.mark.gpu

SCHEMES = {
    "weights": {"weight": {"format": "int8", "rotated": True}},
    "int4 x int4": {
        "weight": {"format": "int4", "group_size": 64, "rotated": True},
        "activation": {"format": "int4", "symmetric": False, "group_size": 64},
    },
    "int8 x int4": {"weight": {"format": "int8", "rotated": True}, "activation": {"format": "int4"}},
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 40])
def test_as_on_the_cpu(name: str, rows: int) -> None:
    """Inputs are bfloat16: codes of numbers near a middle differ, by rounding between the factors of the transform."""
    torch.manual_seed(0)
    module = torch.nn.Linear(1792, 512, dtype=torch.bfloat16).requires_grad_(False)  # 28 * 64
    layer = quantized_linear("layer", module, parse_scheme(SCHEMES[name]), None)
    x = torch.randn(rows, 1792, dtype=torch.bfloat16)
    x[:, 3] *= 30
    expected = layer(x.float())
    layer = layer.cuda()
    floor = 30.0 if name == "weights" else 22.0
    assert tolerance.sqnr(expected, layer(x.cuda())) > floor
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        assert tolerance.sqnr(expected, compiled(x.cuda())) > floor
