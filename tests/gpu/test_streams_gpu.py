"""Streams (`gemm_stream`, `gemm_stream_rows8`), which no interpreter runs: against float64, the same bits each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcompile.codegen.cost_model import candidates
from qcompile.codegen.spec import KernelSpec, Tile
from qcompile.codegen.stream_spec import has_gluon
from qcompile.presets import preset
from qcompile.scheme import Granularity, Scheme
from tests.gpu.test_gemm_gpu import BF16, TARGET, run
from tests.kernels.problems import Problem, problem
from tests.kernels.test_gemm import weight_scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(TARGET != "sm_90" or not has_gluon(), reason="needs Hopper and a Triton with Gluon"),
]

SMALL = Tile(m=16, n=64, k=64, split=1, warps=4, stages=3)
FORMATS = {
    "int4": ("int4", 128, BF16),
    "uint4": ("uint4", 128, BF16),
    "int4 of 64": ("int4", 64, BF16),
    "uint4 of 64": ("uint4", 64, BF16),
    "int4 of 256": ("int4", 256, BF16),
    "nf4 of 64": ("nf4", 64, BF16),
    "int4 float16": ("int4", 128, torch.float16),
    "int4 of rows": ("int4", 0, BF16),
    "int8 of rows": ("int8", 0, BF16),
    "int4 sparse": ("int4", 128, BF16),
    "int4 sparse of 64": ("int4", 64, BF16),
    "int4 sparse of 256": ("int4", 256, BF16),
    "int4 sparse float16": ("int4", 128, torch.float16),
    "int4 sparse of rows": ("int4", 0, BF16),
    "int8 sparse of rows": ("int8", 0, BF16),
    "int8 sparse": ("int8", 128, BF16),
    "int8 sparse float16": ("int8", 64, torch.float16),
    "mxfp4": ("mxfp4", None, BF16),
    "nvfp4": ("nvfp4", None, BF16),
    "nvfp4 float16": ("nvfp4", None, torch.float16),
    "nf4": ("nf4", None, BF16),
    "fp4": ("fp4", None, BF16),
    "uint4 float32": ("uint4", 128, BF16),
    "int4 sparse float32": ("int4", 64, BF16),
    "fp8": ("fp8_weight_only", None, BF16),
    "fp8 float16": ("fp8_weight_only", None, torch.float16),
    "int2 of 64": ("int2", 64, BF16),
    "int3": ("int3", 128, BF16),
    "uint3": ("uint3", 128, BF16),
    "int5": ("int5", 128, BF16),
    "uint5 float32": ("uint5", 64, BF16),
    "int6": ("int6", 256, BF16),
    "int6 float16": ("int6", 128, torch.float16),
    "int6 of rows": ("int6", 0, BF16),
    "uint7": ("uint7", 64, BF16),
    "int7 float32": ("int7", 128, BF16),
    "int2 of 16 float32": ("int2", 16, BF16),
    "uint4 of 32": ("uint4", 32, BF16),
    "uint6 of 32 float32": ("uint6", 32, BF16),
    "q4_0": ("q4_0", None, BF16),
    "q5_0": ("q5_0", None, BF16),
    "q3_k": ("q3_k", None, BF16),
    "q6_k": ("q6_k", None, BF16),
    "q4_1": ("q4_1", None, BF16),
    "iq4_nl": ("iq4_nl", None, BF16),
    "iq4_xs": ("iq4_xs", None, BF16),
    "q2_k": ("q2_k", None, BF16),
    "q4_k": ("q4_k", None, BF16),
    "q5_k": ("q5_k", None, BF16),
}
"""Format of weights, columns of a group (0: of a row; None: the format is a preset) and type of activations; names say
which are 2:4 sparse."""


ROWS = ("int8", "int8 of a tensor")
"""Schemes whose 8-bit weights and activations are multiplied as they are."""


def given(name: str, m: int, n: int, k: int, *steps: str, identity: bool = False) -> Problem:
    if name in ROWS:
        scheme = preset("int8")
        if name != "int8":
            tensor, static = (
                Granularity.tensor(),
                replace(scheme.activation, granularity=Granularity.tensor(), dynamic=False),
            )
            scheme = replace(scheme, weight=replace(scheme.weight, granularity=tensor), activation=static)
        return problem(scheme, "rows8", m, n, k, BF16, steps)
    number, columns, dtype = FORMATS[name]
    if columns is None:
        return problem(preset(number), "fragment", m, n, k, dtype, steps, identity=identity)
    scale = next((scale for scale in ("float32", "float16") if scale in name), "bfloat16")
    if columns:
        weight = weight_scheme(number, Granularity.group(columns), scale)
    else:
        weight = weight_scheme(number, Granularity.channel())
    layout = "fragment"
    if "sparse" in name:
        weight, layout = replace(weight, sparsity="2:4"), "fragment24"
    return problem(Scheme(weight=weight), layout, m, n, k, dtype, steps, identity=identity)


def streams(problem: Problem, m: int) -> list[KernelSpec]:
    found = [kernel for kernel in candidates(problem.kernel(TARGET, SMALL), m) if kernel.tile.form == "stream"]
    assert found
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_identity_returns_the_weights(name: str) -> None:
    probe = given(name, 512, 200, 512, identity=True)
    for kernel in streams(probe, 512)[:: 3 if name == "int4" else 7]:
        assert torch.equal(run(probe, kernel).double(), probe.weight.to(probe.x.dtype).double().T), kernel.tile


@pytest.mark.parametrize("m", [33, 100, 300])
@pytest.mark.parametrize("shape", [(200, 448), (1024, 4096)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "int8",
        "int4 sparse",
        "int8 sparse of rows",
        "mxfp4",
        "nvfp4",
        "nf4",
        "fp8",
        "int3",
        "int6",
        "uint7",
        "q4_0",
        "q6_k",
        "q4_k",
        "uint4 of 32",
    ],
)
def test_every_tile(name: str, shape: tuple[int, int], m: int) -> None:
    """Of the last rows, columns and tokens there are fewer than a tile has; some tiles are shared by programs."""
    probe = given(name, m, *shape)
    for kernel in streams(probe, 512):
        probe.check(run(probe, kernel), BF16, kernel=kernel)


@pytest.mark.parametrize("name", ["int4 sparse", "int8 sparse of rows"])
def test_few_rows(name: str) -> None:
    """Tiles of 16 and 32, which sparse weights have."""
    for m, steps in ((16, ()), (32, ("bias", "silu", "mul", "add")), (40, ("silu(a)*b",))):
        probe = given(name, m, 640, 1024, *steps)
        for kernel in streams(probe, min(m, 32)):
            assert kernel.tile.m == min(m, 32)
            probe.check(run(probe, kernel), BF16, kernel=kernel)


@pytest.mark.parametrize("steps", [(), ("bias", "silu", "mul", "add"), ("silu(a)*b",)], ids=str)
def test_integers_are_those_of_rows(steps: tuple[str, ...]) -> None:
    """Sums of integers are exact, so tiles of both forms give the same bits where no parts are added."""
    probe = given("int8", 300, 640, 1008, *steps)
    plain = run(probe, probe.kernel(TARGET, Tile(m=64, n=128, k=128, split=1, warps=8, stages=3)))
    for kernel in streams(probe, 512):
        if kernel.tile.split == 1:
            assert torch.equal(run(probe, kernel), plain), kernel.tile


@pytest.mark.parametrize("name", [*FORMATS, *ROWS])
def test_formats_and_operands(name: str) -> None:
    for m, steps in ((64, ()), (200, ("bias", "silu", "mul", "add"))):
        probe = given(name, m, 640, 1024, *steps)
        for kernel in streams(probe, 256)[::4]:
            probe.check(run(probe, kernel), probe.out_dtype, kernel=kernel)


@pytest.mark.parametrize("steps", [("silu(a)*b",), ("bias", "gelu_tanh(a)*b", "add")], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "uint4 of 64",
        "int8 of rows",
        "int4 sparse",
        "int8 sparse of rows",
        "nvfp4",
        "nf4",
        "fp8",
        "uint3",
        *ROWS,
    ],
)
def test_gates(name: str, steps: tuple[str, ...]) -> None:
    """Halves of 320 rows are no multiple of what a program holds of them."""
    for m in (64, 200):
        probe = given(name, m, 640, 1024, *steps)
        for kernel in streams(probe, 256):
            probe.check(run(probe, kernel), BF16, kernel=kernel)


def test_stored_codes() -> None:
    probe = given("int8", 200, 640, 1024, "silu(a)*b", "to_fp8_e4m3")
    for kernel in streams(probe, 256):
        probe.check(run(probe, kernel), BF16, kernel=kernel)


@pytest.mark.parametrize("name", ["int4", "int8", "int4 sparse"])
def test_more_tiles_than_processors(name: str) -> None:
    """Programs take some tiles whole, and share what is left; tiles of M are more than a band."""
    for m, n in ((700, 4096 + 128), (2200, 1024)):
        probe = given(name, m, n, 512)
        for kernel in streams(probe, 4096):
            probe.check(run(probe, kernel), BF16, kernel=kernel)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_activations_that_are_not_aligned(name: str) -> None:
    probe = given(name, 64, 256, 512)
    kernel = streams(probe, 64)[0]
    x, *others = probe.arguments("cuda")
    shifted = replace(probe)
    shifted.arguments = lambda device: (x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x), *others)  # type: ignore
    probe.check(run(shifted, kernel), BF16)
