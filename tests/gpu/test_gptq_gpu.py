"""GPTQ on a GPU, whose steps are recorded once and replayed: as good as on the CPU."""

from __future__ import annotations

import pytest
import torch

from qcompile.calibrate.gptq import gptq, hessian_error
from qcompile.methods import GPTQ
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from tests.calibrate.problems import layer, statistics

pytestmark = pytest.mark.gpu

NO_WORSE = 1.02
"""Sums of floats in another order choose other codes here and there."""


@pytest.mark.parametrize(
    "name", ["int4", "int4_asym", "int3", "int8_weight_only", "fp8", "nf4", "mxfp4", "q4_k", "q6_k"]
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
