"""Torch's own products in place of ours: what they take, what they return, and the kernel that decodes for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen.devices import device_of
from qcompile.codegen.predict import EXPRESSIONS, limit, predict, weight_bytes
from qcompile.codegen.spec import KernelSpec, Tile, decoding_spec, finishing_spec
from qcompile.flags import override
from qcompile.formats import FORMATS, get_format
from qcompile.layouts import LAYOUTS, choose_layout
from qcompile.linear_spec import LinearSpec
from qcompile.presets import PRESETS, preset
from qcompile.reference import dequantize
from qcompile.runtime import cache, gpu, tuning, vendor, vendor_grouped
from qcompile.scheme import ActivationScheme, Granularity, Scheme
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.kernels.problems import Problem, problem
from tests.kernels.test_gemm import GGUF_LIKE, schemes, shipped, weight_scheme
from tests.strategies import epilogues
from tests.triton_interpreter import interpret

TILE = Tile(m=16, n=64, k=64, split=1, warps=4, stages=2)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def kernel_of(given_: Problem, target: str = "sm_90") -> KernelSpec:
    return given_.kernel(target, TILE)


def equal(actual: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN being NaN."""
    return torch.equal(actual.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@given(
    schemes("fragment"),
    st.tuples(st.integers(1, 200), st.integers(1, 300)),
    st.sampled_from(HALVES),
    st.sampled_from(["sm_80", "sm_90", "gfx942"]),
)
def test_decoding_equals_dequantizing(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, target: str) -> None:
    """Bit for bit what the reference decodes, rounded once."""
    given_ = problem(replace(scheme, activation=None), "fragment", 1, *shape, dtype)
    decoded = vendor.decode(given_.packed, decoding_spec(kernel_of(given_, target)), interpret)
    assert decoded.dtype == dtype
    assert equal(decoded, dequantize(LAYOUTS["fragment"].unpack(given_.packed)).to(dtype))


@pytest.mark.parametrize("name", [*PRESETS, *GGUF_LIKE])
def test_decoding_every_preset(name: str) -> None:
    scheme = replace(shipped(name, (72, 256)), activation=None)
    layout = choose_layout(scheme, (72, 256), "cuda")
    given_ = problem(scheme, layout.name, 1, 72, 256)
    decoded = vendor.decode(given_.packed, decoding_spec(kernel_of(given_)), interpret)
    assert equal(decoded, dequantize(layout.unpack(given_.packed)).to(torch.bfloat16))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_around_products_do_not_spill(target: str) -> None:
    kernels = []
    dense = ["int4", "int4_asym", "int3", "nf4", "mxfp4", "nvfp4", "fp8_weight_only", "q4_k", "q6_k", "q5_1"]
    for name in [*dense, "int4_24", "int8_24"]:
        given_ = problem(shipped(name, (256, 512)), "fragment" if name in dense else "fragment24", 1, 256, 512)
        kernels.append(decoding_spec(kernel_of(given_, target)))
    given_ = problem(preset("int8"), "rows8", 1, 256, 512, epilogue=("bias", "gelu_tanh", "mul", "add"))
    for dtype in (torch.int32, torch.bfloat16):
        kernels.append(finishing_spec(kernel_of(given_, target), dtype, x_scale=True, scale=dtype == torch.int32))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        print(kernel.weight, target, found)
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)


def run(name: str, given_: Problem) -> Tensor:
    """A path's product on the CPU, with its scales and the epilogue."""
    kernel = kernel_of(given_)
    assert vendor.objection(name, kernel, 32) is None
    x, x_scale, weight, bias, operands = given_.arguments()
    chosen = tuning.Chosen(kernel=kernel, vendor=name, origin="")
    return gpu.execute(chosen, x, x_scale, weight, bias, operands, given_.spec, interpret)


def check(name: str, given_: Problem, y: Tensor) -> None:
    """Within the bound of a product that is rounded to the output's type before the epilogue."""
    steps = given_.spec.epilogue
    product = oracle.linear(given_.inputs, given_.weight)
    compute = torch.bfloat16 if given_.spec.scheme.activation else given_.out_dtype
    between = torch.float32 if name == "int_mm" else given_.out_dtype
    bound = tolerance.gemm_bound(given_.inputs, given_.weight, compute, out_dtype=between)
    bound = tolerance.epilogue_bound(product, bound, given_.bias, steps, given_.operands, given_.out_dtype)
    tolerance.assert_within(y, oracle.epilogue(product, given_.bias, steps, given_.operands), bound)


