"""GPTQ on a GPU, by the kernel of columns and by plain torch: as good as on the CPU."""

from __future__ import annotations

import pytest
import torch

from qcompile.calibrate import columns
from qcompile.calibrate.gptq import gptq, hessian_error
from qcompile.methods import GPTQ
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from tests.calibrate.problems import layer, statistics

pytestmark = pytest.mark.gpu

NO_WORSE = 1.02
"""Sums of floats in another order choose other codes here and there."""


@pytest.mark.parametrize(
    "name", ["int4", "int4_asym", "int3", "int8_weight_only", "fp8", "nf4", "mxfp4", "q4_k", "q6_k", "int4_24"]
)
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(96, 768, 128), (96, 768, 112), (96, 256, 1024), (103, 768, 128)]
)
def test_as_on_the_cpu(name: str, rows: int, columns: int, block_size: int) -> None:
    weight, x = layer(rows, columns, 1024)
    hessian, scheme = statistics(x).hessian, PRESETS[name].weight.fit("layer", (rows, columns))

    def error(decoded: torch.Tensor) -> float:
        return float(hessian_error((weight - decoded.cpu()).double(), hessian.double()).sum())

    on_cpu = error(dequantize(gptq(weight, hessian, scheme, GPTQ(block_size=block_size))))
    packed = gptq(weight.cuda(), hessian.cuda(), scheme, GPTQ(block_size=block_size))
    assert packed.device.type == "cuda"
    assert error(dequantize(packed)) <= NO_WORSE * on_cpu
    assert error(dequantize(packed)) < error(dequantize(quantize_weight(weight, scheme)))


def test_the_same_from_run_to_run() -> None:
    weight, x = layer(1000, 768, 1024)
    hessian, scheme = statistics(x).hessian.cuda(), PRESETS["int4"].weight
    first, second = (dequantize(gptq(weight.cuda(), hessian, scheme, GPTQ())) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["int4", "int4_asym", "nf4", "nvfp4", "q4_k"])
def test_the_kernel_against_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are fused with products in one and not in the other: a code in some thousand differs."""
    weight, x = layer(200, 768, 1024)
    hessian, scheme = statistics(x).hessian.cuda(), PRESETS[name].weight.fit("layer", (200, 768))
    ours = dequantize(gptq(weight.cuda(), hessian, scheme, GPTQ()))
    monkeypatch.setattr(columns, "kernel_for", lambda scheme, device: None)
    plain = dequantize(gptq(weight.cuda(), hessian, scheme, GPTQ()))
    assert (ours != plain).float().mean() < 0.02
