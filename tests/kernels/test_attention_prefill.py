"""Attention from many queries over a cache: the Triton kernel, against float64 and compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen.attention_spec import AttentionTile, Reach
from qcompile.codegen.devices import device_of
from qcompile.flags import override
from qcompile.runtime import attention_gpu, cache
from tests.cross_compile import measure
from tests.kernels.attention_problems import Problem, problem, problems

TYPES = (("fp8_e4m3", "tensor"), ("fp8_e5m2", "token"), ("int8", "token"), ("int4", "token"), ("bfloat16", "none"))
"""Of caches, and scales."""


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


prefill_tiles = st.builds(
    AttentionTile,
    context=st.sampled_from([16, 64]),
    split=st.sampled_from([1, 2, 8]),
    warps=st.just(4),
    stages=st.just(2),
    rows=st.sampled_from([16, 64]),
)


@given(problems(queries=(1, 9, 40)), prefill_tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel_for_many_queries(given_: Problem, tile: AttentionTile, target: str) -> None:
    given_.check_kernel(given_.interpret(target, tile))


def test_few_programs_share_a_long_context() -> None:
    choose, options = attention_gpu.choose_prefill, ("none", Reach(length=True), torch.bfloat16, "sm_90")
    spec = problem("fp8_e4m3", size=128, compute=None).spec
    splits = {
        shape: choose(spec, batch, 8, 4, queries, context, *options).tile.split
        for shape in ((1, 32, 16384), (1, 9, 256), (4, 32, 16384), (1, 2048, 2048))
        for batch, queries, context in (shape,)
    }
    assert splits == {(1, 32, 16384): 16, (1, 9, 256): 1, (4, 32, 16384): 4, (1, 2048, 2048): 1}


@pytest.mark.parametrize(("turn", "target"), enumerate(["sm_80", "sm_89", "sm_100", "gfx942", "sm_90"]))
def test_cross_compiled_kernels_do_not_spill(turn: int, target: str) -> None:
    """Heads of all sizes and caches of all types; every other kernel has parts, which its programs put together.

    On sm_90 all of them; others take turns, since compiling takes long.
    """
    kernels = []
    for size, (kv, scales) in itertools.product((64, 128, 256), TYPES):
        given_ = problem(kv, scales, heads=8, group=4, size=size, mask="none", length=1, causal=True)
        given_ = replace(given_, query=given_.query.to(torch.bfloat16))
        tile = attention_gpu.prefill_tile_of(4096, size, target, torch.bfloat16, plain=scales == "none")
        kernels.append(given_.kernel(target, replace(tile, split=8 if len(kernels) % 2 else 1)))
    kernels = kernels if target == "sm_90" else kernels[turn::4]
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= (99 * 1024 if target == "sm_89" else device_of(target).shared), (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_groups_of_wide_heads_do_not_spill(target: str) -> None:
    given_ = problem("int4", heads=8, group=4, size=256, mask="none", causal=True, shared=32, symmetric=False)
    given_ = replace(given_, query=given_.query.to(torch.bfloat16))
    tile = attention_gpu.prefill_tile_of(4096, 256, target, torch.bfloat16, grouped=True)
    (found,) = measure([given_.kernel(target, tile)])
    assert found["spills"] == 0, found
