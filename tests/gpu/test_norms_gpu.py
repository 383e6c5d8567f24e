"""Norms that are quantized in groups, on a GPU: beside what plain torch computes there, and in a compiled block."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.norm_spec import NormSpec
from qcompile.norms import plain
from qcompile.reference import dequantize_activation
from qcompile.runtime import norm_gpu
from tests import tolerance
from tests.kernels.test_norms import LLAMA, inputs

pytestmark = pytest.mark.gpu

LAUNCHES = 20
CASES = {
    "llama": LLAMA,
    "gemma": replace(LLAMA, weight="one more", early=False, residual=False, keep_sum=False, keep_norm=True),
    "layer norm": replace(LLAMA, norm="layer", early=False, bias=True, eps=1e-5),
    "powers": replace(LLAMA, columns=32, powers=True),
    "int8": replace(LLAMA, number="int8", columns=64),
    "a scale a row": replace(LLAMA, columns=0),
    "no norm": NormSpec(k=256, number="int8", columns=0, powers=False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [256, 2880, 4096, 16384])
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, k: int, dtype: torch.dtype) -> None:
    """Nearly all codes are those of plain torch; where a sum or a root was rounded otherwise, the next ones."""
    norm = replace(CASES[name], k=k, columns=CASES[name].columns or k)
    reason = norm_gpu.objection(norm, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    x, *others = (None if t is None else t.cuda() for t in inputs(norm, 33, dtype))
    assert x is not None
    residual, weight, bias = others
    found = torch.ops.qcompile.norm_quantize(x, residual, weight, bias, norm.encode())
    for _ in range(LAUNCHES):
        again = torch.ops.qcompile.norm_quantize(x, residual, weight, bias, norm.encode())
        for one, other in zip(found, again, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), "launches differ"
    expected = plain(x, residual, weight, bias, norm)
    same = [float((one.float() == other.float()).double().mean()) for one, other in zip(found, expected, strict=True)]
    assert same[0] > 0.97, same
    for kept, like in zip(found[2:], expected[2:], strict=True):
        if dtype != torch.float32:
            assert (kept == like).double().mean() > 0.97
        else:  # a mean of K squares added in another order, a root by two ways, and three products
            assert ((kept - like).abs() <= (math.log2(k) + 8) * tolerance.U32 * (like.abs() + 1)).all()
    one, other = (dequantize_activation(codes, scale, norm.activation) for codes, scale, *_ in (found, expected))
    # Codes that differ are neighbours: one in 30, by a relative step of 2**-3 at most.
    assert tolerance.sqnr(other, one) > 30


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("scheme", ["fp8_block", "mxfp8", "fp8", "int8"])
def test_a_compiled_block(scheme: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(512, eps=1e-6)
            self.up, self.down = nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            x = x + residual
            y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
            return y

    model = Block().cuda().to(torch.bfloat16).requires_grad_(False)
    qcompile.quantize_(model, scheme, progress=False)
    x, residual = (torch.randn(7, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        expected = model(x, residual)
        y = torch.compile(model, backend="qcompile", fullgraph=True)(x, residual)
    assert tolerance.sqnr(expected, y) > tolerance.float_sqnr_floor(3)
