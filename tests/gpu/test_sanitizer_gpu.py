"""One launch of each template's kinds of kernels, of ragged shapes and few blocks, to be run under compute-sanitizer:

    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
            python -m pytest -q tests/gpu/test_sanitizer_gpu.py
    done

memcheck finds nothing. racecheck reports what Triton itself adds: in streams, bytes by which warp groups are told what
to do, whose reads and writes are ordered by barriers of all warps; and in the end of attention, threads that have the
same number and store it to the same place on its way to another layout.

Without torch's cache of memory every tensor is an allocation of its own, so that memcheck sees reads beyond its end. A
plain run first compiles the kernels. Tensors are made on the CPU, so that few kernels but ours run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.spec import Tile, decoding_spec
from qcompile.layouts import LAYOUTS, choose_layout
from qcompile.norm_spec import NormSpec
from qcompile.norms import plain
from qcompile.reference import dequantize, quantize_activation
from qcompile.runtime import cache, gpu, gpu_grouped, vendor
from tests.gpu.test_attention_gpu import run, run_plain
from tests.gpu.test_gemm_gpu import TARGET, unit_of
from tests.kernels import test_attention, test_grouped
from tests.kernels.problems import problem
from tests.kernels.test_gemm import shipped
from tests.kernels.test_grouped import SCHEMES
from tests.kernels.test_norms import LLAMA, inputs

pytestmark = pytest.mark.gpu

SMALL = Tile(m=16, n=64, k=64, split=1, warps=4, stages=2)
BF16 = torch.bfloat16
KINDS: dict[str, tuple[str, int, tuple[int, int], Callable[[Tile], bool]]] = {
    "one part": ("int4", 5, (200, 448), lambda t: t.split == 1 and t.form == "loop"),
    "parts of K": ("int4_asym", 5, (200, 1024), lambda t: t.split > 1 and t.form == "loop"),
    "slab": ("mxfp4", 5, (136, 1024), lambda t: t.form == "slab"),
    "scaled products": ("nvfp4", 70, (200, 512), lambda t: t.split == 1),
    "scaled fragments": ("mxfp4", 70, (200, 512), lambda t: t.scales == "fragments" and not t.overlap),
    "overlap": ("mxfp4", 70, (200, 512), lambda t: t.overlap),
    "streams": ("int4", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "streams of 8 bits": ("int8", 70, (256, 512), lambda t: t.form == "stream"),
    "eight rows": ("int4", 1, (200, 512), lambda t: t.m == 8 and t.form == "loop"),
    "sums of groups": ("q4_k", 1, (200, 512), lambda t: t.scales == "sums"),
    "streams that share tiles": ("int4_asym", 130, (200, 640), lambda t: t.form == "stream" and t.split == 0),
    "streams of int8 rows": ("int8", 70, (200, 448), lambda t: t.form == "stream" and t.split > 0),
    "streams of int8 rows that share tiles": ("int8", 130, (200, 640), lambda t: t.form == "stream" and t.split == 0),
    "streams of sparse weights": ("int4_24", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "streams of scales in fours": ("nvfp4", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "streams of three bits": ("int3", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "streams of pairs": ("q4_0", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "streams of scales above scales": ("q4_k", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "streams of scaled products": ("nf4", 70, (256, 512), lambda t: t.form == "stream" and t.split > 0),
    "sparse tensor cores": ("int4_24", 5, (256, 512), lambda t: t.form == "cores"),
    "offsets of products": ("q4_k", 5, (200, 512), lambda t: True),
    "scaled weights": ("q4_k", 70, (200, 512), lambda t: t.m > 32 and t.form == "loop"),
    "8-bit activations": ("int4_fp8", 33, (200, 512), lambda t: True),
    "rows of int8": ("int8", 33, (200, 448), lambda t: t.split == 1),
    "rows of int8, parts of K": ("int8", 5, (200, 1024), lambda t: t.split > 1),
    "rows of fp8": ("fp8", 70, (200, 448), lambda t: t.split == 1),
    "blocks of fp8": ("fp8_block", 33, (256, 512), lambda t: True),
}
"""By what is special: a scheme, M, (N, K), and which of its tiles; the cost model's best of them is launched."""


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str) -> None:
    name, m, shape, wanted = KINDS[kind]
    scheme = shipped(name, shape)
    steps = ("bias", "silu", "mul") if m == 33 else ()
    given = problem(scheme, choose_layout(scheme, shape, "cuda").name, m, *shape, epilogue=steps)
    like = given.kernel(TARGET, SMALL)
    found = [each for each in rank(candidates(like, gpu.bucket(m)), m, keep=1000) if wanted(each.tile)]
    if not found:
        pytest.skip(f"no such tile for {TARGET}")
    y = gpu.launch(found[0], cache.load(found[0]).kernel, *given.arguments("cuda"), given.out_dtype)
    given.check(y.cpu(), BF16, unit_of(found[0]), kernel=found[0])


