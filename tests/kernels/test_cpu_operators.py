"""Operators of CPUs in C++: the same bits as those in Python, and no Python once they know a kernel."""

from __future__ import annotations

import pytest
import torch

import qcompile.attention
import qcompile.ops  # noqa: F401
from qcompile.kv_cache import AttentionSpec, KVSpec, parse_kv_cache
from qcompile.layouts import choose_layout, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.presets import PRESETS
from qcompile.reference import quantize_weight
from qcompile.runtime import attention_cpu, cpp, cpu

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler")
OPS = torch.ops.qcompile
TYPES = [torch.bfloat16, torch.float32]


def weight_of(preset: str, n: int, k: int) -> tuple[list[torch.Tensor], str]:
    scheme = PRESETS[preset].fit(preset, (n, k))
    layout = choose_layout(scheme, (n, k), "cpu")
    packed = to_layout(quantize_weight(torch.randn(n, k), scheme.weight), layout)
    return list(packed.tensors), LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout.name).encode()


def no_python(*_: object) -> torch.Tensor:
    raise AssertionError("Python was called")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("preset", ["int4", "q4_1", "nf4", "int8", "int4_int8"])
def test_products_are_those_of_python_without_it(
    preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, spec = weight_of(preset, 80, 192)
    inputs = [torch.randn(m, 192, dtype=dtype) for m in (1, 5, 32)]
    expected = [OPS.gemm_any(x, None, weight, spec) for x in inputs]
    OPS.gemm_cpu(inputs[0], None, weight, spec)
    monkeypatch.setattr(cpu, "gemm", no_python)
    for x, y in zip(inputs, expected, strict=True):
        given = OPS.gemm_cpu(x, None, weight, spec)
        assert given.dtype == y.dtype
        assert torch.equal(given, y)


def test_products_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = weight_of("int8", 80, 192)
    codes = torch.randint(-128, 128, (3, 192), dtype=torch.int8)
    expected = OPS.gemm_any(codes, None, weight, spec)
    OPS.gemm_cpu(codes, None, weight, spec)
    monkeypatch.setattr(cpu, "gemm", no_python)
    assert torch.equal(OPS.gemm_cpu(codes, None, weight, spec), expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_that_have_no_kernel_are_left_to_python(dtype: torch.dtype) -> None:
    weight, spec = weight_of("int4", 48, 64)
    known = torch.randn(2, 64, dtype=dtype)
    for _ in range(2):
        OPS.gemm_cpu(known, None, weight, spec)
    many, strided = torch.randn(2000, 64, dtype=dtype), torch.randn(64, 3, dtype=dtype).t()
    for x in (many, strided, known[:0], known.to(torch.float16)):
        assert torch.equal(OPS.gemm_cpu(x, None, weight, spec), OPS.gemm_any(x, None, weight, spec))
    odd, odd_spec = weight_of("int8_weight_only", 48, 40)  # K is no multiple of 32
    x = torch.randn(2, 40, dtype=dtype)
    for _ in range(2):
        assert torch.equal(OPS.gemm_cpu(x, None, odd, odd_spec), OPS.gemm_any(x, None, odd, odd_spec))


@pytest.mark.parametrize("length", [None, 0, 17, 99])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention_is_that_of_python_without_it(
    dtype: torch.dtype, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(2, 6, 1, 64, dtype=dtype)
    key, value = (torch.randn(2, 80, 3, 64, dtype=dtype).transpose(1, 2) for _ in range(2))
    end = None if length is None else torch.tensor(length)
    expected = OPS.attention_plain_any(query, key, value, None, end, 0.125)
    OPS.attention_plain_cpu(query, key, value, None, end, 0.125)
    mask = torch.rand(2, 1, 1, 80) < 0.5
    masked = OPS.attention_plain_any(query, key, value, mask, None, 0.125)
    assert torch.equal(OPS.attention_plain_cpu(query, key, value, mask, None, 0.125), masked)
    many = torch.randn(2, 70, 6, 64, dtype=dtype).transpose(1, 2)
    causal = (many, key, value, None, end, 0.125, True, 30)
    assert torch.equal(OPS.attention_plain_cpu(*causal), OPS.attention_plain_any(*causal))
    monkeypatch.setattr(attention_cpu, "attention_plain", no_python)
    assert torch.equal(OPS.attention_plain_cpu(query, key, value, None, end, 0.125), expected)


@pytest.mark.parametrize("kv", ["fp8", {"format": "fp8", "scales": "head"}, "int8", "int4"], ids=str)
def test_attention_over_a_quantized_cache(kv: object, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = parse_kv_cache(kv)
    assert scheme is not None
    if scheme.dynamic:
        scales = [torch.rand(1, 2, 48) for _ in range(2)]
    else:
        scales = [torch.rand(2) if scheme.scales == "head" else torch.rand(()) for _ in range(2)]
    codes = [scheme.format.encode(torch.randn(1, 2, 48, 32)) for _ in range(2)]
    cache = [codes[0], scales[0], codes[1], scales[1]]
    half = KVSpec(scheme=scheme, head_dim=32)
    spec = AttentionSpec(key=half, value=half, scale=0.2).encode()
    query, length = torch.randn(1, 4, 1, 32, dtype=torch.bfloat16), torch.tensor(40)
    expected = OPS.attention_any(query, cache, None, length, spec)
    OPS.attention_cpu(query, cache, None, length, spec)
    monkeypatch.setattr(attention_cpu, "attention", no_python)
    assert torch.equal(OPS.attention_cpu(query, cache, None, length, spec), expected)


@pytest.mark.parametrize(("queries", "window", "length"), [(3, 0, [40]), (1, 5, 40), (3, 5, 40), (1, 0, [40, 17])])
def test_queries_that_see_different_positions_are_left_to_python(
    queries: int, window: int, length: int | list[int]
) -> None:
    scheme = parse_kv_cache("fp8")
    assert scheme is not None
    codes = scheme.format.encode(torch.randn(2, 2, 48, 32))
    half, scale = KVSpec(scheme=scheme, head_dim=32), torch.tensor(0.1)
    spec = AttentionSpec(key=half, value=half, scale=0.2, causal=True, window=window).encode()
    query, cache, end = torch.randn(2, 4, queries, 32), [codes, scale, codes, scale], torch.tensor(length)
    for _ in range(2):
        given = OPS.attention_cpu(query, cache, None, end, spec)
        assert torch.equal(given, OPS.attention_any(query, cache, None, end, spec))


def test_the_operators_leak_nothing() -> None:
    weight, spec = weight_of("int4", 48, 64)
    x = torch.randn(1, 64)
    for _ in range(2):
        OPS.gemm_cpu(x, None, weight, spec)
    owners = [t._use_count() for t in (x, *weight)]
    for _ in range(10):
        OPS.gemm_cpu(x, None, weight, spec)
    assert [t._use_count() for t in (x, *weight)] == owners
