"""Attention over a cache, against float64: by torch on CPUs, its meaning in plain torch, the Triton kernel.

For the C++ kernels see `test_cpp_attention.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.attention import reference
from qcompile.codegen.attention_spec import AttentionTile
from qcompile.codegen.devices import device_of
from qcompile.codegen.render import render
from qcompile.codegen.spec import decode_kernel_spec
from qcompile.errors import GradientError
from qcompile.flags import override
from qcompile.kv_cache import KVSpec
from qcompile.runtime import attention_cpu, attention_gpu, cache
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.kernels.attention_problems import (
    FORMATS,
    MASKS,
    Cache,
    Plain,
    Problem,
    plain_problem,
    problem,
    problems,
)


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def on_cpu(given_: Problem) -> Tensor:
    context = given_.cache[0].shape[2]
    end = context if given_.length is None else int(given_.length)
    part = [t[:, :, :end] if t.dim() > 2 else t for t in given_.cache]
    mask = None if given_.mask is None else given_.mask.expand(*given_.mask.shape[:-1], context)[..., :end]
    return attention_cpu.in_stretches(given_.query, part, mask, given_.spec)


def operator(given_: Problem) -> Tensor:
    spec = given_.spec.encode()
    y: Tensor = torch.ops.qcompile.attention(given_.query, given_.cache, given_.mask, given_.length, spec)
    return y


def in_plain_torch(given_: Problem) -> Tensor:
    return reference(given_.query, given_.cache, given_.mask, given_.length, given_.spec.encode())


PLAIN: dict[str, Callable[[Problem], Tensor]] = {"cpu": on_cpu, "reference": in_plain_torch}


@pytest.mark.parametrize("how", PLAIN)
@given(given_=problems())
def test_plain(how: str, given_: Problem) -> None:
    given_.check(PLAIN[how](given_))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("how", PLAIN)
def test_every_mask(how: str, mask: str) -> None:
    given_ = problem(mask=mask, queries=3)
    given_.check(PLAIN[how](given_))


@pytest.mark.parametrize("how", PLAIN)
def test_context_of_one_gives_the_value(how: str) -> None:
    given_ = problem(context=1, group=1, mask="none")
    y = PLAIN[how](given_)
    value = oracle.kv_values(given_.cache[2], given_.cache[3], "fp8_e4m3", 32)
    assert torch.equal(y.double(), value.float().double())


@pytest.mark.parametrize("how", PLAIN)
def test_what_lies_behind_the_length_is_not_read(how: str) -> None:
    given_ = problem("fp8_e4m3", "token", length=17, mask="none")
    before = PLAIN[how](given_)
    for codes, scale in (given_.cache[:2], given_.cache[2:]):
        codes[:, :, 17:] = 0x7F  # NaN
        scale[:, :, 17:] = torch.nan
    assert torch.equal(PLAIN[how](given_), before)


def test_blocks_do_not_change_the_result_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = problem("int8", context=700, queries=2)
    for block in (1, 16, 699, 4096):
        monkeypatch.setattr(attention_cpu, "BLOCK", block)
        given_.check(on_cpu(given_))


def test_rotated_vectors_give_what_their_numbers_give() -> None:
    """Rotation of queries and results against the reference, which turns keys and values back."""
    given_ = problem("int8", queries=3, context=50, size=24)
    scheme = replace(given_.spec.scheme, rotate=True)
    halves = {name: KVSpec(scheme=scheme, head_dim=24) for name in ("key", "value")}
    given_ = replace(given_, spec=replace(given_.spec, **halves))
    one, two = operator(given_), in_plain_torch(given_)
    magnitude = oracle.kv_values(given_.cache[2], given_.cache[3], "int8", 24).abs().amax() * torch.ones_like(two)
    tolerance.assert_within(one, two, tolerance.float_bound(two, 8 * 50, torch.float32, magnitude * 24))


def test_a_long_context_is_stable() -> None:
    given_ = problem("fp8_e4m3", "tensor", batch=1, heads=1, group=1, context=65536, size=16, mask="none")
    given_.query *= 30
    given_.check(on_cpu(given_))


def test_scores_far_apart_do_not_overflow() -> None:
    given_ = problem("int8", context=64)
    given_ = replace(given_, query=given_.query * 1e4)
    given_.check(on_cpu(given_))
    assert on_cpu(given_).isfinite().all()


def test_autograd_is_refused() -> None:
    given_ = problem()
    given_.query.requires_grad_(True)
    with pytest.raises(GradientError, match="KV cache is for inference only"):
        torch.ops.qcompile.attention(given_.query, given_.cache, given_.mask, None, given_.spec.encode())


def test_the_operator_traces() -> None:
    given_ = problem(dtype=torch.bfloat16)
    spec = given_.spec.encode()

    def attend(query: Tensor, cache: Cache, mask: Tensor) -> Tensor:
        return torch.ops.qcompile.attention(query, cache, mask, None, spec)

    assert given_.mask is not None
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    given = given_.query, given_.cache, given_.mask
    assert torch.equal(compiled(*given), attend(*given))


SMALL = AttentionTile(context=16, split=1, warps=4, stages=2)
tiles = st.builds(
    AttentionTile,
    context=st.sampled_from([16, 32, 64]),
    split=st.sampled_from([1, 2, 4]),
    warps=st.just(4),
    stages=st.just(2),
)


@given(problems(), tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel(given_: Problem, tile: AttentionTile, target: str) -> None:
    given_.check_kernel(given_.interpret(target, tile))


@pytest.mark.parametrize("ways", [1, 4])
def test_warps_that_attend_by_themselves(ways: int) -> None:
    given_ = problem("int4", queries=3, context=200, size=64, dtype=torch.bfloat16, shared=32, symmetric=False)
    given_.check_kernel(given_.interpret("sm_90", AttentionTile(context=64, split=2, warps=4, stages=2, ways=ways)))


@pytest.mark.parametrize("queries", [1, 8, 40])
def test_what_positions_say_needs_no_mask(queries: int) -> None:
    """A mask that says the same gives the same."""
    given_ = problem("int8", queries=queries, context=100, mask="none", length=77, causal=True, window=30)
    position, last = torch.arange(100), 77 - queries + torch.arange(queries)[:, None]
    mask = (position <= last) & (position > last - 30)
    other = replace(given_, mask=mask, spec=replace(given_.spec, causal=False, window=0))
    assert torch.equal(in_plain_torch(given_), in_plain_torch(other))
    tile = replace(SMALL, rows=32 if queries > 8 else 0)
    for one, two in (
        (on_cpu(given_), on_cpu(other)),
        (operator(given_), operator(other)),
        (given_.interpret("sm_90", tile), other.interpret("sm_90", tile)),
    ):
        tolerance.assert_within(one, two, tolerance.float_bound(two, 8 * 100, torch.float32, two.abs() + 4))


@pytest.mark.parametrize("mask", MASKS)
def test_kernel_with_every_mask(mask: str) -> None:
    given_ = problem("int4", mask=mask, queries=3)
    given_.check_kernel(given_.interpret("sm_90", replace(SMALL, split=2)))


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernel_decodes_every_code(kv: str, target: str) -> None:
    """One position attended to by each query gives its value."""
    count = 8
    given_ = problem(kv, "tensor", batch=1, heads=1, group=1, queries=count, context=count, size=64)
    for codes in (given_.cache[0], given_.cache[2]):
        codes.view(-1).copy_(torch.arange(codes.numel()) % 256)
    given_ = replace(given_, mask=torch.eye(count, dtype=torch.bool))
    value = oracle.kv_values(given_.cache[2], torch.ones(()), kv, 64)
    for codes in (given_.cache[0], given_.cache[2]):
        codes.masked_fill_(~value.isfinite() if codes.shape[-1] == 64 else torch.tensor(False), 0)
    value = oracle.kv_values(given_.cache[2], given_.cache[3], kv, 64)
    y = given_.interpret(target, SMALL)
    assert torch.equal(y.double(), value.float().double())


def test_the_kernels_file_makes_itself_again() -> None:
    kernel = problem().kernel("sm_90", SMALL)
    source = render(kernel)
    line = next(line for line in source.splitlines() if line.startswith("# {"))
    assert decode_kernel_spec(line.removeprefix("# ")) == kernel
    assert render(kernel) == source


@given(st.integers(1, 4096), st.integers(1, 1 << 18), st.sampled_from([64, 128, 256]), st.integers(1, 64))
def test_every_part_of_the_context_has_work(pairs: int, context: int, size: int, rows: int) -> None:
    tile = attention_gpu.tile_of(pairs, context, size, rows, "sm_90")
    assert tile.split == 1 or tile.split * tile.context <= context


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_do_not_spill(target: str) -> None:
    kernels = [
        plain_problem(heads=8, group=group, queries=queries, size=size, mask="causal", dtype=dtype).kernel(target)
        for group, queries, size, dtype in (
            (4, 1, 128, torch.bfloat16),
            (8, 8, 64, torch.float16),
            (2, 1, 256, torch.float16),
        )
    ]
    for kv, scales, size, group, queries, mask in (
        ("fp8_e4m3", "tensor", 128, 4, 1, "causal"),
        ("fp8_e5m2", "token", 64, 8, 8, "causal"),
        ("int4", "head", 256, 2, 1, "additive"),
    ):
        given_ = problem(
            kv,
            scales,
            heads=8,
            group=group,
            queries=queries,
            size=size,
            mask=mask,
            length=1,
            dtype=torch.bfloat16,
        )
        kernels.append(given_.kernel(target, attention_gpu.tile_of(8, 16384, size, group * queries, target)))
        bare = replace(given_, mask=None, spec=replace(given_.spec, causal=True))
        tile = attention_gpu.prefill_tile_of(4096, size, target, torch.bfloat16)
        kernels += [bare.kernel(target, replace(tile, split=split)) for split in (1, 8)]
    rich = problem("int4", heads=8, group=4, size=128, mask="none", causal=True, shared=32, symmetric=False)
    rich = replace(rich, query=rich.query.to(torch.bfloat16))
    tile = attention_gpu.tile_of(8, 16384, 128, 4, target, integers=True, grouped=True)
    kernels.append(rich.kernel(target, tile))
    kernels.append(rich.kernel(target, attention_gpu.prefill_tile_of(4096, 128, target, torch.bfloat16, grouped=True)))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"


@st.composite
def plain_problems(draw: st.DrawFn) -> Plain:
    sizes = st.sampled_from([2, 16, 24, 64])
    context = draw(st.sampled_from([1, 2, 15, 64, 65, 130]))
    return plain_problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        queries=draw(st.sampled_from([1, 1, 2, 5, 8])),
        context=context,
        size=draw(sizes),
        value_size=draw(st.none() | sizes),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
    )


@given(plain_problems(), tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel_for_a_cache_that_is_not_quantized(given_: Plain, tile: AttentionTile, target: str) -> None:
    given_.check(given_.interpret(target, tile))


@pytest.mark.parametrize("split", [1, 2])
def test_plain_keys_behind_the_length_are_not_read(split: int) -> None:
    given_ = plain_problem(length=17, mask="none")
    tile = replace(SMALL, split=split)
    before = given_.interpret("sm_90", tile)
    for tensor in (given_.key, given_.value):
        tensor[:, :, 17:] = torch.nan
    assert torch.equal(given_.interpret("sm_90", tile), before)


def test_a_step_in_a_graph_is_few_kernels_and_one_call() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kv_cache.fake_gpu_step", "fp8", "3"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    launched = [line for line in done.stdout.splitlines() if ".run(" in line or "torch.ops.qcompile" in line]
    assert "torch.ops.qcompile.attention_gpu" in launched[-1]
    assert all(line.startswith("triton_poi_") for line in launched[:-1])
    assert "scaled_dot_product" not in done.stdout
