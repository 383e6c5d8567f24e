"""Stacks of experts on a GPU: against float64, the same bits at every launch, one graph, nothing read back."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import qcompile
from qcompile.codegen.spec import Tile, grouped_spec, kernel_spec
from qcompile.experts import GroupedLinear
from qcompile.reference import quantize_activation
from qcompile.runtime import cache, gpu, gpu_grouped
from tests import tolerance
from tests.checkpoint.moe_files import make_moe
from tests.gpu.test_gemm_gpu import sample, unit_of
from tests.kernels.test_grouped import GATES, SCHEMES, Problem, problem
from tests.kernels.test_vendor_grouped import VENDORED
from tests.kernels.test_vendor_grouped import run as run_vendor

pytestmark = pytest.mark.gpu

LAUNCHES = 20
SMALL = Tile(m=16, n=64, k=64, split=1, warps=4, stages=2)
COUNTS = {"decode": [1, 0, 3, 0, 0, 1, 0, 0], "ragged": [40, 0, 129, 16, 1, 0, 70, 17]}


def check(given: Problem, dtype: torch.dtype) -> None:
    """Tiles that may be chosen for these rows, launched many times."""
    activation = given.spec.scheme.activation
    x, x_scale = (given.x, None) if activation is None else quantize_activation(given.x, activation)
    x, x_scale = x.cuda(), None if x_scale is None else x_scale.cuda()
    weight = given.packed.to("cuda")
    offsets, bias = given.offsets.cuda(), None if given.bias is None else given.bias.cuda()
    like = grouped_spec(kernel_spec(given.spec, x.dtype, dtype, gpu.target_of(x.device), SMALL), len(given.weights))
    kernels = {each for m in (16, 64, 256) for each in sample(like, m)}
    for kernel in kernels:
        function = cache.load(kernel).kernel
        first = gpu_grouped.launch(kernel, function, x, x_scale, offsets, weight, bias, dtype)
        for _ in range(LAUNCHES):
            again = gpu_grouped.launch(kernel, function, x, x_scale, offsets, weight, bias, dtype)
            assert torch.equal(first.view(torch.uint8), again.view(torch.uint8)), f"launches of {kernel} differ"
        compute = torch.bfloat16 if activation is not None else dtype
        given.check(first.cpu(), compute, unit_of(kernel), kernel=kernel)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_candidate(name: str, counts: str) -> None:
    scheme = SCHEMES[name].fit("layer", (200, 512))
    check(problem(scheme, COUNTS[counts], 200, 512, bias=counts == "ragged"), torch.bfloat16)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ["int4", "int4_asym", "nf4", "mxfp4", "nvfp4", "fp8", "fp8_block", "int8"])
def test_gates_of_every_candidate(name: str, counts: str, gate: str) -> None:
    scheme = SCHEMES[name].fit("layer", (384, 512))
    check(problem(scheme, COUNTS[counts], 384, 512, bias=counts == "ragged", gate=gate), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["int4_asym", "mxfp4", "nf4", "k-quant"])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    check(problem(SCHEMES[name].fit("layer", (128, 256)), COUNTS["ragged"], 128, 256, dtype), dtype)


@pytest.mark.parametrize("gate", ["", *GATES])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("path", "name"), VENDORED)
def test_torchs_products(path: str, name: str, counts: str, gate: str) -> None:
    if gpu.target_of(torch.device("cuda")) != "sm_90":
        pytest.skip("torch's kernels are for sm_90")
    scheme = SCHEMES[name].fit("layer", (208, 512))
    given = problem(scheme, COUNTS[counts], 208, 512, bias=counts == "ragged", gate=gate)
    given.check(run_vendor(path, given, "cuda").cpu(), torch.bfloat16, between=torch.bfloat16)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "fp8_block", "mxfp4", "nvfp4", "q4_1"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_models_compute_what_they_do_on_cpus(kind: str, name: str) -> None:
    model = make_moe(kind)
    qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": name}]}, progress=False)
    experts = model.model.layers[0].mlp.experts
    x, weights, chosen = torch.randn(33, 64), torch.rand(33, 2), torch.rand(33, 4).topk(2).indices
    expected = experts(x, chosen, weights)
    moved = copy.deepcopy(experts).cuda()
    layout = "rows8" if name in ("int8", "fp8", "fp8_block") else "fragment"
    assert all(m.layout == layout for m in moved.modules() if isinstance(m, GroupedLinear))
    y = moved(x.cuda(), chosen.cuda(), weights.cuda()).cpu()
    # CPUs multiply float32; products of quantized inputs are in bfloat16 on both, and roundings of inputs may differ.
    floor = 60.0 if name in ("int4", "mxfp4", "nvfp4", "q4_1") else tolerance.float_sqnr_floor(3) - 3
    assert tolerance.sqnr(expected, y) > floor
    for name_, tensor in moved.cpu().state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), experts.state_dict()[name_].view(torch.uint8))


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_that_is_captured_and_replayed() -> None:
    """No call waits for the device, and a CUDA graph captured for one choice of experts serves every other."""
    model = make_moe("mixtral")
    qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": "int4"}]}, progress=False)
    experts = model.model.layers[0].mlp.experts.cuda().to(torch.bfloat16)
    compiled = torch.compile(experts, fullgraph=True)
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(8, 2, device="cuda", dtype=torch.bfloat16)
    chosen = torch.rand(8, 4, device="cuda").topk(2).indices
    for _ in range(3):
        compiled(x, chosen, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x, chosen, weights)
    for choice in (torch.zeros_like(chosen) + torch.tensor([3, 1], device="cuda"), chosen.flip(0)):
        chosen.copy_(choice)
        graph.replay()
        torch.cuda.synchronize()
        expected = experts(x, chosen, weights)
        # Either side rounds to bfloat16 at most four times (two products, the gate, the sum of experts); noises add up.
        assert tolerance.sqnr(expected, y) > tolerance.float_sqnr_floor(7) - 10 * math.log10(8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x, chosen, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