@given(
    st.sampled_from(["int4", "int4_asym", "nf4", "mxfp4", "q5_1", "q6_k", "int4_fp8", "int4_int8", "int8_weight_only"]),
    epilogues(),
    st.integers(1, 40),
    st.sampled_from(HALVES),
)
def test_decode_mm(name: str, steps: tuple[str, ...], m: int, dtype: torch.dtype) -> None:
    scheme = shipped(name, (72, 256))
    dtype = torch.bfloat16 if scheme.activation else dtype
    given_ = problem(scheme, "fragment", m, 72, 256, dtype, steps)
    check("decode_mm", given_, run("decode_mm", given_))


@given(
    epilogues(),
    st.tuples(st.integers(1, 20), st.integers(1, 150)),
    st.sampled_from(["", "token", "tensor"]),
    st.booleans(),
    st.sampled_from([torch.int32, *HALVES, torch.float32]),
    st.sampled_from([*HALVES, torch.float32]),
)
def test_finishing_by_a_kernel_equals_torch(
    steps: tuple[str, ...], shape: tuple[int, int], per: str, scaled: bool, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """Both within the same derived bound of float64."""
    m, n = shape[0], 2 * shape[1]
    given_ = problem(preset("int8").fit("layer", (n, 64)), "rows8", m, n, 64, out_dtype, steps)
    kernel = replace(kernel_of(given_), activation_scale=per)
    y = (torch.randn(m, n) * 100).to(dtype)
    x_scale = {"": None, "token": torch.rand(m, 1) / 100, "tensor": torch.tensor(0.01)}[per]
    product = (y, x_scale, torch.rand(n) if scaled else None)
    actual = vendor.finish(product, given_.bias, given_.operands, given_.spec, kernel, interpret)
    scales = [scale.double() for scale in product[1:] if scale is not None]
    exact = y.double()
    for scale in scales:
        exact = exact * scale
    rounded = exact.abs() * tolerance.gamma(len(scales), tolerance.U32)
    bound = tolerance.epilogue_bound(exact, rounded, given_.bias, steps, given_.operands, out_dtype)
    expected = oracle.epilogue(exact, given_.bias, steps, given_.operands)
    tolerance.assert_within(actual, expected, bound)
    in_torch = vendor.finish_in_torch(product, given_.bias, given_.operands, given_.spec, out_dtype)
    tolerance.assert_within(in_torch, expected, bound)


@given(st.booleans(), st.booleans(), epilogues(), st.integers(17, 40), st.sampled_from([*HALVES, torch.float32]))
def test_int_mm(whole_weight: bool, whole_x: bool, steps: tuple[str, ...], m: int, dtype: torch.dtype) -> None:
    scheme = eight_bits("int8", whole_weight, whole_x)
    given_ = problem(scheme, "rows8", m, 72, 256, dtype, steps)
    check("int_mm", given_, run("int_mm", given_))


def eight_bits(name: str, whole_weight: bool, whole_x: bool, x_name: str | None = None) -> Scheme:
    """Scales of the whole tensor, or of rows."""
    of = (Granularity.channel(), Granularity.tensor())
    activation = ActivationScheme(format=get_format(x_name or name), granularity=of[whole_x])
    return Scheme(weight=weight_scheme(name, of[whole_weight]), activation=activation)


@given(st.booleans(), st.booleans(), epilogues(), st.integers(1, 40))
def test_scaled_mm(whole_weight: bool, whole_x: bool, steps: tuple[str, ...], m: int) -> None:
    given_ = problem(eight_bits("fp8_e4m3", whole_weight, whole_x), "rows8", m, 64, 256, torch.bfloat16, steps)
    check("scaled_mm", given_, run("scaled_mm", given_))


def test_scaled_mm_gets_scales_of_one_kind_and_no_fast_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch checks them on GPUs: two scalars, or [M, 1] and [1, N], contiguous float32."""
    seen: list[Any] = []
    product = torch._scaled_mm

    def watch(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        seen.append((tuple(scale_a.shape), tuple(scale_b.shape)))
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert options == {"out_dtype": torch.bfloat16, "use_fast_accum": False}
        return product(a, b, scale_a, scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watch)
    for whole_weight in (True, False):
        for whole_x in (True, False):
            run("scaled_mm", problem(eight_bits("fp8_e4m3", whole_weight, whole_x), "rows8", 5, 64, 256))
    assert seen == [((), ()), *[((5, 1), (1, 64))] * 3]


def test_no_rows() -> None:
    for name, scheme, layout in (("decode_mm", "int4", "fragment"), ("scaled_mm", "fp8", "rows8")):
        given_ = problem(preset(scheme).fit("layer", (64, 128)), layout, 0, 64, 128)
        kernel = kernel_of(given_)
        chosen = tuning.Chosen(kernel=kernel, vendor=name, origin="")
        x, x_scale, weight, bias, operands = given_.arguments()
        assert gpu.execute(chosen, x, x_scale, weight, bias, operands, given_.spec, interpret).shape == (0, 64)


FP8 = {"weight": "fp8_e4m3", "activation": "fp8_e4m3"}


@pytest.mark.parametrize(
    ("name", "preset_name", "m", "change", "reason"),
    [
        ("scaled_mm", "fp8", 1, {}, None),
        ("scaled_mm", "fp8_static", 1, {}, None),
        ("scaled_mm", "int8", 32, {}, "not both fp8"),
        ("scaled_mm", "fp8_weight_only", 32, {}, "not both fp8"),
        ("scaled_mm", "fp8_block", 32, {}, "less than a row"),
        ("scaled_mm", "mxfp8", 32, {}, "less than a row"),
        ("scaled_mm", "fp8", 32, {"n": 4104}, "multiple of 16"),
        ("scaled_mm", "fp8", 32, {"k": 4104}, "multiple of 16|less than a row"),
        ("scaled_mm", "fp8", 32, {"target": "sm_80"}, "sm_80 does not"),
        ("scaled_mm", "fp8", 32, {"target": "sm_89"}, "sm_89 does not"),
        ("scaled_mm", "fp8_static", 32, {"target": "sm_89"}, None),
        ("scaled_mm", "fp8", 32, {"target": "gfx942"}, "gfx942 does not"),
        ("scaled_mm", "fp8", 32, {"out_dtype": "float16"}, "float16 with scales of rows"),
        ("scaled_mm", "fp8_static", 32, {"out_dtype": "float16"}, None),
        ("scaled_mm", "fp8", 32, {"weight": "fp8_e5m2"}, "e5m2 with scales of rows"),
        ("scaled_mm", "fp8_static", 32, {"weight": "fp8_e5m2"}, None),
        ("scaled_mm", "fp8_static", 32, {"weight": "fp8_e5m2", "activation": "fp8_e5m2"}, "e5m2 times e5m2"),
        ("scaled_mm", "fp8", 32, {"rows": 128}, "several rows"),
        ("int_mm", "int8", 16, {}, "16 or less"),
        ("int_mm", "int8", 32, {}, None),
        ("int_mm", "fp8", 32, {}, "not both int8"),
        ("int_mm", "int8", 32, {"n": 4100}, "multiple of 8"),
        ("int_mm", "int8", 32, {"symmetric": False}, "zero points"),
        ("int_mm", "int8", 32, {"target": "gfx942"}, "gfx942"),
        ("int_mm", "int8_weight_only", 32, {}, "not both int8"),
        ("decode_mm", "int4", 16, {}, None),
        ("decode_mm", "nvfp4", 16, {}, None),
        ("decode_mm", "int4_fp8", 16, {}, None),
        ("decode_mm", "int4_fp8", 16, {"out_dtype": "float16"}, "rounded to bfloat16"),
        ("decode_mm", "int4_fp8", 16, {"activation_scale": "group"}, "a scale a group"),
        ("decode_mm", "int4", 16, {"x_dtype": "float32", "out_dtype": "float32"}, "without tensor cores"),
        ("decode_mm", "int4", 16, {"out_dtype": "float32"}, "rounded to bfloat16"),
        ("decode_mm", "fp8", 16, {}, "not in fragments"),
    ],
)
def test_objections(name: str, preset_name: str, m: int, change: dict[str, Any], reason: str | None) -> None:
    scheme = preset(preset_name).fit("layer", (4096, 4096))
    layout = choose_layout(scheme, (4096, 4096), "cuda").name
    spec = LinearSpec(in_features=4096, out_features=4096, scheme=scheme, layout=layout)
    x_dtype = torch.bfloat16 if scheme.activation is None else scheme.activation.format.native_dtype
    assert x_dtype is not None
    kernel = replace(tuning.any_kernel(spec, x_dtype, torch.bfloat16, "sm_90"), **change)
    found = vendor.objection(name, kernel, m)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert any(part in found for part in reason.split("|")), found


def test_every_format_is_decoded_or_declined() -> None:
    """Whatever the format, a path takes it or says why not."""
    for name in FORMATS:
        given_ = problem(Scheme(weight=weight_scheme(name, Granularity.channel())), "fragment", 1, 64, 64)
        assert vendor.objection("decode_mm", kernel_of(given_), 64) is None


def pick(name: str, m: int, shape: tuple[int, int] = (4096, 4096), target: str = "sm_90") -> str:
    """The choice without any table."""
    scheme = preset(name).fit("layer", shape)
    layout = choose_layout(scheme, shape, "cuda").name
    spec = LinearSpec(in_features=shape[1], out_features=shape[0], scheme=scheme, layout=layout)
    x_dtype = torch.bfloat16 if scheme.activation is None else scheme.activation.format.native_dtype
    assert x_dtype is not None
    return tuning.choose(spec, m, x_dtype, torch.bfloat16, target).name


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], ids=str)
def test_without_tables_a_good_choice_is_made(shape: tuple[int, int]) -> None:
    """As measured on an H100 (`codegen/tuned/nvidia-h100.json`)."""
    assert pick("int4", 16, shape) == "gemm_fragment"
    # At 4096 rows it is as fast as torch's product by a decoded weight, and needs no memory for that.
    assert [pick("int4", m, shape) for m in (64, 128, 1024, 4096)] == ["gemm_stream"] * 4
    assert [pick("nf4", m, shape) for m in (64, 256, 1024, 4096)] == ["gemm_stream"] * 2 + ["decode_mm"] * 2
    assert [pick(name, m, shape) for name in ("mxfp4", "nvfp4") for m in (64, 1024)] == ["gemm_stream"] * 4
    assert pick("fp8", 16, shape) == "gemm_rows8"
    assert [pick("fp8", m, shape) for m in (1024, 4096)] == ["scaled_mm"] * 2
    # torch._int_mm reaches half the rate of our own int8 kernel.
    assert [pick("int8", m, shape) for m in (16, 1024, 4096)] == ["gemm_rows8", *["gemm_stream_rows8"] * 2]
    assert pick("fp8_block", 4096, shape) == "gemm_rows8"


def test_vendors_are_predicted() -> None:
    assert set(EXPRESSIONS) == {*vendor.PATHS, *vendor_grouped.PATHS}
    for name in vendor.PATHS:
        scheme = preset({"int_mm": "int8", "scaled_mm": "fp8"}.get(name, "int4")).fit("layer", (4096, 4096))
        layout = choose_layout(scheme, (4096, 4096), "cuda").name
        spec = LinearSpec(in_features=4096, out_features=4096, scheme=scheme, layout=layout)
        x_dtype = torch.bfloat16 if scheme.activation is None else scheme.activation.format.native_dtype
        assert x_dtype is not None
        like = tuning.any_kernel(spec, x_dtype, torch.bfloat16, "sm_90")
        times = [predict(like, m, name) for m in (16, 256, 4096)]
        assert 0 < times[0] <= times[1] < times[2] < 1e-3


@pytest.mark.parametrize("shape", [(256, 1024), (200, 512)])
@pytest.mark.parametrize("name", [*PRESETS, *GGUF_LIKE])
def test_the_limit_counts_what_a_weight_stores(name: str, shape: tuple[int, int]) -> None:
    scheme = shipped(name, shape)
    given_ = problem(scheme, choose_layout(scheme, shape, "cuda").name, 4, *shape)
    kernel, weight = kernel_of(given_), LAYOUTS[given_.packed.layout].unpack(given_.packed)
    above = [t for t in (weight.super_scale, weight.super_offset) if t is not None]
    unknown = sum(t.numel() * (t.element_size() - 2) for t in above)
    if scheme.weight.sparsity is not None:  # half the codes are in memory, and a bit for each weight
        unknown += weight.codes.numel() // 2 - shape[0] * shape[1] // 8
    assert weight_bytes(kernel) == weight.nbytes - unknown
    moved = weight_bytes(kernel) + 4 * (given_.x.element_size() * shape[1] + 2 * shape[0])
    assert limit(kernel, 4) == pytest.approx(moved / device_of("sm_90").memory)
