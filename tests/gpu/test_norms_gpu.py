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
from qcompile.reference import quantize_activation
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
    """The norm is plain torch's, where sums and roots may be rounded otherwise; codes are those of that norm."""
    norm = replace(CASES[name], k=k, columns=CASES[name].columns or k, keep_norm=True)
    reason = norm_gpu.objection(norm, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    given = [None if t is None else t.cuda() for t in inputs(norm, 33, dtype)]
    found = torch.ops.qcompile.norm_quantize(*given, norm.encode())
    for _ in range(LAUNCHES):
        for one, other in zip(found, torch.ops.qcompile.norm_quantize(*given, norm.encode()), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), "launches differ"
    expected = plain(*given, norm)
    if norm.keep_sum:
        assert torch.equal(found[2], expected[2])
    kept, like = found[-1], expected[-1]
    if dtype != torch.float32:
        assert (kept == like).double().mean() > 0.97
    else:  # a mean of K squares added in another order, a root by two ways, and three products
        assert ((kept - like).abs() <= (math.log2(k) + 8) * tolerance.U32 * (like.abs() + 1)).all()
    codes, scale = quantize_activation(kept, norm.activation)
    assert torch.equal(found[0].float(), codes.float())
    assert torch.equal(found[1], scale)


@pytest.mark.parametrize("exponent", [-140, -126, -100, -61, -20, 0, 60, 118])
@pytest.mark.parametrize("number", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_rows_as_they_are(number: str, exponent: int) -> None:
    """Bit for bit what plain torch makes of them, of all magnitudes."""
    norm = NormSpec(k=1024, number=number, columns=128, powers=False)
    reason = norm_gpu.objection(norm, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(256, 1024, dtype=torch.float64, device="cuda").mul(2.0**exponent).float()
    found = torch.ops.qcompile.norm_quantize(x, None, None, None, norm.encode())
    for one, other in zip(found, plain(x, None, None, None, norm), strict=True):
        assert torch.equal(one.float(), other.float())


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
