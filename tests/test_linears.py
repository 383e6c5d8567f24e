"""Inputs of linears that were quantized before are quantized too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import ConfigError
from qcompile.linears import quantize_inputs
from tests import tolerance


def _model() -> nn.Module:
    model = nn.ModuleDict({name: nn.Linear(256, 64) for name in ("q4_k", "q6_k", "int4", "nf4", "int8")})
    rules = [{"layers": name, "scheme": name} for name in model]
    return qcompile.quantize_(model, {"rules": rules}).requires_grad_(False)


def test_weights_of_whole_numbers_and_no_others() -> None:
    model, x = _model(), torch.randn(5, 256)
    before = {name: module(x) for name, module in model.items()}
    quantize_inputs(model, {"format": "int8", "granularity": "group"})
    found = {name: str(module.scheme.activation) for name, module in model.items()}
    assert found["q4_k"] == "int8 dynamic per group 32"
    assert found["q6_k"] == "int8 dynamic per group 16"
    assert found["int4"] == "int8 dynamic per group 128"
    assert found["nf4"] == "None"
    assert found["int8"] == "int8 dynamic per token"  # as it was
    for name, module in model.items():
        if name in ("nf4", "int8"):
            assert torch.equal(module(x), before[name])
        else:
            floor = tolerance.product_sqnr_floor(tolerance.sqnr_floor("int8", 128))
            assert tolerance.sqnr(before[name] - module.bias, module(x) - module.bias) > floor


def test_a_scale_a_token() -> None:
    model = _model()
    quantize_inputs(model, {"format": "int8"})
    assert {str(model[name].scheme.activation) for name in ("q4_k", "q6_k", "int4")} == {"int8 dynamic per token"}


@pytest.mark.parametrize("given", [{"format": "fp8_e4m3"}, {"format": "int8", "dynamic": False}, {"format": "int9"}])
def test_other_activations(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        quantize_inputs(_model(), given)
