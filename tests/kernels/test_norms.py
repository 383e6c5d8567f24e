"""Rows that are normalized, or not, and quantized: the kernel in Triton's interpreter beside torch and float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen.norm_kernel_spec import norm_kernel_spec
from qcompile.codegen.spec import dtype_name
from qcompile.flags import override
from qcompile.norm_spec import NormSpec, decode_norm
from qcompile.norms import plain
from qcompile.reference import dequantize_activation
from qcompile.runtime import cache, norm_gpu
from tests import tolerance
from tests.cross_compile import measure
from tests.triton_interpreter import interpret

LLAMA = NormSpec(
    k=256,
    norm="rms",
    eps=1e-6,
    weight="plain",
    early=True,
    bias=False,
    residual=True,
    keep_sum=True,
    keep_norm=False,
    number="fp8_e4m3",
    columns=128,
    powers=False,
)
"""Of a block of Llama, in groups as DeepSeek V3 has them."""


def as_made(norm: NormSpec) -> NormSpec:
    """Rows as a scale a row has them for no columns, and without parameters of a norm where there is none."""
    norm = replace(norm, columns=min(norm.columns or norm.k, norm.k))
    return norm if norm.norm else replace(norm, eps=0.0, weight="", early=False, bias=False)


norms = st.builds(
    NormSpec,
    k=st.sampled_from([32, 96, 128, 200, 256, 360]),
    norm=st.sampled_from(["", "rms", "layer"]),
    eps=st.sampled_from([1e-6, 1e-5]),
    weight=st.sampled_from(["", "plain", "one more"]),
    early=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    keep_sum=st.booleans(),
    keep_norm=st.booleans(),
    number=st.sampled_from(["fp8_e4m3", "fp8_e5m2", "int8", "int4"]),
    columns=st.sampled_from([16, 32, 128, 0]),
    powers=st.booleans(),
).map(lambda norm: replace(as_made(norm), keep_sum=norm.keep_sum and norm.residual))


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def inputs(norm: NormSpec, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Rows, and what is added to them; weight and bias."""
    x, residual = (torch.randn(rows, norm.k).to(dtype) for _ in range(2))
    weight, bias = ((torch.randn(norm.k) + 1).to(dtype), torch.randn(norm.k).to(dtype))
    return x, residual if norm.residual else None, weight if norm.weight else None, bias if norm.bias else None


def run(norm: NormSpec, *given_: Tensor | None, target: str = "sm_90") -> list[Tensor]:
    x = given_[0]
    assert x is not None
    kernel = norm_kernel_spec(norm, dtype_name(x.dtype), target)
    return norm_gpu.launch(kernel, interpret(cache.load(kernel).kernel), x, *given_[1:])