@pytest.mark.parametrize("name", ["int3", "q4_k"])
def test_decoding(name: str) -> None:
    given = problem(shipped(name, (200, 512)), "fragment", 1, 200, 512)
    decoded = vendor.decode(given.packed.to("cuda"), decoding_spec(given.kernel(TARGET, SMALL)))
    assert torch.equal(decoded.cpu(), dequantize(LAYOUTS["fragment"].unpack(given.packed)).to(BF16))


def test_finishing() -> None:
    given = problem(shipped("int8", (200, 64)), "rows8", 7, 200, 64, epilogue=("bias", "silu", "mul"))
    x, x_scale, weight, bias, operands = given.arguments("cpu")
    product = x.int() @ weight.codes.view(torch.int8).int().T
    parts = [t.cuda() for t in (product, x_scale, weight.scale.reshape(-1), bias)]
    finished = vendor.finish(
        tuple(parts[:3]), parts[3], [t.cuda() for t in operands], given.spec, given.kernel(TARGET, SMALL), lambda f: f
    )
    given.check(finished.cpu(), BF16)


@pytest.mark.parametrize("name", ["int4", "fp8", "fp8_block", "mxfp4"])
def test_experts(name: str) -> None:
    given = test_grouped.problem(SCHEMES[name].fit("layer", (136, 320)), [3, 0, 17, 1], 136, 320, bias=True)
    activation = given.spec.scheme.activation
    x, x_scale = (given.x, None) if activation is None else quantize_activation(given.x, activation)
    weight, bias = given.packed.to("cuda"), given.bias
    kernel = given.kernel(TARGET, SMALL, x.dtype, BF16)
    x_scale = None if x_scale is None else x_scale.cuda()
    assert bias is not None
    arguments = x.cuda(), x_scale, given.offsets.cuda(), weight, bias.cuda()
    y = gpu_grouped.launch(kernel, cache.load(kernel).kernel, *arguments, BF16)
    given.check(y.cpu(), BF16, unit_of(kernel))


@pytest.mark.parametrize(
    ("kv", "scales", "size"),
    [("fp8_e4m3", "token", 80), ("int4", "token", 80), ("int4", "token", 64), ("fp8_e4m3", "head", 64)],
)
def test_attention_to_a_cache(kv: str, scales: str, size: int) -> None:
    given = test_attention.problem(kv, scales, heads=3, group=3, context=333, size=size, dtype=BF16, length=300)
    given.check_kernel(run(given, launches=0))


@pytest.mark.parametrize("norm", [LLAMA, replace(LLAMA, k=200, columns=200)], ids=["groups", "rows"])
def test_norms(norm: NormSpec) -> None:
    given = [None if t is None else t.cuda() for t in inputs(norm, 3, BF16)]
    codes, expected = (
        made[0] for made in (torch.ops.qcompile.norm_quantize(*given, norm.encode()), plain(*given, norm))
    )
    assert (codes.cpu().float() == expected.cpu().float()).double().mean() > 0.97


def test_attention_to_plain_keys() -> None:
    given = test_attention.plain_problem(heads=2, group=4, context=333, size=128, dtype=BF16)
    given.check(run_plain(given, launches=0))
