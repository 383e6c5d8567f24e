"""Generated kernels on a GPU, against float64, and bit for bit the same at every launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qcompile
from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.spec import KernelSpec, Tile, decoding_spec, native_fp8
from qcompile.formats import FORMATS
from qcompile.layouts import LAYOUTS, choose_layout, to_layout
from qcompile.presets import PRESETS, preset
from qcompile.runtime import cache, gpu, tuning, vendor
from qcompile.scheme import Granularity, Scheme
from qcompile.scheme_config import parse_scheme
from tests import tolerance
from tests.kernels.problems import Problem, problem
from tests.kernels.test_gemm import GGUF_LIKE, shipped, weight_scheme
from tests.kernels.test_vendor import check as check_vendor

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
    given = problem(scheme, layout_of(scheme, (200, 512)), 512, 200, 512, identity=True)
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
        given.check(run(given, kernel), torch.bfloat16, unit_of(kernel), kernel=kernel)


@pytest.mark.parametrize("m", [1, 33, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_of_8_bits_times_floats(dtype: torch.dtype, m: int) -> None:
    """As the outlying columns of LLM.int8() are multiplied."""
    scheme = replace(preset("int8"), activation=None)
    given = problem(scheme, "rows8", m, 1024, 4096, dtype, ("add",))
    like = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    for kernel in sample(like, gpu.bucket(m)):
        given.check(run(given, kernel), dtype, kernel=kernel)


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
    given.check(run(given, kernel), dtype, kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["int4_24", "int8_24"])
def test_sparse_weights_decode_as_dense_ones(name: str, dtype: torch.dtype) -> None:
    """The same tile gives the same bits for both layouts, and so does decoding the weight for torch to multiply."""
    for shape in ((256, 512), (200, 448)):
        sparse = problem(preset(name).fit("layer", shape), "fragment24", 16, *shape, dtype)
        dense = replace(sparse, packed=to_layout(sparse.packed, LAYOUTS["fragment"]))
        dense.spec = replace(sparse.spec, layout="fragment")
        for tile in (
            Tile(m=16, n=64, k=128, split=2, warps=4, stages=3),
            Tile(m=16, n=64, k=64, split=1, warps=4, stages=3),
        ):
            given = [(each, each.kernel(TARGET, tile)) for each in (sparse, dense)]
            assert torch.equal(*(run(each, kernel) for each, kernel in given))
        if dtype != torch.float32:
            decoded = [vendor.decode(each.packed.to("cuda"), decoding_spec(kernel)) for each, kernel in given]
            assert torch.equal(*decoded)


@pytest.mark.parametrize("m", [1, 5, 16, 32])
@pytest.mark.parametrize(("name", "dtype"), [("int4_24", BF16), ("int8_24", BF16), ("int4_24", torch.float16)], ids=str)
def test_sparse_tensor_cores(name: str, dtype: torch.dtype, m: int) -> None:
    """Tiles of all cuts, with and without a gate whose columns are a program's halves."""
    for shape, epilogue in (((1024, 2048), ()), ((640, 1024), ("silu(a)*b",))):
        given = problem(preset(name).fit("layer", shape), "fragment24", m, *shape, dtype, epilogue)
        like = given.kernel(TARGET, Tile(m=16, n=64, k=128, split=1, warps=4, stages=1))
        ranked = [kernel for kernel in rank(candidates(like, m), m, keep=1000) if kernel.tile.form == "cores"]
        for kernel in ranked[:: max(1, len(ranked) // 5)]:
            given.check(run(given, kernel), dtype, kernel=kernel)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "mxfp4", "nvfp4", "q4_1", "mxfp8", "int4_24"])
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


GATED = ["int4", "int4_asym", "int3", "nf4", "mxfp4", "fp8_weight_only", "int8", "fp8", "fp8_block", "mxfp8", "q6_k"]


@pytest.mark.parametrize("m", [1, 16, 33, 64, 200])
@pytest.mark.parametrize("name", GATED)
def test_gates_of_every_candidate(name: str, m: int) -> None:
    """Halves of 320 rows are no multiple of what larger tiles hold of them."""
    shape = (640, 1024)
    scheme = shipped(name, shape)
    steps = ("bias", "gelu_tanh(a)*b", "add") if m == 33 else ("a*silu(b)",) if m == 200 else ("silu(a)*b",)
    given = problem(scheme, layout_of(scheme, shape), m, *shape, epilogue=steps)
    like = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    for kernel in sample(like, gpu.bucket(m)):
        given.check(run(given, kernel), torch.bfloat16, unit_of(kernel), kernel=kernel)


@pytest.mark.parametrize("m", [1, 16, 64, 200])
@pytest.mark.parametrize("store", ["to_int8", "to_fp8_e4m3", "to_fp8_e5m2"])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_stored_codes(name: str, store: str, m: int) -> None:
    if "fp8" in store and not native_fp8(TARGET):
        pytest.skip(f"{TARGET} does not store fp8")
    scheme = shipped(name, (640, 1024))
    given = problem(scheme, layout_of(scheme, (640, 1024)), m, 640, 1024, epilogue=("silu(a)*b", store))
    like = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    for kernel in sample(like, gpu.bucket(m), count=6):
        given.check(run(given, kernel), torch.bfloat16, unit_of(kernel), kernel=kernel)


@pytest.mark.parametrize("steps", [("silu(a)*b",), ("bias", "a*gelu(b)", "to_int8")], ids=str)
@pytest.mark.parametrize(("name", "path"), [("int4", "decode_mm"), ("int8", "int_mm"), ("fp8", "scaled_mm")])
def test_gates_after_torchs_products(name: str, path: str, steps: tuple[str, ...]) -> None:
    scheme = shipped(name, (640, 1024))
    given = problem(scheme, layout_of(scheme, (640, 1024)), 200, 640, 1024, epilogue=steps)
    kernel = given.kernel(TARGET, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    if (objection := vendor.objection(path, kernel, 256)) is not None:
        pytest.skip(objection)
    chosen = tuning.Chosen(kernel=kernel, vendor=path, origin="")
    check_vendor(path, given, gpu.execute(chosen, *given.arguments("cuda"), given.spec).cpu())


@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "fp8_static", "fp8_block"])
def test_a_gated_block_compiled_whole(name: str, rows: int) -> None:
    """Norm, gate and up, down: compiled with its epilogues, against the quantized modules run one by one.

    Both round to bfloat16 at several places, the compiled ones at fewer.
    """

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.RMSNorm(512)
            self.gate, self.up = (torch.nn.Linear(512, 1024, bias=False) for _ in range(2))
            self.down = torch.nn.Linear(1024, 512, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))

    torch.manual_seed(0)
    model, x = Block().to("cuda", torch.bfloat16), torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    static = name == "fp8_static"
    qcompile.quantize_(model, name, **({"calibration": [x]} if static else {}))
    # With a scale for a whole weight each, gate and up are two products.
    gated = qcompile.explain(model, x).layers[-2]
    assert gated.epilogue == (("silu", "mul", "to_fp8_e4m3") if static else ("silu(a)*b",))
    with torch.inference_mode():
        expected = model(x)
        fast = torch.compile(model, backend="qcompile", fullgraph=True)
        first = fast(x)
        assert all(torch.equal(first, fast(x)) for _ in range(LAUNCHES))
    # Activations of 8 bits whose bfloat16 differs in its last place get another code now and then, a step of 2**-4.
    assert tolerance.sqnr(expected, first) > (40.0 if name == "int4" else 25.0)
