"""`torch.ops.qcompile.linear` as an operator: schema, fakes, shapes, epilogues, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

import qcompile.ops  # noqa: F401
from qcompile import spec_text
from qcompile.errors import ConfigError, DeviceError, GradientError
from qcompile.gates import ACTIVATIONS
from qcompile.kv_cache import AttentionSpec, KVSpec, decode_attention_spec, parse_kv_cache
from qcompile.layouts import LAYOUTS, choose_layout, to_layout
from qcompile.linear_spec import EPILOGUE_STEPS, LinearSpec, decode_spec
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from tests import oracle, tolerance

N, K = 48, 96


def made(preset: str, epilogue: tuple[str, ...] = (), layout: str | None = None) -> tuple[PackedWeight, str]:
    scheme = PRESETS[preset].fit("test", (N, K))
    chosen = LAYOUTS[layout] if layout else choose_layout(scheme, (N, K), "cpu")
    packed = chosen.pack(quantize_weight(torch.randn(N, K) / 8, scheme.weight))
    spec = LinearSpec(in_features=K, out_features=N, scheme=scheme, layout=chosen.name, epilogue=epilogue)
    return packed, spec.encode()


def arguments(preset: str, x: torch.Tensor, epilogue: tuple[str, ...] = (), operands: tuple[torch.Tensor, ...] = ()):
    packed, spec = made(preset, epilogue)
    bias = torch.randn(N) if "bias" in epilogue else None
    static = PRESETS[preset].activation is not None and not PRESETS[preset].activation.dynamic
    scale = torch.tensor(0.02) if static else None
    return (x, list(packed.tensors), bias, scale, None, list(operands), spec)


FLOAT8 = [p for p in PRESETS if "fp8" in p or p in ("mxfp4", "mxfp8", "nvfp4")]


# torch's comparison in `test_schema` multiplies float8 tensors, for which it has no kernel.
@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in FLOAT8])
def test_opcheck(preset):
    x, gate = torch.randn(3, K), torch.randn(3, N)
    torch.library.opcheck(torch.ops.qcompile.linear.default, arguments(preset, x, ("bias", "silu", "mul"), (gate,)))


@pytest.mark.parametrize("preset", FLOAT8)
def test_opcheck_of_float8(preset):
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qcompile.linear.default, arguments(preset, torch.randn(3, K)), test_utils=checks)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(K,), (2, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)])
def test_every_rank_and_empty_batches(preset, shape):
    out = torch.ops.qcompile.linear(*arguments(preset, torch.randn(shape)))
    assert out.shape == (*shape[:-1], N)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("preset", ["int6", "int8", "int4"])
def test_strided_input_gives_the_same(preset):
    x = torch.randn(K, 10).t()[::2]
    given = arguments(preset, x)
    assert torch.equal(torch.ops.qcompile.linear(*given), torch.ops.qcompile.linear(x.contiguous(), *given[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["int4", "int6", "int8", "fp8"])
def test_output_has_the_input_dtype(preset, dtype):
    assert torch.ops.qcompile.linear(*arguments(preset, torch.randn(2, K, dtype=dtype), ("bias",))).dtype == dtype


STEPS = [(), ("bias",), *((name,) for name in ACTIVATIONS), *itertools.permutations(("bias", "silu", "mul", "add"), 3)]


@pytest.mark.parametrize("steps", STEPS, ids="-".join)
def test_epilogue_against_the_oracle(steps):
    """int6 with float32 activations decodes and multiplies in float32 (runtime/cpu.py), so the bound is float32's."""
    x = torch.randn(20, K)
    operands = tuple(torch.randn(20, N) for step in steps if step in ("mul", "add"))
    packed, spec = made("int6", steps)
    bias = torch.randn(N) if "bias" in steps else None
    out = torch.ops.qcompile.linear(x, list(packed.tensors), bias, None, None, list(operands), spec)
    weight = oracle.dequantize(to_layout(packed, LAYOUTS["logical"]))
    product = oracle.linear(x, weight)
    bound = tolerance.gemm_bound(x, weight, torch.float32)
    bound = tolerance.epilogue_bound(product, bound, bias, steps, operands)
    tolerance.assert_within(out, oracle.epilogue(product, bias, steps, operands), bound)


def test_identity_returns_the_decoded_weight():
    packed, spec = made("int6")
    out = torch.ops.qcompile.linear(torch.eye(K), list(packed.tensors), None, None, None, [], spec)
    assert torch.equal(out.t(), dequantize(to_layout(packed, LAYOUTS["logical"])))


def test_a_row_that_is_not_finite_spoils_only_itself():
    x = torch.randn(4, K)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    out = torch.ops.qcompile.linear(*arguments("int8", x))
    assert torch.isfinite(out[[0, 3]]).all()
    assert not torch.isfinite(out[1]).any()
    assert not torch.isfinite(out[2]).any()


@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_gradients_are_refused(preset):
    x = torch.randn(2, K, requires_grad=True)
    with pytest.raises(GradientError, match=r"torch\.no_grad"):
        torch.ops.qcompile.linear(*arguments(preset, x))
    with torch.no_grad():
        torch.ops.qcompile.linear(*arguments(preset, x))


def test_a_device_without_kernels_is_refused():
    packed, spec = made("int8")
    x, *weight = [t.to("meta") for t in (torch.randn(2, K), *packed.tensors)]
    with pytest.raises(DeviceError, match="not for meta"):
        torch.ops.qcompile.linear(x, weight, None, None, None, [], spec)


def test_a_layout_of_gpus_is_refused_on_cpus():
    packed, spec = made("int4", layout="fragment")
    with pytest.raises(DeviceError, match="fragment"):
        torch.ops.qcompile.linear(torch.randn(2, K), list(packed.tensors), None, None, None, [], spec)


@pytest.mark.parametrize("preset", PRESETS)
def test_spec_round_trip(preset):
    for steps in (EPILOGUE_STEPS, ("bias", "silu(a)*b", "mul", "to_int8")):
        _, text = made(preset, steps)
        assert decode_spec(text).encode() == text


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("silu", "silu(a)*b"), "takes two halves"),
        (("a*b", "bias"), "takes two halves"),
        (("a*b", "a*b"), "takes two halves"),
        (("to_int8", "relu"), "is the last step"),
        (("softplus",), "unknown epilogue steps"),
    ],
)
def test_steps_out_of_place_are_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        made("int4", steps)


def test_specs_are_safe_within_quotation_marks_of_other_languages() -> None:
    spec = LinearSpec(in_features=64, out_features=32, scheme=PRESETS["int4_int8"], layout="rows16")
    scheme = parse_kv_cache("fp8")
    assert scheme is not None
    half = KVSpec(scheme=scheme, head_dim=64)
    attention = AttentionSpec(key=half, value=half, scale=0.125)
    for text in (spec.encode(), half.encode(), attention.encode()):
        assert not {'"', "\\"} & set(text)
    assert decode_attention_spec(attention.encode()) == attention
    with pytest.raises(ValueError, match="no spec in a graph"):
        spec_text.write({"format": "it's"})