def exact(norm: NormSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm of rows, in float64."""
    y = x.double()
    if not norm.norm:
        return y
    if norm.norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if weight is not None:
        y = y * (weight.double() + (norm.weight == "one more"))
    return y if bias is None else y + bias.double()


@given(norms, st.integers(1, 5), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_codes_stand_for_the_norm(norm: NormSpec, rows: int, dtype: torch.dtype) -> None:
    """Within roundings to the rows' type, of the norm and before the weight, and half a step of the codes."""
    x, residual, weight, bias = given_ = inputs(norm, rows, dtype)
    codes, scale, *kept = run(norm, *given_)
    held = x if residual is None else x + residual
    if norm.keep_sum:
        assert torch.equal(kept[0], held)
    y = exact(norm, held, weight, bias)
    without = exact(norm, held, None, None)
    factor = torch.ones(norm.k).double() if weight is None else weight.double() + (norm.weight == "one more")
    # The sums of a row's K terms, and a root, err by less than K + 8 roundings; centering may cancel.
    mean = held.double().mean(-1, keepdim=True).abs() / (held.double().std(-1, keepdim=True) + norm.eps)
    error = (without.abs() + (norm.norm == "layer") * (1 + mean)) * (norm.k + 8) * tolerance.U32
    if norm.early:
        error = error + tolerance.rounding(without.abs() + error, dtype)
    error = error * factor.abs() + 4 * tolerance.U32 * (y.abs() + 1)
    error = error + tolerance.rounding(y.abs() + error, dtype)
    if norm.keep_norm:
        tolerance.assert_within(kept[-1], y, error)
    each = scale.double().repeat_interleave(norm.columns, 1)[:, : norm.k]
    most = norm.activation.format.absmax
    if codes.dtype == torch.int8:
        within, step = y.clamp((-most - 0.5) * each, (most - 0.5) * each), 0.5 * each
    else:
        within, step = (
            y.clamp(-most * each, most * each),
            each * tolerance.rounding((y.abs() + error) / each, codes.dtype),
        )
    found = dequantize_activation(codes, scale, norm.activation)
    tolerance.assert_within(found, within, error + step * (1 + 8 * tolerance.U32) + 4 * tolerance.U32 * y.abs())


@given(norms, st.sampled_from([torch.bfloat16, torch.float32]))
def test_results_are_those_of_plain_torch(norm: NormSpec, dtype: torch.dtype) -> None:
    """Bit for bit where sums and roots are exact: rows of 2 and -2 whose mean, if it is subtracted, is 0."""
    norm = replace(norm, k=256, columns=256 if norm.columns == norm.k else norm.columns, eps=0.0)
    signs = torch.ones(3, 128)
    signs[:, ::3] = -1
    x, residual, weight, bias = inputs(norm, 3, dtype)
    x = torch.cat([2 * signs, -2 * signs], 1).to(dtype)
    residual = residual if residual is None else torch.zeros_like(x)
    found, expected = run(norm, x, residual, weight, bias), plain(x, residual, weight, bias, norm)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.float(), other.float())


@given(norms, st.sampled_from([torch.bfloat16, torch.float32]), st.integers(-145, 120))
def test_rows_as_they_are(norm: NormSpec, dtype: torch.dtype, exponent: int) -> None:
    """Bit for bit what plain torch makes of them, of all magnitudes."""
    norm = as_made(replace(norm, norm="", residual=False))
    x = torch.randn(3, norm.k, dtype=torch.float64).mul(2.0**exponent).to(dtype)
    for one, other in zip(run(norm, x, None, None, None), plain(x, None, None, None, norm), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_no_other(bad: float) -> None:
    given_ = inputs(LLAMA, 3, torch.bfloat16)
    whole = run(LLAMA, *given_)
    assert given_[0] is not None
    given_[0][1, 5] = bad
    found = run(LLAMA, *given_)
    assert not found[1][1].isfinite().all()
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one[[0, 2]].float(), other[[0, 2]].float())


def test_no_rows() -> None:
    assert [tuple(t.shape) for t in run(LLAMA, *inputs(LLAMA, 0, torch.bfloat16))] == [(0, 256), (0, 2), (0, 256)]


@given(norms)
def test_a_spec_is_its_text(norm: NormSpec) -> None:
    assert decode_norm(norm.encode()) == norm


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_read_rows_once(target: str) -> None:
    """Nothing spills, and each of x, residual and weight is read once: 3 loads of 16 bytes for 8 numbers a thread."""
    number = "int8" if target == "gfx942" else "fp8_e4m3"
    shapes = ((4096, 128), (2880, 32), (16384, 32), (4096, 4096), (14336, 14336))
    like = [replace(LLAMA, k=k, columns=columns, number=number) for k, columns in shapes]
    kernels = [norm_kernel_spec(norm, "bfloat16", target) for norm in like]
    for kernel, found, (k, columns) in zip(kernels, measure(kernels), shapes, strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        if target != "gfx942":
            held = (1 << (-(-k // columns) - 1).bit_length()) * (1 << (columns - 1).bit_length())
            held //= 32 * kernel.tile.warps
            assert found["loads"] == ["v4.b32"] * (3 * held // 8), (kernel, found)
