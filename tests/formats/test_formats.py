"""Every registered format over every code, against tables made apart from it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import ConfigError
from qcompile.expr import Expr, var
from qcompile.formats import FORMATS, Format, IntegerFormat, get_format
from qcompile.formats.base import register
from tests import oracle

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def codes_of(fmt: Format) -> torch.Tensor:
    return torch.arange(2**fmt.bits, dtype=torch.int32)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, any NaN being like another; -0 differs from 0."""
    a, b = a.double(), b.double()
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


@every_format
def test_every_code_decodes_to_the_table(fmt):
    decoded = fmt.decode(codes_of(fmt))
    assert decoded.dtype == torch.float32
    assert same(decoded, oracle.decode_values(fmt.name))


@every_format
def test_native_dtype_has_the_same_values(fmt):
    if fmt.native_dtype is None:
        return
    codes = codes_of(fmt).to(torch.uint8)
    native = (codes ^ 0x80).view(torch.int8) if isinstance(fmt, IntegerFormat) else codes.view(fmt.native_dtype)
    assert same(native.to(torch.float32), oracle.decode_values(fmt.name))


@every_format
def test_encode_inverts_decode(fmt):
    values = oracle.decode_values(fmt.name).float()
    finite = values.isfinite()
    again = fmt.encode(values)
    assert again.dtype == torch.uint8
    assert torch.equal(fmt.decode(again[finite].int()), values[finite])


@every_format
def test_encode_takes_the_nearest_and_of_ties_the_even(fmt):
    values = oracle.decode_values(fmt.name)
    steps = values[values.isfinite()].unique()
    middles = (steps[1:] + steps[:-1]) / 2
    probes = torch.cat(
        [middles, middles.float().nextafter(steps[1:].float()), middles.float().nextafter(steps[:-1].float())]
    )
    probes = probes.float()
    expected = [values[oracle.nearest_code(fmt.name, p)].item() for p in probes.tolist()]
    decoded = fmt.decode(fmt.encode(probes).int())
    assert torch.equal(decoded.double(), torch.tensor(expected, dtype=torch.float64))


@every_format
def test_encode_saturates(fmt):
    values = oracle.decode_values(fmt.name)
    finite = values[values.isfinite()]
    beyond = torch.tensor([math.inf, 1e30, -1e30, -math.inf])
    decoded = fmt.decode(fmt.encode(beyond).int()).tolist()
    assert decoded == [finite.max(), finite.max(), finite.min(), finite.min()]


@every_format
def test_nan_becomes_a_code_the_format_defines(fmt):
    code = fmt.encode(torch.tensor([math.nan])).item()
    value = oracle.decode_values(fmt.name)[code].item()
    has_nan = bool(oracle.decode_values(fmt.name).isnan().any())
    assert math.isnan(value) if has_nan else abs(value) == oracle.decode_values(fmt.name).abs().min()


@every_format
def test_absmax(fmt):
    """Half the range for integers, whose steps are equal; else the greatest magnitude."""
    values = oracle.decode_values(fmt.name)
    finite = values[values.isfinite()]
    integer = isinstance(fmt, IntegerFormat)
    assert fmt.absmax == ((finite.max() - finite.min()) / 2 if integer else finite.abs().max()).item()


@every_format
@given(value=st.floats(width=32, allow_nan=False))
def test_encode_any_number(fmt, value):
    decoded = fmt.decode(fmt.encode(torch.tensor([value])).int()).item()
    assert decoded == oracle.decode_values(fmt.name)[oracle.nearest_code(fmt.name, value)].item()


@every_format
def test_decode_prints_as_an_expression(fmt):
    assert isinstance(fmt.decode(var("code")), Expr)


def test_oracle_tables_by_hand():
    e4m3, e5m2 = oracle.decode_values("fp8_e4m3"), oracle.decode_values("fp8_e5m2")
    assert (e4m3[1], e4m3[0x7E], e4m3[0x38]) == (2.0**-9, 448.0, 1.0)
    assert (e5m2[1], e5m2[0x7B], e5m2[0x7C], e5m2[0x3C]) == (2.0**-16, 57344.0, math.inf, 1.0)
    assert oracle.decode_values("int4").tolist() == [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]


def test_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ConfigError, match=r"unknown number format 'itn4'; did you mean .*int4"):
        get_format("itn4")
    with pytest.raises(ConfigError, match="unknown number format"):
        get_format("")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'int4' is registered already"):
        register(FORMATS["int4"])
