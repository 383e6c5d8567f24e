"""Decode attention whose keys and values, FP8 or int4, go from memory to registers, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.attention_spec import AttentionKernelSpec, AttentionTile, lanes_objection
from qcompile.flags import override
from qcompile.runtime import attention_gpu, cache
from tests import oracle
from tests.cross_compile import measure
from tests.kernels.attention_problems import MASKS, Problem, problem
from tests.kernels.test_paged_attention import paged

HALVES = (torch.bfloat16, torch.float16)
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
FOUR_BITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offsets": {"symmetric": False},
    "groups": {"shared": 32},
    "groups with offsets": {"shared": 32, "symmetric": False},
}


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def lanes(warps: int = 2, stages: int = 2, split: int = 1) -> AttentionTile:
    return AttentionTile(context=16 * warps, split=split, warps=warps, stages=stages, ways=warps, lanes=True)


tiles = st.builds(lanes, st.sampled_from([1, 2, 4]), st.integers(1, 4), st.sampled_from([1, 2, 4]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    context, causal = draw(st.sampled_from([1, 2, 15, 16, 33, 70])), draw(st.booleans())
    group, queries = draw(st.sampled_from([(1, 1), (4, 1), (8, 1), (3, 2), (1, 5), (2, 4)]))
    kv = draw(st.sampled_from(["fp8_e4m3", "fp8_e5m2", "int4", "int4"]))
    scales = draw(st.sampled_from(["tensor", "head", *["token"] * (2 * (kv == "int4"))]))
    sizes, shared = (64, 128, 256) if kv == "int4" else (64, 128), 0
    if scales == "token":
        shared = draw(st.sampled_from([0, 32, 64]))
        sizes = tuple(size for size in sizes if size >= 2 * shared)
    return problem(
        kv,
        scales,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        group=group,
        queries=queries,
        context=context,
        size=draw(st.sampled_from(sizes)),
        value_size=draw(st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(HALVES)),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        causal=causal,
        window=draw(st.sampled_from([0, 0, 1, 20])) if causal else 0,
        shared=shared,
        symmetric=scales != "token" or draw(st.booleans()),
    )


@settings(max_examples=40)
@given(problems(), tiles)
def test_kernel(given_: Problem, tile: AttentionTile) -> None:
    given_.check_kernel(given_.interpret("sm_90", tile))


@pytest.mark.parametrize(("kv", "scales", "symmetric"), [("fp8_e4m3", "tensor", True), ("int4", "token", False)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_queries_of_any_magnitude(dtype: torch.dtype, kv: str, scales: str, symmetric: bool) -> None:
    """Elements far apart, and rows of zeros."""
    given_ = problem(kv, scales, group=4, context=50, size=64, dtype=dtype, mask="none", symmetric=symmetric)
    given_.query *= torch.logspace(-4, 2, 8)[:, None, None].to(dtype)
    given_.query[:, ::3] = 0
    given_.check_kernel(given_.interpret("sm_90", lanes()))


@pytest.mark.parametrize("kv", ["fp8_e4m3", "fp8_e5m2"])
def test_every_code_is_decoded_exactly(kv: str) -> None:
    """One position attended to by each query gives its value."""
    count = 8
    given_ = problem(
        kv, "tensor", batch=1, heads=1, group=1, queries=count, context=count, size=64, dtype=torch.float16
    )
    for codes in (given_.cache[0], given_.cache[2]):
        codes.view(-1).copy_(torch.arange(codes.numel()) % 256)
        codes.masked_fill_(~oracle.kv_values(codes, torch.ones(()), kv, 64).isfinite(), 0)
    scale = 2.0**-7 if kv == "fp8_e5m2" else 2.0**-4  # so that float16 holds all
    given_.cache[3] = torch.tensor(scale)
    given_ = replace(given_, mask=torch.eye(count, dtype=torch.bool))
    value = oracle.kv_values(given_.cache[2], given_.cache[3], kv, 64)
    y = given_.interpret("sm_90", lanes())
    assert torch.equal(y.double(), value.half().double())


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_every_code_of_four_bits_is_decoded_exactly(kind: str) -> None:
    """One position attended to by each query gives its value, of scores of 0 and scales that are powers of two."""
    given_ = problem(
        "int4", batch=1, heads=1, group=1, queries=8, context=8, size=128, dtype=torch.float16, **FOUR_BITS[kind]
    )
    for codes in (given_.cache[0], given_.cache[2]):
        codes.view(-1).copy_(torch.arange(codes.numel()) * 37 % 256)
    scale = given_.cache[3]
    parts = scale.chunk(1 if given_.spec.scheme.symmetric else 2, -1)
    parts[0].copy_(2.0 ** -(torch.arange(parts[0].numel()).view(parts[0].shape) % 4))
    if len(parts) == 2:
        parts[1].copy_(torch.arange(parts[1].numel()).view(parts[1].shape) % 5)
    given_ = replace(given_, mask=torch.eye(8, dtype=torch.bool))
    given_.query.zero_()
    codes, moves = oracle.kv_parts(given_.cache[2], scale, "int4", 128, len(parts) == 2)
    y = given_.interpret("sm_90", lanes())
    assert torch.equal(y.double(), codes + moves)


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_scales_of_any_magnitude(kind: str) -> None:
    """Values of tokens far apart, and all so small that float16 holds no such weight."""
    given_ = problem("int4", group=4, context=50, size=128, dtype=HALVES[0], mask="none", **FOUR_BITS[kind])
    scale = given_.cache[3].float()
    spread = torch.logspace(-6, 3, 50).view(1, 1, 50, *[1] * (scale.dim() - 3))
    for factor in (spread, spread.flip(2), torch.tensor(2.0**-80)):
        given_.cache[3] = (scale * factor).to(given_.cache[3].dtype)
        given_.check_kernel(given_.interpret("sm_90", lanes(split=2)))


@pytest.mark.parametrize(
    ("kv", "scales", "options"),
    [("fp8_e4m3", "head", {}), *(("int4", "token", options) for options in FOUR_BITS.values())],
)
def test_what_lies_behind_the_length_is_not_read(kv: str, scales: str, options: dict[str, Any]) -> None:
    given_ = problem(kv, scales, group=4, context=70, size=64, dtype=HALVES[0], length=37, mask="none", **options)
    before = given_.interpret("sm_90", lanes(split=2))
    for t in given_.cache:
        if t.dim() > 2:
            t[:, :, 37:] = torch.nan if t.is_floating_point() else 0x7F  # NaN of FP8
    assert torch.equal(given_.interpret("sm_90", lanes(split=2)), before)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(
    ("kv", "scales", "options"),
    [
        ("fp8_e4m3", "tensor", {}),
        ("int4", "token", {}),
        ("int4", "token", {"numbers": 32, "symmetric": False}),
        ("int4", "token", {"symmetric": False}),
    ],
)
@pytest.mark.parametrize("lengths", [(70, 1, 130), (0, 16, 33)])
def test_pages_and_unequal_lengths(
    page: int, kv: str, scales: str, options: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    given_ = paged(kv, scales, lengths, page=page, heads=2, group=4, size=64, dtype=torch.bfloat16, **options)
    for tile in (lanes(split=4), lanes(4, stages=3, split=8)):
        given_.check_kernel(given_.interpret("sm_90", tile))


def test_what_is_not_taken() -> None:
    def objection(
        kv: str = "fp8_e4m3",
        scales: str = "tensor",
        size: int = 128,
        rows: int = 4,
        page: int = 0,
        target: str = "sm_90",
        shared: int = 0,
    ) -> str | None:
        spec = problem(kv, scales, size=size, shared=shared).spec
        return lanes_objection(spec, rows, page, torch.bfloat16, target)

    assert objection() is None
    assert objection(page=32) is None
    assert objection("int4", "token", size=256, target="sm_80") is None
    assert objection("int4", "token", shared=32) is None
    assert objection("int4", "head") is None
    assert "FP8" in str(objection("int8", "token"))
    assert "int4" in str(objection("int4", "token", target="gfx942"))
    assert "FP8" in str(objection(target="sm_80"))
    assert "scales" in str(objection(scales="token"))
    assert "groups" in str(objection("int4", "token", shared=16))
    assert "8 queries" in str(objection(rows=9))
    assert "vectors" in str(objection(size=96))
    assert "vectors" in str(objection(size=256))
    assert "page" in str(objection(page=8))


def check_machine_code(kernels: list[AttentionKernelSpec]) -> None:
    """No spills, or for vectors of 256 a few outside of loops; an element a thread is one register of it."""
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["looped"] == 0, (kernel, found)
        assert found["spills"] <= (16 if kernel.key_size > 128 else 0), (kernel, found)
        assert found["scattered"] == [], (kernel, found)
        assert found["mma"].startswith("mma.sync"), (kernel, found)
        assert "v4.b32" in found["loads"], (kernel, found)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_machine_code(target: str) -> None:
    kernels: list[AttentionKernelSpec] = []
    for size, queries, pairs in ((64, 2, 8), (128, 1, 8), (128, 2, 64)):
        tile = attention_gpu.lanes_tile_of(pairs, 16384, target)
        given_ = problem("fp8_e4m3", "head", heads=8, group=4, queries=queries, size=size, dtype=HALVES[0], length=1)
        kernels.append(given_.kernel(target, tile))
    pages = paged("fp8_e4m3", "tensor", (5,) * 8, page=64, heads=8, group=4, size=128, dtype=HALVES[0])
    kernels.append(pages.kernel(target, attention_gpu.lanes_tile_of(64, 16384, target, sequences=8, page=64)))
    check_machine_code(kernels)


@pytest.mark.parametrize("kind", ["plain", "groups with offsets"])
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_of_four_bits(target: str, kind: str) -> None:
    """Of Hopper what the tiles are chosen for; of others what takes most registers."""
    kernels, options = [], FOUR_BITS[kind]
    numbers, symmetric = options.get("shared", 0), options.get("symmetric", True)
    for size, pairs in ((64, 8), (128, 64), (256, 64)) if target == "sm_90" else ():
        tile = attention_gpu.lanes_tile_of(pairs, 16384, target, size=size, grouped=numbers > 0)
        given_ = problem("int4", heads=8, group=4, queries=2, size=size, dtype=HALVES[0], length=1, **options)
        kernels.append(given_.kernel(target, tile))
    for size in (128,) if target == "sm_90" else (256,):
        shape = {"page": 64, "heads": 8, "group": 4, "size": size, "dtype": HALVES[0]}
        pages = paged("int4", "token", (5,) * 8, numbers=numbers, symmetric=symmetric, **shape)
        tile = attention_gpu.lanes_tile_of(64, 16384, target, 8, 64, size, numbers > 0)
        kernels.append(pages.kernel(target, tile))
    check_machine_code(kernels)
