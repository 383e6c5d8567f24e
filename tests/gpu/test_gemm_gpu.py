"""Generated kernels on a GPU, against float64, and bit for bit the same at every launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.spec import KernelSpec, Tile
from qcompile.formats import FORMATS
from qcompile.layouts import choose_layout
from qcompile.runtime import cache, gpu
from qcompile.scheme import PRESETS, Granularity, Scheme, parse_scheme, preset
from tests import tolerance
from tests.kernels.problems import Problem, problem
from tests.kernels.test_gemm import GGUF_LIKE, shipped, weight_scheme

pytestmark = pytest.mark.gpu

LAUNCHES = 50
BF16 = torch.bfloat16
TARGET = gpu.target_of(torch.device("cuda", 0)) if torch.cuda.is_available() else "sm_90"


def layout_of(scheme: Scheme, shape: tuple[int, int]) -> str:
    return choose_layout(scheme, shape, "cuda").name


def run(given: Problem, kernel: KernelSpec) -> torch.Tensor:
    """The kernel's result, after launching it many times and comparing bits."""
    arguments = given.arguments("cuda")
    function = cache.load(kernel).kernel
    first = gpu.launch(kernel, function, *arguments, given.out_dtype)
    for _ in range(LAUNCHES):
        again = gpu.launch(kernel, function, *arguments, given.out_dtype)
        assert torch.equal(first.view(torch.uint8), again.view(torch.uint8)), "launches differ"
    return first.cpu()


def unit_of(kernel: KernelSpec) -> float:
    """Relative error of an addition: Hopper's fp8 units keep 14 bits within a block."""
    return 2.0**-13 if kernel.compute == "fp8" else tolerance.ACCUMULATE_UNIT


def sample(like: KernelSpec, m: int, count: int = 10) -> list[KernelSpec]:
    """Candidates that differ in all that a tile has: the first by the cost model, and others evenly from the rest."""
    ranked = rank(candidates(like, m), m, keep=1000)
    return ranked[:3] + ranked[3 :: max(1, len(ranked) // (count - 3))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format_name", FORMATS)
def test_identity_returns_the_weights(format_name: str, dtype: torch.dtype) -> None:
    scheme = Scheme(weight=weight_scheme(format_name, Granularity.channel()))
    given = problem(scheme, "fragment", 64, 72, 64, dtype, identity=True)
    tile = Tile(m=16, n=64, k=64, split=1, warps=4, stages=2)
    kernel = given.kernel(TARGET, tile)
    y = run(given, kernel)
    # Three TF32 products are exact where the first of them holds the weight.
    rounded = given.weight != given.weight.to(torch.bfloat16)
    unit = tolerance.TF32X3_UNIT if dtype == torch.float32 and kernel.precision == "tf32x3" else 0.0
    bound = given.weight.abs() * rounded * unit
    tolerance.assert_within(y, given.weight.to(dtype).T, bound.T)


@pytest.mark.parametrize("name", [*PRESETS, *GGUF_LIKE])
def test_identity_of_every_preset(name: str) -> None:
    """Scales of 1 and offsets of 0 leave every value as it is decoded."""
    scheme = replace(shipped(name, (200, 512)), activation=None)
    given = problem(scheme, "fragment", 512, 200, 512, identity=True)
    like = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    for m in (16, 64, 512):
        y = run(given, rank(candidates(like, m), m)[0])
        assert torch.equal(y.double(), given.weight.to(torch.bfloat16).double().T), m


@pytest.mark.parametrize("m", [1, 16, 33, 64, 200])
@pytest.mark.parametrize("shape", [(256, 512), (200, 448), (1024, 4096)], ids=str)
@pytest.mark.parametrize("name", [*PRESETS, *GGUF_LIKE])
def test_every_candidate(name: str, shape: tuple[int, int], m: int) -> None:
    scheme = shipped(name, shape)
    steps = ("bias", "silu", "mul", "add") if m == 33 else ()
    given = problem(scheme, layout_of(scheme, shape), m, *shape, epilogue=steps)
    like = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    for kernel in sample(like, gpu.bucket(m)):
        given.check(run(given, kernel), torch.bfloat16, unit_of(kernel))


@pytest.mark.parametrize("m", [1, 33, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_of_8_bits_times_floats(dtype: torch.dtype, m: int) -> None:
    """As the outlying columns of LLM.int8() are multiplied."""
    scheme = replace(preset("int8"), activation=None)
    given = problem(scheme, "rows8", m, 1024, 4096, dtype, ("add",))
    like = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    for kernel in sample(like, gpu.bucket(m)):
        given.check(run(given, kernel), dtype)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_activations_that_are_aligned_or_not(name: str) -> None:
    """One kernel for activations that are aligned, or not, which Triton compiles apart, and several numbers of rows."""
    given = {
        m: problem(shipped(name, (200, 512)), layout_of(preset(name), (200, 512)), m, 200, 512) for m in (1, 3, 16)
    }
    kernel = given[1].kernel(TARGET, Tile(m=16, n=64, k=128, split=2, warps=4, stages=3))
    function = cache.load(kernel).kernel
    for _ in range(3):
        for each in given.values():
            x, *others = each.arguments("cuda")
            shifted = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
            for rows in (x, shifted):
                each.check(gpu.launch(kernel, function, rows, *others, BF16).cpu(), BF16, unit_of(kernel))


@pytest.mark.parametrize("columns", [16, 32, 48, 64, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_groups(columns: int, dtype: torch.dtype) -> None:
    scheme = Scheme(weight=weight_scheme("uint4", Granularity.group(columns), "bfloat16"))
    given = problem(scheme, "fragment", 20, 200, 576, dtype)
    kernel = gpu.choose(given.spec, 32, dtype, dtype, TARGET).kernel
    given.check(run(given, kernel), dtype)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "mxfp4", "nvfp4", "q4_1", "mxfp8"])
def test_compiled_operator_equals_eager(name: str) -> None:
    scheme = parse_scheme(name).fit("layer", (256, 512))
    given = problem(scheme, layout_of(scheme, (256, 512)), 8, 256, 512, epilogue=("bias", "gelu"))
    x, x_scale, weight, bias, operands = given.arguments("cuda")
    encoded = given.spec.encode()
    operator = torch.ops.qcompile.gemm

    def call(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = operator(x, x_scale, list(weight.tensors), bias, operands, encoded, torch.bfloat16)
        return y

    expected = call(x, x_scale)
    assert torch.equal(torch.compile(call, fullgraph=True)(x, x_scale), expected)
