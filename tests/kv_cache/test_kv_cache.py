"""Formats and schemes of quantized keys and values: codes, scales, the configuration's key, formats that users add."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.attention import reference
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import ConfigError
from qcompile.kv_cache import (
    ALIASES,
    KV_FORMATS,
    SCALES,
    AttentionSpec,
    KVFormat,
    KVScheme,
    KVSpec,
    decode_attention_spec,
    decode_kv_spec,
    dequantize,
    hadamard,
    kv_format,
    parse_kv_cache,
    quantize,
    register,
    rotated,
)
from tests import oracle, tolerance
from tests.strategies import FLOATS

BUILT_IN = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")


def scheme(name: str, scales: str) -> KVScheme:
    return KVScheme(format=kv_format(name), scales=scales)


def test_numbers_as_they_are() -> None:
    for name in ("bfloat16", "float16", "float32"):
        given_ = parse_kv_cache(name)
        assert given_ is not None
        assert given_.to_config() == name
        assert str(given_) == f"{name}, not quantized"
        assert parse_kv_cache("auto", getattr(torch, name)) == given_
        x = torch.randn(1, 2, 3, 8).to(getattr(torch, name))
        codes, scale = quantize(x, given_, torch.ones(()))
        assert codes.dtype == x.dtype
        assert torch.equal(dequantize(codes, scale, given_, 8), x.float())
        with pytest.raises(ConfigError, match=f"{name} keys and values are not quantized, and have no options"):
            parse_kv_cache({"format": name, "scales": "token"})
        with pytest.raises(ConfigError, match="not quantized, and have no options"):
            parse_kv_cache({"format": name, "rotate": True})
    with pytest.raises(ConfigError, match='name it: "bfloat16"'):
        parse_kv_cache("auto")
    with pytest.raises(ConfigError, match=r"scales 'none' is unknown; there are tensor, head, token"):
        parse_kv_cache({"format": "int8", "scales": "none"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_code_has_its_value_and_encodes_to_itself(name: str) -> None:
    fmt = kv_format(name)
    width = fmt.width(512)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2 * width // 512)[:width]
    values = fmt.decode(codes, 512)
    expected = oracle.kv_values(codes.reshape(1, 1, 1, width), torch.ones(()), name, 512).flatten()
    assert torch.equal(values.double().nan_to_num(12345.0), expected.nan_to_num(12345.0))
    finite = values.isfinite()
    again = fmt.decode(fmt.encode(values.nan_to_num(0.0, 0.0, 0.0)), 512)
    assert torch.equal(again[finite], values[finite])


@given(
    st.sampled_from(BUILT_IN),
    st.sampled_from(SCALES),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 5), st.sampled_from([2, 16, 80])),
    st.sampled_from(FLOATS),
    st.floats(-20, 20),
)
def test_numbers_are_rounded_to_the_nearest(
    name: str, scales: str, shape: tuple[int, int, int, int], dtype: torch.dtype, exponent: float
) -> None:
    most = torch.finfo(dtype).max  # infinities have no nearest number
    x = (torch.randn(shape) * 2.0**exponent).clamp(-most, most).to(dtype)
    kind = scheme(name, scales)
    given_scale = None
    if not kind.dynamic:
        top = x.float().abs().amax((0, 2, 3)) if x.numel() else torch.ones(shape[1])
        given_scale = (top if scales == "head" else top.amax()).clamp(min=1e-30) / kind.format.absmax
    codes, scale = quantize(x, kind, given_scale)
    assert codes.dtype == torch.uint8
    assert codes.shape == (*shape[:3], kind.format.width(shape[3]))
    assert scale.shape == {"tensor": (), "head": shape[1:2], "token": shape[:3]}[scales]
    values = dequantize(codes, scale, kind, shape[3])
    exact = oracle.kv_values(codes, scale, name, shape[3])
    tolerance.assert_within(values, exact, exact.abs() * tolerance.U32)
    if x.numel():
        each = {0: scale, 1: scale.view(-1, 1, 1), 3: scale.unsqueeze(-1)}[scale.dim()].expand(shape)
        bound = tolerance.weight_bound(oracle.decode_values(name), x, each, torch.float32)
        tolerance.assert_within(values, x.double(), bound)


@pytest.mark.parametrize("name", BUILT_IN)
def test_zeros_and_values_that_are_not_finite(name: str) -> None:
    x = torch.zeros(1, 1, 3, 16)
    x[0, 0, 1, 3], x[0, 0, 2, 4] = torch.inf, torch.nan
    codes, scale = quantize(x, scheme(name, "token"))
    values = dequantize(codes, scale, scheme(name, "token"), 16)
    assert torch.equal(values[0, 0, 0], torch.zeros(16))
    assert not values[0, 0, 1:].isfinite().any()
    saturated = dequantize(*quantize(x[:, :, :2], scheme(name, "tensor"), torch.ones(())), scheme(name, "tensor"), 16)
    assert saturated.isfinite().all()


@pytest.mark.parametrize("name", [*BUILT_IN, *ALIASES])
def test_a_name_takes_the_scales_of_its_format(name: str) -> None:
    parsed = parse_kv_cache(name)
    assert parsed is not None
    assert parsed.format.name == ALIASES.get(name, name)
    assert parsed.scales == ("token" if "int" in name else "tensor")
    assert parse_kv_cache(parsed) is parsed
    assert parse_kv_cache({"format": name}) == parsed


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("fp9", r"unknown KV cache format 'fp9'; did you mean fp8"),
        (8, "kv_cache must be a name, a mapping or null, not 8"),
        ({"scales": "head"}, "kv_cache needs a format"),
        ({"format": "fp8", "scale": "head"}, r"unknown key 'scale' in kv_cache; did you mean scales\?"),
        ({"format": "fp8", "scales": "channel"}, "scales 'channel' is unknown; there are tensor, head, token"),
        ({"format": ["fp8"]}, r"unknown KV cache format \['fp8'\]"),
        ({"format": "int4", "group": 48}, "group must be 16, 32, 64 or 128 numbers, not 48"),
        ({"format": "fp8", "group": 32}, 'groups have scales for each token; give "scales": "token", not tensor'),
        (
            {"format": "fp8", "scales": "token", "symmetric": False},
            '"symmetric": false is for int8 and int4 with scales',
        ),
        ({"format": "int8", "scales": "head", "rotate": True}, '"rotate" needs "scales": "token"'),
        ({"format": "int4", "rotate": 1}, "rotate must be true or false, not 1"),
    ],
)
def test_what_is_no_kv_cache_says_so(given_: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_kv_cache(given_)
    with pytest.raises(ConfigError, match=message):
        parse_config({"rules": [{"layers": "*", "scheme": "int4"}], "kv_cache": given_})


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_key_of_a_configuration_round_trips(name: str, scales: str) -> None:
    given_ = {"rules": [{"layers": "*", "scheme": "int4"}], "kv_cache": {"format": name, "scales": scales}}
    config = parse_config(given_)
    assert config.kv_cache == scheme(name, scales)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(parse_config(given_))
    alone = parse_config({"kv_cache": name})
    assert alone.rules == ()
    assert QuantConfig.from_dict(alone.to_dict()) == alone


@pytest.mark.parametrize("more", [{"group": 32}, {"symmetric": False}, {"rotate": True}, {"group": 16, "rotate": True}])
def test_options_round_trip(more: dict[str, object]) -> None:
    config = parse_config({"kv_cache": {"format": "int4", **more}})
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.kv_cache is not None
    spec = KVSpec(scheme=config.kv_cache, head_dim=64)
    assert decode_kv_spec(spec.encode()) == spec


@given(
    st.sampled_from(["int4", "int8", "fp8_e4m3"]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.sampled_from(FLOATS),
    st.floats(-10, 10),
)
def test_groups_and_offsets_round_to_the_nearest(
    name: str, group: int, symmetric: bool, dtype: torch.dtype, mean: float
) -> None:
    symmetric = symmetric or name.startswith("fp8")
    kind = KVScheme(format=kv_format(name), scales="token", group=group, symmetric=symmetric)
    if not kind.compact:
        return
    x = (torch.randn(2, 3, 4, 64) + mean).to(dtype)
    codes, scale = quantize(x, kind)
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (2, 3, 4, kind.scale_count(64))
    values = dequantize(codes, scale, kind, 64)
    scaled, offset = oracle.kv_parts(codes, scale, name, 64, not symmetric)
    tolerance.assert_within(values, scaled + offset, (scaled.abs() + offset.abs()) * 2 * tolerance.U32)
    each = scale.double()[..., : 64 // (group or 64)].repeat_interleave(group or 64, -1)
    bound = tolerance.weight_bound(oracle.decode_values(name), x.double() - offset, each, torch.bfloat16)
    # An offset is rounded to bfloat16 too, which moves the range by as much.
    moved = tolerance.rounding(offset, torch.bfloat16) + tolerance.gamma(3, tolerance.U32) * (
        x.double().abs() + 9 * each
    )
    tolerance.assert_within(values, x.double(), bound + (0 if symmetric else moved))


@pytest.mark.parametrize("size", [2, 24, 64, 80])
def test_rotation_is_its_own_inverse(size: int) -> None:
    x = torch.randn(5, size)
    tolerance.assert_within(
        rotated(rotated(x)),
        x,
        tolerance.float_bound(x, 4 * size, torch.float32, x.abs().sum(-1, keepdim=True).expand_as(x)),
    )
    matrix = hadamard(size, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)


def test_no_rules_need_a_kv_cache() -> None:
    with pytest.raises(ConfigError, match="config needs rules"):
        parse_config({"rules": [], "kv_cache": None})


def test_an_odd_head_size_does_not_fit_half_bytes() -> None:
    with pytest.raises(ConfigError, match="int4 keys and values need an even head size, not 15"):
        kv_format("int4").width(15)


@dataclass(frozen=True)
class Negated(KVFormat):
    """int8 of the negated vector, back to front."""

    def width(self, head_dim: int) -> int:
        return head_dim

    def encode(self, x: Tensor) -> Tensor:
        return ((-x.flip(-1)).round().clamp(-127, 127) + 128).to(torch.uint8)

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        return -(codes.flip(-1).float() - 128)


@pytest.fixture
def added() -> Iterator[str]:
    register(Negated("negated", 127.0, "token"))
    yield "negated"
    del KV_FORMATS["negated"]


def test_a_format_that_users_add(added: str) -> None:
    with pytest.raises(ValueError, match="'negated' is registered already"):
        register(Negated(added, 127.0, "token"))
    kind = parse_kv_cache(added)
    assert kind is not None
    x = torch.randn(1, 2, 4, 8)
    codes, scale = quantize(x, kind)
    values = dequantize(codes, scale, kind, 8)
    each = scale[..., None].expand(x.shape)
    bound = tolerance.weight_bound(oracle.decode_values("int8"), x, each, torch.float32)
    tolerance.assert_within(values, x.double(), bound)
    half = KVSpec(scheme=kind, head_dim=8)
    spec = AttentionSpec(key=half, value=half, scale=0.5)
    assert decode_attention_spec(spec.encode()) == spec
    query = torch.randn(1, 2, 1, 8)
    y = torch.ops.qcompile.attention(query, [codes, scale, codes, scale], None, None, spec.encode())
    expected = reference(query, [codes, scale] * 2, None, None, spec.encode())
    magnitude = values.abs().amax().expand(y.shape)
    bound = tolerance.float_bound(y, 32, torch.float32, magnitude)
    tolerance.assert_within(y, expected.double(), bound)
