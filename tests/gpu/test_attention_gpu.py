"""Attention over quantized caches on a GPU, against float64, and bit for bit the same at every launch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from qcompile.codegen.attention_spec import AttentionTile, lanes_objection
from qcompile.codegen.spec import native_fp8
from qcompile.runtime import attention_gpu, cache
from qcompile.runtime.gpu import target_of
from tests import tolerance
from tests.kernels.attention_problems import FORMATS, MASKS, Plain, Problem, plain_problem, problem
from tests.kernels.test_attention_fp8 import e4m3_queries

pytestmark = pytest.mark.gpu

LAUNCHES = 50


def on_gpu(given: Problem) -> Problem:
    return replace(
        given,
        query=given.query.cuda(),
        cache=[t.cuda() for t in given.cache],
        mask=None if given.mask is None else given.mask.cuda(),
        length=None if given.length is None else given.length.cuda(),
    )


def run(given: Problem, launches: int = LAUNCHES) -> torch.Tensor:
    """The operator's result, after calling it many times and comparing bits."""
    moved = on_gpu(given)

    def call() -> torch.Tensor:
        y: torch.Tensor = torch.ops.qcompile.attention(
            moved.query, moved.cache, moved.mask, moved.length, moved.spec.encode()
        )
        return y

    first = call()
    for _ in range(launches):
        assert torch.equal(first.view(torch.uint8), call().view(torch.uint8)), "launches differ"
    return first.cpu()


@pytest.mark.parametrize("scales", ["tensor", "head", "token"])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decoding(kv: str, scales: str, dtype: torch.dtype) -> None:
    given = problem(kv, scales, heads=4, group=4, context=1000, size=128, dtype=dtype, length=777)
    given.check_kernel(run(given))


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [16, 64, 80, 96, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_shapes(size: int, group: int, queries: int) -> None:
    given = problem(
        "fp8_e4m3", "token", heads=3, group=group, queries=queries, context=333, size=size, dtype=torch.bfloat16
    )
    given.check_kernel(run(given))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv", ["fp8_e5m2", "int4"])
def test_masks(kv: str, mask: str) -> None:
    given = problem(kv, "token", queries=4, context=500, size=64, mask=mask, softcap=7.0, dtype=torch.bfloat16)
    given.check_kernel(run(given))


@pytest.mark.parametrize("context", [1, 63, 4096, 65536])
def test_contexts(context: int) -> None:
    given = problem("fp8_e4m3", "head", batch=1, context=context, size=128, dtype=torch.bfloat16)
    given.check_kernel(run(given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("kv", FORMATS)
def test_prefill(kv: str, size: int, dtype: torch.dtype) -> None:
    given = problem(
        kv, "token", heads=3, group=3, queries=150, context=400, size=size, dtype=dtype, mask="none", length=380
    )
    given = replace(given, spec=replace(given.spec, causal=True))
    given.check_kernel(run(given))


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("queries", [9, 20, 64])
def test_few_tokens_share_a_long_context(kv: str, queries: int, size: int) -> None:
    given = problem(
        kv, "token", heads=3, group=4, queries=queries, context=8000, size=size, dtype=torch.bfloat16, mask="none"
    )
    given = replace(given, length=torch.tensor(7900), spec=replace(given.spec, causal=True))
    given.check_kernel(run(given))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [0, 50])
def test_prefill_masks(mask: str, window: int) -> None:
    given = problem("fp8_e4m3", "head", queries=70, context=300, size=64, mask=mask, softcap=7.0, dtype=torch.bfloat16)
    given = replace(given, spec=replace(given.spec, causal=window > 0, window=window))
    given.check_kernel(run(given))


@pytest.mark.parametrize("shared", [0, 16, 32])
@pytest.mark.parametrize("queries", [1, 8, 100])
@pytest.mark.parametrize("kv", ["int4", "int8"])
def test_groups_with_offsets(kv: str, queries: int, shared: int) -> None:
    given = problem(
        kv,
        "token",
        heads=4,
        queries=queries,
        context=777,
        size=128,
        dtype=torch.bfloat16,
        mask="none",
        causal=True,
        shared=shared,
        symmetric=False,
    )
    given.check_kernel(run(given))


def in_lanes(symmetric: bool, shared: int, rows: int, length: int, **options: Any) -> Problem:
    """A problem of int4 that goes through lanes."""
    given = problem(
        "int4", "token", heads=3, mask="none", length=length, symmetric=symmetric, shared=shared, causal=True, **options
    )
    target = target_of(torch.device("cuda", 0))
    assert lanes_objection(given.spec, rows, 0, given.query.dtype, target) is None
    return given


@pytest.mark.parametrize(("symmetric", "shared"), [(True, 0), (False, 0), (True, 32), (False, 32), (False, 64)])
@pytest.mark.parametrize(("group", "queries", "dtype"), [(4, 1, torch.bfloat16), (2, 4, torch.float16)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_four_bits_in_lanes(
    size: int, group: int, queries: int, dtype: torch.dtype, symmetric: bool, shared: int
) -> None:
    if 2 * shared > size:
        pytest.skip("a vector has no two such groups")
    options = {"group": group, "queries": queries, "context": 777, "size": size, "dtype": dtype}
    given = in_lanes(symmetric, shared, group * queries, 770, **options)
    given.check_kernel(run(given))


@pytest.mark.parametrize(("symmetric", "shared"), [(True, 0), (False, 32)])
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 20000), (12, 4096)])
def test_contexts_of_four_bits(batch: int, context: int, symmetric: bool, shared: int) -> None:
    options = {"batch": batch, "group": 4, "context": context, "size": 128, "dtype": torch.bfloat16}
    given = in_lanes(symmetric, shared, 4, context, **options)
    given.check_kernel(run(given))


@pytest.mark.parametrize(("symmetric", "shared"), [(True, 0), (False, 32)])
@pytest.mark.parametrize(("warps", "stages", "split"), [(1, 2, 1), (4, 1, 32), (4, 2, 4), (8, 2, 16), (8, 3, 4)])
def test_every_tile_with_lanes_gives_the_same_within_the_bound(
    warps: int, stages: int, split: int, symmetric: bool, shared: int
) -> None:
    given = in_lanes(symmetric, shared, 4, 1999, group=4, context=2000, size=128, dtype=torch.bfloat16)
    moved, target = on_gpu(given), target_of(torch.device("cuda", 0))
    tile = AttentionTile(context=16 * warps, split=split, warps=warps, stages=stages, ways=warps, lanes=True)
    kernel = given.kernel(target, tile)
    function = cache.load(kernel).kernel
    y = attention_gpu.launch(kernel, function, moved.query, moved.cache, moved.mask, moved.length)
    given.check_kernel(y.cpu())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 8, 150])
