"""Quantizing weights and activations, against the float64 oracle and the bounds of `tolerance`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.bitpack import pack_bits
from qcompile.errors import LayerError
from qcompile.formats import FORMATS, IntegerFormat
from qcompile.presets import PRESETS
from qcompile.reference import (
    dequantize,
    dequantize_activation,
    leave_two_of_four,
    quantize_activation,
    quantize_weight,
)
from qcompile.scheme import FLOAT_SCALES, SCALE_DTYPES, ActivationScheme, Granularity, WeightScheme
from tests import oracle
from tests.strategies import matrices, weight_schemes
from tests.tolerance import activation_bound, assert_within, rounding, sqnr, sqnr_floor, weight_bound

NATIVE = [name for name, fmt in FORMATS.items() if fmt.native_dtype is not None]
SYMMETRIC = [*NATIVE, "int4", "int2"]
"""Formats of activations without zero points, of which there is an integer of every width."""
ACTIVATION_GRANULARITIES = [Granularity.tensor(), Granularity.channel(), Granularity.group(16)]


def scheme_of(name: str, granularity: Granularity, scale_dtype: str = "float32") -> WeightScheme:
    symmetric = not name.startswith("uint")
    return WeightScheme(format=FORMATS[name], granularity=granularity, symmetric=symmetric, scale_dtype=scale_dtype)


def pair(granularity: Granularity) -> tuple[int, int]:
    return granularity.rows, granularity.columns


@given(weight=matrices(), scheme=weight_schemes())
def test_dequantized_weight_is_the_oracle_s_and_near_the_original(weight, scheme):
    packed = quantize_weight(weight, scheme)
    packed.check()
    exact = oracle.dequantize(packed)
    actual = dequantize(packed)
    assert actual.dtype == torch.float32
    # Code minus zero point is exact, and one rounding follows.
    assert_within(actual, exact, rounding(exact, torch.float32))
    scale = oracle.expand(packed.scale, pair(scheme.granularity), packed.shape)
    values = oracle.decode_values(scheme.format.name)
    assert_within(exact, weight, weight_bound(values, weight, scale, SCALE_DTYPES[scheme.scale_dtype]))


@pytest.mark.parametrize("name", ["int4_24", "int8_24"])
@given(weight=matrices())
def test_two_of_four_are_left(name, weight):
    """The greatest, of equal ones the first; what is left becomes what it becomes in a dense weight."""
    scheme = PRESETS[name].weight.fit("layer", (weight.shape[0], weight.shape[1]))
    pruned = torch.zeros(weight.shape)
    for n, row in enumerate(weight.tolist()):
        for first in range(0, len(row), 4):
            four = range(first, min(first + 4, len(row)))
            for k in sorted(four, key=lambda k: -abs(row[k]))[:2]:
                pruned[n, k] = row[k]
    packed, dense = quantize_weight(weight, scheme), quantize_weight(pruned, replace(scheme, sparsity=None))
    assert torch.equal(packed.codes, dense.codes)
    assert torch.equal(packed.scale, dense.scale)
    again = dequantize(packed)
    assert torch.equal(leave_two_of_four(again, scheme), again)


@pytest.mark.parametrize("name", FORMATS)
def test_representable_weights_survive_bit_for_bit(name):
    """With a power of two as the scale nothing rounds, so every finite value comes back."""
    values = oracle.decode_values(name).float()
    values = values[values.isfinite()]
    reach = FORMATS[name].absmax
    if isinstance(FORMATS[name], IntegerFormat):
        # The greatest magnitude must be the reach, half a step more than the greatest value.
        sentinel = torch.tensor([-reach if FORMATS[name].signed else values.max().item()])
        values = values[1:-1] if FORMATS[name].signed else values
        values = torch.cat([values, sentinel])
    weight = values[None] * 0.25
    packed = quantize_weight(weight, scheme_of(name, Granularity.channel()))
    assert packed.scale.item() == 0.25
    exact = weight if not FORMATS[name].name.startswith("int") else weight[:, :-1]
    assert torch.equal(dequantize(packed)[:, : exact.shape[1]], exact)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group", [32, 128])
def test_gaussian_weights_reach_the_format_s_sqnr(name, group):
    weight = torch.randn(64, 1024)
    for scale_dtype in FLOAT_SCALES:
        packed = quantize_weight(weight, scheme_of(name, Granularity.group(group), scale_dtype))
        assert sqnr(weight, dequantize(packed)) >= sqnr_floor(name, group)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_blocks_stay_zero(name):
    weight = torch.randn(4, 64)
    weight[1] = 0
    weight[2, 16:32] = 0
    packed = quantize_weight(weight, scheme_of(name, Granularity.group(16)))
    restored = dequantize(packed)
    assert (restored[1] == 0).all()
    assert (restored[2, 16:32] == 0).all()
    assert (packed.scale[1] == float(name != "iq4_nl")).all()  # whose codebook holds no 0


@pytest.mark.parametrize("name", FORMATS)
def test_an_outlier_hurts_its_own_block_only(name):
    weight = torch.randn(2, 64)
    scheme = scheme_of(name, Granularity.group(32))
    calm = dequantize(quantize_weight(weight, scheme))
    weight[0, 3] = 1e6
    assert torch.equal(dequantize(quantize_weight(weight, scheme))[:, 32:], calm[:, 32:])
    assert torch.equal(dequantize(quantize_weight(weight, scheme))[1], calm[1])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_weights_use_the_asymmetric_range(sign):
    weight = sign * (torch.rand(4, 64) + 3)
    restored = dequantize(quantize_weight(weight, scheme_of("uint8", Granularity.channel())))
    zero_points = quantize_weight(weight, scheme_of("uint8", Granularity.channel())).zero_point
    assert (zero_points == (0 if sign > 0 else 255)).all()
    scale = quantize_weight(weight, scheme_of("uint8", Granularity.channel())).scale.expand(4, 64)
    assert_within(restored, weight, weight_bound(oracle.decode_values("uint8"), weight, scale, torch.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    weight = torch.randn(4, 32)
    weight[3, 31] = bad
    with pytest.raises(LayerError, match=r"model\.layers\.0\.fc: the weight holds NaN or infinity"):
        quantize_weight(weight, PRESETS["int8"].weight, "model.layers.0.fc")


def test_other_refusals_name_the_layer():
    scheme = PRESETS["int8"].weight
    with pytest.raises(LayerError, match=r"fc: .* floating-point matrix, not torch.int8 \(4, 4\)"):
        quantize_weight(torch.zeros(4, 4, dtype=torch.int8), scheme, "fc")
    with pytest.raises(LayerError, match=r"fc: .* floating-point matrix"):
        quantize_weight(torch.zeros(4), scheme, "fc")
    with pytest.raises(LayerError, match=r"fc: the weight is empty, \(0, 4\)"):
        quantize_weight(torch.zeros(0, 4), scheme, "fc")


def test_a_scale_that_overflows_is_refused():
    weight = torch.full((1, 32), 1e6)
    with pytest.raises(LayerError, match="fc: a scale overflows float16; choose another scale_dtype"):
        quantize_weight(weight, scheme_of("int4", Granularity.channel(), "float16"), "fc")


@pytest.mark.parametrize("name", ["int4", "uint4", "fp8_e4m3"])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-12, 3e38])
def test_extreme_magnitudes_stay_finite(name, size):
    """A scale that underflows is taken as 1, and the block is 0: no division by zero."""
    weight = torch.linspace(-1, 1, 32)[None] * size
    for scale_dtype in ("float32", "bfloat16"):
        restored = dequantize(quantize_weight(weight, scheme_of(name, Granularity.channel(), scale_dtype)))
        assert restored.isfinite().all()


@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", SYMMETRIC)
@given(x=matrices(columns=st.integers(1, 50)))
def test_activations_are_within_half_a_step(name, granularity, x):
    scheme = ActivationScheme(format=FORMATS[name], granularity=granularity)
    codes, scale = quantize_activation(x, scheme)
    assert codes.dtype == scheme.dtype
    assert codes.shape == x.shape
    assert scale.dtype == torch.float32
    _, exact_scale = oracle.quantize_activation(x, name, pair(granularity))
    restored = dequantize_activation(codes, scale, scheme)
    assert restored.dtype == torch.float32
    representable = exact_scale > torch.finfo(torch.float32).smallest_normal
    bound = activation_bound(oracle.decode_values(name), x, exact_scale)
    bound = torch.where(representable, bound, x.double().abs() + torch.finfo(torch.float32).smallest_normal)
    assert_within(restored, x, bound)


@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", ["uint2", "uint4", "uint7"])
@given(x=matrices(columns=st.integers(1, 50)))
def test_shifted_activations_are_within_half_a_step(name, granularity, x):
    """The range from the least to the greatest number, and 0, in 2^b - 1 steps; codes less zero points are int8."""
    scheme = ActivationScheme(format=FORMATS[name], granularity=granularity)
    codes, scale = quantize_activation(x, scheme)
    steps = 2 ** FORMATS[name].bits - 1
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert int(codes.max()) - int(codes.min()) <= (steps if granularity == Granularity.tensor() else 2 * steps)
    restored = dequantize_activation(codes, scale, scheme)
    step = scale.repeat_interleave(16, -1)[:, : x.shape[1]] if granularity.is_group else scale.expand(x.shape)
    # The scale and x over it are rounded four times, each by 2**-24 of at most `steps`.
    step = step.double()
    bound = step * (0.5 + steps * 2**-22) + restored.double().abs() * 2**-24
    representable = step > steps * torch.finfo(torch.float32).smallest_normal
    slack = x.double().abs() + steps * torch.finfo(torch.float32).smallest_normal
    assert_within(restored, x, torch.where(representable, bound, slack))


@pytest.mark.parametrize("name", SYMMETRIC)
def test_activations_with_an_exact_scale_match_the_oracle_bit_for_bit(name):
    reach = FORMATS[name].absmax
    x = (torch.rand(8, 48) * 2 - 1) * reach / 4
    x[:, ::16] = reach / 4
    for granularity in ACTIVATION_GRANULARITIES:
        scheme = ActivationScheme(format=FORMATS[name], granularity=granularity)
        codes, scale = quantize_activation(x, scheme)
        values, exact_scale = oracle.quantize_activation(x, name, pair(granularity))
        assert (scale == 0.25).all()
        assert (exact_scale == 0.25).all()
        assert torch.equal(codes.double(), values)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_scale_shapes(name):
    x = torch.randn(2, 3, 40)
    shapes = {"tensor": (), "channel": (2, 3, 1), "group 16": (2, 3, 3)}
    for granularity in ACTIVATION_GRANULARITIES:
        _, scale = quantize_activation(x, ActivationScheme(format=FORMATS[name], granularity=granularity))
        assert scale.shape == shapes[str(granularity)]


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(name, bad):
    x = torch.randn(3, 32)
    scheme = ActivationScheme(format=FORMATS[name], granularity=Granularity.channel())
    calm = dequantize_activation(*quantize_activation(x, scheme), scheme)
    x[1, 5] = bad
    codes, scale = quantize_activation(x, scheme)
    restored = dequantize_activation(codes, scale, scheme)
    assert not scale[1].isfinite().any()
    assert not (restored[1] @ torch.randn(32)).isfinite()
    assert torch.equal(restored[[0, 2]], calm[[0, 2]])


@pytest.mark.parametrize("name", SYMMETRIC)
def test_static_scales_saturate(name):
    scheme = ActivationScheme(format=FORMATS[name], granularity=Granularity.tensor(), dynamic=False)
    x = torch.tensor([[math.inf, -math.inf, 1e30, -1e30, 0.5, 0.0]])
    codes, scale = quantize_activation(x, scheme, torch.tensor(0.5))
    values = oracle.decode_values(name)
    finite = values[values.isfinite()]
    top, bottom = finite.max().item(), finite.min().item()
    assert codes.double().tolist() == [[top, bottom, top, bottom, 1.0, 0.0]]
    assert scale.shape == ()


@pytest.mark.parametrize("name", SYMMETRIC)
def test_zero_and_empty_activations(name):
    for granularity in (Granularity.channel(), Granularity.group(16)):
        scheme = ActivationScheme(format=FORMATS[name], granularity=granularity)
        codes, scale = quantize_activation(torch.zeros(2, 16), scheme)
        assert (codes.float() == 0).all()
        assert (scale == 1).all()
        codes, _ = quantize_activation(torch.zeros(0, 16), scheme)
        assert codes.shape == (0, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_the_nearest_value_under_their_scales(name):
    """Whatever the scales are, no other code comes nearer to a weight by more than float32 rounds."""
    weight = leave_two_of_four(torch.randn(8, 256), PRESETS[name].weight)
    weight[3] = 0
    packed = quantize_weight(weight, PRESETS[name].weight)
    packed.check()
    exact = oracle.dequantize(packed)
    steps = oracle.dequantize(replace_codes(packed, 1)) - oracle.dequantize(replace_codes(packed, 0))
    values = oracle.decode_values(packed.scheme.format.name)
    step = steps / (values[1] - values[0])
    origin = oracle.dequantize(replace_codes(packed, 0)) - values[0] * step
    values = values[values.isfinite()]
    reachable = origin[..., None] + step[..., None] * values
    nearest = (reachable - weight[..., None]).abs().amin(-1)
    slack = rounding(reachable.abs().amax(-1), torch.float32) * 4
    assert ((exact - weight).abs() <= nearest + slack).all()
    assert (exact[3] == 0).all()


def replace_codes(packed, code):
    codes = torch.full(packed.shape, code, dtype=torch.uint8)
    return replace(packed, codes=pack_bits(codes, packed.scheme.format.bits))
