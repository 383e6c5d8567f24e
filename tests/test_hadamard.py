"""The Hadamard transform, exactly: its entries are powers of two, and so are those of inputs here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qcompile.calibrate.codes import choose_codes
from qcompile.errors import ConfigError
from qcompile.hadamard import factors, gain, transform, turn_gram, turn_weight, unturn_weight
from qcompile.linears import quantized_linear
from qcompile.methods import parse_method
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme import Scheme
from qcompile.scheme_config import parse_scheme, scheme_to_dict
from tests import tolerance
from tests.calibrate.problems import layer, statistics

SIZES = {
    1: (),
    2: (2,),
    9: (),
    24: (12, 2),
    28: (28,),
    36: (36,),
    60: (60,),
    172: (4,),
    576: (36, 16),
    1536: (12, 16, 8),
}


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal(size: int) -> None:
    assert factors(size) == SIZES[size]
    eye = torch.eye(size, dtype=torch.float64)
    matrix = transform(eye)
    assert torch.equal(matrix @ matrix.t(), gain(size) * eye)
    assert torch.equal(transform(eye, transposed=True), matrix.t())
    assert 2.0 ** -len(factors(size)) <= gain(size) <= 2.0 ** len(factors(size))
    spread = math.prod(factors(size))
    assert torch.equal((matrix != 0).sum(0), torch.full((size,), spread))


@pytest.mark.parametrize(
    ("size", "expected"), [(4096, (64, 64)), (14336, (28, 32, 16)), (11008, (16, 16)), (8960, (140, 64))]
)
def test_sizes_of_models(size: int, expected: tuple[int, ...]) -> None:
    assert factors(size) == expected


def test_products_stay() -> None:
    weight, x = layer(8, 48)
    turned = turn_weight(weight)
    exact = x.double() @ weight.double().t()
    product = transform(x.double()) @ turned.double().t()
    size = (x.double().abs().norm(dim=1)[:, None] * weight.double().norm(dim=1)) * 48**0.5
    assert ((product - exact).abs() <= size * 2**-23).all()
    assert ((unturn_weight(turned) - weight).abs() <= weight.norm(dim=1)[:, None] * 48**0.5 * 2**-23).all()
    hessian = statistics(x).hessian
    seen = statistics(transform(x)).hessian
    assert ((turn_gram(hessian) - seen).abs() <= hessian.diagonal().sum() * 2**-18).all()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_rotated_layer(method: str) -> None:
    """Codes are of the turned weight, the decoded weight is as it was, and outliers of inputs are spread."""
    weight, x = layer(32, 96)
    x[:, 5] *= 20
    plain = replace(PRESETS["int4_int4"], method=parse_method(method))
    rotated = replace(plain, weight=replace(plain.weight, rotated=True))
    assert parse_scheme(scheme_to_dict(rotated)) == rotated
    module = torch.nn.Linear(96, 32, bias=False).requires_grad_(False)
    module.weight.copy_(weight)
    expected = x @ weight.t()

    def noise(scheme: Scheme) -> float:
        packed = choose_codes(weight, scheme, statistics(x).hessian, "layer")
        assert tolerance.sqnr(weight, dequantize(packed)) > 10
        return float((quantized_linear("layer", module, scheme, None, packed)(x) - expected).square().mean())

    assert noise(rotated) < 0.5 * noise(plain)


def test_the_turned_weight_is_quantized() -> None:
    weight, _ = layer(16, 96)
    scheme = replace(PRESETS["int4"].weight.fit("layer", (16, 96)), rotated=True)
    codes = quantize_weight(weight, scheme).codes
    assert torch.equal(codes, quantize_weight(turn_weight(weight), replace(scheme, rotated=False)).codes)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="2:4 sparse"):
        parse_scheme({"weight": {"format": "int4", "sparsity": "2:4", "rotated": True}})
    static = {"format": "int8", "dynamic": False}
    with pytest.raises(ConfigError, match="dynamic activation scales"):
        parse_scheme({"weight": {"format": "int8", "rotated": True}, "activation": static})
    with pytest.raises(ConfigError, match="zero points, which go with dynamic"):
        parse_scheme({"weight": {"format": "int8"}, "activation": {"format": "uint4", "dynamic": False}})
    with pytest.raises(ConfigError, match="activations cannot be uint8"):
        parse_scheme({"weight": {"format": "int8"}, "activation": {"format": "int8", "symmetric": False}})