@pytest.mark.parametrize(("kv", "scales"), [("fp8_e4m3", "tensor"), ("fp8_e5m2", "head"), ("fp8_e4m3", "token")])
def test_products_in_fp8(kv: str, scales: str, queries: int, size: int, exact: bool) -> None:
    if not native_fp8(target_of(torch.device("cuda", 0))):
        pytest.skip("the device does not multiply FP8")
    given = problem(
        kv,
        scales,
        queries=queries,
        context=400,
        size=size,
        dtype=torch.bfloat16,
        mask="none",
        length=380,
        compute="fp8",
    )
    given = replace(given, spec=replace(given.spec, causal=True))
    given = e4m3_queries(given) if exact else given
    given.check_fp8(run(given), accumulate=2.0**-13)


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [0, 100])
def test_queries_know_their_positions(queries: int, window: int) -> None:
    given = problem("fp8_e4m3", "head", queries=queries, context=2000, size=128, dtype=torch.bfloat16, mask="none")
    given = replace(given, length=torch.tensor(1900), spec=replace(given.spec, causal=True, window=window))
    given.check_kernel(run(given))


@pytest.mark.parametrize("kv", FORMATS)
def test_compiled_operator_equals_eager(kv: str) -> None:
    given = on_gpu(problem(kv, "token", context=900, size=128, dtype=torch.bfloat16, length=800))
    spec = given.spec.encode()

    def call(
        query: torch.Tensor, tensors: list[torch.Tensor], mask: torch.Tensor, length: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.qcompile.attention(query, tensors, mask, length, spec)

    assert given.mask is not None
    assert given.length is not None
    expected = call(given.query, given.cache, given.mask, given.length)
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(given.query, given.cache, given.mask, given.length), expected)


def test_every_split_gives_the_same_within_the_bound() -> None:
    given = problem("int8", "token", context=2000, size=128, dtype=torch.bfloat16)
    moved, target = on_gpu(given), target_of(torch.device("cuda", 0))
    for split in (1, 2, 8, 64):
        for block in (16, 32, 64, 128):
            for warps in (4, 8):
                tile = replace(attention_gpu.tile_of(4, 2000, 128, 2, target), split=split, context=block, warps=warps)
                kernel = given.kernel(target, tile)
                function = cache.load(kernel).kernel
                y = attention_gpu.launch(kernel, function, moved.query, moved.cache, moved.mask, moved.length)
                given.check_kernel(y.cpu())


def run_plain(given: Plain, launches: int = LAUNCHES) -> torch.Tensor:
    """The operator's result on keys and values that are not quantized, after many launches whose bits are compared."""
    moved = replace(
        given,
        query=given.query.cuda(),
        key=given.key.cuda(),
        value=given.value.cuda(),
        mask=None if given.mask is None else given.mask.cuda(),
        length=None if given.length is None else given.length.cuda(),
    )
    first = moved.operator()
    for _ in range(launches):
        assert torch.equal(first.view(torch.uint8), moved.operator().view(torch.uint8)), "launches differ"
    return first.cpu()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_masks(mask: str, dtype: torch.dtype) -> None:
    given = plain_problem(heads=4, group=4, queries=2, context=1000, size=128, dtype=dtype, mask=mask)
    given.check(run_plain(given))


@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_plain_shapes(size: int, group: int, queries: int) -> None:
    given = plain_problem(heads=3, group=group, queries=queries, context=333, size=size, length=300, mask="none")
    given.check(run_plain(given))


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 264), (16, 264), (1, 65536)])
def test_plain_contexts(batch: int, context: int) -> None:
    given = plain_problem(batch=batch, heads=8, group=4, context=context, size=128)
    given.check(run_plain(given))


def test_a_decoding_step_of_transformers_shares_heads() -> None:
    """Compiled with the pass against compiled by Inductor alone: both round to bfloat16 about ten times a branch."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    ids = torch.randint(0, 1000, (3, 40), device="cuda")
    results = []
    for backend in ("inductor", "qcompile"):
        cache = transformers.StaticCache(config=config, max_cache_len=300)
        step = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            logits = [step(input_ids=ids[:, i : i + 1], past_key_values=cache).logits.float() for i in range(3)]
        assert all(int(layer.cumulative_length) == 43 for layer in cache.layers)
        results.append(torch.cat(logits))
        torch.compiler.reset()
    assert tolerance.sqnr(*results) > -20 * math.log10(40 * tolerance.unit(torch.bfloat16))
